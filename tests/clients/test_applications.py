"""Applications over MQTT: they read their products, send down to devices, and do nothing else."""

from __future__ import annotations

import itertools
import json

import pytest

from tests.clients.conftest import MakeSession
from tests.clients.fleet import SHARED, Fleet, Login, Thing, ask
from tests.clients.session import TRANSPORTS, Message, Transport

_numbers = itertools.count()


@pytest.fixture
def app(fleet: Fleet) -> Login:
    """An application that may read the fleet's product."""
    made = ask("app", "create", f"app{next(_numbers)}", "--product", fleet.product, data=fleet.server.data)
    return Login(f"any clientId {next(_numbers)}", made["key"], made["secret"])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_application_reads_the_uplink_of_its_products(
    session: MakeSession, app: Login, thing: Thing, transport: Transport
) -> None:
    """What the owner does to the device, reports over HTTPS and MQTT, system topics and status, each once."""
    reader = session(app, transport).opened()
    pattern = f"/{thing.product}/{thing.name}/#"
    system = f"/sys/{thing.product}/#"
    status = f"/as/mqtt/status/{thing.product}/{thing.name}"
    assert reader.subscribe_all((pattern, 1), (system, 1), (status, 1)) == [1, 1, 1]
    ask("device", "disable", thing.product, thing.name, data=thing.server.data)
    ask("device", "enable", thing.product, thing.name, data=thing.server.data)
    while (told := reader.next()).topic != thing.topic("thing/lifecycle") or b'"enable"' not in told.payload:
        assert b'"create"' in told.payload or b'"disable"' in told.payload
    device = session(thing).opened()
    assert reader.next().topic == status
    assert device.publish(thing.topic(), b"by mqtt")
    assert reader.next() == Message(thing.topic(), b"by mqtt")
    device.disconnect()
    gone = reader.next()
    assert (gone.topic, json.loads(gone.payload)["status"]) == (status, "offline")
    thing.report((SHARED, b"by https"))
    assert reader.next() == Message(thing.topic(SHARED), b"by https")
    back = reader.next()
    assert (back.topic, json.loads(back.payload)["status"]) == (status, "online")


def test_an_application_sends_down_to_a_device(session: MakeSession, app: Login, thing: Thing) -> None:
    """By publishing to its downlink topic: to a live session, and to a device that comes by HTTPS."""
    device = session(thing).opened()
    device.subscribe(thing.topic("user/get"))
    sender = session(app).opened()
    assert sender.publish(thing.topic("user/get"), b"text, which may wait until this worker has heard of the session")
    assert device.next().payload.startswith(b"text")
    assert sender.publish(thing.topic("user/get"), b"\x00\xff bytes")
    assert device.next() == Message(thing.topic("user/get"), b"\x00\xff bytes")
    device.disconnect()
    device = session(thing).opened()
    device.disconnect()
    assert sender.publish(thing.topic("user/get"), b"for later")
    (told,) = thing.report(("user/update", b"x"))
    assert told["data"] == "for later"


def test_an_applications_session_is_always_clean(session: MakeSession, app: Login, thing: Thing) -> None:
    """What it may not miss it reads as a durable consumer over NATS; CONNACK says so."""
    reader = session(app, clean=False).opened()
    assert reader.subscribe(f"/{thing.product}/{thing.name}/#") == 1
    reader.disconnect()
    thing.report(("user/update", b"unheard"))
    again = session(app, clean=False).opened()
    assert not again.present
    assert again.nothing(within=0.5)


def test_an_application_reads_no_other_product(session: MakeSession, app: Login) -> None:
    """SUBACK 0x80 for each filter that reaches beyond its products, and for what is the engine's own."""
    reader = session(app).opened()
    filters = [
        "#",
        "/#",
        "/+/#",
        "+/#",
        "/+/+/user/update",
        "/a1nowhere00/#",
        "/sys/#",
        "/sys/+/+/thing/#",
        "/sys/a1nowhere00/#",
    ]
    filters += [
        "/as/#",
        "/as/mqtt/status/+/+",
        "/as/mqtt/status/a1nowhere00/+",
        "/broadcast/+/+",
        "/ota/#",
        "/shadow/#",
        "/ext/#",
    ]
    filters += ["$SYS/#", "$JS/#", "/$JS/#", "_INBOX/#", "/_INBOX/#", "$KV/#", "$share/group/#", ">", "/>"]
    assert {each for each in filters if reader.subscribe(each) != 0x80} == set()


def test_an_application_publishes_nothing_but_down(session: MakeSession, app: Login, thing: Thing) -> None:
    """Not in a device's name, not to other products, not to devices that there are none of: the connection ends."""
    went_well = set()
    for topic in (
        thing.topic(),
        thing.topic("unknown"),
        f"/{thing.product}/unknown1/user/get",
        f"/sys/{thing.product}/{thing.name}/thing/event/property/post",
        f"/as/mqtt/status/{thing.product}/{thing.name}",
        "/a1nowhere00/x/user/get",
        "/broadcast/a1nowhere00/news",
        "$JS/API/INFO",
        "_INBOX/x",
    ):
        sender = session(app).opened()
        if sender.publish(topic, b"breach") or not sender.ended():
            went_well.add(topic)
    assert went_well == set()
    assert thing.stored() == []


def test_a_wrong_secret_is_told_4(session: MakeSession, app: Login) -> None:
    """And so is a key that nobody has."""
    assert session(Login("x", app.username, "wrong")).connect() == 4
    assert session(Login("x", "nobody", app.password)).connect() == 4


def test_a_deleted_application_is_shut_out_at_once(session: MakeSession, app: Login, fleet: Fleet) -> None:
    """Its sessions end within a second."""
    reader = session(app).opened()
    name = next(row["name"] for row in ask("app", "list", data=fleet.server.data) if row["key"] == app.username)
    ask("app", "delete", name, data=fleet.server.data)
    assert reader.ended(within=1)
    assert session(app).connect() == 4
