"""Workers of several gateways know who is there, and one of two sessions stands, the same everywhere."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from tests.room import settled
from uplinkd.engine.memory import MemoryBus
from uplinkd.peers import Peers
from uplinkd.roster import Roster, _Elsewhere

DEVICE = 7


@dataclass
class Session:
    stamp: int
    subscriptions: dict[str, int] = field(default_factory=dict)
    over: str = ""

    def taken_over(self, where: str) -> None:
        self.over = where

    def stands_anew(self, stamp: int) -> None:
        self.stamp = stamp


class Times:
    """A clock that stands until it is set."""

    def __init__(self, seconds: float = 1000.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


def crew(bus: MemoryBus, times: Times, *instances: str) -> list[Peers]:
    return [Peers(bus, each, listen=3.0, clock=times, wall=times) for each in instances]


async def beat(times: Times, *peers: Peers, seconds: int = 1) -> None:
    for _ in range(seconds):
        times.seconds += 1
        for each in peers:
            each.beat()
        await settled()
        for each in peers:
            each.look()


async def test_the_least_name_leads_once_all_have_been_heard() -> None:
    """At first nobody does: who starts alone cannot know yet that it is not."""
    times, bus = Times(), MemoryBus()
    first, second = crew(bus, times, "a.0.x", "b.0.y")
    assert not first.leads
    assert not second.leads
    await beat(times, first, second, seconds=3)
    assert first.leads
    assert not second.leads
    assert first.gateways == {"a", "b"}
    assert first.others
    assert second.others


async def test_a_gateway_that_falls_silent_is_forgotten_and_another_leads() -> None:
    times, bus = Times(), MemoryBus()
    first, second = crew(bus, times, "a.0.x", "b.0.y")
    await beat(times, first, second, seconds=6)
    assert second.missed()  # what was before it came
    gone: list[str] = []
    second.on_gone(gone.append)
    await beat(times, second, seconds=4)
    assert (gone, second.leads) == ([], False)
    await beat(times, second, seconds=2)
    assert gone == ["a.0.x"]
    assert second.leads
    assert second.missed()
    assert not second.missed()
    assert not second.others


async def test_who_ends_in_order_is_forgotten_at_once() -> None:
    times, bus = Times(), MemoryBus()
    first, second = crew(bus, times, "a.0.x", "b.0.y")
    await beat(times, first, second, seconds=3)
    first.beat(bye=True)
    await settled()
    assert second.gateways == {"b"}


async def test_who_stood_still_judges_nobody_and_knows_that_it_was_forgotten() -> None:
    """A process that was stopped for a while finds old news: by it everybody else would be dead."""
    times, bus = Times(), MemoryBus()
    first, second = crew(bus, times, "a.0.x", "b.0.y")
    back: list[str] = []
    first.on_back(lambda: back.append("a"))
    second.on_back(lambda: back.append("b"))
    await beat(times, first, second, seconds=3)
    await beat(times, second, seconds=7)  # the first one stands
    assert back == []
    first.look()
    assert first.gateways == {"a", "b"}
    assert not first.leads
    await beat(times, first, second)
    assert set(back) == {"a", "b"}


async def test_two_sides_of_a_parted_bus_both_know_it_afterwards() -> None:
    """Each hears itself all the time: that others come back tells it."""
    times, one, other = Times(), MemoryBus(), MemoryBus()
    (first,), (second,) = crew(one, times, "a.0.x"), crew(other, times, "b.0.y")
    back: list[str] = []
    for peers, bus in ((first, other), (second, one)):
        bus.listen("uplinkd.alive", peers._heard)
        peers.on_back(lambda peers=peers: back.append(peers._instance))  # type: ignore[misc]
    await beat(times, first, second, seconds=3)
    assert first.others
    ears, one._ears = one._ears, one._ears[:1]
    others, other._ears = other._ears, other._ears[:1]
    await beat(times, first, second, seconds=7)
    assert (first.others, second.others, back) == (False, False, [])
    one._ears, other._ears = ears, others
    await beat(times, first, second)
    assert sorted(back) == ["a.0.x", "b.0.y"]


async def test_who_knows_of_a_session_makes_a_younger_one_though_its_clock_is_behind() -> None:
    """No clock is trusted: the device has just connected to the second gateway, whose clock is an hour behind."""
    bus = MemoryBus()
    first = Roster(bus, "a.0", clock=lambda: 3_600_000_000_000)
    second = Roster(bus, "b.0", clock=lambda: 1)
    older = Session(first.stamp(), {"/pk/dn/user/get": 1})
    first.opened(DEVICE, older)
    await settled_news()
    younger = Session(second.stamp())
    second.opened(DEVICE, younger)
    await settled_news()
    assert (older.over, younger.over) == ("on the gateway b", "")
    assert first.here(DEVICE) is None
    assert second.here(DEVICE) is younger


async def test_very_many_sessions_with_many_subscriptions_are_all_known_elsewhere() -> None:
    """Of a worker that came before, and of one that tells all anew: NATS takes a megabyte at once."""
    bus = MemoryBus()
    first = Roster(bus, "a.0")
    filters = {f"/a1B2c3D4e5F/{'x' * 60}/{number}": 1 for number in range(20)}
    for number in range(1500):
        first._here[number] = Session(first.stamp(), {**filters, f"/pk/{number}": 1})
    second = Roster(bus, "b.0")
    await second.introduce()
    await asyncio.sleep(0.06)
    await settled_news()
    assert all(second.subscribed(number, f"/pk/{number}") for number in range(1500))
    second.forget(first.instance)
    second._elsewhere[1500] = _Elsewhere(first.instance, 1, ("/pk/1500",))
    await first.introduce()
    await settled_news()
    assert all(second.subscribed(number, f"/pk/{number}") for number in range(1500))
    assert not second.subscribed(1500, "/pk/1500")


async def test_of_two_that_did_not_know_of_each_other_one_stands_and_all_know_which() -> None:
    bus = MemoryBus()
    rosters = [Roster(bus, f"{name}.0", clock=lambda: 5) for name in "abc"]
    sessions = [Session(roster.stamp(), {f"/pk/dn/{roster.instance[0]}": 1}) for roster in rosters[:2]]
    for roster, session in zip(rosters, sessions, strict=False):
        roster.opened(DEVICE, session)
    await settled_news()
    assert [bool(session.over) for session in sessions] == [True, False]
    assert [roster.subscribed(DEVICE, "/pk/dn/b") for roster in rosters] == [True] * 3
    assert not any(roster.subscribed(DEVICE, "/pk/dn/a") for roster in rosters)


async def test_older_news_that_comes_late_does_not_replace_younger() -> None:
    """As after a cut, when everybody tells everything again."""
    bus = MemoryBus()
    first, second, third = (Roster(bus, f"{name}.0") for name in "abc")
    older = Session(first.stamp(), {"/pk/dn/old": 1})
    second.heard_of(older.stamp)
    second.opened(DEVICE, Session(second.stamp(), {"/pk/dn/new": 1}))
    await settled_news()
    first.opened(DEVICE, older)  # it opened before, and is told of only now
    await settled_news()
    assert third.subscribed(DEVICE, "/pk/dn/new")
    assert not third.subscribed(DEVICE, "/pk/dn/old")


async def test_sessions_of_a_worker_that_is_gone_are_forgotten() -> None:
    bus = MemoryBus()
    first, second = (Roster(bus, f"{name}.0") for name in "ab")
    first.opened(DEVICE, Session(first.stamp(), {"/pk/dn/user/get": 1}))
    await settled_news()
    assert second.subscribed(DEVICE, "/pk/dn/user/get")
    second.forget(first.instance)
    assert not second.subscribed(DEVICE, "/pk/dn/user/get")


async def test_sessions_that_ended_while_their_worker_was_cut_off_are_forgotten() -> None:
    """By those who were not; the others of that worker stand."""
    bus = MemoryBus()
    first, second = (Roster(bus, f"{name}.0") for name in "ab")
    sessions = {number: Session(first.stamp(), {f"/pk/{number}": 1}) for number in (1, 2)}
    for number, session in sessions.items():
        first.opened(number, session)
    await settled_news()
    assert second.subscribed(1, "/pk/1")
    bus.connected = False
    first.closed(1, sessions.pop(1))
    await settled_news()
    bus.connected = True
    await first.introduce()
    await settled_news()
    assert not second.subscribed(1, "/pk/1")
    assert second.subscribed(2, "/pk/2")
    bus.connected = False
    first.closed(2, sessions[2])
    await settled_news()
    bus.connected = True
    await first.introduce()
    await settled_news()
    assert not second.subscribed(2, "/pk/2")


async def settled_news() -> None:
    await asyncio.sleep(0.03)
    await settled()
