"""Which worker of a server holds a connection."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tests.house import Server

__all__ = ["worker_of"]


def worker_of(server: Server, port: int) -> int:
    """The pid of the worker at the other end of the connection whose near end has this port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    near = f"0100007F:{port:04X}"
    inodes = {f"socket:[{row[9]}]" for row in rows if row[2] == near}
    for pid in server.children("python"):
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                if os.readlink(link) in inodes:
                    return pid
    raise AssertionError(f"no worker holds the connection from port {port}")
