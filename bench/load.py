"""The load: wrk on the core that the servers do not have, and idle connections."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from bench.peers import PIN, PRODUCT, SECRET, Peer, context, cpu_seconds, login, pss
from uplinkd.client import login_body

__all__ = [
    "LOAD_CORE",
    "Measured",
    "auth_load",
    "idle_memory",
    "in_turn",
    "parse",
    "post_load",
    "publish_load",
    "raise_file_limit",
    "timed",
]

LOAD_CORE = "1"
_SCRIPTS = Path(__file__).parent
_BATCH = 50
_FILES = 65_536


@dataclass(frozen=True, slots=True)
class Measured:
    """One round: answers that were right and others, seconds, latencies in ms, broken connections, an answer that was
    not right; seconds of CPU that the server, the load and (both cores together) all other processes used."""

    good: int
    bad: int
    seconds: float
    p50: float
    p99: float
    errors: int
    sample: str
    server_cpu: float = 0.0
    load_cpu: float = 0.0
    other_cpu: float = 0.0

    @property
    def rate(self) -> float:
        return self.good / self.seconds


def parse(output: str, *, server_cpu: float = 0.0, load_cpu: float = 0.0, busy: float = 0.0) -> Measured:
    """The RESULT line that the scripts print; `busy` is what all processes used."""
    line = next((line for line in output.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"the load did not say what it measured; its words:\n{output.strip() or 'none'}")
    good, bad, micros, p50, p99, errors, *sample = line.split(" ", 7)[1:]
    return Measured(
        good=int(good),
        bad=int(bad),
        seconds=int(micros) / 1e6,
        p50=int(p50) / 1000,
        p99=int(p99) / 1000,
        errors=int(errors),
        sample="".join(sample).strip(),
        server_cpu=round(server_cpu, 2),
        load_cpu=round(load_cpu, 2),
        other_cpu=round(max(0.0, busy - server_cpu - load_cpu), 2),
    )


def in_turn(
    folder: Path,
    without: Peer,
    peer: Peer,
    options: argparse.Namespace,
    say: Callable[[int], None],
    beside: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """Reports over HTTPS to the one and the other in turn, after a warm-up, to the other while `beside` stands: the median rates,
    that of the ratios in each round, and the server's µs of CPU for a report.

    Who comes first changes with each round: a machine that grows slower favours neither.
    """
    rates: dict[str, list[float]] = {"without": [], "with": []}
    cpu: dict[str, list[float]] = {"without": [], "with": []}
    turns = [("without", without, nullcontext), ("with", peer, beside)]
    for number in range(options.rounds + 1):
        say(number)
        turns.reverse()
        for name, one, meanwhile in turns:
            with meanwhile():
                found = publish_load(one, folder, connections=options.connections, seconds=options.seconds)
            if found.bad or found.errors:
                raise SystemExit(f"publish {name}: {found.bad + found.errors} answers were not right; {found.sample}")
            if number:
                rates[name].append(found.rate)
                cpu[name].append(found.server_cpu / found.good * 1e6)
    ratio = statistics.median(one / other for one, other in zip(rates["with"], rates["without"], strict=True))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {**medians, "ratio": ratio, **{f"cpu_{name}": statistics.median(values) for name, values in cpu.items()}}


def _wrk(peer: Peer, script: str, connections: int, seconds: float, **variables: str) -> Measured:
    arguments = [*PIN, LOAD_CORE, "wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "5s"]
    arguments += ["-s", str(_SCRIPTS / script), f"http{'s' * peer.tls}://127.0.0.1:{peer.port}"]
    return timed(arguments, peer, within=seconds + 30, **variables, COUNT=str(_SCRIPTS / "count.lua"))


def timed(command: list[str], peer: Peer, *, within: float, **variables: str) -> Measured:
    """What the load `command` says that it measured on `peer`, and the CPU time that both used meanwhile."""
    server, busy, load = cpu_seconds(*peer.roots), _busy_seconds(), _children_seconds()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=within, check=False, env={**os.environ, **variables}
    )
    return parse(
        done.stdout + done.stderr,
        server_cpu=cpu_seconds(*peer.roots) - server,
        load_cpu=_children_seconds() - load,
        busy=_busy_seconds() - busy,
    )


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _busy_seconds() -> float:
    """CPU time of all processes on the two cores so far, without the kernel's own interrupts."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith(("cpu0 ", "cpu1 ")):
            ticks += sum(map(int, line.split()[1:4]))
    return ticks / os.sysconf("SC_CLK_TCK")


def publish_load(
    peer: Peer,
    folder: Path,
    *,
    connections: int,
    seconds: float,
    payload: int = 200,
    names: Sequence[str] | None = None,
) -> Measured:
    """Reports over kept-alive connections, in turn as each of as many devices, or of `names`."""
    tokens = folder / f"{peer.port}.{connections}.tokens"
    if not tokens.exists():
        names = names or _names(connections)
        got = ["x" * 52 if "nginx" in peer.name else login(peer, name) for name in names]
        tokens.write_text(
            "".join(f"/topic/{PRODUCT}/{name}/user/update\t{token}\n" for name, token in zip(names, got, strict=True))
        )
    return _wrk(peer, "publish.lua", connections, seconds, TOKENS=str(tokens), PAYLOAD=str(payload))


def auth_load(
    peer: Peer,
    folder: Path,
    *,
    connections: int,
    seconds: float,
    keep_alive: bool,
    secret: str = SECRET,
    names: Sequence[str] | None = None,
) -> Measured:
    """Logins, over kept-alive connections or each over a new one."""
    bodies = folder / f"bodies.{secret}"
    names = names or _names(connections)
    bodies.write_text("\n".join(login_body(PRODUCT, name, secret, method="hmacsha1") for name in names) + "\n")
    connection = "keep-alive" if keep_alive else "close"
    return _wrk(peer, "auth.lua", connections, seconds, BODIES=str(bodies), CONNECTION=connection)


def post_load(
    peer: Peer,
    *,
    connections: int,
    seconds: float,
    target: str,
    body: str,
    headers: Mapping[str, str],
    wanted: str,
    status: int,
) -> Measured:
    """One request over and over; an answer is right that has this status and holds `wanted`."""
    return _wrk(
        peer,
        "post.lua",
        connections,
        seconds,
        TARGET=target,
        BODY=body,
        HEADERS="".join(f"{name}: {value}\n" for name, value in headers.items()),
        WANTED=wanted,
        STATUS=str(status),
    )


def _names(count: int) -> list[str]:
    return [f"device{number:04}" for number in range(count)]


async def idle_memory(peer: Peer, connections: int) -> int:
    """Bytes that so many idle TLS connections cost, each after a login."""
    tls = context(peer.ca)
    body = login_body(PRODUCT, "device0000", SECRET, method="hmacsha1").encode()
    head = "POST /auth HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def connect() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", peer.port, ssl=tls, server_hostname="localhost")
        writers.append(writer)
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        size = int(answer.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
        if json.loads(await reader.readexactly(size))["code"] != 0:
            raise SystemExit("a login was refused while idle connections were counted")

    writers: list[asyncio.StreamWriter] = []
    try:
        async with asyncio.timeout(60):
            await connect()
            before = pss(*peer.roots)
            for start in range(0, connections, _BATCH):
                await asyncio.gather(*(connect() for _ in range(min(_BATCH, connections - start))))
            await asyncio.sleep(0.5)
            return pss(*peer.roots) - before
    finally:
        for writer in writers:
            writer.transport.abort()


def raise_file_limit() -> None:
    """As many open files as it takes, or as allowed: the servers inherit it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < _FILES:
        with contextlib.suppress(ValueError, OSError):  # only root may have more
            resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))
            return
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
