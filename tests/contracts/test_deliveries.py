"""What consumers of a group get: shared among them, again until it is accepted, and on through an outage of the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.contracts.test_bus import Line, running
from tests.house import until
from uplinkd.core.groups import Group, Kind, Plan
from uplinkd.core.model import Origin, ProductKey
from uplinkd.engine import ORIGIN_HEADER, Feed, Publisher, Taken, open_publisher
from uplinkd.engine.api import ask_api
from uplinkd.engine.deliveries import JetStreamDeliveries
from uplinkd.engine.embedded import read_access
from uplinkd.engine.groups import JetStreamDesk, consumer_name
from uplinkd.engine.stream import Part, part_for
from uplinkd.settings import Settings

PRODUCT = ProductKey("pk")
GROUP = Group(7, "backend", Plan(products=(PRODUCT,), ack_wait=1, tries=3), 0, 1, 0)


@dataclass
class Consumer:
    """One of a group: what it was given, in the order in which it came."""

    feed: Feed = field(init=False)
    taken: list[Taken] = field(default_factory=list)

    @property
    def payloads(self) -> list[bytes]:
        return [each.message.payload for each in self.taken]


@dataclass
class House:
    line: Line
    settings: Settings
    publisher: Publisher
    mine: JetStreamDeliveries
    theirs: JetStreamDeliveries

    @property
    def part(self) -> Part:
        """In which what `publish` stores is, unless it is told otherwise."""
        return part_for("/.pk.dev.user.update", self.settings.partitions)

    @property
    def desk(self) -> JetStreamDesk:
        return JetStreamDesk(self.line.mine)

    async def publish(
        self, *payloads: bytes, subject: bytes = b"/.pk.dev.user.update", origin: Origin = Origin.HTTPS
    ) -> None:
        stored: list[int] = []
        for payload in payloads:
            self.publisher.publish(subject, payload, lambda number, _: stored.append(number), origin)
        await until(lambda: len(stored) == len(payloads))
        assert all(stored)

    def consumer(self, want: int = 0, *, group: Group = GROUP, theirs: bool = False) -> Consumer:
        consumer = Consumer()
        consumer.feed = (self.theirs if theirs else self.mine).feed(group, consumer.taken.append)
        consumer.feed.want(want)
        return consumer


@pytest.fixture(params=[1, pytest.param(3, marks=pytest.mark.slow)])
async def house(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    """With messages in so many streams."""
    settings = Settings(data=tmp_path, nats_listen="", partitions=request.param)
    made: list[JetStreamDeliveries] = []
    async with running(settings, lambda bus: made.append(JetStreamDeliveries(bus))) as line:
        publisher = open_publisher(settings, read_access(tmp_path / "nats" / "access.json"))
        await publisher.start()
        await until(lambda: publisher.connected)
        yield House(line, settings, publisher, *made)
        for each in made:
            await each.close()
        await publisher.stop()


async def test_consumers_share_a_groups_messages_and_get_no_more_than_they_want(house: House) -> None:
    """Each message comes to one of them; what nobody wants waits."""
    one, other = house.consumer(3), house.consumer(4, theirs=True)
    await house.publish(*(b"%d" % number for number in range(10)))
    await until(lambda: len(one.taken) == 3 and len(other.taken) == 4)
    await asyncio.sleep(0.2)
    assert (len(one.taken), len(other.taken)) == (3, 4)
    assert (await house.desk.state(GROUP)).lag == 10
    one.feed.want(10)
    await until(lambda: len(one.taken) == 6)
    assert sorted(one.payloads + other.payloads) == [b"%d" % number for number in range(10)]
    for each in one.taken + other.taken:
        each.accept()
    assert {each.tries for each in one.taken + other.taken} == {1}
    assert one.payloads == sorted(one.payloads)


async def test_what_nobody_answers_for_comes_again_after_its_time(house: House) -> None:
    """To any consumer of the group: the one that holds it may have died."""
    silent = house.consumer(1)
    await house.publish(b"silent")
    await until(lambda: silent.taken)
    other = house.consumer(1, theirs=True)
    await until(lambda: other.taken, 5)
    assert (other.taken[0].message, other.taken[0].tries) == (silent.taken[0].message, 2)
    other.taken[0].accept()


async def test_what_is_given_back_comes_again_until_its_tries_are_used_up(house: House) -> None:
    """Then it is a dead letter, which can be retried and has all its tries again."""
    consumer = house.consumer(100)
    await house.publish(b"refused")
    for tries in (1, 2, 3):
        await until(lambda tries=tries: len(consumer.taken) == tries)  # type: ignore[misc]
        assert consumer.taken[-1].tries == tries
        consumer.taken[-1].again()
    for _ in range(200):
        if dead := await house.desk.dead(GROUP):
            break
        await asyncio.sleep(0.02)
    assert dead[0].message == consumer.taken[0].message
    assert (dead[0].tries, dead[0].reason) == (3, "it was offered 3 times and not accepted")
    assert await house.desk.retry(GROUP, [dead[0].number]) == 1
    await until(lambda: len(consumer.taken) == 4)
    assert (consumer.taken[-1].tries, consumer.taken[-1].message.id) == (1, dead[0].message.id)
    consumer.taken[-1].accept()


async def test_what_is_worked_on_does_not_come_again(house: House) -> None:
    """Its time begins anew each time that somebody says so."""
    consumer = house.consumer(10)
    await house.publish(b"long")
    await until(lambda: consumer.taken)
    for _ in range(8):
        await asyncio.sleep(0.2)
        consumer.taken[0].working()
    assert len(consumer.taken) == 1
    consumer.taken[0].accept()


async def test_what_a_filter_matches_and_the_plan_does_not_never_comes(house: House) -> None:
    """A filter of JetStream's may have to be wider; other products, kinds and topics are passed over, and count as done."""
    plan = replace(GROUP.plan, topic="/pk/dev/#", kinds=frozenset({Kind.UPLINK, Kind.LIFECYCLE}))
    group = replace(GROUP, plan=plan)
    consumer = house.consumer(100, group=group)
    await house.publish(b"other device", subject=b"/.pk.other.user.update")
    await house.publish(b"other product", subject=b"/.px.dev.user.update")
    await house.publish(b"status", subject=b"/.as.mqtt.status.pk.dev", origin=Origin.STATUS)
    await house.publish(b"made", subject=b"/.pk.other.thing.lifecycle", origin=Origin.LIFECYCLE)
    await house.publish(b"by mqtt", subject=b"/.pk.dev.thing.lifecycle", origin=Origin.MQTT)
    await until(lambda: len(consumer.taken) == 2)
    assert consumer.payloads == [b"made", b"by mqtt"]
    for each in consumer.taken:
        each.accept()
    for _ in range(100):
        if (await house.desk.state(group)).lag == 0:
            break
        await asyncio.sleep(0.02)
    assert (await house.desk.state(group)).lag == 0


async def test_what_a_consumer_that_goes_had_asked_for_comes_to_others(house: House) -> None:
    """It is closed while messages are on their way; nothing waits for its time."""
    gone = house.consumer(1000)
    await house.publish(b"first")
    await until(lambda: gone.taken)
    gone.taken[0].accept()
    gone.feed.close()
    await house.publish(*(b"%d" % number for number in range(50)))
    other = house.consumer(1000, theirs=True)
    await until(lambda: len(set(other.payloads)) == 50, 3)
    assert gone.payloads == [b"first"]
    assert {each.tries for each in other.taken} <= {1, 2}


async def test_a_feed_goes_on_when_the_engine_is_back(house: House) -> None:
    """It was stopped and started: what was accepted meanwhile is told then, and what is held may be accepted still."""
    consumer = house.consumer(100)
    await house.publish(b"before", b"held")
    await until(lambda: len(consumer.taken) == 2)
    await house.line.cut()
    consumer.taken[0].accept()
    await house.line.mend()
    await until(lambda: house.publisher.connected)
    await house.publish(b"after")
    await until(lambda: b"after" in consumer.payloads)
    consumer.taken[1].accept()
    consumer.taken[-1].accept()
    for _ in range(100):
        if (await house.desk.state(GROUP)).lag == 0:
            break
        await asyncio.sleep(0.02)
    assert (await house.desk.state(GROUP)).lag == 0


async def test_a_consumer_that_somebody_deleted_is_made_again(house: House) -> None:
    """By hand, say: it begins where the group began, and everything comes again rather than nothing."""
    consumer = house.consumer(100)
    await house.publish(b"one")
    await until(lambda: consumer.taken)
    consumer.taken[0].accept()
    await ask_api(house.line.mine, f"CONSUMER.DELETE.{house.part.name}.{consumer_name(GROUP)}")
    await house.publish(b"two")
    await until(lambda: b"two" in consumer.payloads)
    assert consumer.payloads == [b"one", b"one", b"two"]


@pytest.mark.parametrize(
    "by_hand",
    [{"headers_only": True}, {"filter_subject": "/.other.>"}, {"max_batch": 1}],
)
async def test_a_consumer_that_somebody_changed_is_as_the_group_wants_it_again(
    house: House, by_hand: dict[str, object]
) -> None:
    """Whatever was set; and it stays where it was."""
    bus, name = house.line.mine, consumer_name(GROUP)
    await house.publish(b"one")
    first = house.consumer(1)
    await until(lambda: first.taken)
    first.taken[0].accept()
    first.feed.close()
    await asyncio.sleep(0.2)
    config = (await ask_api(bus, f"CONSUMER.INFO.{house.part.name}.{name}"))["config"]
    if "filter_subject" in by_hand:
        del config["filter_subjects"]
    await ask_api(
        bus, f"CONSUMER.CREATE.{house.part.name}.{name}", {"stream_name": house.part.name, "config": config | by_hand}
    )
    consumer = house.consumer(10)
    await house.publish(b"two", b"three")
    await until(lambda: consumer.payloads == [b"two", b"three"])


async def test_an_origin_that_is_not_known_here_is_a_report(house: House) -> None:
    """Of a later version, or by hand: it is read like any other, rather than fail each time that it comes."""
    consumer = house.consumer(10)
    await house.publish(b"one")  # the stream is there
    house.line.mine.tell(f"{house.part.ingest}/.pk.dev.user.update", b"two", {ORIGIN_HEADER: "teleprinter"})
    await until(lambda: len(consumer.taken) == 2)
    assert [each.message.origin for each in consumer.taken] == [Origin.HTTPS, Origin.HTTPS]
    assert consumer.payloads == [b"one", b"two"]


async def test_a_group_begins_at_its_time_whatever_else_its_filters_match_later(house: House) -> None:
    """With several filters nothing is passed over that lies before the first message of one of them."""
    await house.publish(b"too old", subject=b"/.pk.old.user.update")
    await asyncio.sleep(0.05)
    start = time.time_ns() // 1_000_000
    await asyncio.sleep(0.05)
    await house.publish(b"one", b"two")
    await house.publish(b"online", b"offline", subject=b"/.as.mqtt.status.pk.dev", origin=Origin.STATUS)
    plan = replace(GROUP.plan, kinds=frozenset({Kind.UPLINK, Kind.STATUS}))
    consumer = house.consumer(100, group=replace(GROUP, id=8, plan=plan, start=start))
    await until(lambda: len(consumer.taken) == 4)
    assert consumer.payloads == [b"one", b"two", b"online", b"offline"]
    await asyncio.sleep(0.05)
    late = house.consumer(100, group=replace(GROUP, id=9, plan=plan, start=time.time_ns() // 1_000_000))
    await house.publish(b"three")
    await until(lambda: late.payloads == [b"three"])
