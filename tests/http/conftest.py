"""A whole worker without sockets: real registry, real gateway, the engine in memory, a transport that keeps what is written."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from uplinkd.core import signature
from uplinkd.core.errors import Code
from uplinkd.engine.memory import MemoryEngine
from uplinkd.flow import Flow
from uplinkd.gateway import Gateway
from uplinkd.http.limits import Limits
from uplinkd.http.protocol import Connection, Door, Outcome
from uplinkd.registry import Registry, open_registry
from uplinkd.registry.cache import DeviceCache
from uplinkd.settings import Settings

PRODUCT, DEVICE, SECRET = "a1GFjLP3xxC", "device123", "secret"


class Transport(asyncio.Transport):
    """Keeps what is written, write by write; `full` plays a peer that does not read."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.paused = False
        self.closed = False
        self.aborted = False
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


@dataclass
class Reply:
    """One answer, parsed strictly: what the status line, headers and body say, and nothing left over."""

    status: int
    reason: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> int:
        return int(self.json["code"])


def replies(data: bytes) -> list[Reply]:
    """The answers in `data`; an assertion fails where a byte is out of place."""
    found = []
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        assert end, f"half a head: {head!r}"
        first, *lines = head.decode().split("\r\n")
        version, status, reason = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = dict(line.split(": ", 1) for line in lines)
        size = int(headers["Content-Length"])
        assert len(rest) >= size, "half a body"
        found.append(Reply(int(status), reason, headers, rest[:size]))
        data = rest[size:]
    return found


@dataclass
class Peer:
    """A device's end of one connection."""

    connection: Connection
    transport: Transport

    def send(self, data: bytes) -> None:
        self.connection.data_received(data)

    async def replies(self) -> list[Reply]:
        """What was answered, once everything under way has settled; each answer came in one write."""
        for _ in range(200):
            await asyncio.sleep(0)
            if not self.connection._door.tasks and not self.connection._answering:
                break
            await asyncio.sleep(0.005)
        written = [data for data in self.transport.writes if not data.startswith(b"HTTP/1.1 100")]
        found = replies(b"".join(written))
        assert len(written) == len(found), "a reply is written whole"
        return found

    async def ask(self, data: bytes) -> Reply:
        """Send one request and give its one answer."""
        before = len(await self.replies())
        self.send(data)
        after = await self.replies()
        assert len(after) == before + 1
        return after[-1]


@dataclass
class House:
    """Everything that a test may want to look at or to break."""

    settings: Settings
    registry: Registry
    engine: MemoryEngine
    cache: DeviceCache
    flow: Flow
    gateway: Gateway
    door: Door
    outcomes: list[Outcome] = field(default_factory=list)
    monotonic: float = 1000.0
    wall: float = field(default_factory=time.time)

    def connect(self, address: str = "192.0.2.7") -> Peer:
        peer = Peer(Connection(self.door), Transport(address))
        peer.connection.connection_made(peer.transport)
        return peer

    def later(self, seconds: float) -> None:
        """Let the door's clock pass."""
        self.monotonic += seconds
        self.door.tick()

    async def token(self, device: str = DEVICE) -> str:
        reply = await self.connect().ask(login_request(device=device))
        assert reply.code == Code.SUCCESS, self.outcomes
        return str(reply.json["info"]["token"])


def login_body(
    *, product: str = PRODUCT, device: str = DEVICE, secret: str = SECRET, method: str = "hmacsha1", **extra: object
) -> dict[str, object]:
    """The members of a right login."""
    members: dict[str, object] = {"productKey": product, "deviceName": device, "clientId": "12345", **extra}
    content = signature.content_of({name: str(value) for name, value in members.items()})
    return {**members, "version": "default", "signmethod": method, "sign": signature.sign(secret, content, method)}


def request(path: str | bytes, body: bytes, *headers: str, method: str = "POST", version: str = "1.1") -> bytes:
    """A literal request."""
    target = path.encode() if isinstance(path, str) else path
    lines = [
        f"{method} ".encode() + target + f" HTTP/{version}".encode(),
        b"Host: h",
        *(header.encode() for header in headers),
    ]
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}".encode())
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def login_request(**members: Any) -> bytes:
    return request("/auth", json.dumps(login_body(**members)).encode(), "Content-Type: application/json")


def publish_request(token: str, payload: bytes = b"hello", topic: str = f"/{PRODUCT}/{DEVICE}/user/update") -> bytes:
    return request("/topic" + topic, payload, f"password: {token}", "Content-Type: application/octet-stream")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path)


@pytest.fixture
async def house(settings: Settings) -> AsyncIterator[House]:
    registry = open_registry(settings)
    registry.create_product("lamps", key=PRODUCT)
    registry.create_device(PRODUCT, DEVICE, secret=SECRET)
    engine = MemoryEngine()
    await engine.start()
    cache = DeviceCache(registry)
    flow = Flow(settings, shared=False)
    outcomes: list[Outcome] = []
    house: House | None = None
    gateway = Gateway(
        settings,
        cache=cache,
        engine=engine,
        flow=flow,
        keys=registry.signing_keys(),
        clock=lambda: house.wall if house else time.time(),
    )
    door = Door(gateway, Limits.of(settings), outcomes.append, lambda: house.monotonic if house else 1000.0)
    house = House(settings, registry, engine, cache, flow, gateway, door, outcomes)
    yield house
    await engine.stop()
    await cache.close()
    flow.close()
    registry.close()
