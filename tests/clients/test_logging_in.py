"""paho-mqtt signs in: with each signature, over each transport, in both versions of MQTT 3, and is told why not."""

from __future__ import annotations

import re
import socket
import ssl

import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from tests.clients import packets
from tests.clients.conftest import MakeSession
from tests.clients.fleet import SHARED, Login, Thing, until
from tests.clients.session import TRANSPORTS, Message, Transport

BAD_LOGIN, NOT_AUTHORISED = 4, 5


@pytest.mark.parametrize("timestamp", ["", "789", "2524608000000"])
@pytest.mark.parametrize("method", ["hmacmd5", "hmacsha1", "hmacsha256"])
def test_each_signature_signs_a_device_in(session: MakeSession, thing: Thing, method: str, timestamp: str) -> None:
    """With a timestamp and without; it is signed, and not held against the clock: Link SDKs send one of the year 2050."""
    assert session(thing.login(method, timestamp=timestamp)).connect() == 0


def test_what_link_sdks_add_to_the_client_id_does_no_harm(session: MakeSession, thing: Thing) -> None:
    """`PK&DN` as clientId, parameters that nobody reads, any order."""
    login = thing.login(
        client_id=f"{thing.product}&{thing.name}", timestamp="1700000000", more=",ext=1,_ss=1,lan=Python,_v=1.2.13"
    )
    assert session(login).connect() == 0


@pytest.mark.parametrize("protocol", [MQTTProtocolVersion.MQTTv311, MQTTProtocolVersion.MQTTv31])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_each_transport_carries_messages_both_ways(
    session: MakeSession, thing: Thing, transport: Transport, protocol: MQTTProtocolVersion
) -> None:
    """TLS, plain and WebSocket on the HTTPS port; what a device publishes where it may subscribe comes back to it."""
    device = session(thing, transport, protocol=protocol).opened()
    topic = thing.topic(SHARED)
    assert device.subscribe(topic) == 1
    assert device.publish(topic, b"with QoS 1")
    assert device.next() == Message(topic, b"with QoS 1", 1)
    assert device.publish(topic, b"with QoS 0", 0)
    assert device.next().payload == b"with QoS 0"
    device.unsubscribe(topic)
    assert device.publish(thing.topic(), bytes(range(256)))
    assert thing.stored_payloads()[-1] == bytes(range(256))


def test_a_wrong_sign_and_an_unknown_device_are_told_4(session: MakeSession, thing: Thing) -> None:
    """Alike to the device; `uplinkd logs` tells them apart and never shows a secret."""
    right = thing.login()
    other_id = Login(right.client_id.replace(thing.name, "other"), right.username, right.password)
    unknown = Thing(thing.server, thing.product, "unknown1", thing.secret)
    elsewhere = Thing(thing.server, "a1nowhere00", thing.name, thing.secret)
    for login in (
        thing.login(secret="not the secret"),
        thing.login("hmacsha256", secret="not the secret"),
        other_id,
        Login(right.client_id, right.username, ""),
        unknown.login(),
        elsewhere.login(),
    ):
        assert session(login).connect() == BAD_LOGIN
    assert until(lambda: len(thing.refusals()) >= 3)
    assert {row["code"] for row in thing.refusals()} == {20000}
    assert f"clientId{thing.product}.{thing.name}" in thing.refusals()[0]["reason"]
    assert not re.search(rf"{thing.secret}|{right.password}", str(thing.refusals()))


def test_a_disabled_device_is_told_5_until_it_is_enabled(session: MakeSession, thing: Thing) -> None:
    """Within a second on every worker."""
    thing.change("disable")
    assert until(lambda: session(thing).connect() == NOT_AUTHORISED, within=1.5)
    assert [session(thing).connect() for _ in range(6)] == [NOT_AUTHORISED] * 6
    assert session(thing.login(secret="not the secret")).connect() in (BAD_LOGIN, NOT_AUTHORISED)
    thing.change("enable")
    assert until(lambda: session(thing).connect() == 0, within=1.5)


@pytest.mark.parametrize(("keepalive", "code"), [(29, 5), (1201, 5), (0, 5), (30, 0), (1200, 0)])
def test_keep_alive_is_30_to_1200_seconds(session: MakeSession, thing: Thing, keepalive: int, code: int) -> None:
    """Another one is refused with 5, as on the platform."""
    assert session(thing, keepalive=keepalive).connect() == code


@pytest.mark.parametrize("suite", ["AES256-SHA256", "AES256-SHA", "AES128-SHA256", "AES128-SHA"])
def test_the_old_sdks_suites_are_spoken(thing: Thing, suite: str) -> None:
    """TLS 1.2 with static RSA, without SNI and ALPN, as the platform's C SDKs do it."""
    context = ssl.create_default_context(cafile=str(thing.server.ca))
    context.check_hostname = False
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(suite)
    with (
        socket.create_connection(("127.0.0.1", thing.server.mqtt_port), timeout=5) as plain,
        context.wrap_socket(plain) as wire,
    ):
        wire.sendall(packets.connect(thing.login()))
        assert wire.recv(4) == bytes.fromhex("20020000")
        cipher = wire.cipher()
        assert cipher
        assert cipher[0] == suite
