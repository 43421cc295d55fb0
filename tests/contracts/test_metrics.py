"""What is counted of the world outside: TLS handshakes of real clients on uvloop, the engine's acknowledgements."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import pytest
import uvloop

from tests.doors import secured_port
from tests.house import freeze, until
from uplinkd.engine.embedded import EmbeddedServer
from uplinkd.engine.jetstream import JetStreamPublisher
from uplinkd.metrics import Metrics, Reading
from uplinkd.secured import Secured
from uplinkd.settings import Settings
from uplinkd.tls import count_handshake, ensure_material, server_context, why_failed


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics(1)
    yield made
    made.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path, nats_listen="")


Act = Callable[[int, Path], Coroutine[None, None, None]]


def shaking_hands(settings: Settings, metrics: Metrics, act: Act, *, patience: float = 5) -> Reading:
    """A door of ours on uvloop, to which `act(port, CA file)` connects; what was counted."""

    async def run() -> None:
        context = server_context(ensure_material(settings))
        meter = metrics.meter(0)

        def shaken(secured: Secured, fault: OSError | None) -> None:
            if fault:
                meter.handshake_failed(why_failed(fault))
            else:
                count_handshake(meter, secured)

        async with secured_port(context, asyncio.Protocol, shaken, patience) as (port, _):
            await act(port, settings.data / "tls" / "ca.pem")
            await until(lambda: counted(metrics.read()))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    return metrics.read()


def counted(reading: Reading) -> dict[object, int]:
    """The handshakes that there were, completed or not."""
    every = [*reading.handshakes.items(), *reading.handshake_failures.items()]
    return {kind: n for kind, n in every if n}


async def s_client(port: int, *arguments: str) -> None:
    """openssl's client, which says nothing and goes."""
    process = await asyncio.create_subprocess_exec(
        "openssl",
        "s_client",
        "-connect",
        f"127.0.0.1:{port}",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await asyncio.wait_for(process.wait(), 10)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["-tls1_3"], ("TLSv1.3", "ecdhe")),
        (["-tls1_2"], ("TLSv1.2", "ecdhe")),
        (["-tls1_2", "-cipher", "AES128-SHA"], ("TLSv1.2", "rsa")),
        (["-tls1_2", "-cipher", "AES256-SHA256"], ("TLSv1.2", "rsa")),
        (["-tls1_2", "-cipher", "ECDHE-RSA-AES128-SHA"], "no_shared_cipher"),
        (["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], "unsupported_version"),
        (["-tls1_3", "-verify_return_error", "-no-CAfile", "-no-CApath"], "unknown_ca"),
        (["-tls1_2", "-verify_return_error", "-no-CAfile", "-no-CApath"], "unknown_ca"),
    ],
)
def test_a_handshake_is_counted_by_how_it_ended(
    settings: Settings, metrics: Metrics, arguments: list[str], kind: object
) -> None:
    """The operator sees old firmware by its static RSA, and why devices do not come in."""

    async def act(port: int, _authority: Path) -> None:
        await s_client(port, *arguments)

    assert counted(shaking_hands(settings, metrics, act)) == {kind: 1}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"POST /auth HTTP/1.1\r\nHost: h\r\n\r\n", "http_request"),
        (bytes.fromhex("101000044d5154540402003c000473656c66"), "not_tls"),
        (b"", "timeout_or_closed"),
    ],
)
def test_what_is_no_tls_is_counted(settings: Settings, metrics: Metrics, data: bytes, reason: str) -> None:
    """Plain HTTP or plain MQTT at a TLS port is a common mistake; a peer that closes at once, a port scan."""

    async def act(port: int, _authority: Path) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        await asyncio.sleep(0.05)
        writer.close()

    assert counted(shaking_hands(settings, metrics, act)) == {reason: 1}


def test_a_peer_that_says_nothing_is_counted(settings: Settings, metrics: Metrics) -> None:
    """Once the time for a handshake is over."""
    held = []

    async def act(port: int, _authority: Path) -> None:
        held.append(socket.create_connection(("127.0.0.1", port)))

    assert counted(shaking_hands(settings, metrics, act, patience=0.2)) == {"timeout_or_closed": 1}
    held[0].close()


def test_a_connection_is_counted_once(settings: Settings, metrics: Metrics) -> None:
    """Its end is not a failed handshake."""

    async def act(port: int, authority: Path) -> None:
        context = ssl.create_default_context(cafile=str(authority))
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
            writer.close()
        await until(lambda: sum(metrics.read().handshakes.values()) == 3)
        await asyncio.sleep(0.1)

    assert counted(shaking_hands(settings, metrics, act)) == {("TLSv1.3", "ecdhe"): 3}


async def test_the_engines_answers_are_counted(settings: Settings, metrics: Metrics) -> None:
    """Stored, not stored, how long it took, and what waits while it is silent."""
    server = EmbeddedServer.start(settings)
    meter = metrics.meter(0)
    publisher = JetStreamPublisher(settings, server.access, meter)
    answers: list[str] = []
    try:
        await publisher.start()
        await until(lambda: publisher.connected)
        for _ in range(10):
            publisher.publish(b"/.pk.d.user.update", b"x" * 50, lambda _, reason: answers.append(reason))
        await until(lambda: len(answers) == 10)
        meter.flush()
        reading = metrics.read()
        assert (reading.stored, reading.not_stored, reading.bytes_in) == (10, 0, 500)
        assert reading.engine_latency.count == 10
        assert 0 < reading.engine_latency.sum < 10

        freeze(server.pid)
        publisher.publish(b"/.pk.d.user.update", b"frozen", lambda _, reason: answers.append(reason))
        await until(lambda: metrics.read().engine_lag > 0.3)
        assert metrics.read().engine_waiting == 1
        await until(lambda: len(answers) == 11)
        await until(lambda: metrics.read().engine_waiting == 0)
        reading = metrics.read()
        assert (reading.stored, reading.not_stored, reading.engine_lag) == (10, 1, 0.0)
    finally:
        os.kill(server.pid, signal.SIGCONT)
        await publisher.stop()
        server.stop()
