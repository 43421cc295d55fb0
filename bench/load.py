"""The load: wrk on the core that the servers do not have, and idle connections."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.peers import PRODUCT, SECRET, Peer, context, login, pss
from uplinkd.client import login_body

__all__ = ["Measured", "auth_load", "idle_memory", "parse", "publish_load"]

LOAD_CORE = "1"
_SCRIPTS = Path(__file__).parent


@dataclass(frozen=True)
class Measured:
    """One round: answers that were right and others, seconds, latencies in ms, broken connections."""

    good: int
    bad: int
    seconds: float
    p50: float
    p99: float
    errors: int
    sample: str

    @property
    def rate(self) -> float:
        return self.good / self.seconds


def parse(output: str) -> Measured:
    """The RESULT line that the scripts print."""
    line = next((line for line in output.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"wrk did not say what it measured:\n{output}")
    good, bad, micros, p50, p99, errors, *sample = line.split(" ", 7)[1:]
    return Measured(
        int(good), int(bad), int(micros) / 1e6, int(p50) / 1000, int(p99) / 1000, int(errors), "".join(sample).strip()
    )


def _wrk(peer: Peer, script: str, connections: int, seconds: float, **variables: str) -> Measured:
    arguments = [
        "taskset",
        "-c",
        LOAD_CORE,
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{max(1, round(seconds))}s",
        "--timeout",
        "5s",
    ]
    arguments += ["-s", str(_SCRIPTS / script), f"https://127.0.0.1:{peer.port}"]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=seconds + 30, env={**os.environ, **variables}
    )
    return parse(done.stdout + done.stderr)


def publish_load(peer: Peer, folder: Path, *, connections: int, seconds: float, payload: int = 200) -> Measured:
    """Reports over kept-alive connections, in turn as each of as many devices."""
    tokens = folder / f"{peer.pid}.tokens"
    if not tokens.exists():
        names = [f"device{number:04}" for number in range(connections)]
        got = ["x" * 52 if "nginx" in peer.name else login(peer, name) for name in names]
        tokens.write_text(
            "".join(f"/topic/{PRODUCT}/{name}/user/update\t{token}\n" for name, token in zip(names, got, strict=True))
        )
    return _wrk(peer, "publish.lua", connections, seconds, TOKENS=str(tokens), PAYLOAD=str(payload))


def auth_load(peer: Peer, folder: Path, *, connections: int, seconds: float, keep_alive: bool) -> Measured:
    """Logins, over kept-alive connections or each over a new one."""
    bodies = folder / "bodies"
    names = [f"device{number:04}" for number in range(connections)]
    bodies.write_text("\n".join(login_body(PRODUCT, name, SECRET, method="hmacsha1") for name in names) + "\n")
    connection = "keep-alive" if keep_alive else "close"
    return _wrk(peer, "auth.lua", connections, seconds, BODIES=str(bodies), CONNECTION=connection)


async def idle_memory(peer: Peer, connections: int) -> int:
    """Bytes that so many idle TLS connections cost, each after a login."""
    tls = context(peer.ca)
    body = login_body(PRODUCT, "device0000", SECRET, method="hmacsha1").encode()
    request = (
        b"POST /auth HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )

    async def connect() -> asyncio.StreamWriter:
        reader, writer = await asyncio.open_connection("127.0.0.1", peer.port, ssl=tls, server_hostname="localhost")
        writer.write(request + body)
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
        assert json.loads(await reader.readexactly(size))["code"] == 0
        return writer

    await (await connect()).drain()
    before = pss(peer.pid)
    writers = []
    for start in range(0, connections, 50):
        writers += await asyncio.gather(*(connect() for _ in range(min(50, connections - start))))
    await asyncio.sleep(0.5)
    cost = pss(peer.pid) - before
    for writer in writers:
        writer.transport.abort()
    return cost
