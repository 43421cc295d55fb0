"""One contract for what waits for devices, in memory and in JetStream, and what only JetStream can show."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import pytest

from tests.contracts.test_bus import running
from tests.house import until
from uplinkd.core.errors import Unavailable
from uplinkd.engine import Downlink, SessionRecord, Told, Waiting
from uplinkd.engine.down import SESSIONS, JetStreamDownlink
from uplinkd.engine.embedded import read_access
from uplinkd.engine.memory import MemoryBus, MemoryDownlink
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks

LIMIT = 5
TOPIC = "/pk/dev.1/user/get"


@dataclass
class Store:
    """What the workers of one server see; `cut` takes the engine away, `mend` gives it back."""

    mine: Downlink
    theirs: Downlink
    cut: Callable[[], Awaitable[None]]
    mend: Callable[[], Awaitable[None]]


@contextlib.asynccontextmanager
async def in_jetstream(folder: Path, **more: object) -> AsyncIterator[Store]:
    settings = Settings.model_validate({"data": folder, "nats_listen": "", "down_limit": LIMIT, **more})
    downlinks: list[JetStreamDownlink] = []

    async def known() -> None:
        for downlink in downlinks:
            for _ in range(200):
                with contextlib.suppress(Unavailable):
                    await downlink.next(0)
                    break
                await asyncio.sleep(0.02)

    async with running(settings, lambda bus: downlinks.append(JetStreamDownlink(settings, bus))) as line:

        async def mend() -> None:
            await line.mend()
            await known()

        mine, theirs = downlinks
        tasks = [asyncio.create_task(downlink.run()) for downlink in downlinks]
        await known()
        yield Store(mine, theirs, line.cut, mend)
        await end_tasks(*tasks)


@contextlib.asynccontextmanager
async def in_memory(_: Path) -> AsyncIterator[Store]:
    bus = MemoryBus()
    downlink = MemoryDownlink(bus, limit=LIMIT)

    async def cut() -> None:
        bus.connected = False

    yield Store(downlink, downlink, cut, bus.connect)


@pytest.fixture(params=[in_memory, in_jetstream])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    async with request.param(tmp_path) as store:
        yield store


async def everything(downlink: Downlink, device_id: int) -> list[Waiting]:
    """What waits for a device, as one who reads on beyond each message sees it."""
    found: list[Waiting] = []
    while message := await downlink.next(device_id, found[-1].sequence if found else 0):
        found.append(message)
    return found


async def test_what_was_stored_waits_in_its_order_until_it_is_removed(store: Store) -> None:
    """Each device's own, whatever its topic and octets; ids rise; a message that is gone is passed over."""
    ids = [await store.mine.store(1, f"{TOPIC}/{number} ü", bytes([0, 255, number])) for number in range(3)]
    other = await store.mine.store(2, TOPIC, b"other")
    assert ids == sorted(set(ids))
    assert (await store.mine.count(1), await store.theirs.count(1), await store.mine.count(3)) == (3, 3, 0)
    waiting = await everything(store.theirs, 1)
    assert [(each.id, each.topic, each.payload) for each in waiting] == [
        (ids[number], f"{TOPIC}/{number} ü", bytes([0, 255, number])) for number in range(3)
    ]
    await store.mine.remove(waiting[1].sequence)
    await store.mine.remove(waiting[1].sequence)
    assert [each.id for each in await everything(store.mine, 1)] == [ids[0], ids[2]]
    assert [each.id for each in await everything(store.mine, 2)] == [other]
    assert await store.mine.next(3) is None


async def test_of_too_many_the_oldest_are_dropped(store: Store) -> None:
    """Of that device alone."""
    await store.mine.store(2, TOPIC, b"kept")
    for number in range(LIMIT + 3):
        await store.mine.store(1, TOPIC, b"%d" % number)
    assert [each.payload for each in await everything(store.mine, 1)] == [b"%d" % n for n in range(3, LIMIT + 3)]
    assert await store.mine.count(2) == 1


async def test_every_worker_knows_for_whom_something_waits(store: Store) -> None:
    """Within moments; whoever asked to be told is told; one who has looked and found nothing does not look again."""
    told: list[int] = []
    store.theirs.on_waiting(told.append)
    assert not store.theirs.waiting
    await store.mine.store(7, TOPIC, b"x")
    await until(lambda: 7 in store.theirs.waiting and 7 in store.mine.waiting)
    assert set(told) == {7}
    message = await store.theirs.next(7)
    assert message
    await store.theirs.remove(message.sequence)
    assert await store.theirs.next(7) is None
    assert 7 not in store.theirs.waiting


async def test_sessions_are_kept_replaced_and_forgotten(store: Store) -> None:
    """Subscriptions with their QoS, how far it was sent; and who has one is known to every worker."""
    assert await store.mine.session(1) is None
    record = SessionRecord({f"{TOPIC}/+": 1, "/ext/ü/#": 0}, 17)
    await store.mine.save_session(1, record)
    await store.mine.save_session(2, SessionRecord({}))
    assert await store.theirs.session(1) == record
    await store.mine.save_session(1, SessionRecord({}, 18))
    assert await store.theirs.session(1) == SessionRecord({}, 18)
    await until(lambda: store.theirs.persistent == {1, 2})
    await store.theirs.forget_session(1)
    await store.theirs.forget_session(1)
    assert await store.mine.session(1) is None
    await until(lambda: store.mine.persistent == {2} == store.theirs.persistent)


async def test_a_look_at_all_sessions_does_not_undo_what_is_told_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it finds is older by the time that it has come."""
    devices = JetStreamDownlink._devices

    async def slow(downlink: JetStreamDownlink, stream: str) -> set[int]:
        found = await devices(downlink, stream)
        if stream == SESSIONS:
            await pair.theirs.forget_session(1)
            await pair.theirs.save_session(2, SessionRecord({}))
            await until(lambda: downlink.persistent == {2})
        return found

    async with in_jetstream(tmp_path) as pair:
        await pair.mine.save_session(1, SessionRecord({}))
        with monkeypatch.context() as patch:
            patch.setattr(JetStreamDownlink, "_devices", slow)
            assert isinstance(pair.mine, JetStreamDownlink)
            await pair.mine._settle()
        assert pair.mine.persistent == {2}
        await pair.mine._settle()
        assert pair.mine.persistent == {2}


async def test_what_is_told_while_nothing_is_found_waits_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was looked for is older by the time that the answer has come."""
    stored = JetStreamDownlink._stored

    async def slow(downlink: JetStreamDownlink, stream: str, wanted: dict[str, Any]) -> Told | None:
        found = await stored(downlink, stream, wanted)
        await pair.theirs.store(7, TOPIC, b"x")
        await until(lambda: 7 in downlink.waiting)
        return found

    async with in_jetstream(tmp_path) as pair:
        with monkeypatch.context() as patch:
            patch.setattr(JetStreamDownlink, "_stored", slow)
            assert await pair.mine.next(7) is None
        assert 7 in pair.mine.waiting


async def test_who_has_something_waiting_is_told_of_anew_once_the_connection_stands(tmp_path: Path) -> None:
    """Others may have stored more for the same device before it did."""
    async with in_jetstream(tmp_path) as pair:
        await pair.mine.store(7, TOPIC, b"x")
        await until(lambda: 7 in pair.theirs.waiting)
        told: list[int] = []
        pair.theirs.on_waiting(told.append)
        await pair.cut()
        await pair.mend()
        await until(lambda: told == [7])


async def test_while_the_engine_is_away_everything_says_so(store: Store) -> None:
    """Unavailable, never a wrong answer; and afterwards all of it is there."""
    number = await store.mine.store(1, TOPIC, b"x")
    await store.mine.save_session(1, SessionRecord({TOPIC: 1}))
    await store.cut()
    for act in (
        store.mine.store(1, TOPIC, b"y"),
        store.mine.count(1),
        store.mine.next(1),
        store.mine.remove(1),
        store.mine.session(1),
        store.mine.save_session(1, SessionRecord({})),
        store.mine.forget_session(1),
    ):
        with pytest.raises(Unavailable):
            await act
    await store.mend()
    assert [each.id for each in await everything(store.theirs, 1)] == [number]
    assert await store.mine.session(1) == SessionRecord({TOPIC: 1})


async def test_a_worker_that_starts_later_finds_what_waits(tmp_path: Path) -> None:
    """After a restart of the whole server; and ids go on rising."""
    async with in_jetstream(tmp_path) as store:
        first = await store.mine.store(1, TOPIC, b"1")
        await store.mine.store(2, TOPIC, b"2")
        await store.mine.save_session(3, SessionRecord({TOPIC: 1}))
    async with in_jetstream(tmp_path) as store:
        told: list[int] = []
        store.mine.on_waiting(told.append)
        await until(lambda: store.mine.waiting == {1, 2} == store.theirs.waiting)
        await until(lambda: store.mine.persistent == {3} == store.theirs.persistent)
        assert await store.mine.store(1, TOPIC, b"3") > first


async def test_what_waited_too_long_is_gone(tmp_path: Path) -> None:
    """The age of the settings; a server started with another one follows it."""
    async with in_jetstream(tmp_path) as store:
        await store.mine.store(1, TOPIC, b"1")
    async with in_jetstream(tmp_path, down_age="1s") as store:
        end = time.monotonic() + 10
        while await store.mine.next(1):
            assert time.monotonic() < end, "it waits still"
            await asyncio.sleep(0.1)


async def test_a_limit_that_was_lowered_holds_at_once(tmp_path: Path) -> None:
    """What waits already included."""
    async with in_jetstream(tmp_path) as store:
        for number in range(LIMIT):
            await store.mine.store(1, TOPIC, b"%d" % number)
    async with in_jetstream(tmp_path, down_limit=2) as store:
        assert [each.payload for each in await everything(store.mine, 1)] == [b"3", b"4"]


async def test_a_stream_deleted_by_hand_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next look; what was in it is the operator's loss, what comes is stored again."""
    monkeypatch.setattr("uplinkd.engine.down._LOOK_SECONDS", 1.0)
    async with in_jetstream(tmp_path) as store:
        await store.mine.store(1, TOPIC, b"lost")
        access = read_access(tmp_path / "nats" / "access.json")
        assert access
        client = await nats.connect(access.urls[0], user=access.user, password=access.password)
        await client.jetstream().delete_stream("UPLINKD_DOWN")
        await client.close()
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await store.mine.store(1, TOPIC, b"refused")

        async def stored() -> bool:
            with contextlib.suppress(Unavailable):
                return bool(await store.mine.store(1, TOPIC, b"stored"))
            return False

        end = time.monotonic() + 10
        while not await stored():
            assert time.monotonic() < end, "it does not come back"
            await asyncio.sleep(0.1)
        assert [each.payload for each in await everything(store.mine, 1)] == [b"stored"]
