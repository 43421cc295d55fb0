"""aliyun-iot-linkkit 1.2.13, the platform's own Link SDK for Python, unchanged: what runs there runs here.

It signs in with `PK&DN|…,_ss=1,…|`, and never subscribes to system topics: `_ss=1` asks the server to deliver them all the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.fleet import Thing, until
from tests.clients.tools import DRIVERS, Driver, linkkit_python


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Driver]:
    started = Driver([str(linkkit_python()), str(DRIVERS / "linkkit_device.py")], cwd=tmp_path)
    yield started
    started.close()


def connect(kit: Driver, thing: Thing, *, plain: bool = False, **more: object) -> None:
    server = thing.server
    port, ca = (server.mqtt_plain_port, "") if plain else (server.mqtt_port, str(server.ca))
    kit.do(command="connect", port=port, ca=ca, product=thing.product, device=thing.name, secret=thing.secret, **more)
    assert kit.event("connect")["code"] == 0


@pytest.mark.parametrize("plain", [False, True])
def test_link_sdk_reports_and_hears(kit: Driver, thing: Thing, plain: bool) -> None:
    """Over TLS with our CA and over plain MQTT: user topics both ways."""
    connect(kit, thing, plain=plain)
    kit.do(command="publish", topic=thing.topic(), payload="from linkkit")
    asked, _ = kit.both("asked", "published")
    assert asked["result"][0] == 0
    assert thing.stored_payloads() == [b"from linkkit"]
    kit.do(command="subscribe", filter=thing.topic("user/get"))
    assert kit.event("subscribed")["granted"] == [1]
    thing.send("to linkkit")
    assert kit.message() == (thing.topic("user/get"), b"to linkkit")


def test_link_sdk_is_commanded_without_a_subscription(kit: Driver, thing: Thing) -> None:
    """A property is set by a system topic to which it never subscribes; the SDK answers by itself, and the answer is stored.

    Over plain MQTT: its answer and its PUBACK are written by two threads at once, which one TLS connection does not bear.
    Every fifth time or so the SDK harms its own connection there, on whatever server.
    """
    connect(kit, thing, plain=True)
    own = f"/sys/{thing.product}/{thing.name}/thing"
    assert thing.shows(state="online")
    request = {"id": "7", "version": "1.0", "params": {"lamp": 1}, "method": "thing.service.property.set"}
    thing.send_to(f"{own}/service/property/set", json.dumps(request))
    assert kit.event("property_set")["params"] == {"lamp": 1}
    assert until(lambda: bool(thing.stored_payloads()))
    (row,) = [row for row in thing.stored() if row["origin"] == "mqtt"]
    assert row["topic"] == f"{own}/service/property/set_reply"
    assert json.loads(row["payload"]) == {"id": "7", "code": 200, "data": {}}


def test_link_sdk_hears_system_topics_over_tls(kit: Driver, thing: Thing) -> None:
    """Services, raw data, configuration and firmware, each without a subscription; what it does not know it hands on."""
    connect(kit, thing)
    own = f"/sys/{thing.product}/{thing.name}"
    topics = [
        f"{own}/thing/service/blink",
        f"{own}/rrpc/request/123",
        f"/ota/device/upgrade/{thing.product}/{thing.name}",
        f"/ext/ntp/{thing.product}/{thing.name}/response",
    ]
    for topic in topics:
        thing.send_to(topic, '{"id":"1","params":{}}')
        assert kit.message() == (topic, b'{"id":"1","params":{}}')


def test_link_sdk_posts_a_property_and_takes_the_reply(kit: Driver, thing: Thing) -> None:
    """thing/event/property/post is stored; the reply of an application comes without a subscription."""
    connect(kit, thing)
    kit.event("enabled")
    kit.do(command="post_property", params={"temperature": 21.5})
    code, request = kit.event("asked")["result"]
    assert code == 0
    assert until(lambda: bool(thing.stored_payloads()))
    topic = f"/sys/{thing.product}/{thing.name}/thing/event/property/post"
    assert json.loads(thing.stored_payloads()[0])["params"] == {"temperature": 21.5}
    thing.send_to(f"{topic}_reply", json.dumps({"id": request, "code": 200, "data": {}, "message": "success"}))
    assert kit.event("property_reply")["code"] == 200


def test_link_sdk_comes_back_by_itself(kit: Driver, thing: Thing) -> None:
    """Disabled it is shut out and tries on; enabled it is back, with its persistent session."""
    connect(kit, thing, clean=False)
    kit.do(command="subscribe", filter=thing.topic("user/get"))
    assert kit.event("subscribed")["granted"] == [1]
    thing.change("disable")
    kit.event("disconnect")
    thing.change("enable")
    thing.send("while it was away")
    assert kit.event("connect", within=15)["session"] == 1
    assert kit.message() == (thing.topic("user/get"), b"while it was away")


def test_link_sdk_of_mqtt_3_1_signs_in(kit: Driver, thing: Thing) -> None:
    """Its other version of the protocol."""
    connect(kit, thing, protocol="MQTTv31")
