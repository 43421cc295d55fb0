"""`python -m bench`: all figures in one run, a table on standard output, everything raw in bench/results/."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bench import anatomy, brokers, console, delivery, growth, mqtt, pages, refusals, registry, report, sync, visits
from bench.load import Measured, auth_load, idle_memory, publish_load, raise_file_limit
from bench.peers import Peer, aiohttp, fastapi, granian, nginx, start_uplinkd, uplinkd
from uplinkd.engine import open_reader
from uplinkd.engine.embedded import access_for
from uplinkd.settings import Settings

NEEDED = {"wrk": "wrk", "nginx": "nginx-light", "taskset": "util-linux", "curl": "curl", "setpriv": "util-linux"}
SERVERS = ("nginx", "fastapi", "aiohttp", "granian", "uplinkd")
PARTS = ("https", "idle", "brokers", "mqtt", "console", "delivery", "refusals", "sync", "registry")
ASIDE = ("profile", "growth")
"""Parts that are measured only when they are asked for."""
OTHERS: dict[str, Callable[[Path, Path, int], AbstractContextManager[Peer]]] = {
    "nginx": lambda folder, tls, _devices: nginx(folder, tls),
    "fastapi": fastapi,
    "aiohttp": aiohttp,
    "granian": granian,
}
PAYLOAD = 200
Load = Callable[[Peer, float], Measured]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="length of one round [3]")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each server, in turn; the median counts [7]")
    parser.add_argument("--connections", type=int, default=64, help="connections, each a device [64]")
    parser.add_argument("--only", choices=SERVERS, action="append", help="measure this server alone; repeatable")
    parser.add_argument("--part", choices=PARTS + ASIDE, action="append", help="measure this door alone; repeatable")
    parser.add_argument("--sessions", type=int, default=10_000, help="idle MQTT sessions [10,000]")
    parser.add_argument("--idle", type=int, default=visits.IDLE, help=f"idle TLS connections [{visits.IDLE:,}]")
    parser.add_argument("--quick", action="store_true", help="of the part growth, only what is set up in seconds")
    parser.add_argument("--out", type=Path, help="file for the raw figures, JSON [bench/results/<date>.json]")
    options = parser.parse_args()
    options.part = options.part or PARTS
    if options.seconds < 1 or options.rounds < 1 or not 1 <= options.connections <= 1000:
        parser.error("--seconds and --rounds are at least 1, --connections 1 to 1000")
    path = os.environ["PATH"] + ":/usr/sbin"
    if missing := [tool for tool in NEEDED if not shutil.which(tool, path=path)]:
        packages = sorted({NEEDED[tool] for tool in missing})
        sys.exit(f"make bench needs {', '.join(missing)}; on Debian: apt-get install {' '.join(packages)}")
    if "delivery" in options.part and importlib.util.find_spec("proton") is None:
        sys.exit("make bench needs python-qpid-proton for the part delivery: make amqp")
    if not {0, 1} <= os.sched_getaffinity(0):
        sys.exit("make bench needs two cores, 0 and 1: one for the server, one for the load")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    raise_file_limit()
    try:
        with tempfile.TemporaryDirectory(prefix="uplinkd-bench-") as name:
            facts = measure(Path(name), options)
    except KeyboardInterrupt:
        sys.exit(130)
    print(report.render(facts))
    file = options.out or Path("bench/results") / f"{facts['machine']['date'].replace(':', '')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    say(f"raw figures: {file}")
    if faults := report.faults(facts):
        sys.exit("\n".join(faults))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything, bounded: rounds × seconds for each load on each server."""
    count = options.connections
    facts: dict[str, Any] = {
        "machine": report.machine(),
        "settings": {
            "seconds": options.seconds,
            "rounds": options.rounds,
            "connections": count,
            "payload": PAYLOAD,
            "sessions": options.sessions,
            "servers": list(options.only or SERVERS),
        },
        "loads": {},
    }
    if "https" in options.part:
        measure_https(folder / "https", options, facts)
    if "idle" in options.part:
        (folder / "idle").mkdir()
        facts |= visits.measure_idle(folder / "idle", options, say)
    if "brokers" in options.part:
        facts["loads"] |= brokers.measure(
            folder / "brokers", options, say, lambda load, acts: rounds(load, acts, options)
        )
    if "mqtt" in options.part:
        with uplinkd(folder / "off", count) as without:
            facts |= mqtt.measure(folder / "mqtt", without, options, say)
    if "console" in options.part:
        facts |= console.measure(folder / "console", options, say)
        facts |= pages.measure(folder / "pages", say)
    if "delivery" in options.part:
        facts |= delivery.measure(folder / "delivery", options, say)
    if "refusals" in options.part:
        facts |= refusals.measure(folder / "refusals", options, say)
    if "sync" in options.part:
        facts |= sync.measure(folder / "sync", options, say)
    if "registry" in options.part:
        facts |= registry.measure(folder / "registry", say)
    if "profile" in options.part:
        facts |= anatomy.measure(folder / "profile", options, say)
    if "growth" in options.part:
        facts |= growth.measure(folder / "growth", options, say)
    return facts


def measure_https(folder: Path, options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """The loads of the HTTPS door, and what a server costs at rest."""
    folder.mkdir()
    chosen = options.only or SERVERS
    count = options.connections
    if "uplinkd" in chosen:
        say("cold start …")
        facts["cold_start_seconds"] = [cold_start(folder / f"cold{number}") for number in range(3)]

    with contextlib.ExitStack() as stack:
        # Always started: the others serve with its certificates.
        ours = stack.enter_context(uplinkd(folder, count))
        tls = folder / "data" / "tls"
        peers: dict[str, Peer] = {}
        for name in chosen:
            if name == "uplinkd":
                peers[name] = ours
            elif name == "granian" and importlib.util.find_spec("granian") is None:
                say("granian is not installed: its rows are left out; `make bench` installs it")
            else:
                peers[name] = stack.enter_context(OTHERS[name](folder, tls, count))

        def put(load: str, act: Load, *names: str) -> None:
            if acts := {key: (peer.name, functools.partial(act, peer)) for key, peer in peers.items() if key in names}:
                facts["loads"][load] = rounds(load, acts, options)

        def publish(connections: int) -> Load:
            return lambda peer, seconds: publish_load(
                peer, folder, connections=connections, seconds=seconds, payload=PAYLOAD
            )

        def auth(keep_alive: bool) -> Load:
            return lambda peer, seconds: auth_load(
                peer, folder, connections=count, seconds=seconds, keep_alive=keep_alive
            )

        def visit(binary: Path) -> Load:
            return lambda peer, seconds: visits.visit_load(binary, peer, folder, connections=count, seconds=seconds)

        put("publish", publish(count), *SERVERS)
        put("publish_one", publish(1), "nginx", "uplinkd")
        put("auth", auth(True), *SERVERS[1:])
        if "uplinkd" in chosen:
            both = {"publish": ("publish", publish(count)), "auth": ("/auth", auth(True))}
            acts = {key: (name, functools.partial(act, ours)) for key, (name, act) in both.items()}
            facts["loads"]["in_turn"] = rounds("in_turn", acts, options)
        put("auth_new_connection", auth(False), *SERVERS)
        binary, fault = visits.build(folder)
        if binary:
            put("visit", visit(binary), *SERVERS)
        else:
            say(f"short visits are left out: {fault}")
        if "uplinkd" in chosen:
            say("memory of 1,000 idle connections …")
            facts["idle_1000_bytes"] = asyncio.run(idle_memory(ours, 1000))
            loads = facts["loads"]
            published = [loads[load]["uplinkd"] for load in ("publish", "publish_one", "visit") if load in loads]
            facts["acknowledged"] = sum(each["acknowledged"] for each in [*published, loads["in_turn"]["publish"]])
            facts["stored"] = stored(folder / "data")


def rounds(
    load: str, acts: Mapping[str, tuple[str, Callable[[float], Measured]]], options: argparse.Namespace
) -> dict[str, Any]:
    """The servers (a name for people, and what puts the load on it for so many seconds) in turn, so that whatever else the machine
    does meets them alike; a second each to warm up."""
    say(f"{report.LOADS[load]}: warming up …")
    warm = {key: act(1.0) for key, (_, act) in acts.items()}
    results: dict[str, list[Measured]] = {key: [] for key in acts}
    for number in range(options.rounds):
        for key, (name, act) in acts.items():
            say(f"{report.LOADS[load]}, round {number + 1} of {options.rounds}: {name} …")
            results[key].append(act(options.seconds))
    return {key: report.row(name, results[key], warm[key]) for key, (name, _) in acts.items()}


def cold_start(folder: Path) -> float:
    """Seconds from nothing (no data folder, no certificates) to the first answer over TLS."""
    folder.mkdir()
    started = time.monotonic()
    with start_uplinkd(folder, folder / "data"):
        return time.monotonic() - started


def stored(data: Path) -> int:
    """How many messages the engine holds, by the engine's own count; it runs still."""

    async def count() -> int:
        with access_for(Settings(data=data)) as access:
            reader = await open_reader(access)
            try:
                return (await reader.state()).messages
            finally:
                await reader.close()

    return asyncio.run(asyncio.wait_for(count(), 30))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
