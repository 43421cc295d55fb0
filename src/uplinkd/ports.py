"""Ports to listen at: whether one can be had, and why not."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

from uplinkd.core.errors import Rejected

__all__ = ["Target", "patiently", "probe"]

T = TypeVar("T")

Target = tuple[socket.AddressFamily, socket.SocketKind, int, Any]
"""Family, kind, protocol and address of a socket to listen at."""

_PAUSE_SECONDS = 0.1


def probe(host: str, port: int) -> Target:
    """Where to listen, a port that was 0 now chosen; raise OSError when somebody else does."""
    family, kind, protocol, _, target = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as trial:
        # Without SO_REUSEPORT: another server's port must be an error, not a share of its connections.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(target)
        return family, kind, protocol, trial.getsockname()


def patiently(act: Callable[[], T], seconds: float, what: str, advice: str) -> T:
    """`act()`; a port in use is tried again for `seconds`, then raise Rejected: `what` cannot be had, why, and `advice`."""
    end = time.monotonic() + seconds
    while True:
        try:
            return act()
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < end:
                time.sleep(_PAUSE_SECONDS)
                continue
            raise Rejected(f"{what} {_why_not(error)}; {advice}") from error


def _why_not(error: OSError) -> str:
    return {
        errno.EADDRINUSE: "is in use by another program",
        errno.EACCES: "may not be used: ports below 1024 need a privilege",
        errno.EADDRNOTAVAIL: "is not an address of this machine",
    }.get(error.errno or 0, f"cannot be used: {error.strerror or error}")
