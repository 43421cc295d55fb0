"""Where connections are until their TLS handshake is done: in the order that is fair, for so long, and at no more cost than that."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, cast

import pytest
import uvloop

from tests.house import until
from uplinkd.listener import Listener, _Lobby
from uplinkd.places import Known
from uplinkd.settings import Settings
from uplinkd.tls import ensure_material, server_context

HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
P = ParamSpec("P")
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
TLS.check_hostname, TLS.verify_mode = False, ssl.CERT_NONE


class Echo(asyncio.Protocol):
    """Says what it hears."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


@dataclass
class Hall:
    """A door with a clock that the test moves."""

    connections: list[object] = field(default_factory=list)
    known: Known = field(default_factory=Known)
    more: float = 0.0
    missed: list[str] = field(default_factory=list)
    clients: list[object] = field(default_factory=list)  # as a proxy told of them, None of the others

    def make(self, _tls: bool, client: tuple[str, str] | None) -> Echo:
        self.clients.append(client)
        return Echo()

    def clock(self) -> float:
        return time.monotonic() + self.more

    def tick(self) -> None: ...

    def drain(self) -> None: ...


@dataclass
class Lobby:
    hall: Hall
    listener: Listener
    port: int
    sockets: list[socket.socket] = field(default_factory=list)
    tls: bool = True

    def enter(self, host: str, first: bytes = b"") -> socket.socket:
        """A connection from 127.0.0.`host` that says no more than this."""
        sock = socket.create_connection(("127.0.0.1", self.port), source_address=(f"127.0.0.{host}", 0))
        sock.sendall(first)
        sock.setblocking(False)
        self.sockets.append(sock)
        return sock

    async def served(self, host: str, within: float = 10) -> bool:
        """Whether a client from 127.0.0.`host` gets an answer."""
        return await self.goes_on(self.enter(host), within)

    async def goes_on(self, sock: socket.socket, within: float = 10) -> bool:
        """Whether this one does."""
        try:
            async with asyncio.timeout(within):
                tls: dict[str, Any] = {"ssl": TLS, "server_hostname": "localhost"} if self.tls else {}
                reader, writer = await asyncio.open_connection(sock=sock, **tls)
                writer.write(b"x")
                answer = await reader.readexactly(1)
                writer.transport.abort()
                return answer == b"x"
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            return False

    @staticmethod
    def ended(sock: socket.socket) -> bool:
        try:
            return sock.recv(100) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


def as_a_worker_does(act: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run it on the event loop of a worker."""

    @functools.wraps(act)
    def run(*given: P.args, **named: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(act(*given, **named))

    return run


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    return server_context(ensure_material(Settings(data=tmp_path_factory.mktemp("lobby"))))


@contextlib.asynccontextmanager
async def lobby(
    context: ssl.SSLContext | None,
    *,
    handshakes: int = 4,
    waiting: int = 100,
    proxies: Callable[[str], bool] | None = None,
) -> AsyncIterator[Lobby]:
    hall = Hall()
    sock = socket.create_server(("127.0.0.1", 0))
    port = int(sock.getsockname()[1])
    listener = Listener(
        hall,  # type: ignore[arg-type]
        hall.make,
        [(sock, context)],
        handshakes=handshakes,
        waiting=waiting,
        missed=hall.missed.append,
        proxies=proxies,
    )
    await listener.start()
    running = asyncio.create_task(listener.run())
    found = Lobby(hall, listener, port, tls=context is not None)
    try:
        yield found
    finally:
        running.cancel()
        for each in found.sockets:
            each.close()
        await listener.drain(within=0)
        await asyncio.sleep(0.05)


@as_a_worker_does
async def test_silence_ends_after_ten_seconds_and_so_does_half_a_hello(context: ssl.SSLContext) -> None:
    """Counted from the beginning, and counted as a handshake that failed."""
    async with lobby(context) as here:
        silent, half = here.enter("2"), here.enter("2", HELLO)
        await asyncio.sleep(0.1)
        here.hall.more = 9.0
        await asyncio.sleep(0.4)
        assert not here.ended(silent)
        assert not here.ended(half)
        here.hall.more = 10.1
        await until(lambda: here.ended(silent) and here.ended(half))
        assert here.hall.missed == ["timeout_or_closed"] * 2
        assert await here.served("2")


@as_a_worker_does
async def test_a_peer_that_goes_is_let_go(context: ssl.SSLContext) -> None:
    """At once, not after ten seconds."""
    async with lobby(context) as here:
        here.enter("2").close()
        await until(lambda: here.hall.missed)
        (room,) = here.listener._servers
        assert not room._guests  # type: ignore[union-attr]


@as_a_worker_does
async def test_a_known_network_has_handshakes_of_its_own(context: ssl.SSLContext) -> None:
    """Strangers hold all of theirs and do not go on; it is served at once."""
    async with lobby(context) as here:
        for number in range(20):
            here.enter(str(number + 10), HELLO)
        await asyncio.sleep(0.1)
        here.hall.known.add("127.0.0.2")
        begin = time.monotonic()
        assert await here.served("2")
        assert time.monotonic() - begin < 5


@as_a_worker_does
async def test_a_handshake_that_does_not_go_on_yields_to_another(context: ssl.SSLContext) -> None:
    """After a second, of the greediest network first; in between nobody else is hurt."""
    async with lobby(context) as here:
        greedy = [here.enter("3", HELLO) for _ in range(10)]
        served = asyncio.create_task(here.served("2"))
        await asyncio.sleep(0.1)
        assert not served.done()
        here.hall.more = 1.5
        assert await served
        assert sum(map(here.ended, greedy)) < 5


@as_a_worker_does
async def test_a_full_lobby_takes_in_a_newcomer(context: ssl.SSLContext) -> None:
    """The greediest network's oldest goes."""
    async with lobby(context, waiting=20) as here:
        greedy = [here.enter("3") for _ in range(20)]
        await asyncio.sleep(0.1)
        more = here.enter("3")
        assert await here.served("2")
        await until(lambda: here.ended(more))
        assert [here.ended(sock) for sock in greedy] == [True] + [False] * 19


@as_a_worker_does
async def test_no_more_files_are_no_end(context: ssl.SSLContext, caplog: pytest.LogCaptureFixture) -> None:
    """Connections before their handshake yield one, and the log says what to do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with lobby(context) as here:
        ours = [here.enter("3") for _ in range(60)]
        await asyncio.sleep(0.2)
        sock = here.enter("2")
        with socket.socket() as probe:
            free = probe.fileno()
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            assert await here.goes_on(sock)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert any(here.ended(sock) for sock in ours)
        assert "raise the limit of open files" in caplog.text


@as_a_worker_does
async def test_a_stop_ends_whoever_waits(context: ssl.SSLContext) -> None:
    """Nothing is left behind."""
    async with lobby(context) as here:
        waiting = [here.enter("3"), here.enter("3", HELLO)]
        await asyncio.sleep(0.1)
    assert here.hall.missed
    assert all(sock.fileno() == -1 for sock in waiting)


@as_a_worker_does
async def test_a_port_that_rests_is_stopped_as_any_other(context: ssl.SSLContext) -> None:
    """The clock goes on once it is closed, and it does not begin anew."""
    async with lobby(context) as here:
        (port,) = here.listener._servers
        assert isinstance(port, _Lobby)
        port._loop.remove_reader(port._sock.fileno())
        port._rests = True
        port.close()
        port.tick()
        here.listener._servers.clear()
        port.end()


def test_a_worker_says_how_many_handshakes(tmp_path: Path) -> None:
    """The setting is there, and at least one."""
    assert Settings(data=tmp_path).max_handshakes == 256
    with pytest.raises(ValueError, match="max_handshakes"):
        Settings(data=tmp_path, max_handshakes=0)
