"""The registry's database as one SQLite file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Table, bindparam, create_engine, event, insert, text
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.pool import QueuePool

from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.registry.database import Each, Value
from uplinkd.settings import Settings

__all__ = ["Sqlite", "database_file"]

_BUSY_SECONDS = 5.0
_DAMAGES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_LOCK_SECONDS = 30.0
_CONNECTIONS = 16


class Sqlite:
    """`registry.database.Database` in the file `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.where = str(path)
        self.engine = _open_sqlite(path)
        self.writer = _writer(self.engine)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The file that `settings` name, with its folders; made when it is not there."""
        path = database_file(settings)
        _make_file(settings, path)
        return cls(path)

    def tables(self, connection: Connection) -> set[str]:
        return set(connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars())

    def is_ready(self, connection: Connection) -> bool:
        return bool(connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal")

    def make_ready(self) -> None:
        with self.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        deadline = time.monotonic() + _LOCK_SECONDS
        with contextlib.closing(_lock_file(self._path)) as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Unavailable(
                            f"the registry {self.where} is away: another process has been migrating it for {_LOCK_SECONDS:g} s"
                        ) from None
                    time.sleep(0.02)
            yield

    def take_time(self, connection: Connection) -> None:
        """SQLite knows no limit."""

    def update_each(self, connection: Connection, change: Each, rows: list[dict[str, Value]]) -> None:
        connection.execute(change(bindparam), rows)

    def insert_many(self, connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
        connection.execute(insert(table), rows)

    def take_stock(self, connection: Connection) -> None:
        """SQLite plans by the schema alone."""

    def check(self, connection: Connection) -> None:
        found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if found != "ok":
            raise self._damaged(found)

    def outage(self, fault: BaseException | None) -> Unavailable:
        reason = str(fault)
        # The extended code, of which the plain one is the first byte.
        if getattr(fault, "sqlite_errorcode", 0) & 0xFF in _DAMAGES:
            return self._damaged(reason)
        if "locked" in reason:
            reason = f"another process has held its lock for more than {_BUSY_SECONDS:g} s"
        return Unavailable(f"the registry {self.where} is away: {reason}")

    def _damaged(self, reason: object) -> Unavailable:
        return Unavailable(
            f"the registry {self.where} is damaged: stop the server, keep this file with its -wal, and bring back the last backup "
            f"into a new data folder with `uplinkd restore` (SQLite says: {reason})"
        )

    def numbers(self, connection: Connection) -> dict[str, int]:
        rows = connection.exec_driver_sql("SELECT name, seq FROM sqlite_sequence")
        return {name: number for name, number in rows if number}

    def set_numbers(self, connection: Connection, last: Mapping[str, int]) -> None:
        for name, number in last.items():
            connection.execute(text("DELETE FROM sqlite_sequence WHERE name = :name"), {"name": name})
            connection.execute(
                text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :seq)"), {"name": name, "seq": number}
            )

    def close(self) -> None:
        self.engine.dispose()


def database_file(settings: Settings) -> Path:
    database = make_url(settings.database).database
    if not database or database == ":memory:":
        raise Rejected(
            f"database_url = {settings.database!r}: it must name a file, as in sqlite:///path/to/registry.sqlite"
        )
    return Path(database)


def _make_file(settings: Settings, path: Path) -> None:
    """Make the folders and an empty file, for their owner alone; SQLite gives its -wal and -shm the file's mode."""
    try:
        for folder in (settings.data, path.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with contextlib.closing(_lock_file(path)):
            pass
    except OSError as error:
        raise Rejected(
            f"the registry {path} cannot be written ({error.strerror}: {error.filename}); "
            "let this user write there, or name another folder with --data"
        ) from error


def _open_sqlite(path: Path) -> Engine:
    """A pool of connections to `path`, which must exist: SQLite never makes one in its place.

    synchronous=FULL: an operator was told that a device is disabled; a power cut must not undo it, which NORMAL may in
    WAL mode. It costs one fsync a transaction; gateways write about once a second.
    """
    uri = path.absolute().as_uri() + "?mode=rw"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    engine = create_engine(
        "sqlite://",
        creator=connect,
        poolclass=QueuePool,
        pool_size=_CONNECTIONS,
        max_overflow=0,
        pool_timeout=_BUSY_SECONDS,
    )

    def remember_file(_: Any, record: Any) -> None:
        record.info["file"] = _identity(path)

    def same_file(_: Any, record: Any, __: Any) -> None:
        # Without this, a connection goes on with a file that was deleted or replaced, and what it writes is lost.
        if record.info["file"] != _identity(path):
            raise InvalidatePoolError("the database file was replaced")

    event.listen(engine, "connect", remember_file)
    event.listen(engine, "checkout", same_file)
    return engine


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _writer(engine: Engine) -> Engine:
    """`engine`, with transactions that take the write lock at once and so never fail half way for want of it."""
    writer = engine.execution_options()

    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(writer, "begin", begin)
    return writer


def _lock_file(path: Path) -> Any:
    return open(os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600), "rb")
