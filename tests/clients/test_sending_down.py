"""What `uplinkd send` and other doors send down reaches paho-mqtt, at once or on its return, and HTTPS-only devices too."""

from __future__ import annotations

import time

import pytest

from tests.clients.conftest import MakeSession
from tests.clients.fleet import SHARED, Fleet, Thing, ask
from tests.clients.session import Message, Session


def test_a_report_over_https_reaches_the_devices_mqtt_session(session: MakeSession, thing: Thing) -> None:
    """On a class with both rights, whichever worker each of them met."""
    device = session(thing).opened()
    assert device.subscribe(thing.topic(SHARED)) == 1
    for number in range(4):
        thing.report((SHARED, b"%d" % number))
        assert device.next() == Message(thing.topic(SHARED), b"%d" % number)


@pytest.mark.parametrize("qos", [0, 1])
def test_a_message_sent_down_reaches_a_live_session(session: MakeSession, thing: Thing, qos: int) -> None:
    """With the QoS that was granted; from the command line, to a custom topic and to a system topic."""
    device = session(thing).opened()
    service = f"/sys/{thing.product}/{thing.name}/thing/service/property/set"
    assert device.subscribe_all((thing.topic("user/get"), qos), (service, qos)) == [qos, qos]
    thing.send("open the door")
    assert device.next() == Message(thing.topic("user/get"), b"open the door", qos)
    thing.send_to(service, '{"params":{"lamp":1}}')
    assert device.next() == Message(service, b'{"params":{"lamp":1}}', qos)


def test_a_device_does_not_hear_its_own_system_reports(session: MakeSession, thing: Thing) -> None:
    """Not even where it asked for all system topics with `_ss=1`, as Link SDKs do: they go up and nowhere else."""
    own = f"/sys/{thing.product}/{thing.name}/thing"
    device = session(thing.login(more=",_ss=1")).opened()
    assert device.publish(f"{own}/event/property/post", b"{}")
    assert device.publish(f"{own}/service/property/set_reply", b"{}")
    thing.report(("user/update", b"over https"))
    thing.send_to(f"{own}/service/property/set", "a command")
    assert device.next() == Message(f"{own}/service/property/set", b"a command")


def test_qos_2_is_granted_as_1(session: MakeSession, thing: Thing) -> None:
    """The platform has no more."""
    device = session(thing).opened()
    assert device.subscribe(thing.topic("user/get"), 2) == 1
    thing.send("x")
    assert device.next().qos == 1


def test_an_absent_persistent_session_gets_its_messages_on_its_return(session: MakeSession, thing: Thing) -> None:
    """Once each, in their order, with QoS 1, without another SUBSCRIBE; CONNACK says that the session was there."""
    first = session(thing, clean=False).opened()
    assert not first.present
    assert first.subscribe(thing.topic("user/get")) == 1
    first.disconnect()
    for number in range(3):
        thing.send(str(number))
    again = session(thing, clean=False).opened()
    assert again.present
    assert [again.next() for _ in range(3)] == [
        Message(thing.topic("user/get"), str(number).encode(), 1) for number in range(3)
    ]
    again.disconnect()
    third = session(thing, clean=False).opened()
    thing.send("last")
    assert third.next().payload == b"last"


def test_a_message_that_was_not_acknowledged_comes_again(session: MakeSession, thing: Thing) -> None:
    """A device that broke off before its PUBACK finds the message on its return."""
    first = session(thing, clean=False, manual_ack=True).opened()
    first.subscribe(thing.topic("user/get"))
    thing.send("twice")
    assert first.next().payload == b"twice"
    first.break_off()
    assert session(thing, clean=False).opened().next().payload == b"twice"


def test_a_clean_session_forgets_the_persistent_one(session: MakeSession, thing: Thing) -> None:
    """Its subscriptions are gone, for itself and for the next persistent one."""
    first = session(thing, clean=False).opened()
    first.subscribe(thing.topic(SHARED))
    first.disconnect()
    time.sleep(0.3)  # its worker keeps it in the moment after; at that moment another worker could forget too early
    session(thing, clean=True).opened().disconnect()
    later = session(thing, clean=False).opened()
    assert not later.present
    thing.report((SHARED, b"unheard"))
    assert later.subscribe(thing.topic("user/get")) == 1
    thing.send("heard")
    assert later.next().payload == b"heard"


def test_an_https_only_device_takes_one_message_home_with_each_reply(thing: Thing) -> None:
    """In `info.data`, the oldest first, none twice; then there is no `data` any more."""
    thing.send("1")
    thing.send("2")
    told = thing.report(*[("user/update", b"report")] * 3)
    assert [info.get("data") for info in told[:2]] == ["1", "2"]
    assert [info.get("topic") for info in told[:2]] == [thing.topic("user/get")] * 2
    assert "data" not in told[2]
    assert all(info["messageId"] for info in told)


def test_a_message_for_a_live_session_does_not_ride_home_over_https(session: MakeSession, thing: Thing) -> None:
    """It was delivered already."""
    device = session(thing).opened()
    device.subscribe(thing.topic("user/get"))
    thing.send("for the session")
    assert device.next().payload == b"for the session"
    (told,) = thing.report(("user/update", b"report"))
    assert "data" not in told


def test_a_broadcast_reaches_every_subscriber(session: MakeSession, fleet: Fleet) -> None:
    """Of the product, by one command, over whichever worker."""
    things = [fleet.take() for _ in range(6)]
    devices: list[Session] = []
    topic = f"/broadcast/{fleet.product}/news"
    for thing in things:
        device = session(thing).opened()
        assert device.subscribe(topic) == 1
        devices.append(device)
    ask("send", fleet.product, "--all", topic, "to all", data=fleet.server.data)
    heard = [device.next() for device in devices]
    assert [(message.topic, message.payload) for message in heard] == [(topic, b"to all")] * 6


def test_what_was_unsubscribed_comes_no_more(session: MakeSession, thing: Thing) -> None:
    """From UNSUBACK on."""
    device = session(thing).opened()
    assert device.subscribe_all((thing.topic("user/get"), 1), (thing.topic(SHARED), 1)) == [1, 1]
    device.unsubscribe(thing.topic("user/get"))
    thing.send("unheard")
    thing.report((SHARED, b"heard"))
    assert device.next().payload == b"heard"


def test_a_binary_payload_is_sent_down_as_it_is(session: MakeSession, thing: Thing) -> None:
    """Devices that report bytes are sent bytes: by a report of their own on a class with both rights."""
    device = session(thing).opened()
    device.subscribe(thing.topic(SHARED))
    payload = bytes(range(256)) * 64
    thing.report((SHARED, payload))
    assert device.next().payload == payload
