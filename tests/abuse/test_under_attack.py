"""A real server is abused by other processes; meanwhile a good device is served, memory stays bounded, and all recovers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.house import Device, Server, environment

pytestmark = pytest.mark.xdist_group("abuse")

# What docs/en/reliability.md says that a connection costs at most.
HALF_OPEN, HANDSHAKE, CONNECTION = 4 * 1024, 200 * 1024, 1024 * 1024
SLACK = 24 * 1024 * 1024
# However busy the machine is.
LONGEST = 8.0


def memory(server: Server) -> int:
    """Bytes of the workers' memory."""
    found = 0
    for pid in server.children("uplinkd-worker"):
        size = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert size
        found += int(size[1]) * 1024
    return found


@dataclass
class Watch:
    """A good device, and what it sees; each of its connections is a new one where it is `fresh`."""

    device: Device
    fresh: bool
    seconds: list[float] = field(default_factory=list)

    async def run(self, end: float) -> None:
        while time.monotonic() < end:
            begin = time.monotonic()
            async with asyncio.timeout(LONGEST):
                code, _ = await self.device.publish(b"x")
            assert code == 0
            self.seconds.append(time.monotonic() - begin)
            if self.fresh:
                await self.device.close()
            await asyncio.sleep(0.005)

    @property
    def p50(self) -> float:
        return statistics.median(self.seconds)


async def watched(device: Device, seconds: float) -> tuple[Watch, Watch]:
    """One that keeps its connection, and one that makes a new one each time."""
    kept, fresh = Watch(replace(device), False), Watch(replace(device), True)
    end = time.monotonic() + seconds
    await asyncio.gather(kept.run(end), fresh.run(end))
    await kept.device.close()
    return kept, fresh


@contextlib.asynccontextmanager
async def attacked(kind: str, port: int, count: int, seconds: float, networks: int = 1) -> AsyncIterator[None]:
    """While another process does it."""
    arguments = [kind, str(port), str(count), str(seconds), str(networks)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.abuse.attack", *arguments, stdout=asyncio.subprocess.PIPE, env=environment()
    )
    assert process.stdout
    try:
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"ready\n"
        yield
        async with asyncio.timeout(seconds + 30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def looked_at(server: Server, seconds: float) -> tuple[int, int]:
    """The most memory and open files that its workers have meanwhile: connections end in the midst of it, by the server's time-outs."""
    held = files = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        held = max(held, memory(server))
        files = max(files, sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in server.children("uplinkd-worker")))
        await asyncio.sleep(0.3)
    return held, files


async def abused(
    server: Server, device: Device, kind: str, count: int, seconds: float, bound: int, networks: int = 1
) -> None:
    """Abuse the door with `count` connections, for which it may take `bound` bytes of memory each."""
    if not device.token:
        assert await device.login() == 0
        await device.close()
    quiet, _ = await watched(device, 0.3)
    before = memory(server)
    port = server.mqtt_port if kind == "packets" else server.port
    async with attacked(kind, port, count, seconds + 0.3, networks):
        (kept, fresh), (held, files) = await asyncio.gather(watched(device, seconds), looked_at(server, seconds))
        grown = max(held, memory(server)) - before
        if kind == "half_open":
            assert files > count
    assert kept.p50 < 50 * quiet.p50 + 0.3, f"{kind}: p50 {kept.p50:.3f} s, undisturbed {quiet.p50:.3f} s"
    assert fresh.p50 < LONGEST / 2
    assert grown < count * bound + SLACK, f"{kind}: {grown / 1e6:.0f} MB more"
    after, _ = await watched(device, 0.3)
    assert after.p50 < 10 * quiet.p50 + 0.1, "it does not recover"
    print(
        f"{kind} × {count}: p50 {quiet.p50 * 1e3:.1f} ms, meanwhile {kept.p50 * 1e3:.1f} ms, on a new connection "
        f"{fresh.p50 * 1e3:.1f} ms; {grown / 1024 / count:.1f} KiB more for each"
    )


FAST = [("half_open", 500, HALF_OPEN), ("handshake", 100, HALF_OPEN), ("pipelined", 20, CONNECTION)]
SLOW = [
    ("half_open", 10_000, HALF_OPEN),
    ("handshake", 4000, HALF_OPEN),
    ("handshakes", 200, HANDSHAKE),
    ("head", 1000, CONNECTION // 4),
    ("body", 1000, CONNECTION // 4),
    ("pipelined", 50, CONNECTION),
    ("deaf", 200, CONNECTION),
    ("giant", 100, CONNECTION),
    ("gone", 100, CONNECTION),
    ("packets", 1000, CONNECTION // 4),
]


@pytest.mark.parametrize(("kind", "count", "bound"), FAST, ids=[kind for kind, _, _ in FAST])
async def test_a_good_device_is_served_meanwhile(
    server: Server, device: Device, kind: str, count: int, bound: int
) -> None:
    """Little of each kind of abuse, to see that it is none of the device's business."""
    await abused(server, device, kind, count, 0.4, bound)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("networks", [1, 200])
@pytest.mark.parametrize(("kind", "count", "bound"), SLOW, ids=[kind for kind, _, _ in SLOW])
async def test_a_good_device_is_served_under_much_of_it(
    server: Server, device: Device, kind: str, count: int, bound: int, networks: int
) -> None:
    """From one address, and from two hundred."""
    await abused(server, device, kind, count, 6, bound, networks)
    assert "socket.send() raised" not in server.log.read_text()


def test_renegotiation_is_refused(server: Server) -> None:
    """Each would cost the server a handshake and the client nothing; TLS 1.3 has none."""
    client = subprocess.Popen(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", "-tls1_2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert client.stdin
    assert client.stdout
    said = b""
    while b"Verify return code" not in said:
        line = client.stdout.readline()
        assert line, said
        said += line
    assert b"Secure Renegotiation IS supported" in said
    client.stdin.write(b"R\n")
    client.stdin.flush()
    out, _ = client.communicate(timeout=20)
    assert b"no renegotiation" in out.lower()
    assert client.returncode
