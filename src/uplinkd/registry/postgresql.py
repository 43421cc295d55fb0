"""The registry's database in PostgreSQL, which several gateways may share.

Whoever writes takes one advisory lock first, so writers come one after the other as they do in SQLite, and `changes.seq` rises in
the order of commits. Nothing waits for long: not for a connection, a lock, a statement, or an answer of a machine that has gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pg8000.dbapi
from sqlalchemy import BigInteger, LargeBinary, Table, Text, bindparam, create_engine, event, func, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.engine import Connection, Engine, ExceptionContext
from sqlalchemy.exc import IntegrityError, InvalidatePoolError
from sqlalchemy.pool import QueuePool

from uplinkd.core.databases import Place, place_of
from uplinkd.core.errors import Unavailable
from uplinkd.registry.database import Each, Value
from uplinkd.registry.schema import NUMBERED

__all__ = ["OLDEST", "Postgresql"]

OLDEST = 13
"""The oldest major version that is served: older ones are not maintained any more."""

# A process has at most so many connections, and keeps half of them.
_KEPT, _MORE = 4, 4
_CONNECT_SECONDS = 2.0
_PING_SECONDS = 1.0
_PAUSE_SECONDS = 0.5
_STATEMENT_SECONDS = 4
_LOCK_SECONDS = _STATEMENT_SECONDS - 0.5
_SOCKET_SECONDS = _STATEMENT_SECONDS + 0.5  # the server's word comes first, if it has one
_MIGRATION_SECONDS = 30
_LONGEST_SECONDS = 3600
_RECYCLE_SECONDS = 1800
_LOCK = int.from_bytes(b"uplinkd")
_PARAMETERS = {
    "statement_timeout": f"{_STATEMENT_SECONDS}s",
    "lock_timeout": f"{_LOCK_SECONDS * 1000:.0f}ms",
    # A gateway that stands still in the middle of a transaction does not keep the others from writing.
    "idle_in_transaction_session_timeout": "10s",
}
# After these the connection is worth nothing: the server is going, or has become one that only reads.
_GONE = ("08", "57P", "25006")
_BROKEN_RULE = "23"
_TLS_REQUEST = struct.pack("!ii", 8, 80877103)
_TYPES: dict[type, Any] = {int: BigInteger, str: Text, bytes: LargeBinary}
_ESCAPED = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_HINTS = {
    "28P01": "check user and password in database_url",
    "28000": "pg_hba.conf on the server says who may come from where, and whether by TLS alone",
    "3D000": "make it: CREATE DATABASE",
    "42501": "let the user make tables in that database: GRANT CREATE ON SCHEMA public TO the user",
    "53300": "raise max_connections on the server, or run fewer workers",
}
_INSTEAD = {
    "57014": f"a statement took longer than {_STATEMENT_SECONDS} s",
    "55P03": f"another process has held its lock for more than {_LOCK_SECONDS:g} s",
}


class Postgresql:
    """`registry.database.Database` at the place that `url` names."""

    def __init__(self, url: str) -> None:
        self._place = place_of(url)
        self.where = str(self._place)
        self._away: tuple[float, str] | None = None
        self._timeline = 0
        self._settled = False
        self.engine = self._made_engine()
        self.writer = _writer(self.engine)

    def tables(self, connection: Connection) -> set[str]:
        found = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
        return set(connection.exec_driver_sql(found).scalars())

    def is_ready(self, _: Connection) -> bool:
        return True

    def make_ready(self) -> None:
        """There is nothing to do before the schema."""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self.engine.connect() as connection:
            _patient(connection, _MIGRATION_SECONDS + _SOCKET_SECONDS)
            connection.exec_driver_sql(
                f"BEGIN; SET LOCAL statement_timeout = '{_MIGRATION_SECONDS}s'; SET LOCAL lock_timeout = 0; "
                f"SET LOCAL idle_in_transaction_session_timeout = 0; SELECT pg_advisory_xact_lock({_LOCK + 1})"
            )
            yield

    def take_time(self, connection: Connection) -> None:
        connection.exec_driver_sql(
            "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = '10min'"
        )
        _patient(connection, _LONGEST_SECONDS)

    def update_each(self, connection: Connection, change: Each, rows: list[dict[str, Value]]) -> None:
        """In one statement: the network is crossed once, not for each row."""
        first = rows[0]
        columns = (bindparam(name, type_=ARRAY(_TYPES[type(value)])) for name, value in first.items())
        given = func.unnest(*columns).table_valued(*first, name="given").render_derived()
        connection.execute(change(lambda name: given.c[name]), {name: [row[name] for row in rows] for name in first})

    def insert_many(self, connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
        """By COPY, which is several times as fast as INSERT."""
        columns = list(rows[0])
        names = ", ".join(connection.dialect.identifier_preparer.quote(name) for name in columns)
        lines = "".join("\t".join(_copied(row[name]) for name in columns) + "\n" for row in rows)
        held: Any = connection.connection.dbapi_connection
        try:
            held.cursor().execute(f"COPY {table.name} ({names}) FROM STDIN", stream=[lines.encode()])
        except (OSError, pg8000.dbapi.Error) as fault:
            if _is_gone(fault):
                connection.invalidate(fault)
            raise self._meaning(fault) from fault

    def take_stock(self, connection: Connection) -> None:
        """The server does so by itself, a minute later; until then a page of a large fleet would be sorted out of all of it."""
        connection.exec_driver_sql("ANALYZE products; ANALYZE devices")

    def check(self, connection: Connection) -> None:
        """The server sees to that."""

    def outage(self, fault: BaseException | None) -> Unavailable:
        return Unavailable(f"the registry {self.where} is away: {_reason(fault)}")

    def numbers(self, connection: Connection) -> dict[str, int]:
        found = "SELECT sequencename, last_value FROM pg_sequences WHERE schemaname = current_schema()"
        last = {row.sequencename: row.last_value for row in connection.exec_driver_sql(found)}
        return {table: number for table, name in _sequences() if (number := last.get(name))}

    def set_numbers(self, connection: Connection, last: Mapping[str, int]) -> None:
        for table, name in _sequences():
            if number := last.get(table):
                connection.execute(
                    text("SELECT setval(CAST(:name AS regclass), :last)"), {"name": name, "last": number}
                )

    def close(self) -> None:
        self.engine.dispose()

    def _made_engine(self) -> Engine:
        engine = create_engine(
            "postgresql+pg8000://",
            creator=self._connect,
            poolclass=QueuePool,
            pool_size=_KEPT,
            max_overflow=_MORE,
            pool_timeout=_STATEMENT_SECONDS,
            pool_recycle=_RECYCLE_SECONDS,
            pool_use_lifo=True,
        )
        engine.dialect.use_insertmanyvalues_wo_returning = True
        event.listen(engine, "checkout", self._check)
        event.listen(engine, "checkin", _calm)
        event.listen(engine, "handle_error", self._judge)
        return engine

    def _connect(self) -> Any:
        """A connection to the first host that is there and takes writes. In an outage one call asks twice a second, and the others are
        told at once what it found: they are many, and threads are few.

        Of two that take writes one was replaced by the other, and does not know of that: what it is told, nobody else knows. Each
        promotion begins a new timeline. So the first connection, and the first one after an outage, looks at all hosts, and from then
        on none with an older timeline is good enough.
        """
        if self._away:
            until, words = self._away
            if time.monotonic() < until:
                raise Unavailable(words)
            self._away = time.monotonic() + _STATEMENT_SECONDS, words
        faults, best = [], None
        for host, port in self._place.hosts:
            try:
                connection = self._connect_to(host, port)
            except (OSError, ValueError, pg8000.dbapi.Error, _UnfitError) as fault:
                faults.append(_reason(fault))
                continue
            if best:
                best.close()
            best = connection
            if self._settled:
                break
        if best is None:
            raise self._out("; ".join(dict.fromkeys(faults)))
        self._away, self._settled = None, True
        return best

    def _out(self, reason: str) -> Unavailable:
        self._settled = False
        words = f"the registry {self.where} is away: {reason}"
        self._away = time.monotonic() + _PAUSE_SECONDS, words
        return Unavailable(words)

    def _connect_to(self, host: str, port: int) -> Any:
        place = self._place
        sock = _socket(host, port)
        try:
            sock = _secured(sock, host, place)
            connection = pg8000.dbapi.Connection(
                place.user,
                database=place.name,
                password=place.password,
                sock=sock,
                ssl_context=False,
                application_name="uplinkd",
                startup_params=_PARAMETERS,
            )
        except BaseException:
            sock.close()
            raise
        connection.socket = sock
        connection.close = partial(_close, connection.close, sock)
        # The driver's own crosses the network three times, while everybody waits for the lock.
        connection.commit = partial(connection.execute_simple, "COMMIT")
        connection.autocommit = True  # a transaction begins where the writer says so
        connection.register_out_adapter(str, _storable)
        try:
            _check_server(connection, place)
            connection.timeline = self._checked_timeline(connection)
        except BaseException:
            connection.close()
            raise
        sock.settimeout(_SOCKET_SECONDS)
        return connection

    def _checked_timeline(self, connection: Any) -> int:
        """That of the server; raise _UnfitError if it is older than one that was seen. With one host there is none to compare it to."""
        if len(self._place.hosts) == 1:
            return 0
        cursor = connection.cursor()
        cursor.execute("SELECT pg_walfile_name(pg_current_wal_lsn())")
        timeline = int(cursor.fetchone()[0][:8], 16)
        if timeline < self._timeline:
            raise _UnfitError(
                f"the server was replaced by another (its timeline is {timeline}, the other's {self._timeline}): "
                "it must come back as a standby"
            )
        self._timeline = timeline
        return timeline

    def _check(self, connection: Any, _: Any, __: Any) -> None:
        """On its way out of the pool: one to a server that was replaced, or that has something to say before it was asked and so is
        most likely being closed."""
        if connection.timeline < self._timeline:
            raise InvalidatePoolError("the server was replaced by another")
        if not _speaks(connection.socket):
            return
        try:
            connection.socket.settimeout(_PING_SECONDS)
            connection.cursor().execute("SELECT 1")
            connection.socket.settimeout(_SOCKET_SECONDS)
        except (OSError, ValueError, pg8000.dbapi.Error):
            raise InvalidatePoolError("the server has closed its connections") from None

    def _judge(self, context: ExceptionContext) -> Exception | None:
        fault = context.original_exception
        if not isinstance(fault, (OSError, pg8000.dbapi.Error)):
            return None
        context.is_disconnect = context.is_disconnect or _is_gone(fault)
        return self._meaning(fault)

    def _meaning(self, fault: BaseException) -> Exception:
        if _told(fault)[0].startswith(_BROKEN_RULE):
            return IntegrityError(None, None, fault)
        if isinstance(fault, TimeoutError):
            return self._out(_reason(fault))
        return self.outage(fault)


class _UnfitError(Exception):
    """A server that cannot hold the registry, or does not now."""


def _writer(engine: Engine) -> Engine:
    writer = engine.execution_options()

    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"BEGIN; SELECT pg_advisory_xact_lock({_LOCK})")

    event.listen(writer, "begin", begin)
    return writer


def _sequences() -> Iterator[tuple[str, str]]:
    for column in NUMBERED:
        yield column.table.name, f"{column.table.name}_{column.name}_seq"


def _socket(host: str, port: int) -> socket.socket:
    if host.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(_CONNECT_SECONDS)
        try:
            sock.connect(f"{host}/.s.PGSQL.{port}")
        except BaseException:
            sock.close()
            raise
        return sock
    sock = socket.create_connection((host, port), _CONNECT_SECONDS)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, 5),
        (socket.TCP_KEEPINTVL, 2),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, round(_SOCKET_SECONDS * 1000)),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock


def _secured(sock: socket.socket, host: str, place: Place) -> socket.socket:
    """`sock` with TLS, as sslmode asks for it. The caller closes the one that it gave."""
    if place.sslmode == "disable" or host.startswith("/"):
        return sock
    sock.sendall(_TLS_REQUEST)
    if sock.recv(1) != b"S":
        if place.sslmode == "prefer":
            return sock
        raise _UnfitError(f"{host} does not offer TLS, and sslmode={place.sslmode} asks for it")
    try:
        context = ssl.create_default_context(cafile=place.root or None)
        context.check_hostname = place.sslmode == "verify-full"
        if not place.sslmode.startswith("verify"):
            context.verify_mode = ssl.CERT_NONE
        if place.certificate:
            context.load_cert_chain(place.certificate, place.key)
    except OSError as fault:
        files = ", ".join(filter(None, (place.root, place.certificate, place.key)))
        raise _UnfitError(f"{files} of database_url cannot be used: {fault.strerror or fault}") from fault
    return context.wrap_socket(sock, server_hostname=host)


def _close(politely: Callable[[], None], sock: socket.socket) -> None:
    """Whatever state the connection is in, and without a word."""
    with contextlib.suppress(OSError, ValueError, pg8000.dbapi.Error):
        politely()
    with contextlib.suppress(OSError):
        os.close(sock.detach())


def _check_server(connection: Any, place: Place) -> None:
    told = connection.parameter_statuses
    version = told.get("server_version", "0")
    if int(version.partition(".")[0].split()[0]) < OLDEST:
        raise _UnfitError(f"the server is PostgreSQL {version}, and uplinkd needs {OLDEST} or newer")
    if told.get("server_encoding") != "UTF8":
        raise _UnfitError(
            f"the database {place.name!r} is encoded as {told.get('server_encoding')}: make it with ENCODING 'UTF8'"
        )
    cursor = connection.cursor()
    cursor.execute("SHOW transaction_read_only")
    if cursor.fetchone()[0] != "off":
        raise _UnfitError("the server only reads, as a standby does; it is asked again until it takes writes")


def _speaks(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _calm(connection: Any, _: Any) -> None:
    if connection is not None and connection.socket.fileno() >= 0:
        connection.socket.settimeout(_SOCKET_SECONDS)


def _patient(connection: Connection, seconds: float) -> None:
    held: Any = connection.connection.dbapi_connection
    held.socket.settimeout(seconds)


def _told(fault: BaseException | None) -> tuple[str, str]:
    """The SQLSTATE, empty where the server did not speak, and the words."""
    if isinstance(fault, pg8000.dbapi.Error) and fault.args and isinstance(fault.args[0], dict):
        return fault.args[0].get("C", ""), fault.args[0].get("M", "")
    if isinstance(fault, ssl.SSLCertVerificationError):
        return "", f"its certificate is not trusted ({fault.verify_message})"
    if isinstance(fault, TimeoutError):
        return "", "it does not answer in time"
    if isinstance(fault, OSError):
        return "", fault.strerror or str(fault)
    if isinstance(fault, pg8000.dbapi.InterfaceError) and "network error" in str(fault):
        return "", "the connection broke"
    return "", str(fault)


def _reason(fault: BaseException | None) -> str:
    code, words = _told(fault)
    hint = _HINTS.get(code)
    return _INSTEAD.get(code) or (f"{words}: {hint}" if hint else words)


def _is_gone(fault: BaseException) -> bool:
    code, _ = _told(fault)
    return not code or code.startswith(_GONE)


def _copied(value: object) -> str:
    """As COPY has it in its text form."""
    if value is None:
        return "\\N"
    if isinstance(value, bytes):
        return f"\\\\x{value.hex()}"
    if isinstance(value, str):
        return _storable(value).translate(_ESCAPED)
    return str(value)


def _storable(value: str) -> str:
    """PostgreSQL knows no NUL in a text; whoever looks for one finds nothing."""
    return value.replace("\0", "\ufffd")
