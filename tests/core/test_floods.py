"""What flow control holds back again and again is recorded once, then counted."""

from __future__ import annotations

import pytest

from uplinkd.core.errors import Code, Refused
from uplinkd.floods import Floods
from uplinkd.gateway import Outcome, Request


class Desk:
    """Floods with what they have recorded, and a clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.recorded: list[Outcome] = []
        self.floods = Floods(self.recorded.append, lambda: self.now)

    def met(self, limit: str = "device_rate", device: str = "lamp", address: str = "192.0.2.1") -> bytes:
        request = Request(
            address, None, b"", network=address, product_key="pk", device_name=device, topic="/pk/lamp/up"
        )
        return self.floods.met(Refused(Code.REQUEST_TOO_MANY, "too fast", limit=limit), request, "topic").body

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.floods.tick()


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_the_first_is_recorded_at_once_and_a_thousand_more_together(desk: Desk) -> None:
    """All of them have the one requestId that leads to both records."""
    bodies = {desk.met() for _ in range(1001)}
    (first,) = desk.recorded
    assert (first.times, first.product_key, first.device_name, first.topic) == (1, "pk", "lamp", "/pk/lamp/up")
    desk.later(11)
    assert [each.times for each in desk.recorded] == [1, 1000]
    assert {each.request_id for each in desk.recorded} == {first.request_id}
    assert bodies == {
        b'{"code":40000,"message":"request too many","info":{"requestId":"%b"}}' % first.request_id.encode()
    }


def test_a_flood_that_goes_on_is_recorded_now_and_then(desk: Desk) -> None:
    """Not more often than every ten seconds, and nothing once it has ended."""
    for _ in range(60):
        desk.met()
        desk.later(1)
    assert sum(each.times for each in desk.recorded) >= 50
    assert len(desk.recorded) <= 7
    desk.later(20)
    desk.later(20)
    count = len(desk.recorded)
    desk.later(100)
    assert len(desk.recorded) == count
    assert sum(each.times for each in desk.recorded) == 60
    desk.met()
    assert desk.recorded[-1].request_id != desk.recorded[0].request_id


def test_each_limit_is_recorded_for_whom_it_holds(desk: Desk) -> None:
    """A device's for each device, a product's once for all its devices, an address's once for all that it asks for."""
    for limit in ("device_rate", "product_rate", "address_rate"):
        for device in ("lamp", "lamp2"):
            desk.met(limit, device)
    assert [(each.product_key, each.device_name, each.address) for each in desk.recorded] == [
        ("pk", "lamp", "192.0.2.1"),
        ("pk", "lamp2", "192.0.2.1"),
        ("pk", "", ""),
        ("", "", "192.0.2.1"),
    ]


def test_an_attackers_guesses_are_not_taken_for_the_devices_own(desk: Desk) -> None:
    """Refused logins of one device are told apart by address."""
    desk.met("auth_rate", address="192.0.2.1")
    desk.met("auth_rate", address="198.51.100.1")
    assert [each.address for each in desk.recorded] == ["192.0.2.1", "198.51.100.1"]


def test_more_kinds_than_can_be_told_apart_are_counted_together(desk: Desk) -> None:
    """However many devices flood, memory and disk are bounded."""
    for number in range(12_000):
        desk.met(device=f"d{number}")
    assert len(desk.recorded) == 10_001
    desk.later(11)
    assert desk.recorded[-1].times == 1999


def test_what_was_counted_is_recorded_before_a_stop(desk: Desk) -> None:
    """Also in the middle of the ten seconds."""
    for _ in range(5):
        desk.met()
    desk.floods.flush()
    assert sum(each.times for each in desk.recorded) == 5
