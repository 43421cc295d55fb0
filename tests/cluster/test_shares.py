"""Limits hold across gateways, nearly as within one: what passes at one is charged at the others a moment later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from tests.room import Crew, settled
from uplinkd.core.errors import Refused
from uplinkd.engine.memory import MemoryBus
from uplinkd.flow import Flow
from uplinkd.settings import Settings
from uplinkd.shares import Shares

DEVICE, PRODUCT, NETWORK = 7, "a1Lamps", "192.0.2.1"


class Gateway:
    def __init__(self, bus: MemoryBus, name: str, settings: Settings, clock: Callable[[], float]) -> None:
        self.flow = Flow(settings, shared=False, clock=clock)
        self.peers = Crew(bus, "0")
        self.peers.others = True
        self.shares = Shares(bus, self.flow, self.peers, name)
        self.shares.tell()  # from now on notes are taken


class Town:
    """Two gateways and their clock; ten times a second they tell each other."""

    def __init__(self, settings: Settings) -> None:
        self.now = 1000.0
        self.bus = MemoryBus()
        self.gateways = [Gateway(self.bus, name, settings, lambda: self.now) for name in "ab"]
        for each in self.gateways:
            each.peers.beat()

    async def pass_by(self, seconds: float, act: Callable[[Flow], object], rate: float) -> int:
        """Have `act` tried `rate` times a second at each gateway; how often it passed."""
        passed, due = 0, [self.now] * len(self.gateways)
        told, end = self.now + 0.1, self.now + seconds
        while self.now < end:
            self.now += 0.001
            for number, gateway in enumerate(self.gateways):
                if self.now >= due[number]:
                    due[number] += 1 / rate
                    with suppress(Refused):
                        act(gateway.flow)
                        passed += 1
            if self.now >= told:
                told += 0.1
                for gateway in self.gateways:
                    gateway.shares.tell()
                await settled(5)
        return passed


@pytest.fixture
def towns() -> Iterator[Callable[[Settings], Town]]:
    made: list[Town] = []

    def make(settings: Settings) -> Town:
        made.append(Town(settings))
        return made[-1]

    yield make
    for town in made:
        for gateway in town.gateways:
            gateway.flow.close()


async def test_a_device_that_sends_through_both_gets_its_rate_once(towns: Callable[[Settings], Town]) -> None:
    """And at first a burst at each."""
    town = towns(Settings(device_rate=30))
    await town.pass_by(2, lambda flow: flow.message(DEVICE, 10), 100)
    passed = await town.pass_by(10, lambda flow: flow.message(DEVICE, 10), 100)
    assert 0.85 * 300 <= passed <= 1.15 * 300


@pytest.mark.parametrize("rate", [16, 20, 29])
async def test_so_does_one_that_stays_below_its_rate_at_each(towns: Callable[[Settings], Town], rate: float) -> None:
    """What each gateway sees is in order; together it is not."""
    town = towns(Settings(device_rate=30))
    await town.pass_by(5, lambda flow: flow.message(DEVICE, 10), rate)
    passed = await town.pass_by(10, lambda flow: flow.message(DEVICE, 10), rate)
    assert 0.85 * 300 <= passed <= 1.15 * 300


async def test_one_that_sends_little_is_not_told_of(towns: Callable[[Settings], Town]) -> None:
    """It costs nobody anything, and is never refused."""
    town = towns(Settings(device_rate=30))
    told: list[bytes] = []
    town.bus.listen("uplinkd.charged.*", lambda each: told.append(each.payload))
    assert await town.pass_by(3, lambda flow: flow.message(DEVICE, 10), 5) >= 30
    assert told == []


async def test_bytes_products_and_networks_hold_too(towns: Callable[[Settings], Town]) -> None:
    settings = Settings(device_rate=0, device_bytes=1000)
    town = towns(settings)
    await town.pass_by(2, lambda flow: flow.message(DEVICE, 50), 100)
    assert 0.85 * 100 <= await town.pass_by(5, lambda flow: flow.message(DEVICE, 50), 100) <= 1.15 * 100
    for limit in ("product_rate", "address_rate"):
        town = towns(Settings(device_rate=0, **{limit: 40.0}))
        numbers = iter(range(1, 100_000))

        def send(flow: Flow, numbers: Iterator[int] = numbers) -> None:
            flow.message(next(numbers), 10, PRODUCT, NETWORK)

        await town.pass_by(2, send, 100)
        assert 0.85 * 200 <= await town.pass_by(5, send, 100) <= 1.15 * 200, limit


async def test_refused_logins_are_told_one_by_one(towns: Callable[[Settings], Town]) -> None:
    """Who guesses finds no further tries at another gateway."""
    town = towns(Settings(auth_rate=10))
    first, second = town.gateways
    for _ in range(10):
        assert first.flow.refused_login(PRODUCT, "lamp", NETWORK) == ""
    first.shares.tell()
    await settled()
    assert second.flow.guessed(PRODUCT, "lamp", NETWORK) == "auth_rate"
    assert second.flow.guessed(PRODUCT, "other", NETWORK) == ""


async def test_so_are_those_with_names_of_any_length(towns: Callable[[Settings], Town]) -> None:
    """Nobody hides guesses behind long names, which together would be more than NATS takes."""
    town = towns(Settings(auth_rate=10))
    first, second = town.gateways
    for number in range(200):
        assert first.flow.refused_login(PRODUCT, f"{number}" + "é" * 1900, "192.0.2.2") == ""
    for _ in range(10):
        assert first.flow.refused_login(PRODUCT, "lamp", NETWORK) == ""
    first.shares.tell()
    await settled()
    assert second.flow.guessed(PRODUCT, "lamp", NETWORK) == "auth_rate"


async def test_logins_are_charged_everywhere(towns: Callable[[Settings], Town]) -> None:
    town = towns(Settings(auth_rate=10))
    first, second = town.gateways
    for _ in range(10):
        first.flow.login(DEVICE)
    first.shares.tell()
    await settled()
    with pytest.raises(Refused):
        second.flow.login(DEVICE)


async def test_nothing_is_noted_where_nobody_else_lives(towns: Callable[[Settings], Town]) -> None:
    town = towns(Settings())
    gateway = town.gateways[0]
    gateway.peers.others = False
    gateway.shares.tell()
    gateway.flow.message(DEVICE, 10)
    assert gateway.flow.notes is None
