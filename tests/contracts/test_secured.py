"""TLS between socket and protocol, against OpenSSL's own clients over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import random
import shutil
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from tests.doors import secured_port
from tests.house import until
from uplinkd.secured import Secured, Sockets
from uplinkd.settings import Settings
from uplinkd.tls import ensure_material, server_context

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@dataclass
class Echo(asyncio.Protocol):
    """Sends back what comes; `paces` it where it is to be slow."""

    lost: list[Exception | None] = field(default_factory=list)
    heard: int = 0
    ended: bool = False
    blocked: int = 0
    transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert len(data) <= 16 * 1024
        self.heard += len(data)
        assert self.transport
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.blocked += 1

    def resume_writing(self) -> None:
        self.blocked += 1

    def eof_received(self) -> bool:
        self.ended = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


@dataclass
class Door:
    """A port whose connections are `Secured`; `made`, and how handshakes ended, in the order in which they did."""

    port: int
    context: ssl.SSLContext
    ca: Path
    made: list[Echo] = field(default_factory=list)
    shaken: list[OSError | None] = field(default_factory=list)

    def client(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca))
        context.minimum_version = context.maximum_version = version
        return context

    async def connect(
        self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.client(version), server_hostname="localhost"
        )

    async def talk(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Echo]:
        """A connection over which a byte has gone and come back, with its other end."""
        reader, writer = await self.connect()
        writer.write(b"x")
        await reader.readexactly(1)
        return reader, writer, self.made[-1]


def reading(writer: asyncio.StreamWriter) -> asyncio.Transport:
    """The client's transport, which can be made not to read."""
    return cast(asyncio.Transport, writer.transport)


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Give `test` its door, on the loop of a worker."""

    def run(tmp_path: Path, **arguments: object) -> None:
        async def act() -> None:
            async with opened(tmp_path) as door:
                await test(door, **arguments)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(act())

    _, *others = inspect.signature(test).parameters.values()
    place = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    functools.update_wrapper(run, test)
    run.__signature__ = inspect.Signature([place, *others])  # type: ignore[attr-defined]
    return run


@contextlib.asynccontextmanager
async def opened(tmp_path: Path) -> AsyncIterator[Door]:
    context = server_context(ensure_material(Settings(data=tmp_path)), legacy=True)
    door = Door(0, context, tmp_path / "tls" / "ca.pem")

    def make() -> asyncio.Protocol:
        door.made.append(Echo())
        return door.made[-1]

    async with secured_port(context, make, lambda _, fault: door.shaken.append(fault)) as (door.port, _):
        yield door


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, ssl.SSLError):
        await writer.wait_closed()


@pytest.mark.parametrize("version", VERSIONS, ids=["1.2", "1.3"])
@pytest.mark.parametrize("size", [1, 200, 16_384, 16_385, 1_000_000])
@on_uvloop
async def test_what_is_sent_comes_back(door: Door, version: ssl.TLSVersion, size: int) -> None:
    """Whatever its size, whole and in order; at both ends the connection ends in peace."""
    data = random.Random(size).randbytes(size)
    reader, writer = await door.connect(version)
    writer.write(data)
    assert await asyncio.wait_for(reader.readexactly(size), 20) == data
    await closed(writer)
    await until(lambda: door.made[0].lost)
    assert door.made[0].lost == [None]
    assert door.made[0].ended


@on_uvloop
async def test_bytes_that_come_one_by_one_are_a_handshake_too(door: Door) -> None:
    """A slow peer, through buffers of its own."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = door.client().wrap_bio(incoming, outgoing, server_hostname="localhost")
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def through(act: Callable[[], bytes | None]) -> bytes | None:
        while True:
            try:
                result = act()
            except ssl.SSLWantReadError:
                result = None
                waits = True
            else:
                waits = False
            for byte in outgoing.read():
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            if not waits:
                return result
            incoming.write(await asyncio.wait_for(reader.read(1), 5))

    await through(lambda: tls.do_handshake())
    tls.write(b"hello")
    assert await through(lambda: tls.read(100)) == b"hello"
    await closed(writer)


@on_uvloop
async def test_a_close_lets_the_answer_arrive(door: Door) -> None:
    """Though the peer has sent what nobody has read: a reset would destroy it. The peer sees close_notify, and no cut."""
    reader, writer = await door.connect()
    writer.write(b"first")
    assert await reader.readexactly(5) == b"first"
    echo = door.made[0]
    assert echo.transport
    echo.transport.write(b"x" * 300_000)
    writer.write(b"nobody reads this" * 1000)
    echo.transport.close()
    assert echo.transport.is_closing()
    echo.transport.write(b"never")
    assert (await asyncio.wait_for(reader.read(-1), 5)).count(b"x") == 300_000
    await closed(writer)
    await until(lambda: echo.lost)
    assert echo.lost == [None]


@on_uvloop
async def test_a_peer_that_does_not_go_is_cut_off(door: Door) -> None:
    """It has had close_notify, and two seconds."""
    _, writer, echo = await door.talk()
    reading(writer).pause_reading()
    assert echo.transport
    echo.transport.close()
    await until(lambda: echo.lost, 5)
    reading(writer).resume_reading()
    await closed(writer)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00" + b"x" * 512, b"\x00" * 4000])
@on_uvloop
async def test_what_is_no_tls_fails_the_handshake(door: Door, garbage: bytes) -> None:
    """It is told so by an alert or by the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(garbage)
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(-1), 5)
    await until(lambda: door.shaken)
    assert isinstance(door.shaken[0], ssl.SSLError)
    assert not door.made
    await closed(writer)


@on_uvloop
async def test_a_peer_that_goes_in_the_handshake_is_told_of(door: Door) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(b"\x16\x03\x01")
    await writer.drain()
    await closed(writer)
    await until(lambda: door.shaken)
    assert isinstance(door.shaken[0], OSError)


@on_uvloop
async def test_a_record_that_was_altered_ends_the_connection(door: Door) -> None:
    """What came before it was heard; nothing behind it is."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = door.client().wrap_bio(incoming, outgoing, server_hostname="localhost")
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            writer.write(outgoing.read())
            incoming.write(await asyncio.wait_for(reader.read(10_000), 5))
    tls.write(b"good")
    good = outgoing.read()
    tls.write(b"evil")
    evil = bytearray(outgoing.read())
    evil[-1] ^= 1
    tls.write(b"late")
    writer.write(good + bytes(evil) + outgoing.read())
    await until(lambda: door.made and door.made[0].lost)
    assert door.made[0].heard == 4
    assert isinstance(door.made[0].lost[0], ssl.SSLError)
    await closed(writer)


@on_uvloop
async def test_reading_can_be_paused(door: Door) -> None:
    """What has come meanwhile is neither lost nor handed over, and the peer is held back."""
    reader, writer, echo = await door.talk()
    assert echo.transport
    echo.transport.pause_reading()
    assert not echo.transport.is_reading()
    writer.write(b"y" * 8_000_000)
    await asyncio.sleep(0.2)
    assert echo.heard == 1
    echo.transport.resume_reading()
    assert await asyncio.wait_for(reader.readexactly(8_000_000), 20) == b"y" * 8_000_000
    await closed(writer)


@on_uvloop
async def test_a_protocol_that_pauses_within_a_read_gets_the_rest_later(door: Door) -> None:
    reader, writer, echo = await door.talk()
    taken = 0
    hear = echo.data_received

    def once(data: bytes) -> None:
        nonlocal taken
        taken += 1
        hear(data)
        assert echo.transport
        echo.transport.pause_reading()
        asyncio.get_running_loop().call_later(0.001, echo.transport.resume_reading)

    echo.data_received = once  # type: ignore[method-assign]
    writer.write(b"z" * 200_000)
    assert await asyncio.wait_for(reader.readexactly(200_000), 20) == b"z" * 200_000
    assert taken > 10
    await closed(writer)


@on_uvloop
async def test_a_peer_that_does_not_read_is_told_of(door: Door) -> None:
    """By pause_writing, and resume_writing once it does."""
    reader, writer, echo = await door.talk()
    assert echo.transport
    reading(writer).pause_reading()
    for _ in range(200):
        echo.transport.write(b"x" * 100_000)
    assert echo.blocked == 1
    assert echo.transport.get_write_buffer_size() > 0
    reading(writer).resume_reading()
    assert len(await asyncio.wait_for(reader.readexactly(20_000_000), 30)) == 20_000_000
    assert echo.blocked == 2
    await closed(writer)


@on_uvloop
async def test_what_a_slow_peer_is_sent_comes_in_order(door: Door) -> None:
    """Small and large, most of it while the peer takes nothing, and a close behind it."""
    reader, writer, echo = await door.talk()
    transport = echo.transport
    assert transport
    reading(writer).pause_reading()
    chance = random.Random(7)
    pieces = [chance.randbytes(chance.choice([1, 50, 700, 16_383, 16_384, 16_385, 40_000])) for _ in range(900)]
    for number, piece in enumerate(pieces):
        transport.write(piece)
        if number % 30 == 0:
            await asyncio.sleep(0)
    assert door.made[0].blocked == 1
    reading(writer).resume_reading()
    sent = b"".join(pieces)
    assert await asyncio.wait_for(reader.readexactly(len(sent)), 10) == sent
    assert door.made[0].blocked == 2
    transport.write(b"the last word")
    transport.close()
    assert await asyncio.wait_for(reader.read(-1), 10) == b"the last word"
    await closed(writer)
    await until(lambda: door.made[0].lost)
    assert door.made[0].lost == [None]


@on_uvloop
async def test_what_is_written_in_one_turn_leaves_as_one_record(door: Door) -> None:
    """The peer is woken once."""
    reader, writer, echo = await door.talk()
    transport = echo.transport
    assert transport
    for _ in range(100):
        transport.write(b"y" * 50)
    assert transport.get_write_buffer_size() == 5000
    assert await asyncio.wait_for(reader.read(16_384), 5) == b"y" * 5000
    await closed(writer)


@on_uvloop
async def test_a_reset_ends_a_connection_that_is_not_read(door: Door) -> None:
    """Though its protocol has paused: else it would stand until somebody looked."""
    _, writer, echo = await door.talk()
    assert echo.transport
    echo.transport.pause_reading()
    sock = writer.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    await until(lambda: echo.lost)
    assert isinstance(echo.lost[0], ConnectionResetError)


@on_uvloop
async def test_who_is_ended_by_another_hears_no_more(door: Door) -> None:
    """Not even what had come in the same turn."""
    _, one, first = await door.talk()
    _, other, second = await door.talk()

    def ending(echo: Echo) -> Callable[[bytes], None]:
        def hear(data: bytes) -> None:
            heard.append(data)
            assert echo.transport
            echo.transport.abort()

        return hear

    heard: list[bytes] = []
    first.data_received = ending(second)  # type: ignore[assignment, method-assign]
    second.data_received = ending(first)  # type: ignore[assignment, method-assign]
    for writer in (one, other):
        writer.write(b"end of the other")
    await until(lambda: first.lost or second.lost)
    await asyncio.sleep(0.05)
    assert heard == [b"end of the other"]
    assert len(first.lost) + len(second.lost) == 1
    for writer in (one, other):
        await closed(writer)


@on_uvloop
async def test_a_fault_of_ours_ends_its_own_connection_alone(door: Door) -> None:
    """Others that were heard of in the same turn are served."""
    (_, bad), (reader, good) = [await door.connect() for _ in range(2)]
    await until(lambda: len(door.made) == 2)
    door.made[0].data_received = lambda _: 1 // 0  # type: ignore[assignment]
    bad.write(b"x")
    good.write(b"hello")
    assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
    await until(lambda: door.made[0].lost)
    assert not door.made[1].lost
    await closed(bad)
    await closed(good)


@on_uvloop
async def test_a_fault_of_ours_while_answers_leave_holds_none_of_the_others_back(door: Door) -> None:
    """What they wrote in the same turn arrives."""
    reader, writer, bad = await door.talk()
    other, second, good = await door.talk()
    assert bad.transport
    assert good.transport
    reading(writer).pause_reading()
    for _ in range(200):
        bad.transport.write(b"x" * 100_000)
    bad.resume_writing = lambda: 1 // 0  # type: ignore[assignment, method-assign]
    reading(writer).resume_reading()
    assert len(await asyncio.wait_for(reader.read(-1), 20)) > 1_000_000
    good.transport.write(b"hello")
    assert await asyncio.wait_for(other.readexactly(5), 5) == b"hello"
    await until(lambda: bad.lost)
    assert not good.lost
    await closed(writer)
    await closed(second)


@on_uvloop
async def test_a_protocol_that_cannot_be_made_ends_its_connection_alone(door: Door) -> None:
    """A fault of ours as well."""
    made = []

    def make() -> asyncio.Protocol:
        made.append(Echo())
        if len(made) == 1:
            raise ValueError("none for the first")
        return made[-1]

    async with secured_port(door.context, make) as (door.port, _):
        first, writer = await door.connect()
        assert await asyncio.wait_for(first.read(-1), 5) == b""
        await closed(writer)
        reader, writer = await door.connect()
        writer.write(b"hello")
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
        await closed(writer)


@on_uvloop
async def test_a_peer_that_has_gone_before_its_handshake_is_told_of(door: Door) -> None:
    """By an OSError, at once or of the handshake."""
    told: list[OSError | None] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        sock, _ = listening.accept()
        sock.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        sockets = Sockets(asyncio.get_running_loop())
        try:
            Secured(door.context, sock, asyncio.Protocol, lambda _, fault: told.append(fault), sockets).shake()
        except OSError as fault:
            told.append(fault)
            sock.close()
        sockets.close()
    assert isinstance(told[0], OSError)


@on_uvloop
async def test_another_protocol_may_take_over(door: Door) -> None:
    """As a WebSocket does."""
    reader, writer, echo = await door.talk()
    transport = echo.transport
    assert transport
    successor = Echo()
    transport.set_protocol(successor)
    successor.connection_made(transport)
    assert transport.get_protocol() is successor
    writer.write(b"for the successor")
    assert await reader.readexactly(17) == b"for the successor"
    assert (door.made[0].heard, successor.heard) == (1, 17)
    assert transport.get_extra_info("peername")[0] == "127.0.0.1"
    assert transport.get_extra_info("cipher")[1] == "TLSv1.3"
    await closed(writer)
    await until(lambda: successor.lost)
    assert not door.made[0].lost
    transport.write(b"too late")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@on_uvloop
async def test_keys_are_renewed_when_the_peer_asks(door: Door) -> None:
    """TLS 1.3's KeyUpdate, by openssl's command K."""
    process = await asyncio.create_subprocess_exec(
        *("openssl", "s_client", "-connect", f"127.0.0.1:{door.port}", "-CAfile", str(door.ca), "-tls1_3"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdin
    for line in (b"one\n", b"K\n", b"two\n", b"k\n", b"three\n"):
        await asyncio.sleep(0.1)
        process.stdin.write(line)
    await until(lambda: door.made and door.made[0].heard == len("one\ntwo\nthree\n"))
    process.stdin.write(b"Q\n")
    output, _ = await asyncio.wait_for(process.communicate(), 10)
    assert b"KEYUPDATE" in output
    assert output.count(b"three") == 1
