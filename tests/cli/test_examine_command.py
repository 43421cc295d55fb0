"""`uplinkd examine` and `uplinkd device snippet`, on a registry of their own."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from uplinkd.cli import uplinkd
from uplinkd.client import login_body
from uplinkd.core.errors import NotFound, Rejected
from uplinkd.registry import open_registry
from uplinkd.settings import Settings

DEVICE, SECRET = "lamp-0001", "q8Zk0iNw7vLp2xY4rBq8Zk0iNw7vLp2x"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for name in [each for each in os.environ if each.startswith("UPLINKD_")]:
        monkeypatch.delenv(name)
    registry = open_registry(Settings())
    key = registry.create_product("lamps").key
    registry.create_device(key, DEVICE, secret=SECRET)
    registry.close()
    return key


def run(*arguments: str, stdin: str | bytes = "") -> Result:
    result = CliRunner().invoke(uplinkd, arguments, input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def kinds(result: Result) -> list[str]:
    return [each["kind"] for each in json.loads(result.stdout)["findings"]]


def test_a_right_login_is_in_order(product: str, tmp_path: Path) -> None:
    """The secret is looked up under the names in the text, from a file or standard input."""
    body = login_body(product, DEVICE, SECRET, timestamp=str(round(time.time() * 1000)))
    done = run("examine", "--json", stdin=body)
    assert (done.exit_code, kinds(done)) == (0, ["ok", "sign_ok", "clock_ok"])
    file = tmp_path / "login.json"
    file.write_text("\ufeff" + body, encoding="utf-8")
    done = run("examine", str(file))
    assert done.exit_code == 0
    assert done.stdout.startswith("ok  All is in order")
    assert SECRET not in done.stdout


def test_a_wrong_sign_is_explained(product: str) -> None:
    """With the content, both signs and exit code 1."""
    done = run("examine", stdin=login_body(product, DEVICE, SECRET + "\n"))
    assert done.exit_code == 1
    assert done.stdout.startswith("!!  The DeviceSecret was used with white space")
    assert f"content     clientId{product}.{DEVICE}deviceName{DEVICE}productKey{product}" in done.stdout
    assert re.search(r"^expected    [0-9a-f]{64}$", done.stdout, re.MULTILINE)
    assert SECRET not in done.stdout


def test_the_secret_may_be_another_devices(product: str) -> None:
    """Given itself, or by the names under which it is registered."""
    body = login_body("pk", "somebody", SECRET)
    assert kinds(run("examine", "--json", stdin=body)) == ["no_secret"]
    assert run("examine", "--json", stdin=body).exit_code == 1
    assert run("examine", "--product", product, "--device", DEVICE, stdin=body).exit_code == 0
    assert run("examine", "--secret", SECRET, stdin=body).exit_code == 0
    assert run("examine", "--secret", SECRET, "--device", DEVICE, stdin=body).exit_code == 2


def test_what_is_no_text_is_examined_all_the_same(product: str) -> None:
    """Bytes that are not UTF-8, and nothing."""
    assert kinds(run("examine", "--json", stdin=b"\xff\xfe\x00")) == ["nothing_recognised"]
    assert kinds(run("examine", "--json")) == ["empty"]


@pytest.mark.parametrize("page", ["en", "zh"])
def test_the_example_of_the_documents_is_what_is_printed(product: str, page: str) -> None:
    """Command and answer, word for word."""
    text = (ROOT / "docs" / page / "protocol.md").read_text()
    example = re.search(r"\$ echo '([^']*)' \| uplinkd (examine [^\n]*)\n(.*?)\n```", text, re.DOTALL)
    assert example
    assert run(*example[2].split(), stdin=example[1] + "\n").stdout == example[3] + "\n"


@pytest.mark.parametrize("language", ["curl", "python", "c", "mosquitto"])
def test_a_snippet_is_printed(product: str, language: str) -> None:
    """For where the settings listen, or for another URL; the rest is tested with real clients."""
    text = run("device", "snippet", product, DEVICE, "--language", language).stdout
    assert f"/{product}/{DEVICE}/user/update" in text
    assert "127.0.0.1" in text
    other = run(
        "device",
        "snippet",
        product,
        DEVICE,
        "--language",
        language,
        "--url",
        "https://iot.example.com",
        "--topic",
        "/a/b/c",
    ).stdout
    assert "iot.example.com" in other
    assert "/a/b/c" in other
    assert "127.0.0.1" not in other


def test_a_snippet_that_cannot_be_made(product: str) -> None:
    """One line says why."""
    with pytest.raises(NotFound):
        run("device", "snippet", product, "nobody", "--language", "curl")
    with pytest.raises(Rejected, match="no MQTT door"):
        run("device", "snippet", product, DEVICE, "--language", "mosquitto", "--mqtt-listen", "")
    with pytest.raises(Rejected, match="is not a URL"):
        run("device", "snippet", product, DEVICE, "--language", "curl", "--url", "iot.example.com")
    with pytest.raises(Rejected, match="begins with a slash"):
        run("device", "snippet", product, DEVICE, "--language", "curl", "--topic", "user/update")
