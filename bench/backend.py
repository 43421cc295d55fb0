"""`python -m bench.backend http|amqp`: takes what is delivered, as fast as it can, and says once a second how much that was.

Each payload says when it was published, `"sent":<ns>` by the clock that all processes of a machine share: so it knows how long
each took.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["main"]

_SENT = re.compile(rb'"sent":(\d+)')
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


class Count:
    """What has come: how many messages, and how long each took, ms."""

    def __init__(self) -> None:
        self.took: list[float] = []

    def take(self, body: bytes) -> None:
        now = time.monotonic_ns()
        self.took += [(now - int(sent)) / 1e6 for sent in _SENT.findall(body)]


class Target(asyncio.Protocol):
    """A webhook's target: HTTP/1.1 with a Content-Length, as uplinkd posts."""

    def __init__(self, count: Count) -> None:
        self._count = count
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (head := self._buffer.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._buffer, 0, head)
            end = head + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < end:
                return
            self._count.take(self._buffer[head + 4 : end])
            self._buffer = self._buffer[end:]
            self._transport.write(_ANSWER)


async def _listen(count: Count, port: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Target(count), "127.0.0.1", port)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    while True:
        await asyncio.sleep(0.25)
        _say(count)


def _say(count: Count) -> None:
    took, count.took = count.took, []
    print(json.dumps({"at": time.monotonic(), "took": took}), flush=True)


def _consume(count: Count, url: str, user: str, password: str, ca: str) -> None:
    """Over AMQP, with the Proton client as an owner's program would use it."""
    from proton import SSLDomain
    from proton.handlers import MessagingHandler
    from proton.reactor import Container

    class Backend(MessagingHandler):
        def __init__(self) -> None:
            super().__init__(prefetch=1000)

        def on_start(self, event: Any) -> None:
            domain = SSLDomain(SSLDomain.MODE_CLIENT)
            domain.set_trusted_ca_db(ca)
            domain.set_peer_authentication(SSLDomain.VERIFY_PEER_NAME)
            connection = event.container.connect(
                url, user=user, password=password, allowed_mechs="PLAIN", ssl_domain=domain, heartbeat=60
            )
            event.container.create_receiver(connection, "default")
            event.container.schedule(0.25, self)

        def on_timer_task(self, event: Any) -> None:
            _say(count)
            event.container.schedule(0.25, self)

        def on_message(self, event: Any) -> None:
            count.take(bytes(event.message.body))

    print(json.dumps({"port": 0}), flush=True)
    Container(Backend()).run()


def main() -> None:
    """`http [PORT]`, or `amqp URL USER PASSWORD CA`; until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    kinds: dict[str, Callable[..., None]] = {
        "http": lambda port="0": asyncio.run(_listen(Count(), int(port))),
        "amqp": lambda *where: _consume(Count(), *where),
    }
    kinds[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
