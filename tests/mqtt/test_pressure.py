"""Clients and engines that misbehave: what is bounded, what is slowed down, what ends, and that nobody else notices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.clients.packets import PINGREQ, connect, publish, subscribe
from tests.mqtt.conftest import CONNACK, House, login, puback
from tests.mqtt.test_session import DOWN, UP, make_app, suback
from tests.room import DEVICE, PRODUCT, SECRET, settled
from uplinkd.core.errors import Code, Unavailable
from uplinkd.engine import Query
from uplinkd.metrics import Metrics
from uplinkd.mqtt import session

PINGRESP = b"\xd0\x00"


class Engine:
    """An engine that answers when the test says so; what else is published goes its way."""

    def __init__(self, house: House) -> None:
        self.held: list[Callable[[int, str], None]] = []
        self._house = house
        self._publish = house.engine.publish
        house.engine.publish = self._hold  # type: ignore[method-assign, assignment]

    def _hold(self, subject: bytes, payload: bytes, done: Any, *how: Any) -> None:
        if subject.startswith(b"/.as."):
            self._publish(subject, payload, done, *how)
        else:
            self.held.append(done)

    def answer(self, count: int, fault: str = "") -> None:
        for _ in range(count):
            self.held.pop(0)(0 if fault else 1, fault)


async def test_reports_at_qos_0_that_are_not_stored_do_not_stop_the_session(house: House) -> None:
    """A hundred of them are refused by the engine: the socket is read on, and what comes then is answered."""
    house.flow._message_cost = house.flow._byte_cost = 0.0
    client = await house.session()
    engine = Engine(house)
    client.send(publish(UP, b"x", qos=0) * 100 + publish(UP, b"x", number=7))
    await settled()
    assert client.transport.paused
    engine.answer(100, "the engine is away")
    assert not client.transport.paused
    engine.answer(1)
    assert await client.heard() == [puback(7)]


async def test_a_device_that_is_slowed_down_is_not_taken_for_silent(house: House) -> None:
    """Its PINGREQs lie unread behind its own reports; it is we who do not listen."""
    now = [1000.0]
    house.flow._clock = lambda: now[0]
    client = await house.session()
    client.send(publish(UP, b"x", number=1) * 100)
    for _ in range(3):
        house.later(89)
    assert not client.transport.closed
    now[0] += 1
    for _ in range(3):
        await asyncio.sleep(0.06)
        now[0] += 1
    assert await client.heard() == [puback(1)] * 100
    house.later(91)
    assert client.transport.aborted


async def test_a_products_and_an_addresss_limits_slow_down_as_the_devices_own_do(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices share what their product may send; nothing is lost, the record says who waits, each message is counted once."""
    monkeypatch.setattr(session, "_THROTTLE_SECONDS", 0.001)
    monkeypatch.setattr(session, "_LONGEST_THROTTLE_SECONDS", 0.002)
    now = [1000.0]
    flow = house.flow
    flow._clock = lambda: now[0]
    flow._wide, flow._product_cost = True, 1 / 10
    house.registry.create_device(PRODUCT, "second", secret=SECRET)
    clients = [await house.session(), await house.session("second")]
    metrics = Metrics(1)
    house.mqtt.meter = metrics.meter(0)
    for client, device in zip(clients, (DEVICE, "second"), strict=True):
        topic = f"/{PRODUCT}/{device}/user/update"
        client.send(b"".join(publish(topic, b"x", number=number) for number in range(1, 11)))
    got = 0
    while got < 20:
        await asyncio.sleep(0.02)
        heard = [len(await client.heard()) for client in clients]
        got += sum(heard)
        assert sum(heard) <= 10
        now[0] += 0.5
    assert not any(client.transport.closed for client in clients)
    house.later(11)
    (first, *more) = [outcome for outcome in house.outcomes if outcome.code]
    assert (first.product_key, first.device_name) == (PRODUCT, "")
    assert "slowed down" in first.reason
    house.mqtt.meter.flush()
    held = metrics.read().limited["product_rate"]
    assert 2 <= held <= 20
    assert first.times + sum(each.times for each in more) == held
    metrics.close()


async def test_a_connect_beyond_the_addresss_rate_is_told_to_come_back(house: House) -> None:
    """CONNACK 3, and one entry for a flood of them."""
    house.flow._clock = lambda: 1000.0
    house.flow._wide, house.flow._request_cost, house.flow._login_cost = True, 1 / 5, 0.0
    answers = [(await house.client().open())[0] for _ in range(10)]
    assert answers == [CONNACK] * 5 + [bytes((0x20, 2, 0, 3))] * 5
    assert (await house.client("198.51.100.9").open())[0] == CONNACK
    house.later(11)
    assert [outcome.times for outcome in house.outcomes if outcome.code] == [1, 4]
    assert {outcome.address for outcome in house.outcomes if outcome.code} == {"192.0.2.7"}


async def test_a_client_that_does_not_read_is_not_read_either(house: House) -> None:
    """Else its answers would pile up here as fast as it can ask."""
    client = await house.session()
    client.connection.pause_writing()
    assert client.transport.paused
    client.send(PINGREQ * 1000)
    assert len(client.transport.writes) == 1
    client.connection.resume_writing()
    assert await client.heard() == [PINGRESP] * 1000
    assert not client.transport.paused


async def test_a_client_that_never_reads_is_dropped(house: House) -> None:
    """After 30 s, whatever its keep-alive."""
    client = await house.session()
    client.connection.pause_writing()
    house.later(29)
    assert not client.transport.closed
    house.later(2)
    assert client.transport.aborted
    assert "has not read for 30 s" in client.reason


# a stop


async def test_a_stop_waits_for_what_has_arrived_and_for_nothing_more(house: House) -> None:
    """A device that goes on publishing cannot hold it up."""
    client = await house.session()
    engine = Engine(house)
    client.send(publish(UP, b"x", number=1))
    house.mqtt.drain()
    client.send(publish(UP, b"x", number=2))
    assert len(engine.held) == 1
    engine.answer(1)
    assert client.transport.closed
    assert await client.heard() == [puback(1)]


async def test_a_stop_does_not_wait_for_what_was_refused(house: House) -> None:
    """The last report under way was of QoS 0 and is not stored: the session is closed all the same."""
    client = await house.session()
    engine = Engine(house)
    client.send(publish(UP, b"x", qos=0))
    house.mqtt.drain()
    engine.answer(1, "the engine is away")
    assert client.transport.closed


# names


async def test_a_device_may_be_called_like_an_application(house: House) -> None:
    """Its user name has an &, an application's has none."""
    house.registry.create_device(PRODUCT, "app-lamp", secret=SECRET)
    assert await house.client().open(login("app-lamp")) == [CONNACK]


@pytest.mark.parametrize("topic", ["x", "broadcast", "x/y", "/", "//", "$SYS/x"])
async def test_whatever_an_application_publishes_to_is_answered(house: House, topic: str) -> None:
    """By the end of the connection, with the reason."""
    client = house.client()
    await client.open(make_app(house))
    assert await client.ask(publish(topic, b"x")) == []
    assert client.transport.closed
    assert topic in client.reason
    assert house.outcomes[-1].code is Code.PUBLISH_MESSAGE_ERROR


# changes in the middle of signing in


async def test_a_login_that_takes_too_long_is_told_from_none(house: House) -> None:
    """The operator looks at the engine then, not at the device."""

    async def hangs(device_id: int) -> None:
        await asyncio.sleep(60)

    house.downlink.session = hangs  # type: ignore[method-assign]
    client = house.client()
    client.send(connect(login(), clean=False))
    await asyncio.sleep(0.05)
    house.later(11)
    assert client.transport.aborted
    assert client.reason == "the login could not be decided within 10 s"
    for task in house.mqtt.tasks:
        task.cancel()


async def test_the_engines_absence_is_no_fault_of_a_login(house: House) -> None:
    """CONNACK 3 for who wants a persistent session; a clean one needs nothing of the engine."""
    house.bus.connected = False
    assert (await house.client().open(clean=False))[0][3] == 3
    assert house.outcomes[-1].code is Code.UPDATE_SESSION_ERROR
    assert await house.client().open() == [CONNACK]


async def test_the_registrys_absence_is_no_fault_of_a_login(house: House) -> None:
    """CONNACK 3; the device is to come back."""

    def away(*_: object) -> object:
        raise Unavailable("the registry is away")

    house.cache._registry = type("Away", (), {"find_device": away})()
    assert (await house.client().open())[0][3] == 3
    assert (house.outcomes[-1].code, house.outcomes[-1].reason) == (Code.UPDATE_SESSION_ERROR, "the registry is away")


async def test_a_client_that_goes_while_it_signs_in_leaves_nothing(house: House) -> None:
    """No session, no presence, no connection."""
    client = house.client()
    client.send(connect(login(), clean=False))
    client.lose()
    await asyncio.sleep(0.05)
    await settled()
    assert not list(house.roster.sessions())
    assert not house.mqtt.connections
    assert not house.mqtt.products
    await house.presence.flush()
    assert not house.registry.device(PRODUCT, DEVICE).session


async def test_what_is_sent_along_with_the_connect_is_done(house: House) -> None:
    """A client need not wait for its CONNACK [MQTT-3.1.4-5]."""
    client = house.client()
    answers = await client.ask(connect(login()) + subscribe(DOWN) + publish(UP, b"x", number=3) + PINGREQ)
    assert answers[:2] == [CONNACK, suback(1, 1)]
    assert sorted(answers[2:]) == sorted([puback(3), PINGRESP])
    assert len(await house.engine.latest(Query(topic=UP), 10)) == 1


async def test_a_refused_login_has_no_second_try(house: House) -> None:
    """What follows in the same breath is not looked at."""
    client = house.client()
    answers = await client.ask(connect(login(secret="wrong")) + connect(login()) + publish(UP, b"x"))
    assert answers == [bytes((0x20, 2, 0, 4))]
    assert await house.engine.latest(Query(), 10) == []


async def test_a_second_connect_ends_the_session(house: House) -> None:
    """[MQTT-3.1.0-2]"""
    client = await house.session()
    assert await client.ask(connect(login())) == []
    assert client.transport.closed
    assert "a second CONNECT" in client.reason


async def test_too_many_connections_are_not_taken(house: House) -> None:
    """Nor any while the worker stops."""
    house.mqtt.most = 1
    await house.session()
    assert house.client().transport.aborted
    house.mqtt.most = 10
    house.mqtt.drain()
    assert house.client().transport.aborted
