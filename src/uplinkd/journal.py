"""The record of refusals: every no that a device was given, with the reason, for the operator who searches.

SQLite in a file of its own: it is append-mostly, written by several workers, read by the command line at any time, and may be
deleted without harm to anything else. The standard library's driver, since it is one table and three statements.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from operator import attrgetter
from pathlib import Path

from uplinkd.core.errors import Code, Unavailable
from uplinkd.observe import Occasionally
from uplinkd.settings import Settings

__all__ = [
    "STANDING",
    "HeldBack",
    "Journal",
    "Refusal",
    "Wanted",
    "after",
    "after_shared",
    "counts",
    "follow",
    "held_back",
    "read",
    "read_shared",
]

log = logging.getLogger("uplinkd.journal")

_FLUSH_SECONDS = 0.2
_PRUNE_SECONDS = 30.0
_WAITING = 5000
_DAY = 86_400_000
_LONGEST_REASON = 8192
_READER_PATIENCE = 5.0
# Shorter than a drain may last: a stop does not wait for a file that someone else holds.
_WRITER_PATIENCE = 1.0
_ROWS_A_STATEMENT = 500
_POLL_SECONDS = 0.3
_STRETCH = 5000
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """One no. `endpoint` is auth, topic, http (before it was known), mqtt, send or amqp, `status` HTTP's, a CONNACK's or a SASL
    outcome's, `at` in ms since 1970.

    `times`: it stands for so many alike. A note has the code 0: nothing was refused (a will was ignored, say). One about the
    journal itself has the endpoint journal, and STANDING is that of the latest note about each device's TLS suite.
    `id` is where it stands in the record, 0 before it does: a later one has a larger id. `gateway` is whose record it is, empty where
    there is one alone.
    """

    request_id: str
    at: int
    endpoint: str
    code: int
    status: int
    product_key: str
    device_name: str
    address: str
    topic: str
    reason: str
    times: int = 1
    id: int = field(default=0, compare=False)
    gateway: str = field(default="", compare=False)


STANDING = "tls"
"""The endpoint of notes of which one is kept for each device, the latest. They have a table of their own: a fleet of old devices is
many, and would push the refusals out. Who does not ask for this endpoint does not see them."""

_NAMES = [each.name for each in fields(Refusal) if each.name not in ("id", "gateway")]
_COLUMNS = ", ".join(_NAMES)
_ROW = f"({', '.join('?' for _ in _NAMES)})"
_values = attrgetter(*_NAMES)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS refusals (
  id INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL, at INTEGER NOT NULL, endpoint TEXT NOT NULL,
  code INTEGER NOT NULL, status INTEGER NOT NULL, product_key TEXT NOT NULL, device_name TEXT NOT NULL,
  address TEXT NOT NULL, topic TEXT NOT NULL, reason TEXT NOT NULL, times INTEGER NOT NULL DEFAULT 1);
CREATE INDEX IF NOT EXISTS refusals_request ON refusals (request_id);
CREATE INDEX IF NOT EXISTS refusals_device ON refusals (device_name, id);
CREATE INDEX IF NOT EXISTS refusals_at ON refusals (at);
CREATE INDEX IF NOT EXISTS refusals_code ON refusals (code, id);
CREATE INDEX IF NOT EXISTS refusals_address ON refusals (address, id);
CREATE TABLE IF NOT EXISTS standing (
  id INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL, at INTEGER NOT NULL, endpoint TEXT NOT NULL,
  code INTEGER NOT NULL, status INTEGER NOT NULL, product_key TEXT NOT NULL, device_name TEXT NOT NULL,
  address TEXT NOT NULL, topic TEXT NOT NULL, reason TEXT NOT NULL, times INTEGER NOT NULL DEFAULT 1,
  UNIQUE (product_key, device_name));
"""


class Journal:
    """One worker's pen. `record` is cheap and never fails; `run` writes in a thread."""

    def __init__(self, settings: Settings) -> None:
        self._path = journal_file(settings)
        self._age = round(settings.log_age * 1000)
        # Within the life of a token each device that reports over HTTPS signs in anew; a session over MQTT is told of each day.
        self._standing_age = max(self._age, round(settings.token_ttl * 1000) + _DAY)
        self._entries = settings.log_entries
        self._waiting: list[Refusal] = []
        self._dropped = 0
        self._fault = ""
        self._prune_due = 0.0
        self._written = 0
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, "journal")
        self._warn = Occasionally(30)

    def record(self, refusal: Refusal) -> None:
        """Keep `refusal` for the next write; over 5,000 of them in 0.2 s are counted instead."""
        if len(self._waiting) < _WAITING:
            self._waiting.append(refusal)
        else:
            self._dropped += 1

    async def run(self) -> None:
        """Write what was recorded, until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write what waits; what cannot be written waits on, as far as there is room."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._flush)

    async def close(self) -> None:
        """Write what still waits, as far as that is possible within a second or two, and let the file go."""
        await self.flush()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown()
        if left := len(self._waiting) + self._dropped:
            log.warning("%d refusals could not be recorded in %s: %s", left, self._path, self._fault)

    def _flush(self) -> None:
        # What was written is taken off only then, and by this thread: a flush that fails or that nobody awaits any more
        # loses nothing and repeats nothing. The event loop only appends meanwhile.
        waiting, dropped = self._waiting[:], self._dropped
        try:
            self._write([*waiting, _summary(dropped, self._fault)] if dropped else waiting)
        except (sqlite3.Error, OSError) as error:
            self._fault = str(error)
            if self._warn():
                log.warning("refusals cannot be recorded in %s: %s", self._path, error)
            return
        del self._waiting[: len(waiting)]
        self._dropped -= dropped
        self._fault = ""

    def _write(self, refusals: list[Refusal]) -> None:
        now = time.monotonic()
        if not refusals and now < self._prune_due:
            return
        if self._connection is None:
            self._connection = _open(self._path, _WRITER_PATIENCE)
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            _insert(connection, [each for each in refusals if each.endpoint != STANDING])
            _insert(connection, [each for each in refusals if each.endpoint == STANDING], into="standing")
            # In a flood not only by the clock, or the file would grow by what a minute of refusals takes.
            self._written += len(refusals)
            if now >= self._prune_due or self._written > self._entries // 10:
                self._prune_due, self._written = now + _PRUNE_SECONDS, 0
                wall = round(time.time() * 1000)
                connection.execute("DELETE FROM refusals WHERE at < ?", (wall - self._age,))
                connection.execute("DELETE FROM standing WHERE at < ?", (wall - self._standing_age,))
                connection.execute(
                    "DELETE FROM refusals WHERE id <= (SELECT max(id) FROM refusals) - ?", (self._entries,)
                )
            connection.execute("COMMIT")
        except BaseException:
            # The file may have been deleted or the disk be full: begin anew at the next write.
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            with contextlib.suppress(sqlite3.Error):
                connection.close()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which refusals; None means any. `since` and `until` in ms, both included; ids below `before`."""

    request_id: str | None = None
    product: str | None = None
    device: str | None = None
    code: int | None = None
    since: int | None = None
    until: int | None = None
    before: int | None = None
    address: str | None = None
    endpoint: str | None = None


def read(settings: Settings, wanted: Wanted, limit: int) -> list[Refusal]:
    """The newest `limit` that match, oldest of them first; raise Unavailable when the record cannot be read."""
    with _reading(settings) as connection:
        if connection is None:
            return []
        where, values = _where(wanted)
        sql = f"SELECT {_COLUMNS}, id FROM {_table(wanted)} WHERE {where} ORDER BY id DESC LIMIT ?"  # noqa: S608 - names of ours
        found = [Refusal(*row) for row in connection.execute(sql, (*values, limit))]
    found.reverse()
    found.sort(key=attrgetter("at"))  # workers write in turn, not in the order of events
    return found


def read_shared(settings: Settings, wanted: Wanted, limit: int) -> list[Refusal]:
    """The same for one of several gateways: the ids that are given, and `wanted.before`, are in one order for all of them, by time."""
    shared = f"((at << 20) | ((id & 16383) << 6) | {_mark(settings)})"
    where, values = _where(replace(wanted, before=None))
    if wanted.before is not None:
        where += f" AND at <= ? AND {shared} < ?"
        values = [*values, wanted.before >> 20, wanted.before]
    sql = f"SELECT {_COLUMNS}, {shared} FROM {_table(wanted)} WHERE {where} ORDER BY at DESC, id DESC LIMIT ?"  # noqa: S608 - names of ours
    with _reading(settings) as connection:
        if connection is None:
            return []
        found = [Refusal(*row) for row in connection.execute(sql, (*values, limit))]
    found.reverse()
    return found


def counts(settings: Settings, since: int) -> dict[int, int]:
    """How many refusals of each code there were since a time (ms); notes are none."""
    sql = "SELECT code, sum(times) FROM refusals WHERE at >= ? AND code != 0 GROUP BY code"
    with _reading(settings) as connection:
        return dict(connection.execute(sql, (since,)).fetchall()) if connection else {}


@dataclass(frozen=True, slots=True)
class HeldBack:
    """What flow control did lately: to a device; to a product's devices together, and then `device_name` is empty; or to an address,
    and then only that is not."""

    product_key: str
    device_name: str
    address: str
    reason: str
    times: int


def held_back(
    settings: Settings, since: int, *, product: str | None = None, device: str = "", limit: int = 5
) -> list[HeldBack]:
    """Whom flow control has held back most since a time (ms), refused or slowed down; or what it did to one device, and to all of
    its product together."""
    one = "AND product_key = ? AND device_name IN (?, '')" if product else ""
    sql = f"""
        SELECT product_key, device_name, CASE product_key WHEN '' THEN address ELSE '' END AS place, reason, sum(times)
        FROM refusals WHERE code = ? AND at >= ? {one}
        GROUP BY product_key, device_name, place, reason ORDER BY sum(times) DESC LIMIT ?"""  # noqa: S608 - a text of ours
    values = (Code.REQUEST_TOO_MANY, since, *([product, device] if product else []), limit)
    with _reading(settings) as connection:
        return [HeldBack(*row) for row in connection.execute(sql, values)] if connection else []


def after(settings: Settings, wanted: Wanted, last: int | None) -> tuple[int, list[Refusal], bool]:
    """One look: (cursor for the next one, those that match after the cursor `last`, whether there is more at once). None as
    cursor stands for the end."""
    where, values = _where(wanted)
    # Ids of one stretch, not the ids of what matched: a filter that nothing matches would read the whole table each time.
    sql = f"SELECT {_COLUMNS}, id FROM refusals WHERE id > ? AND id <= ? AND {where} ORDER BY id"  # noqa: S608 - names of ours
    with _reading(settings) as connection:
        if connection is None:
            return last or 0, [], False
        newest = connection.execute("SELECT coalesce(max(id), 0) FROM refusals").fetchone()[0]
        if last is None:
            last = newest
        upto = min(newest, last + _STRETCH)
        found = [Refusal(*row) for row in connection.execute(sql, (last, upto, *values))]
        return upto, found, upto < newest


def after_shared(settings: Settings, wanted: Wanted, last: int | None) -> tuple[int, list[Refusal], bool]:
    """The same for one of several gateways, with ids as `read_shared` gives them; cursors are its own."""
    cursor, found, more = after(settings, wanted, last)
    mark = _mark(settings)
    return cursor, [replace(each, id=each.at << 20 | (each.id & 16383) << 6 | mark) for each in found], more


def follow(settings: Settings, wanted: Wanted) -> Iterator[Refusal]:
    """Those that match as they are recorded, for ever; those since `wanted.since` first, where it is given."""
    last: int | None = 0 if wanted.since is not None else None
    while True:
        last, found, more = after(settings, wanted, last)
        yield from found
        if not more:
            time.sleep(_POLL_SECONDS)


def _mark(settings: Settings) -> int:
    """What tells the ids of this gateway from those of others."""
    return zlib.crc32(settings.gateway.encode()) & 63


def journal_file(settings: Settings) -> Path:
    return settings.data / "journal.sqlite"


def _summary(dropped: int, fault: str) -> Refusal:
    """The one entry that is about the journal itself, and so has code and status 0."""
    why = (
        f"the journal could not be written ({fault})"
        if fault
        else f"the journal takes {_WAITING / _FLUSH_SECONDS:,.0f} a second of one worker"
    )
    reason = f"{dropped:,} further refusals were not kept: {why}"
    return Refusal("", round(time.time() * 1000), "journal", 0, 0, "", "", "", "", reason)


def _insert(connection: sqlite3.Connection, refusals: list[Refusal], into: str = "refusals") -> None:
    """Many rows a statement: sqlite3 lets the interpreter go and asks for it back at each one, which beside a busy event
    loop costs 5 ms. Measured there: 400 rows/s by executemany, 34,000 in statements of 500; 150,000 beside an idle one."""
    for first in range(0, len(refusals), _ROWS_A_STATEMENT):
        part = refusals[first : first + _ROWS_A_STATEMENT]
        sql = f"INSERT OR REPLACE INTO {into} ({_COLUMNS}) VALUES {', '.join([_ROW] * len(part))}"  # noqa: S608 - names of ours
        connection.execute(sql, [_storable(value) for value in chain.from_iterable(map(_values, part))])


def _storable(value: object) -> object:
    """Within bounds, and without halves of surrogate pairs: any device can put them into JSON, SQLite takes none. Nor does it take
    numbers beyond its own."""
    if isinstance(value, int):
        return max(-_LARGEST, min(value, _LARGEST))
    if not isinstance(value, str):
        return value
    if value.isascii():
        return value[:_LONGEST_REASON]
    return value.encode(errors="backslashreplace")[:_LONGEST_REASON].decode(errors="ignore")


def _table(wanted: Wanted) -> str:
    return "standing" if wanted.endpoint == STANDING else "refusals"


def _where(wanted: Wanted) -> tuple[str, list[object]]:
    given = {
        "request_id = ?": wanted.request_id,
        "product_key = ?": wanted.product,
        "device_name = ?": wanted.device,
        "code = ?": wanted.code,
        "at >= ?": wanted.since,
        "at <= ?": wanted.until,
        "id < ?": wanted.before,
        "address = ?": wanted.address,
        "endpoint = ?": wanted.endpoint,
    }
    parts = {part: value for part, value in given.items() if value is not None}
    return " AND ".join(parts) or "1", [_storable(value) for value in parts.values()]


def _open(path: Path, patience: float) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # for its mode: SQLite would let everybody read it
    connection = sqlite3.connect(path, timeout=patience, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # a record may miss its last lines after a power cut
        connection.executescript(_SCHEMA)
        if not connection.execute("SELECT 1 FROM pragma_table_info('refusals') WHERE name = 'times'").fetchone():
            # Another process may have been quicker to bring the file of an earlier version up to date.
            with contextlib.suppress(sqlite3.OperationalError):
                connection.execute("ALTER TABLE refusals ADD COLUMN times INTEGER NOT NULL DEFAULT 1")
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _reading(settings: Settings) -> Iterator[sqlite3.Connection | None]:
    """A connection for reading, None while nothing was ever recorded."""
    path = journal_file(settings)
    if not path.exists():
        yield None
        return
    try:
        with contextlib.closing(_open(path, _READER_PATIENCE)) as connection:
            yield connection
    except (sqlite3.Error, OSError) as error:
        raise Unavailable(f"the record of refusals {path} cannot be read: {error}") from error
