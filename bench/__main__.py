"""`python -m bench`: all figures in one run, a table on standard output, everything raw in bench/results/."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
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
    parser.add_argument("--seconds", type=float, default=8, help="length of one round [8]")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each server, in turn; the median counts [3]")
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
    base = facts["publish"][0]["rate"]
    slow = facts["publish"][1]["rate"]
    rows = [_line(each, base, slow) for each in facts["publish"]]
    rows += [_line({**facts[key][0], "name": name}, base, slow) for key, name in (
        ("publish_one", "uplinkd, one connection"),
        ("auth", "uplinkd, /auth"),
        ("auth_new_connection", "uplinkd, handshake + /auth + close"),
    )]  # fmt: skip
    ours = facts["publish"][2]
    cold = sorted(facts["cold_start_seconds"])[1]
    memory = facts["idle_1000_bytes"] / 1e6
    goals = [
        ("publish against nginx", f"{ours['rate'] / base:.2f} ×", "≥ 0.35 ×", ours["rate"] / base >= 0.35),
        ("publish against FastAPI", f"{ours['rate'] / slow:.1f} ×", "≥ 3 ×", ours["rate"] / slow >= 3),
        ("publish, p99 against p50", f"{ours['p99'] / ours['p50']:.1f} ×", "< 3 ×", ours["p99"] < 3 * ours["p50"]),
        ("cold start to first answer", f"{cold:.2f} s", "< 3 s", cold < 3),
        ("1,000 idle TLS connections", f"{memory:.1f} MB", "< 50 MB", memory < 50),
        (
            "acknowledged, and stored",
            f"{facts['acknowledged']:,} / {facts['stored']:,}",
            "all",
            facts["stored"] >= facts["acknowledged"],
        ),
    ]
    about = facts["machine"]
    return "\n".join(
        [
            f"{about['cpu']}, {about['cores']} cores; Linux {about['kernel']}; Python {about['python']}; {about['openssl']}; commit {about['commit']}",
            f"loopback, TLS, kept alive, 200-byte payload, {facts['settings']['connections']} connections; server on one core, load on the other",
            "",
            report.table(("server", "requests/s", "p50 ms", "p99 ms", "× nginx", "× FastAPI", "not right"), rows),
            "",
            report.table(
                ("goal", "measured", "wanted", ""), [(*goal[:3], "reached" if goal[3] else "MISSED") for goal in goals]
            ),
        ]
    )


def _line(row: dict[str, Any], base: float, slow: float) -> tuple[str, ...]:
    return (
        row["name"],
        f"{row['rate']:,.0f}",
        f"{row['p50']:.2f}",
        f"{row['p99']:.2f}",
        f"{row['rate'] / base:.2f}",
        f"{row['rate'] / slow:.1f}",
        str(row["bad"]),
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
