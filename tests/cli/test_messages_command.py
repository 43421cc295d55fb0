"""`uplinkd messages` as people and programs call it, with a server beside it and without."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import UPLINKD, cli, environment
from uplinkd.core.subjects import to_subject
from uplinkd.engine import open_publisher
from uplinkd.engine.embedded import Access, EmbeddedServer
from uplinkd.settings import Settings

TOPICS = ("/pk1/lamp/user/update", "/pk2/lamp/user/update", "/pk1/door/user/update")


def store(settings: Settings, access: Access, *messages: tuple[str, bytes]) -> list[int]:
    """Publish and give the ids."""

    async def run() -> list[int]:
        publisher = open_publisher(settings, access)
        await publisher.start()
        loop = asyncio.get_running_loop()
        ids = []
        for topic, payload in messages:
            answer: asyncio.Future[int] = loop.create_future()
            publisher.publish(to_subject(topic).encode(), payload, lambda number, _, to=answer: to.set_result(number))  # type: ignore[misc]  # bound here
            ids.append(await asyncio.wait_for(answer, 5))
        await publisher.stop()
        return ids

    return asyncio.run(run())


def messages(*arguments: str, data: Path) -> subprocess.CompletedProcess[bytes]:
    return cli("messages", *arguments, data=data, check=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def server(data: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer.start(Settings(data=data, nats_listen=""))
    yield server
    server.stop()


def test_a_listing_is_one_document_with_the_documented_keys(data: Path, server: EmbeddedServer) -> None:
    """The same while the server runs and after it has stopped; ids are numbers, payloads base64."""
    before = round(time.time() * 1000)
    (number,) = store(Settings(data=data), server.access, (TOPICS[0], b"\x00\xff"))
    running = messages("list", "--json", data=data)
    server.stop()
    stopped = messages("list", "--json", data=data)
    assert running.stdout == stopped.stdout
    (found,) = json.loads(running.stdout)
    assert before - 50 <= found.pop("generateTime") <= time.time() * 1000 + 50
    assert found == {
        "messageId": number,
        "topic": TOPICS[0],
        "productKey": "pk1",
        "deviceName": "lamp",
        "origin": "https",
        "payload": base64.b64encode(b"\x00\xff").decode(),
    }


def test_people_see_text_as_text_and_anything_else_as_hex(data: Path, server: EmbeddedServer) -> None:
    """What a device sends cannot steer the terminal: line breaks and escapes never reach it as such."""
    payloads = {
        b'{"t":\t21.5}\r\n': '{"t":\\t21.5}\\r\\n',
        "温度 21°".encode(): "温度 21°",
        b"\x1b[2J gone": "1b5b324a20676f6e65",
        b"\xff\x00": "ff00",
    }
    store(Settings(data=data), server.access, *((TOPICS[0], payload) for payload in payloads))
    lines = messages("list", data=data).stdout.decode().splitlines()
    assert len(lines) == len(payloads)
    for line, shown in zip(lines, payloads.values(), strict=True):
        assert line.endswith(f"{TOPICS[0]}  {shown}")


def test_a_listing_is_narrowed_by_each_option(data: Path, server: EmbeddedServer) -> None:
    """--device alone finds the devices of that name in all products."""
    ids = store(Settings(data=data), server.access, *((topic, b"x") for topic in TOPICS))
    asked = {
        ("--product", "pk1"): [ids[0], ids[2]],
        ("--device", "lamp"): ids[:2],
        ("--product", "pk2", "--device", "lamp"): [ids[1]],
        ("--topic", TOPICS[2]): [ids[2]],
        ("--limit", "2"): ids[1:],
        ("--since", "1h"): ids,
        ("--since", "0"): [],
        ("--product", "pk3"): [],
    }
    for arguments, wanted in asked.items():
        found = json.loads(messages("list", "--json", *arguments, data=data).stdout)
        assert [each["messageId"] for each in found] == wanted, arguments


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (("list", "--since", "soon"), "'soon'", 2),
        (("list", "--limit", "0"), "1<=x<=10000", 2),
        (("list", "--limit", "10001"), "1<=x<=10000", 2),
        (("list", "--product", "*"), "'*'", 1),
        (("list", "--device", "a b"), "'a b'", 1),
        (("list", "--topic", "/pk/+/up"), "wildcard +", 1),
        (("list", "--topic", "no/slash"), "no/slash", 1),
        (("tail",), "uplinkd serve", 1),
        (("list", "--nats-url", "nats://127.0.0.1:1"), "does not answer", 1),
        (("list", "--nats-server", "/nonexistent"), "/nonexistent", 1),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(data: Path, arguments: tuple[str, ...], words: str, code: int) -> None:
    """The value and the rule, the documented exit code, and soon."""
    (data / "nats").mkdir(parents=True)
    started = time.monotonic()
    done = messages(*arguments, data=data)
    assert (done.returncode, done.stdout) == (code, b"")
    assert words in done.stderr.decode().splitlines()[-1]
    assert code == 2 or len(done.stderr.splitlines()) == 1
    assert time.monotonic() - started < 10


def test_a_look_makes_nothing(data: Path) -> None:
    """Where nothing was ever stored there is nothing to list, and no folder afterwards."""
    assert json.loads(messages("list", "--json", data=data).stdout) == []
    assert not data.exists()


def test_commands_at_the_same_time_all_succeed(data: Path, server: EmbeddedServer) -> None:
    """Without a server each starts its own for the while, one after the other."""
    (number,) = store(Settings(data=data), server.access, (TOPICS[0], b"x"))
    server.stop()
    commands = [
        subprocess.Popen(
            [*UPLINKD, "messages", "list", "--json", "--data", str(data)], stdout=subprocess.PIPE, env=environment()
        )
        for _ in range(4)
    ]
    answers = [command.communicate(timeout=40)[0] for command in commands]
    assert [json.loads(answer)[0]["messageId"] for answer in answers] == [number] * 4


def test_a_tail_prints_lines_as_they_come_and_ends_quietly(data: Path, server: EmbeddedServer) -> None:
    """JSON lines, each at once, first those since the given time; Ctrl-C is how it ends and no failure."""
    settings = Settings(data=data)
    ids = store(settings, server.access, (TOPICS[0], b"before"), (TOPICS[2], b"other"))
    tail = subprocess.Popen(
        [*UPLINKD, "messages", "tail", "--json", "--device", "lamp", "--since", "1h", "--data", str(data)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert tail.stdout
    assert tail.stderr
    assert json.loads(tail.stdout.readline())["messageId"] == ids[0]
    for _ in range(2):
        (number,) = store(settings, server.access, (TOPICS[1], b"now"))
        assert json.loads(tail.stdout.readline())["messageId"] == number
    os.kill(tail.pid, signal.SIGINT)
    assert tail.wait(10) == 0
    assert (tail.stdout.read(), tail.stderr.read()) == ("", "")
    tail.stdout.close()
    tail.stderr.close()


def test_a_reader_that_goes_away_is_no_traceback(data: Path, server: EmbeddedServer) -> None:
    """`uplinkd messages list | head -1`."""
    store(Settings(data=data), server.access, *((TOPICS[0], b"x" * 60_000) for _ in range(20)))
    command = f"{sys.executable} -m uplinkd messages list --data '{data}' | head -c 10 >/dev/null"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=40, env=environment())
    assert done.stderr == ""
