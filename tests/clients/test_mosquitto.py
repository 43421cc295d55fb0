"""mosquitto_pub and mosquitto_sub, as Debian ships them: a device, and an application in one line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.clients.fleet import SHARED, Login, Thing, ask
from tests.clients.tools import ROOT, heard, needs

pytestmark = needs("mosquitto_pub", "mosquitto_sub")


def address(thing: Thing, *, plain: bool = False) -> list[str]:
    server = thing.server
    if plain:
        return ["-h", "127.0.0.1", "-p", str(server.mqtt_plain_port)]
    return ["-h", "localhost", "-p", str(server.mqtt_port), "--cafile", str(server.ca)]


def who(login: Login) -> list[str]:
    return ["-i", login.client_id, "-u", login.username, "-P", login.password]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize("version", ["mqttv31", "mqttv311"])
@pytest.mark.parametrize("plain", [False, True])
def test_mosquitto_pub_reports(thing: Thing, version: str, plain: bool) -> None:
    """With QoS 1, so that its end means that the message is stored."""
    command = ["mosquitto_pub", *address(thing, plain=plain), *who(thing.login()), "-V", version, "-q", "1"]
    done = run(*command, "-t", thing.topic(), "-m", "from mosquitto")
    assert (done.returncode, done.stderr) == (0, "")
    assert thing.stored_payloads() == [b"from mosquitto"]


def test_mosquitto_pub_is_told_why_not(thing: Thing) -> None:
    """Bad user name or password; not authorised."""
    wrong = thing.login(secret="not the secret")
    done = run("mosquitto_pub", *address(thing), *who(wrong), "-t", thing.topic(), "-m", "x", "-q", "1")
    assert done.returncode != 0
    assert "bad user name or password" in done.stderr
    command = ["mosquitto_pub", *address(thing), *who(thing.login()), "-t", thing.topic(), "-m", "x", "-q", "1"]
    done = run(*command, "-k", "1201")
    assert done.returncode != 0
    assert "not authorised" in done.stderr
    assert thing.stored_payloads() == []


def test_mosquitto_sub_hears_what_is_sent_down(thing: Thing) -> None:
    """A persistent session that was made before, so that nothing depends on who is first."""
    command = ["mosquitto_sub", *address(thing), *who(thing.login()), "-c", "-q", "1", "-t", thing.topic("user/get")]
    assert run(*command, "-E").returncode == 0
    thing.send("to mosquitto")
    thing.send("once more")
    done = run(*command, "-C", "2", "-W", "10", "-F", "%t %q %p")
    assert done.stdout == f"{thing.topic('user/get')} 1 to mosquitto\n{thing.topic('user/get')} 1 once more\n"


def test_mosquitto_sub_is_denied_what_is_not_its_own(thing: Thing) -> None:
    """It says so and ends."""
    for topic in ("#", f"/{thing.product}/#", "$SYS/#"):
        done = run("mosquitto_sub", *address(thing), *who(thing.login()), "-t", topic, "-W", "5")
        assert "denied" in done.stderr
        assert done.stdout == ""


def one_liners() -> list[tuple[str, str]]:
    """(file, line) of each mosquitto_sub in the documents and among the examples, line by line and joined where broken by \\."""
    files = [
        *sorted((ROOT / "examples").glob("*.md")),
        *sorted((ROOT / "docs").glob("*/*.md")),
        *sorted(ROOT.glob("README*.md")),
    ]
    texts = {file: file.read_text().replace("\\\n", " ") for file in files}
    found = [(str(file.relative_to(ROOT)), line.strip()) for file, text in texts.items() for line in text.splitlines()]
    return [(file, line) for file, line in found if line.startswith("mosquitto_sub ")]


def test_the_documents_have_a_line_for_mosquitto_sub() -> None:
    """Else the next test would be about nothing."""
    assert one_liners()


@pytest.mark.parametrize(("file", "line"), one_liners(), ids=[file for file, _ in one_liners()])
def test_an_application_in_one_line_reads_the_uplink(thing: Thing, file: str, line: str, tmp_path: Path) -> None:
    """The line of the documents as it stands, but for keys and ports: it hears status and reports of its product."""
    server = thing.server
    app = ask("app", "create", f"reader{abs(hash((file, thing.name)))}", "--product", thing.product, data=server.data)
    meant = {
        "data/tls/ca.pem": str(server.ca),
        "-p 8883": f"-p {server.mqtt_port}",
        "APP_KEY": app["key"],
        "APP_SECRET": app["secret"],
        "PRODUCT_KEY": thing.product,
    }
    for placeholder, value in meant.items():
        assert placeholder in line
        line = line.replace(placeholder, value)
    wanted = f"{thing.topic(SHARED)} a report over HTTPS"
    printed = heard(
        ["bash", "-c", f"exec {line}"],
        wanted,
        lambda: thing.report((SHARED, b"a report over HTTPS")),
        cwd=tmp_path,
    )
    assert f"{wanted}\n" in printed
