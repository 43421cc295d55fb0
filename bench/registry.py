"""What a registry of a million devices costs, in SQLite and in PostgreSQL: to import it, to move it, to find a device, to list and
search it, and how soon another gateway hears of a change."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pg8000.dbapi

from uplinkd.core.databases import place_of
from uplinkd.registry import ImportRow, Registry, Sighting, open_registry
from uplinkd.registry.copy import copy_registry
from uplinkd.settings import Settings

__all__ = ["ACTS", "measure"]

PRODUCT = "registry"
SERVER = os.environ.get("UPLINKD_TEST_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432/").replace("+psycopg", "")
DEVICES = int(os.environ.get("UPLINKD_BENCH_DEVICES", "1000000"))
_TIMEOUT = 600_000
_LOOK_UPS, _PAGES, _LIMIT = 3000, 50, 50
_SIGHTED = 5000
ACTS = {
    "import": "import, s",
    "copy": "copied to PostgreSQL and checked, s",
    "by_name": "look-ups by key and name, /s (one thread)",
    "by_id": "look-ups by number, /s (one thread)",
    "prefix": "a page of 50 by a prefix, ms",
    "first": "the first page, ms",
    "deep": "a page 900,000 devices on, ms",
    "census": "count of all states, ms",
    "sighted": "5,000 signs of life recorded, ms",
    "poll": "a poll for changes, ms",
}


def measure(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """`{"registry": {"devices": …, "sqlite": {act: figure}, "postgresql": {…}}}`: medians, see ACTS for the units."""
    folder.mkdir()
    found: dict[str, Any] = {"devices": DEVICES}
    sqlite = Settings(data=folder / "data")
    say(f"registry: {DEVICES:,} devices in SQLite …")
    found["sqlite"] = _measured(sqlite)
    with _database() as url:
        say(f"registry: {DEVICES:,} devices in PostgreSQL …")
        found["postgresql"] = _measured(Settings(data=folder / "other", database_url=url))
    with _database() as url:
        say("registry: from SQLite to PostgreSQL …")
        begun = time.perf_counter()
        copy_registry(sqlite, Settings(data=sqlite.data, database_url=url), lambda *_: None)
        found["postgresql"]["copy"] = time.perf_counter() - begun
    return {"registry": found}


@contextlib.contextmanager
def _database() -> Iterator[str]:
    place = place_of(SERVER + "postgres")
    name = f"uplinkd_bench_{os.getpid()}"
    host, port = place.hosts[0]
    connection = pg8000.dbapi.connect(place.user, host, place.name, port, place.password, ssl_context=False)
    connection.autocommit = True
    try:
        cursor = connection.cursor()
        cursor.execute(f"CREATE DATABASE {name}")
        try:
            yield SERVER + name
        finally:
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        connection.close()


def _measured(settings: Settings) -> dict[str, float]:
    registry = open_registry(settings)
    try:
        registry.create_product("a million devices", key=PRODUCT)
        begun = time.perf_counter()
        report = registry.import_devices(
            ImportRow(line, PRODUCT, _name(line), f"secret{line:026}") for line in range(DEVICES)
        )
        taken = time.perf_counter() - begun
        if report.created != DEVICES:
            raise SystemExit(f"the import made {report.created} devices, not {DEVICES}: {report.bad[:1]}")
        return {"import": taken, **_asked(registry)}
    finally:
        registry.close()


def _asked(registry: Registry) -> dict[str, float]:
    choice = random.Random(7)
    first = registry.device(PRODUCT, _name(0)).id
    now = round(time.time() * 1000)

    def rate(act: Callable[[int], object]) -> float:
        numbers = [choice.randrange(DEVICES) for _ in range(_LOOK_UPS)]
        begun = time.perf_counter()
        for number in numbers:
            if act(number) is None:
                raise SystemExit(f"device {number} was not found")
        return _LOOK_UPS / (time.perf_counter() - begun)

    def median(act: Callable[[], object], times: int = _PAGES) -> float:
        took = []
        for _ in range(times):
            begun = time.perf_counter()
            act()
            took.append(time.perf_counter() - begun)
        return statistics.median(took) * 1000

    def page(**options: Any) -> None:
        if len(registry.page(PRODUCT, limit=_LIMIT, timeout=_TIMEOUT, **options)) != _LIMIT:
            raise SystemExit(f"a page is not full: {options}")

    def seen() -> None:
        start = choice.randrange(DEVICES - _SIGHTED)
        signs = [Sighting(first + start + each, now, "192.0.2.1") for each in range(_SIGHTED)]
        registry.told([each.id for each in registry.sighted(signs, now=now, timeout=_TIMEOUT)])

    cursor = registry.changes_cursor()
    return {
        "by_name": rate(lambda number: registry.find_device(PRODUCT, _name(number))),
        "by_id": rate(lambda number: registry.find_device_by_id(first + number)),
        "prefix": median(lambda: page(prefix=_name(choice.randrange(DEVICES))[:-2])),
        "first": median(page),
        "deep": median(lambda: page(after=_name(DEVICES * 9 // 10))),
        "census": median(lambda: registry.census(PRODUCT, timeout=_TIMEOUT), 3),
        "sighted": median(seen, 5),
        "poll": median(lambda: registry.changes(cursor), 200),
    }


def _name(number: int) -> str:
    return f"device{number:07}"
