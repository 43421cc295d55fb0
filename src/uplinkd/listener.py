"""The sockets of one worker: accepts connections, keeps their clock, drains them."""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Callable, Collection
from typing import Protocol

__all__ = ["Door", "Listener", "Peer", "Port"]

Port = tuple[socket.socket, ssl.SSLContext | None]
"""A listening socket with its TLS context, or None for plain text."""

_TICK = 0.25
_DRAIN_TICK = 0.05
_BACKLOG = 4096
_HANDSHAKE_TIMEOUT = 10.0
# The peer's close_notify is a courtesy that many devices omit.
_SHUTDOWN_TIMEOUT = 2.0


class Peer(Protocol):
    """A connection of a door."""

    @property
    def under_way(self) -> bool: ...

    def abort(self) -> None: ...


class Door(Protocol):
    """What the connections of one kind share."""

    @property
    def connections(self) -> Collection[Peer]: ...

    @property
    def clock(self) -> Callable[[], float]: ...

    def tick(self) -> None: ...

    def drain(self) -> None: ...


class Listener:
    """Serves `ports` with connections that `make` makes for `door`; it is told whether they are TLS."""

    def __init__(self, door: Door, make: Callable[[bool], asyncio.Protocol], ports: list[Port]) -> None:
        self._door = door
        self._make = make
        self._ports = ports
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for sock, context in self._ports:
            server = await loop.create_server(
                functools.partial(self._make, context is not None),
                sock=sock,
                ssl=context,
                backlog=_BACKLOG,
                ssl_handshake_timeout=_HANDSHAKE_TIMEOUT if context else None,
                ssl_shutdown_timeout=_SHUTDOWN_TIMEOUT if context else None,
            )
            self._servers.append(server)

    async def run(self) -> None:
        """Keep the connections' clock until cancelled."""
        while True:
            self._door.tick()
            await asyncio.sleep(_TICK)

    async def drain(self, *, within: float) -> int:
        """Accept no more, answer what is under way, close; return how many connections had to be cut after `within` s."""
        for server in self._servers:
            server.close()
        door = self._door
        door.tick()
        door.drain()
        end = door.clock() + within
        while door.connections and door.clock() < end:
            await asyncio.sleep(_DRAIN_TICK)
            door.tick()
        left = [connection for connection in door.connections if connection.under_way]
        for connection in list(door.connections):
            connection.abort()
        return len(left)
