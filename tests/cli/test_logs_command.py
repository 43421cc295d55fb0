"""`uplinkd logs` as an operator and as a program use it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.house import UPLINKD, environment
from uplinkd.cli import uplinkd
from uplinkd.journal import Journal, Refusal
from uplinkd.settings import Settings

NOW = round(time.time() * 1000)
WRONG_SIGN = Refusal(
    "5f0c1d2e3a4b5c6d", NOW - 1000, "auth", 20000, 200, "a1GFjLP3xxC", "device123", "192.0.2.7", "",
    "wrong sign: the server signed 'clientId12345' with hmacsha1",
)  # fmt: skip
NO_RIGHT = Refusal(
    "0011223344556677",
    NOW,
    "topic",
    30001,
    200,
    "a1GFjLP3xxC",
    "lamp",
    "192.0.2.8",
    "/a1GFjLP3xxC/lamp/nope",
    "no right",
)
TOO_LARGE = Refusal("8899aabbccddeeff", NOW, "http", 10001, 413, "", "", "192.0.2.9", "/x\x1b[2J", "a body of 1 GB")
NOTE = Refusal("", NOW, "journal", 0, 0, "", "", "", "", "7 further refusals were not kept: the disk is full")


async def record(data: Path, *refusals: Refusal) -> None:
    pen = Journal(Settings(data=data))
    for refusal in refusals:
        pen.record(refusal)
    await pen.close()


def run(data: Path, *arguments: str) -> Result:
    return CliRunner().invoke(uplinkd, ["logs", *arguments, "--data", str(data)], catch_exceptions=False)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    asyncio.run(record(tmp_path, WRONG_SIGN, NO_RIGHT, TOO_LARGE, NOTE))
    return tmp_path


def test_numbers_beyond_what_is_kept_match_nothing_or_all(data: Path) -> None:
    """A code that is none, and an age before all times."""
    assert json.loads(run(data, "--code", str(10**30), "--json").stdout) == []
    everything = run(data, "--json").stdout
    for age in ("30000d", "99999999999999d"):
        assert run(data, "--since", age, "--json").stdout == everything


def test_people_see_all_that_ends_the_search(data: Path) -> None:
    """Code, message, device, address, requestId, topic and reason, with no control character of a device's making."""
    text = run(data).output
    for part in ("20000 auth check error", "a1GFjLP3xxC/device123", "192.0.2.7", "5f0c1d2e3a4b5c6d", WRONG_SIGN.reason,
                 "/a1GFjLP3xxC/lamp/nope", "10001 param error (HTTP 413)", "/x\\x1b[2J", NOTE.reason):  # fmt: skip
        assert part in text
    assert "\x1b" not in text


def test_what_stands_for_many_says_for_how_many(tmp_path: Path) -> None:
    """What flow control holds back of a product concerns none of its devices alone."""
    data = tmp_path / "data"

    async def write() -> None:
        journal = Journal(Settings(data=data))
        facts = {"code": 40000, "endpoint": "topic", "device_name": "", "reason": "too fast", "times": 12_345}
        journal.record(dataclasses.replace(NO_RIGHT, **facts))  # type: ignore[arg-type]  # named here
        await journal.close()

    asyncio.run(write())
    (line,) = [line for line in run(data).stdout.splitlines() if "40000" in line]
    assert "40000 request too many × 12,345" in line
    assert NO_RIGHT.product_key in line


def test_programs_get_one_document(data: Path) -> None:
    """An array with the documented keys; an entry about the journal itself has no message."""
    found = json.loads(run(data, "--json").stdout)
    assert found[0] == {
        "requestId": "5f0c1d2e3a4b5c6d",
        "time": NOW - 1000,
        "endpoint": "auth",
        "code": 20000,
        "message": "auth check error",
        "status": 200,
        "productKey": "a1GFjLP3xxC",
        "deviceName": "device123",
        "address": "192.0.2.7",
        "topic": "",
        "reason": WRONG_SIGN.reason,
        "times": 1,
        "gateway": "",
    }
    assert [each["message"] for each in found] == ["auth check error", "publish message error", "param error", ""]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("0011223344556677",), [NO_RIGHT]),
        (("--request", "0011223344556677"), [NO_RIGHT]),
        (("--device", "device123"), [WRONG_SIGN]),
        (("--product", "a1GFjLP3xxC", "--code", "30001"), [NO_RIGHT]),
        (("--since", "10m", "--limit", "2"), [TOO_LARGE, NOTE]),
        (("--device", "nobody"), []),
    ],
)
def test_what_is_asked_for_is_found(data: Path, options: tuple[str, ...], found: list[Refusal]) -> None:
    """By requestId (as argument or option), device, product, code and age."""
    assert [each["requestId"] for each in json.loads(run(data, *options, "--json").stdout)] == [
        each.request_id for each in found
    ]


def test_finding_nothing_is_said_beside_the_output(data: Path) -> None:
    """Standard output stays empty for programs."""
    result = run(data, "--device", "nobody")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing" in result.stderr


@pytest.mark.parametrize(
    "options", [("--since", "soon"), ("--limit", "0"), ("--code", "x"), ("one", "--request", "two")]
)
def test_a_wrong_argument_is_named(data: Path, options: tuple[str, ...]) -> None:
    """Exit code 2 and the value in the text."""
    result = run(data, *options)
    assert result.exit_code == 2
    assert options[-1] in result.stderr


def test_following_shows_what_comes_and_ends_quietly(tmp_path: Path) -> None:
    """JSON lines as they are written, without a journal at first; Ctrl-C ends with 0 and no word."""
    process = subprocess.Popen(
        [*UPLINKD, "logs", "--follow", "--json", "--data", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=tmp_path,
    )
    with process:
        assert process.stdout
        assert process.stderr
        time.sleep(1.5)
        asyncio.run(record(tmp_path, WRONG_SIGN, NO_RIGHT))
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert [line["code"] for line in lines] == [20000, 30001]
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 0
        assert process.stderr.read() == b""
