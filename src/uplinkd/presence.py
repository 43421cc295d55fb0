"""Who is online: signs of life become status changes, and each change is stored once as a message.

The registry decides what a change is, in one transaction for all workers, and keeps it until it was published: so a change
survives the death of whoever made it, and two workers never make it twice. The changes of one device are published one after
the other. Devices that fall silent are found by one query over an index, not by a timer for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar

from uplinkd.core.errors import Unavailable
from uplinkd.core.model import Origin, StatusChange
from uplinkd.core.subjects import to_subject
from uplinkd.engine import Bus, Publisher
from uplinkd.engine.api import ask_api
from uplinkd.engine.stream import STREAM, check_quorum, part_for
from uplinkd.observe import Occasionally
from uplinkd.peers import Peers
from uplinkd.registry import Registry, Sighting
from uplinkd.registry.cache import Entry
from uplinkd.settings import Settings

__all__ = ["Presence", "status_message", "status_topic"]

log = logging.getLogger("uplinkd.presence")

T = TypeVar("T")

_FLUSH_SECONDS = 0.5
_SWEEP_SECONDS = 3.0
_JUMP_SECONDS = 1.0
_CLOSING_SECONDS = 1.5
_ORPHANS_SECONDS = 60.0
_PAGE = 1000
_BATCH = 5000
_MOST_PENDING = 200_000
_MOST_UNTOLD = 10_000
_ASKED_AT_ONCE = 100


class Presence:
    """One worker's part, `worker` its name. The one that leads among its `peers` also finds who fell silent, what was left untold, and
    the sessions of workers that are gone; it is no harm if two think for a moment that they lead."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        engine: Publisher,
        bus: Bus,
        *,
        worker: str,
        peers: Peers,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._bus = bus
        self._worker = worker
        self._peers = peers
        self._clock = clock
        self._monotonic = monotonic
        self._partitions = settings.partitions
        self._timeout = round(settings.online_timeout * 1000)
        self._pace = min(round(settings.seen_interval * 1000), self._timeout // 4)
        self._pending: list[Sighting] = []
        self._publishing: set[int] = set()
        self._told: list[int] = []
        self._untold: set[int] = set()  # what the last look found
        self._flush_clock = _Jumps(clock, monotonic)
        self._sweep_clock: _Jumps | None = None
        self._orphans_due = 0.0
        self._flushing = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "presence")
        self._closed = False
        self._warn = Occasionally(10)

    def saw(self, entry: Entry, now: int, address: str) -> None:
        """An HTTPS request of the device at `now` (ms)."""
        if not -self._pace < now - entry.seen < self._pace:  # the clock may have been set back
            entry.seen = now
            self._pending.append(Sighting(entry.device.id, now, address))

    def stands(self, entry: Entry, now: int, address: str, stamp: int) -> None:
        """The device has the MQTT session `stamp` here: said when it begins, and now and then as it is heard of."""
        self._pending.append(Sighting(entry.device.id, now, address, self._worker, stamp))

    def ended(self, entry: Entry, now: int, stamp: int) -> None:
        """Its session here has ended."""
        self._pending.append(Sighting(entry.device.id, now, "", self._worker, stamp, ended=True))

    async def start(self) -> int:
        """End the sessions that this worker's predecessor held when it died; the highest stamp that a session has had. Raise
        Unavailable."""
        self._publish(await self._abandoned(self._worker))
        return await self._in_thread(self._registry.last_session)

    async def run(self) -> None:
        """Write what was seen, publish what it changes, and (if it leads) look after the rest; until cancelled or closed."""
        due = 0.0
        while not self._closed:
            await asyncio.sleep(_FLUSH_SECONDS)
            try:
                await self.flush()
                if self._monotonic() >= due and self._peers.leads:
                    due = self._monotonic() + _SWEEP_SECONDS
                    await self.sweep()
            except Unavailable as fault:
                if not self._closed and self._warn():
                    log.warning("%s; who is online is recorded later", fault)

    async def flush(self) -> None:
        """Write what was seen and told; what cannot be written is kept for the next time."""
        async with self._flushing:
            await self._write_seen()
            await self._write_told()

    async def sweep(self) -> None:
        """Follow the clock, find who fell silent, publish what others left untold."""
        now = await self._follow_clock()
        while True:
            changed = await self._in_thread(lambda: self._registry.expired(now=now, timeout=self._timeout, limit=_PAGE))
            self._publish(changed)
            if len(changed) < _PAGE:
                break
        await self._publish_untold()
        await self._end_orphans()

    async def close(self) -> None:
        """Write what is still to be written, as far as that is possible."""
        clock = asyncio.get_running_loop().time
        end = clock() + _CLOSING_SECONDS
        with contextlib.suppress(Unavailable):
            await self.flush()
            while self._publishing and clock() < end:
                await asyncio.sleep(0.02)
                await self.flush()
        self._closed = True
        self._thread.shutdown()

    async def _write_seen(self) -> None:
        now, by, lately = self._flush_clock.look()
        pending, self._pending = self._pending, []
        if by:
            pending = [replace(each, at=_moved(each.at, by, now, lately)) for each in pending]
        while pending:
            part = pending[:_BATCH]
            try:
                changed = await self._in_thread(lambda: self._registry.sighted(part, now=now, timeout=self._timeout))  # noqa: B023 - awaited
            except Unavailable:
                self._pending = _bounded([*pending, *self._pending])
                raise
            del pending[:_BATCH]
            self._publish(changed)

    async def _write_told(self) -> None:
        told, self._told = self._told, []
        if told:
            try:
                following = await self._in_thread(lambda: self._registry.told(told))
            except Unavailable:
                self._told = [*told, *self._told]
                raise
            self._publishing.difference_update(told)
            self._publish(following)

    async def _abandoned(self, worker: str) -> list[StatusChange]:
        return await self._in_thread(lambda: self._registry.abandoned(worker, now=self._now(), timeout=self._timeout))

    def _publish(self, changes: Sequence[StatusChange]) -> None:
        for change in changes:
            self._publishing.add(change.id)
            subject = to_subject(status_topic(change)).encode()
            # Who publishes it a second time, because the first one died or was slow, stores it once.
            key = f"status-{change.id}-{change.at}"
            self._engine.publish(subject, status_message(change), self._done(change.id), Origin.STATUS, key)

    def _done(self, change_id: int) -> Callable[[int, str], None]:
        def done(message_id: int, _fault: str) -> None:
            if message_id:
                self._told.append(change_id)
            else:
                # The sweep takes it up, after two more looks: it may yet be stored by a server that was only slow.
                self._publishing.discard(change_id)
                self._untold.discard(change_id)

        return done

    async def _follow_clock(self) -> int:
        """The time. When the clock was set, move what was recorded by it along: nobody falls silent because of that."""
        if self._sweep_clock is None:  # what lies in the future was written before the clock was set back
            self._sweep_clock = _Jumps(self._clock, self._monotonic)
            now, by, lately = self._now(), 0, 0
            await self._in_thread(lambda: self._registry.clock_jumped(0, now=now, lately=0))
            return now
        clock = copy(self._sweep_clock)
        now, by, lately = clock.look()
        if by < 0 and self._peers.others:  # most of what was recorded is by the clocks of others
            by = 0
            await self._in_thread(lambda: self._registry.clock_jumped(0, now=now, lately=0))
        if by:
            await self._in_thread(lambda: self._registry.clock_jumped(by, now=now, lately=lately))
            log.warning(
                "the clock was set by %+.0f s; the times of devices that are online were moved with it", by / 1000
            )
        self._sweep_clock = clock
        return now

    async def _end_orphans(self) -> None:
        """End the sessions of workers that are gone: of a gateway that died and has no successor. Not on the smaller side of a cluster
        that is parted, where everybody else seems to be gone."""
        if not self._peers.settled or not (self._peers.missed() or self._monotonic() >= self._orphans_due):
            return
        self._orphans_due = self._monotonic() + _ORPHANS_SECONDS
        try:
            held = await self._in_thread(self._registry.session_holders)
            if not (orphaned := held - self._peers.workers):
                return
            check_quorum(await ask_api(self._bus, f"STREAM.INFO.{STREAM}"))
            for worker in sorted(orphaned):
                self._publish(await self._abandoned(worker))
        except Unavailable:
            self._peers.look_again()
            raise

    async def _publish_untold(self) -> None:
        """What two looks in a row have found was left by somebody who died, or could not be stored."""
        found = await self._in_thread(lambda: self._registry.untold(_MOST_UNTOLD))
        left = [change for change in found if change.id in self._untold and change.id not in self._publishing]
        self._untold = {change.id for change in found}
        for first in range(0, len(left), _ASKED_AT_ONCE):
            part = left[first : first + _ASKED_AT_ONCE]
            stored = await asyncio.gather(*map(self._is_stored, part))
            self._told += [change.id for change, there in zip(part, stored, strict=True) if there]
            self._publish([change for change, there in zip(part, stored, strict=True) if not there])

    async def _is_stored(self, change: StatusChange) -> bool:
        """Whether it was published all the same, by somebody who could not say so any more. Then it is the last of its device:
        the next one waits until this one was told."""
        subject = to_subject(status_topic(change))
        stream = part_for(subject, self._partitions).name
        last = await self._bus.ask(f"$JS.API.DIRECT.GET.{stream}", json.dumps({"last_by_subj": subject}).encode())
        try:
            there, here = json.loads(last.payload or b"{}"), json.loads(status_message(change))
        except ValueError:
            return False
        # Not the local times: the time zone may be another one now.
        return all(there.get(name) == here[name] for name in ("status", "utcTime", "utcLastTime"))

    def _now(self) -> int:
        return round(self._clock() * 1000)

    async def _in_thread(self, act: Callable[[], T]) -> T:
        if self._closed:
            raise Unavailable("uplinkd is stopping")
        return await asyncio.get_running_loop().run_in_executor(self._thread, act)


class _Jumps:
    """Tells by how much the wall clock was set, by a clock that nobody sets."""

    def __init__(self, clock: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self._clock, self._monotonic = clock, monotonic
        self._last = monotonic()
        self._offset = clock() - self._last

    def look(self) -> tuple[int, int, int]:
        """(now, by how much it was set since the last look, how long ago that was), all in ms."""
        now, monotonic = self._clock(), self._monotonic()
        by, lately = now - monotonic - self._offset, monotonic - self._last
        self._last, self._offset = monotonic, now - monotonic
        return round(now * 1000), round(by * 1000) if abs(by) > _JUMP_SECONDS else 0, round(lately * 1000)


def _moved(at: int, by: int, now: int, lately: int) -> int:
    """`at` by the clock as it was set; what was heard since the last look may be by it already (Registry.clock_jumped)."""
    if at + by > now:
        return now
    return at if now - lately <= at <= now else at + by


def status_topic(change: StatusChange) -> str:
    return f"/as/mqtt/status/{change.product_key}/{change.device_name}"


def status_message(change: StatusChange) -> bytes:
    """The platform's form: local time and UTC, of the change and of the last sign of life."""
    time_, utc_time = _times(change.at)
    last, utc_last = _times(change.last_seen)
    document = {
        "status": "online" if change.online else "offline",
        "productKey": change.product_key,
        "deviceName": change.device_name,
        "time": time_,
        "utcTime": utc_time,
        "lastTime": last,
        "utcLastTime": utc_last,
        "clientIp": change.address,
    }
    return json.dumps(document, separators=(",", ":")).encode()


def _times(milliseconds: int) -> tuple[str, str]:
    utc = datetime.fromtimestamp(milliseconds // 1000, UTC)
    fraction = f".{milliseconds % 1000:03d}"
    local = utc.astimezone().strftime("%Y-%m-%d %H:%M:%S") + fraction
    return local, utc.strftime("%Y-%m-%dT%H:%M:%S") + fraction + "Z"


def _bounded(pending: list[Sighting]) -> list[Sighting]:
    """`pending`, and of very many only the last of each device and kind; requests go first, they come again."""
    if len(pending) <= _MOST_PENDING:
        return pending
    last = {(each.device_id, each.session, each.ended): each for each in pending}
    return sorted(last.values(), key=lambda each: bool(each.session))[-_MOST_PENDING:]
