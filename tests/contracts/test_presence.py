"""Who is online: each change is decided once, whichever worker writes it, and stored once as a message, whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event

from tests.databases import IN_TURN
from tests.house import freeze, until
from tests.room import Crew
from uplinkd.core.errors import Unavailable
from uplinkd.core.model import Device, DeviceName, Message, Origin, ProductKey, State, StatusChange
from uplinkd.engine import Done, Publisher, Query, open_publisher, open_reader
from uplinkd.engine.bus import NatsBus
from uplinkd.engine.embedded import EmbeddedServer
from uplinkd.presence import Presence, status_message
from uplinkd.registry import Registry, Sighting, open_registry
from uplinkd.registry.cache import DeviceCache, Entry
from uplinkd.registry.sql import SqlRegistry
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks

PRODUCT = "a1Presence"
NOW = 1_800_000_000_000
TIMEOUT = 600_000


in_each_database = pytest.mark.parametrize("database_url", IN_TURN, indirect=True)


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str:
    """SQLite's, where a test does not ask for each."""
    return request.getfixturevalue("postgresql") if getattr(request, "param", "") == "postgresql" else ""


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(data=tmp_path, nats_listen="", database_url=database_url)


@pytest.fixture
def registry(settings: Settings) -> Iterator[Registry]:
    registry = open_registry(settings)
    registry.create_product("presence", key=PRODUCT)
    yield registry
    registry.close()


def seen(registry: Registry, *sightings: Sighting, now: int | None = None) -> list[StatusChange]:
    at = max(each.at for each in sightings) if now is None else now
    return registry.sighted(sightings, now=at, timeout=TIMEOUT)


def words(changes: list[StatusChange]) -> list[str]:
    return ["online" if change.online else "offline" for change in changes]


def history(registry: Registry) -> list[StatusChange]:
    """All that waits to be told, in the order in which it is to be told; it is told thereby."""
    told: list[StatusChange] = []
    waiting = registry.untold(1000)
    while waiting:
        told += waiting
        waiting = registry.told([change.id for change in waiting])
    return sorted(told, key=lambda change: change.id)


def state(registry: Registry, device: Device, now: int) -> State:
    return registry.device(PRODUCT, device.name).state(now=now, online_timeout=TIMEOUT)


def begun(device: Device, at: int, stamp: int, worker: str = "1") -> Sighting:
    return Sighting(device.id, at, "192.0.2.1", worker, stamp)


def ended(device: Device, at: int, stamp: int, worker: str = "1") -> Sighting:
    return Sighting(device.id, at, "", worker, stamp, ended=True)


def asked(device: Device, at: int) -> Sighting:
    return Sighting(device.id, at, "192.0.2.2")


# -- the registry decides what a change is


@in_each_database
def test_the_first_sign_of_life_is_a_change_and_the_second_is_none(registry: Registry) -> None:
    """The change has all that is told of it, and is kept until it was told."""
    device = registry.create_device(PRODUCT, "lamp-1")
    (change,) = seen(registry, asked(device, NOW))
    assert change == StatusChange(change.id, device.product_key, device.name, True, NOW, NOW, "192.0.2.2")
    assert seen(registry, asked(device, NOW + 5000)) == []
    assert registry.untold(10) == [change]
    assert registry.told([change.id]) == []
    assert registry.untold(10) == []


@in_each_database
def test_whoever_writes_first_makes_the_change(settings: Settings, registry: Registry) -> None:
    """Eight workers see the same fifty devices come and go at once: each change is made by one of them."""
    devices = [registry.create_device(PRODUCT) for _ in range(50)]
    gate = threading.Barrier(8)

    def work(number: int) -> list[StatusChange]:
        mine = open_registry(settings)
        try:
            gate.wait(10)
            return seen(mine, *(asked(device, NOW + number) for device in devices))
        finally:
            mine.close()

    with ThreadPoolExecutor(8) as threads:
        found = [change for changes in threads.map(work, range(8)) for change in changes]
    assert sorted(change.device_name for change in found) == sorted(device.name for device in devices)
    late = NOW + 10 + TIMEOUT

    def sweep(_: int) -> list[StatusChange]:
        mine = open_registry(settings)
        try:
            gate.wait(10)
            return mine.expired(now=late, timeout=TIMEOUT, limit=1000)
        finally:
            mine.close()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(sweep, range(8)))
    told = history(registry)
    assert len(told) == 100
    assert words(told) == ["online"] * 50 + ["offline"] * 50


@in_each_database
def test_each_of_several_changes_is_seen_and_they_are_told_in_order(registry: Registry) -> None:
    """A device that comes, goes and comes again within one write: three changes. The next is handed out once the one before
    was told, or whoever hears of them could be left with the wrong one."""
    device, other = (registry.create_device(PRODUCT) for _ in range(2))
    changes = seen(registry, begun(device, NOW, 1), ended(device, NOW, 1), asked(other, NOW), begun(device, NOW, 2))
    assert [(change.device_name, change.online) for change in changes] == [(device.name, True), (other.name, True)]
    assert seen(registry, ended(device, NOW, 2)) == []
    assert registry.untold(10) == changes
    first = changes[0].id
    (second,) = registry.told([first, changes[1].id])
    assert (second.device_name, second.online) == (device.name, False)
    assert registry.told([first]) == []
    assert registry.untold(10) == [second]
    (third,) = registry.told([second.id])
    (fourth,) = registry.told([third.id])
    assert words([third, fourth]) == ["online", "offline"]
    assert registry.told([fourth.id]) == registry.untold(10) == []


@in_each_database
def test_sessions_are_ordered_by_their_stamp(registry: Registry) -> None:
    """What workers write late of an older session is passed over: its begin, and its end."""
    device = registry.create_device(PRODUCT)
    assert words(seen(registry, begun(device, NOW, 20, "2"))) == ["online"]
    assert seen(registry, begun(device, NOW + 1, 10, "1")) == []
    assert registry.device(PRODUCT, device.name).session == "2"
    assert seen(registry, ended(device, NOW + 2, 10, "1")) == []
    assert state(registry, device, NOW + 3) is State.ONLINE
    seen(registry, ended(device, NOW + 3, 20, "2"))
    assert registry.device(PRODUCT, device.name).session == ""
    assert seen(registry, begun(device, NOW + 4, 15, "1")) == []
    assert words(history(registry)) == ["online", "offline"]
    assert state(registry, device, NOW + 5) is State.OFFLINE


@in_each_database
def test_https_and_mqtt_are_one_presence(registry: Registry) -> None:
    """A session beside a request is no change; the end of one leaves the other; the address is that of the last sign."""
    device = registry.create_device(PRODUCT)
    assert words(seen(registry, asked(device, NOW))) == ["online"]
    assert seen(registry, begun(device, NOW + 1000, 1)) == []
    shown = registry.device(PRODUCT, device.name)
    assert (shown.session, shown.address, shown.last_seen) == ("1", "192.0.2.1", NOW + 1000)
    assert registry.expired(now=NOW + 10 * TIMEOUT, timeout=TIMEOUT, limit=10) == []
    assert seen(registry, asked(device, NOW + 10 * TIMEOUT)) == []
    assert seen(registry, ended(device, NOW + 10 * TIMEOUT + 1000, 1)) == []
    assert state(registry, device, NOW + 10 * TIMEOUT + 1000) is State.ONLINE
    registry.expired(now=NOW + 11 * TIMEOUT + 1, timeout=TIMEOUT, limit=10)
    last = history(registry)[-1]
    assert (last.online, last.last_seen, last.address) == (False, NOW + 10 * TIMEOUT + 1000, "192.0.2.2")


@pytest.mark.parametrize("act", ["disable", "delete", "delete the product"])
@in_each_database
def test_what_takes_a_device_away_makes_an_offline_change(registry: Registry, act: str) -> None:
    """Of those that are online, in the same transaction; of others nothing is told."""
    online, silent = registry.create_device(PRODUCT), registry.create_device(PRODUCT)
    seen(registry, begun(online, NOW, 1))
    history(registry)
    for device in (online, silent):
        match act:
            case "disable":
                registry.set_enabled(PRODUCT, device.name, False)
                registry.set_enabled(PRODUCT, device.name, False)
            case "delete":
                registry.delete_device(PRODUCT, device.name)
    if act == "delete the product":
        registry.delete_product(PRODUCT, with_devices=True)
    assert [(change.device_name, change.online) for change in history(registry)] == [(online.name, False)]
    assert seen(registry, asked(online, NOW + 1), begun(online, NOW + 2, 2)) == []
    assert registry.untold(10) == []


@in_each_database
def test_a_disabled_device_is_online_again_only_once_it_is_heard_of(registry: Registry) -> None:
    """Disabling kills its tokens: enabled again, it has to come back before it counts as online, by message and by look-up."""
    device = registry.create_device(PRODUCT)
    seen(registry, asked(device, NOW))
    registry.set_enabled(PRODUCT, device.name, False)
    registry.set_enabled(PRODUCT, device.name, True)
    assert words(history(registry)) == ["online", "offline"]
    assert state(registry, device, NOW + 1000) is State.OFFLINE
    assert words(seen(registry, asked(device, NOW + 2000))) == ["online"]
    assert state(registry, device, NOW + 2000) is State.ONLINE


@in_each_database
def test_who_is_silent_expires_and_nobody_else(registry: Registry) -> None:
    """At the timeout and not before, once, at most as many as asked for."""
    devices = [registry.create_device(PRODUCT) for _ in range(5)]
    seen(registry, *(asked(device, NOW + number * 1000) for number, device in enumerate(devices)), now=NOW + 4000)
    history(registry)
    assert registry.expired(now=NOW + TIMEOUT, timeout=TIMEOUT, limit=10) == []
    first, second = (registry.expired(now=NOW + TIMEOUT + 2500, timeout=TIMEOUT, limit=2) for _ in range(2))
    assert (len(first), len(second)) == (2, 1)
    silent = [(device.name, NOW + TIMEOUT + 2500, NOW + number * 1000) for number, device in enumerate(devices[:3])]
    assert sorted((each.device_name, each.at, each.last_seen) for each in first + second) == sorted(silent)
    assert registry.expired(now=NOW + TIMEOUT + 2500, timeout=TIMEOUT, limit=2) == []


@in_each_database
def test_a_dead_workers_sessions_end_and_no_others(registry: Registry) -> None:
    """Not what began anew elsewhere, not who has reported over HTTPS lately; also the session of a device that is disabled, or
    it would count as online for ever once it is enabled."""
    lost, moved, both, other, disabled = (registry.create_device(PRODUCT) for _ in range(5))
    seen(registry, *(begun(device, NOW, 1) for device in (lost, moved, both, disabled)), begun(other, NOW, 1, "2"))
    seen(registry, begun(moved, NOW, 2, "2"), asked(both, NOW))
    registry.set_enabled(PRODUCT, disabled.name, False)
    history(registry)
    changes = registry.abandoned("1", now=NOW + 1000, timeout=TIMEOUT)
    assert [(change.device_name, change.online) for change in changes] == [(lost.name, False)]
    assert registry.abandoned("1", now=NOW + 1000, timeout=TIMEOUT) == []
    registry.set_enabled(PRODUCT, disabled.name, True)
    states = [state(registry, device, NOW + TIMEOUT - 1) for device in (lost, moved, both, other, disabled)]
    assert states == [State.OFFLINE, State.ONLINE, State.ONLINE, State.ONLINE, State.OFFLINE]


@in_each_database
def test_before_the_first_worker_all_sessions_end_and_their_order_begins_anew(registry: Registry) -> None:
    """After a reboot the monotonic clock begins at 0 again: its small stamps must count."""
    devices = [registry.create_device(PRODUCT) for _ in range(3)]
    seen(registry, *(begun(device, NOW, 10**15 + number, str(number)) for number, device in enumerate(devices)))
    history(registry)
    assert words(registry.abandoned(None, now=NOW + 1000, timeout=TIMEOUT)) == ["offline"] * 3
    assert len(history(registry)) == 3
    assert words(seen(registry, begun(devices[0], NOW + 2000, 5))) == ["online"]


@pytest.mark.parametrize("by", [-86_400_000, -300_000, 300_000, 86_400_000])
@in_each_database
def test_the_times_of_who_is_online_follow_the_clock(registry: Registry, by: int) -> None:
    """Whoever was online stays so for as long as it would have; whoever is silent goes when it would have gone. What was
    recorded in the last moments may be by the new clock already, and stays as it is."""
    silent, fresh, newer = (registry.create_device(PRODUCT) for _ in range(3))
    seen(registry, asked(silent, NOW - 400_000), asked(fresh, NOW - 1000), now=NOW)
    now = NOW + by
    seen(registry, asked(newer, now + 2000), now=now + 2000)
    registry.clock_jumped(by, now=now + 3000, lately=3000)
    seen_at = [registry.device(PRODUCT, each.name).last_seen for each in (silent, fresh, newer)]
    assert seen_at[0] == now - 400_000
    assert abs((seen_at[1] or 0) - now) <= 3000
    assert abs((seen_at[2] or 0) - now) <= 3000
    history(registry)
    assert registry.expired(now=now + 199_000, timeout=TIMEOUT, limit=10) == []
    (gone,) = registry.expired(now=now + 201_000, timeout=TIMEOUT, limit=10)
    assert gone.device_name == silent.name
    assert registry.expired(now=now + 590_000, timeout=TIMEOUT, limit=10) == []
    assert len(registry.expired(now=now + 610_000, timeout=TIMEOUT, limit=10)) == 2


@in_each_database
def test_a_time_from_the_future_does_not_keep_a_device_online(registry: Registry) -> None:
    """The server's clock was a year ahead when a device was heard; set right, the device counts by its next request."""
    device = registry.create_device(PRODUCT)
    ahead = NOW + 365 * 86_400_000
    seen(registry, asked(device, ahead))
    registry.expired(now=ahead + TIMEOUT + 1, timeout=TIMEOUT, limit=10)
    registry.clock_jumped(0, now=NOW, lately=0)
    seen(registry, asked(device, NOW))
    assert registry.device(PRODUCT, device.name).last_seen == NOW
    registry.expired(now=NOW + TIMEOUT + 1, timeout=TIMEOUT, limit=10)
    assert words(history(registry)) == ["online", "offline", "online", "offline"]


@in_each_database
def test_a_time_beyond_now_counts_as_now(registry: Registry) -> None:
    """What a worker heard before the clock was set back and writes after it."""
    device = registry.create_device(PRODUCT)
    (change,) = seen(registry, asked(device, NOW + 3_600_000), now=NOW)
    assert (change.at, change.last_seen) == (NOW, NOW)
    assert registry.device(PRODUCT, device.name).last_seen == NOW


@in_each_database
def test_a_gateway_ends_its_own_sessions_alone(registry: Registry) -> None:
    """All of its workers', and of no other gateway, though its name begins alike or differs by a letter's case."""
    holders = ("gate-1.0", "gate-1.1", "gate-10.0", "Gate-1.0", "gate_1.0")
    devices = [registry.create_device(PRODUCT) for _ in holders]
    for stamp, (device, holder) in enumerate(zip(devices, holders, strict=True), 1):
        seen(registry, begun(device, NOW, stamp, holder))
    registry.set_enabled(PRODUCT, devices[1].name, False)
    history(registry)
    assert registry.session_holders() == set(holders)
    assert registry.last_session() == len(holders)
    (change,) = registry.abandoned("gate-1.", now=NOW, timeout=TIMEOUT)
    assert change.device_name == devices[0].name
    assert registry.session_holders() == set(holders[2:])
    assert registry.last_session() == len(holders)


@in_each_database
def test_a_registry_without_sessions_says_so(registry: Registry) -> None:
    registry.create_device(PRODUCT)
    assert (registry.session_holders(), registry.last_session()) == (set(), 0)
    assert registry.abandoned("gate-1.", now=NOW, timeout=TIMEOUT) == []


@in_each_database
def test_whatever_gateways_write_at_once_is_written(settings: Settings, registry: Registry) -> None:
    """Sessions that begin and end, silence, a gateway that starts, changes that were told, by four at once: nobody is refused, nobody
    waits for ever, and each device is what it was told to be last."""
    devices = [registry.create_device(PRODUCT) for _ in range(40)]
    gate = threading.Barrier(4)

    def work(number: int) -> None:
        mine = open_registry(settings)
        order = devices if number % 2 else devices[::-1]
        try:
            gate.wait(10)
            for turn in range(1, 11):
                stamp = turn * 10 + number
                at = NOW + stamp
                told = seen(mine, *(begun(device, at, stamp, f"gate-{number}.0") for device in order))
                told += seen(mine, *(ended(device, at, stamp, f"gate-{number}.0") for device in order[::2]))
                told += mine.expired(now=at, timeout=TIMEOUT, limit=100)
                told += mine.abandoned(f"gate-{number}.", now=at, timeout=TIMEOUT) if turn == 5 else []
                mine.told([change.id for change in told])
        finally:
            mine.close()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [None] * 4
    assert registry.last_session() == 103
    assert registry.session_holders() <= {f"gate-{number}.0" for number in range(4)}
    for device in devices:
        seen(registry, begun(device, NOW + 200, 200, "last.0"))
    assert registry.session_holders() == {"last.0"}
    last = {change.device_name: change.online for change in history(registry)}
    assert not [name for name, online in last.items() if not online]
    assert all(state(registry, device, NOW + 201) is State.ONLINE for device in devices)


# -- a large fleet


def large_fleet(settings: Settings, registry: Registry, count: int, **values: int) -> None:
    """`count` devices, written directly: nobody looks at their secrets."""
    device = registry.create_device(PRODUCT, "first")
    columns = {"enabled": 1, "generation": 1, "created": NOW} | values
    with contextlib.closing(sqlite3.connect(settings.database.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute(
            f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count - 1}) "
            f"INSERT INTO devices (product_id, name, secret, {', '.join(columns)}) "
            f"SELECT product_id, 'd' || i, secret, {', '.join(str(value) for value in columns.values())} "
            f"FROM n, devices WHERE id = {device.id}"
        )
        if values:
            assignments = ", ".join(f"{name} = {value}" for name, value in values.items())
            connection.execute(f"UPDATE devices SET {assignments} WHERE id = {device.id}")


def plans(registry: Registry, act: Callable[[], object]) -> list[str]:
    """How SQLite looks up what each statement of `act` asks for."""
    assert isinstance(registry, SqlRegistry)
    statements: list[tuple[str, Any]] = []

    def note(_c: Any, _k: Any, statement: str, parameters: Any, _x: Any, many: bool) -> None:
        statements.append((statement, parameters[0] if many else parameters))

    event.listen(registry.database.engine, "before_cursor_execute", note)
    event.listen(registry.database.writer, "before_cursor_execute", note)
    act()
    event.remove(registry.database.engine, "before_cursor_execute", note)
    event.remove(registry.database.writer, "before_cursor_execute", note)
    found = []
    with registry.database.engine.connect() as connection:
        for statement, parameters in statements:
            if statement.startswith(("SELECT", "UPDATE", "DELETE")):
                rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
                found += [str(row[-1]) for row in rows]
    return found


def test_no_question_about_presence_reads_the_whole_fleet(settings: Settings, registry: Registry) -> None:
    """Silence is looked up in the index of who is online, a device by its number, a change by its device."""
    large_fleet(settings, registry, 2000)
    device = registry.device(PRODUCT, "first")
    seen(registry, asked(device, NOW))
    quiet = plans(registry, lambda: registry.expired(now=NOW, timeout=TIMEOUT, limit=100))
    assert quiet
    assert all("USING" in plan and "ix_devices_online" in plan and "SEARCH" in plan for plan in quiet)
    waiting = [change.id for change in registry.untold(10)]
    for act in (
        lambda: registry.expired(now=NOW + TIMEOUT + 1, timeout=TIMEOUT, limit=100),
        lambda: seen(registry, begun(device, NOW, 1), ended(device, NOW, 1)),
        lambda: registry.told(waiting),
        lambda: registry.abandoned("gate-1.0", now=NOW, timeout=TIMEOUT),
        lambda: registry.abandoned("gate-1.", now=NOW, timeout=TIMEOUT),
        registry.session_holders,
        registry.last_session,
    ):
        looked = plans(registry, act)
        assert looked
        assert not [plan for plan in looked if plan.startswith("SCAN devices")]
        assert not [plan for plan in looked if plan.startswith("SCAN status_changes") and "INDEX" not in plan], looked


def test_a_hundred_thousand_who_fall_silent_are_found_by_query(settings: Settings, registry: Registry) -> None:
    """Nobody holds a timer for each: while all are online the look costs next to nothing, and a page of changes is quick."""
    large_fleet(settings, registry, 100_000, online=1, requested=NOW, last_seen=NOW)
    started = time.monotonic()
    for _ in range(20):
        assert registry.expired(now=NOW + TIMEOUT, timeout=TIMEOUT, limit=1000) == []
    assert time.monotonic() - started < 1
    started = time.monotonic()
    found = 0
    while changes := registry.expired(now=NOW + TIMEOUT + 1, timeout=TIMEOUT, limit=1000):
        assert len(changes) == 1000
        found += len(changes)
        if found == 20_000:
            break
    assert time.monotonic() - started < 5
    assert threading.active_count() < 20


# -- a data folder of an older version


def test_a_filled_registry_of_schema_0001_keeps_what_it_knows(settings: Settings, registry: Registry) -> None:
    """lastSeen, states and secrets; who is online is told at its next sign of life, who is not is not told of."""
    from alembic import command
    from alembic.config import Config

    inactive, lately, silent, disabled = (registry.create_device(PRODUCT) for _ in range(4))
    devices = [inactive, lately, silent, disabled]
    for device in devices[1:]:
        registry.activate([(device.id, NOW - 86_400_000)])
    seen(registry, asked(lately, NOW), asked(disabled, NOW), asked(silent, NOW - 86_400_000), now=NOW)
    registry.set_enabled(PRODUCT, disabled.name, False)
    before = [registry.device(PRODUCT, device.name) for device in devices]
    registry.close()

    path = Path(settings.database.removeprefix("sqlite:///"))
    new = path.with_name("new.sqlite")
    path.rename(new)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    config = Config()
    config.set_main_option("script_location", "uplinkd.registry:migrations")
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    with contextlib.closing(sqlite3.connect(path)) as old, old:
        old.execute("ATTACH ? AS new", (str(new),))
        for table in ("signing_keys", "products", "topic_classes", "devices"):
            columns = ", ".join(row[1] for row in old.execute(f"PRAGMA main.table_info({table})"))
            old.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM new.{table}")

    migrated = open_registry(settings)
    try:
        found = [migrated.device(PRODUCT, device.name) for device in devices]
        assert [(each.secret, each.last_seen, each.activated, each.enabled) for each in found] == [
            (each.secret, each.last_seen, each.activated, each.enabled) for each in before
        ]
        states = [each.state(now=NOW + 1000, online_timeout=TIMEOUT) for each in found]
        assert states == [State.INACTIVE, State.ONLINE, State.OFFLINE, State.DISABLED]
        assert migrated.abandoned(None, now=NOW + 1000, timeout=TIMEOUT) == migrated.untold(10) == []
        assert migrated.expired(now=NOW + 1000, timeout=TIMEOUT, limit=10) == []
        (change,) = seen(migrated, asked(lately, NOW + 2000))
        assert (change.device_name, change.online) == (lately.name, True)
    finally:
        migrated.close()


# -- each change is stored once


class Troubled:
    """A registry in front of the real one that can be away, before or after it has done what was asked."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.away = False
        self.written: list[int] = []

    def __getattr__(self, name: str) -> Any:
        if self.away:
            raise Unavailable("the registry is away")
        return getattr(self.registry, name)

    def sighted(self, sightings: Sequence[Sighting], *, now: int, timeout: int) -> list[StatusChange]:
        found: list[StatusChange] = self.__getattr__("sighted")(sightings, now=now, timeout=timeout)
        self.written += [each.at for each in sightings]
        return found


class Dead:
    """A publisher that takes everything and never says anything: its worker has died."""

    connected = True

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def publish(
        self, subject: bytes, payload: bytes, done: Done, origin: Origin = Origin.HTTPS, key: str = ""
    ) -> None: ...


@dataclass
class Town:
    """A real engine, a registry, and workers' presences with a clock that can be set."""

    settings: Settings
    registry: Registry
    server: EmbeddedServer
    publisher: Publisher
    bus: NatsBus
    wall: float = NOW / 1000
    monotonic: float = 5000.0
    made: list[Presence] = field(default_factory=list)

    def presence(
        self, worker: str = "0", *, registry: Any = None, engine: Any = None, settings: Settings | None = None
    ) -> Presence:
        made = Presence(
            settings or self.settings,
            registry or self.registry,
            engine or self.publisher,
            self.bus,
            worker=worker,
            peers=Crew(self.bus, worker),
            clock=lambda: self.wall,
            monotonic=lambda: self.monotonic,
        )
        self.made.append(made)
        return made

    def later(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds

    @property
    def now(self) -> int:
        return round(self.wall * 1000)

    async def entry(self, name: str | None = None) -> Entry:
        cache = DeviceCache(self.registry)
        found = await cache.load(self.registry.create_device(PRODUCT, name).id)
        await cache.close()
        assert found
        return found

    async def stored(self) -> list[Message]:
        reader = await open_reader(self.server.access)
        found = await reader.latest(Query(), 1000)
        await reader.close()
        return found

    async def told(self) -> list[tuple[str, str]]:
        """(device, status) of each message that is stored, in its order."""
        documents = [json.loads(message.payload) for message in await self.stored()]
        return [(each["deviceName"], each["status"]) for each in documents]


@pytest.fixture
async def town(settings: Settings, registry: Registry) -> AsyncIterator[Town]:
    server = EmbeddedServer.start(settings)
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    bus = NatsBus(server.access, "test")
    running = asyncio.create_task(bus.run())
    await until(lambda: bus.connected and publisher.connected)
    town = Town(settings, registry, server, publisher, bus)
    yield town
    for presence in town.made:
        presence._publishing.clear()  # of those that died
        await presence.close()
    await end_tasks(running)
    await publisher.stop()
    town.server.stop()


async def settle(presence: Presence, registry: Registry) -> None:
    """Flush until all that this presence has under way is told."""
    end = time.monotonic() + 5
    await presence.flush()
    while presence._publishing:
        assert time.monotonic() < end
        await asyncio.sleep(0.005)
        await presence.flush()


async def sweep(town: Town, presence: Presence, looks: int) -> None:
    for _ in range(looks):
        town.later(3)
        await presence.sweep()
        await settle(presence, town.registry)


async def test_a_change_is_stored_in_the_platforms_form(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """On /as/mqtt/status/PK/DN, with all members, local time and UTC of the change and of the last sign of life."""
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:
        presence, entry = town.presence(), await town.entry("lamp.1")
        presence.saw(entry, NOW + 7, "192.0.2.7")
        town.later(0.25)
        await settle(presence, town.registry)
    finally:
        monkeypatch.undo()
        time.tzset()
    (message,) = await town.stored()
    assert (message.topic, message.origin) == (f"/as/mqtt/status/{PRODUCT}/lamp.1", Origin.STATUS)
    assert (message.product_key, message.device_name) == (PRODUCT, "lamp.1")
    assert json.loads(message.payload) == {
        "status": "online",
        "productKey": PRODUCT,
        "deviceName": "lamp.1",
        "time": "2027-01-15 16:00:00.250",
        "utcTime": "2027-01-15T08:00:00.250Z",
        "lastTime": "2027-01-15 16:00:00.007",
        "utcLastTime": "2027-01-15T08:00:00.007Z",
        "clientIp": "192.0.2.7",
    }
    assert town.registry.untold(10) == []


@pytest.mark.parametrize(("zone", "local"), [("UTC", "08"), ("America/Sao_Paulo", "05"), ("Asia/Kolkata", "13:30")])
def test_local_times_are_those_of_the_servers_zone(zone: str, local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also zones with half hours; UTC stays as it is."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        document = json.loads(
            status_message(StatusChange(1, ProductKey("a"), DeviceName("b"), False, NOW, NOW - 1, ""))
        )
    finally:
        monkeypatch.undo()
        time.tzset()
    assert document["status"] == "offline"
    assert re.fullmatch(rf"2027-01-15 {local}[0-9:]*\.000", document["time"])
    assert (document["utcTime"], document["utcLastTime"]) == ("2027-01-15T08:00:00.000Z", "2027-01-15T07:59:59.999Z")


async def test_two_workers_never_tell_a_change_twice(town: Town) -> None:
    """They see the same devices in the same moments, and the one that sweeps keeps sweeping."""
    workers = [town.presence("0"), town.presence("1")]
    entries = [await town.entry(f"lamp-{number}") for number in range(20)]
    for turn in range(3):
        for worker, entry in itertools.product(workers, entries):
            worker.stands(entry, town.now, "192.0.2.1", 10 * turn + 1)
        await asyncio.gather(*(worker.flush() for worker in workers))
        for worker, entry in itertools.product(workers, entries):
            worker.ended(entry, town.now, 10 * turn + 1)
        await asyncio.gather(*(worker.flush() for worker in workers), workers[0].sweep())
        town.later(3)
    for _ in range(10):
        for worker in workers:
            await settle(worker, town.registry)
        await workers[0].sweep()
        town.later(3)
    assert town.registry.untold(10) == []
    told = await town.told()
    for entry in entries:
        mine = [status for name, status in told if name == entry.device.name]
        assert mine == ["online", "offline"] * (len(mine) // 2), mine
        assert mine


async def test_changes_of_one_device_are_told_in_their_order(town: Town) -> None:
    """Whichever workers make them, and though the first one fails: the last message says how it is."""
    first, second = town.presence("1", engine=Dead()), town.presence("2")
    sweeper, entry = town.presence("0"), await town.entry("lamp")
    first.stands(entry, town.now, "192.0.2.1", 1)
    await first.flush()
    second.ended(entry, town.now, 1)
    second.stands(entry, town.now, "192.0.2.1", 2)
    await settle(second, town.registry)
    assert await town.told() == []
    await sweep(town, sweeper, 3)
    assert await town.told() == [("lamp", "online"), ("lamp", "offline"), ("lamp", "online")]
    assert town.registry.untold(10) == []


@pytest.mark.parametrize("where", ["before the publish", "after it"])
async def test_the_death_of_a_worker_neither_loses_nor_doubles_a_change(town: Town, where: str) -> None:
    """Between the record and the publish: the sweep tells it. Between the publish and the note of it: it was told once."""
    dying = town.presence("1", engine=Dead() if where == "before the publish" else None)
    sweeper, entries = town.presence("0"), [await town.entry(f"lamp-{number}") for number in range(5)]
    for number, entry in enumerate(entries):
        dying.stands(entry, town.now, "192.0.2.1", number + 1)
        if number % 2:
            dying.ended(entry, town.now, number + 1)
    await dying.flush()
    if where == "after it":
        await until(lambda: len(dying._told) == 5)
    dying._told.clear()
    await sweep(town, sweeper, 4)
    told = await town.told()
    for number, entry in enumerate(entries):
        mine = [status for name, status in told if name == entry.device.name]
        assert mine == (["online", "offline"] if number % 2 else ["online"])
    assert town.registry.untold(10) == []


async def test_what_was_stored_is_known_again_in_another_time_zone(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may be started anew with TZ set; the change was told all the same."""
    dying, entry = town.presence("1"), await town.entry()
    dying.saw(entry, town.now, "192.0.2.1")
    await dying.flush()
    await until(lambda: dying._told)
    dying._told.clear()
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        await sweep(town, town.presence("0"), 3)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert len(await town.told()) == 1
    assert town.registry.untold(10) == []


@pytest.mark.slow
async def test_while_the_engine_is_away_changes_wait_and_are_told_once_it_is_back(town: Town) -> None:
    """Killed, and started again on another port: each once and in order, by whoever is there."""
    sweeper, other, entries = town.presence("0"), town.presence("1"), [await town.entry(f"d{n:03}") for n in range(50)]
    town.server.stop()
    await until(lambda: not town.publisher.connected)
    for number, entry in enumerate(entries):
        other.stands(entry, town.now, "192.0.2.1", number + 1)
    await other.flush()
    for number, entry in enumerate(entries[:25]):
        other.ended(entry, town.now, number + 1)
    await other.flush()
    await until(lambda: not other._publishing)
    for _ in range(2):
        with contextlib.suppress(Unavailable):
            await sweeper.sweep()
    town.server = EmbeddedServer.start(town.settings)
    town.bus._access = town.server.access
    await until(lambda: town.publisher.connected and town.bus.connected)
    await sweep(town, sweeper, 4)
    told = await town.told()
    assert sorted(told) == sorted(
        [(entry.device.name, "online") for entry in entries]
        + [(entry.device.name, "offline") for entry in entries[:25]]
    )
    for entry in entries[:25]:
        assert [status for name, status in told if name == entry.device.name] == ["online", "offline"]
    assert town.registry.untold(10) == []


async def test_a_frozen_engine_stores_no_change_twice(town: Town) -> None:
    """It may store later what was given up as not acknowledged: whoever tells it again looks first, and not too soon."""
    sweeper, entry = town.presence("0"), await town.entry()
    await sweeper.sweep()
    freeze(town.server.pid)
    try:
        sweeper.saw(entry, town.now, "192.0.2.1")
        await sweeper.flush()
        await sweeper._publish_untold()
        await until(lambda: not sweeper._publishing)
    finally:
        os.kill(town.server.pid, signal.SIGCONT)
    await sweeper._publish_untold()
    await until(lambda: town.publisher.connected and town.bus.connected)
    await sweep(town, sweeper, 3)
    assert len(await town.told()) == 1
    assert town.registry.untold(10) == []


async def test_a_successor_tells_that_its_predecessors_devices_are_gone(town: Town) -> None:
    """As soon as it starts, before its engine has connected."""
    former, entry = town.presence("1"), await town.entry("lamp")
    former.stands(entry, town.now, "192.0.2.1", 1)
    await settle(former, town.registry)
    engine = open_publisher(town.settings, town.server.access)
    await engine.start()
    successor = town.presence("1", engine=engine)
    await successor.start()
    await settle(successor, town.registry)
    await engine.stop()
    assert await town.told() == [("lamp", "online"), ("lamp", "offline")]


@pytest.mark.parametrize("by", [-86_400, -900, -120, 120, 900, 86_400])
async def test_nobody_goes_offline_because_the_clock_was_set(town: Town, by: int) -> None:
    """Forward or back, whoever writes first after it: who was online stays so, and who is really silent goes when it is due."""
    sweeper, other = town.presence("0"), town.presence("1")
    silent, busy, unwritten, newcomer = [
        await town.entry(name) for name in ("silent", "busy--", "unwritten", "newcomer")
    ]
    await sweeper.sweep()
    other.saw(silent, town.now, "192.0.2.1")
    for _ in range(10):
        town.later(30)
        sweeper.saw(busy, town.now, "192.0.2.1")
        other.saw(unwritten, town.now, "192.0.2.1")
        await sweeper.flush()
        await other.flush()
        await sweeper.sweep()
    town.later(2.5)
    unwritten.seen = 0
    other.saw(unwritten, town.now, "192.0.2.1")
    town.later(0.1)
    town.wall += by
    other.saw(newcomer, town.now, "192.0.2.1")
    town.later(0.2)
    await other.flush()
    await sweeper.flush()
    await sweeper.sweep()
    for presence in (other, sweeper):
        await settle(presence, town.registry)
    assert sorted(await town.told()) == sorted(
        (name, "online") for name in ("silent", "busy--", "unwritten", "newcomer")
    )
    for _ in range(9):
        town.later(33)
        for entry in (busy, unwritten, newcomer):
            other.saw(entry, town.now, "192.0.2.1")
        await other.flush()
        await sweeper.sweep()
    for presence in (other, sweeper):
        await settle(presence, town.registry)
    assert len(await town.told()) == 4
    town.later(4)
    await sweeper.sweep()
    await settle(sweeper, town.registry)
    assert (await town.told())[4:] == [("silent", "offline")]


async def test_a_restart_after_the_clock_was_set_back_keeps_nobody_online(town: Town) -> None:
    """What lies in the future counts as now when the first sweep looks."""
    first, entry = town.presence("0"), await town.entry("lamp")
    town.wall += 86_400
    first.saw(entry, town.now, "192.0.2.1")
    await settle(first, town.registry)
    town.wall -= 86_400
    second = town.presence("0")
    await second.sweep()
    town.later(599)
    await sweep(town, second, 1)
    assert await town.told() == [("lamp", "online"), ("lamp", "offline")]


# -- what the registry is written


async def test_last_seen_is_written_soon_but_not_each_time(town: Town) -> None:
    """Of a busy device one time in five seconds is written; of each device the first at once."""
    troubled = Troubled(town.registry)
    presence, entry = town.presence(registry=troubled), await town.entry("lamp")
    for _ in range(120):
        presence.saw(entry, town.now, "192.0.2.1")
        await presence.flush()
        town.later(0.1)
    assert troubled.written == [NOW, NOW + 5000, NOW + 10_000]
    assert town.registry.device(PRODUCT, "lamp").last_seen == NOW + 10_000


async def test_how_often_last_seen_is_written_is_a_setting(town: Town) -> None:
    """Up to a quarter of the time after which a silent device counts as offline."""
    settings = town.settings.model_copy(update={"seen_interval": 60.0, "online_timeout": 600.0})
    presence, entry = town.presence(settings=settings), await town.entry("lamp")
    for later, written in ((0, 0), (59, 0), (1, 60_000), (1, 60_000), (59, 120_000)):
        town.later(later)
        presence.saw(entry, town.now, "192.0.2.1")
        await presence.flush()
        assert town.registry.device(PRODUCT, "lamp").last_seen == NOW + written


async def test_a_short_timeout_does_not_lose_a_busy_device(town: Town) -> None:
    """It is written as often as the timeout asks for."""
    presence = town.presence(settings=town.settings.model_copy(update={"online_timeout": 1.0}))
    entry = await town.entry("lamp")
    for _ in range(60):
        presence.saw(entry, town.now, "192.0.2.1")
        await presence.flush()
        await presence.sweep()
        town.later(0.2)
    await settle(presence, town.registry)
    assert await town.told() == [("lamp", "online")]


async def test_what_was_seen_reaches_the_registry_while_it_runs(town: Town) -> None:
    """Nobody has to flush: within a second and a half it is written and told."""
    presence, entry = town.presence(), await town.entry("lamp")
    running = asyncio.create_task(presence.run())
    presence.saw(entry, NOW, "192.0.2.1")
    await until(lambda: town.registry.device(PRODUCT, "lamp").last_seen == NOW, 1.5)
    await until(lambda: not town.registry.untold(1), 1.5)
    await end_tasks(running)
    assert await town.told() == [("lamp", "online")]


async def test_what_was_seen_during_an_outage_is_written_after_it(town: Town) -> None:
    """Sightings, ends of sessions and what was told; in their order, and a later time wins."""
    troubled = Troubled(town.registry)
    presence, lamp, door = town.presence(registry=troubled), await town.entry("lamp"), await town.entry("door")
    presence.stands(door, town.now, "192.0.2.1", 1)
    await presence.flush()
    await until(lambda: presence._told)
    troubled.away = True
    presence.saw(lamp, town.now, "192.0.2.1")
    with pytest.raises(Unavailable):
        await presence.flush()
    town.later(7)
    presence.saw(lamp, town.now, "192.0.2.1")
    presence.ended(door, town.now, 1)
    with pytest.raises(Unavailable):
        await presence.flush()
    assert len(await town.told()) == 1
    troubled.away = False
    await settle(presence, town.registry)
    assert town.registry.device(PRODUCT, "lamp").last_seen == NOW + 7000
    assert sorted(await town.told()) == [("door", "offline"), ("door", "online"), ("lamp", "online")]
    assert town.registry.untold(10) == []


async def test_what_waits_for_the_registry_is_bounded(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each device the last is kept; beyond the bound requests go first, since they come again and an end does not."""
    monkeypatch.setattr("uplinkd.presence._MOST_PENDING", 10)
    troubled = Troubled(town.registry)
    presence, entries = town.presence(registry=troubled), [await town.entry() for _ in range(12)]
    leaving = await town.entry("leaving")
    presence.stands(leaving, town.now, "192.0.2.1", 1)
    await settle(presence, town.registry)
    troubled.away = True
    presence.ended(leaving, town.now, 1)
    for _ in range(4):
        town.later(10)
        for entry in entries:
            presence.saw(entry, town.now, "192.0.2.1")
        with pytest.raises(Unavailable):
            await presence.flush()
    assert len(presence._pending) == 10
    troubled.away = False
    await settle(presence, town.registry)
    assert ("leaving", "offline") in await town.told()
    online = [each for each in entries if town.registry.find_device_by_id(each.device.id).last_seen == town.now]  # type: ignore[union-attr]
    assert len(online) == 9


async def test_closing_writes_and_tells_everything(town: Town) -> None:
    """A worker that drains loses nothing: lastSeen, the ends of its sessions, and what is told of them; beside its own run()."""
    presence, entries = town.presence("1"), [await town.entry(f"lamp-{n}") for n in range(30)]
    running = asyncio.create_task(presence.run())
    for number, entry in enumerate(entries):
        presence.stands(entry, town.now, "192.0.2.1", number + 1)
        presence.ended(entry, town.now, number + 1)
    await presence.close()
    assert town.registry.untold(100) == []
    assert sorted(await town.told()) == sorted((e.device.name, s) for e in entries for s in ("offline", "online"))
    await asyncio.wait_for(running, 5)


async def test_a_close_in_the_middle_of_a_sweep_is_quiet(town: Town, caplog: pytest.LogCaptureFixture) -> None:
    """What the duty was doing then is done by the next server."""
    presence = town.presence("0")
    running = asyncio.create_task(presence.run())
    await until(lambda: presence._sweep_clock is not None)
    presence.saw(await town.entry(), town.now, "192.0.2.1")
    presence._told.append(12345)
    await presence.close()
    presence._told.append(12345)
    await asyncio.wait_for(running, 5)
    assert not caplog.records
