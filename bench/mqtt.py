"""The MQTT door, with clients on the core that the server does not have: connects, idle sessions, reports, how soon a subscriber
hears, and what all that costs the HTTPS door beside it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import http.client
import json
import os
import ssl
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from bench.load import LOAD_CORE, in_turn
from bench.peers import PRODUCT, SECRET, Peer, context, cpu_seconds, free_port, login, pss, uplinkd

__all__ = ["Client", "connect", "device", "measure", "on_the_load_core"]

T = TypeVar("T")

Login = tuple[str, str, str]
"""clientId, user name, password."""

_KEEP_ALIVE = 1200


def device(name: str) -> Login:
    """How a device of the benchmark's product signs in."""
    content = f"clientIdbenchdeviceName{name}productKey{PRODUCT}"
    sign = hmac.digest(SECRET.encode(), content.encode(), "sha1").hex()
    return "bench|securemode=2,signmethod=hmacsha1|", f"{name}&{PRODUCT}", sign


class Client(asyncio.Protocol):
    """As little of MQTT as it takes; `heard` is called with each message that arrives."""

    def __init__(self, login: Login, heard: Callable[[bytes], None] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._login = login
        self._heard = heard
        self._buffer = b""
        self._transport: Any = None
        self.connected: asyncio.Future[None] = loop.create_future()
        self.answered: asyncio.Future[None] = loop.create_future()
        self.acknowledged = 0
        self.after_ack: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        client_id, username, password = (struct.pack(">H", len(each)) + each.encode() for each in self._login)
        body = b"\x00\x04MQTT\x04\xc2" + struct.pack(">H", _KEEP_ALIVE) + client_id + username + password
        self._transport.write(b"\x10" + _remaining(len(body)) + body)

    def connection_lost(self, exc: Exception | None) -> None:
        for future in (self.connected, self.answered):
            if not future.done():
                future.set_exception(exc or ConnectionError("the server has closed the connection"))
                future.exception()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data
        while len(buffer) >= 2:
            length = buffer[1] & 0x7F
            start = 2
            if buffer[1] & 0x80:
                if len(buffer) < 3:
                    break
                length |= buffer[2] << 7
                start = 3
            if len(buffer) < start + length:
                break
            kind, body, buffer = buffer[0] & 0xF0, buffer[start : start + length], buffer[start + length :]
            self._take(kind, body)
        self._buffer = buffer

    def _take(self, kind: int, body: bytes) -> None:
        if kind == 0x40:
            self.acknowledged += 1
            if self.after_ack:
                self.after_ack()
        elif kind == 0x30 and self._heard:
            self._heard(body[2 + struct.unpack_from(">H", body)[0] :])
        elif kind == 0x20:
            if body[1]:
                self.connected.set_exception(ConnectionError(f"CONNACK {body[1]}"))
            else:
                self.connected.set_result(None)
        elif kind == 0x90:
            self.answered.set_result(None)

    def publish(self, topic: bytes, payload: bytes, packet_id: int) -> None:
        """At QoS 1."""
        body = struct.pack(">H", len(topic)) + topic + struct.pack(">H", packet_id) + payload
        self._transport.write(b"\x32" + _remaining(len(body)) + body)

    async def subscribe(self, topic_filter: bytes) -> None:
        """At QoS 0."""
        body = b"\x00\x01" + struct.pack(">H", len(topic_filter)) + topic_filter + b"\x00"
        self._transport.write(b"\x82" + _remaining(len(body)) + body)
        await self.answered

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()


def _remaining(length: int) -> bytes:
    encoded = bytearray()
    while length >= 0x80:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*encoded, length])


async def connect(
    port: int, context: ssl.SSLContext | None, login: Login, heard: Callable[[bytes], None] | None = None
) -> Client:
    """A client that is signed in."""
    loop = asyncio.get_running_loop()
    client = Client(login, heard)
    name = "localhost" if context else None
    await loop.create_connection(lambda: client, "127.0.0.1", port, ssl=context, server_hostname=name)
    await client.connected
    return client


async def _all(acts: Iterator[Awaitable[Any]], at_once: int) -> list[Any]:
    """Every act, `at_once` of them at a time."""
    results: list[Any] = []

    async def work() -> None:
        for act in acts:
            results.append(await act)

    await asyncio.gather(*(work() for _ in range(at_once)))
    return results


async def connect_load(
    peer: Peer, port: int, context: ssl.SSLContext | None, names: list[str], *, at_once: int = 64
) -> dict[str, float]:
    """Connect each device once, anew: how many a second, and the server's CPU for one."""
    logins = [device(name) for name in names]
    cpu, began = cpu_seconds(*peer.roots), time.perf_counter()
    clients: list[Client] = await _all((connect(port, context, login) for login in logins), at_once)
    seconds = time.perf_counter() - began
    used = cpu_seconds(*peer.roots) - cpu
    for client in clients:
        client.abort()
    await asyncio.sleep(0.5)
    return {"rate": len(names) / seconds, "cpu_micros": used / len(names) * 1e6}


async def idle_sessions(peer: Peer, port: int, context: ssl.SSLContext | None, names: list[str]) -> dict[str, float]:
    """Bytes that one idle session costs, of as many as there are `names`."""
    before = pss(*peer.roots)
    clients: list[Client] = await _all((connect(port, context, device(name)) for name in names), 64)
    await asyncio.sleep(2)
    cost = (pss(*peer.roots) - before) / len(names)
    for client in clients:
        client.abort()
    await asyncio.sleep(1)
    return {"bytes": cost}


async def report_load(
    peer: Peer,
    port: int,
    context: ssl.SSLContext | None,
    names: list[str],
    *,
    seconds: float,
    window: int,
    payload: int,
) -> dict[str, float]:
    """Reports at QoS 1, `window` of each device under way at a time."""
    clients = [await connect(port, context, device(name)) for name in names]
    body = b"x" * payload
    end = time.perf_counter() + seconds

    def feed(client: Client, topic: bytes) -> Callable[[], None]:
        number = 0

        def send() -> None:
            nonlocal number
            if time.perf_counter() < end:
                number = number % 0xFFFF + 1
                client.publish(topic, body, number)

        return send

    cpu, began = cpu_seconds(*peer.roots), time.perf_counter()
    for client, name in zip(clients, names, strict=True):
        client.after_ack = feed(client, f"/{PRODUCT}/{name}/user/update".encode())
        for _ in range(window):
            client.after_ack()
    await asyncio.sleep(seconds)
    count = sum(client.acknowledged for client in clients)
    used, took = cpu_seconds(*peer.roots) - cpu, time.perf_counter() - began
    await asyncio.sleep(0.2)
    for client in clients:
        client.abort()
    return {"rate": count / took, "cpu_micros": used / max(count, 1) * 1e6}


async def hear_load(peer: Peer, port: int, tls: ssl.SSLContext, app: Login, *, count: int) -> dict[str, float]:
    """How long after a device began to report over HTTPS a subscriber has heard it, in ms; and how long its answer took."""
    heard: dict[bytes, float] = {}
    began: dict[bytes, float] = {}
    answered: dict[bytes, float] = {}

    def hear(payload: bytes) -> None:
        heard.setdefault(payload, time.perf_counter())

    client = await connect(port, tls, app, hear)
    await client.subscribe(f"/{PRODUCT}/#".encode())
    await asyncio.sleep(0.5)

    def report() -> None:
        head = {"Content-Type": "application/octet-stream", "password": login(peer, "device0000")}
        with contextlib.closing(http.client.HTTPSConnection("localhost", peer.port, context=context(peer.ca))) as door:
            for number in range(count + 20):
                payload = b"%d" % (number - 20)  # the first ones warm up
                began[payload] = time.perf_counter()
                door.request("POST", f"/topic/{PRODUCT}/device0000/user/update", payload, head)
                door.getresponse().read()
                answered[payload] = time.perf_counter()
                time.sleep(0.003)

    await asyncio.to_thread(report)
    await asyncio.sleep(0.5)
    client.abort()
    wanted = [b"%d" % number for number in range(count)]
    if missing := [each for each in wanted if each not in heard]:
        raise SystemExit(f"the subscriber has not heard {len(missing)} of {count} messages")
    waits = sorted((heard[each] - began[each]) * 1000 for each in wanted)
    answers = sorted((answered[each] - began[each]) * 1000 for each in wanted)
    return {
        "p50": statistics.median(waits),
        "p99": waits[int(count * 0.99) - 1],
        "answer_p50": statistics.median(answers),
        "answer_p99": answers[int(count * 0.99) - 1],
    }


def measure(folder: Path, without: Peer, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything of the MQTT door; `without` is the same server with that door closed."""
    tls_port, plain_port = free_port(), free_port()
    names = [f"device{number:04}" for number in range(options.sessions)]
    doors = ["--mqtt-listen", f"127.0.0.1:{tls_port}", "--mqtt-plain-listen", f"127.0.0.1:{plain_port}"]
    figures: dict[str, Any] = {}
    with uplinkd(folder, options.sessions, *doors) as peer, on_the_load_core():
        tls = context(peer.ca)

        def act(what: str, doing: Callable[[], Coroutine[Any, Any, Any]]) -> None:
            say(f"MQTT: {what} …")
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                figures[what] = runner.run(asyncio.wait_for(doing(), 300))

        some = names[:2000]
        act("first connects", lambda: connect_load(peer, plain_port, None, names))
        act("idle, TLS", lambda: idle_sessions(peer, tls_port, tls, names))
        act("connects, TLS", lambda: _median(lambda: connect_load(peer, tls_port, tls, some), options.rounds))
        act("connects, plain", lambda: _median(lambda: connect_load(peer, plain_port, None, some), options.rounds))
        for window in (1, 8):
            act(
                f"reports, {window} under way",
                lambda window=window: report_load(  # type: ignore[misc]  # mypy takes no default of a lambda
                    peer,
                    tls_port,
                    tls,
                    names[: options.connections],
                    seconds=options.seconds,
                    window=window,
                    payload=200,
                ),
            )
        act("heard", lambda: hear_load(peer, tls_port, tls, _app(folder), count=2000))
        figures["beside"] = _beside(folder, without, peer, tls_port, names[:1000], options, say)
    with uplinkd(folder / "plain", options.sessions, *doors) as peer, on_the_load_core():
        act("idle, plain", lambda: idle_sessions(peer, plain_port, None, names))
    return {"mqtt": figures}


async def _median(act: Callable[[], Awaitable[dict[str, float]]], rounds: int) -> dict[str, float]:
    """The median round by rate."""
    found = sorted([await act() for _ in range(rounds)], key=lambda each: each["rate"])
    return found[len(found) // 2]


def _beside(
    folder: Path,
    without: Peer,
    peer: Peer,
    port: int,
    names: list[str],
    options: argparse.Namespace,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Reports over HTTPS, in turn without the MQTT door and with it and as many idle sessions as `names`."""
    with _holding(peer, port, names):
        return in_turn(folder, without, peer, options, lambda number: say(f"MQTT: HTTPS beside it, round {number} …"))


@contextlib.contextmanager
def _holding(peer: Peer, port: int, names: list[str]) -> Iterator[None]:
    """Idle sessions of devices, while others are measured."""
    ready, done = threading.Event(), threading.Event()

    async def hold() -> None:
        tls = context(peer.ca)
        clients: list[Client] = await _all((connect(port, tls, device(name)) for name in names), 32)
        ready.set()
        await asyncio.to_thread(done.wait)
        for client in clients:
            client.abort()

    thread = threading.Thread(target=lambda: asyncio.run(hold()), daemon=True)
    thread.start()
    if not ready.wait(60):
        raise SystemExit("the idle MQTT sessions did not come to stand")
    try:
        yield
    finally:
        done.set()
        thread.join(10)


def _app(folder: Path) -> Login:
    """An application that reads the benchmark's product."""
    command = [sys.executable, "-m", "uplinkd", "app", "create", "bench", "--product", PRODUCT, "--json"]
    done = subprocess.run(
        [*command, "--data", str(folder / "data")], capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode:
        raise SystemExit(f"uplinkd app create failed:\n{done.stderr}")
    made = json.loads(done.stdout)
    return "bench", made["key"], made["secret"]


@contextlib.contextmanager
def on_the_load_core() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {int(LOAD_CORE)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
