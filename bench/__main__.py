"""`python -m bench`: all figures in one run, a table on standard output, everything raw in bench/results/."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import report
from bench.load import Measured, auth_load, idle_memory, publish_load
from bench.peers import Peer, fastapi, nginx, start_uplinkd, uplinkd
from uplinkd.engine.embedded import access_for
from uplinkd.engine.reader import JetStreamReader
from uplinkd.settings import Settings

NEEDED = {"wrk": "wrk", "nginx": "nginx-light", "taskset": "util-linux"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="length of one round [3]")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each server, in turn; the median counts [7]")
    parser.add_argument("--connections", type=int, default=32, help="connections, each a device [32]")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the JSON [bench/results]")
    options = parser.parse_args()
    path = os.environ["PATH"] + ":/usr/sbin"
    if missing := [package for tool, package in NEEDED.items() if not shutil.which(tool, path=path)]:
        sys.exit(f"missing: {', '.join(missing)}; on Debian: apt-get install {' '.join(missing)}")
    if (os.cpu_count() or 1) < 2:
        sys.exit("two cores are needed: one for the server, one for the load")
    with tempfile.TemporaryDirectory(prefix="uplinkd-bench-") as name:
        facts = measure(Path(name), options)
    print(render(facts))
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{facts['machine']['date'].replace(':', '')}.json"
    file.write_text(json.dumps(facts, indent=2))
    say(f"raw figures: {file}")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything, bounded: rounds × seconds for each load."""
    facts: dict[str, Any] = {
        "machine": report.machine(),
        "settings": {
            "seconds": options.seconds,
            "rounds": options.rounds,
            "connections": options.connections,
            "payload": 200,
        },
    }
    say("cold start …")
    facts["cold_start_seconds"] = [cold_start(folder / f"cold{number}") for number in range(3)]

    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(uplinkd(folder, options.connections))
        tls = folder / "data" / "tls"
        peers = [stack.enter_context(nginx(folder, tls)), stack.enter_context(fastapi(folder, tls)), ours]

        def rounds(what: str, load: Any, chosen: list[Peer]) -> list[dict[str, Any]]:
            results: dict[str, list[Measured]] = {peer.name: [] for peer in chosen}
            for peer in chosen:
                load(peer, 1.0)  # warm up
            for number in range(options.rounds):
                for peer in chosen:
                    say(f"{what}, round {number + 1} of {options.rounds}: {peer.name} …")
                    results[peer.name].append(load(peer, options.seconds))
            return [report.row(peer.name, results[peer.name]) for peer in chosen]

        count = options.connections
        facts["publish"] = rounds(
            "publish", lambda peer, seconds: publish_load(peer, folder, connections=count, seconds=seconds), peers
        )
        facts["publish_one"] = rounds(
            "publish, one connection",
            lambda peer, seconds: publish_load(peer, folder, connections=1, seconds=seconds),
            [ours],
        )
        facts["auth"] = rounds(
            "auth",
            lambda peer, seconds: auth_load(peer, folder, connections=count, seconds=seconds, keep_alive=True),
            [ours],
        )
        facts["auth_new_connection"] = rounds(
            "auth, new connection",
            lambda peer, seconds: auth_load(peer, folder, connections=count, seconds=seconds, keep_alive=False),
            [ours],
        )
        say("memory of 1,000 idle connections …")
        facts["idle_1000_bytes"] = asyncio.run(idle_memory(ours, 1000))
        acknowledged = sum(each["good"] for name in ("publish", "publish_one") for each in facts[name][-1]["rounds"])
        facts["acknowledged"], facts["stored"] = acknowledged, stored(folder / "data")
    if facts["stored"] < acknowledged:
        sys.exit(f"{acknowledged} messages were acknowledged, but {facts['stored']} are stored")
    return facts


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
            reader = await JetStreamReader.open(access)
            try:
                return await reader.count()
            finally:
                await reader.close()

    return asyncio.run(count())


def render(facts: dict[str, Any]) -> str:
    base, slow, ours = facts["publish"]
    named = [
        *facts["publish"],
        {**facts["publish_one"][0], "name": "uplinkd, one connection"},
        {**facts["auth"][0], "name": "uplinkd, /auth"},
        {**facts["auth_new_connection"][0], "name": "uplinkd, handshake + /auth + close"},
    ]
    against_nginx, against_fastapi = report.ratio(ours, base), report.ratio(ours, slow)
    tail = report.tail(ours)
    cold = statistics.median(facts["cold_start_seconds"])
    memory = facts["idle_1000_bytes"] / 1e6
    kept = f"{facts['acknowledged']:,} / {facts['stored']:,}"
    goals = [
        ("publish against nginx", f"{against_nginx:.2f} ×", "≥ 0.35 ×", against_nginx >= 0.35),
        ("publish against FastAPI", f"{against_fastapi:.1f} ×", "≥ 3 ×", against_fastapi >= 3),
        ("publish, p99 against p50", f"{tail:.1f} ×", "< 3 ×", tail < 3),
        ("cold start to first answer", f"{cold:.2f} s", "< 3 s", cold < 3),
        ("1,000 idle TLS connections", f"{memory:.1f} MB", "< 50 MB", memory < 50),
        ("acknowledged, and stored", kept, "all", facts["stored"] >= facts["acknowledged"]),
    ]
    about, how = facts["machine"], facts["settings"]
    return "\n".join(
        [
            f"{about['cpu']}, {about['cores']} cores; Linux {about['kernel']}; Python {about['python']}; {about['openssl']}",
            f"{about['nginx']}; {about['nats-server']}; commit {about['commit']}{' and changes' if about['changed'] else ''}",
            f"loopback, TLS, kept alive, 200-byte payload, {how['connections']} connections; server on one core, load on the other;",
            f"medians of {how['rounds']} rounds of {how['seconds']:g} s, the servers in turn; ratios are taken within each round",
            "",
            report.table(
                ("server", "requests/s", "p50 ms", "p99 ms", "× nginx", "× FastAPI", "not right"),
                [_line(each, base, slow) for each in named],
            ),
            "",
            report.table(
                ("goal", "measured", "wanted", ""), [(*goal[:3], "reached" if goal[3] else "MISSED") for goal in goals]
            ),
        ]
    )


def _line(row: dict[str, Any], base: dict[str, Any], slow: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        f"{row['rate']:,.0f}",
        f"{row['p50']:.2f}",
        f"{row['p99']:.2f}",
        f"{report.ratio(row, base):.2f}",
        f"{report.ratio(row, slow):.1f}",
        str(row["bad"]),
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
