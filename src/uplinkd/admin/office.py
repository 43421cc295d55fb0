"""What the management API and the console share: registry, messages, refusals, figures, long work."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from uplinkd.admin.access import Attempts
from uplinkd.admin.figures import Figures
from uplinkd.admin.jobs import Jobs
from uplinkd.asking import Live, live_now
from uplinkd.core.errors import Unavailable
from uplinkd.core.groups import Group
from uplinkd.core.model import Census, Device, State
from uplinkd.engine import Bus, GroupDesk, Reader, StreamState
from uplinkd.engine.standing import Standing, Standings
from uplinkd.peers import Peers
from uplinkd.records import Records
from uplinkd.registry import Registry
from uplinkd.settings import Settings

__all__ = ["Office", "now"]

# A census looks at each device: it is made anew when what it cost last time is a small part of the time since.
_CENSUS_SHARE = 50
_ENGINE_SECONDS = 1.5
_NOTE_SECONDS, _MOST_NOTED = 60.0, 1000


@dataclass(slots=True, kw_only=True)
class Office:
    """One for the console's process."""

    settings: Settings
    registry: Registry
    bus: Bus
    figures: Figures
    open_reader: Callable[[], Awaitable[Reader]]
    desk: GroupDesk
    peers: Peers | None = None
    """Who else lives; None where that is not known."""
    https: tuple[str, int]
    """Host and port of the HTTPS door; `mqtt` those of the MQTT door, None where there is none."""
    mqtt: tuple[str, int] | None
    jobs: Jobs = field(default_factory=Jobs)
    attempts: Attempts = field(default_factory=Attempts)
    watching: int = 0
    """How many streams are being watched."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _standings: Standings | None = None
    _reader: Reader | None = None
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    _noted: dict[str, float] = field(default_factory=dict)
    _noting: set[asyncio.Task[None]] = field(default_factory=set)
    _censuses: dict[str | None, tuple[Census, float]] = field(default_factory=dict)

    @property
    def records(self) -> Records:
        """Of refusals, of all gateways."""
        peers = self.peers
        return Records(self.settings, self.bus, (lambda: peers.gateways) if peers else None)

    @property
    def timeout(self) -> int:
        """After how many ms without an HTTPS request a device counts as offline."""
        return round(self.settings.online_timeout * 1000)

    def state(self, device: Device) -> State:
        return device.state(now=now(), online_timeout=self.timeout)

    async def reader(self) -> Reader:
        """Raise Unavailable when the engine does not answer."""
        async with self._opening:
            if self._reader is None:
                self._reader = await self.open_reader()
        return self._reader

    async def standings(self, groups: Sequence[Group], *, rates: bool = False) -> list[Standing]:
        """How the groups stand, with `rates` not before these are known; raise Unavailable when the engine does not say so at once."""
        if self._standings is None:
            self._standings = Standings(self.desk)
        try:
            async with asyncio.timeout(_ENGINE_SECONDS * (2 if rates else 1)):
                return await (self._standings.measured(groups) if rates else self._standings.of(groups))
        except TimeoutError:
            raise Unavailable(f"the engine did not answer within {_ENGINE_SECONDS} s") from None

    async def live(self) -> Live:
        """What goes on in the processes that deliver; nothing where none says so."""
        try:
            async with asyncio.timeout(_ENGINE_SECONDS):
                return await live_now(self.bus)
        except TimeoutError:
            raise Unavailable(f"the engine did not answer within {_ENGINE_SECONDS} s") from None

    async def stored(self) -> StreamState:
        """What the engine holds; raise Unavailable when it does not say so at once."""
        try:
            async with asyncio.timeout(_ENGINE_SECONDS):
                return await (await self.reader()).state()
        except TimeoutError:
            raise Unavailable(f"the engine did not answer within {_ENGINE_SECONDS} s") from None

    async def awake(self) -> Reader:
        """The reader of an engine that answers now; a search alone would wait for longer until it gives up."""
        await self.stored()
        return await self.reader()

    def note_use(self, what: str, act: Callable[[], None]) -> None:
        """Do `act`, which records that `what` was used, once a minute and beside the request: that only looks, and must not wait
        while an import holds the registry's write lock."""
        if time.monotonic() < self._noted.get(what, 0.0):
            return
        if len(self._noted) >= _MOST_NOTED:
            self._noted.clear()
        self._noted[what] = time.monotonic() + _NOTE_SECONDS
        task = asyncio.create_task(_quietly(act))
        self._noting.add(task)
        task.add_done_callback(self._noting.discard)

    def census(self, product_key: str | None = None) -> Census:
        """How many devices there are by state, as fresh as it is cheap. Call it in a thread."""
        known = self._censuses.get(product_key)
        if known and time.monotonic() < known[1]:
            return known[0]
        begun = time.monotonic()
        census = self.registry.census(product_key, timeout=self.timeout)
        ended = time.monotonic()
        if len(self._censuses) > 1000:
            self._censuses.clear()
        self._censuses[product_key] = census, ended + (ended - begun) * _CENSUS_SHARE
        return census

    async def close(self) -> None:
        await self.jobs.close()
        if self._noting:
            await asyncio.wait(set(self._noting), timeout=2)
        if self._reader is not None:
            await self._reader.close()


async def _quietly(act: Callable[[], None]) -> None:
    with contextlib.suppress(Unavailable):
        await asyncio.to_thread(act)


def now() -> int:
    """The time in ms."""
    return time.time_ns() // 1_000_000
