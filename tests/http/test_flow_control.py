"""Flow control at the HTTPS door: what a refusal costs, what guessing costs, and whom it never hits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.http.conftest import House, Peer, login_request, publish_request, request
from tests.room import DEVICE, PRODUCT, Transport, open_room
from uplinkd.http.protocol import Connection
from uplinkd.metrics import Metrics
from uplinkd.settings import Settings

STRONG = "Uo9b2xFQk7mZt3Wc8VhY5nRpL0aSdE1g"
ATTACKER, ELSEWHERE = "198.51.100.1", "192.0.2.7"


@pytest.fixture
def lock(house: House) -> dict[str, Any]:
    """A device with a secret as the server makes them."""
    house.registry.create_device(PRODUCT, "lock", secret=STRONG)
    return {"device": "lock", "secret": STRONG}


async def guess(house: House, times: int, address: str = ATTACKER, device: str = "lock") -> list[int]:
    peer = house.connect(address)
    return [(await peer.ask(login_request(device=device, secret="guess"))).code for _ in range(times)]


def count_calls(owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each call of a method from now on."""
    calls: list[tuple[Any, ...]] = []
    method = getattr(owner, name)

    def counted(*given: Any) -> Any:
        calls.append(given)
        return method(*given)

    monkeypatch.setattr(owner, name, counted)
    return calls


# what a refusal costs


async def test_a_flood_of_refusals_reaches_neither_the_engine_nor_the_record(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three thousand of them: thirty were stored, one entry says so, a second one counts the others."""
    token, published = await house.token(), count_calls(house.engine, "publish", monkeypatch)
    house.flow._clock = lambda: 1000.0
    peer = house.connect()
    metrics = Metrics(1)
    house.door.meter = metrics.meter(0)
    for _ in range(3000):
        peer.connection.data_received(publish_request(token))
    codes = [reply.code for reply in await peer.replies()]
    assert codes == [0] * 30 + [40000] * 2970
    assert len([each for each in published if not each[0].startswith(b"/.as.")]) == 30
    house.later(11)
    assert [outcome.times for outcome in house.outcomes] == [1, 2969]
    assert house.outcomes[0].reason == "the device sends more than 30 messages a second (device_rate)"
    house.door.meter.flush()
    reading = metrics.read()
    assert reading.requests["topic", 40000] == reading.limited["device_rate"] == 2970
    assert reading.latency["topic"].count == 3000
    metrics.close()


async def test_the_answers_of_a_flood_lead_to_its_record(house: House) -> None:
    """By the requestId that each of them has."""
    token = await house.token()
    house.flow._clock = lambda: 1000.0
    peer = house.connect()
    replies = [await peer.ask(publish_request(token)) for _ in range(40)][30:]
    house.later(11)
    ids = {reply.json["info"]["requestId"] for reply in replies}
    assert ids == {outcome.request_id for outcome in house.outcomes}
    assert all(reply.json["message"] == "request too many" for reply in replies)


async def test_while_nothing_can_pass_nothing_is_asked(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first refusal it is known how long that holds: the next ones cost neither a look-up nor a lock. Another token on
    the same connection, and what comes when the time is over, are looked at."""
    house.registry.create_device(PRODUCT, "second", secret=STRONG)
    reply = await house.connect().ask(login_request(device="second", secret=STRONG))
    other = publish_request(reply.json["info"]["token"], topic=f"/{PRODUCT}/second/user/update")
    raw, now, clock = publish_request(await house.token()), [5000.0], [1000.0]
    monkeypatch.setattr("uplinkd.http.protocol.monotonic", lambda: now[0])
    house.flow._clock = lambda: clock[0]
    asked = count_calls(house.gateway, "publish", monkeypatch)
    peer = house.connect()
    assert [(await peer.ask(raw)).code for _ in range(50)] == [0] * 30 + [40000] * 20
    assert len(asked) == 31
    assert (await peer.ask(other)).code == 0
    assert len(asked) == 32
    for step in (0.02, 0.02):
        now[0] += step
        clock[0] += step
        last = await peer.ask(raw)
    assert last.code == 0
    assert len(asked) == 33
    house.later(11)
    assert sum(outcome.times for outcome in house.outcomes) == 21


@pytest.mark.parametrize("settings", [{"device_rate": 0.001}])
async def test_a_device_that_is_disabled_while_it_floods_is_told_so(tmp_path: Path, settings: dict[str, float]) -> None:
    """Within the second that any worker may take to hear of it, however slow its rate is."""
    async with open_room(Settings(data=tmp_path, **settings), House) as house:
        token = await house.token()
        peer = house.connect()
        assert [(await peer.ask(publish_request(token))).code for _ in range(3)] == [0, 40000, 40000]
        house.registry.set_enabled(PRODUCT, DEVICE, False)
        house.cache.forget()
        assert await until_other(peer, publish_request(token), 40000) == 20001


async def until_other(peer: Peer, raw: bytes, code: int) -> int:
    """The first code that is another one."""
    for _ in range(100):
        if (found := (await peer.ask(raw)).code) != code:
            return found
        await asyncio.sleep(0.01)
    return code


# products and addresses


@pytest.fixture
async def strict(tmp_path: Path) -> AsyncIterator[House]:
    """Ten messages a second of a product, twenty requests a second of an address; more devices."""
    settings = Settings(data=tmp_path, product_rate=10, address_rate=20, auth_rate=0)
    async with open_room(settings, House) as house:
        house.flow._clock = lambda: 1000.0
        for number in range(3):
            house.registry.create_device(PRODUCT, f"lamp{number}", secret=STRONG)
        yield house


async def test_a_products_devices_share_its_rate(strict: House) -> None:
    """Each from an address of its own; the record names the product, for it is nobody's fault alone."""
    tokens = [
        (await strict.connect(f"192.0.2.{number}").ask(login_request(device=f"lamp{number}", secret=STRONG))).json[
            "info"
        ]["token"]
        for number in range(3)
    ]
    codes = []
    for turn in range(15):
        number = turn % 3
        topic = f"/{PRODUCT}/lamp{number}/user/update"
        codes.append((await strict.connect(f"192.0.2.{number}").ask(publish_request(tokens[number], topic=topic))).code)
    assert codes == [0] * 10 + [40000] * 5
    outcome = strict.outcomes[-1]
    assert (outcome.product_key, outcome.device_name) == (PRODUCT, "")
    assert "(product_rate)" in outcome.reason


async def test_an_address_that_asks_too_much_is_refused_before_anything_is_done_for_it(
    strict: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its login is not even parsed; another address goes on."""
    assert [await login(strict, ATTACKER) for _ in range(21)] == [0] * 20 + [40000]
    monkeypatch.setattr("uplinkd.core.wire.login", None)
    assert await login(strict, ATTACKER) == 40000
    monkeypatch.undo()
    assert await login(strict, ELSEWHERE) == 0
    assert "(address_rate)" in strict.outcomes[0].reason


async def login(house: House, address: str, **members: Any) -> int:
    return (await house.connect(address).ask(login_request(**members))).code


async def test_one_household_has_one_rate(strict: House) -> None:
    """Whatever address of its /64 it takes."""
    codes = [await login(strict, f"2001:db8::{number:x}") for number in range(1, 22)]
    assert codes == [0] * 20 + [40000]
    assert await login(strict, "2001:db8:0:1::1") == 0


# behind a proxy


def proxied(house: House) -> Peer:
    """A proxy's connection at the plain-text port."""
    peer = Peer(Connection(house.door, proxied=True), Transport("127.0.0.1"))
    peer.connection.connection_made(peer.transport)
    return peer


def forwarded(raw: bytes, *values: str) -> bytes:
    lines = b"".join(f"X-Forwarded-For: {value}\r\n".encode() for value in values)
    return raw.replace(b"Host: h\r\n", b"Host: h\r\n" + lines)


async def test_a_proxy_that_does_not_say_for_whom_it_asks_is_not_punished_for_all(strict: House) -> None:
    """Its address is that of every device behind it; what a device says of itself is not believed."""
    peer = proxied(strict)
    codes = [(await peer.ask(forwarded(login_request(), "203.0.113.5"))).code for _ in range(60)]
    assert codes == [0] * 60
    assert strict.outcomes == []


async def test_a_proxy_that_says_for_whom_it_asks_is_believed(strict: House) -> None:
    """The last entry is its own; those before it are the client's to make up. A record names the client."""
    strict.door.forwarded_for = True
    peer = proxied(strict)
    raw = login_request()
    codes = [(await peer.ask(forwarded(raw, f"10.0.0.{number}, 203.0.113.5"))).code for number in range(21)]
    assert codes == [0] * 20 + [40000]
    assert strict.outcomes[-1].address == "203.0.113.5"
    assert (await peer.ask(forwarded(raw, "203.0.113.5", "203.0.113.6"))).code == 0
    assert (await peer.ask(forwarded(raw, "unknown"))).code == 0


async def test_nobody_else_is_believed(strict: House) -> None:
    """A device that connects by itself cannot pretend to be another address."""
    strict.door.forwarded_for = True
    peer = strict.connect(ATTACKER)
    codes = [(await peer.ask(forwarded(login_request(), f"203.0.113.{number}"))).code for number in range(21)]
    assert codes == [0] * 20 + [40000]
    assert strict.outcomes[-1].address == ATTACKER


# guessing


async def test_the_31st_guess_from_an_address_is_40000(house: House, lock: dict[str, Any]) -> None:
    """And so are all that follow; they are counted in one record."""
    assert await guess(house, 40) == [20000] * 30 + [40000] * 10
    house.later(11)
    assert [outcome.times for outcome in house.outcomes] == [1] * 31 + [9]


async def test_an_attacker_does_not_lock_a_device_out(house: House, lock: dict[str, Any]) -> None:
    """Neither elsewhere nor behind the same address: a right sign passes, however many wrong ones came before it and come
    between."""
    await guess(house, 100)
    assert await login(house, ELSEWHERE, **lock) == 0
    for _ in range(25):
        assert set(await guess(house, 3)) == {40000}
        assert await login(house, ATTACKER, **lock) == 0


async def test_a_device_that_this_worker_does_not_know_yet_is_not_locked_out_either(
    house: House, lock: dict[str, Any]
) -> None:
    """The guesses came to another worker, or before a restart."""
    await guess(house, 100)
    house.cache.forget()
    assert await login(house, ATTACKER, **lock) == 0


async def test_a_thousand_addresses_do_not_lock_a_device_out(house: House, lock: dict[str, Any]) -> None:
    """Each may guess as if it were alone, and the device signs in from elsewhere and from among them."""
    for number in range(1000):
        address = f"198.51.{number // 250}.{number % 250}"
        for _ in range(30):
            house.flow.refused_login(PRODUCT, "lock", address)
        if number % 100 == 0:
            assert await guess(house, 1, address) == [40000]
            assert await login(house, address, **lock) == 0
    assert await login(house, ELSEWHERE, **lock) == 0


async def test_a_short_secret_is_not_guessed_either(house: House) -> None:
    """A right guess is told from a wrong one no more, so nobody learns it; the device itself signs in from elsewhere."""
    assert await guess(house, 31, device=DEVICE) == [20000] * 30 + [40000]
    assert await login(house, ATTACKER) == 40000
    assert await login(house, ELSEWHERE) == 0


async def test_guessers_do_not_keep_the_registry_busy(
    house: House, lock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 refused logins of an address, then ten times as many look-ups a minute; the device that is known is let in all the
    same."""
    house.flow._clock = lambda: 1000.0
    house.flow._login_cost = 0.0
    found = count_calls(house.registry, "find_device", monkeypatch)
    assert await login(house, ELSEWHERE, **lock) == 0
    house.flow._refusal_cost = 60 / 6
    found.clear()
    codes = [(await house.connect(ATTACKER).ask(login_request(device=f"d{number}"))).code for number in range(100)]
    assert codes == [20000] * 6 + [40000] * 94
    assert len(found) == 6 + 6
    assert await login(house, ATTACKER, **lock) == 0


async def test_a_login_that_is_refused_again_and_again_is_refused_unseen(
    house: House, lock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Firmware with a wrong secret says the same each time: it is looked at four times a second, from its own address alone."""
    await guess(house, 31)
    asked = count_calls(house.gateway, "authenticate", monkeypatch)
    assert await guess(house, 20) == [40000] * 20
    assert len(asked) == 0
    assert await login(house, ELSEWHERE, device="lock", secret="guess") == 20000
    assert await login(house, ATTACKER, device="lock", secret="another guess") == 40000
    assert len(asked) == 4  # each once more with what the registry says
    house.later(0.3)
    assert await guess(house, 20) == [40000] * 20
    assert len(asked) == 6
    house.later(11)
    assert sum(outcome.times for outcome in house.outcomes if outcome.code == 40000) == 42


async def test_all_guesses_beyond_the_limit_cost_the_same(
    house: House, lock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would tell which devices there are."""
    await guess(house, 30)
    await guess(house, 30, device="nobody")
    await guess(house, 30, device=DEVICE)
    found = count_calls(house.registry, "find_device", monkeypatch)
    for device in ("lock", "nobody", DEVICE):
        house.door.tick()
        found.clear()
        assert await guess(house, 1, device=device) == [40000]
        assert len(found) == 1
    found.clear()
    assert await login(house, ATTACKER) == 40000  # the right sign of a short secret
    assert len(found) == 1


async def test_what_is_no_login_is_not_counted_as_a_guess(house: House, lock: dict[str, Any]) -> None:
    """Malformed ones are 10001, as often as they come."""
    peer = house.connect(ATTACKER)
    codes = {(await peer.ask(request("/auth", b"{}", "Content-Type: application/json"))).code for _ in range(50)}
    assert codes == {10001}
    assert await guess(house, 1) == [20000]
