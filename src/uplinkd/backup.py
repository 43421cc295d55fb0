"""Backups of a data folder: one file, made while a server runs or not, and a new data folder made of it.

The file is a tar archive, so that anybody can look into it: the registry, the streams as nats-server gives them, keys, TLS material,
and last manifest.json with the size and the SHA-256 of each part. Without the manifest it is not a backup.

The registry is taken first. What it says has happened and is still to be told is told again by the restored server; taken the
other way around, what was told in between would be in neither part.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import os
import re
import secrets
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from uplinkd import __version__
from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.engine.embedded import Access, EmbeddedServer, access_for
from uplinkd.engine.snapshot import CHUNK_BYTES, StreamFacts, open_shelf
from uplinkd.files import check_whole, kept_still, publish, sync_folder, unfinished_file
from uplinkd.journal import journal_file
from uplinkd.registry.database import is_shared
from uplinkd.registry.schema import REVISIONS
from uplinkd.registry.sql import SqlRegistry
from uplinkd.registry.sqlite import database_file
from uplinkd.serving import last_server, lock_file
from uplinkd.settings import Settings

__all__ = ["Manifest", "back_up", "manifest_of", "restore"]

Progress = Callable[[str, float | None], None]
"""Hears what is done now, such as `registry`, and which share of it, 0 to 1, where that is known."""

_FORMAT = 1
_MANIFEST = "manifest.json"
_REGISTRY, _JOURNAL, _SERVED, _STREAMS = "registry.sqlite.gz", "journal.sqlite.gz", "serve.json", "streams/"
_SECRET = ("keys/secret.key", "keys/secret.key.new", "nats/account.nk", "tls/*")
_FILE = re.compile(r"(keys|tls|nats)/\w[\w.-]*")
_COUNTED = ("products", "devices", "apps", "groups", "users")
# Of what is numbered in the registry, a token or a stream may remember the number: see _set_ahead.
_NUMBERED = ("products", "devices", "apps", "groups")
_MOST_MADE = 1024  # in a ms
_BLOCK = 512
_CLOCK_MILLISECONDS = 60_000


@dataclass(slots=True)
class Manifest:
    """What a backup holds. Times are ms; `begun` is when the first part was taken."""

    uplinkd: str
    schema: str
    begun: int
    ended: int = 0
    format: int = _FORMAT
    nats_server: str = ""
    key: str = ""
    """The fingerprint of the key that secrets are sealed with."""
    counts: dict[str, int] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    streams: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)


# -- making one


def back_up(
    settings: Settings,
    file: Path,
    *,
    registry: bool = True,
    messages: bool = True,
    keys: bool = True,
    journal: bool = True,
    overwrite: bool = False,
    progress: Progress,
) -> Manifest:
    """Write a backup of the data folder to `file`, as a whole or not at all. Raise Rejected or Unavailable."""
    if is_shared(settings) and registry:
        raise Rejected(
            "the registry is in PostgreSQL (database_url): back that up with its own means, such as pg_dump, first, and then the rest "
            "by adding --without-registry"
        )
    if settings.nats_url and messages:
        raise Rejected(
            "the messages lie in your own NATS servers (nats_url): back those up with their own means, such as `nats stream backup`, "
            "and the rest by adding --without-messages"
        )
    if os.path.lexists(file) and not overwrite:
        raise Rejected(f"{file} is there already: name another file, or add --overwrite")
    if os.path.exists(file) and not file.is_file():
        raise Rejected(
            f"{file} is a device or a pipe (or a folder), which a backup cannot take the place of: name a file"
        )
    source = None if is_shared(settings) else database_file(settings)
    if source and not source.exists():
        raise Rejected(f"there is nothing to back up: {source} is not there; name the data folder with --data")
    check_whole(settings.data)
    opened = SqlRegistry.open(settings)  # in this version's schema, with the key that is there
    chosen = (("registry", registry), ("messages", messages), ("keys", keys), ("journal", journal))
    without = [name for name, there in chosen if not there]
    with contextlib.closing(opened), kept_still(settings.data), _Archive(file) as archive:
        manifest = Manifest(__version__, REVISIONS[-1], _now(), without=without)
        manifest.key = opened.keys.in_use()
        if source and registry:
            progress("registry", None)
            with _copied(source, file) as copy:
                manifest.counts = _counts(copy)
                archive.add(_REGISTRY, copy, compressed=True)
        served = json.dumps(asdict(last_server(settings.data))).encode()
        archive.add_bytes(_SERVED, served)
        if keys:
            for path in (path for pattern in _SECRET for path in sorted(settings.data.glob(pattern))):
                if path.is_file():
                    archive.add(path.relative_to(settings.data).as_posix(), path)
        if journal and journal_file(settings).exists():
            progress("journal", None)
            with _copied(journal_file(settings), file) as copy:
                archive.add(_JOURNAL, copy, compressed=True)
        if messages and (settings.data / "nats" / "jetstream").is_dir():
            with access_for(settings) as access:
                asyncio.run(_take(access, archive, manifest, progress))
        manifest.ended = _now()
        manifest.parts = archive.parts
        archive.add_bytes(_MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
        archive.finish()
    return manifest


async def _take(access: Access, archive: _Archive, manifest: Manifest, progress: Progress) -> None:
    async with open_shelf(access) as shelf:
        manifest.nats_server = shelf.version
        for name in await shelf.names():
            progress(name, None)
            with archive.part(_STREAMS + name) as part:
                written = 0

                def write(data: bytes, part: _Part = part, name: str = name) -> None:
                    nonlocal written
                    part.write(data)
                    written += len(data)
                    progress(f"{name} {written // 1024**2} MiB", None)

                facts = await shelf.take(name, write)
            manifest.streams.append(asdict(facts))
            manifest.counts[name] = int(facts.state["messages"])


@contextlib.contextmanager
def _copied(source: Path, beside: Path) -> Iterator[Path]:
    """A copy of an SQLite database at one moment, whoever writes to it meanwhile; it lies beside the backup for so long."""
    copy = beside.with_name(f".{beside.name}.{secrets.token_hex(4)}")
    os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with (
            contextlib.closing(
                sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=10)
            ) as origin,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            origin.backup(target)
            target.execute("PRAGMA journal_mode=DELETE")
        yield copy
    except sqlite3.Error as error:
        raise Unavailable(f"{source} cannot be copied: {error}") from error
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            copy.with_name(copy.name + suffix).unlink(missing_ok=True)


def _counts(database: Path) -> dict[str, int]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return {
            name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0]  # noqa: S608 - our own tables
            for name in _COUNTED
        }


class _Part:
    """A part that is being written, whose size is known in the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


class _Archive:
    """A tar archive that is written beside `path` and takes its place when it is finished. Parts are written as they come:
    each one's head is filled in when its size is known, which tarfile does not do."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        self.parts: list[dict[str, Any]] = []
        try:
            descriptor = os.open(self._draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise Rejected(f"{path} cannot be written: {error.strerror}") from error
        self._file = os.fdopen(descriptor, "wb")

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:
            self._draft.unlink(missing_ok=True)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[_Part]:
        head = self._file.tell()
        self._write(bytes(_BLOCK))
        part = _Part(self._file)
        try:
            yield part
        except OSError as error:
            raise Unavailable(f"{self._path} cannot be written: {error.strerror}") from error
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = part.size, 0o600, round(time.time())
        self._write(bytes(-part.size % _BLOCK))
        end = self._file.tell()
        self._file.seek(head)
        self._write(info.tobuf(tarfile.GNU_FORMAT))
        self._file.seek(end)
        self.parts.append({"name": name, "size": part.size, "sha256": part.digest})

    def add(self, name: str, path: Path, *, compressed: bool = False) -> None:
        with path.open("rb") as source, self.part(name) as part:
            if compressed:
                with gzip.GzipFile(fileobj=part, mode="wb", compresslevel=1) as packed:  # type: ignore[call-overload]
                    shutil.copyfileobj(source, packed, 1024**2)
            else:
                shutil.copyfileobj(source, part, 1024**2)

    def add_bytes(self, name: str, content: bytes) -> None:
        with self.part(name) as part:
            part.write(content)

    def finish(self) -> None:
        """On the disk for good, and in its place."""
        self._write(bytes(2 * _BLOCK))
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._draft.replace(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            raise Unavailable(f"{self._path} cannot be written: {error.strerror}") from error

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise Unavailable(f"{self._path} cannot be written: {error.strerror}") from error


# -- bringing it back


def manifest_of(file: Path) -> Manifest:
    """What the backup in `file` says that it holds. Raise Rejected for a file that is none, or one of a newer version."""
    with _opened(file) as archive:
        return _manifest(archive, file)


def restore(settings: Settings, file: Path, *, progress: Progress) -> Manifest:
    """Make the data folder of the backup in `file`; the folder must be empty or not there. Raise Rejected or Unavailable."""
    data, now = settings.data, _now()
    with _opened(file) as archive:
        manifest = _manifest(archive, file)
        if settings.database_url and "registry" not in manifest.without:
            raise Rejected(
                "a backup is restored into a data folder, the registry with it: leave the setting database_url out"
            )
        _check_manifest(manifest, settings, file, now)
        _check_empty(data)
        _check_parts(archive, manifest, file, progress)
        try:
            data.mkdir(mode=0o700, parents=True, exist_ok=True)
            data.chmod(0o700)
            mark = unfinished_file(data)
            publish(mark, b"")
            names = {part["name"] for part in manifest.parts}
            for name in filter(_FILE.fullmatch, sorted(names)):
                _extract(archive, name, data / name)
            _extract(archive, _SERVED, lock_file(data))
            if _JOURNAL in names:
                _extract(archive, _JOURNAL, journal_file(settings), compressed=True)
            if manifest.streams:
                _put(settings, archive, manifest, now, progress)
            if _REGISTRY in names:
                progress("registry", None)
                _extract(archive, _REGISTRY, database_file(settings), compressed=True)
        except OSError as error:
            raise Unavailable(f"{data} cannot be written: {error.strerror}") from error
    if _REGISTRY in names:
        _set_ahead(database_file(settings), now - manifest.begun)
    mark.unlink()
    if _REGISTRY in names:
        registry = SqlRegistry.open(settings)  # brings the schema forward
        registry.operators.note("restore", file.name, f"of {manifest.begun}, by uplinkd {manifest.uplinkd}")
        registry.close()
    sync_folder(data)
    return manifest


def _put(settings: Settings, archive: tarfile.TarFile, manifest: Manifest, now: int, progress: Progress) -> None:
    async def put(access: Access) -> None:
        async with open_shelf(access) as shelf:
            if _version(shelf.version) < _version(manifest.nats_server):
                raise Rejected(
                    f"the backup's streams are of nats-server {manifest.nats_server}, and {shelf.version} is here: install one that "
                    "is not older (nats_server)"
                )
            for facts in manifest.streams:
                stream = StreamFacts(**facts)
                await shelf.put(stream, _chunks(archive, stream.name, progress), now=now)

    server = EmbeddedServer.start(settings, announced=False)
    try:
        asyncio.run(put(server.access))
    finally:
        server.stop()


def _chunks(archive: tarfile.TarFile, name: str, progress: Progress) -> Iterator[bytes]:
    member = archive.getmember(_STREAMS + name)
    done = 0
    with _member(archive, member.name) as source:
        while data := source.read(CHUNK_BYTES):
            yield data
            done += len(data)
            progress(name, done / member.size)


def _set_ahead(database: Path, elapsed: int) -> None:
    """Number what is made from now on beyond all that may have been made after the backup. A token names its device by number,
    and what waits for a device lies under it: one that is made now must not be taken for one that was made then."""
    by = (max(0, elapsed) + _CLOCK_MILLISECONDS) * _MOST_MADE
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        for table in _NUMBERED:
            changed = connection.execute("UPDATE sqlite_sequence SET seq = seq + ? WHERE name = ?", (by, table))
            if not changed.rowcount:
                connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table, by))
        connection.execute("COMMIT")


def _check_empty(data: Path) -> None:
    try:
        there = sorted(path.name for path in data.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise Rejected(f"{data} is not a folder") from None
    except OSError as error:
        raise Rejected(f"{data} cannot be read: {error.strerror}") from error
    if [name for name in there if name != "lost+found"]:
        raise Rejected(
            f"{data} is not empty ({there[0]} is in it): a backup is restored into a new folder, named by --data"
        )


def _check_manifest(manifest: Manifest, settings: Settings, file: Path, now: int) -> None:
    if manifest.schema not in REVISIONS:
        raise Rejected(
            f"{file} was made by uplinkd {manifest.uplinkd} with the schema {manifest.schema!r}, and this is {__version__}, which "
            f"knows up to {REVISIONS[-1]!r}: install that version"
        )
    if now < manifest.begun - _CLOCK_MILLISECONDS:
        raise Rejected(
            f"by this machine's clock {file} will be made in {(manifest.begun - now) / 1000:.0f} s: set the clock "
            "first, ids are made of it"
        )
    if "keys" in manifest.without and not settings.secret_key.get_secret_value():
        raise Rejected(
            f"{file} was made without keys, and its secrets are sealed with key {manifest.key}: give that key by the setting secret_key"
        )


def _check_parts(archive: tarfile.TarFile, manifest: Manifest, file: Path, progress: Progress) -> None:
    """Every part is there as the manifest says, before anything is made of one."""
    total = sum(part["size"] for part in manifest.parts) or 1
    done = 0
    for part in manifest.parts:
        digest = hashlib.sha256()
        try:
            with _member(archive, part["name"]) as source:
                while data := source.read(1024**2):
                    digest.update(data)
                    done += len(data)
                    progress("checking", done / total)
        except (KeyError, OSError, tarfile.TarError):
            raise _damaged(file, part["name"]) from None
        if digest.hexdigest() != part["sha256"]:
            raise _damaged(file, part["name"])


def _damaged(file: Path, part: str) -> Rejected:
    return Rejected(f"{file} is damaged: its part {part} is not what was backed up; nothing was restored")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tarfile.TarFile]:
    try:
        archive = tarfile.open(file, "r:")  # noqa: SIM115 - closed below
    except OSError as error:
        raise Rejected(f"{file} cannot be read: {error.strerror}") from error
    except tarfile.TarError:
        raise _no_backup(file) from None
    with archive:
        yield archive


def _manifest(archive: tarfile.TarFile, file: Path) -> Manifest:
    try:
        with _member(archive, _MANIFEST) as source:
            facts = json.load(source)
        if facts.get("format", 0) > _FORMAT:
            raise Rejected(
                f"{file} was made by uplinkd {facts.get('uplinkd')} in a form that this version, {__version__}, does not know: "
                "install that version"
            )
        return Manifest(**facts)
    except (KeyError, ValueError, TypeError, OSError, tarfile.TarError):
        raise _no_backup(file) from None


def _no_backup(file: Path) -> Rejected:
    return Rejected(f"{file} is no backup of uplinkd, or only a part of one")


@contextlib.contextmanager
def _member(archive: tarfile.TarFile, name: str) -> Iterator[IO[bytes]]:
    source = archive.extractfile(name)
    if source is None:
        raise KeyError(name)
    with source:
        yield source


def _extract(archive: tarfile.TarFile, name: str, path: Path, *, compressed: bool = False) -> None:
    """The part as a file for its owner alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as target, _member(archive, name) as part:
        with gzip.open(part) if compressed else contextlib.nullcontext(part) as source:
            shutil.copyfileobj(source, target, 1024**2)
        target.flush()
        os.fsync(target.fileno())


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("-")[0].split(".")[:2] if part.isdecimal())


def _now() -> int:
    return time.time_ns() // 1_000_000
