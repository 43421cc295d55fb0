"""What flow control's refusals cost: reports and logins that are refused, beside those that are served, in turn on two servers."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.load import Measured, auth_load, publish_load
from bench.peers import Peer, uplinkd

__all__ = ["measure"]

# As good as none, but counted: that costs something, too.
_WIDE = ("--device-rate", "1000000", "--device-bytes", "1TiB", "--auth-rate", "60000000")
_NARROW = ("--device-rate", "0.01", "--auth-rate", "1")


def measure(folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """`{"refusals": {"publish": {"served": …, "refused": …, "ratio": …, "rate": …}, "wrong sign": …}}`: µs of the server's CPU for
    one, the record's and the engine's included, the median of the ratios in each round, and refusals a second."""
    count = options.connections
    folder.mkdir()
    with uplinkd(folder / "wide", count, *_WIDE) as wide, uplinkd(folder / "narrow", count, *_NARROW) as narrow:

        def publish(peer: Peer) -> Measured:
            return publish_load(peer, folder, connections=count, seconds=options.seconds)

        def login(peer: Peer) -> Measured:
            secret = {"secret": "guess"} if peer is narrow else {}
            return auth_load(peer, folder, connections=count, seconds=options.seconds, keep_alive=True, **secret)

        found = {}
        for what, act in (("publish", publish), ("wrong sign", login)):
            rounds = []
            for number in range(options.rounds + 1):
                say(f"refusals, {what}: served and refused, round {number} …")
                served, refused = act(wide), act(narrow)
                if number:
                    rounds.append((_micros(served, served.good), _micros(refused, refused.bad), refused))
            found[what] = {
                "served": statistics.median(one for one, _, _ in rounds),
                "refused": statistics.median(other for _, other, _ in rounds),
                "ratio": statistics.median(other / one for one, other, _ in rounds),
                "rate": statistics.median(refused.bad / refused.seconds for _, _, refused in rounds),
            }
    return {"refusals": found}


def _micros(measured: Measured, count: int) -> float:
    if count < 0.9 * (measured.good + measured.bad) or measured.errors:
        raise SystemExit(f"of {measured.good + measured.bad} answers only {count} were as wanted: {measured.sample}")
    return measured.server_cpu / count * 1e6
