"""paho-mqtt publishes: what was acknowledged is stored, and stored before it was acknowledged."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.clients.conftest import LIMITS, MakeSession
from tests.clients.fleet import Thing, make_fleet, until
from tests.clients.session import Session
from tests.house import freeze, serving


def test_an_acknowledged_message_is_stored_as_it_was(session: MakeSession, thing: Thing) -> None:
    """Payload, topic and origin; of any octets and of none, on custom topics and system topics."""
    device = session(thing).opened()
    property_post = f"/sys/{thing.product}/{thing.name}/thing/event/property/post"
    sent = [
        (thing.topic(), os.urandom(100_000)),
        (thing.topic("user/update/error"), b""),
        (property_post, b'{"id":"1"}'),
    ]
    for topic, payload in sent:
        assert device.publish(topic, payload)
    rows = [row for row in thing.stored() if row["origin"] == "mqtt"]
    assert [(row["topic"], row["payload"]) for row in rows] == sent
    numbers = [int(row["messageId"]) for row in rows]
    assert numbers == sorted(set(numbers))


def test_messages_in_flight_together_are_all_stored_in_their_order(session: MakeSession, thing: Thing) -> None:
    """Twenty at once, as paho sends them."""
    device = session(thing).opened()
    started = [device.start_publish(thing.topic(), b"%d" % number) for number in range(100)]
    assert all(device.acknowledged(each) for each in started)
    assert thing.stored_payloads() == [b"%d" % number for number in range(100)]


def test_a_message_with_qos_0_is_stored_too(session: MakeSession, thing: Thing) -> None:
    """Nobody tells the device; it is there all the same."""
    device = session(thing).opened()
    assert device.publish(thing.topic(), b"no answer wanted", 0)
    assert until(lambda: thing.stored_payloads() == [b"no answer wanted"])


def test_reports_over_https_and_mqtt_are_one_stream(session: MakeSession, thing: Thing) -> None:
    """One device on both doors: ids rise, the origin tells them apart."""
    device = session(thing).opened()
    assert device.publish(thing.topic(), b"1")
    thing.report(("user/update", b"2"))
    assert device.publish(thing.topic(), b"3")
    rows = [(row["origin"], row["payload"]) for row in thing.stored() if row["origin"] != "status"]
    assert rows == [("mqtt", b"1"), ("https", b"2"), ("mqtt", b"3")]
    assert device.open


@pytest.mark.slow
def test_nothing_is_acknowledged_before_it_is_stored(tmp_path: Path) -> None:
    """While the engine stands still there is no PUBACK; when it goes on there is one, and the message is stored."""
    with serving(tmp_path / "data", *LIMITS) as server:
        thing = make_fleet(server, 1).take()
        device = Session(server, thing.login()).opened()
        assert device.publish(thing.topic(), b"before")
        (engine,) = server.children("nats-server")
        freeze(engine)
        try:
            waiting = device.start_publish(thing.topic(), b"meanwhile")
            assert not device.acknowledged(waiting, within=1)
            assert device.open
        finally:
            os.kill(engine, signal.SIGCONT)
        assert device.acknowledged(waiting)
        assert thing.stored_payloads() == [b"before", b"meanwhile"]
        device.close()
