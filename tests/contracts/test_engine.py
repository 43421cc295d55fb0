"""One contract for every engine, and what only a real nats-server can show."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.core.subjects import to_subject
from uplinkd.engine import Publisher, Query, Reader, open_publisher, open_reader
from uplinkd.engine.embedded import EmbeddedServer, access_for, find_binary
from uplinkd.engine.jetstream import JetStreamPublisher
from uplinkd.engine.memory import MemoryEngine
from uplinkd.engine.stream import STREAM, new_base
from uplinkd.settings import Settings

TOPIC = "/pk/dev.1/user/update"


class Engine(Protocol):
    publisher: Publisher
    reader: Reader


class _Both:
    def __init__(self, publisher: Publisher, reader: Reader) -> None:
        self.publisher, self.reader = publisher, reader


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path)


@pytest.fixture
def server(settings: Settings) -> Iterator[EmbeddedServer]:
    started = EmbeddedServer.start(settings)
    yield started
    started.stop()


@pytest.fixture(params=["memory", "jetstream"])
async def engine(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[Engine]:
    if request.param == "memory":
        memory = MemoryEngine()
        await memory.start()
        yield _Both(memory, memory)
        await memory.stop()
        return
    server = request.getfixturevalue("server")
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await connected(publisher)
    reader = await open_reader(server.access)
    yield _Both(publisher, reader)
    await reader.close()
    await publisher.stop()


async def connected(publisher: Publisher, wanted: bool = True) -> None:
    async with asyncio.timeout(10):
        while publisher.connected is not wanted:
            await asyncio.sleep(0.005)


async def publish(publisher: Publisher, payload: bytes, topic: str = TOPIC) -> tuple[int, str]:
    future: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
    publisher.publish(to_subject(topic).encode(), payload, lambda number, reason: future.set_result((number, reason)))
    return await asyncio.wait_for(future, 5)


async def test_what_is_acknowledged_is_read_back(engine: Engine) -> None:
    """Topic, owner, payload of any octets, time and id."""
    for payload in (b"", b"text", b"\r\nPUB x 0\r\n\x00\xff", os.urandom(131_072)):
        before = time.time() * 1000
        number, reason = await publish(engine.publisher, payload)
        assert (reason, 0 < number < 2**63) == ("", True)
        (message,) = await engine.reader.latest(Query(), 1)
        assert (message.id, message.topic, message.payload) == (number, TOPIC, payload)
        assert (message.product_key, message.device_name) == ("pk", "dev.1")
        assert before - 50 <= message.generate_time <= time.time() * 1000 + 50


async def test_ids_rise_and_are_never_given_twice(engine: Engine) -> None:
    """In the order of publishing."""
    ids = [number for number, _ in await asyncio.gather(*(publish(engine.publisher, b"x") for _ in range(2000)))]
    assert ids == sorted(set(ids))


async def test_the_newest_are_found_by_product_device_topic_and_time(engine: Engine) -> None:
    """Oldest first, at most as many as asked for."""
    topics = [
        "/pk/d1/user/update",
        "/pk/d2/user/update",
        "/sys/pk/d1/thing/model/up_raw",
        "/other/d1/user/update",
        "/ota/device/inform/pk/d1",
    ]
    for number in range(300):
        await publish(engine.publisher, str(number).encode(), topics[number % 5])
    latest = engine.reader.latest

    async def numbers(query: Query, limit: int) -> list[int]:
        return [int(message.payload) for message in await latest(query, limit)]

    assert await numbers(Query(), 3) == [297, 298, 299]
    assert await numbers(Query(), 1000) == list(range(300))
    assert await numbers(Query("pk"), 4) == [295, 296, 297, 299]
    assert await numbers(Query("pk", "d1"), 3) == [295, 297, 299]
    assert await numbers(Query("pk", "d2"), 2) == [291, 296]
    assert await numbers(Query(topic="/other/d1/user/update"), 2) == [293, 298]
    assert await numbers(Query("nobody"), 5) == []
    await asyncio.sleep(0.05)
    since = round(time.time() * 1000)
    await asyncio.sleep(0.05)
    await publish(engine.publisher, b"1000", topics[0])
    assert await numbers(Query(since=since), 10) == [1000]
    assert await numbers(Query("pk", "d1", since=since), 10) == [1000]
    assert await numbers(Query("pk", "d2", since=since), 10) == []


async def test_messages_are_followed_as_they_are_stored(engine: Engine) -> None:
    """From now on, or from a time on; only what matches."""
    await publish(engine.publisher, b"before")
    seen: list[bytes] = []

    async def follow(query: Query) -> None:
        async for message in engine.reader.follow(query):
            seen.append(message.payload)

    task = asyncio.create_task(follow(Query("pk")))
    await asyncio.sleep(0.3)
    await publish(engine.publisher, b"other", "/other/d1/user/update")
    for number in range(3):
        await publish(engine.publisher, b"%d" % number)
    async with asyncio.timeout(5):
        while len(seen) < 3:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert seen == [b"0", b"1", b"2"]


# -- what only a real server can show


async def test_ids_go_on_after_a_restart(settings: Settings) -> None:
    """Stopped or killed, the store is the same and the ids rise on."""
    ids = []
    for end in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        server = EmbeddedServer.start(settings)
        publisher = open_publisher(settings, server.access)
        await publisher.start()
        ids += [(await publish(publisher, b"x"))[0] for _ in range(5)]
        await publisher.stop()
        os.kill(server.pid, end)
        server.stop()
    assert ids == list(range(ids[0], ids[0] + 15))


async def test_a_stream_made_anew_gives_no_id_twice(settings: Settings, server: EmbeddedServer) -> None:
    """Sequences restart at 1; ids do not, in any worker, though nobody told them."""
    publishers = [open_publisher(settings, server.access) for _ in range(2)]
    for publisher in publishers:
        await publisher.start()
    before = [(await publish(publisher, b"x"))[0] for publisher in publishers for _ in range(50)]
    reader = await open_reader(server.access)
    await reader._jetstream.delete_stream(STREAM)  # type: ignore[attr-defined]
    await asyncio.sleep(0.3)
    after = [(await publish(publisher, b"y"))[0] for publisher in publishers for _ in range(60)]
    assert min(after) > max(before)
    assert len(set(after)) == 120
    await reader.close()
    for publisher in publishers:
        await publisher.stop()


def test_a_new_base_lies_beyond_all_ids_of_an_older_one() -> None:
    """For any rate up to a billion messages a second."""
    assert new_base(1_800_000_000_001) - new_base(1_800_000_000_000) == 2**20
    assert 0 < new_base(4_000_000_000_000) < 2**63


@pytest.mark.parametrize("restart", [True, False])
async def test_a_killed_engine_loses_nothing_and_every_publish_is_answered_once(
    settings: Settings, server: EmbeddedServer, restart: bool
) -> None:
    """In mid-stream: acknowledged means found again; the rest is told so within the publish timeout."""
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await connected(publisher)
    answers: dict[int, list[tuple[int, str]]] = {}
    slowest = 0.0

    def send(number: int) -> None:
        started = time.monotonic()

        def done(message_id: int, reason: str) -> None:
            nonlocal slowest
            slowest = max(slowest, time.monotonic() - started)
            answers.setdefault(number, []).append((message_id, reason))

        publisher.publish(to_subject(TOPIC).encode(), b"%d" % number, done)

    for number in range(4000):
        send(number)
        if number == 2000:
            os.kill(server.pid, signal.SIGKILL)
        if number % 50 == 0:
            await asyncio.sleep(0)
        if number == 3000 and restart:
            await asyncio.sleep(0.1)
            server.restart()
    await asyncio.sleep(2.2)
    assert len(answers) == 4000
    assert all(len(each) == 1 for each in answers.values())
    assert slowest < 1.5 + 0.5
    if not restart:
        assert answers[3999][0][0] == 0
        assert "away" in answers[3999][0][1]
        server.restart()
    await connected(publisher)
    if restart:
        assert answers[3999][0][0] > 0, "what came during the restart was held and then stored"
    assert (await publish(publisher, b"after"))[1] == ""
    reader = await open_reader(server.access)
    found = {message.id: message.payload for message in await reader.latest(Query(), 10_000)}
    acknowledged = {each[0][0]: number for number, each in answers.items() if each[0][0]}
    assert acknowledged
    assert all(found.get(message_id) == b"%d" % number for message_id, number in acknowledged.items())
    await reader.close()
    await publisher.stop()


async def test_a_frozen_engine_is_noticed_and_recovered_from(settings: Settings, server: EmbeddedServer) -> None:
    """SIGSTOP: refused within the publish timeout, stored again after SIGCONT."""
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    assert (await publish(publisher, b"before"))[1] == ""
    os.kill(server.pid, signal.SIGSTOP)
    while Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        await asyncio.sleep(0.005)
    try:
        started = time.monotonic()
        number, reason = await publish(publisher, b"frozen")
        assert number == 0
        assert reason
        assert time.monotonic() - started < 2
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert (await publish(publisher, b"after"))[1] == ""
    await publisher.stop()


async def test_what_waits_for_an_engine_is_bounded(settings: Settings, server: EmbeddedServer) -> None:
    """Beyond 8 MiB a publish is refused at once, so that an outage cannot fill the memory."""
    publisher = JetStreamPublisher(settings, server.access)
    await publisher.start()
    await connected(publisher)
    server.stop()
    await connected(publisher, False)
    refused = 0

    def done(number: int, reason: str) -> None:
        nonlocal refused
        refused += "too much waits" in reason

    for _ in range(200):
        publisher.publish(b"/.pk.d", b"x" * 65536, done)
    assert refused == 200 - 128
    await publisher.stop()


async def test_a_stop_answers_everything(settings: Settings, server: EmbeddedServer) -> None:
    """What is under way is acknowledged before the connection closes."""
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await connected(publisher)
    answers: list[str] = []
    for _ in range(1000):
        publisher.publish(b"/.pk.d", b"x", lambda number, reason: answers.append(reason))
    await publisher.stop()
    assert answers == [""] * 1000


async def test_changed_settings_change_the_stream(settings: Settings, server: EmbeddedServer) -> None:
    """Age and size are followed; the base, and so the ids, stay."""
    first = open_publisher(settings, server.access)
    await first.start()
    before, _ = await publish(first, b"x")
    await first.stop()
    second = open_publisher(settings.model_copy(update={"keep_age": 3600.0, "keep_bytes": 2**24}), server.access)
    await second.start()
    assert (await publish(second, b"x"))[0] == before + 1
    await second.stop()
    reader = await open_reader(server.access)
    info = await reader._jetstream.stream_info(STREAM)  # type: ignore[attr-defined]
    assert (info.config.max_age, info.config.max_bytes) == (3600, 2**24)
    await reader.close()


async def test_a_foreign_stream_of_our_name_is_explained_and_left_alone(
    settings: Settings, server: EmbeddedServer
) -> None:
    """Somebody else's data is not ours to alter."""
    reader = await open_reader(server.access)
    jetstream: Any = reader._jetstream  # type: ignore[attr-defined]
    await jetstream.add_stream(name=STREAM, subjects=["theirs.>"])
    publisher = JetStreamPublisher(settings, server.access)
    await publisher.start()
    number, reason = await publish(publisher, b"x")
    assert number == 0
    assert "was not made by uplinkd" in reason
    assert (await jetstream.stream_info(STREAM)).config.subjects == ["theirs.>"]
    await publisher.stop()
    await reader.close()


async def test_messages_are_kept_up_to_a_size(tmp_path: Path) -> None:
    """The oldest go first, and what is left is found."""
    settings = Settings(data=tmp_path, keep_bytes=2**20)
    server = EmbeddedServer.start(settings)
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    ids = [(await publish(publisher, os.urandom(50_000)))[0] for _ in range(40)]
    reader = await open_reader(server.access)
    kept = [message.id for message in await reader.latest(Query(), 100)]
    assert 10 < len(kept) < 25
    assert kept == ids[-len(kept) :]
    await reader.close()
    await publisher.stop()
    server.stop()


def test_only_one_server_uses_a_folder(
    settings: Settings, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-server takes no lock of its own; two would harm the store."""
    monkeypatch.setattr("uplinkd.engine.embedded._LOCK_SECONDS", 0.2)
    with pytest.raises(Rejected, match="another uplinkd uses"):
        EmbeddedServer.start(settings)
    with access_for(settings) as access:
        assert access.urls == server.access.urls


def test_a_command_starts_a_server_for_itself_when_none_runs(settings: Settings) -> None:
    """And ends it; a command that follows says instead that none runs."""
    with access_for(settings) as access:
        assert access.password
    with pytest.raises(Unavailable, match="uplinkd serve"), access_for(settings, start=False):
        pass


def test_nobody_else_reads_the_engines_password(settings: Settings, server: EmbeddedServer) -> None:
    """Files for the owner alone, nothing on the command line, nothing in repr()."""
    for name in ("access.json", "nats.conf"):
        assert stat.S_IMODE((settings.data / "nats" / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((settings.data / "nats").stat().st_mode) == 0o700
    assert server.access.password not in Path(f"/proc/{server.pid}/cmdline").read_text()
    assert server.access.password not in repr(server.access)


def test_a_missing_binary_is_named(settings: Settings) -> None:
    """One clear line."""
    with pytest.raises(Rejected, match="/nonexistent/nats"):
        find_binary(settings.model_copy(update={"nats_server": "/nonexistent/nats"}))


def test_an_old_binary_on_path_does_not_serve(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distributions ship 2.9; the line says so."""
    old = tmp_path / "nats-server"
    old.write_text("#!/bin/sh\necho nats-server: v2.9.10\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.metadata.files", lambda _: [])
    with pytest.raises(Rejected, match=r"2\.9, too old"):
        find_binary(settings)


async def test_a_wrong_password_is_said(settings: Settings, server: EmbeddedServer) -> None:
    """The reason that a device's refusal is recorded with names the engine's own words."""
    publisher = JetStreamPublisher(settings, replace(server.access, password="wrong", file=None))
    await publisher.start()
    number, reason = await publish(publisher, b"x")
    assert number == 0
    assert "Authorization Violation" in reason
    await publisher.stop()
