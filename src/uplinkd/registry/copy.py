"""Copies a registry from one database into another: as a whole or not at all, and proven row by row before it counts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table, func, select, tuple_
from sqlalchemy.engine import Connection

from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.registry.database import Database, open_database, outages_of
from uplinkd.registry.schema import REVISIONS, metadata
from uplinkd.registry.sql import SqlRegistry, migrate, revision
from uplinkd.settings import Settings

__all__ = ["Copied", "copy_registry"]

_BATCH = 5000

Progress = Callable[[str, float, int], None]
"""Hears what is done now, which share of it, 0 to 1, and with how many rows."""


@dataclass(frozen=True, slots=True)
class Copied:
    """A table that is the same in both databases: how many rows, and the SHA-256 of them all, in the order of their keys."""

    table: str
    rows: int
    digest: str


def copy_registry(settings: Settings, target: Settings, progress: Progress) -> list[Copied]:
    """Copy the registry of `settings` into the database of `target`, which must be empty. Nobody writes to either meanwhile.

    Identities, numbers and keys stay what they are; secrets stay sealed under the key that they are sealed under. Raise Rejected
    or Unavailable; then the target is as it was.
    """
    registry = SqlRegistry.open(settings)  # in this version's schema, with the key that is there
    source = registry.database
    try:
        database = open_database(target)
        try:
            if database.where == source.where:
                raise Rejected(f"the registry is in {source.where} already: name another database")
            with outages_of(source), source.writer.begin() as old:
                source.take_time(old)
                return _copied(source, old, database, progress)
        finally:
            database.close()
    finally:
        registry.close()


def _copied(source: Database, old: Connection, target: Database, progress: Progress) -> list[Copied]:
    tables = metadata.sorted_tables
    total = sum(old.execute(select(func.count()).select_from(table)).scalar_one() for table in tables)
    with outages_of(target), target.alone():
        target.make_ready()
        with target.writer.begin() as new:
            target.take_time(new)
            _prepare(target, new)
            tell = _teller(progress, "copying", total)
            copied = [_digested(table, _written(target, new, table, _rows(old, table)), tell) for table in tables]
            target.take_stock(new)
            target.set_numbers(new, source.numbers(old))
            tell = _teller(progress, "checking", total)
            for table, told in zip(tables, copied, strict=True):
                found = _digested(table, _rows(new, table), tell)
                if found != told:
                    raise Unavailable(
                        f"{table.name} has {found.rows} rows in {target.where} with the checksum {found.digest[:16]}, and in "
                        f"{source.where} {told.rows} with {told.digest[:16]}: nothing was copied"
                    )
    return copied


def _teller(progress: Progress, doing: str, total: int) -> Callable[[int], None]:
    """Counts the rows that it is told of."""
    done = 0

    def tell(rows: int) -> None:
        nonlocal done
        done += rows
        progress(doing, done / max(1, total), done)

    return tell


def _prepare(target: Database, new: Connection) -> None:
    """The tables of the current schema, all of them empty."""
    found = revision(target, new)
    if found is None:
        migrate(new)
    elif found != REVISIONS[-1]:
        raise Rejected(f"{target.where} holds the registry of an older uplinkd: name an empty database")
    for table in metadata.sorted_tables:
        if new.execute(select(*table.primary_key.columns).limit(1)).first():
            raise Rejected(
                f"{target.where} is not empty, there are {table.name.replace('_', ' ')} in it: name a database without tables"
            )


def _rows(connection: Connection, table: Table) -> Iterator[list[Any]]:
    """All rows in batches, in the order of the primary key."""
    key = list(table.primary_key.columns)
    places = [list(table.columns).index(column) for column in key]
    page = select(table).order_by(*key).limit(_BATCH)
    last: tuple[Any, ...] | None = None
    while True:
        rows = connection.execute(page if last is None else page.where(tuple_(*key) > tuple_(*last))).all()
        yield [tuple(row) for row in rows]
        if len(rows) < _BATCH:
            return
        last = tuple(rows[-1][place] for place in places)


def _written(target: Database, new: Connection, table: Table, batches: Iterator[list[Any]]) -> Iterator[list[Any]]:
    names = [column.name for column in table.columns]
    for batch in batches:
        if batch:
            target.insert_many(new, table, [dict(zip(names, row, strict=True)) for row in batch])
        yield batch


def _digested(table: Table, batches: Iterator[list[Any]], tell: Callable[[int], None]) -> Copied:
    digest, count = hashlib.sha256(), 0
    for batch in batches:
        for row in batch:
            digest.update(repr(row).encode())
        count += len(batch)
        tell(len(batch))
    return Copied(table.name, count, digest.hexdigest())
