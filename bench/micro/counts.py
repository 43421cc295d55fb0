"""`python -m bench.micro.counts`: how many instructions of Python's and calls of C functions each part of a request takes.

Unlike time, these are the same on every machine and in every run, for one version of Python. `--renew` keeps them in counts.json,
which the tests hold against what they find: a change that makes a part dearer on purpose renews them, and its diff shows by how much.
What C functions do inside does not show here; `python -m bench.micro` and the profile tell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from bench.micro import parts

__all__ = ["FILE", "VERSION", "count", "dearer", "kept"]

FILE = Path(__file__).with_name("counts.json")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
TOLERANCE = 1.03
_WARM_UP = 200

Counts = Mapping[str, Mapping[str, int]]
"""By part: `instructions` and `calls`."""


def count() -> dict[str, dict[str, int]]:
    """What each part takes once it is warm: the least of three, so that what happens now and then does not count."""
    found = {}
    with parts() as acts:
        for name, act in acts.items():
            for _ in range(_WARM_UP):
                act()
            instructions = min(_instructions(act) for _ in range(3))
            found[name] = {"instructions": instructions, "calls": min(_calls(act) for _ in range(3))}
    return found


def _instructions(act: Callable[[], object]) -> int:
    total = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal total
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            total += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return total


def _calls(act: Callable[[], object]) -> int:
    total = -1  # the call that ends it

    def profile(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal total
        total += event == "c_call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        act()
    finally:
        sys.setprofile(before)
    return total


def kept() -> Counts | None:
    """What counts.json holds for this version of Python."""
    found: dict[str, Counts] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return found.get(VERSION)


def dearer(found: Counts, before: Counts) -> list[str]:
    """A line for each part that takes more than 3 % more than before, and for each that is not known there."""
    lines = []
    for name, now in found.items():
        if name not in before:
            lines.append(f"{name}: not counted before")
            continue
        lines += [
            f"{name}: {now[kind]} {kind}, {before[name][kind]} before ({now[kind] / before[name][kind] - 1:+.1%})"
            for kind in now
            if now[kind] > before[name][kind] * TOLERANCE
        ]
    return lines


def main() -> None:
    found = count()
    if sys.argv[1:] == ["--renew"]:
        everything = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps({**everything, VERSION: found}, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
