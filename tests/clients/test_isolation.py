"""Every way out of a device's own topics is shut: foreign filters, foreign topics, wildcards, wills, retained messages."""

from __future__ import annotations

import base64

import pytest

from tests.clients import packets
from tests.clients.conftest import MakeSession
from tests.clients.fleet import SHARED, Fleet, Thing, ask, until
from tests.clients.packets import PINGREQ, Wire
from tests.clients.session import Session

REFUSED = 0x80

# {pk} and {dn} are the intruder's own, {victim} is another device of its product.
FOREIGN_FILTERS = (
    "#",
    "/#",
    "+/#",
    "/+/#",
    "+/+/user/get",
    "/+/+/user/get",
    "/{pk}/#",
    "/{pk}/+/user/get",
    "/{pk}/{victim}/user/get",
    "/{pk}/{victim}/#",
    "/{pk}/{victim}/" + SHARED,
    "/+/{dn}/user/get",
    "/{pk}/{dn}/#",  # its own, and wider than what its product's classes let it subscribe to
    "/{pk}/{dn}/user/update",
    "/{pk}/{dn}/unknown",
    "/{pk}/{dn}/+",
    "/sys/#",
    "/sys/{pk}/#",
    "/sys/+/+/thing/service/#",
    "/sys/{pk}/+/thing/service/property/set",
    "/sys/{pk}/{victim}/thing/service/#",
    "/sys/{pk}/{victim}/thing/event/property/post_reply",
    "/ota/device/upgrade/{pk}/{victim}",
    "/ota/device/upgrade/{pk}/+",
    "/shadow/get/{pk}/{victim}",
    "/ext/ntp/{pk}/{victim}/response",
    "/broadcast/+/+",
    "/broadcast/#",
    "/broadcast/a1nowhere00/news",
    "/as/mqtt/status/{pk}/{dn}",
    "/as/mqtt/status/{pk}/+",
    "/as/#",
    "$SYS/#",
    "/$SYS/#",
    "$JS/API/#",
    "/$JS/#",
    "$KV/#",
    "/$KV/#",
    "_INBOX/#",
    "/_INBOX/#",
    "_INBOX.>",
    ">",
    "/>",
    "/{pk}/*/user/get",
    "/{pk}.{victim}.user.get",
    "$share/group/#",
    "$share/group//{pk}/{victim}/user/get",
    "$queue//{pk}/{victim}/user/get",
)

# No filters at all: client libraries refuse to send them.
MALFORMED_FILTERS = (
    "$JS.API.#",
    "/{pk}/{dn}/user/ge#",
    "/{pk}/{dn}/user/ge+",
    "/#/user/get",
    "/{pk}/#/get",
    "/{pk}/{dn}/user/get\0",
    "",
)

FOREIGN_TOPICS = (
    "/{pk}/{victim}/user/update",
    "/{pk}/{victim}/user/get",
    "/{pk}/{victim}/" + SHARED,
    "/a1nowhere00/{dn}/user/update",
    "/{pk}/{dn}/user/get",  # its own, and not to be published to
    "/{pk}/{dn}/unknown",
    "/{pk}/{dn}",
    "/sys/{pk}/{victim}/thing/event/property/post",
    "/sys/{pk}/{dn}/thing/service/property/set",
    "/sys/{pk}/{victim}/thing/service/property/set",
    "/ota/device/upgrade/{pk}/{dn}",
    "/ota/device/inform/{pk}/{victim}",
    "/shadow/update/{pk}/{victim}",
    "/broadcast/{pk}/news",
    "/as/mqtt/status/{pk}/{dn}",
    "/as/mqtt/status/{pk}/{victim}",
    "$SYS/broker",
    "$JS/API/STREAM/DELETE/UPLINK",
    "$JS.API.STREAM.PURGE.UPLINK",
    "/$JS/API/INFO",
    "_INBOX/x",
    "/_INBOX/x",
    "{pk}/{dn}/user/update",
    "//{pk}/{dn}/user/update",
    "/{pk}/{dn}/user/update/",
    "/{pk}/{dn}/user//update",
    "/{pk}/{dn}/user/update%2f",
    "/{pk}/{dn}/../{victim}/user/update",
    "/",
)

WILDCARD_TOPICS = (
    "/{pk}/{dn}/user/+",
    "/{pk}/{dn}/user/#",
    "/{pk}/+/user/update",
    "/{pk}/#",
    "#",
    "/{pk}/{dn}/user/>",
    "/{pk}/*/user/update",
    "",
    "/{pk}/{dn}/user/up\0date",
)


def names(pattern: str, intruder: Thing, victim: Thing) -> str:
    return pattern.format(pk=intruder.product, dn=intruder.name, victim=victim.name)


def test_a_filter_beyond_its_own_topics_is_refused_to_a_device(session: MakeSession, fleet: Fleet) -> None:
    """With 0x80 in SUBACK, each of them, alone and in the company of a good one; `uplinkd logs` tells which and why."""
    intruder, victim = fleet.take(), fleet.take()
    device = session(intruder).opened()
    granted = {pattern: device.subscribe(names(pattern, intruder, victim)) for pattern in FOREIGN_FILTERS}
    assert {pattern for pattern, code in granted.items() if code != REFUSED} == set()
    filters = [(names(pattern, intruder, victim), 1) for pattern in FOREIGN_FILTERS[:9]]
    assert device.subscribe_all((intruder.topic("user/get"), 1), *filters) == [1] + [REFUSED] * 9
    assert device.open
    assert until(lambda: f"/{victim.name}/user/get" in str(intruder.refusals()))


def test_a_malformed_filter_is_refused_or_ends_the_connection(fleet: Fleet) -> None:
    """By hand: SUBACK with 0x80, or the end; never a subscription."""
    intruder, victim = fleet.take(), fleet.take()
    answers = {}
    for pattern in MALFORMED_FILTERS:
        with Wire(fleet.server) as wire:
            assert wire.open(intruder.login()) == 0
            wire.send(packets.subscribe(names(pattern, intruder, victim)))
            answers[pattern] = wire.read()
    assert {pattern for pattern, answer in answers.items() if answer not in (b"\x90\x03\x00\x01\x80", b"")} == set()


def test_an_intruder_hears_nothing_of_others(session: MakeSession, fleet: Fleet) -> None:
    """Having asked for everything, it hears what is its own, and of reports, commands, replies and status of another: nothing."""
    intruder, victim = fleet.take(), fleet.take()
    listener = session(intruder).opened()
    for pattern in FOREIGN_FILTERS:
        listener.subscribe(names(pattern, intruder, victim))
    assert listener.subscribe_all((intruder.topic("user/get"), 1), (intruder.topic(SHARED), 1)) == [1, 1]
    other = session(victim).opened()
    other.subscribe_all((victim.topic("user/get"), 1), (victim.topic(SHARED), 1))
    assert other.publish(victim.topic(SHARED), b"its own")
    assert other.publish(victim.topic(), b"a report")
    victim.send("a command")
    assert [other.next().payload for _ in range(2)] == [b"its own", b"a command"]
    other.disconnect()
    intruder.send("the end")
    assert listener.next().payload == b"the end"


def test_a_topic_without_the_right_ends_the_connection(session: MakeSession, fleet: Fleet) -> None:
    """No PUBACK for any of them; nothing is stored, neither of the one nor of the other."""
    intruder, victim = fleet.take(), fleet.take()
    went_well = set()
    for pattern in FOREIGN_TOPICS:
        device = session(intruder, "plain").opened()
        if device.publish(names(pattern, intruder, victim), b"breach") or not device.ended():
            went_well.add(pattern)
    assert went_well == set()
    rows = ask("messages", "list", "--product", fleet.product, "--limit", "500", data=fleet.server.data)
    assert not [row for row in rows if row["payload"] == base64.b64encode(b"breach").decode()]


def test_a_refused_publish_is_found_in_the_logs(session: MakeSession, fleet: Fleet) -> None:
    """By its device, with the topic and the reason, and never with the payload."""
    intruder, victim = fleet.take(), fleet.take()
    device = session(intruder).opened()
    assert not device.publish(victim.topic(), b"the payload")
    assert until(lambda: bool(intruder.refusals()))
    (found,) = intruder.refusals()
    assert found["code"] == 30001
    assert victim.name in found["reason"]
    assert "the payload" not in str(found)


@pytest.mark.parametrize("qos", [0, 1])
def test_a_wildcard_is_not_published_to(fleet: Fleet, qos: int) -> None:
    """Client libraries refuse to send these; by hand they end the connection, with QoS 0 as well."""
    intruder, victim = fleet.take(), fleet.take()
    went_well = set()
    for pattern in WILDCARD_TOPICS:
        with Wire(fleet.server) as wire:
            assert wire.open(intruder.login()) == 0
            wire.send(packets.publish(names(pattern, intruder, victim), b"breach", qos=qos))
            if wire.read() != b"":
                went_well.add(pattern)
    assert went_well == set()


def test_publishing_with_qos_2_ends_the_connection(session: MakeSession, thing: Thing) -> None:
    """The platform has no QoS 2; nothing is stored."""
    device = session(thing).opened()
    assert not device.publish(thing.topic(), b"exactly once", 2)
    assert device.ended()
    assert thing.stored_payloads() == []


def test_nothing_is_retained(session: MakeSession, thing: Thing) -> None:
    """A later subscriber gets what is sent later, and nothing of before."""
    device = session(thing).opened()
    device.publish(thing.topic(SHARED), b"to be retained", retain=True)
    device.disconnect()
    later = session(thing).opened()
    assert later.subscribe(thing.topic(SHARED)) == 1
    thing.report((SHARED, b"later"))
    message = later.next()
    assert (message.payload, message.retain) == (b"later", False)


@pytest.mark.parametrize("levels", ["user/update", SHARED])
def test_nobody_gets_a_will(session: MakeSession, thing: Thing, levels: str) -> None:
    """Neither subscribers nor the stream, when its device breaks off."""
    device = session(thing, will=thing.topic(levels))
    if device.connect() == 0:
        device.break_off()
    later = session(thing).opened()
    later.subscribe(thing.topic(SHARED))
    assert thing.shows(state="online")
    thing.report((SHARED, b"later"))
    assert later.next().payload == b"later"
    assert b"the will" not in [row["payload"] for row in thing.stored()]


def test_a_will_on_anothers_topic_reaches_nobody(session: MakeSession, fleet: Fleet) -> None:
    """Whether the connection is refused or the will forgotten."""
    intruder, victim = fleet.take(), fleet.take()
    other = session(victim).opened()
    other.subscribe_all((victim.topic("user/get"), 1), (victim.topic(SHARED), 1))
    device: Session = session(intruder, will=victim.topic("user/get"))
    if device.connect() == 0:
        device.break_off()
        assert intruder.shows(state="offline")
    victim.report((SHARED, b"later"))
    assert other.next().payload == b"later"


@pytest.mark.parametrize("tls", [False, True])
def test_what_is_no_connect_ends_the_connection(fleet: Fleet, tls: bool) -> None:
    """On the plain port and inside TLS, at once; the server goes on."""
    packet = packets.connect(fleet.take().login())
    for data in (
        b"\x10\x00",
        b"\x00\x00",
        b"\xf0\x00",
        PINGREQ,
        b"GET /mqtt HTTP/1.1\r\nHost: " + b"h" * 100,
        b"\x10\xff\xff\xff\x7f",  # a CONNECT that claims 256 MiB
        b"\x10\xff\xff\xff\xff\x7f",
        b"\xff" * 64,
        packet.replace(b"MQTT\x04", b"MQTT\x05"),
        packet.replace(b"MQTT\x04", b"HTTP\x04"),
        packet[:-1] + b"\xff",  # no UTF-8
    ):
        with Wire(fleet.server, tls=tls) as wire:
            wire.send(data)
            answer = wire.read(2)
            if answer and answer[:3] == b"\x20\x02\x00" and answer[3]:  # CONNACK may say why
                answer = wire.read(2)
            assert answer == b"", data
    with Wire(fleet.server, tls=tls) as wire:
        assert wire.open(fleet.take().login()) == 0
