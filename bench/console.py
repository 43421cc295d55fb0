"""What an open console costs the HTTPS door: overview, live messages and refusals followed at once, as three windows would."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.load import LOAD_CORE, in_turn
from bench.peers import PIN, free_port, uplinkd

__all__ = ["measure"]

# What is looked for is less than the machine's speed moves from round to round.
_TIMES = 2
_PATIENCE = 10
_STREAMS = ("stats/stream", "messages/stream", "logs/stream")


def measure(folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """`{"console": {"without": …, "with": …, "ratio": …, "cpu_without": …, "cpu_with": …, "events": …}}`: reports a second over HTTPS
    on one server in turn, and µs of its CPU for each."""
    port = free_port()
    with uplinkd(folder, options.connections, "--console-listen", f"127.0.0.1:{port}") as peer:
        command = [sys.executable, "-m", "uplinkd", "apikey", "create", "bench", "--scope", "read", "--json"]
        done = subprocess.run([*command, "--data", str(folder / "data")], capture_output=True, text=True, check=True)
        key = json.loads(done.stdout)["key"]
        figures = in_turn(
            folder,
            peer,
            peer,
            argparse.Namespace(**{**vars(options), "rounds": _TIMES * options.rounds}),
            lambda number: say(f"console: HTTPS without and with it, round {number} …"),
            lambda: _watching(folder, port, key),
        )
        events = sum((folder / f"{number}.events").read_text().count("event: ") for number in range(len(_STREAMS)))
    if not events:
        raise SystemExit("the console's streams told nothing: nobody was watching")
    return {"console": {**figures, "events": events}}


@contextlib.contextmanager
def _watching(folder: Path, port: int, key: str) -> Iterator[None]:
    """Clients of the three streams, on the core of the load; from the first figures that they get."""
    with contextlib.ExitStack() as stack:
        for number, stream in enumerate(_STREAMS):
            output = stack.enter_context((folder / f"{number}.events").open("ab"))
            command = ["curl", "-sN", "-H", f"Authorization: Bearer {key}", f"http://127.0.0.1:{port}/api/v1/{stream}"]
            process = stack.enter_context(subprocess.Popen([*PIN, LOAD_CORE, *command], stdout=output))
            stack.callback(process.terminate)
        figures = folder / "0.events"
        before, end = figures.stat().st_size, time.monotonic() + _PATIENCE
        while figures.stat().st_size == before:
            if time.monotonic() > end:
                raise SystemExit("the console tells no figures")
            time.sleep(0.02)
        yield
