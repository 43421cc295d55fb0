"""The databases that a registry may be in, for tests: SQLite in a folder of the test, and a real PostgreSQL, where each process of
the tests has a database of its own, which is emptied for each test."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Any

import pg8000.dbapi
import pytest

from uplinkd.core.databases import place_of
from uplinkd.registry.schema import REVISIONS, metadata
from uplinkd.settings import Settings

__all__ = [
    "IN_TURN",
    "KINDS",
    "SERVER",
    "Wire",
    "alter",
    "connected",
    "content",
    "empty_database",
    "end_connections",
    "execute",
    "locked",
    "made_database",
]

KINDS = ("sqlite", "postgresql")

IN_TURN = (KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.slow))
"""The same, for tests that run on each commit with the first alone."""
SERVER = os.environ.get("UPLINKD_TEST_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432/").replace("+psycopg", "")


@contextlib.contextmanager
def connected(url: str) -> Iterator[Any]:
    """A connection of the test's own, in which each statement stands for itself."""
    place = place_of(url)
    (host, port), *_ = place.hosts
    connection = pg8000.dbapi.connect(
        place.user, host, place.name, port, password=place.password, ssl_context=False, timeout=30
    )
    connection.autocommit = True
    try:
        yield connection
    finally:
        with contextlib.suppress(pg8000.dbapi.Error, OSError):
            connection.close()


def execute(url: str, *statements: str) -> list[Any]:
    """Carry out `statements`; the rows of the last one."""
    with connected(url) as connection:
        cursor = connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        return list(cursor.fetchall()) if cursor.description else []


@contextlib.contextmanager
def made_database(suffix: str, options: str = "") -> Iterator[str]:
    """The URL of a new database. Skips the test where there is no PostgreSQL."""
    name = f"uplinkd_test_{os.getpid()}{suffix}"
    try:
        execute(
            SERVER + "postgres",
            f"CREATE DATABASE {name} {options}",
            f"ALTER DATABASE {name} SET synchronous_commit = off",
        )
    except (pg8000.dbapi.InterfaceError, OSError) as fault:
        pytest.skip(f"no PostgreSQL answers at {SERVER} ({fault}); UPLINKD_TEST_POSTGRESQL names one")
    try:
        yield SERVER + name
    finally:
        execute(SERVER + "postgres", f"DROP DATABASE {name} WITH (FORCE)")


def empty_database(url: str) -> None:
    """Leave the tables of the registry and nothing in them; where a test has left others, no table at all."""
    tables = {name for (name,) in execute(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}
    if tables != {*_order(), "alembic_version"} or execute(url, "SELECT version_num FROM alembic_version") != [
        [REVISIONS[-1]]
    ]:
        execute(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
        return
    parts = " ".join(f"DELETE FROM {name};" for name in _order())
    restart = (
        "PERFORM setval(quote_ident(sequencename)::regclass, 1, false) FROM pg_sequences WHERE last_value IS NOT NULL;"
    )
    execute(url, f"DO $$ BEGIN {parts} {restart} END $$")


def _order() -> list[str]:
    return [table.name for table in reversed(metadata.sorted_tables)]


# -- the registry of settings, whichever database it is in


def alter(settings: Settings, statement: str) -> None:
    """Do behind the registry's back what it never does."""
    if settings.database_url:
        execute(settings.database_url, statement)
        return
    with contextlib.closing(sqlite3.connect(settings.data / "registry.sqlite", isolation_level=None)) as connection:
        connection.execute(statement)


def content(settings: Settings) -> bytes:
    """Everything that lies in it, as it lies there."""
    if not settings.database_url:
        return b"".join(file.read_bytes() for file in settings.data.glob("registry.sqlite*"))
    rows = (row for table in _order() for row in execute(settings.database_url, f"SELECT * FROM {table}"))
    values = (value for row in rows for value in row if value is not None)
    return b"\n".join(value if isinstance(value, bytes) else str(value).encode() for value in values)


@contextlib.contextmanager
def locked(settings: Settings) -> Iterator[None]:
    """Hold the lock of those who write."""
    if settings.database_url:
        with connected(settings.database_url) as connection:
            connection.cursor().execute(f"BEGIN; SELECT pg_advisory_xact_lock({int.from_bytes(b'uplinkd')})")
            yield
        return
    with contextlib.closing(sqlite3.connect(settings.data / "registry.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


# -- what may happen to it


def end_connections(url: str) -> int:
    """As an administrator, or a restart, ends them; how many."""
    (row,) = execute(
        url,
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE application_name = 'uplinkd' AND datname = current_database()",
    )
    return int(row[0])


class Wire:
    """A way to the database that can be cut and stalled."""

    def __init__(self, url: str) -> None:
        place = place_of(url)
        self._to = place.hosts[0]
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = url.replace(f"{self._to[0]}:{self._to[1]}", f"127.0.0.1:{self._server.getsockname()[1]}")
        self.stalled = threading.Event()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(self._to)
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                while self.stalled.is_set():
                    time.sleep(0.01)
                other.sendall(data)

    def close(self) -> None:
        self.stalled.clear()
        for sock in (self._server, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
