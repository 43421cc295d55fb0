"""Which worker of a server holds a connection."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.clients.fleet import until
from tests.house import Server

__all__ = ["worker_of"]


def worker_of(server: Server, port: int) -> int:
    """The pid of the worker at the other end of the connection whose near end has this port."""
    found: list[int] = []

    def accepted() -> bool:
        found.extend(_holders(server, port))
        return bool(found)

    assert until(accepted, within=10), f"no worker holds the connection from port {port}"
    return found[0]


def _holders(server: Server, port: int) -> Iterator[int]:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    near = f"0100007F:{port:04X}"
    inodes = {f"socket:[{row[9]}]" for row in rows if row[2] == near}
    for pid in server.children("uplinkd-worker"):
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                if os.readlink(link) in inodes:
                    yield pid
