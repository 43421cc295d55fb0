"""A whole worker without sockets: real registry, real gateway, engine and bus in memory, transports that keep what is written."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from uplinkd.core.model import App
from uplinkd.engine import Bus
from uplinkd.engine.memory import MemoryBus, MemoryDownlink, MemoryEngine
from uplinkd.flow import Flow
from uplinkd.gateway import Gateway, Outcome, Sent
from uplinkd.http.limits import Limits
from uplinkd.http.protocol import Door
from uplinkd.mqtt.session import Door as MqttDoor
from uplinkd.peers import Peers
from uplinkd.presence import Presence
from uplinkd.registry import Registry, open_registry
from uplinkd.registry.cache import DeviceCache
from uplinkd.roster import Roster
from uplinkd.sending import Sending
from uplinkd.settings import Settings

__all__ = ["DEVICE", "PRODUCT", "SECRET", "Crew", "Room", "Transport", "open_room", "settled"]

PRODUCT, DEVICE, SECRET = "a1GFjLP3xxC", "device123", "secret"


class Transport(asyncio.Transport):
    """Keeps what is written, write by write; `full` plays a peer that does not read."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.paused = False
        self.closed = False
        self.aborted = False
        self.unread = 0
        self._address = address

    def write(self, data: Any) -> None:
        assert not self.closed, "nothing is written after close"
        self.writes.append(bytes(data))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return (self._address, 4711) if name == "peername" else default

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def get_write_buffer_size(self) -> int:
        return self.unread


class _Apps:
    """Applications by key; any secret but the right one is wrong."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[App, bytes]] = {}

    async def signed_in(self, key: str, secret: bytes) -> App | None:
        app, right = self.known.get(key, (None, b""))
        return app if secret == right else None

    async def by_id(self, app_id: int) -> App | None:
        return next((app for app, _ in self.known.values() if app.id == app_id), None)


class Crew(Peers):
    """Of workers that tell nobody of themselves: the first leads."""

    def __init__(self, bus: Bus, worker: str) -> None:
        super().__init__(bus, f"gateway.{worker}.0")
        self.first = worker == "0"

    @property
    def leads(self) -> bool:
        return self.first


@dataclass
class Room:
    """Everything that a test may want to look at or to break. Rooms of one test may share registry, bus and downlink: they are
    the workers of one server."""

    settings: Settings
    registry: Registry
    bus: MemoryBus
    downlink: MemoryDownlink
    engine: MemoryEngine
    flow: Flow
    worker: str
    cache: DeviceCache = field(init=False)
    presence: Presence = field(init=False)
    roster: Roster = field(init=False)
    gateway: Gateway = field(init=False)
    sending: Sending = field(init=False)
    door: Door = field(init=False)
    mqtt: MqttDoor = field(init=False)
    apps: _Apps = field(default_factory=_Apps)
    outcomes: list[Outcome] = field(default_factory=list)
    dropped: list[Sent] = field(default_factory=list)
    monotonic: float = 1000.0
    wall: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.cache = DeviceCache(self.registry)
        self.roster = Roster(self.bus, self.worker)
        self.presence = Presence(
            self.settings,
            self.registry,
            self.engine,
            self.bus,
            worker=self.worker,
            peers=Crew(self.bus, self.worker),
            clock=lambda: self.wall,
            monotonic=lambda: self.monotonic,
        )
        self.gateway = self.another_gateway()
        self.sending = Sending(
            self.bus,
            self.gateway,
            lambda *broadcast: self.mqtt.deliver_to_product(*broadcast),
            lambda _topic, sent: self.dropped.append(sent),
        )
        self.door = Door(self.gateway, Limits.of(self.settings), self.outcomes.append, lambda: self.monotonic)
        self.mqtt = MqttDoor(
            self.gateway,
            self.roster,
            self.downlink,
            self.bus,
            self.cache,
            self.outcomes.append,
            self.apps,
            self.sending,
            lambda: self.monotonic,
        )

    def another_gateway(self) -> Gateway:
        return Gateway(
            self.settings,
            cache=self.cache,
            engine=self.engine,
            flow=self.flow,
            presence=self.presence,
            roster=self.roster,
            downlink=self.downlink,
            keys=self.registry.signing_keys(),
            clock=lambda: self.wall,
        )

    def later(self, seconds: float) -> None:
        """Let the doors' clock pass."""
        self.monotonic += seconds
        self.door.tick()
        self.mqtt.tick()


R = TypeVar("R", bound=Room)


@contextlib.asynccontextmanager
async def open_room(settings: Settings, kind: type[R], *, beside: Room | None = None) -> AsyncIterator[R]:
    """A room with one product and one device; or another worker `beside` one."""
    if beside is None:
        registry = open_registry(settings)
        registry.create_product("lamps", key=PRODUCT)
        registry.create_device(PRODUCT, DEVICE, secret=SECRET)
        bus = MemoryBus()
        engine = MemoryEngine(bus=bus)
        await engine.start()
        room = kind(settings, registry, bus, MemoryDownlink(bus), engine, Flow(settings, shared=False), "0")
    else:
        room = kind(settings, beside.registry, beside.bus, beside.downlink, beside.engine, beside.flow, "1")
        room.apps = room.mqtt.apps_known = beside.apps
    yield room
    await settled()
    await room.presence.close()
    await room.cache.close()
    if beside is None:
        await room.engine.stop()
        room.flow.close()
        room.registry.close()


async def settled(turns: int = 30) -> None:
    """Let everything that is under way come to its end, as far as that needs no thread."""
    for _ in range(turns):
        await asyncio.sleep(0)
