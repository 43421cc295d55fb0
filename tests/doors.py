"""A port whose connections are TLS by uplinkd's own transport, without the lobby before it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable

from uplinkd.secured import Secured, Sockets


@contextlib.asynccontextmanager
async def secured_port(
    context: ssl.SSLContext,
    make: Callable[[], asyncio.Protocol],
    shaken: Callable[[Secured, OSError | None], None] = lambda _secured, _fault: None,
    patience: float = 30,
) -> AsyncIterator[tuple[int, list[Secured]]]:
    """Its number, and its connections in the order in which they came; a handshake that takes longer than `patience` is cut off."""
    loop = asyncio.get_running_loop()
    sockets, made = Sockets(loop), list[Secured]()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)

    def accept() -> None:
        sock, _ = listening.accept()
        sock.setblocking(False)

        def told(secured: Secured, fault: OSError | None) -> None:
            timer.cancel()
            shaken(secured, fault)

        made.append(Secured(context, sock, make, told, sockets))
        timer = loop.call_later(patience, made[-1].abort)

    loop.add_reader(listening.fileno(), accept)
    try:
        yield listening.getsockname()[1], made
    finally:
        loop.remove_reader(listening.fileno())
        listening.close()
        sockets.close()
        await asyncio.sleep(0)
