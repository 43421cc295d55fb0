"""Devices that speak HTTP to a worker without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.room import DEVICE, PRODUCT, SECRET, Room, Transport, open_room
from uplinkd.core import signature
from uplinkd.core.errors import Code
from uplinkd.http.protocol import Connection
from uplinkd.settings import Settings


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
            while self.connection._yields:
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


class House(Room):
    """A worker with devices that speak HTTP to it."""

    def connect(self, address: str = "192.0.2.7") -> Peer:
        peer = Peer(Connection(self.door), Transport(address))
        peer.connection.connection_made(peer.transport)
        return peer

    async def token(self, device: str = DEVICE) -> str:
        reply = await self.connect().ask(login_request(device=device))
        assert reply.code == Code.SUCCESS, self.outcomes
        return str(reply.json["info"]["token"])


@pytest.fixture
async def house(settings: Settings) -> AsyncIterator[House]:
    async with open_room(settings, House) as house:
        yield house
