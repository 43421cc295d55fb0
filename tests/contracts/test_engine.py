"""One contract for every engine, and what only a real nats-server can show."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import nats
import nats.js.errors
import pytest
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from tests.house import freeze, until
from tests.ports import free_port
from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.core.model import Origin
from uplinkd.core.subjects import to_subject
from uplinkd.engine import Publisher, Query, Reader, embedded, open_publisher, open_reader
from uplinkd.engine.embedded import Access, EmbeddedServer, access_for, find_binary
from uplinkd.engine.jetstream import JetStreamPublisher
from uplinkd.engine.memory import MemoryEngine
from uplinkd.engine.stream import STREAM, Base, changed, new_base
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks

TOPIC = "/pk/dev.1/user/update"


class Engine(Protocol):
    publisher: Publisher
    reader: Reader


class _Both:
    def __init__(self, publisher: Publisher, reader: Reader) -> None:
        self.publisher, self.reader = publisher, reader


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path, nats_listen="")


@pytest.fixture
def server(settings: Settings) -> Iterator[EmbeddedServer]:
    started = EmbeddedServer.start(settings)
    yield started
    started.stop()


@pytest.fixture(params=["memory", "jetstream", pytest.param("partitions", marks=pytest.mark.slow)])
async def engine(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[Engine]:
    if request.param == "memory":
        memory = MemoryEngine()
        await memory.start()
        yield _Both(memory, memory)
        await memory.stop()
        return
    server = request.getfixturevalue("server")
    settings = settings.model_copy(update={"partitions": 3 if request.param == "partitions" else 1})
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await connected(publisher)
    reader = await open_reader(server.access)
    yield _Both(publisher, reader)
    await reader.close()
    await publisher.stop()


async def connected(publisher: Publisher, wanted: bool = True) -> None:
    await until(lambda: publisher.connected is wanted)


@contextlib.asynccontextmanager
async def operator(access: Access) -> AsyncIterator[JetStreamContext]:
    """Somebody at the NATS server with the stock client."""
    client = await nats.connect(access.urls[0], user=access.user, password=access.password)
    yield client.jetstream()
    await client.close()
    await asyncio.sleep(0)


@contextlib.contextmanager
def own_server(folder: Path, *lines: str) -> Iterator[str]:
    """A nats-server that the operator runs; its host and port."""
    where = f"127.0.0.1:{free_port()}"
    folder.mkdir()
    config = folder / "own.conf"
    config.write_text("\n".join([f"listen: {where!r}", f"jetstream {{ store_dir: {str(folder)!r} }}", *lines]))
    binary = find_binary(Settings(data=folder))
    process = subprocess.Popen([binary, "-c", config], stderr=subprocess.DEVNULL)
    yield where
    process.kill()
    process.wait()


async def publish(
    publisher: Publisher, payload: bytes, topic: str = TOPIC, origin: Origin = Origin.HTTPS
) -> tuple[int, str]:
    future: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
    subject = to_subject(topic).encode()
    publisher.publish(subject, payload, lambda number, reason: future.set_result((number, reason)), origin)
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


async def test_what_has_a_key_is_stored_once(engine: Engine) -> None:
    """Two gateways may both take up what a third one left; and who comes second is told where it lies, and disturbs nobody else."""
    done: list[tuple[int, str]] = []
    subject = to_subject(TOPIC).encode()
    keys: list[str] = []
    for key in ("status-1-5", "", "status-1-5", "status-2-5", ""):
        engine.publisher.publish(subject, b"x", lambda *ended: done.append(ended), Origin.STATUS, key)
        await until(lambda: len(done) == len(keys) + 1)
        keys.append(key)
    assert [fault for _, fault in done] == [""] * 5
    assert done[0] == done[2]
    assert len({number for number, _ in done}) == 4
    assert len(await engine.reader.latest(Query(topic=TOPIC), 10)) == 4


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
        await asyncio.sleep(0.0011)  # of several streams, those of one millisecond have no order
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
    # JetStream's own start at a time would pass over what lies before the first message of the second filter.
    for payload in (b"1001", b"1002"):
        await publish(engine.publisher, payload, "/sys/pk/d1/thing/event/property/post")
    assert await numbers(Query("pk", since=since), 10) == [1000, 1001, 1002]
    assert await numbers(Query("pk", "d1", since=since), 10) == [1000, 1001, 1002]


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
    await until(lambda: len(seen) >= 3)
    await end_tasks(task)
    assert seen == [b"0", b"1", b"2"]


async def test_pages_go_backwards_and_give_each_message_once(engine: Engine) -> None:
    """By the id of the oldest one of the page before, with every filter."""
    topics = ["/pk/d1/user/update", "/pk/d2/user/update", "/other/d1/user/update"]
    ids: list[int] = []
    for number in range(240):
        ids += (await publish(engine.publisher, b"x", topics[number % 3]))[:1]
        await asyncio.sleep(0.0011)  # of several streams, those of one millisecond have no order
    for query, wanted in (
        (Query(), ids),
        (Query("pk"), [each for place, each in enumerate(ids) if place % 3 < 2]),
        (Query("pk", "d2"), ids[1::3]),
        (Query(device_name="d1"), [each for place, each in enumerate(ids) if place % 3 != 1]),
        (Query(topic=topics[2]), ids[2::3]),
    ):
        seen: list[int] = []
        while page := await engine.reader.latest(replace(query, before=seen[-1] if seen else None), 17):
            seen += [message.id for message in reversed(page)]
        assert seen == wanted[::-1], query
    assert await engine.reader.latest(Query(before=1), 5) == []
    assert [message.id for message in await engine.reader.latest(Query(before=2**63 - 1), 1)] == ids[-1:]


async def test_messages_up_to_a_time(engine: Engine) -> None:
    """Stored at it, or before; nothing when that lies before the first."""
    first, _ = await publish(engine.publisher, b"first")
    await asyncio.sleep(0.05)
    between = round(time.time() * 1000)
    await asyncio.sleep(0.05)
    second, _ = await publish(engine.publisher, b"second")

    async def found(query: Query) -> list[int]:
        return [message.id for message in await engine.reader.latest(query, 10)]

    assert await found(Query(until=between)) == [first]
    assert await found(Query("pk", "dev.1", until=between)) == [first]
    assert await found(Query(since=between, until=between + 60_000)) == [second]
    assert await found(Query(until=between - 60_000)) == []
    assert await found(Query(until=between, before=first)) == []


async def test_a_message_is_found_by_its_id(engine: Engine) -> None:
    """As it was stored; an id that is nobody's is None."""
    number, _ = await publish(engine.publisher, b"\r\n\x00\xff", "/pk/d@1:x.y/user/update")
    await asyncio.sleep(0.0011)
    by_mqtt, _ = await publish(engine.publisher, b"", origin=Origin.MQTT)
    (message,) = await engine.reader.latest(Query(before=by_mqtt), 1)
    assert await engine.reader.by_id(number) == message
    found = await engine.reader.by_id(by_mqtt)
    assert found
    assert (found.payload, found.origin, found.topic) == (b"", Origin.MQTT, TOPIC)
    # Two streams that began in the same millisecond give ids side by side, in either order.
    for nobody in {0, 1, number - 1, by_mqtt + 1, 2**62 + number, 2**63 - 1} - {number, by_mqtt}:
        assert await engine.reader.by_id(nobody) is None
    assert (await engine.reader.state()).messages == 2


async def test_a_tail_shows_the_newest_and_counts_what_it_skipped(engine: Engine) -> None:
    """However many are stored, a glimpse is bounded; nothing is shown twice, and what is not shown is counted."""
    seen: list[int] = []
    skipped = 0

    async def watch(query: Query) -> None:
        nonlocal skipped
        async with contextlib.aclosing(engine.reader.tail(query, most=20, pause=0.05)) as glimpses:
            async for glimpse in glimpses:
                assert len(glimpse.messages) <= 20
                seen.extend(message.id for message in glimpse.messages)
                skipped += glimpse.skipped

    task = asyncio.create_task(watch(Query("pk")))
    await asyncio.sleep(0.5)
    await publish(engine.publisher, b"x", "/other/d1/user/update")
    first, _ = await publish(engine.publisher, b"x")
    await until(lambda: seen == [first])
    ids = [number for number, _ in await asyncio.gather(*(publish(engine.publisher, b"x") for _ in range(3000)))]
    last, _ = await publish(engine.publisher, b"x", "/pk/another/user/update")
    await until(lambda: seen[-1] == last)
    await end_tasks(task)
    assert seen == sorted(set(seen))
    assert set(seen) <= {first, *ids, last}
    assert len(seen) < 1500
    assert 2500 < len(seen) + skipped <= 3002  # those that come while it is counted are known to none


@pytest.mark.slow
async def test_a_tail_of_a_device_in_any_product_hears_of_its_first_message(engine: Engine) -> None:
    """Also when the device has never reported before."""
    seen: list[str] = []

    async def watch() -> None:
        async with contextlib.aclosing(engine.reader.tail(Query(device_name="newcomer"), pause=0.05)) as glimpses:
            async for glimpse in glimpses:
                seen.extend(message.topic for message in glimpse.messages)

    task = asyncio.create_task(watch())
    await asyncio.sleep(0.3)
    await publish(engine.publisher, b"x", "/pk/newcomer/user/update")
    await publish(engine.publisher, b"x", "/pk/other/user/update")
    await until(lambda: seen == ["/pk/newcomer/user/update"])
    await end_tasks(task)


# -- what only a real server can show


async def test_ids_go_on_after_a_restart(settings: Settings) -> None:
    """Stopped or killed, the store is the same and the ids rise on."""
    ids: list[int] = []
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
    async with operator(server.access) as jetstream:
        await jetstream.delete_stream(STREAM)
    await asyncio.sleep(0.3)
    after = [(await publish(publisher, b"y"))[0] for publisher in publishers for _ in range(60)]
    assert min(after) > max(before)
    assert len(set(after)) == 120
    for publisher in publishers:
        await publisher.stop()


async def test_a_stream_made_anew_among_acknowledgements_answers_each_once(settings: Settings) -> None:
    """Those behind the first that tells of it are refused with it, and not stored a second time."""
    publisher = JetStreamPublisher(settings, Access(("nats://127.0.0.1:1",)))
    told: list[tuple[bytes, bool]] = []
    numbers = [b"1", b"2", b"3", b"4"]
    for number in numbers:
        done = functools.partial(lambda number, message_id, _: told.append((number, message_id > 0)), number)
        publisher._pending[number] = (done, time.monotonic(), 1)
    publisher._adopt(Base(1 << 60))
    publisher._sequence = 10
    publisher.acknowledged([(b"1", b"11"), (b"2", b"3"), (b"3", b"12")], time.monotonic())
    assert sorted(told) == [(b"1", True), (b"2", False), (b"3", False), (b"4", False)]


def test_a_new_base_lies_beyond_all_ids_of_an_older_one() -> None:
    """For any rate up to a billion messages a second."""
    assert new_base(1_800_000_000_001) - new_base(1_800_000_000_000) == 2**20
    assert 0 < new_base(4_000_000_000_000) < 2**63


@pytest.mark.slow
@pytest.mark.parametrize("restart", [True, False])
async def test_a_killed_engine_loses_nothing_and_every_publish_is_answered_once(
    settings: Settings, server: EmbeddedServer, restart: bool
) -> None:
    """In mid-stream: acknowledged means found again; the rest is told so within 5 s, however busy the machine is."""
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
        if number == 1000:
            await until(lambda: len(answers) >= 500)
        if number == 2000:
            os.kill(server.pid, signal.SIGKILL)
        if number % 50 == 0:
            await asyncio.sleep(0)
        if number == 3000 and restart:
            await asyncio.sleep(0.1)
            server.restart()
        elif number == 3000:
            await connected(publisher, False)
    await asyncio.sleep(2.2)
    assert len(answers) == 4000
    assert all(len(each) == 1 for each in answers.values())
    assert slowest < 5
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


async def test_another_server_at_the_port_is_not_taken_for_ours(
    settings: Settings, server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was quicker; ours starts at the next port, and whoever uses it is let in."""
    ports = iter([int(server.access.urls[0].rpartition(":")[2])])
    free = embedded._free_port
    monkeypatch.setattr(embedded, "_free_port", lambda host: next(ports, 0) or free(host))
    other = EmbeddedServer.start(settings.model_copy(update={"data": tmp_path / "other"}))
    try:
        assert other.access.urls != server.access.urls
        publisher = open_publisher(settings, other.access)
        await publisher.start()
        assert (await publish(publisher, b"x"))[1] == ""
        await publisher.stop()
    finally:
        other.stop()


def test_another_program_at_the_port_is_not_taken_for_ours(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it says: a database greets with bytes that are no text."""
    with socket.create_server(("127.0.0.1", 0)) as quicker:

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with quicker.accept()[0] as one:
                        one.sendall(b"\xff\xfe\x00" + b"x" * 10_000 + b"\n")

        threading.Thread(target=greet, daemon=True).start()
        port = quicker.getsockname()[1]
        ports, free = iter([port]), embedded._free_port
        monkeypatch.setattr(embedded, "_free_port", lambda host: next(ports, 0) or free(host))
        server = EmbeddedServer.start(settings)
        try:
            assert not server.access.urls[0].endswith(f":{port}")
        finally:
            server.stop()
            quicker.shutdown(socket.SHUT_RDWR)


async def test_a_frozen_engine_is_noticed_and_recovered_from(settings: Settings, server: EmbeddedServer) -> None:
    """SIGSTOP: refused within the publish timeout, stored again after SIGCONT."""
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    assert (await publish(publisher, b"before"))[1] == ""
    freeze(server.pid)
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


async def test_what_was_held_for_a_slow_engine_is_stored_before_what_comes_after(
    settings: Settings, server: EmbeddedServer
) -> None:
    """A device that does not wait for its acknowledgements finds its messages in their order."""
    publisher = JetStreamPublisher(settings, server.access)
    await publisher.start()
    await connected(publisher)
    assert publisher._wire
    publisher._wire.pause_writing()
    first = asyncio.create_task(publish(publisher, b"1"))
    await asyncio.sleep(0)
    publisher._wire.resume_writing()
    second = await publish(publisher, b"2")
    assert (await first)[0] < second[0]
    await publisher.stop()


async def test_what_waits_when_it_stops_is_stored_if_the_engine_comes_back(
    settings: Settings, server: EmbeddedServer
) -> None:
    """It was taken; only what comes after the stop has begun is refused."""
    publisher = JetStreamPublisher(settings, server.access)
    await publisher.start()
    await connected(publisher)
    wire, publisher._wire = publisher._wire, None
    before = asyncio.create_task(publish(publisher, b"before"))
    await asyncio.sleep(0)
    stopping = asyncio.create_task(publisher.stop())
    await asyncio.sleep(0)
    after = await publish(publisher, b"after")
    publisher._wire = wire
    assert await asyncio.wait_for(before, 5) > (0, "")
    assert after == (0, "uplinkd is stopping")
    await stopping


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
    async with operator(server.access) as jetstream:
        config = (await jetstream.stream_info(STREAM)).config
    assert (config.max_age, config.max_bytes) == (3600, 2**24)


async def test_a_foreign_stream_of_our_name_is_explained_and_left_alone(
    settings: Settings, server: EmbeddedServer
) -> None:
    """Somebody else's data is not ours to alter."""
    async with operator(server.access) as jetstream:
        await jetstream.add_stream(name=STREAM, subjects=["theirs.>"])
        publisher = JetStreamPublisher(settings, server.access)
        await publisher.start()
        number, reason = await publish(publisher, b"x")
        assert number == 0
        assert "was not made by uplinkd" in reason
        assert (await jetstream.stream_info(STREAM)).config.subjects == ["theirs.>"]
        await publisher.stop()


async def test_messages_are_kept_up_to_a_size(tmp_path: Path) -> None:
    """The oldest go first, and what is left is found."""
    settings = Settings(data=tmp_path, nats_listen="", keep_bytes=2**20)
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


@pytest.mark.skipif(sys.platform != "linux", reason="scheduling policies are Linux's")
def test_a_server_of_ours_interrupts_no_worker(server: EmbeddedServer) -> None:
    """None of its threads, whose number is Go's to choose."""
    threads = [int(each.name) for each in Path(f"/proc/{server.pid}/task").iterdir()]
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_BATCH}


def test_commands_at_the_same_time_wait_for_each_other(settings: Settings) -> None:
    """The server that one command has started for itself ends with it: none other may come to rely on it."""
    script = (
        "import sys; from pathlib import Path; from uplinkd.settings import Settings\n"
        "from uplinkd.engine.embedded import access_for\n"
        "with access_for(Settings(data=Path(sys.argv[1]))) as access: assert access.file is None"
    )
    commands = [subprocess.Popen([sys.executable, "-c", script, str(settings.data)]) for _ in range(4)]
    assert [command.wait(30) for command in commands] == [0] * 4


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


@pytest.mark.parametrize("name", ["数据 目录", 'a "quoted" one', "$HOME\\x"])
def test_any_folder_may_hold_the_data(tmp_path: Path, name: str) -> None:
    """Its name is quoted as nats-server reads it."""
    server = EmbeddedServer.start(Settings(data=tmp_path / name, nats_listen=""))
    assert (tmp_path / name / "nats" / "jetstream").is_dir()
    server.stop()


def test_a_server_comes_back_on_its_port_or_on_another(settings: Settings) -> None:
    """Clients find it again in the access file, also when another program has taken the port meanwhile."""
    server = EmbeddedServer.start(settings)
    first = server.access.urls
    for taken in (False, True):
        os.kill(server.pid, signal.SIGKILL)
        while server.poll():
            time.sleep(0.005)
        with socket.socket() as other:
            if taken:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                other.bind(("127.0.0.1", int(first[0].rpartition(":")[2])))
                other.listen()
            server.restart()
        assert (server.access.urls == first) is not taken
        assert server.access.now().urls == server.access.urls
    server.stop()


def test_a_server_that_ends_at_once_is_explained(settings: Settings, tmp_path: Path) -> None:
    """Its own last words, and nothing is left running or locked."""
    broken = tmp_path / "nats-server"
    broken.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo nats-server: v2.15.1 || { echo out of luck >&2; exit 1; }\n"
    )
    broken.chmod(0o755)
    with pytest.raises(Unavailable, match="out of luck"):
        EmbeddedServer.start(settings.model_copy(update={"nats_server": str(broken)}))
    EmbeddedServer.start(settings).stop()


def test_an_old_binary_that_is_set_is_refused(settings: Settings, tmp_path: Path) -> None:
    """2.9 would take no metadata, and the stream would look like somebody else's."""
    old = tmp_path / "nats-server"
    old.write_text("#!/bin/sh\necho nats-server: v2.9.10\n")
    old.chmod(0o755)
    with pytest.raises(Rejected, match=r"is 2\.9; 2\.12 or newer"):
        find_binary(settings.model_copy(update={"nats_server": str(old)}))


async def test_a_disk_that_was_full_serves_again_when_there_is_room(
    settings: Settings, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-server gives its stream up for good after a failed write; the supervisor's poll() has it started again."""
    monkeypatch.setattr("uplinkd.engine.embedded._HEALTH_SECONDS", 0)
    assert server.poll()
    with (settings.data / "nats" / "nats.log").open("a") as log:
        log.write("[ERR] JetStream failed to store a msg on stream '$G > UPLINKD': no space left on device\n")
    monkeypatch.setattr("uplinkd.engine.embedded._ROOM_BYTES", 1 << 60)
    assert server.poll(), "while there is no room a restart would not help"
    monkeypatch.setattr("uplinkd.engine.embedded._ROOM_BYTES", 0)
    assert not server.poll()
    server.restart()
    assert server.poll()
    assert server.poll()


@pytest.mark.slow
async def test_twenty_thousand_at_once_are_all_stored(settings: Settings, server: EmbeddedServer) -> None:
    """Published in one turn of the event loop, acknowledged each, read back in the same order."""
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await connected(publisher)
    ids: list[int] = []
    for number in range(20_000):
        publisher.publish(b"/.pk.d.up", b"%d" % number, lambda message_id, _: ids.append(message_id))
    await until(lambda: len(ids) == 20_000)
    reader = await open_reader(server.access)
    found = await reader.latest(Query(), 20_000)
    assert [(message.id, message.payload) for message in found] == [(ids[n], b"%d" % n) for n in range(20_000)]
    assert ids == sorted(ids)
    await reader.close()
    await publisher.stop()


@pytest.mark.slow
async def test_a_stream_deleted_under_load_comes_back_and_gives_no_id_twice(
    settings: Settings, server: EmbeddedServer
) -> None:
    """Again and again, with several workers in mid-flight: each makes or finds the new stream, and nobody uses an old base."""
    publishers = [open_publisher(settings, server.access) for _ in range(3)]
    for publisher in publishers:
        await publisher.start()
        await connected(publisher)
    ids: list[int] = []
    running = True

    async def load(publisher: Publisher, pause: float) -> None:
        while running:
            for _ in range(5):
                publisher.publish(
                    b"/.pk.d.up", b"x", lambda message_id, _: ids.append(message_id) if message_id else None
                )
            await asyncio.sleep(pause)

    tasks = [asyncio.create_task(load(publisher, 0.0005 * n)) for n, publisher in enumerate(publishers, 1)]
    deleted = 0
    async with operator(server.access) as jetstream:
        for _ in range(25):
            await asyncio.sleep(0.2)
            with contextlib.suppress(nats.js.errors.NotFoundError):
                await jetstream.delete_stream(STREAM)
                deleted += 1
    await asyncio.sleep(0.5)  # the last deletion is known to all
    running = False
    await asyncio.gather(*tasks)
    assert deleted >= 15
    assert len(ids) == len(set(ids))
    assert (await publish(publishers[0], b"after"))[1] == ""
    for publisher in publishers:
        await publisher.stop()


@pytest.mark.parametrize("age", [0.0, 0.5, 3600.0])
async def test_a_stream_that_is_as_set_is_left_in_peace(tmp_path: Path, age: float) -> None:
    """Also without a limit by age: what the server makes of a setting must not look like a change, or it goes on for ever."""
    settings = Settings(data=tmp_path, nats_listen="", keep_age=age)
    server = EmbeddedServer.start(settings)
    for _ in range(2):
        publisher = open_publisher(settings, server.access)
        await publisher.start()
        assert (await publish(publisher, b"x"))[1] == ""
        async with operator(server.access) as jetstream:
            config = (await jetstream._api_request(f"$JS.API.STREAM.INFO.{STREAM}"))["config"]
        assert changed(config, settings) is None
        await publisher.stop()
    server.stop()


async def test_a_smaller_size_is_followed_after_a_restart(tmp_path: Path) -> None:
    """The server's own limit stands in the way of neither the old stream nor the new size."""
    for size in (20 * 2**30, 2**24):
        settings = Settings(data=tmp_path, nats_listen="", keep_bytes=size)
        server = EmbeddedServer.start(settings)
        publisher = open_publisher(settings, server.access)
        await publisher.start()
        assert (await publish(publisher, b"x"))[1] == ""
        async with operator(server.access) as jetstream:
            info = await jetstream.stream_info(STREAM)
        assert info.config.max_bytes == size
        await publisher.stop()
        server.stop()
    assert info.state.messages == 2


async def test_nothing_is_left_unanswered_after_a_stop(settings: Settings, server: EmbeddedServer) -> None:
    """Who comes too late is told so."""
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await publisher.stop()
    assert await publish(publisher, b"x") == (0, "uplinkd is stopping")


async def test_a_lost_acknowledgement_delays_nobody_else(tmp_path: Path) -> None:
    """A batch gathers while another is under way, but not for ever: what follows is stored within milliseconds."""
    forbidden = 'authorization { users: [{user: u, password: p, permissions: {publish: {deny: ["/.pk.forbidden"]}}}] }'
    with own_server(tmp_path / "own", forbidden) as where:
        settings = Settings(data=tmp_path, nats_url=f"nats://u:p@{where}")
        publisher = open_publisher(settings, Access.of(settings))
        await publisher.start()
        await connected(publisher)
        lost: list[str] = []
        publisher.publish(b"/.pk.forbidden", b"x", lambda _, reason: lost.append(reason))
        for _ in range(5):
            started = time.monotonic()
            assert (await publish(publisher, b"x"))[1] == ""
            assert time.monotonic() - started < 0.5
        await until(lambda: bool(lost))
        assert "did not acknowledge" in lost[0]
        await publisher.stop()


async def test_somebody_who_replies_to_messages_confuses_nothing(settings: Settings, server: EmbeddedServer) -> None:
    """`nats reply '/.>'`: what it says is not JetStream's answer. Each publish is answered once and with its own id."""
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await connected(publisher)
    access = server.access
    client = await nats.connect(access.urls[0], user=access.user, password=access.password)

    async def reply(message: Msg) -> None:
        if message.reply:
            for said in (b"got it", b"{}", b'{"seq":1}', b"[]"):
                await message.respond(said)

    await client.subscribe("/.>", cb=reply)
    await client.flush()
    answers: dict[int, list[int]] = {}

    def send(number: int) -> None:
        publisher.publish(
            b"/.pk.d.up", b"%d" % number, lambda message_id, _: answers.setdefault(number, []).append(message_id)
        )

    for number in range(1500):
        send(number)
        if number % 7 == 0:
            await asyncio.sleep(0.001)
    await until(lambda: len(answers) == 1500)
    await asyncio.sleep(0.1)
    reader = await open_reader(access)
    found = {message.id: int(message.payload) for message in await reader.latest(Query(), 10_000)}
    assert {key: [found[each] for each in ids] for key, ids in answers.items()} == {n: [n] for n in range(1500)}
    await reader.close()
    await client.close()
    await publisher.stop()


async def test_a_payload_that_the_servers_do_not_take_harms_nobody_else(tmp_path: Path) -> None:
    """NATS ends a connection over it, so it is refused here, with the limit's name."""
    with own_server(tmp_path / "own", "max_payload: 65536") as where:
        settings = Settings(data=tmp_path, nats_url=f"nats://{where}")
        publisher = open_publisher(settings, Access.of(settings))
        await publisher.start()
        sizes = (1, 65536, 65537, 1)  # the first ones are held until the connection is there
        answers = await asyncio.gather(*(publish(publisher, b"x" * size) for size in sizes))
        answers += await asyncio.gather(*(publish(publisher, b"x" * size) for size in sizes))
        assert [bool(number) for number, _ in answers] == [True, True, False, True] * 2
        assert "max_payload" in answers[2][1]
        await publisher.stop()


async def test_what_names_the_origin_counts_towards_what_the_servers_take(tmp_path: Path) -> None:
    """Held or not: NATS counts the header too."""
    with own_server(tmp_path / "own", "max_payload: 65536") as where:
        settings = Settings(data=tmp_path, nats_url=f"nats://{where}")
        publisher = open_publisher(settings, Access.of(settings))
        await publisher.start()
        for _ in range(2):  # the first ones are held until the connection is there
            sent = [publish(publisher, b"x" * size, origin=Origin.MQTT) for size in (1, 65536, 60000)]
            answers = await asyncio.gather(*sent)
            assert [bool(number) for number, _ in answers] == [True, False, True]
            assert "max_payload" in answers[1][1]
        reader = await open_reader(Access.of(settings))
        assert [message.origin for message in await reader.latest(Query(), 10)] == [Origin.MQTT] * 4
        await reader.close()
        await publisher.stop()


@pytest.mark.parametrize(("line", "user"), [("token: 'to/ken'", "to%2Fken"), ("user: u, password: 'p@ss'", "u:p%40ss")])
async def test_an_own_server_is_signed_in_to(tmp_path: Path, line: str, user: str) -> None:
    """With a token or a user, percent-encoded in the URL; a server that is down is passed over."""
    with own_server(tmp_path / "own", f"authorization {{ {line} }}") as where:
        settings = Settings(data=tmp_path, nats_url=f"nats://127.0.0.1:1,nats://{user}@{where}")
        publisher = open_publisher(settings, Access.of(settings))
        await publisher.start()
        number, reason = await publish(publisher, b"x")
        assert reason == ""
        reader = await open_reader(Access.of(settings))
        assert [message.id for message in await reader.latest(Query(), 1)] == [number]
        await reader.close()
        await publisher.stop()


async def test_a_query_finds_no_more_than_it_says(engine: Engine) -> None:
    """A device's name in all products, also one that is a word of system topics; every condition counts."""
    topics = ("/pk1/device/up", "/pk2/device/up", "/ota/device/inform/pk1/other", "/sys/pk2/device/thing/model/up_raw")
    ids: list[int] = []
    for topic in topics:
        ids += (await publish(engine.publisher, b"x", topic))[:1]
        await asyncio.sleep(0.0011)
    found = {
        query: [message.id for message in await engine.reader.latest(query, 10)]
        for query in (
            Query(device_name="device"),
            Query("pk2", "device"),
            Query("pk2", topic=topics[0]),
            Query("pk1", topic=topics[0]),
            Query(device_name="nobody"),
        )
    }
    assert list(found.values()) == [[ids[0], ids[1], ids[3]], [ids[1], ids[3]], [], [ids[0]], []]


@pytest.mark.parametrize(
    "query",
    [
        Query(">"),
        Query("*"),
        Query("a b"),
        Query("pk", "*"),
        Query(topic="/pk/*/up"),
        Query(topic="/a b"),
        Query(topic="up"),
    ],
)
async def test_a_query_with_a_wildcard_or_a_space_is_refused(engine: Engine, query: Query) -> None:
    """It would match what nobody asked for, or end the connection."""
    with pytest.raises(Rejected):
        await engine.reader.latest(query, 1)


async def test_the_newest_are_found_however_unevenly_they_lie(settings: Settings, server: EmbeddedServer) -> None:
    """Few among many, in bursts, at either end."""
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await connected(publisher)
    rare: list[int] = []
    for number in range(12_000):
        if number < 300 or number in (5000, 5001, 11_999) or 8000 <= number < 8100:
            publisher.publish(b"/.pk.rare.up", b"x", lambda message_id, _: rare.append(message_id))
        else:
            publisher.publish(b"/.pk.common.up", b"x", lambda *_: None)
    await publisher.stop()
    reader = await open_reader(server.access)
    for limit in (1, 2, 20, 101, 102, 103, 104, 402, 403, 1000):
        assert [message.id for message in await reader.latest(Query("pk", "rare"), limit)] == rare[-limit:]
        assert len(await reader.latest(Query("pk", "common"), limit)) == limit
    await reader.close()


async def test_a_follower_misses_nothing_over_a_restart_and_a_new_stream(settings: Settings) -> None:
    """The server stops and starts again on another port with another password; then its stream is deleted."""
    server = EmbeddedServer.start(settings)
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await publish(publisher, b"before")
    reader = await open_reader(server.access)
    seen: list[int] = []

    async def follow() -> None:
        async with contextlib.aclosing(reader.follow(Query("pk"))) as messages:  # type: ignore[type-var]  # a generator
            async for message in messages:
                seen.append(message.id)

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.3)
    ids = [(await publish(publisher, b"one"))[0]]
    server.stop()
    await connected(publisher, False)
    server = EmbeddedServer.start(settings)
    await connected(publisher)
    ids += [(await publish(publisher, b"two"))[0]]
    await until(lambda: seen == ids)
    async with operator(server.access) as jetstream:
        await jetstream.delete_stream(STREAM)
    await asyncio.sleep(0.2)
    ids += [(await publish(publisher, b"three"))[0]]
    await until(lambda: seen == ids)
    await end_tasks(task)
    await reader.close()
    await publisher.stop()
    server.stop()


async def test_a_wrong_password_is_said(settings: Settings, server: EmbeddedServer) -> None:
    """The reason that a device's refusal is recorded with names the engine's own words."""
    publisher = JetStreamPublisher(settings, replace(server.access, password="wrong", file=None))
    await publisher.start()
    number, reason = await publish(publisher, b"x")
    assert number == 0
    assert "Authorization Violation" in reason
    await publisher.stop()
