"""Ports for what the tests start."""

from __future__ import annotations

import os
import random
import socket
from itertools import cycle
from pathlib import Path

__all__ = ["free_port"]

_FIRST, _PROCESSES = 16_000, 128


def _own() -> list[int]:
    """This process's share of the ports below those that connections are made from, in any order: those that began beside it have
    others."""
    last = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = list(range(_FIRST + os.getpid() % _PROCESSES, last, _PROCESSES))
    random.SystemRandom().shuffle(ports)
    return ports


_ports = cycle(_own())


def free_port() -> int:
    """One at 127.0.0.1 that nobody has. While a server that had it is down, the kernel gives it to no connection: none takes it from
    the server, and none that looks for the server finds itself."""
    while True:
        port = next(_ports)
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
