"""Hours compressed into minutes: at half the top speed memory, file descriptors and the slowest hundredth stay what they are."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import cast

import pytest
import uvloop

from tests.faults.load import LIMITS
from tests.house import Device, Server, make_devices, serving
from uplinkd.processes import vitals

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]

MINUTES = float(os.environ.get("SOAK_MINUTES", "1.5"))
CONNECTIONS = 32
PAYLOAD = b"x" * 200
TOP_SECONDS = 6.0
# Until caches, the store's bound and the allocators have what they need.
SETTLING_SECONDS = 20.0
WINDOW_SECONDS = 5.0
TICK_SECONDS = 0.005


class Wire(asyncio.Protocol):
    """One connection that reports the same again and again: a client so light that the server has the machine."""

    def __init__(self, soak: Soak, device: Device) -> None:
        path = f"/topic/{device.product}/{device.name}/user/update"
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\npassword: {device.token}\r\nContent-Length: {len(PAYLOAD)}\r\n"
        )
        self._request = head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + PAYLOAD
        self._soak = soak
        self._answer = b""
        self._due = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, _: Exception | None) -> None:
        self._soak.lost += 1

    def close(self) -> None:
        assert self._transport
        self._transport.abort()

    def report(self, due: float) -> None:
        """What should have left at `due`."""
        assert self._transport
        self._due = due
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self._answer.endswith(b"}}"):
            if b'"code":0' in self._answer:
                self._soak.took.append(time.monotonic() - self._due)
            else:
                self._soak.refused.append(self._answer)
            self._answer = b""
            self._soak.free(self)


@dataclass
class Soak:
    """Reports that are due at even intervals, whether or not the ones before were answered; as fast as answered with the rate 0."""

    rate: float = 0.0
    took: list[float] = field(default_factory=list)
    refused: list[bytes] = field(default_factory=list)
    lost: int = 0
    _idle: deque[Wire] = field(default_factory=deque)
    _due: deque[float] = field(default_factory=deque)

    def free(self, wire: Wire) -> None:
        if self._due:
            wire.report(self._due.popleft())
        elif self.rate:
            self._idle.append(wire)
        else:
            wire.report(time.monotonic())

    async def keep(self, rate: float, seconds: float) -> None:
        self.rate, sent, begun = rate, 0, time.monotonic()
        while (elapsed := time.monotonic() - begun) < seconds:
            while sent < elapsed * rate:
                due, sent = begun + sent / rate, sent + 1
                if self._idle:
                    self._idle.popleft().report(due)
                else:
                    self._due.append(due)
            await asyncio.sleep(TICK_SECONDS)


@dataclass(frozen=True, slots=True)
class Sample:
    """In one window: bytes of all workers and of nats-server, open files of each process, seconds."""

    workers: int
    engine: int
    files: tuple[int, ...]
    p99: float


def look(server: Server, soak: Soak) -> Sample:
    workers, (engine,) = server.children("uplinkd-worker"), server.children("nats-server")
    processes = [server.pid, *workers, *server.children("uplinkd-deliver"), engine]
    files = tuple(len(os.listdir(f"/proc/{pid}/fd")) for pid in processes)
    took, soak.took = soak.took, []
    return Sample(sum(vitals(pid).memory for pid in workers), vitals(engine).memory, files, quantiles(took, n=100)[-1])


async def soak_for(server: Server, seconds: float) -> tuple[float, list[Sample]]:
    """The top speed, messages a second, and what was seen at half of it."""
    devices = make_devices(server, CONNECTIONS)
    for device in devices:
        assert await device.login() == 0
        await device.close()
    soak, context = Soak(), server.context()
    loop = asyncio.get_running_loop()
    wires = [Wire(soak, device) for device in devices]
    for wire in wires:
        where = ("127.0.0.1", server.port)
        await loop.create_connection(lambda wire=wire: wire, *where, ssl=context, server_hostname="localhost")  # type: ignore[misc]
        soak.free(wire)
    await asyncio.sleep(1)
    soak.took.clear()
    await asyncio.sleep(TOP_SECONDS)
    top = len(soak.took) / TOP_SECONDS
    keeping = asyncio.create_task(soak.keep(top / 2, SETTLING_SECONDS + seconds))
    await asyncio.sleep(SETTLING_SECONDS)
    soak.took.clear()
    samples = []
    while not keeping.done():
        await asyncio.wait([keeping], timeout=WINDOW_SECONDS)
        if len(soak.took) > top / 2:  # the last window may be short
            samples.append(look(server, soak))
    keeping.result()
    assert not soak.refused, soak.refused[:3]
    assert not soak.lost
    for wire in wires:
        wire.close()
    await asyncio.sleep(0.1)
    return top, samples


@pytest.mark.timeout(MINUTES * 60 + 180)
def test_half_the_top_speed_can_be_kept_up(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The first third of the time against the last: no memory, no file and no time more. SOAK_MINUTES=60 makes an hour of it."""
    with serving(tmp_path / "data", *LIMITS, "--keep-bytes", "16MiB") as server:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            top, samples = runner.run(soak_for(server, MINUTES * 60))
        assert "Traceback" not in server.log.read_text()
    third = len(samples) // 3
    first, last = samples[:third], samples[-third:]

    def thirds(name: str) -> tuple[float, float]:
        """Of the calmer windows: what else the machine does comes and goes, what the server gathers stays."""
        calm = [quantiles([getattr(each, name) for each in part], n=4)[0] for part in (first, last)]
        return calm[0], calm[1]

    told = {name: thirds(name) for name in ("workers", "engine", "p99")}
    print(f"\nat half of {top:.0f} messages/s for {MINUTES:g} min: {told}, files {first[0].files} and {last[-1].files}")
    record_property("soak", told)
    for name, room in (("workers", 8 << 20), ("engine", 24 << 20)):
        before, after = told[name]
        assert after < before * 1.05 + room, f"{name}: {before} and {after} bytes"
    before, after = told["p99"]
    assert after < 2 * before + 0.02, f"p99: {before} and {after} s"
    for before, after in zip(first[0].files, last[-1].files, strict=True):
        assert abs(after - before) <= 4, (first[0].files, last[-1].files)
