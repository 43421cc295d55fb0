"""Who serves from a data folder: a lock that stands exactly as long as its server lives, and in the file which version that is
and how long its tokens hold.

A record lock, as every version has held it: it belongs to a process, and is let go when that process closes the file anywhere.
So the process that holds it never opens the file a second time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from uplinkd import __version__
from uplinkd.core.errors import Rejected
from uplinkd.files import publish
from uplinkd.settings import Settings

__all__ = ["Server", "gateway_name", "last_server", "lock_file", "running_server", "serving", "still_serving"]

# A lock of a server that was killed a moment ago is let go within this time.
_PATIENCE_SECONDS = 2.0

_held: dict[Path, tuple[int, tuple[int, int]]] = {}
"""Lock files that a process of this id holds."""


@dataclass(frozen=True, slots=True)
class Server:
    """The server that holds the lock, or held it last. `version` is empty for one that wrote none (before 0.1's end), and all
    else 0. No token lives longer than `token_ttl` ms from its issue; those of servers before it, until `tokens_until` (ms)."""

    version: str = ""
    pid: int = 0
    token_ttl: int = 0
    tokens_until: int = 0


def lock_file(data: Path) -> Path:
    return data / "serve.lock"


def gateway_name(settings: Settings) -> str:
    """The name of the gateway that serves from this data folder: the one that is set, else one that is made once, of the host's name
    and four digits that tell it from others there, and kept in the folder."""
    if settings.gateway:
        return settings.gateway
    file = settings.data / "gateway"
    host = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname()).strip("-")[:32] or "gateway"
    publish(file, f"{host}-{secrets.token_hex(2)}\n".encode())
    return file.read_text().strip()


@contextlib.contextmanager
def serving(data: Path, *, token_ttl: int, now: int) -> Iterator[None]:
    """Hold the lock; raise Rejected while another process does. Children do not inherit it."""
    path = lock_file(data)
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+") as file:
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise Rejected(f"another uplinkd serves from the data folder {data}") from error
                time.sleep(0.1)
        before = _read(file.read())
        until = max(before.tokens_until, now + before.token_ttl)
        file.seek(0)
        file.write(json.dumps(asdict(Server(__version__, os.getpid(), token_ttl, until))))
        file.truncate()
        file.flush()
        key = path.absolute()
        _held[key] = os.getpid(), _identity(os.fstat(file.fileno()))
        try:
            yield
        finally:
            del _held[key]


def still_serving(data: Path) -> bool:
    """Whether the folder is still the one whose lock this process holds, and was neither removed nor replaced."""
    path = lock_file(data)
    try:
        return _held[path.absolute()][1] == _identity(path.stat())
    except FileNotFoundError:
        return False


def running_server(data: Path) -> Server | None:
    """The other process that serves from `data`, if one does."""
    path = lock_file(data)
    if _held.get(path.absolute(), (0, None))[0] == os.getpid():
        return None
    try:
        file = path.open()
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go with the file
        except OSError:
            return _read(file.read())
    return None


def last_server(data: Path) -> Server:
    """What is known of the server that serves or has served from `data`."""
    try:
        return _read(lock_file(data).read_text())
    except OSError:
        return Server()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _read(text: str) -> Server:
    try:
        facts: dict[str, Any] = json.loads(text)
        return Server(**{each.name: facts[each.name] for each in fields(Server)})
    except (ValueError, KeyError, TypeError):
        return Server()
