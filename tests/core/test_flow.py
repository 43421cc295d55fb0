"""Flow control: exact for a device, across processes, and nothing charged for what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from uplinkd.core.errors import Code, Refused
from uplinkd.flow import Flow
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
    flow.before_login("pk", device, address)
    flow.refused_login("pk", device, address)


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


def test_the_limit_holds_across_processes(flow: Flow) -> None:
    """Two workers that share the table let thirty pass between them, not thirty each."""
    reading, writing = os.pipe()
    for _ in range(2):
        if not (child := os.fork()):
            os.write(writing, bytes([passes(lambda: flow.message(5, 10), 100)]))
            os._exit(0)
        os.waitpid(child, 0)
    assert sum(os.read(reading, 2)) == 30
    os.close(reading)
    os.close(writing)


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
