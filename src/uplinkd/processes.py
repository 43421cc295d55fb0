"""What processes of uplinkd are to others on this machine: a name, and memory that is nobody else's.

All by prctl(2); where that is not, as on other systems than Linux, nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping

__all__ = ["call_me", "die_with", "environment_of_children", "keep_memory_private"]

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15


def call_me(name: str) -> None:
    """Bear `name`, up to 15 bytes of it, in `ps` and `top`."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()))


def keep_memory_private() -> None:
    """Keys and secrets lie in it: no core dump of this process or those it starts, and for none of the same user a look into it
    or its environment. Root may look. Programs that are started keep the limit alone: exec undoes the rest."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def die_with(parent: int) -> Callable[[], None] | None:
    """For a new child: end when `parent` does, however that ends. Elsewhere than on Linux the child may outlive a kill -9."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return arrange


def environment_of_children(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the settings, among which may be keys and passwords: no other program has any use for them."""
    return {name: value for name, value in environment.items() if not name.startswith("UPLINKD_")}


def _prctl(option: int, value: object) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
