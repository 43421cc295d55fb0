"""The sockets of one worker: accepts connections, keeps their clock, drains them."""

from __future__ import annotations

import asyncio
import socket
import ssl

from uplinkd.http.protocol import Connection, Door

__all__ = ["Listener"]

_TICK = 0.25
_DRAIN_TICK = 0.05
_BACKLOG = 4096
_HANDSHAKE_TIMEOUT = 10.0
# The peer's close_notify is a courtesy that many devices omit.
_SHUTDOWN_TIMEOUT = 2.0


class Listener:
    """Serves `sockets`, each with its TLS context or None for plain text."""

    def __init__(self, door: Door, sockets: list[tuple[socket.socket, ssl.SSLContext | None]]) -> None:
        self._door = door
        self._sockets = sockets
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for sock, context in self._sockets:
            server = await loop.create_server(
                lambda: Connection(self._door),
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
