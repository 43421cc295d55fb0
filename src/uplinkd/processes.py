"""What processes of uplinkd are to others on this machine: a name, and memory that is nobody else's; and what can be seen of one
from outside.

By prctl(2) and /proc; where these are not, as on other systems than Linux, nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Vitals", "belongs_to", "call_me", "environment_of_children", "keep_memory_private", "vitals"]

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PAGE = resource.getpagesize()


def call_me(name: str) -> None:
    """Bear `name`, up to 15 bytes of it, in `ps` and `top`."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()))


def keep_memory_private() -> None:
    """Keys and secrets lie in it: no core dump of this process or those it starts, and for none of the same user a look into it
    or its environment. Root may look. Programs that are started keep the limit alone: exec undoes the rest."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def belongs_to(parent: int) -> Callable[[], None] | None:
    """For a new child: end when `parent` does, however that ends; and interrupt nobody who has the processor, though its own share
    stays the same. Elsewhere than on Linux the child may outlive a kill -9.

    Of a nats-server that shares a core with a worker: with each message that arrived it took the core from the worker, which had
    more to send; now it finds them together (5 % less CPU for a report, and no later an answer where only one waits for it).
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        if os.getppid() != parent:
            os._exit(1)

    return arrange


def environment_of_children(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the settings, among which may be keys and passwords: no other program has any use for them."""
    return {name: value for name, value in environment.items() if not name.startswith("UPLINKD_")}


@dataclass(frozen=True, slots=True)
class Vitals:
    """`state` is one letter of proc(5): R runs or wants to, D waits for the disk, T was stopped, t is being debugged. `ticks`: what it
    has had of the processor. `memory`: bytes that it shares with nobody by a file or on purpose."""

    state: str = ""
    ticks: int = 0
    memory: int = 0


def vitals(pid: int) -> Vitals:
    """All empty for one that is not there, or where it cannot be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except (OSError, ValueError):
        return Vitals()
    return Vitals(stat[0], int(stat[11]) + int(stat[12]), (resident - shared) * _PAGE)


def _prctl(option: int, value: object) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
