"""Clients that speak MQTT to a worker without sockets."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.clients.fleet import Login
from tests.clients.packets import connect, packet
from tests.room import DEVICE, PRODUCT, SECRET, Room, Transport, open_room, settled
from uplinkd.core.errors import Code
from uplinkd.mqtt.session import Connection
from uplinkd.settings import Settings

__all__ = ["CONNACK", "Client", "House", "login", "packets_of"]

CONNACK = bytes.fromhex("20020000")


def login(
    device: str = DEVICE, *, secret: str = SECRET, client_id: str = "c", more: str = "", product: str = PRODUCT
) -> Login:
    content = f"clientId{client_id}deviceName{device}productKey{product}"
    sign = hmac.new(secret.encode(), content.encode(), hashlib.sha1).hexdigest()
    return Login(f"{client_id}|securemode=2,signmethod=hmacsha1{more}|", f"{device}&{product}", sign)


def packets_of(data: bytes) -> list[bytes]:
    """The packets that `data` is made of; an assertion fails where bytes are left over."""
    found = []
    while data:
        length, shift, position = 0, 0, 1
        while True:
            byte = data[position]
            length |= (byte & 127) << shift
            shift, position = shift + 7, position + 1
            if byte < 128:
                break
        assert len(data) >= position + length
        found.append(data[: position + length])
        data = data[position + length :]
    return found


class Client:
    """A client's end of one connection."""

    def __init__(self, house: Room, address: str = "192.0.2.7") -> None:
        self.house = house
        self.connection = Connection(house.mqtt)
        self.transport = Transport(address)
        self.connection.connection_made(self.transport)
        self._read = 0

    def send(self, data: bytes) -> None:
        self.connection.data_received(data)

    async def heard(self) -> list[bytes]:
        """The packets that came since the last call, once everything under way has settled."""
        for _ in range(100):
            await settled(20)
            while self.connection._yields:
                await settled(1)
            if not self.house.mqtt.tasks and not self.connection.under_way:
                break
            await settled_by_thread()
        if self.transport.closed:
            self.lose()
        data = b"".join(self.transport.writes)
        fresh, self._read = data[self._read :], len(data)
        return packets_of(fresh)

    async def ask(self, data: bytes) -> list[bytes]:
        self.send(data)
        return await self.heard()

    async def open(self, who: Login | None = None, *, keepalive: int = 60, clean: bool = True) -> list[bytes]:
        return await self.ask(connect(who or login(), keepalive, clean=clean))

    def lose(self) -> None:
        """The network takes the connection away."""
        if self.connection in self.house.mqtt.connections:
            self.connection.connection_lost(None)

    @property
    def reason(self) -> str:
        """Of the latest entry in the record."""
        return self.house.outcomes[-1].reason


async def settled_by_thread() -> None:
    """The registry answers from a thread."""
    import asyncio

    await asyncio.sleep(0.003)


class House(Room):
    """A worker with clients that speak MQTT to it."""

    def client(self, address: str = "192.0.2.7") -> Client:
        return Client(self, address)

    async def session(self, device: str = DEVICE, *, clean: bool = True, more: str = "") -> Client:
        client = self.client()
        answer = await client.open(login(device, more=more), clean=clean)
        assert answer, self.outcomes
        assert answer[0][3] == 0, self.outcomes
        return client

    def codes(self) -> list[Code]:
        """Of everything in the record that was refused."""
        return [each.code for each in self.outcomes if each.code]


def puback(number: int) -> bytes:
    return packet(0x40, number.to_bytes(2))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path)


@pytest.fixture
async def house(settings: Settings) -> AsyncIterator[House]:
    async with open_room(settings, House) as house:
        yield house


@pytest.fixture
async def neighbour(settings: Settings, house: House) -> AsyncIterator[House]:
    """Another worker of the same server."""
    async with open_room(settings, House, beside=house) as neighbour:
        yield neighbour
