"""A full door stays fair: who has had a good answer stays, and the greediest network yields."""

from __future__ import annotations

import random

import pytest

from tests.abuse.conftest import House
from tests.clients.packets import connect
from tests.http.conftest import login_request
from tests.mqtt.conftest import login
from uplinkd.places import Known, Places

GREEDY, OTHER, THIRD = "192.0.2.66", "192.0.2.7", "192.0.2.8"


class Seat:
    """Holds a place, until it is ended."""

    def __init__(self, *, spare: bool = True) -> None:
        self.spare = spare
        self.ended = False

    def abort(self) -> None:
        self.ended = True


def taken(places: Places, network: str, count: int, *, proved: bool = False, most: int = 100) -> list[Seat]:
    seats = [Seat() for _ in range(count)]
    for seat in seats:
        assert places.enter(seat, network, most)
        if proved:
            places.prove(seat)
    return seats


def test_the_greediest_network_yields_to_a_newcomer() -> None:
    """The place that it has held longest, until both hold as many."""
    places = Places(Known(), "tests")
    greedy = taken(places, GREEDY, 100)
    taken(places, OTHER, 50)
    assert [seat.ended for seat in greedy] == [True] * 50 + [False] * 50
    assert not places.enter(Seat(), OTHER, 100)
    assert not places.enter(Seat(), GREEDY, 100)
    assert len(places) == 100


def test_a_network_that_has_had_a_good_answer_comes_before_strangers() -> None:
    """However many or few it holds itself."""
    places = Places(Known(), "tests")
    (good,) = taken(places, OTHER, 1, proved=True)
    taken(places, OTHER, 50)
    taken(places, GREEDY, 49)
    assert places.enter(Seat(), OTHER, 100)
    assert not good.ended


def test_a_stranger_takes_no_place_of_who_has_had_a_good_answer() -> None:
    """Unless that one's network holds more than a quarter of all."""
    places = Places(Known(), "tests")
    fleets = [taken(places, f"198.51.100.{number}", 20, proved=True) for number in range(5)]
    assert not places.enter(Seat(), GREEDY, 100)
    assert not any(seat.ended for fleet in fleets for seat in fleet)
    places = Places(Known(), "tests")
    (fleet,) = (taken(places, OTHER, 100, proved=True),)
    assert places.enter(Seat(), GREEDY, 100)
    assert [seat.ended for seat in fleet] == [True] + [False] * 99


def test_what_is_being_answered_does_not_yield_and_neither_does_a_proxy() -> None:
    """A newcomer is then sent away."""
    places = Places(Known(), "tests")
    for _ in range(50):
        assert places.enter(Seat(spare=False), GREEDY, 100)
    proxy = taken(places, "", 50)
    assert not places.enter(Seat(), OTHER, 100)
    assert not any(seat.ended for seat in proxy)
    assert len(places) == 100


def test_the_books_are_right_after_anything() -> None:
    """A thousand random events; what is left adds up, and an empty room knows nobody."""
    chance, places, here = random.Random(1), Places(Known(), "tests"), []
    for _ in range(5000):
        if chance.random() < 0.6:
            seat = Seat(spare=chance.random() < 0.8)
            if places.enter(seat, chance.choice(["", "a", "b", "c", "d"]), 40):
                here.append(seat)
            if chance.random() < 0.3:
                places.prove(seat)
        elif here:
            places.leave(here.pop(chance.randrange(len(here))))
        here = [seat for seat in here if not seat.ended]
        assert len(places) == len(here) <= 40
        assert places._strangers.most == max(
            (len(seats) for network, seats in places._strangers._of.items() if network), default=0
        )
    for seat in here:
        places.leave(seat)
    assert len(places) == places._strangers.most == places._proved.most == 0
    assert not places._strangers._of


def test_what_is_known_is_bounded() -> None:
    """The networks that were heard of longest ago go first."""
    known = Known()
    for number in range(100_001):
        known.add(str(number))
        known.add("always")
    assert "always" in known
    assert "1" not in known
    assert len(known._networks) == 100_000


@pytest.mark.parametrize("kind", ["https", "mqtt"])
async def test_a_full_door_lets_devices_in(house: House, kind: str) -> None:
    """One address has taken all the places and says nothing; a device comes in all the same, and stays."""
    object.__setattr__(house.door.limits, "connections", 10)
    house.mqtt.most = 10
    if kind == "https":
        idle = [house.connect(GREEDY) for _ in range(12)]
        assert [peer.transport.aborted for peer in idle] == [False] * 10 + [True] * 2
        device = house.connect(OTHER)
        assert (await device.ask(login_request())).code == 0
        for peer in idle:
            if peer.transport.aborted:
                peer.connection.connection_lost(None)
        for number in range(20):
            house.connect(f"203.0.113.{number}")
        assert (await device.ask(login_request())).code == 0
        assert len(house.door.places) == 10
    else:
        clients = [house.client(GREEDY) for _ in range(12)]
        assert [each.transport.aborted for each in clients] == [False] * 10 + [True] * 2
        session = house.client(OTHER)
        assert (await session.ask(connect(login(), 60)))[0][3] == 0
        for number in range(20):
            house.client(f"203.0.113.{number}")
        assert not session.transport.closed
        assert len(house.mqtt.places) == 10


async def test_a_connection_that_ends_gives_its_place_back(house: House) -> None:
    """However it ends."""
    peer, client = house.connect(), house.client()
    assert len(house.door.places) == len(house.mqtt.places) == 1
    peer.connection.connection_lost(None)
    client.connection.connection_lost(None)
    assert len(house.door.places) == len(house.mqtt.places) == 0
