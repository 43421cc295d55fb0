"""What the MQTT door counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.packets import publish, subscribe
from tests.mqtt.conftest import Client, House, login
from tests.room import DEVICE, PRODUCT
from uplinkd.metrics import Metrics, Reading

TOPIC = f"/{PRODUCT}/{DEVICE}/user/update"


@pytest.fixture
def metrics(house: House) -> Iterator[Metrics]:
    made = Metrics(1)
    house.mqtt.meter = made.meter(0)
    yield made
    made.close()


def read(house: House, metrics: Metrics) -> Reading:
    house.mqtt.meter.flush()
    return metrics.read()


def some(reading: Reading) -> dict[tuple[str, int], int]:
    """Those that there were."""
    return {pair: count for pair, count in reading.requests.items() if count}


async def test_logins_publishes_and_subscriptions_are_counted(house: House, metrics: Metrics) -> None:
    """Each under its own name, with its code."""
    client = Client(house)
    await client.open()
    assert house.mqtt.sessions == 1
    await client.ask(publish(TOPIC, b"one"))
    await client.ask(publish(TOPIC, b"two", qos=0))
    await client.ask(subscribe("/not/yours/user/get"))
    await client.ask(subscribe(f"/{PRODUCT}/{DEVICE}/user/get"))
    await Client(house).open(login(secret="wrong"))
    reading = read(house, metrics)
    assert some(reading) == {
        ("mqtt_connect", 0): 1,
        ("mqtt_connect", 20000): 1,
        ("mqtt_publish", 0): 2,
        ("mqtt_subscribe", 0): 1,
        ("mqtt_subscribe", 30001): 1,
    }
    assert reading.latency["mqtt_publish"].count == 2
    assert reading.accepted["mqtt"] == 2
    client.lose()
    assert house.mqtt.sessions == 0


async def test_every_publish_that_the_engine_refuses_is_counted(house: House, metrics: Metrics) -> None:
    """Though one alone ends the session and stands in the record."""
    client = Client(house)
    await client.open()
    await house.engine.stop()
    await client.ask(publish(TOPIC, b"one") + publish(TOPIC, b"two"))
    await house.engine.start()
    assert some(read(house, metrics)) == {("mqtt_connect", 0): 1, ("mqtt_publish", 30001): 2}


async def test_a_note_is_no_refusal(house: House, metrics: Metrics) -> None:
    """What is recorded and not refused, such as a session that is taken over, is not counted as one."""
    first = Client(house)
    await first.open()
    await Client(house).open()
    await first.heard()
    assert any("another session" in outcome.reason for outcome in house.outcomes)
    assert some(read(house, metrics)) == {("mqtt_connect", 0): 2}


async def test_what_is_no_mqtt_is_counted(house: House, metrics: Metrics) -> None:
    await Client(house).ask(b"GET / HTTP/1.1\r\n\r\n")
    assert some(read(house, metrics)) == {("mqtt", 10001): 1}
