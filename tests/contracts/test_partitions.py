"""Several streams of messages: what holds over all of them, and what happens when one of them is away."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contracts.test_engine import connected, operator, publish
from tests.house import until
from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.core.groups import Group, Plan
from uplinkd.core.model import ProductKey
from uplinkd.engine import Done, Publisher, Query, Taken, open_publisher, open_reader
from uplinkd.engine.bus import NatsBus
from uplinkd.engine.deliveries import JetStreamDeliveries
from uplinkd.engine.embedded import EmbeddedServer
from uplinkd.engine.groups import JetStreamDesk, sweep
from uplinkd.engine.snapshot import open_shelf
from uplinkd.engine.stream import Base, Part, base_of, new_base, part_for, part_of, parts, restored_metadata, wanted
from uplinkd.engine.streams import check_count
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks

pytestmark = pytest.mark.slow

COUNT = 3
DEVICES = [f"d{number}" for number in range(12)]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path, nats_listen="", partitions=COUNT)


@pytest.fixture
def server(settings: Settings) -> Iterator[EmbeddedServer]:
    started = EmbeddedServer.start(settings)
    yield started
    started.stop()


@pytest.fixture
async def publisher(settings: Settings, server: EmbeddedServer) -> AsyncIterator[Publisher]:
    made = open_publisher(settings, server.access)
    await made.start()
    await connected(made)
    yield made
    await made.stop()


def topic_of(device: str) -> str:
    return f"/pk/{device}/user/update"


@given(st.integers(0, 2**40), st.integers(1, 64), st.integers(1, 2**40), st.integers(1, 2**30))
def test_an_id_leads_back_to_its_stream_and_sequence(made: int, count: int, sequence: int, more: int) -> None:
    """Also between two ids, and after the stream was restored; no id is another stream's, and all are numbers of 63 bits."""
    for part in (Part(0, count), Part(count - 1, count)):
        config = {"metadata": {"uplinkd.base": str(part.aligned(new_base(made)))}}
        if count > 1:
            config["metadata"]["uplinkd.partition"] = f"{part.number}/{count}"
        base = Base(part.aligned(new_base(made)), (), count)
        first = base.id(sequence)
        assert first % count == part.number
        assert base.sequence(first) == sequence
        assert base.sequence(first + 1) == base.sequence(base.id(sequence + 1)) == sequence + 1
        assert first < base.id(sequence + 1)
        fresh = max(new_base(made + 1), first + 1)
        metadata = restored_metadata(config, {"last_seq": sequence, "first_seq": 1}, fresh)
        later = base_of({**part.shape, "metadata": metadata})
        assert later.id(sequence) == first
        assert later.id(sequence + more) > fresh - 1
        assert later.id(sequence + more) % count == part.number
        assert [later.sequence(later.id(each)) for each in (1, sequence, sequence + more)] == [
            1,
            sequence,
            sequence + more,
        ]


def test_a_device_has_one_stream_for_all_its_topics_and_for_ever() -> None:
    """The numbers are those of every version: another one would put a device's messages into another stream."""
    for subject in (
        "/.pk.dev.user.update",
        "/.sys.pk.dev.thing.event.property.post",
        "/.as.mqtt.status.pk.dev",
        "/.shadow.update.pk.dev",
    ):
        assert [part_for(subject, count).number for count in (1, 2, 3, 64)] == [0, 1, 2, 1]
    assert part_for("/.pk.de//v.user.update", 64) == part_for("/.sys.pk.de//v.thing.log.post", 64)
    spread = [part_for(f"/.pk.{number:05}.user.update", 8).number for number in range(4000)]
    assert all(400 < spread.count(number) < 600 for number in range(8))


async def test_ids_are_unique_and_rise_for_each_device(server: EmbeddedServer, publisher: Publisher) -> None:
    """And each message is found by its own."""
    found = await asyncio.gather(
        *(publish(publisher, b"%d" % number, topic_of(DEVICES[number % len(DEVICES)])) for number in range(3000))
    )
    ids = [number for number, _ in found]
    assert len(set(ids)) == 3000
    for start in range(len(DEVICES)):
        mine = ids[start :: len(DEVICES)]
        assert mine == sorted(mine)
    reader = await open_reader(server.access)
    assert (await reader.state()).messages == 3000
    for place in (0, 1, 2, 1500, 2999):
        message = await reader.by_id(ids[place])
        assert message
        assert (message.payload, message.topic) == (b"%d" % place, topic_of(DEVICES[place % len(DEVICES)]))
    whole = await reader.latest(Query(), 3000)
    assert sorted(message.id for message in whole) == sorted(ids)
    assert [message.generate_time for message in whole] == sorted(message.generate_time for message in whole)
    async with operator(server.access) as jetstream:
        used = [(await jetstream.stream_info(part.name)).state.messages for part in parts(COUNT)]
    assert sum(used) == 3000
    assert min(used) > 0
    await reader.close()


async def test_what_is_stored_in_batches_has_the_ids_of_its_stream(tmp_path: Path) -> None:
    """With sync_interval = always, where a batch is acknowledged by its last message: each stream has batches of its own."""
    settings = Settings(data=tmp_path, nats_listen="", partitions=COUNT, sync_interval="always")
    server = EmbeddedServer.start(settings)
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await connected(publisher)
    found = await asyncio.gather(
        *(publish(publisher, b"%d" % number, topic_of(DEVICES[number % 12])) for number in range(1200))
    )
    reader = await open_reader(server.access)
    there = {message.id: message.payload for message in await reader.latest(Query(), 2000)}
    assert there == {message_id: b"%d" % number for number, (message_id, _) in enumerate(found)}
    await reader.close()
    await publisher.stop()
    server.stop()


async def test_pages_have_each_message_once_also_where_many_are_of_one_millisecond(
    server: EmbeddedServer, publisher: Publisher
) -> None:
    """Whatever their streams: they have an order, and a page ends where the next begins."""
    await asyncio.gather(*(publish(publisher, b"x", topic_of(DEVICES[number % len(DEVICES)])) for number in range(600)))
    reader = await open_reader(server.access)
    for query in (Query(), Query("pk"), Query("pk", "d1"), Query(device_name="d2"), Query("pk", since=1, until=2**42)):
        whole = [message.id for message in await reader.latest(query, 1000)]
        seen: list[int] = []
        before = None
        while page := await reader.latest(Query(**{**_fields(query), "before": before}), 7):  # type: ignore[arg-type]
            seen += [message.id for message in reversed(page)]
            before = seen[-1]
        assert seen == whole[::-1]
    assert len(await reader.latest(Query(), 1000)) == 600
    await reader.close()


async def test_followers_get_all_and_a_devices_in_order(server: EmbeddedServer, publisher: Publisher) -> None:
    """From a time on, too."""
    reader = await open_reader(server.access)
    seen: dict[str, list[int]] = {"now": [], "since": []}

    async def follow(name: str, query: Query) -> None:
        async for message in reader.follow(query):
            seen[name].append(int(message.payload))

    await publish(publisher, b"-1", topic_of("d1"))
    tasks = [asyncio.create_task(follow("now", Query())), asyncio.create_task(follow("since", Query(since=1)))]
    await asyncio.sleep(0.5)
    for number in range(1500):
        publisher.publish(f"/.pk.{DEVICES[number % 12]}.user.update".encode(), b"%d" % number, lambda *_: None)
    await until(lambda: len(seen["now"]) >= 1500 and len(seen["since"]) >= 1501)
    await end_tasks(*tasks)
    assert sorted(seen["now"]) == list(range(1500))
    assert sorted(seen["since"]) == list(range(-1, 1500))
    for start in range(12):
        mine = [number for number in seen["now"] if number % 12 == start]
        assert mine == sorted(mine)
    await reader.close()


async def test_a_reader_that_was_there_before_the_streams_reads_all_of_them(
    server: EmbeddedServer, settings: Settings
) -> None:
    reader = await open_reader(server.access)
    assert await reader.latest(Query(), 5) == []
    seen: list[str] = []

    async def follow() -> None:
        async for message in reader.follow(Query()):
            seen.append(message.device_name)

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.2)
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await connected(publisher)
    for device in DEVICES:
        await publish(publisher, b"x", topic_of(device))
    await until(lambda: sorted(seen) == sorted(DEVICES))
    assert len(await reader.latest(Query(), 50)) == len(DEVICES)
    await end_tasks(task)
    await publisher.stop()
    await reader.close()


async def test_another_number_than_the_streams_were_made_for_is_refused(
    server: EmbeddedServer, settings: Settings, publisher: Publisher
) -> None:
    """By the start, and by whoever publishes; with both numbers. Nothing is changed."""
    await publish(publisher, b"x", topic_of("d1"))
    await check_count(settings, server.access)
    for count in (1, 2, 4):
        other = settings.model_copy(update={"partitions": count})
        with pytest.raises(
            Rejected, match=f"partitions = {count}, .* UPLINKD was made as one of 3: .*set partitions = 3"
        ):
            await check_count(other, server.access)
        refused = open_publisher(other, server.access)
        await refused.start()
        _, reason = await publish(refused, b"x", topic_of("d1"))
        assert "was made as one of 3" in reason
        await refused.stop()
    async with operator(server.access) as jetstream:
        await jetstream.delete_stream("UPLINKD")
    with pytest.raises(Rejected, match="UPLINKD_P1 was made as one of 3"):
        await check_count(settings.model_copy(update={"partitions": 1}), server.access)


async def test_a_stream_of_before_is_not_taken_for_one_of_several(server: EmbeddedServer, settings: Settings) -> None:
    alone = open_publisher(settings.model_copy(update={"partitions": 1}), server.access)
    await alone.start()
    await connected(alone)
    await publish(alone, b"x")
    await alone.stop()
    with pytest.raises(Rejected, match=r"partitions = 3, .* UPLINKD was made as one of 1"):
        await check_count(settings, server.access)


async def test_one_stream_is_deleted_and_made_again(server: EmbeddedServer, publisher: Publisher) -> None:
    """By hand: the others go on, and no id comes twice."""
    before = [(await publish(publisher, b"x", topic_of(device)))[0] for device in DEVICES]
    mine = part_for("/.pk.d1.user.update", COUNT)
    async with operator(server.access) as jetstream:
        await jetstream.delete_stream(mine.name)
    await until(lambda: publisher.connected)
    after: list[int] = []
    for device in DEVICES:
        number, reason = await publish(publisher, b"y", topic_of(device))
        while reason:
            await asyncio.sleep(0.05)
            number, reason = await publish(publisher, b"y", topic_of(device))
        after.append(number)
    assert len({*before, *after}) == 2 * len(DEVICES)
    assert all(later > earlier for earlier, later in zip(before, after, strict=True))


async def test_a_stream_comes_back_from_a_backup_with_its_ids(
    server: EmbeddedServer, publisher: Publisher, settings: Settings
) -> None:
    """All of the streams are in it; what is stored afterwards has ids that were never given."""
    before = {device: (await publish(publisher, device.encode(), topic_of(device)))[0] for device in DEVICES}
    async with open_shelf(server.access) as shelf:
        names = [part.name for part in parts(COUNT)]
        assert set(names) <= set(await shelf.names())
        taken = []
        for name in names:
            chunks: list[bytes] = []
            taken.append((await shelf.take(name, chunks.append), chunks))
        lost = [(await publish(publisher, b"lost", topic_of(device)))[0] for device in DEVICES]
        await publisher.stop()
        async with operator(server.access) as jetstream:
            for name in names:
                await jetstream.delete_stream(name)
        await asyncio.sleep(0.2)
        for facts, chunks in taken:
            await shelf.put(facts, iter(chunks), now=round(time.time() * 1000))
    anew = open_publisher(settings, server.access)
    await anew.start()
    await connected(anew)
    reader = await open_reader(server.access)
    for device, number in before.items():
        message = await reader.by_id(number)
        assert message
        assert (message.device_name, message.payload) == (device, device.encode())
    later = [(await publish(anew, b"later", topic_of(device)))[0] for device in DEVICES]
    assert len({*before.values(), *lost, *later}) == 3 * len(DEVICES)
    assert min(later) > max(lost)
    for device, number in zip(DEVICES, later, strict=True):
        assert [message.id for message in await reader.latest(Query("pk", device), 5)] == [before[device], number]
    await reader.close()
    await anew.stop()


@dataclass
class Crew:
    deliveries: JetStreamDeliveries
    desk: JetStreamDesk
    bus: NatsBus
    group: Group
    taken: list[Taken] = field(default_factory=list)


@pytest.fixture
async def crew(server: EmbeddedServer) -> AsyncIterator[Crew]:
    bus = NatsBus(server.access, "test")
    deliveries = JetStreamDeliveries(bus)
    running = asyncio.create_task(bus.run())
    await until(lambda: bus.connected)
    plan = Plan(products=(ProductKey("pk"),), ack_wait=30, tries=3)
    yield Crew(deliveries, JetStreamDesk(bus), bus, Group(7, "backend", plan, 0, 1, 0))
    await deliveries.close()
    await end_tasks(running)


@pytest.mark.parametrize("want", [1, 2, 5, 100])
async def test_a_group_gets_all_of_all_streams_and_never_more_than_it_wants(
    crew: Crew, publisher: Publisher, want: int
) -> None:
    """However little that is; each device's in order, each once."""
    held = most = 0
    seen: list[tuple[str, int]] = []

    def take(taken: Taken) -> None:
        nonlocal held, most
        held += 1
        most = max(most, held)
        seen.append((taken.message.device_name, int(taken.message.payload)))
        assert taken.tries == 1

        def done() -> None:
            nonlocal held
            held -= 1
            taken.accept()
            feed.want(1)

        asyncio.get_running_loop().call_later(0.0005, done)

    numbers = itertools.count()
    for number in range(120):
        await publish(publisher, b"%d" % next(numbers), topic_of(DEVICES[number % 12]))
    feed = crew.deliveries.feed(crew.group, take)
    feed.want(want)
    await until(lambda: len(seen) == 120)
    for number in range(60):  # while it waits, and of one device alone
        await publish(publisher, b"%d" % next(numbers), topic_of(DEVICES[number % 12 if number < 30 else 0]))
    await until(lambda: len(seen) == 180)
    await until(lambda: held == 0)
    assert most <= want
    assert not feed.spare
    assert sorted(number for _, number in seen) == list(range(180))
    for device in DEVICES:
        mine = [number for name, number in seen if name == device]
        assert mine == sorted(mine)
    await until_state(crew, lag=0, held=0, settled=180)
    feed.close()


async def test_what_nobody_wants_stays_with_the_streams(crew: Crew, publisher: Publisher) -> None:
    """For whoever wants it: a consumer that has enough keeps none from another."""
    taken: list[Taken] = []
    first = crew.deliveries.feed(crew.group, taken.append)
    first.want(2)
    for device in DEVICES:
        await publish(publisher, b"x", topic_of(device))
    await until(lambda: len(taken) == 2)
    second = crew.deliveries.feed(crew.group, taken.append)
    second.want(10)
    await until(lambda: len(taken) == 12)
    assert len({each.message.id for each in taken}) == 12
    assert {each.tries for each in taken} == {1}
    first.close()
    second.close()


async def test_a_group_tells_its_lag_over_all_streams_and_dead_letters_come_again(
    crew: Crew, publisher: Publisher
) -> None:
    ids = [(await publish(publisher, b"x", topic_of(device)))[0] for device in DEVICES]
    state = await crew.desk.state(crew.group)
    assert (state.lag, state.held, state.settled) == (12, 0, 0)
    assert state.oldest is not None
    assert abs(state.oldest - time.time() * 1000) < 60_000
    taken: list[Taken] = []
    feed = crew.deliveries.feed(crew.group, taken.append)
    feed.want(12)
    await until(lambda: len(taken) == 12)
    for each in taken:
        await each.bury("no")
    await until_state(crew, lag=0, dead=12)
    assert sorted(letter.message.id for letter in await crew.desk.dead(crew.group)) == sorted(ids)
    taken.clear()
    feed.want(12)
    assert await crew.desk.retry(crew.group) == 12
    await until(lambda: len(taken) == 12)
    assert sorted(each.message.id for each in taken) == sorted(ids)
    for each in taken:
        each.accept()
    await until_state(crew, lag=0, dead=0)
    feed.close()

    async def nobody() -> list[Group]:
        return []

    assert await sweep(crew.bus, nobody) == 1


async def test_messages_of_other_streams_come_while_one_is_gone(
    crew: Crew, publisher: Publisher, server: EmbeddedServer
) -> None:
    """And its own once it is made again."""
    taken: list[Taken] = []
    feed = crew.deliveries.feed(crew.group, taken.append)
    feed.want(1000)
    for device in DEVICES:
        await publish(publisher, b"x", topic_of(device))
    await until(lambda: len(taken) == 12)
    async with operator(server.access) as jetstream:
        await jetstream.delete_stream(part_for("/.pk.d1.user.update", COUNT).name)
    stored = set()
    for device in DEVICES:
        reason = "not yet"
        while reason:
            number, reason = await publish(publisher, b"y", topic_of(device))
            await asyncio.sleep(0.02)
        stored.add(number)
    await until(lambda: stored <= {each.message.id for each in taken})
    feed.close()


async def until_state(crew: Crew, **wanted_state: int) -> None:
    end = time.monotonic() + 10
    while True:
        state = await crew.desk.state(crew.group)
        if all(getattr(state, name) == value for name, value in wanted_state.items()):
            return
        assert time.monotonic() < end, state
        await asyncio.sleep(0.02)


async def test_each_stream_has_its_share_of_the_size(settings: Settings) -> None:
    config = wanted(settings.model_copy(update={"keep_bytes": 3 * 2**30}), 0, Part(1, 3))
    assert (config["name"], config["max_bytes"]) == ("UPLINKD_P1", 2**30)
    assert part_of(config) == Part(1, 3)
    with pytest.raises(Unavailable, match=r"metadata uplinkd\.partition = 3/3"):
        part_of({"name": "UPLINKD", "metadata": {"uplinkd.partition": "3/3"}})


async def test_a_restart_in_the_middle_loses_nothing(server: EmbeddedServer, publisher: Publisher) -> None:
    """kill -9 of nats-server under load: what was acknowledged is there, under its id."""
    acknowledged: dict[int, bytes] = {}
    ended = 0

    def done_of(payload: bytes) -> Done:
        def done(number: int, reason: str) -> None:
            nonlocal ended
            ended += 1
            if not reason:
                assert number not in acknowledged
                acknowledged[number] = payload

        return done

    count = 0
    for turn in range(60):
        for _ in range(200):
            payload = b"%d" % count
            publisher.publish(f"/.pk.{DEVICES[count % 12]}.user.update".encode(), payload, done_of(payload))
            count += 1
        if turn == 20:
            os.kill(server.pid, signal.SIGKILL)
            while server.poll():
                await asyncio.sleep(0.005)
            await asyncio.to_thread(server.restart)
        await asyncio.sleep(0.01)
    await until(lambda: ended == count)
    assert len(acknowledged) > 1000
    reader = await open_reader(server.access)
    whole = {message.id: message.payload for message in await reader.latest(Query(), 20_000)}
    assert acknowledged.items() <= whole.items()
    await reader.close()


def _fields(query: Query) -> dict[str, object]:
    return {name: getattr(query, name) for name in ("product_key", "device_name", "topic", "since", "until")}
