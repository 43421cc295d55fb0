"""Flow control: exact for a device, across processes, and nothing charged for what is refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from uplinkd.core.errors import Code, Refused
from uplinkd.flow import Flow, network_of
from uplinkd.settings import Settings


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def flow(clock: Clock) -> Iterator[Flow]:
    made = Flow(Settings(), clock=clock)
    yield made
    made.close()


def passes(act: Callable[[], None], most: int = 2000) -> int:
    """How many calls in a row pass."""
    for count in range(most):
        try:
            act()
        except Refused as refused:
            assert refused.code is Code.REQUEST_TOO_MANY
            return count
    return most


def test_thirty_messages_pass_at_once_then_thirty_a_second(flow: Flow, clock: Clock) -> None:
    """The burst is a second's worth; after it the rate holds, however often it is tried."""
    assert passes(lambda: flow.message(1, 10)) == 30
    clock.now += 0.5
    assert passes(lambda: flow.message(1, 10)) == 15
    clock.now += 100
    assert passes(lambda: flow.message(1, 10)) == 30


def test_a_mebibyte_a_second_passes(flow: Flow, clock: Clock) -> None:
    """Eight payloads of 128 KiB are a MiB."""
    assert passes(lambda: flow.message(1, 128 * 1024)) == 8
    clock.now += 0.25
    assert passes(lambda: flow.message(1, 128 * 1024)) == 2


def test_a_device_does_not_use_up_anothers_rate(flow: Flow) -> None:
    """Each device has a slot of its own."""
    assert passes(lambda: flow.message(1, 10)) == 30
    assert passes(lambda: flow.message(2, 10)) == 30


def test_a_message_larger_than_the_burst_passes_when_nothing_else_was_sent(clock: Clock) -> None:
    """A low byte limit slows such a device down; it does not silence it."""
    flow = Flow(Settings(device_bytes=1000), clock=clock)
    assert passes(lambda: flow.message(1, 5000)) == 1
    clock.now += 5.1
    assert passes(lambda: flow.message(1, 5000)) == 1
    flow.close()


def test_a_limit_of_zero_is_none(clock: Clock) -> None:
    """Rates can be switched off one by one."""
    flow = Flow(Settings(device_rate=0, device_bytes=0, auth_rate=0, address_auth_rate=0), clock=clock)
    assert passes(lambda: flow.message(1, 10**6)) == 2000
    assert passes(lambda: flow.login(1)) == 2000
    flow.close()


def test_thirty_logins_a_minute_pass(flow: Flow, clock: Clock) -> None:
    """Much firmware authenticates before each report."""
    assert passes(lambda: flow.login(1)) == 30
    clock.now += 2.01
    assert passes(lambda: flow.login(1)) == 1


def refused_login(flow: Flow, device: str, address: str) -> None:
    if limit := flow.refused_login("pk", device, address):
        assert flow.guessed("pk", device, address) == limit
        raise flow.guessing(limit)


def test_refused_logins_are_slowed_for_the_device_that_is_tried(flow: Flow) -> None:
    """30 wrong signs for one device from one address."""
    assert passes(lambda: refused_login(flow, "lamp", "192.0.2.1")) == 30


def test_refused_logins_are_slowed_for_the_address_that_tries(flow: Flow) -> None:
    """600 from one address, for however many devices."""
    tried = iter(range(10_000))
    assert passes(lambda: refused_login(flow, f"d{next(tried)}", "192.0.2.2")) == 600


def test_an_attacker_does_not_lock_a_device_out(flow: Flow) -> None:
    """Wrong signs from one address cost the device's own logins from another nothing."""
    passes(lambda: refused_login(flow, "lamp", "192.0.2.1"))
    flow.before_login("pk", "lamp", "192.0.2.9")
    assert passes(lambda: flow.login(1)) == 30


def passed_in_all(flow: Flow, act: Callable[[], object], tries: int, workers: int = 4) -> int:
    """How many of so many calls in each of several processes, all at the same time, pass."""
    go, ready = os.pipe()
    reading, writing = os.pipe()
    children = []
    for _ in range(workers):
        if not (child := os.fork()):
            os.close(ready)
            os.read(go, 1)  # returns when the pipe is closed
            count = 0
            for _ in range(tries):
                with contextlib.suppress(Refused):
                    act()
                    count += 1
            os.write(writing, count.to_bytes(4))
            os._exit(0)
        children.append(child)
    os.close(ready)
    for child in children:
        os.waitpid(child, 0)
    told = os.read(reading, 4 * workers)
    for descriptor in (go, reading, writing):
        os.close(descriptor)
    return sum(int.from_bytes(told[at : at + 4]) for at in range(0, len(told), 4))


@pytest.mark.parametrize("limit", ["device_rate", "product_rate", "address_rate"])
def test_the_limit_is_exact_across_processes_that_send_at_the_same_time(clock: Clock, limit: str) -> None:
    """Four workers that share the table let a thousand pass between them: not one more, not one less."""
    flow = Flow(Settings(**{"device_rate": 0.0, limit: 1000.0}), clock=clock)
    assert passed_in_all(flow, lambda: flow.message(5, 10, "pk", "192.0.2.1"), 1000) == 1000
    flow.close()


def test_refused_logins_are_counted_exactly_across_processes(clock: Clock) -> None:
    """Guesses that many workers decide at the same time are as many as one after the other."""
    flow = Flow(Settings(auth_rate=300), clock=clock)
    assert passed_in_all(flow, lambda: refused_login(flow, "lamp", "192.0.2.1"), 300) == 300
    flow.close()


def test_all_devices_of_a_product_share_its_rate(clock: Clock) -> None:
    """Each within its own; another product has its own."""
    flow = Flow(Settings(product_rate=50, product_bytes=10_000), clock=clock)
    device = iter(range(1, 10_000))
    assert passes(lambda: flow.message(next(device), 10, "lamps")) == 50
    assert passes(lambda: flow.message(next(device), 1000, "meters")) == 10
    clock.now += 0.5
    assert passes(lambda: flow.message(next(device), 10, "lamps")) == 25
    flow.close()


def test_all_that_comes_from_an_address_shares_its_rate(clock: Clock) -> None:
    """Messages and logins of whatever device; an address that is not known is nobody's."""
    flow = Flow(Settings(address_rate=20), clock=clock)
    device = iter(range(1, 10_000))
    assert passes(lambda: flow.message(next(device), 10, "pk", "192.0.2.1")) == 20
    with pytest.raises(Refused, match="address_rate"):
        flow.login(1, "192.0.2.1")
    with pytest.raises(Refused, match="address_rate"):
        flow.check_network("192.0.2.1")
    flow.check_network("192.0.2.2")
    assert passes(lambda: flow.login(next(device), "192.0.2.2")) == 20
    assert passes(lambda: flow.message(next(device), 10, "pk", "")) == 2000
    flow.close()


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"device_rate": 10.0}, 1),
        ({"device_bytes": 1000}, 100),
        ({"product_rate": 10.0}, 1),
        ({"product_bytes": 1000}, 100),
        ({"address_rate": 10.0}, 1),
    ],
)
def test_what_one_limit_refuses_is_charged_to_none(clock: Clock, settings: dict[str, float], size: int) -> None:
    """Ten pass and ten thousand are refused: of every other limit ten are used up."""
    wide = {"device_rate": 100.0, "device_bytes": 100_000, "product_rate": 100.0, "product_bytes": 100_000}
    flow = Flow(Settings(**{**wide, "address_rate": 100.0, **settings}), clock=clock)
    for number in range(10_000):
        refused = False
        try:
            flow.message(1, size, "pk", "192.0.2.1")
        except Refused as refusal:
            refused = True
            assert refusal.limit == next(iter(settings))
        assert refused == (number >= 10)
    used = [moment - clock.now for moment in flow._until[4:6]]
    used += [moment - clock.now for table in (flow._products, flow._networks) for moment in moments(flow, table)]
    assert max(used) == pytest.approx(1)
    assert all(
        moment == pytest.approx(10 * size / 100_000) or moment in (pytest.approx(0.1), pytest.approx(1))
        for moment in used
    )
    flow.close()


def moments(flow: Flow, table: Any) -> list[float]:
    """Those of the one name that there is in a table, as far as they are counted."""
    place = table.known(hash("pk")) or table.known(hash("192.0.2.1"))
    return [moment for moment in flow._until[place : place + table._stride - 1] if moment]


def test_a_login_that_the_address_may_not_is_not_charged_to_the_device(clock: Clock) -> None:
    """Nor the other way round."""
    flow = Flow(Settings(address_rate=5, auth_rate=10), clock=clock)
    assert passes(lambda: flow.login(1, "192.0.2.1")) == 5
    assert passes(lambda: flow.login(1, "192.0.2.2")) == 5
    assert passes(lambda: flow.login(1, "192.0.2.3")) == 0
    assert passes(lambda: flow.login(2, "192.0.2.3")) == 5
    flow.close()


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::9", "2001:db8:1:2::"),
        ("2001:db8:1:3::9", "2001:db8:1:3::"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
        ("unknown", ""),
    ],
)
def test_whom_an_address_stands_for(address: str, network: str) -> None:
    """One household has a /64 of IPv6, and could take another address for each request."""
    assert network_of(address) == network


def test_a_thousand_addresses_do_not_push_each_other_out(clock: Clock) -> None:
    """Each is held to its own rate, however their names fall into the table."""
    flow = Flow(Settings(device_rate=0, device_bytes=0, address_rate=2), clock=clock)
    for number in range(1000):
        assert passes(lambda number=number: flow.message(1, 1, "pk", f"198.51.100.{number}")) == 2  # type: ignore[misc]
    for number in range(1000):
        assert passes(lambda number=number: flow.message(1, 1, "pk", f"198.51.100.{number}")) == 0  # type: ignore[misc]
    flow.close()


def test_of_names_that_meet_in_one_bucket_the_one_charged_least_gives_way(clock: Clock) -> None:
    """Eight have room; a ninth takes the place of the one that has the least to lose, and whoever floods stays known."""
    flow = Flow(Settings(device_rate=0, device_bytes=0, product_rate=100), clock=clock)
    table, buckets = flow._products, flow._products._buckets
    tags = [1 + buckets * number for number in range(9)]
    for count, tag in enumerate(tags[:8]):
        place = table.place(tag)
        flow._until[place] = clock.now + 1 + (count + 3) % 8
    table.place(tags[8])
    assert [bool(table.known(tag)) for tag in tags] == [number != 5 for number in range(9)]
    flow.close()


def test_a_lock_that_died_with_its_worker_is_healed(flow: Flow) -> None:
    """A worker killed while it holds a lock neither stops the others nor weakens the limit for good."""
    for lock in flow._locks[:2]:  # the device's is the second
        lock.acquire()
    assert passes(lambda: flow.message(1, 10)) == 30
    flow.heal()
    assert all(lock.acquire(block=False) for lock in flow._locks)


def test_what_is_done_by_one_at_a_time_is_claimed(flow: Flow, clock: Clock) -> None:
    """By one for a device, until it lets go or its time is over; devices do not wait for each other."""
    assert flow.claim(1, 5)
    assert not flow.claim(1, 5)
    assert flow.claim(2, 5)
    flow.release(1)
    assert flow.claim(1, 5)
    clock.now += 4.9
    assert not flow.claim(1, 5)
    clock.now += 0.2
    assert flow.claim(1, 5)
    assert passes(lambda: flow.message(1, 10)) == 30


def test_of_two_workers_one_alone_claims(flow: Flow) -> None:
    """The table is one for all processes."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, bytes([flow.claim(1, 60)]))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1) == b"\x01"
    os.close(read)
    os.close(write)
    assert not flow.claim(1, 60)
    flow.release(1)
    assert flow.claim(1, 60)
