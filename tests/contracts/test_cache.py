"""What a gateway's cache promises: hits without waiting, nothing stale for longer than a poll, outages waited out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from uplinkd.core.errors import Unavailable
from uplinkd.core.model import Device, Right
from uplinkd.registry import Registry, open_registry
from uplinkd.registry.cache import DeviceCache
from uplinkd.settings import Settings

PRODUCT = "a1Cached"


class Troubled:
    """A registry in front of the real one that can be away, can be held at a look-up, and counts what is written."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.away = False
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def __getattr__(self, name: str) -> Any:
        if self.away:
            raise Unavailable("the registry is away")
        return getattr(self._registry, name)

    def find_device_by_id(self, device_id: int) -> Device | None:
        found: Device | None = self.__getattr__("find_device_by_id")(device_id)
        self.reached.set()
        assert self.go_on.wait(10)
        return found


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = open_registry(Settings(data=tmp_path))
    registry.create_product("cached", key=PRODUCT)
    yield registry
    registry.close()


@pytest.fixture
def troubled(registry: Registry) -> Troubled:
    return Troubled(registry)


@pytest.fixture
async def cache(troubled: Troubled) -> AsyncIterator[DeviceCache]:
    cache = DeviceCache(troubled, capacity=3)
    yield cache
    await cache.close()


async def until(true: Any) -> None:
    """Wait for what must become true within the second that an operator was promised."""
    async with asyncio.timeout(1.5):
        while not true():
            await asyncio.sleep(0.01)


async def stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_device_is_held_by_id_and_by_name_once_it_was_loaded(cache: DeviceCache, registry: Registry) -> None:
    """Before that both look-ups miss; after it both hit the same entry, which has the levels that the device may publish to."""
    device = registry.create_device(PRODUCT, "lamp-1")
    assert cache.get(device.id) is cache.get_by_name(PRODUCT, "lamp-1") is None
    entry = await cache.load(device.id)
    assert entry is not None
    assert cache.get(device.id) is cache.get_by_name(PRODUCT, "lamp-1") is entry
    assert entry.device == device
    assert entry.publish_levels == {"user/update", "user/update/error", "update", "update/error"}
    assert len(entry.classes) == 6


async def test_what_the_registry_does_not_know_is_not_held(cache: DeviceCache, registry: Registry) -> None:
    """A device that is made a moment after it was asked for is found: there is no memory of what is missing."""
    assert await cache.load(1) is None
    assert await cache.load_by_name(PRODUCT, "lamp-1") is None
    device = registry.create_device(PRODUCT, "lamp-1")
    entry = await cache.load_by_name(PRODUCT, "lamp-1")
    assert entry is not None
    assert entry.device == device


async def test_a_load_reads_anew_and_replaces_what_is_held(cache: DeviceCache, registry: Registry) -> None:
    """A secret that was reset a moment ago counts at the next login, before any poll."""
    device = registry.create_device(PRODUCT, "lamp-1")
    await cache.load(device.id)
    fresh = registry.reset_secret(PRODUCT, "lamp-1")
    entry = await cache.load_by_name(PRODUCT, "lamp-1")
    assert entry is not None
    assert entry.device == fresh
    assert cache.get(device.id) is entry


async def test_devices_of_one_product_share_its_rights(cache: DeviceCache, registry: Registry) -> None:
    """A hundred thousand devices hold one set of levels."""
    first = await cache.load(registry.create_device(PRODUCT).id)
    second = await cache.load(registry.create_device(PRODUCT).id)
    assert first is not None
    assert second is not None
    assert first.publish_levels is second.publish_levels
    assert first.classes is second.classes


async def test_the_oldest_go_when_the_cache_is_full(cache: DeviceCache, registry: Registry) -> None:
    """At most `capacity` devices are held, and what is dropped is dropped by id and by name."""
    devices = [registry.create_device(PRODUCT) for _ in range(5)]
    for device in devices:
        await cache.load(device.id)
    assert [cache.get(device.id) is not None for device in devices] == [False, False, True, True, True]
    assert cache.get_by_name(PRODUCT, devices[0].name) is None


@pytest.mark.parametrize("act", ["disable", "reset-secret", "delete", "add a class", "delete the product"])
async def test_a_change_reaches_the_cache_within_a_second(cache: DeviceCache, registry: Registry, act: str) -> None:
    """Whatever an operator does in another process: the entry is gone soon, and what is loaded then is what is true."""
    device = registry.create_device(PRODUCT, "lamp-1")
    held = await cache.load(device.id)
    task = asyncio.create_task(cache.run())
    match act:
        case "disable":
            registry.set_enabled(PRODUCT, "lamp-1", False)
        case "reset-secret":
            registry.reset_secret(PRODUCT, "lamp-1")
        case "delete":
            registry.delete_device(PRODUCT, "lamp-1")
        case "add a class":
            registry.add_topic_class(PRODUCT, "pub", Right.PUBLISH)
        case "delete the product":
            registry.delete_product(PRODUCT, with_devices=True)
    await until(lambda: cache.get(device.id) is None)
    assert cache.get_by_name(PRODUCT, "lamp-1") is None
    fresh = await cache.load(device.id)
    assert (fresh is None) == act.startswith("delete")
    assert fresh is None or held is None or (fresh.device, fresh.publish_levels) != (held.device, held.publish_levels)
    await stopped(task)


async def test_another_device_stays_when_one_changes(cache: DeviceCache, registry: Registry) -> None:
    """A change of one device costs the others nothing."""
    one, two = (registry.create_device(PRODUCT) for _ in range(2))
    await cache.load(one.id)
    kept = await cache.load(two.id)
    registry.reset_secret(PRODUCT, one.name)
    await cache.follow()
    assert cache.get(one.id) is None
    assert cache.get(two.id) is kept


async def test_what_was_read_before_a_change_is_not_held_after_it(
    cache: DeviceCache, registry: Registry, troubled: Troubled
) -> None:
    """A device is disabled while a look-up of it is under way and the change is followed: the old facts do not stay."""
    device = registry.create_device(PRODUCT, "lamp-1")
    troubled.go_on.clear()
    load = asyncio.create_task(cache.load(device.id))
    await until(troubled.reached.is_set)
    registry.set_enabled(PRODUCT, "lamp-1", False)
    await cache.follow()
    troubled.go_on.set()
    await load
    held = cache.get(device.id)
    assert held is None or not held.device.enabled


async def test_changes_that_were_missed_empty_the_cache(cache: DeviceCache, registry: Registry) -> None:
    """When the registry no longer knows what changed since the last look, nothing that is held can be trusted."""
    device = registry.create_device(PRODUCT)
    await cache.load(device.id)
    cache._cursor += 1000
    await cache.follow()
    assert cache.get(device.id) is None


async def test_during_an_outage_known_devices_go_on(cache: DeviceCache, registry: Registry, troubled: Troubled) -> None:
    """What is held is served, what is not raises Unavailable; changes made meanwhile are seen when the registry is back."""
    device, other = (registry.create_device(PRODUCT) for _ in range(2))
    entry = await cache.load(device.id)
    task = asyncio.create_task(cache.run())
    troubled.away = True
    await asyncio.sleep(0.6)
    assert not task.done()
    assert cache.get(device.id) is entry
    with pytest.raises(Unavailable):
        await cache.load(other.id)
    registry.set_enabled(PRODUCT, device.name, False)
    troubled.away = False
    await until(lambda: cache.get(device.id) is None)
    await stopped(task)


async def test_a_first_login_is_recorded_before_it_is_answered(cache: DeviceCache, registry: Registry) -> None:
    """activate() returns the device with its first login, which the registry has by then."""
    device = registry.create_device(PRODUCT)
    entry = await cache.activate(device, 1_000)
    assert entry is not None
    assert entry.device.activated == 1_000
    assert registry.device(PRODUCT, device.name).activated == 1_000
