"""Who is online: each change is stored once, in the documented form, whatever dies, waits or sets the clock meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.room import Crew
from uplinkd.core.errors import Unavailable
from uplinkd.core.model import Device, Message, Origin, State
from uplinkd.engine import Query
from uplinkd.engine.memory import MemoryBus, MemoryEngine
from uplinkd.presence import Presence
from uplinkd.registry import Registry, Sighting, open_registry
from uplinkd.registry.cache import DeviceCache, Entry
from uplinkd.settings import Settings

PRODUCT = "a1presence0"
TIMEOUT = 600_000
START = 1_795_000_000_000


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path, database_url=database_url)


@pytest.fixture
def registry(settings: Settings) -> Iterator[Registry]:
    registry = open_registry(settings)
    registry.create_product("lamps", key=PRODUCT)
    yield registry
    registry.close()


@pytest.fixture
def device(registry: Registry) -> Device:
    device = registry.create_device(PRODUCT, "lamp-1")
    registry.activate([(device.id, START)])
    return device


# one worker's part


class World:
    """A worker's presence with clocks of the test's own."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self.settings = settings
        self.registry = registry
        self.bus = MemoryBus()
        self.engine = MemoryEngine(bus=self.bus)
        self.wall = START / 1000
        self.monotonic = 500.0
        self.stored: list[Message] = []

    def presence(self, worker: str = "0", registry: Any = None) -> Presence:
        return Presence(
            self.settings,
            registry or self.registry,
            self.engine,
            self.bus,
            worker=worker,
            peers=Crew(self.bus, "0"),
            clock=lambda: self.wall,
            monotonic=lambda: self.monotonic,
        )

    def later(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds

    async def written(self, *presences: Presence) -> None:
        """Let everything be written, told and said to be told."""
        for _ in range(4):
            await asyncio.gather(*(presence.flush() for presence in presences))
            await asyncio.sleep(0.005)

    async def told(self) -> list[dict[str, Any]]:
        """The status messages that are stored."""
        await asyncio.sleep(0.01)
        found = await self.engine.latest(Query(), 1000)
        assert all(message.origin is Origin.STATUS for message in found)
        self.stored = found
        return [json.loads(message.payload) for message in found]

    @property
    def now(self) -> int:
        return round(self.wall * 1000)


@pytest.fixture
async def world(settings: Settings, registry: Registry) -> AsyncIterator[World]:
    world = World(settings, registry)
    await world.engine.start()
    yield world
    await world.engine.stop()


@pytest.fixture
async def entry(registry: Registry, device: Device) -> AsyncIterator[Entry]:
    cache = DeviceCache(registry)
    entry = await cache.load(device.id)
    assert entry
    yield entry
    await cache.close()


async def test_a_change_is_stored_in_the_documented_form(world: World, entry: Entry) -> None:
    """Topic and every member; local time and UTC, to the millisecond."""
    presence = world.presence()
    presence.saw(entry, world.now + 7, "192.0.2.9")
    world.wall += 0.123
    await presence.flush()
    (told,) = await world.told()
    assert world.stored[0].topic == f"/as/mqtt/status/{PRODUCT}/lamp-1"
    assert set(told) == {
        "status", "productKey", "deviceName", "time", "utcTime", "lastTime", "utcLastTime", "clientIp",
    }  # fmt: skip
    assert (told["status"], told["productKey"], told["deviceName"]) == ("online", PRODUCT, "lamp-1")
    assert told["clientIp"] == "192.0.2.9"
    assert datetime.fromisoformat(told["utcTime"]).timestamp() * 1000 == world.now
    assert datetime.fromisoformat(told["utcLastTime"]).timestamp() * 1000 == START + 7
    assert told["utcTime"].endswith("Z")
    local = datetime.fromtimestamp(world.wall).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]  # noqa: DTZ006 - local on purpose
    assert told["time"] == local
    await world.written(presence)
    assert world.registry.untold(10) == []
    await presence.close()


async def test_last_seen_is_written_soon_but_not_each_time(world: World, entry: Entry, registry: Registry) -> None:
    """Of a busy device once in five seconds."""
    presence = world.presence()
    for _ in range(120):
        presence.saw(entry, world.now, "a")
        world.later(0.1)
    assert [each.at - START for each in presence._pending] == [0, 5000, 10000]
    await presence.close()
    assert registry.device(PRODUCT, "lamp-1").last_seen == START + 10000


async def test_two_workers_tell_a_change_once(world: World, entry: Entry) -> None:
    """Both have heard the device."""
    serve_last(world)
    one, two = world.presence("0"), world.presence("1")
    for presence in (one, two):
        entry.seen = 0
        presence.saw(entry, world.now, "a")
    await world.written(one, two)
    world.later(601)
    await asyncio.gather(one.sweep(), two.sweep())
    await world.written(one, two)
    assert [each["status"] for each in await world.told()] == ["online", "offline"]
    await asyncio.gather(one.close(), two.close())


async def test_a_change_that_could_not_be_stored_is_told_later(world: World, entry: Entry) -> None:
    """The engine was away: it is found at the second look, and told once."""
    presence = world.presence()
    await world.engine.stop()
    presence.saw(entry, world.now, "a")
    await presence.flush()
    assert await world.told() == []
    await world.engine.start()
    serve_last(world)
    for _ in range(4):
        await presence.sweep()
        await world.written(presence)
    assert [each["status"] for each in await world.told()] == ["online"]
    assert world.registry.untold(10) == []
    await presence.close()


def serve_last(world: World) -> None:
    """JetStream's answer to a look at the last message of a subject."""
    from uplinkd.core.subjects import from_subject

    def answer(told: Any) -> None:
        topic = from_subject(json.loads(told.payload)["last_by_subj"])
        last = [message for message in world.engine._messages if message.topic == topic][-1:]
        world.bus.tell(told.reply, last[0].payload if last else b"", {} if last else {"Status": "404"})

    world.bus.listen("$JS.API.DIRECT.GET.UPLINKD", answer)


async def test_a_change_that_a_dead_worker_has_stored_is_not_told_again(world: World, entry: Entry) -> None:
    """It died before it could say so."""
    serve_last(world)
    dead = world.presence("1")
    dead.saw(entry, world.now, "a")
    await dead.flush()
    assert len(await world.told()) == 1
    assert len(world.registry.untold(10)) == 1
    alive = world.presence("0")
    for _ in range(3):
        await alive.sweep()
        await world.written(alive)
    assert len(await world.told()) == 1
    assert world.registry.untold(10) == []
    await alive.close()


async def test_a_change_that_a_dead_worker_has_not_stored_is_told(world: World, entry: Entry) -> None:
    """It died between the registry and the engine."""
    serve_last(world)
    world.registry.sighted([Sighting(entry.device.id, world.now, "a")], now=world.now, timeout=TIMEOUT)
    alive = world.presence("0")
    for _ in range(3):
        await alive.sweep()
        await world.written(alive)
    assert [each["status"] for each in await world.told()] == ["online"]
    await alive.close()


@pytest.mark.parametrize("by", [7200.0, -7200.0])
async def test_a_clock_that_is_set_makes_nobody_offline(world: World, entry: Entry, by: float) -> None:
    """And who has really fallen silent is found when its time is up, by the clock that nobody sets."""
    presence = world.presence()
    await presence.sweep()
    await world.written(presence)
    presence.saw(entry, world.now, "a")
    await world.written(presence)
    world.later(300)
    world.wall += by
    await presence.sweep()
    await world.written(presence)
    world.later(250)
    await presence.sweep()
    await world.written(presence)
    assert [each["status"] for each in await world.told()] == ["online"]
    assert world.registry.device(PRODUCT, "lamp-1").state(now=world.now, online_timeout=TIMEOUT) is State.ONLINE
    world.later(60)
    await presence.sweep()
    await world.written(presence)
    assert [each["status"] for each in await world.told()] == ["online", "offline"]
    presence.saw(entry, world.now, "a")
    await world.written(presence)
    assert (await world.told())[-1]["status"] == "online"
    await presence.close()


async def test_a_start_after_the_clock_was_set_back_believes_no_future(world: World, entry: Entry) -> None:
    """What was recorded then ends in its time, not years from now."""
    serve_last(world)
    world.registry.sighted([Sighting(entry.device.id, START + 10**9, "a")], now=START + 10**9, timeout=TIMEOUT)
    presence = world.presence()
    await presence.sweep()
    world.later(601)
    await presence.sweep()
    assert world.registry.device(PRODUCT, "lamp-1").state(now=world.now, online_timeout=TIMEOUT) is State.OFFLINE
    await presence.close()


class Away:
    """A registry that is not there."""

    def __getattr__(self, name: str) -> Any:
        raise Unavailable("the registry is away")


async def test_signs_of_life_outlive_the_registrys_absence(world: World, entry: Entry, registry: Registry) -> None:
    """They are written when it is back."""
    presence = world.presence(registry=Away())
    presence.saw(entry, world.now, "a")
    with pytest.raises(Unavailable):
        await presence.flush()
    presence._registry = registry
    await world.written(presence)
    assert registry.device(PRODUCT, "lamp-1").last_seen == world.now
    await presence.close()


async def test_a_worker_that_takes_anothers_place_ends_its_sessions(world: World, entry: Entry) -> None:
    """Those of its own name; the device is told to be offline."""
    dead = world.presence("1")
    dead.stands(entry, world.now, "a", 1)
    await world.written(dead)
    successor = world.presence("1")
    await successor.start()
    await world.written(successor)
    assert [each["status"] for each in await world.told()] == ["online", "offline"]
    await successor.close()
