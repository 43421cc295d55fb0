"""What the registry needs of the database that it is in, and what differs from one to another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from sqlalchemy import ColumnElement, Table, Update
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from uplinkd.core.databases import SCHEMES
from uplinkd.core.errors import Unavailable
from uplinkd.settings import Settings

__all__ = ["Database", "Each", "Value", "is_shared", "open_database", "outages_of"]

Value = int | str | bytes

Each = Callable[[Callable[[str], ColumnElement[Any]]], Update]
"""An UPDATE of one row, made of what gives its values by name: parameters, or the columns of many values at once."""


class Database(Protocol):
    """A database; connections come from a bounded pool, each thread takes one for itself.

    On `engine` each statement stands for itself. A transaction of `writer` holds the database's one write lock from its beginning:
    what it reads stays so, and those who write come one after the other.
    """

    engine: Engine
    writer: Engine

    @property
    def where(self) -> str:
        """For people, without a password."""

    def tables(self, connection: Connection) -> set[str]: ...

    def is_ready(self, connection: Connection) -> bool:
        """Whether nothing but the schema may be missing."""

    def make_ready(self) -> None: ...
    def alone(self) -> AbstractContextManager[None]:
        """Only one process at a time makes or migrates the database; Unavailable after 30 s of waiting."""

    def take_time(self, connection: Connection) -> None:
        """Let the statements of this transaction take longer than usual: it works on many rows."""

    def update_each(self, connection: Connection, change: Each, rows: list[dict[str, Value]]) -> None:
        """Carry out `change` for each of `rows`, of which no two concern the same row of a table."""

    def insert_many(self, connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
        """Insert `rows`, at least one, which all have the same columns."""

    def take_stock(self, connection: Connection) -> None:
        """After many rows have come: have questions answered by what is there now."""

    def check(self, connection: Connection) -> None:
        """Look at all that is kept; raise Unavailable where it is damaged. A server looks after its files itself."""

    def outage(self, fault: BaseException | None) -> Unavailable:
        """That the database did not do its part, and why, by the driver's exception, in one line."""

    def numbers(self, connection: Connection) -> dict[str, int]:
        """The last number that each numbered table gave, also to a row that is gone."""

    def set_numbers(self, connection: Connection, last: Mapping[str, int]) -> None:
        """Number what is made from now on after these."""

    def close(self) -> None: ...


@contextlib.contextmanager
def outages_of(database: Database) -> Iterator[None]:
    """A database that does not do its part is Unavailable, with its own words; a broken constraint is no outage."""
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        raise database.outage(error.orig) from error.orig
    except PoolTimeoutError as error:
        raise Unavailable(f"the registry {database.where} is away: its connections are all busy") from error


def is_shared(settings: Settings) -> bool:
    """Whether the registry is in a database that other machines may use too, and no part of the data folder."""
    return settings.database.startswith(SCHEMES)


def open_database(settings: Settings) -> Database:
    """The database that `settings` name; Rejected or Unavailable where it cannot be reached."""
    if is_shared(settings):
        from uplinkd.registry.postgresql import Postgresql  # its driver is for those who have it

        return Postgresql(settings.database)
    from uplinkd.registry.sqlite import Sqlite

    return Sqlite.of(settings)
