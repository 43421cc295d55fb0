"""What was measured, for people and for programs."""

from __future__ import annotations

import datetime as dt
import os
import platform
import re
import shutil
import ssl
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.load import Measured
from uplinkd.engine.embedded import find_binary
from uplinkd.settings import Settings

__all__ = ["machine", "ratio", "row", "table", "tail"]


def row(name: str, rounds: Sequence[Measured]) -> dict[str, Any]:
    """The medians over the rounds, and each round."""
    return {
        "name": name,
        "rate": statistics.median(each.rate for each in rounds),
        "p50": statistics.median(each.p50 for each in rounds),
        "p99": statistics.median(each.p99 for each in rounds),
        "bad": sum(each.bad + each.errors for each in rounds),
        "rounds": [asdict(each) for each in rounds],
    }


def ratio(row: dict[str, Any], base: dict[str, Any]) -> float:
    """How many times as fast as `base`: the median of the ratios within each round, since a machine's speed drifts."""
    pairs = zip(row["rounds"], base["rounds"], strict=True)
    return statistics.median(
        (ours["good"] / ours["seconds"]) / (theirs["good"] / theirs["seconds"]) for ours, theirs in pairs
    )


def tail(row: dict[str, Any]) -> float:
    """p99 in p50s, the median over the rounds."""
    return statistics.median(each["p99"] / each["p50"] for each in row["rounds"])


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(len(line[column]) for line in (headings, *rows)) for column in range(len(headings))]
    lines = []
    for line in (headings, *rows):
        first, *others = (
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    root = Path(__file__).parent.parent
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "nginx": _first_line(shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") or "nginx", "-v"),
        "nats-server": _first_line(str(find_binary(Settings())), "--version"),
        "commit": _first_line("git", "-C", str(root), "rev-parse", "--short", "HEAD"),
        "changed": bool(_first_line("git", "-C", str(root), "status", "--porcelain")),
    }


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return next(iter((done.stdout + done.stderr).splitlines()), "")
