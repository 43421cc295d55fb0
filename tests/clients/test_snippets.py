"""The programs that `uplinkd device snippet` prints, as they are printed: each reports, and the report is stored."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.clients.fleet import Fleet, Thing, ask
from tests.clients.tools import needs
from uplinkd.cli import uplinkd

NASTY = ["plain0Secret", 'it\'s "quoted" \\n $HOME `id` %s !! ??/ #{x}', "-密钥 é\\", "'", "\"\"\"'''\\"]
NAMES = ["lamp", "a-b_c@d.e:f", "x" * 64, "-n", "@file"]


@pytest.fixture(params=range(len(NASTY)))
def nasty(fleet: Fleet, request: pytest.FixtureRequest) -> Thing:
    """A device whose name and secret mean something to shells and compilers; imported, like those of an old fleet."""
    number: int = request.param
    name = (NAMES[number] + _letter(request))[-64:]
    fields = [f'"{each.replace(chr(34), chr(34) * 2)}"' for each in (fleet.product, name, NASTY[number])]
    file = fleet.server.data.parent / f"nasty{number}{_letter(request)}.csv"
    file.write_text("ProductKey,DeviceName,DeviceSecret\n" + ",".join(fields) + "\n", encoding="utf-8")
    ask("device", "import", str(file), data=fleet.server.data)
    return Thing(fleet.server, fleet.product, name, NASTY[number])


def _letter(request: pytest.FixtureRequest) -> str:
    """One for each test, so that no two share a device."""
    tests = ("test_bash", "test_python", "test_c_", "test_mosquitto")
    return next(test[5] for test in tests if request.node.name.startswith(test))


def snippet(thing: Thing, language: str) -> str:
    server = thing.server
    place = ("--url", f"https://localhost:{server.port}", "--mqtt-listen", f"127.0.0.1:{server.mqtt_port}")
    unset = {name: None for name in os.environ if name.startswith("UPLINKD_")}
    arguments = ["device", "snippet", "--language", language, *place, "--data", str(server.data)]
    done = CliRunner(env=unset).invoke(uplinkd, [*arguments, "--", thing.product, thing.name])
    assert done.exit_code == 0, done.output
    return done.stdout


def run(*command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """With no proxy between the device and this machine."""
    direct = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, input=stdin, env=direct)


def check(thing: Thing, done: subprocess.CompletedProcess[str], origin: str = "https") -> None:
    """It ended well, said the messageId over HTTPS, and the report is stored under the device's topic."""
    assert (done.returncode, done.stderr) == (0, "")
    stored = [row for row in thing.stored() if row["origin"] == origin]
    assert [(row["topic"], row["payload"]) for row in stored] == [(thing.topic(), b'{"on":true}')]
    if origin == "https":
        told = re.search(r"messageId\D{1,3}(\d+)", done.stdout)
        assert told, done.stdout
        assert told[1] == str(stored[0]["messageId"])


@needs("bash", "curl", "openssl")
def test_bash_reports(nasty: Thing) -> None:
    """Pasted into a shell."""
    check(nasty, run("bash", stdin=snippet(nasty, "curl")))


def test_python_reports(nasty: Thing, tmp_path: Path) -> None:
    """Without a package installed."""
    program = tmp_path / "report.py"
    program.write_text(snippet(nasty, "python"), encoding="utf-8")
    check(nasty, run(sys.executable, "-I", str(program)))


def _missing_for_c() -> str:
    """What the program in C would need and is not here; empty when all is."""
    if shutil.which("gcc") is None:
        return "gcc is not installed"
    done = run("gcc", "-E", "-", stdin="#include <curl/curl.h>\n#include <openssl/hmac.h>\n")
    missing = re.search(r"(\S+\.h): No such file", done.stderr)
    return f"{missing[1]} is not installed" if missing else ""


def test_c_reports(nasty: Thing, tmp_path: Path) -> None:
    """Compiled by the line in its first comment, without a warning."""
    program = snippet(nasty, "c")
    if reason := _missing_for_c():
        pytest.skip(reason)
    (tmp_path / "report.c").write_text(program, encoding="utf-8")
    line = re.search(r"Compile: (.*)", program)
    assert line
    compiled = run("bash", "-c", f"cd '{tmp_path}' && {line[1]}")
    assert (compiled.returncode, compiled.stderr) == (0, "")
    check(nasty, run(str(tmp_path / "report")))


@needs("bash", "mosquitto_pub")
def test_mosquitto_pub_reports(nasty: Thing) -> None:
    """Its end means that the message is stored: QoS 1."""
    check(nasty, run("bash", stdin=snippet(nasty, "mosquitto")), "mqtt")


@pytest.mark.parametrize(("language", "words"), [("curl", "not let in"), ("python", "refused"), ("c", "refused")])
def test_a_refusal_is_told(thing: Thing, tmp_path: Path, language: str, words: str) -> None:
    """With the server's answer, and an exit code."""
    program = snippet(thing, language)
    thing.change("reset-secret")
    if language == "c":
        if reason := _missing_for_c():
            pytest.skip(reason)
        (tmp_path / "report.c").write_text(program)
        run("gcc", "-o", str(tmp_path / "report"), str(tmp_path / "report.c"), "-lcurl", "-lcrypto")
        done = run(str(tmp_path / "report"))
    else:
        done = run("bash" if language == "curl" else sys.executable, "-s" if language == "curl" else "-", stdin=program)
    assert done.returncode == 1
    assert words in done.stderr
    assert "20000" in done.stderr
