"""What abuses a door, as a process of its own: `python -m tests.abuse.attack KIND PORT COUNT SECONDS [NETWORKS]`.

It opens COUNT connections from NETWORKS addresses of the loopback, says `ready` once all stand or were sent away, and goes on for
SECONDS from then.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

_IP_BIND_ADDRESS_NO_PORT = 24
TINY = b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
# A ClientHello's record header, and nothing of what it promises.
_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
_TLS.check_hostname, _TLS.verify_mode = False, ssl.CERT_NONE

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Stood = Callable[[], None]


class Attack:
    """Connections to one port."""

    def __init__(self, port: int, seconds: float, networks: int) -> None:
        self.port = port
        self.seconds = seconds
        self.over = asyncio.Event()
        self.networks = networks

    @property
    def on(self) -> bool:
        return not self.over.is_set()

    def source(self, number: int) -> tuple[str, int]:
        return f"127.0.66.{number % self.networks + 1}", 0

    @contextlib.asynccontextmanager
    async def streams(self, number: int, tls: ssl.SSLContext | None) -> AsyncIterator[Streams]:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=tls, local_addr=self.source(number), limit=1024
        )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def drip(self, number: int, tls: ssl.SSLContext | None, first: bytes, drop: bytes, stood: Stood) -> None:
        """Say `first`, then a `drop` now and then."""
        async with self.streams(number, tls) as (reader, writer):
            writer.write(first)
            stood()
            while self.on and not reader.at_eof() and not writer.is_closing():
                await asyncio.sleep(0.3)
                writer.write(drop)


async def half_open(attack: Attack, number: int, stood: Stood) -> None:
    """TCP alone."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        # The port is chosen as it connects: one that nobody else uses at all takes ever longer to find.
        sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind(attack.source(number))
        await loop.sock_connect(sock, ("127.0.0.1", attack.port))
        stood()
        await attack.over.wait()


async def handshake(attack: Attack, number: int, stood: Stood) -> None:
    """A ClientHello drop by drop."""
    await attack.drip(number, None, _HELLO, b"\x00", stood)


async def head(attack: Attack, number: int, stood: Stood) -> None:
    """A head drop by drop."""
    await attack.drip(number, _TLS, b"POST /auth HTTP/1.1\r\n", b"A: b\r\n", stood)


async def body(attack: Attack, number: int, stood: Stood) -> None:
    """A body drop by drop."""
    await attack.drip(number, _TLS, b"POST /auth HTTP/1.1\r\nHost: h\r\nContent-Length: 9999\r\n\r\n{", b" ", stood)


async def handshakes(attack: Attack, number: int, stood: Stood) -> None:
    """Whole handshakes, one after the other."""
    stood()
    while attack.on:
        with contextlib.suppress(OSError):
            async with attack.streams(number, _TLS):
                pass


async def pipelined(attack: Attack, number: int, stood: Stood) -> None:
    """Requests without end, and the answers are read."""
    async with attack.streams(number, _TLS) as (reader, writer):
        stood()
        while attack.on:
            writer.write(TINY * 500)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    while await reader.read(65536):
                        pass
            await writer.drain()


async def deaf(attack: Attack, number: int, stood: Stood) -> None:
    """Requests without end, and no answer is read."""
    async with attack.streams(number, _TLS) as (_, writer):
        stood()
        while attack.on and not writer.is_closing():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    writer.write(TINY * 500)
                    await asyncio.sleep(0)
                    await writer.drain()


async def giant(attack: Attack, number: int, stood: Stood) -> None:
    """Heads too large, in one line or in many."""
    stood()
    line = b"A: " + b"x" * 100_000 if number % 2 else b"A: b\r\n" * 20_000
    while attack.on:
        with contextlib.suppress(OSError):
            async with attack.streams(number, _TLS) as (reader, writer):
                writer.write(b"POST /auth HTTP/1.1\r\n" + line)
                await writer.drain()
                await reader.read()


async def gone(attack: Attack, number: int, stood: Stood) -> None:
    """Requests, and the peer has gone before it is answered."""
    stood()
    while attack.on:
        with contextlib.suppress(OSError):
            async with attack.streams(number, _TLS) as (_, writer):
                writer.write(TINY * 200)
                await asyncio.sleep(0)


async def packets(attack: Attack, number: int, stood: Stood) -> None:
    """At the MQTT door: what begins like a CONNECT, drop by drop."""
    await attack.drip(number, _TLS, b"\x10\xff\x0f\x00\x04MQTT", b"\x00", stood)


KINDS: dict[str, Callable[[Attack, int, Stood], Awaitable[None]]] = {
    each.__name__: each
    for each in (half_open, handshake, head, body, handshakes, pipelined, deaf, giant, gone, packets)
}


async def run(kind: str, port: int, count: int, seconds: float, networks: int) -> None:
    attack = Attack(port, seconds, networks)
    stand = 0
    all_stand = asyncio.Event()

    def stood() -> None:
        nonlocal stand
        stand += 1
        if stand >= count:
            all_stand.set()

    async def one(number: int) -> None:
        counted = False

        def once() -> None:
            nonlocal counted
            counted = True
            stood()

        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await KINDS[kind](attack, number, once)
        if not counted:
            stood()

    tasks = []
    for number in range(count):
        tasks.append(asyncio.create_task(one(number)))
        if number % 50 == 49:
            await asyncio.sleep(0.01)
    await all_stand.wait()
    print("ready", flush=True)
    await asyncio.sleep(attack.seconds)
    attack.over.set()
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(
        run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int((sys.argv[5:] or ["1"])[0]))
    )
