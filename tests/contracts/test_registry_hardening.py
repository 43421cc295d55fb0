"""Promises of the registry in SQLite that concern its file, its lock and the cost of a poll."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.core.model import Right
from uplinkd.registry import ImportRow, Registry, open_registry
from uplinkd.settings import Settings

PRODUCT = "a1Hardened"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data")


@pytest.fixture
def registry(settings: Settings) -> Iterator[Registry]:
    registry = open_registry(settings)
    registry.create_product("hardened", key=PRODUCT)
    yield registry
    registry.close()


def test_a_file_that_was_moved_away_is_an_outage(registry: Registry, settings: Settings) -> None:
    """Nothing is acknowledged that goes into a file which nobody will find again; and no empty one takes its place."""
    file = settings.data / "registry.sqlite"
    file.rename(settings.data / "elsewhere")
    with pytest.raises(Unavailable):
        registry.create_device(PRODUCT, "lamp-1")
    assert not file.exists()
    (settings.data / "elsewhere").rename(file)
    registry.create_device(PRODUCT, "lamp-1")


def test_another_programs_database_is_refused(settings: Settings) -> None:
    """No table is made beside those of somebody else."""
    settings.data.mkdir()
    connection = sqlite3.connect(settings.data / "registry.sqlite")
    connection.execute("CREATE TABLE songs (title)")
    connection.commit()
    with pytest.raises(Rejected, match="songs"):
        open_registry(settings)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("songs",)]
    connection.close()


def test_a_slow_source_of_rows_does_not_hold_the_registry(registry: Registry) -> None:
    """A fleet that trickles in from a pipe does not keep devices from their first login."""
    device = registry.create_device(PRODUCT, "lamp-1")
    reached, go_on = threading.Event(), threading.Event()

    def rows() -> Iterator[ImportRow]:
        for number in range(6000):
            yield ImportRow(number, PRODUCT, f"fleet-{number}", "s")
        reached.set()
        assert go_on.wait(30)

    work = threading.Thread(target=lambda: registry.import_devices(rows()))
    work.start()
    assert reached.wait(30)
    try:
        started = time.monotonic()
        registry.activate([(device.id, 1000)])
        assert time.monotonic() - started < 1
    finally:
        go_on.set()
        work.join()


def test_a_poll_costs_the_same_however_many_changes_are_kept(registry: Registry, settings: Settings) -> None:
    """Every worker polls four times a second: with 100,000 changes kept, a quiet poll takes less than a millisecond."""
    connection = sqlite3.connect(settings.data / "registry.sqlite")
    connection.executemany(
        "INSERT INTO changes (product_key, device_id) VALUES ('x', ?)", ((n,) for n in range(99_999))
    )
    connection.commit()
    connection.close()
    cursor = registry.changes_cursor()
    started = time.perf_counter()
    for _ in range(50):
        registry.changes(cursor)
    assert (time.perf_counter() - started) / 50 < 0.001


def test_a_prefix_has_its_own_case(registry: Registry) -> None:
    """Device names differ by case, so prefixes do."""
    for name in ("lamp-1", "LAMP-2"):
        registry.create_device(PRODUCT, name)
    assert [device.name for device in registry.devices(PRODUCT, prefix="lamp")] == ["lamp-1"]


def test_a_default_class_can_come_back_to_a_full_product(registry: Registry) -> None:
    """The defaults do not count against the 50, also when one was removed and is added again."""
    registry.remove_topic_class(PRODUCT, "update")
    for number in range(50):
        registry.add_topic_class(PRODUCT, f"custom/{number}", Right.BOTH)
    registry.add_topic_class(PRODUCT, "update", Right.PUBLISH)
