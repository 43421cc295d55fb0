"""An AMQP door on a loopback socket, and consumers of proton's engine that do what a test says, and nothing by themselves."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import importlib.util
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from tests.house import until
from uplinkd.core.apps import hash_secret
from uplinkd.core.groups import Group, Plan
from uplinkd.core.model import App, DeviceName, Message, ProductKey
from uplinkd.delivery.amqp import AmqpDoor, Lookups
from uplinkd.delivery.budget import Budget
from uplinkd.engine import Deliveries
from uplinkd.engine.memory import MemoryDeliveries
from uplinkd.journal import Refusal
from uplinkd.settings import Settings

proton: Any = importlib.import_module("proton") if importlib.util.find_spec("proton") else None
needs_proton = pytest.mark.skipif(proton is None, reason="python-qpid-proton is not installed: `make amqp`")

APP = App(1, "app-billing", "billing", hash_secret("secret"), True, 0, (ProductKey("pk"),))
GROUP = Group(7, "invoices", Plan(apps=("billing",)), 0, 1, 0)
SETTINGS = Settings(amqp_listen="127.0.0.1:0")


def message(number: int, payload: bytes = b"", topic: str = "/pk/lamp/user/update") -> Message:
    """Ids are as large as real ones."""
    payload = payload or f"payload {number}".encode()
    return Message((1 << 60) + number, topic, ProductKey("pk"), DeviceName("lamp"), 1_700_000_000_000 + number, payload)


def credentials(
    *, key: str = APP.key, secret: str = "secret", group: str = GROUP.name, method: str = "hmacsha1", **more: str
) -> tuple[str, str]:
    """(user name, password) as the platform's samples make them; `more` replaces parameters."""
    given = {"authMode": "aksign", "signMethod": method, "timestamp": "1573489088171", "authId": key}
    given |= {"iotInstanceId": "", "consumerGroupId": group} | more
    digest = {"hmacmd5": "md5", "hmacsha1": "sha1", "hmacsha256": "sha256"}.get(method.lower(), "sha1")
    content = f"authId={given['authId']}&timestamp={given['timestamp']}"
    sign = base64.b64encode(hmac.digest(secret.encode(), content.encode(), digest)).decode()
    return f"client-1|{','.join(f'{name}={value}' for name, value in given.items())}|", sign


@dataclass
class Known:
    """The registry's part that the door asks."""

    apps: dict[str, App] = field(default_factory=lambda: {APP.key: APP})
    secrets: dict[str, str] = field(default_factory=lambda: {APP.key: "secret"})
    named: dict[str, Group] = field(default_factory=lambda: {GROUP.name: GROUP})
    fault: Exception | None = None

    @property
    def groups(self) -> Known:
        return self

    def by_name(self, name: str) -> Group | None:
        return self.named.get(name)

    def find_app(self, key: str) -> App | None:
        if self.fault:
            raise self.fault
        return self.apps.get(key)

    def app_secret(self, key: str) -> str | None:
        return self.secrets.get(key)

    def set_plan(self, **changes: Any) -> None:
        self.named[GROUP.name] = replace(GROUP, plan=replace(GROUP.plan, **changes))


@dataclass
class Doorway:
    """A door that listens at `port`; `memory` is what it gives messages from, unless a test has real deliveries."""

    door: AmqpDoor
    known: Known
    memory: MemoryDeliveries
    refusals: list[Refusal]
    port: int
    peers: list[Peer] = field(default_factory=list)

    async def consumer(self, *, credit: int = 0, **options: Any) -> Peer:
        """A consumer that has signed in and has its link."""
        peer = await self.connect(**options)
        peer.attach()
        if credit:
            peer.receiver.flow(credit)
        await peer.until(lambda: peer.receiver.state & proton.Endpoint.REMOTE_ACTIVE)
        return peer

    async def connect(self, *, idle: float = 60, **of: str) -> Peer:
        peer = Peer(credentials(**of), idle)
        self.peers.append(peer)
        await asyncio.get_running_loop().create_connection(lambda: peer, "127.0.0.1", self.port)
        return peer

    async def reasons(self, count: int = 1) -> list[str]:
        await until(lambda: len(self.refusals) >= count)
        return [each.reason for each in self.refusals]


@contextlib.asynccontextmanager
async def doorway(
    *,
    known: Known | None = None,
    registry: Lookups | None = None,
    deliveries: Deliveries | None = None,
    settings: Settings = SETTINGS,
    tls: ssl.SSLContext | None = None,
    budget: Budget | None = None,
) -> AsyncIterator[Doorway]:
    memory = MemoryDeliveries(haste=20)
    known = known or Known()
    refusals: list[Refusal] = []
    door = AmqpDoor(settings, registry or known, deliveries or memory, refusals.append, budget)
    server = await asyncio.get_running_loop().create_server(door.connection, "127.0.0.1", 0, ssl=tls)
    opened = Doorway(door, known, memory, refusals, server.sockets[0].getsockname()[1])
    yield opened
    server.close()
    await door.drain(0.02)
    for peer in opened.peers:
        peer.leave()
    await asyncio.sleep(0.01)
    assert not door.connections


class Peer(asyncio.Protocol):
    """One connection of a client. Deliveries lie in `got` until they are settled by `settle`."""

    def __init__(self, login: tuple[str, str], idle: float = 60) -> None:
        self.connection = proton.Connection()
        self.connection.container = "peer"
        self.connection.user, self.connection.password = login
        self.engine = proton.Transport()
        sasl = self.engine.sasl()
        sasl.allow_insecure_mechs = True
        sasl.allowed_mechs("PLAIN")
        # Proton announces half of it, which is what the door's rule is about.
        self.engine.idle_timeout = idle * 2
        self.collector = proton.Collector()
        self.connection.collect(self.collector)
        self.engine.bind(self.connection)
        self.connection.open()
        self.session = self.connection.session()
        self.session.open()
        self.got: list[tuple[Any, Any]] = []  # deliveries and their messages
        self.lost = False
        self.events: list[str] = []
        self.heard = 0
        self.receiver: Any = None
        self._transport: asyncio.Transport | None = None

    def attach(self, name: str = "link", source: str = "queue", **modes: int) -> Any:
        link = self.session.receiver(name)
        link.source.address = source
        for mode, value in modes.items():
            setattr(link, mode, value)
        link.open()
        self.receiver = self.receiver or link
        self.flush()
        return link

    async def messages(self, count: int) -> list[Any]:
        """The messages that came so far, once there are `count` of them."""
        await self.until(lambda: len(self.got) >= count)
        return [each for _, each in self.got]

    def settle(self, outcome: int = 0x24, count: int = 1000, *, credit: bool = True) -> None:
        """Settle the oldest of those that lie here, with accepted unless another is given."""
        for delivery, _ in self.got[:count]:
            delivery.update(outcome)
            delivery.settle()
        if credit:
            self.receiver.flow(len(self.got[:count]))
        del self.got[:count]
        self.flush()

    async def until(self, condition: Any, seconds: float = 5) -> None:
        self.flush()
        await until(condition, seconds)

    async def closed(self) -> tuple[str, str]:
        """The condition with which the server has closed, once the connection is gone."""
        await self.until(lambda: self.lost)
        condition = self.connection.remote_condition or self.engine.condition
        return (condition.name, condition.description) if condition else ("", "")

    def flush(self) -> None:
        while self._transport and (size := self.engine.pending()) > 0:
            self._transport.write(self.engine.peek(size) or b"")
            self.engine.pop(size)

    def write(self, data: bytes) -> None:
        """Frames that proton does not know of."""
        assert self._transport
        self._transport.write(data)

    def leave(self) -> None:
        """Be gone, without a word."""
        if self._transport:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.flush()

    def data_received(self, data: bytes) -> None:
        self.heard += len(data)
        with contextlib.suppress(proton.ProtonException):
            while data and (room := self.engine.capacity()) > 0:
                self.engine.push(data[:room])
                data = data[room:]
        while event := self.collector.peek():
            self.events.append(event.type.name)
            if event.type == proton.Event.DELIVERY and event.delivery.readable and not event.delivery.partial:
                delivery, message = event.delivery, proton.Message()
                message.decode(event.link.recv(delivery.pending))
                event.link.advance()
                self.got.append((delivery, message))
            elif event.type == proton.Event.CONNECTION_REMOTE_CLOSE:
                self.connection.close()
            self.collector.pop()
        self.flush()
        if self.engine.pending() < 0 and self._transport:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._transport = None
