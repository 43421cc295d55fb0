"""What holds for all tests.

In CI, which installs what the tests need, a skipped test is a failure: nothing may go untested unnoticed. A new registry gets its
tables as the migrations have made them once in this process.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from sqlalchemy import Connection

from tests.databases import IN_TURN, empty_database, made_database
from tests.faults.table import Row, rows_of, written
from uplinkd import tls
from uplinkd.registry import sql

_skipped: list[str] = []
_faults: list[Row] = []

# A shell ignores SIGINT for what it runs in the background, and the programs that tests stop with it would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _faults.extend(rows_of(report))
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append(f"{report.nodeid}: {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    if os.environ.get("CI") == "true" and _skipped:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if cache := session.config.cache:
        # pytest-xdist names a test with its group, under which `--last-failed` would find none and run them all.
        failed = cache.get("cache/lastfailed", {})
        cache.set("cache/lastfailed", {re.sub(r"@\w+$", "", name): value for name, value in failed.items()})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("CI") == "true" and _skipped:
        terminalreporter.section("skipped tests are failures in CI")
        for line in _skipped:
            terminalreporter.write_line(line)
    if _faults:
        terminalreporter.section("what became of each fault")
        for line in written(_faults):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def postgresql_database() -> Iterator[str]:
    with made_database("") as url:
        yield url


@pytest.fixture
def postgresql(postgresql_database: str) -> str:
    """The URL of an empty database."""
    empty_database(postgresql_database)
    return postgresql_database


@pytest.fixture(params=IN_TURN)
def database_url(request: pytest.FixtureRequest) -> str:
    """The setting, for each kind of database in turn."""
    return request.getfixturevalue("postgresql") if request.param == "postgresql" else ""


@pytest.fixture(scope="module", autouse=True)
def migrations() -> Iterator[None]:
    """Seven hundred tests begin with an empty registry. It costs 50 ms to make one by all migrations and 2 ms to repeat what came
    of them. Tests of the migrations have a fixture of this name that does nothing; other processes run them too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sql, "migrate", _migrate_or_repeat)
        yield


@pytest.fixture(scope="session", autouse=True)
def rsa_keys() -> Iterator[None]:
    """Two hundred tests make a CA of their own. An RSA key takes 50 to 200 ms to find: a few of them go round in this process."""
    make, keys = tls._rsa_key, itertools.cycle(range(_RSA_KEYS))
    made: dict[int, rsa.RSAPrivateKey] = {}

    def key() -> rsa.RSAPrivateKey:
        place = next(keys)
        if place not in made:
            made[place] = make()
        return made[place]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tls, "_rsa_key", key)
        yield


_RSA_KEYS = 5
_migrate: Callable[[Connection], None] = sql.migrate
_made: list[tuple[str, list[Any]]] = []  # statements and their rows


def _migrate_or_repeat(connection: Connection) -> None:
    if connection.dialect.name != "sqlite" or connection.exec_driver_sql("SELECT 1 FROM sqlite_master").first():
        _migrate(connection)
    elif _made:
        for statement, rows in _made:
            connection.exec_driver_sql(statement, rows or None)
    else:
        _migrate(connection)
        _made.extend(_statements(connection))


def _statements(connection: Connection) -> Iterator[tuple[str, list[Any]]]:
    """What makes an empty database equal to this one; triggers come last, after the rows."""
    parts = connection.exec_driver_sql("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").all()
    tables = [(name, statement) for kind, name, statement in parts if kind == "table"]
    for name, statement in tables:
        if not name.startswith("sqlite_"):  # SQLite makes these by itself
            yield statement, []
    for name, _ in tables:
        if rows := [tuple(row) for row in connection.exec_driver_sql(f"SELECT * FROM {name}")]:
            yield f"INSERT INTO {name} VALUES ({', '.join('?' * len(rows[0]))})", rows
    for kind, _, statement in parts:
        if kind != "table":
            yield statement, []
