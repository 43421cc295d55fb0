"""Who stands behind a proxy, by the PROXY protocol: believed of the proxies that are named, and of nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.abuse.test_lobby import HELLO, TLS, Lobby, as_a_worker_does, context, lobby
from tests.clients.stranger import ask_https, ask_mqtt
from tests.core.test_proxy_protocol import SIGNATURE, v2
from tests.house import Server, cli_json, make_devices, serving, until
from tests.ports import free_port
from uplinkd.core.proxy_protocol import trusting

__all__ = ["context"]

PATH = os.environ["PATH"] + ":/usr/sbin"
STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
PROXY = "9"  # 127.0.0.9
LOCAL = SIGNATURE + b"\x20\x00\x00\x00"
ports = pytest.mark.parametrize("tls", [True, False], ids=["TLS", "plain text"])


@contextlib.asynccontextmanager
async def behind(context: ssl.SSLContext | None, **more: Any) -> AsyncIterator[Lobby]:
    """A lobby that hears the proxy at 127.0.0.9."""
    async with lobby(context, proxies=trusting(["127.0.0.9"]), **more) as here:
        yield here


def by_v1(source: str) -> bytes:
    return f"PROXY TCP{6 if ':' in source else 4} {source} {source} 1000 443\r\n".encode()


@ports
@pytest.mark.parametrize("write", [by_v1, v2], ids=["v1", "v2"])
def test_a_named_proxy_is_believed(context: ssl.SSLContext, write: Any, tls: bool) -> None:
    """What it tells is whose the connection is: of IPv6 the /64 is the network, and ::ffff:… is IPv4."""

    @as_a_worker_does
    async def run() -> None:
        async with behind(context if tls else None) as here:
            for source in ("192.0.2.7", "2001:db8::1:2:3", "::ffff:192.0.2.8"):
                assert await here.goes_on(here.enter(PROXY, write(source)))
            assert here.hall.clients == [
                ("192.0.2.7", "192.0.2.7"),
                ("2001:db8::1:2:3", "2001:db8::"),
                ("192.0.2.8", "192.0.2.8"),
            ]
            assert here.hall.missed == []

    run()


@ports
def test_a_header_may_come_in_pieces(context: ssl.SSLContext, tls: bool) -> None:
    """Also one with more in it than is of interest; nothing waits for it in a circle."""

    @as_a_worker_does
    async def run() -> None:
        async with behind(context if tls else None) as here:
            long = v2("192.0.2.7", more=bytes(30_000))
            for pieces in (
                [bytes([byte]) for byte in by_v1("192.0.2.7")],
                [bytes([byte]) for byte in v2("192.0.2.7")],
                [long[:5000], long[5000:25_000], long[25_000:]],
            ):
                sock = here.enter(PROXY)
                for piece in pieces:
                    await asyncio.sleep(0.005)
                    used = time.process_time()
                    await asyncio.get_running_loop().sock_sendall(sock, piece)
                await asyncio.sleep(0.1)
                assert time.process_time() - used < 0.08
                assert await here.goes_on(sock)
            assert here.hall.clients == [("192.0.2.7", "192.0.2.7")] * 3

    run()


@as_a_worker_does
async def test_tls_begins_with_the_byte_behind_it(context: ssl.SSLContext) -> None:
    """Header and hello come in one piece, as a proxy sends them, and in pieces that meet anywhere."""
    async with behind(context) as here:
        header = v2("192.0.2.7", more=b"\x04\x00\x01\x00")
        for cut in (0, 1, 16, len(header) - 1, len(header), len(header) + 1, len(header) + 100):
            assert await asyncio.to_thread(_hello_in_two_pieces, here.port, header, cut) == b"x"
        assert here.hall.clients == [("192.0.2.7", "192.0.2.7")] * 7


def _hello_in_two_pieces(port: int, header: bytes, cut: int) -> bytes:
    """What is echoed of an x, where header and hello together come in two pieces."""
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = TLS.wrap_bio(into, out, server_hostname="localhost")
    with socket.create_connection(("127.0.0.1", port), 10, source_address=("127.0.0.9", 0)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        first = header + out.read()
        sock.sendall(first[:cut])
        time.sleep(0.02)
        sock.sendall(first[cut:])
        _go_on(tls.do_handshake, sock, into, out)
        tls.write(b"x")
        return bytes(_go_on(lambda: tls.read(1), sock, into, out))


def _go_on(step: Callable[[], Any], sock: socket.socket, into: ssl.MemoryBIO, out: ssl.MemoryBIO) -> Any:
    while True:
        try:
            return step()
        except ssl.SSLWantReadError:
            sock.sendall(out.read())
            said = sock.recv(4096)
            assert said, "the door has closed"
            into.write(said)


@ports
def test_a_named_proxy_that_sends_none_is_closed(
    context: ssl.SSLContext, caplog: pytest.LogCaptureFixture, tls: bool
) -> None:
    """At once, with one line that says what to do, however many there are."""

    @as_a_worker_does
    async def run() -> None:
        async with behind(context if tls else None) as here:
            wrong = [
                here.enter(PROXY, first) for first in (HELLO, b"POST /auth", b"PROXY TCP4 nobody\r\n", b"\r\n\r\n!")
            ]
            await until(lambda: all(map(here.ended, wrong)))
            assert here.hall.clients == []
            assert here.hall.missed == ["proxy_header"] * len(wrong) * tls
            assert not here.listener._servers[0]._guests  # type: ignore[union-attr]
            assert await here.goes_on(here.enter(PROXY, v2("192.0.2.7")))

    run()
    (line,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "127.0.0.9" in line
    assert "send-proxy-v2" in line


@ports
def test_nobody_else_is_believed(context: ssl.SSLContext, caplog: pytest.LogCaptureFixture, tls: bool) -> None:
    """Their header is what they begin to say, and that is no TLS; who sends none is served as ever."""

    @as_a_worker_does
    async def run() -> None:
        async with behind(context if tls else None) as here:
            assert await here.served("2")
            for header in (by_v1("192.0.2.7"), v2("192.0.2.7"), v2("127.0.0.9")):
                sock = here.enter("2", header)
                if tls:
                    assert not await here.goes_on(sock)
                else:
                    answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1000), 10)
                    assert answer == header
            assert set(here.hall.clients) == {("127.0.0.2", "127.0.0.2") if tls else None}

    run()
    assert "name it in the setting proxy_protocol" in caplog.text
    assert caplog.text.count("127.0.0.2") == 1


@ports
def test_a_proxy_that_looks_whether_the_port_is_open_leaves_no_trace(
    context: ssl.SSLContext, caplog: pytest.LogCaptureFixture, tls: bool
) -> None:
    """With LOCAL or UNKNOWN, without a word, politely or with a reset: no device, no failure, no line."""

    @as_a_worker_does
    async def run() -> None:
        async with behind(context if tls else None) as here:
            for first in (b"", LOCAL, b"PROXY UNKNOWN\r\n", by_v1("127.0.0.9"), SIGNATURE):
                for reset in (False, True):
                    for patience in (0, 0.03):
                        sock = here.enter(PROXY, first)
                        await asyncio.sleep(patience)
                        if reset:
                            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        sock.close()
            await asyncio.sleep(0.1)
            assert not here.listener._servers[0]._guests  # type: ignore[union-attr]
            assert here.hall.clients == here.hall.missed == []
            assert await here.goes_on(here.enter(PROXY, LOCAL))
            assert here.hall.clients == [("127.0.0.9", "127.0.0.9") if tls else None]  # the proxy itself

    run()
    assert not caplog.records


@ports
def test_a_header_has_ten_seconds(context: ssl.SSLContext, tls: bool) -> None:
    """Like everything before the handshake, and together with it."""

    @as_a_worker_does
    async def run() -> None:
        async with behind(context if tls else None) as here:
            late = [here.enter(PROXY, first) for first in (b"", b"PROXY TCP4", v2("192.0.2.7")[:20], v2("192.0.2.7"))]
            await asyncio.sleep(0.1)
            here.hall.more = 9.0
            await asyncio.sleep(0.4)
            assert not any(map(here.ended, late))
            here.hall.more = 10.1
            await until(lambda: all(map(here.ended, late)))
            assert here.hall.missed == ["timeout_or_closed"] * tls  # of the one that a device's address is known of

    run()


@as_a_worker_does
async def test_places_are_given_by_the_told_address(context: ssl.SSLContext) -> None:
    """The greediest device's oldest goes; the proxy itself is nobody, however many it brings."""
    async with behind(context, waiting=20) as here:
        fair = [here.enter(PROXY, v2(f"192.0.2.{number}")) for number in range(10, 15)]
        greedy = [here.enter(PROXY, v2("192.0.2.1")) for _ in range(15)]
        await asyncio.sleep(0.1)
        assert await here.goes_on(here.enter(PROXY, v2("192.0.2.2")))
        assert not any(map(here.ended, fair))
        assert [here.ended(sock) for sock in greedy] == [True] + [False] * 14


@as_a_worker_does
async def test_handshakes_are_given_by_the_told_address(context: ssl.SSLContext) -> None:
    """A known device behind the proxy does not wait for its strangers."""
    async with behind(context) as here:
        for number in range(20):
            here.enter(PROXY, v2(f"192.0.2.{number + 10}") + HELLO)
        await asyncio.sleep(0.1)
        here.hall.known.add("192.0.2.1")
        begin = time.monotonic()
        assert await here.goes_on(here.enter(PROXY, v2("192.0.2.1")))
        assert time.monotonic() - begin < 5


@as_a_worker_does
async def test_without_the_setting_nothing_waits_at_a_plain_text_port(context: ssl.SSLContext) -> None:
    """It is the event loop's own, and nobody is believed anywhere."""
    async with lobby(None) as here:
        assert "Lobby" not in type(here.listener._servers[0]).__name__
        assert await here.served("9")
    async with lobby(context) as here:
        assert not await here.goes_on(here.enter("9", v2("192.0.2.7")))


# real proxies


def haproxy(folder: Path, fronts: dict[int, int], version: int) -> list[str]:
    send = {1: "send-proxy", 2: "send-proxy-v2"}[version]
    lines = ["defaults", " mode tcp", " timeout connect 2s", " timeout client 60s", " timeout server 60s"]
    for front, back in fronts.items():
        lines += [f"listen p{front}", f" bind 127.0.0.1:{front}", f" bind [::1]:{front}", " source 127.0.0.9"]
        lines += [f" server s 127.0.0.1:{back} {send} check inter 20ms"]
    file = folder / "haproxy.cfg"
    file.write_text("\n".join(lines) + "\n")
    return ["haproxy", "-db", "-q", "-f", str(file)]


def nginx(folder: Path, fronts: dict[int, int], _version: int) -> list[str]:
    servers = "".join(
        f"server {{ listen 127.0.0.1:{front}; listen [::1]:{front}; proxy_pass 127.0.0.1:{back};"
        " proxy_bind 127.0.0.9; proxy_protocol on; }\n"
        for front, back in fronts.items()
    )
    user = "user root;" if os.geteuid() == 0 else ""
    file = folder / "nginx.conf"
    file.write_text(
        f"load_module {STREAM}; {user} daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;\n"
        f"events {{ }}\nstream {{\n{servers}}}\n"
    )
    return ["nginx", "-e", str(folder / "nginx.log"), "-c", str(file)]


@contextlib.contextmanager
def proxied(name: str, version: int, folder: Path, backs: list[int]) -> Iterator[list[int]]:
    """Ports of a proxy before these; HAProxy also looks fifty times a second whether they are open."""
    if not shutil.which(name, path=PATH):
        pytest.skip(f"{name} is not installed")
    if name == "nginx" and not STREAM.exists():
        pytest.skip("nginx' stream module is not installed")
    fronts = [free_port() for _ in backs]
    command = {"nginx": nginx, "haproxy": haproxy}[name](folder, dict(zip(fronts, backs, strict=True)), version)
    process = subprocess.Popen(command, env={**os.environ, "PATH": PATH}, cwd=folder)
    try:
        end = time.monotonic() + 10
        for front in fronts:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", front)):
                    break
                assert process.poll() is None, f"{name} ended"
                assert time.monotonic() < end
                time.sleep(0.02)
        yield fronts
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that hears the proxy at 127.0.0.9 at each of its doors."""
    plain = free_port()
    options = ["--proxy-protocol", "127.0.0.9", "--plain-listen", f"127.0.0.1:{plain}", "--forwarded-for", "true"]
    with serving(tmp_path_factory.mktemp("told") / "data", "--workers", "1", *options) as server:
        server.plain_port = plain  # type: ignore[attr-defined]
        yield server


def logged(server: Server, enough: Callable[[list[dict[str, Any]]], bool], *options: str) -> list[dict[str, Any]]:
    """What `uplinkd logs` shows, once that is enough: it is written a moment later."""
    end = time.monotonic() + 10
    while True:
        found: list[dict[str, Any]] = cli_json("logs", *options, data=server.data)
        if enough(found):
            return found
        assert time.monotonic() < end, found
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "version"), [("haproxy", 1), ("haproxy", 2), ("nginx", 1)])
def test_real_proxies_are_understood_at_each_door(told: Server, tmp_path: Path, name: str, version: int) -> None:
    """Each client is in the log with its own address, of IPv4 or IPv6, and nothing else is in it."""
    product = f"{name}{version}"
    backs = [told.port, told.plain_port, told.mqtt_port, told.mqtt_plain_port]  # type: ignore[attr-defined]
    sources = ["127.0.0.11", "127.0.0.12", "::1"]
    with proxied(name, version, tmp_path, backs) as (https, http, mqtts, mqtt):
        for source in sources:
            for ask, port, context in (
                (ask_https, https, told.context()),
                (ask_https, http, None),
                (ask_mqtt, mqtts, told.context()),
                (ask_mqtt, mqtt, None),
            ):
                assert ask(port, product, source, context), (ask, source)
    found = logged(told, lambda found: len(found) >= 12, "--product", product)
    assert sorted((each["address"], each["endpoint"]) for each in found) == sorted(
        (source, endpoint) for source in sources for endpoint in ("auth", "auth", "mqtt", "mqtt")
    )
    assert "PROXY header" not in told.log.read_text()


async def test_a_device_behind_a_proxy_is_shown_with_its_address(told: Server, tmp_path: Path) -> None:
    """And goes on over its connection as ever."""
    device = make_devices(told, 1)[0]
    with proxied("haproxy", 2, tmp_path, [told.port]) as (front,):
        told.port, back = front, told.port
        try:
            assert await device.login() == 0
            assert [(await device.publish(b"x"))[0] for _ in range(3)] == [0, 0, 0]
        finally:
            await device.close()
            told.port = back
    await until(
        lambda: cli_json("device", "show", device.product, device.name, data=told.data)["clientIp"] == "127.0.0.1"
    )


def test_what_a_device_itself_claims_is_not_heard(told: Server) -> None:
    """Where the proxy has told whose the connection is, X-Forwarded-For is the device's word, and forwarded_for not meant for it."""
    ask = b"POST /auth HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 203.0.113.9\r\nContent-Length: 2\r\n\r\n{}"
    with socket.create_connection(
        ("127.0.0.1", told.plain_port),  # type: ignore[attr-defined]
        10,
        source_address=("127.0.0.9", 0),
    ) as sock:
        sock.sendall(v2("192.0.2.77") + ask)
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    found = logged(told, lambda found: any(each["address"] == "192.0.2.77" for each in found))
    assert not [each for each in found if each["address"] == "203.0.113.9"]


@pytest.mark.slow
@as_a_worker_does
async def test_the_checks_of_haproxy_are_counted_nowhere(context: ssl.SSLContext, tmp_path: Path) -> None:
    """Dozens of them, of both versions; the port counts as open."""
    for version in (1, 2):
        seen: list[str] = []

        def trusts(address: str, seen: list[str] = seen) -> bool:
            seen.append(address)
            return address == "127.0.0.9"

        async with lobby(context, proxies=trusts) as here, contextlib.AsyncExitStack() as stack:
            proxy = proxied("haproxy", version, tmp_path, [here.port])
            (front,) = await asyncio.to_thread(stack.enter_context, proxy)
            await until(lambda seen=seen: len(seen) > 30)  # type: ignore[misc]
            here.hall.clients.clear()
            here.hall.missed.clear()
            await until(lambda seen=seen: len(seen) > 60)  # type: ignore[misc]
            assert here.hall.clients == here.hall.missed == []
            sock = socket.create_connection(("127.0.0.1", front), source_address=("127.0.0.12", 0))
            sock.setblocking(False)
            assert await here.goes_on(sock)
            assert here.hall.clients == [("127.0.0.12", "127.0.0.12")]
