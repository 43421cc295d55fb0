"""What a worker holds of the registry: devices and their rights, dropped as soon as the registry says that they changed."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from uplinkd.core.errors import NotFound, Unavailable
from uplinkd.core.model import Device, TopicClass
from uplinkd.core.tokens import Token
from uplinkd.core.topics import Topic
from uplinkd.observe import Occasionally
from uplinkd.registry import Change, Registry

__all__ = ["DeviceCache", "Entry"]

log = logging.getLogger("uplinkd.registry")

T = TypeVar("T")

_POLL_SECONDS = 0.25
_THREADS = 2


@dataclass(frozen=True, slots=True)
class _Rights:
    """A product's topic classes, shared by its devices."""

    classes: tuple[TopicClass, ...]
    publish_levels: frozenset[str]


class Entry:
    """One device with its rights, as a gateway needs it. `seen` is for `presence`: the latest time that it recorded, ms; for the
    gateway are `shown`, the token that held for the device last, and `allowed`, the topic that it had the right to."""

    __slots__ = ("allowed", "classes", "device", "publish_levels", "seen", "shown")

    def __init__(self, device: Device, rights: _Rights) -> None:
        self.device = device
        self.classes = rights.classes
        self.publish_levels = rights.publish_levels
        self.seen = 0
        self.shown: Token | None = None
        self.allowed: Topic | None = None


class DeviceCache:
    """Hits are dictionary look-ups; misses are read in a thread. At most `capacity` devices, the oldest go first."""

    def __init__(self, registry: Registry, *, capacity: int = 100_000) -> None:
        self._registry = registry
        self._capacity = capacity
        self._by_id: dict[int, Entry] = {}
        # Each report asks: a call less.
        self.get: Callable[[int], Entry | None] = self._by_id.get
        self._by_name: dict[tuple[str, str], Entry] = {}
        self._rights: dict[str, _Rights] = {}
        self._cursor = registry.changes_cursor()
        self._forgotten = 0  # counts what was dropped, so that what is loaded meanwhile is known to be stale
        self._acts: list[Callable[[Change], None]] = []
        self._activating: list[tuple[int, int, asyncio.Future[None]]] = []
        self._recording: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(_THREADS, "registry")
        self._warn = Occasionally(10)

    def get_by_name(self, product_key: str, name: str) -> Entry | None:
        return self._by_name.get((product_key, name))

    async def load(self, device_id: int) -> Entry | None:
        """The device as the registry knows it now, None when it does not; raise Unavailable."""
        return await self._load(lambda: self._registry.find_device_by_id(device_id))

    async def load_by_name(self, product_key: str, name: str) -> Entry | None:
        return await self._load(lambda: self._registry.find_device(product_key, name))

    async def activate(self, device: Device, at: int) -> Entry | None:
        """Record the first login at `at` (ms); return the device anew. Raise Unavailable when that cannot be recorded."""
        recorded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._activating.append((device.id, at, recorded))
        if self._recording is None:
            self._recording = asyncio.create_task(self._record_activations())
        await recorded
        return await self.load(device.id)

    async def _record_activations(self) -> None:
        """Those that come while the disk is busy are written together: it takes milliseconds, whatever their number."""
        try:
            while self._activating:
                batch, self._activating = self._activating, []
                logins = [(device_id, at) for device_id, at, _ in batch]
                fault: Exception | None = None
                try:
                    await self._in_thread(functools.partial(self._registry.activate, logins))
                except Exception as error:
                    fault = error
                for _, _, recorded in batch:
                    if recorded.done():  # whoever waited has gone
                        continue
                    if fault is None:
                        recorded.set_result(None)
                    else:
                        recorded.set_exception(fault)
        finally:
            self._recording = None

    def on_change(self, act: Callable[[Change], None]) -> None:
        """Have `act` called with each change, once what it makes stale was dropped."""
        self._acts.append(act)

    def forget(self) -> None:
        """Drop everything that is held."""
        self._forgotten += 1
        self._by_id.clear()
        self._by_name.clear()
        self._rights.clear()

    async def run(self) -> None:
        """Follow the registry's changes, until cancelled. An outage is waited out."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            try:
                await self.follow()
            except Unavailable as fault:
                if self._warn():
                    log.warning("%s; devices that are known go on", fault)

    async def follow(self) -> None:
        """Drop what has changed since the last call."""
        self._cursor, changed = await self._in_thread(lambda: self._registry.changes(self._cursor))
        for change in changed:
            self._apply(change)
            for act in self._acts:
                act(change)

    def _apply(self, change: Change) -> None:
        if change.app_id is not None or change.group_id is not None:
            return
        if not change.product_key:
            if change.device_id is None:
                self.forget()
        elif change.device_id is not None:
            self._forgotten += 1
            self._drop(change.device_id)
        else:
            self._forgotten += 1
            self._rights.pop(change.product_key, None)
            for entry in [each for each in self._by_id.values() if each.device.product_key == change.product_key]:
                self._drop(entry.device.id)

    async def close(self) -> None:
        self._threads.shutdown()

    async def _load(self, find: Callable[[], Device | None]) -> Entry | None:
        before = self._forgotten
        found = await self._in_thread(lambda: self._read(find))
        if found is None:
            return None
        device, rights = found
        entry = Entry(device, self._rights.get(device.product_key, rights))
        if before == self._forgotten:
            self._rights.setdefault(device.product_key, rights)
            self._keep(entry)
        return entry

    def _read(self, find: Callable[[], Device | None]) -> tuple[Device, _Rights] | None:
        """In a thread: the device and, unless they are held already, its product's classes."""
        device = find()
        if device is None:
            return None
        rights = self._rights.get(device.product_key)
        if rights is None:
            try:
                classes = tuple(self._registry.topic_classes(device.product_key))
            except NotFound:  # deleted between the two look-ups
                return None
            rights = _Rights(classes, frozenset(item.levels for item in classes if item.right.publishes))
        return device, rights

    def _keep(self, entry: Entry) -> None:
        device = entry.device
        self._drop(device.id)
        while len(self._by_id) >= self._capacity:
            self._drop(next(iter(self._by_id)))
        self._by_id[device.id] = self._by_name[device.product_key, device.name] = entry

    def _drop(self, device_id: int) -> None:
        entry = self._by_id.pop(device_id, None)
        if entry:
            self._by_name.pop((entry.device.product_key, entry.device.name), None)

    async def _in_thread(self, act: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, act)
