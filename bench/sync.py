"""What it costs that each acknowledgement waits for the disk: reports to a server with `sync_interval always` and to one as
shipped, in turn."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.load import Measured, publish_load
from bench.peers import uplinkd

__all__ = ["measure"]

_CONNECTIONS = (1, 8, 64, 256)


def measure(folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """`{"sync": {"64": {"shipped": …, "always": …, "ratio": …, "p50": …, "p99": …}}}` by connections: reports a second, the median
    of the ratios in each round, and how long they took with `always`, ms."""
    found: dict[str, Any] = {}
    folder.mkdir()
    most = max(_CONNECTIONS)
    with (
        uplinkd(folder / "shipped", most) as shipped,
        uplinkd(folder / "always", most, "--sync-interval", "always") as always,
    ):
        for count in _CONNECTIONS:
            rounds: list[tuple[Measured, Measured]] = []
            for number in range(options.rounds + 1):
                say(f"sync_interval, {count} connections, round {number} …")
                pair = [
                    publish_load(each, folder, connections=count, seconds=options.seconds) for each in (shipped, always)
                ]
                if bad := sum(each.bad + each.errors for each in pair):
                    raise SystemExit(f"sync_interval: {bad} answers were not right; {pair[0].sample or pair[1].sample}")
                if number:
                    rounds.append((pair[0], pair[1]))
            found[str(count)] = {
                "shipped": statistics.median(one.rate for one, _ in rounds),
                "always": statistics.median(other.rate for _, other in rounds),
                "ratio": statistics.median(other.rate / one.rate for one, other in rounds),
                "p50": statistics.median(other.p50 for _, other in rounds),
                "p99": statistics.median(other.p99 for _, other in rounds),
            }
    return {"sync": found}
