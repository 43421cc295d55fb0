"""What every registry promises of consumer groups, and the desk at which operators look after their messages: over a real
nats-server."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.contracts.test_bus import Line, running
from tests.house import until
from uplinkd.core.errors import Conflict, NotFound, Rejected, Stale, Unavailable
from uplinkd.core.groups import Form, Group, Kind, Plan, Webhook
from uplinkd.core.model import LifecycleAction, ProductKey
from uplinkd.core.subjects import to_subject
from uplinkd.delivery.sender import Sender
from uplinkd.delivery.server import Hooks
from uplinkd.engine import Bus, GroupState, Taken, open_publisher
from uplinkd.engine.api import NotThere, ask_api
from uplinkd.engine.deliveries import JetStreamDeliveries
from uplinkd.engine.embedded import announced
from uplinkd.engine.groups import JetStreamDesk, bury, consumer_name, ensure, open_desk, sweep
from uplinkd.engine.standing import Standings
from uplinkd.engine.stream import STREAM
from uplinkd.registry import Change, Registry, open_registry
from uplinkd.settings import Settings

LAMPS, DOORS = ProductKey("a1Lamps"), ProductKey("a1Doors")
URL = "https://backend.example.com/uplinkd?key=0penSesame"
PLAN = Plan(products=(LAMPS,), kinds=frozenset(Kind), apps=("billing",))


# -- in the registry


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", database_url=database_url, nats_listen="")


@pytest.fixture
def registry(settings: Settings) -> Iterator[Registry]:
    registry = open_registry(settings)
    registry.create_product("lamps", key=LAMPS)
    registry.create_product("doors", key=DOORS)
    registry.create_app("billing", products=[LAMPS])
    yield registry
    registry.close()


def of_group(group: Group) -> Change:
    return Change(ProductKey(""), None, group_id=group.id)


def test_a_group_is_what_it_was_made_as(registry: Registry) -> None:
    """By whatever it is asked for; without a start it begins now."""
    before = time.time_ns() // 1_000_000
    made = registry.groups.create("reports", PLAN)
    assert before <= made.start <= time.time_ns() // 1_000_000
    assert (made.name, made.plan, made.generation, made.secret) == ("reports", PLAN, 1, "")
    hook = registry.groups.create("hook", replace(PLAN, products=None, apps=(), webhook=Webhook(url=URL)), start=0)
    assert (hook.start, hook.plan.products) == (0, None)
    assert hook.secret.startswith("whsec_")
    assert registry.groups.all() == [made, hook]
    for group in (made, hook):
        assert registry.groups.get(group.name) == group
        assert registry.groups.by_name(group.name) == group
        assert registry.groups.by_id(group.id) == group
    assert registry.groups.by_name("nobody") is None
    assert registry.groups.by_id(99) is None


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "ä", "a\n", ".", ".."])
def test_a_group_name_that_breaks_the_rule_is_refused_with_it(registry: Registry, name: str) -> None:
    with pytest.raises(Rejected, match="1 to 64 letters, digits and - _"):
        registry.groups.create(name, PLAN)


def test_what_is_wrong_with_a_group_is_said_and_nothing_is_made(registry: Registry) -> None:
    """A name that is taken, a product or an application that is not there, a plan or a start that breaks a rule."""
    registry.groups.create("reports", PLAN)
    with pytest.raises(Conflict, match="'reports' already"):
        registry.groups.create("reports", PLAN)
    with pytest.raises(NotFound, match=r"no product 'a1Nowhere'.*uplinkd product list"):
        registry.groups.create("other", replace(PLAN, products=(LAMPS, ProductKey("a1Nowhere"))))
    with pytest.raises(NotFound, match=r"no application 'nobody'.*uplinkd app create nobody"):
        registry.groups.create("other", replace(PLAN, apps=("nobody",)))
    with pytest.raises(Rejected, match="tries = 0"):
        registry.groups.create("other", replace(PLAN, tries=0))
    with pytest.raises(Rejected, match="milliseconds since 1970"):
        registry.groups.create("other", PLAN, start=-1)
    with pytest.raises(Rejected, match="lies in the future"):
        registry.groups.create("other", PLAN, start=round(time.time() * 1000) + 3_600_000)
    with pytest.raises(Rejected, match="lies in the future"):
        registry.groups.reset("reports", round(time.time() * 1000) + 3_600_000)
    with pytest.raises(NotFound, match="no application 'nobody'"):
        registry.groups.change("reports", replace(PLAN, apps=("nobody",)))
    for act in (
        lambda: registry.groups.get("nobody"),
        lambda: registry.groups.change("nobody", PLAN),
        lambda: registry.groups.reset("nobody", 0),
        lambda: registry.groups.renew_secret("nobody"),
        lambda: registry.groups.delete("nobody"),
    ):
        with pytest.raises(NotFound, match=r"no consumer group 'nobody'.*uplinkd group list"):
            act()
    assert [(group.name, group.plan) for group in registry.groups.all()] == [("reports", PLAN)]


def test_a_change_keeps_the_position_and_a_reset_begins_anew(registry: Registry) -> None:
    """The generation rises with a reset alone."""
    made = registry.groups.create("reports", PLAN, start=1000)
    other = Plan(products=None, topic="/+/+/user/#", kinds=frozenset({Kind.STATUS}), ack_wait=5, tries=3, paused=True)
    changed = registry.groups.change("reports", other)
    assert (changed.plan, changed.start, changed.generation) == (other, 1000, 1)
    moved = registry.groups.reset("reports", 5000)
    assert (moved.plan, moved.start, moved.generation) == (other, 5000, 2)
    assert len({made.version, changed.version, moved.version}) == 3


def test_a_group_that_was_changed_meanwhile_is_not_changed_by_who_has_not_seen_it(registry: Registry) -> None:
    """Nor moved, nor deleted."""
    seen = registry.groups.create("hook", replace(PLAN, apps=(), webhook=Webhook(url=URL)))
    changed = registry.groups.change("hook", replace(seen.plan, paused=True), version=seen.version)
    for act in (
        lambda: registry.groups.change("hook", seen.plan, version=seen.version),
        lambda: registry.groups.reset("hook", 0, version=seen.version),
        lambda: registry.groups.renew_secret("hook", version=seen.version),
        lambda: registry.groups.delete("hook", version=seen.version),
    ):
        with pytest.raises(Stale, match="'hook' was changed meanwhile"):
            act()
    assert registry.groups.get("hook") == changed
    registry.groups.delete("hook", version=changed.version)
    assert registry.groups.all() == []


def test_a_webhooks_secret_stays_until_it_is_renewed(registry: Registry) -> None:
    """Through changes of its URL; one that is taken away and comes again has another. Without a webhook there is none."""
    plan = replace(PLAN, apps=(), webhook=Webhook(url=URL, form=Form.BATCH))
    first = registry.groups.create("hook", plan)
    changed = registry.groups.change("hook", replace(plan, webhook=Webhook(url="https://other.example.com/")))
    assert changed.secret == first.secret
    renewed = registry.groups.renew_secret("hook")
    assert renewed.secret not in ("", first.secret)
    assert registry.groups.change("hook", replace(plan, webhook=None)).secret == ""
    with pytest.raises(Rejected, match="has no webhook"):
        registry.groups.renew_secret("hook")
    assert registry.groups.change("hook", plan).secret not in ("", renewed.secret)


def test_a_webhooks_secret_is_kept_sealed(settings: Settings, registry: Registry) -> None:
    """No file holds it in clear, and no text of the group shows it."""
    group = registry.groups.create("hook", replace(PLAN, apps=(), webhook=Webhook(url=URL)))
    assert group.secret not in repr(group) + group.version
    registry.close()
    for file in filter(Path.is_file, settings.data.rglob("*")):
        assert group.secret.encode() not in file.read_bytes()
        assert group.secret.removeprefix("whsec_").encode() not in file.read_bytes()


def test_a_deleted_product_leaves_its_group_with_none_and_not_with_all(registry: Registry) -> None:
    """A group that names products gets none of others because its own are gone."""
    made = registry.groups.create("reports", replace(PLAN, products=(LAMPS, DOORS)))
    cursor = registry.changes_cursor()
    registry.delete_product(LAMPS)
    assert registry.groups.get("reports").plan.products == (DOORS,)
    assert of_group(made) in registry.changes(cursor)[1]
    registry.delete_product(DOORS)
    assert registry.groups.get("reports").plan.products == ()


def test_a_deleted_application_no_longer_consumes(registry: Registry) -> None:
    """And whoever delivers hears of it."""
    made = registry.groups.create("reports", PLAN)
    cursor = registry.changes_cursor()
    registry.delete_app("billing")
    assert registry.groups.get("reports").plan.apps == ()
    assert of_group(made) in registry.changes(cursor)[1]


def test_every_change_of_a_group_is_announced(registry: Registry) -> None:
    cursor = registry.changes_cursor()
    made = registry.groups.create("hook", replace(PLAN, apps=(), webhook=Webhook(url=URL)))
    for act in (
        lambda: registry.groups.change("hook", replace(made.plan, paused=True)),
        lambda: registry.groups.reset("hook", 0),
        lambda: registry.groups.renew_secret("hook"),
        lambda: registry.groups.delete("hook"),
    ):
        cursor, heard = registry.changes(cursor)
        assert heard == [of_group(made)]
        act()
    assert registry.changes(cursor)[1] == [of_group(made)]


def test_the_audit_tells_what_was_done_and_no_secret(registry: Registry) -> None:
    """Neither the webhook's own nor one in its URL."""
    group = registry.groups.create("hook", replace(PLAN, apps=(), webhook=Webhook(url=URL)))
    registry.groups.change("hook", replace(group.plan, products=None, paused=True))
    registry.groups.reset("hook", 5000)
    renewed = registry.groups.renew_secret("hook")
    registry.groups.delete("hook")
    entries = registry.operators.audit(action="group.", limit=10)
    assert [entry.action for entry in reversed(entries)] == [
        "group.create",
        "group.change",
        "group.reset",
        "group.renew-secret",
        "group.delete",
    ]
    told = repr(entries)
    assert "https://backend.example.com/uplinkd" in told
    assert "all products" in told
    assert "(paused)" in told
    for secret in (group.secret, renewed.secret, "0penSesame"):
        assert secret not in told


def test_an_application_gets_a_new_secret(registry: Registry) -> None:
    """Of which the registry can prove that a client knows it; the old one is worth nothing, and whoever holds connections hears
    of it."""
    app, old = registry.create_app("wall")
    assert registry.app_secret(app.key) == old
    cursor = registry.changes_cursor()
    renewed, new = registry.renew_app_secret("wall")
    assert (renewed.key, registry.app_secret(app.key)) == (app.key, new)
    assert new != old
    assert registry.changes(cursor)[1] == [Change(ProductKey(""), None, app.id)]
    assert registry.app_secret("app-nobody") is None


def test_what_happens_to_devices_is_kept_until_it_is_told(registry: Registry) -> None:
    """Made, disabled, enabled, deleted: in this order, each once; what changes nothing is none."""
    registry.create_device(LAMPS, "lamp-1")
    registry.set_enabled(LAMPS, "lamp-1", False)
    registry.set_enabled(LAMPS, "lamp-1", False)
    registry.set_enabled(LAMPS, "lamp-1", True)
    registry.delete_device(LAMPS, "lamp-1")
    found = registry.lifecycle(10)
    assert [(each.product_key, each.device_name, each.action) for each in found] == [
        (LAMPS, "lamp-1", action)
        for action in (
            LifecycleAction.CREATE,
            LifecycleAction.DISABLE,
            LifecycleAction.ENABLE,
            LifecycleAction.DELETE,
        )
    ]
    assert [each.id for each in registry.lifecycle(2)] == [each.id for each in found[:2]]
    registry.lifecycle_told(found[1].id)
    assert registry.lifecycle(10) == found[2:]


# -- at the desk


def _settle(done: asyncio.Future[int], number: int, _reason: str) -> None:
    done.set_result(number)


@dataclass
class Hall:
    """A desk, what delivers, and a stream with what `store` puts there."""

    settings: Settings
    line: Line
    desk: JetStreamDesk
    deliveries: JetStreamDeliveries
    taken: list[Taken] = field(default_factory=list)

    async def store(self, *payloads: str, topic: str = f"/{LAMPS}/lamp-1/user/update") -> list[int]:
        """messageIds."""
        publisher = open_publisher(self.settings, announced(self.settings))
        await publisher.start()
        await until(lambda: publisher.connected)
        stored: list[asyncio.Future[int]] = []
        for payload in payloads:
            done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            publisher.publish(to_subject(topic).encode(), payload.encode(), functools.partial(_settle, done))
            stored.append(done)
        found = [await each for each in stored]
        await publisher.stop()
        return found

    async def take(self, group: Group, count: int) -> list[Taken]:
        """That many messages as a consumer of the group gets them."""
        taken: list[Taken] = []
        feed = self.deliveries.feed(group, taken.append)
        feed.want(count)
        await until(lambda: len(taken) >= count)
        feed.close()
        return taken

    async def bury(self, group: Group, count: int, reason: str = "nobody wants it") -> None:
        for each in await self.take(group, count):
            await each.bury(reason)

    async def state(self, group: Group, **wanted: int) -> GroupState:
        """Once it is as wanted: answers arrive beside what is asked."""
        end = time.monotonic() + 5
        while True:
            state = await self.desk.state(group)
            if all(getattr(state, name) == value for name, value in wanted.items()):
                return state
            assert time.monotonic() < end, state
            await asyncio.sleep(0.02)


@pytest.fixture(params=[1, pytest.param(3, marks=pytest.mark.slow)])
async def hall(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Hall]:
    """With messages in so many streams."""
    settings = Settings(data=tmp_path, nats_listen="", partitions=request.param)
    async with running(settings) as line:
        hall = Hall(settings, line, JetStreamDesk(line.mine), JetStreamDeliveries(line.theirs))
        await hall.store("before")
        yield hall
        await hall.deliveries.close()


def group_of(group_id: int = 1, *, start: int = 0, generation: int = 1, **plan: object) -> Group:
    return Group(group_id, f"group{group_id}", replace(Plan(), **plan), start, generation, 0)  # type: ignore[arg-type]


async def test_a_group_tells_how_far_it_is(hall: Hall) -> None:
    """What waits, what is held, when the oldest was stored, and how many deliveries came to an end; also when nothing was
    delivered yet."""
    begun = round(time.time() * 1000) - 5000
    await hall.store("one", "two", "three", topic=f"/{DOORS}/door-1/user/update")
    group = group_of(products=(DOORS,))
    state = await hall.desk.state(group)
    assert (state.lag, state.held, state.settled, state.dead, state.retrying) == (3, 0, 0, 0, 0)
    assert state.oldest is not None
    assert begun < state.oldest <= round(time.time() * 1000)
    first, second = await hall.take(group, 2)
    await hall.state(group, lag=3, held=2, settled=0)
    first.accept()
    await hall.state(group, lag=2, held=1, settled=1)
    second.accept()
    (third,) = await hall.take(group, 1)
    third.accept()
    assert (await hall.state(group, lag=0, held=0, settled=3)).oldest is None


async def test_a_rate_is_measured_between_two_looks(hall: Hall) -> None:
    """The first look has none; those who look at the same time share one."""
    now = 0.0
    group = group_of()
    standings = Standings(hall.desk, lambda: now)
    (first,) = await standings.of([group])
    assert first.rate is None
    await hall.store("one", "two", "three")
    for each in await hall.take(group, 4):
        each.accept()
    await hall.state(group, settled=4)
    now = 0.5
    assert await standings.of([group]) == [first]
    now = 2.0
    (second,) = await standings.of([group])
    assert (second.rate, second.state.settled) == (2.0, 4)
    now = 4.0
    assert (await standings.of([group]))[0].rate == 1.0
    now = 60.0
    assert (await standings.of([group]))[0].rate is None


async def test_dead_letters_are_read_offered_again_and_thrown_away(hall: Hall) -> None:
    """The oldest first, with all that the message had and why it was given up; those of one group alone."""
    topic = f"/{DOORS}/door-1/user/größe.1"
    ids = await hall.store("one", "two", "three", topic=topic)
    group, other = group_of(products=(DOORS,)), group_of(2, products=(DOORS,))
    assert await hall.desk.dead(group) == []
    assert await hall.desk.retry(group) == await hall.desk.purge(group) == 0
    await hall.bury(group, 3, "HTTP 410 Gone: ü\n")
    await hall.bury(other, 1)
    letters = await hall.desk.dead(group)
    assert [(each.message.id, each.message.payload.decode()) for each in letters] == list(
        zip(ids, ("one", "two", "three"), strict=True)
    )
    assert {(each.message.topic, each.tries, each.reason) for each in letters} == {(topic, 1, "HTTP 410 Gone: ü\n")}
    assert [each.number for each in letters] == sorted(each.number for each in letters)
    assert await hall.desk.dead(group, after=letters[0].number, limit=1) == [letters[1]]
    assert await hall.desk.dead_letter(group, letters[1].number) == letters[1]
    assert await hall.desk.dead_letter(other, letters[1].number) is None
    await hall.state(group, lag=0, dead=3)

    assert await hall.desk.retry(group, [letters[0].number, 999_999]) == 1
    await hall.state(group, lag=1, dead=2, retrying=1)
    (again,) = await hall.take(group, 1)
    assert (again.message, again.tries) == (letters[0].message, 1)
    again.accept()
    await hall.state(group, lag=0, dead=2, retrying=0)

    assert await hall.desk.purge(group, [letters[1].number, letters[1].number, 999_999]) == 1
    assert await hall.desk.dead(group) == [letters[2]]
    assert await hall.desk.purge(group) == 1
    assert await hall.desk.dead(group) == []
    assert len(await hall.desk.dead(other)) == 1


async def test_a_letter_that_is_given_up_again_at_once_is_a_letter_again(hall: Hall) -> None:
    """JetStream takes what comes twice within two minutes for one; this is not the same twice."""
    await hall.store("one", topic=f"/{DOORS}/door-1/user/update")
    group = group_of(products=(DOORS,))
    await hall.bury(group, 1)
    for turn in range(3):
        assert await hall.desk.retry(group) == 1
        await hall.bury(group, 1, f"turn {turn}")
        (letter,) = await hall.desk.dead(group)
        assert (letter.message.payload, letter.reason) == (b"one", f"turn {turn}")
        await hall.state(group, retrying=0)
    moved = replace(group, generation=2)
    await hall.desk.purge(moved)
    await hall.bury(moved, 1)
    assert len(await hall.desk.dead(moved)) == 1


async def test_all_that_are_offered_again_are_those_that_there_were(hall: Hall) -> None:
    """What is given up meanwhile stays for another time, or there would be no end; whoever hears how far it is may end it."""
    await hall.store(*map(str, range(250)), topic=f"/{DOORS}/door-1/user/update")
    group = group_of(products=(DOORS,))
    await hall.bury(group, 250)
    last = (await hall.desk.dead(group, limit=250))[-1]

    def enough(count: int) -> None:
        told.append(count)
        raise InterruptedError

    told: list[int] = []
    with pytest.raises(InterruptedError):
        await hall.desk.retry(group, progress=enough)
    assert told == [200]
    await hall.state(group, dead=50, retrying=200)

    def meanwhile(count: int) -> None:
        told.append(count)
        if count == 50:
            burying.append(asyncio.create_task(bury(hall.line.theirs, group, replace(last.message, id=7), 1, "again")))

    burying: list[asyncio.Task[None]] = []
    assert await hall.desk.retry(group, progress=meanwhile) == 50
    await asyncio.gather(*burying)
    assert [each.message.id for each in await hall.desk.dead(group)] == [7]


async def test_a_position_that_is_set_anew_gives_messages_again(hall: Hall) -> None:
    """To a time: what was stored before it does not come, what was stored since then does, also what was accepted."""
    group = group_of(products=(DOORS,))
    await hall.store("old", topic=f"/{DOORS}/door-1/user/update")
    await asyncio.sleep(0.05)
    since = round(time.time() * 1000)
    await hall.store("new", topic=f"/{DOORS}/door-1/user/update")
    for each in await hall.take(group, 2):
        each.accept()
    await hall.state(group, lag=0, settled=2)
    moved = replace(group, start=since, generation=2)
    (again,) = await hall.take(moved, 1)
    assert again.message.payload == b"new"
    await hall.state(moved, lag=1, held=1)


async def test_what_groups_leave_behind_is_swept_away(hall: Hall) -> None:
    """The consumer of an older generation, and all of a group that is gone: its dead letters too. Others keep theirs."""
    kept, gone = group_of(1), group_of(2)
    for group in (kept, gone):
        await hall.bury(group, 1)
    moved = replace(kept, generation=2)
    await hall.desk.state(moved)

    async def groups() -> list[Group]:
        return [moved]

    assert await sweep(hall.line.mine, groups) == 2
    assert await sweep(hall.line.mine, groups) == 0
    for group in (kept, gone):
        with pytest.raises(NotThere):
            await ask_api(hall.line.mine, f"CONSUMER.INFO.{STREAM}.{consumer_name(group)}")
    assert [len(await hall.desk.dead(group)) for group in (moved, gone)] == [1, 0]


async def test_a_group_that_is_made_during_a_sweep_keeps_what_it_has(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its consumer, and so what it has accepted, and its dead letters."""
    groups = [group_of(1)]
    made = group_of(2)
    await hall.store("second")

    async def meanwhile(bus: Bus, group: Group) -> object:
        groups.append(made)
        accepted, dead = await hall.take(made, 2)
        accepted.accept()
        await dead.bury("nobody wants it")
        await hall.state(made, lag=0, dead=1)
        return await ensure(bus, group)

    monkeypatch.setattr("uplinkd.delivery.server.ensure", meanwhile)
    registry: Any = SimpleNamespace(groups=SimpleNamespace(all=lambda: [*groups]))
    await Hooks(registry, hall.line.mine, hall.deliveries, Sender(hall.settings)).settle()
    state = await hall.desk.state(made)
    assert (state.lag, state.dead) == (0, 1)


async def test_a_desk_without_an_engine_says_so(hall: Hall) -> None:
    """At once, whatever it is asked."""
    group = group_of()
    await hall.bury(group, 1)
    await hall.line.cut()
    for act in (
        lambda: hall.desk.state(group),
        lambda: hall.desk.dead(group),
        lambda: hall.desk.dead_letter(group, 1),
        lambda: hall.desk.retry(group),
        lambda: hall.desk.purge(group),
    ):
        with pytest.raises(Unavailable):
            await act()
    await hall.line.mend()
    await hall.state(group, dead=1)


@pytest.mark.slow
async def test_a_command_opens_a_desk_of_its_own(hall: Hall) -> None:
    """With a connection that it closes; where there is no engine it says so within seconds."""
    desk = await open_desk(announced(hall.settings))
    assert (await desk.state(group_of())).lag == 1
    await desk.close()
    assert not desk.bus.connected
    access = announced(hall.settings)
    await hall.line.cut()
    with pytest.raises(Unavailable):
        await open_desk(access)
    await hall.line.mend()
