"""One MQTT connection as packets: what is answered, what is stored, what ends it, and the reason that the operator reads."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.clients.fleet import Login
from tests.clients.packets import PINGREQ, connect, packet, publish, subscribe, text
from tests.house import until
from tests.mqtt.conftest import CONNACK, House, login, puback
from tests.room import DEVICE, PRODUCT, SECRET, settled
from uplinkd.core.errors import Code, Unavailable
from uplinkd.core.model import App, Origin, ProductKey, Right
from uplinkd.engine import Query, SessionRecord, Waiting
from uplinkd.mqtt import session
from uplinkd.registry import Change
from uplinkd.registry.cache import Entry

OWN = f"/{PRODUCT}/{DEVICE}/"
UP, DOWN = OWN + "user/update", OWN + "user/get"
DISCONNECT = b"\xe0\x00"


def suback(number: int, *codes: int) -> bytes:
    return packet(0x90, number.to_bytes(2) + bytes(codes))


def message(topic: str, payload: bytes, number: int = 0, *, dup: bool = False) -> bytes:
    first = 0x30 | (2 if number else 0) | (8 if dup else 0)
    return packet(first, text(topic) + (number.to_bytes(2) if number else b"") + payload)


# signing in


async def test_a_device_signs_in(house: House) -> None:
    """CONNACK 0, no session present; PINGREQ is answered; DISCONNECT ends it without a word in the record."""
    client = house.client()
    assert await client.open() == [CONNACK]
    assert await client.ask(PINGREQ) == [b"\xd0\x00"]
    assert await client.ask(DISCONNECT) == []
    assert client.transport.closed
    assert house.outcomes == []


@pytest.mark.parametrize(
    ("who", "number", "code", "reason"),
    [
        (login(secret="another"), 4, Code.AUTH_CHECK_ERROR, "wrong sign"),
        (login("nobody"), 4, Code.AUTH_CHECK_ERROR, "there is no device 'nobody'"),
        (Login("c", f"{DEVICE}&{PRODUCT}", "x"), 2, Code.PARAM_ERROR, "the clientId is 'c'"),
        (Login("c|signmethod=md5|", f"{DEVICE}&{PRODUCT}", "x"), 2, Code.PARAM_ERROR, "signmethod 'md5' is not known"),
        (Login("c|x=1|", "nobody", "x"), 4, Code.PARAM_ERROR, "must be deviceName&productKey"),
        (Login("c|authType=register|", f"{DEVICE}&{PRODUCT}", "x"), 2, Code.PARAM_ERROR, "authType is 'register'"),
        (Login("c", "app-unknown", "x"), 4, Code.AUTH_CHECK_ERROR, "there is no application 'app-unknown'"),
    ],
)
async def test_who_may_not_in_is_told_a_number_and_the_operator_the_reason(
    house: House, who: Login, number: int, code: Code, reason: str
) -> None:
    """CONNACK 2 for what is malformed, 4 for who is not known or has signed wrongly; never the secret."""
    client = house.client()
    assert await client.open(who) == [bytes((0x20, 2, 0, number))]
    assert client.transport.closed
    (outcome,) = house.outcomes
    assert (outcome.code, outcome.status, outcome.endpoint) == (code, number, "mqtt")
    assert reason in outcome.reason
    assert who.password not in outcome.reason.split()


async def test_a_disabled_device_is_forbidden(house: House) -> None:
    """CONNACK 5 with a right sign, 4 with a wrong one: only its owner learns that it is disabled."""
    house.registry.set_enabled(PRODUCT, DEVICE, False)
    assert (await house.client().open())[0][3] == 5
    assert (await house.client().open(login(secret="another")))[0][3] == 4


@pytest.mark.parametrize(("seconds", "number"), [(0, 5), (29, 5), (30, 0), (1200, 0), (1201, 5)])
async def test_the_keep_alive_has_bounds(house: House, seconds: int, number: int) -> None:
    """30 to 1,200 s, as on the platform."""
    assert (await house.client().open(keepalive=seconds))[0][3] == number


async def test_a_silent_client_is_dropped_after_one_and_a_half_keep_alives(house: House) -> None:
    """Not before; any packet counts as a sign of life."""
    client = await house.session()
    house.later(89)
    await client.ask(PINGREQ)
    house.later(89)
    assert not client.transport.closed
    house.later(2)
    assert client.transport.aborted
    assert "nothing was heard for 90 s" in client.reason


async def test_a_client_that_says_nothing_is_dropped(house: House) -> None:
    """Ten seconds are enough for a CONNECT."""
    client = house.client()
    house.later(11)
    assert client.transport.aborted
    assert client.reason == "no CONNECT came within 10 s"


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\xc0\x00", b"\x10\x05\x00\x04HTTP", b"\x10\xff\xff\xff\x7f"])
async def test_what_is_no_connect_ends_the_connection_at_once(house: House, data: bytes) -> None:
    """Without waiting for the rest of what may look like a packet."""
    client = house.client()
    assert await client.ask(data) == []
    assert client.transport.closed
    assert "malformed MQTT" in client.reason


async def test_another_version_is_told_so(house: House) -> None:
    """CONNACK 1 for MQTT 5."""
    client = house.client()
    head = text("MQTT") + bytes([5, 2]) + b"\x00\x3c\x00"
    assert await client.ask(packet(0x10, head + text("x"))) == [bytes.fromhex("20020001")]
    assert "protocol level 5" in client.reason


async def test_refused_logins_are_slowed_down(house: House) -> None:
    """As over HTTPS: for a device as seen from an address; CONNACK 3 then, whatever the sign."""
    for _ in range(30):
        await house.client().open(login(secret="another"))
    assert (await house.client().open())[0][3] == 3
    assert house.outcomes[-1].code is Code.REQUEST_TOO_MANY
    other = house.client("192.0.2.8")
    assert await other.open() == [CONNACK]


# reports


async def test_a_report_is_stored_before_it_is_acknowledged(house: House) -> None:
    """The same record as over HTTPS, with its origin; no PUBACK until the engine has said so."""
    client = await house.session()
    waiting: list[object] = []
    store, house.engine.publish = house.engine.publish, lambda *given: waiting.append(given)  # type: ignore[method-assign]
    client.send(publish(UP, b"\x00\xff", number=7))
    await asyncio.sleep(0)
    assert client.transport.writes == [CONNACK]
    store(*waiting[0])  # type: ignore[misc]
    assert await client.heard() == [puback(7)]
    (stored,) = await house.engine.latest(Query(), 10)
    assert (stored.topic, stored.payload, stored.origin) == (UP, b"\x00\xff", Origin.MQTT)


async def test_acknowledgements_come_in_the_order_of_the_reports(house: House) -> None:
    """[MQTT-4.6.0-2]; a report at QoS 0 has none."""
    client = await house.session()
    data = b"".join(publish(UP, b"x", number=number, qos=number % 3 > 0) for number in range(1, 20))
    assert await client.ask(data) == [puback(number) for number in range(1, 20) if number % 3]
    assert len(await house.engine.latest(Query(), 100)) == 19


@pytest.mark.parametrize("qos", [0, 1])
async def test_what_the_engine_does_not_take_is_never_acknowledged(house: House, qos: int) -> None:
    """At QoS 1 the connection ends, so that the device sends it again; at QoS 0 nobody waits for it."""
    client = await house.session()
    house.engine.publish = lambda *given: given[2](0, "the engine is away")  # type: ignore[method-assign]
    assert await client.ask(publish(UP, b"x", qos=qos)) == []
    assert client.transport.closed is bool(qos)
    assert (house.outcomes[-1].code, client.reason) == (Code.PUBLISH_MESSAGE_ERROR, "the engine is away")


@pytest.mark.parametrize(
    ("topic", "code", "reason"),
    [
        (f"/{PRODUCT}/other/user/update", Code.PUBLISH_MESSAGE_ERROR, "the topic belongs to device 'other'"),
        (DOWN, Code.PUBLISH_MESSAGE_ERROR, "has the right to subscribe alone"),
        (OWN + "unknown", Code.PUBLISH_MESSAGE_ERROR, "no topic class"),
        (OWN + "user/+", Code.PARAM_ERROR, "the wildcard +"),
        ("$SYS/x", Code.PARAM_ERROR, "malformed topic"),
        (f"/broadcast/{PRODUCT}/news", Code.PUBLISH_MESSAGE_ERROR, "belongs to device"),
        (f"/as/mqtt/status/{PRODUCT}/{DEVICE}", Code.PUBLISH_MESSAGE_ERROR, "do not publish to"),
    ],
)
async def test_a_report_without_the_right_ends_the_connection(
    house: House, topic: str, code: Code, reason: str
) -> None:
    """MQTT 3.1.1 has no other no; the record says why."""
    client = await house.session()
    assert await client.ask(publish(topic, b"x") + publish(UP, b"after")) == []
    assert client.transport.closed
    assert house.outcomes[-1].code is code
    assert reason in client.reason
    assert await house.engine.latest(Query(), 10) == []


async def test_a_report_may_have_256_kib(house: House) -> None:
    """One byte more ends the connection."""
    client = await house.session()
    assert await client.ask(publish(UP, bytes(256 * 1024))) == [puback(1)]
    assert await client.ask(publish(UP, bytes(256 * 1024 + 1))) == []
    assert "at most 262144 are allowed" in client.reason


async def test_qos_2_ends_the_connection(house: House) -> None:
    """The platform has none; the record says so."""
    client = await house.session()
    assert await client.ask(publish(UP, b"x", qos=2)) == []
    assert client.transport.closed
    assert "QoS 2" in client.reason


async def test_wills_and_retained_messages_are_ignored_and_noted_once(house: House) -> None:
    """Notes, not refusals: everything else is done."""
    client = house.client()
    who = login()
    head = text("MQTT") + bytes([4, 0xC6]) + b"\x00\x3c"
    will = text("will/topic") + text("gone")
    data = packet(0x10, head + text(who.client_id) + will + text(who.username) + text(who.password))
    assert await client.ask(data) == [CONNACK]
    assert await client.ask(publish(UP, b"x", retain=True) * 3) == [puback(1)] * 3
    client.lose()
    assert [outcome.code for outcome in house.outcomes] == [Code.SUCCESS] * 2
    assert "a will" in house.outcomes[0].reason
    assert "RETAIN" in house.outcomes[1].reason
    assert {each.topic for each in await house.engine.latest(Query(), 10)} == {UP}


async def test_over_its_rate_a_device_is_slowed_down_and_loses_nothing(house: House) -> None:
    """The socket is not read meanwhile; the record says so once."""
    now = [1000.0]
    house.flow._clock = lambda: now[0]
    client = await house.session()
    client.send(b"".join(publish(UP, b"%d" % number, number=number) for number in range(1, 41)))
    await asyncio.sleep(0.01)
    assert client.transport.paused
    assert len(client.transport.writes) == 31
    now[0] += 1
    await asyncio.sleep(0.08)
    assert await client.heard() == [puback(number) for number in range(1, 41)]
    assert not client.transport.paused
    assert [outcome.code for outcome in house.outcomes] == [Code.REQUEST_TOO_MANY]
    assert "slowed down" in client.reason


async def test_reports_that_the_engine_does_not_answer_are_bounded(house: House) -> None:
    """100 under way, then the socket is not read; all are stored in the end."""
    house.flow._message_cost = house.flow._byte_cost = 0.0
    client = await house.session()
    waiting: list[object] = []
    store, house.engine.publish = house.engine.publish, lambda *given: waiting.append(given)  # type: ignore[method-assign]
    client.send(b"".join(publish(UP, b"x", number=number) for number in range(1, 151)))
    await until(lambda: client.transport.paused and len(waiting) >= 100)
    await settled()
    assert len(waiting) == 100
    for held in waiting:
        store(*held)  # type: ignore[misc]
    await until(lambda: len(waiting) == 150 and not client.transport.paused)
    for held in waiting[100:]:
        store(*held)  # type: ignore[misc]
    assert await client.heard() == [puback(number) for number in range(1, 151)]


# subscriptions


async def test_each_filter_gets_its_answer(house: House) -> None:
    """The QoS asked for, 1 for 2, 0x80 for what reaches beyond the device's own."""
    client = await house.session()
    filters = [(DOWN, 0), (OWN + "get", 2), ("#", 1), (f"/{PRODUCT}/+/user/get", 1), (f"/broadcast/{PRODUCT}/+", 1)]
    body = b"\x00\x05" + b"".join(text(each) + bytes([qos]) for each, qos in filters)
    assert await client.ask(packet(0x82, body)) == [suback(5, 0, 1, 0x80, 0x80, 1)]
    assert not client.transport.closed
    assert house.codes() == [Code.PARAM_ERROR, Code.PUBLISH_MESSAGE_ERROR]
    assert client.connection.subscriptions == {DOWN: 0, OWN + "get": 1, f"/broadcast/{PRODUCT}/+": 1}
    assert await client.ask(packet(0xA2, b"\x00\x06" + text(DOWN))) == [packet(0xB0, b"\x00\x06")]
    assert DOWN not in client.connection.subscriptions


async def test_a_session_has_a_hundred_subscriptions(house: House) -> None:
    """The next one is refused; one that it has already is not."""
    client = await house.session()
    for number in range(100):
        assert (await client.ask(subscribe(f"/broadcast/{PRODUCT}/n{number}")))[0][-1] == 1
    assert (await client.ask(subscribe(f"/broadcast/{PRODUCT}/more")))[0][-1] == 0x80
    assert (await client.ask(subscribe(f"/broadcast/{PRODUCT}/n7")))[0][-1] == 1


async def test_of_one_subscribe_a_hundred_filters_are_looked_at(house: House) -> None:
    """The others are refused together: 65,000 fit into one packet, and each would be a refusal of its own in the record."""
    client = await house.session()
    body = (text("a") + b"\0") * 1000
    assert await client.ask(packet(0x82, b"\0\5" + text(DOWN) + b"\1" + body)) == [suback(5, 1, *[0x80] * 1000)]
    assert len(house.outcomes) == 100
    assert client.reason == "a SUBSCRIBE has 1001 filters; at most 100 are looked at"
    assert client.connection.subscriptions == {DOWN: 1}


async def test_what_a_device_publishes_where_it_may_subscribe_comes_back(house: House) -> None:
    """By either door, at the QoS that was granted; nothing once it has unsubscribed."""
    house.registry.add_topic_class(PRODUCT, "both", Right.BOTH)
    client = await house.session()
    await client.ask(subscribe(OWN + "both", qos=0))
    assert message(OWN + "both", b"x") in await client.ask(publish(OWN + "both", b"x"))
    await client.ask(packet(0xA2, b"\x00\x06" + text(OWN + "both")))
    assert await client.ask(publish(OWN + "both", b"x")) == [puback(1)]


# messages down


async def sent(house: House, payload: bytes, topic: str = DOWN) -> dict[str, object]:
    return await house.sending.send(topic, payload)


async def test_a_message_reaches_a_session_that_has_subscribed(house: House) -> None:
    """At QoS 1 until its PUBACK, in order; then it is gone."""
    client = await house.session()
    await client.ask(subscribe(DOWN))
    device_id = client.connection.device_id
    assert (await sent(house, b"one"))["way"] == "mqtt"
    await sent(house, b"two")
    first, second = await client.heard()
    assert first[:1] == b"\x32"
    assert (first[-3:], second[-3:]) == (b"one", b"two")
    assert await house.downlink.count(device_id) == 2
    for each in (first, second):
        number = int.from_bytes(each[4 + len(DOWN) : 6 + len(DOWN)])
        await client.ask(puback(number))
    assert await house.downlink.count(device_id) == 0


async def test_at_qos_0_a_message_is_done_with_when_it_is_written(house: House) -> None:
    """Nobody acknowledges it."""
    client = await house.session()
    await client.ask(subscribe(DOWN, qos=0))
    await sent(house, b"one")
    assert await client.heard() == [message(DOWN, b"one")]
    assert await house.downlink.count(client.connection.device_id) == 0


@pytest.mark.parametrize("qos", [0, 1])
async def test_what_was_delivered_is_removed_though_the_engine_was_away(
    house: House, monkeypatch: pytest.MonkeyPatch, qos: int
) -> None:
    """It does not come again, neither in this session nor in the next one."""
    monkeypatch.setattr(session, "_AWAY_SECONDS", 0.01)
    remove, tries = house.downlink.remove, itertools.count()

    async def late(sequence: int) -> None:
        if next(tries) < 2:
            raise Unavailable("the engine is away")
        await remove(sequence)

    monkeypatch.setattr(house.downlink, "remove", late)
    client = await house.session()
    await client.ask(subscribe(DOWN, qos=qos))
    await sent(house, b"one")
    await until(lambda: bool(client.transport.writes[-1:] and client.transport.writes[-1].endswith(b"one")))
    if qos:
        client.send(puback(int.from_bytes(client.transport.writes[-1][4 + len(DOWN) : 6 + len(DOWN)])))
        await settled()
    client.send(subscribe(DOWN, qos=qos))  # has what waits looked at anew
    await until(lambda: next(tries) > 3 and not house.mqtt.tasks)
    assert b"".join(client.transport.writes).count(b"one") == 1
    assert await house.downlink.count(client.connection.device_id) == 0


async def test_a_message_that_nobody_has_subscribed_to_waits(house: House) -> None:
    """Until a session subscribes to it; other subscriptions do not take it."""
    client = await house.session()
    await client.ask(subscribe(OWN + "get"))
    assert (await sent(house, b"one"))["way"] == "waits"
    assert await client.heard() == []
    (answer, found) = await client.ask(subscribe(DOWN))
    assert answer == suback(1, 1)
    assert found.endswith(b"one")


async def test_what_was_passed_over_is_looked_at_again_once_another_filter_comes(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that comes in the moment in which what lies behind it is found."""
    find, passed_over = house.downlink.next, OWN + "get"

    async def meanwhile(device_id: int, after: int = 0) -> Waiting | None:
        found = await find(device_id, after)
        if after and passed_over not in client.connection.subscriptions:
            client.send(subscribe(passed_over, number=2))
        return found

    await sent(house, b"one", passed_over)
    await sent(house, b"two")
    client = await house.session()
    monkeypatch.setattr(house.downlink, "next", meanwhile)
    answers = await client.ask(subscribe(DOWN))
    assert {each[-3:] for each in answers if each[0] == 0x32} == {b"one", b"two"}


@pytest.mark.parametrize("found_first", [False, True])
async def test_what_was_acknowledged_is_not_sent_again_with_another_filter(
    house: House, monkeypatch: pytest.MonkeyPatch, found_first: bool
) -> None:
    """That comes while the engine removes it still, or has found it before it did."""
    find, remove, go_on = house.downlink.next, house.downlink.remove, asyncio.Event()

    async def find_slowly(device_id: int, after: int = 0) -> Waiting | None:
        found = await find(device_id, after)
        if found_first and subscribed:
            await go_on.wait()
        return found

    async def remove_slowly(sequence: int) -> None:
        if not found_first:
            await go_on.wait()
        await remove(sequence)

    subscribed = False
    await sent(house, b"one")
    client = await house.session()
    _, first = await client.ask(subscribe(DOWN))
    assert first.endswith(b"one")
    monkeypatch.setattr(house.downlink, "next", find_slowly)
    monkeypatch.setattr(house.downlink, "remove", remove_slowly)
    subscribed = True
    client.send(subscribe(OWN + "get", number=2))
    await settled(20)
    client.send(puback(int.from_bytes(first[-5:-3])))
    client.send(subscribe(OWN + "get", number=3))
    await settled(20)
    go_on.set()
    assert [each[0] for each in await client.ask(PINGREQ)] == [0x90, 0x90, 0xD0]


async def test_at_most_twenty_are_under_way(house: House) -> None:
    """The rest follows as they are acknowledged; each once."""
    client = await house.session()
    await client.ask(subscribe(DOWN))
    for number in range(45):
        await sent(house, b"%02d" % number)
    seen: list[bytes] = []
    while found := await client.heard():
        assert len(found) <= 20
        seen += [each[-2:] for each in found]
        for each in found:
            client.send(puback(int.from_bytes(each[4 + len(DOWN) : 6 + len(DOWN)])))
    assert seen == [b"%02d" % number for number in range(45)]


async def test_what_the_engine_did_not_tell_comes_once_it_is_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nobody asks for it any more."""

    async def away(*_: object) -> None:
        raise Unavailable("the engine is away")

    client = await house.session()
    await client.ask(subscribe(DOWN))
    monkeypatch.setattr(session, "_AWAY_SECONDS", 0.02)
    with monkeypatch.context() as patch:
        patch.setattr(house.downlink, "next", away)
        await sent(house, b"one")
        await settled()
    found = await client.heard()
    assert [each[-3:] for each in found] == [b"one"]


async def test_what_waits_comes_once_live_messages_leave_room_for_it(house: House) -> None:
    """They count among those that are under way, and their PUBACKs as well."""
    topic = f"/broadcast/{PRODUCT}/all"
    client = await house.session()
    await client.ask(subscribe(topic))
    await client.ask(subscribe(DOWN))
    for _ in range(25):
        client.connection.deliver_live(topic, b"")
    numbers = [int.from_bytes(each[-2:]) for each in await client.heard()]
    await sent(house, b"one")
    assert await client.heard() == []
    found = await client.ask(b"".join(map(puback, numbers)))
    assert [each[-3:] for each in found] == [b"one"]


async def test_a_persistent_session_gets_what_came_while_it_was_away(house: House) -> None:
    """CONNACK says that it is present; its subscriptions stand; what was sent before comes again, marked so, as the same packet."""
    client = await house.session(clean=False)
    assert await client.ask(subscribe(DOWN)) == [suback(1, 1)]
    await sent(house, b"one")
    (one,) = await client.heard()
    client.lose()
    await client.heard()
    assert (await sent(house, b"two"))["way"] == "mqtt"
    back = house.client()
    present, again, two = await back.open(clean=False)
    assert present == bytes.fromhex("20020100")
    assert again == bytes([one[0] | 8]) + one[1:]
    assert two[:1] == b"\x32"
    assert two.endswith(b"two")


async def test_a_clean_session_ends_a_persistent_one(house: House) -> None:
    """The next persistent one begins anew."""
    client = await house.session(clean=False)
    await client.ask(subscribe(DOWN))
    await client.ask(DISCONNECT)
    await (await house.session()).ask(DISCONNECT)
    assert await house.client().open(clean=False) == [CONNACK]
    assert house.downlink.persistent


async def test_a_right_that_was_withdrawn_is_not_restored(house: House) -> None:
    """A persistent session comes back without what it may no longer have."""
    client = await house.session(clean=False)
    await client.ask(subscribe(DOWN) + subscribe(OWN + "get", number=2))
    await client.ask(DISCONNECT)
    house.registry.remove_topic_class(PRODUCT, "user/get")
    await house.cache.follow()
    back = await house.session(clean=False)
    assert back.connection.subscriptions == {OWN + "get": 1}


async def test_link_sdks_get_system_messages_without_asking(house: House) -> None:
    """`_ss=1` in the clientId; the device's own reports are not told back to it."""
    client = await house.session(more=",_ss=1")
    topic = f"/sys/{PRODUCT}/{DEVICE}/thing/service/property/set"
    assert (await sent(house, b"{}", topic))["way"] == "mqtt"
    (found,) = await client.heard()
    assert topic.encode() in found
    report = f"/sys/{PRODUCT}/{DEVICE}/thing/event/property/post"
    assert await client.ask(publish(report, b"{}")) == [puback(1)]


async def test_a_slow_reader_misses_live_messages_and_no_waiting_ones(house: House) -> None:
    """Its bytes are bounded; the record says so once."""
    client = await house.session()
    await client.ask(subscribe(DOWN) + subscribe(f"/broadcast/{PRODUCT}/+", number=2))
    client.transport.unread = 2 * 1024 * 1024
    for _ in range(3):
        assert not client.connection.deliver_live(f"/broadcast/{PRODUCT}/x", b"lost")
    client.connection.pause_writing()
    await sent(house, b"kept")
    assert await client.heard() == []
    assert [outcome.reason for outcome in house.outcomes] == [
        "the client does not keep up with its subscriptions; messages to it are dropped"
    ]
    client.transport.unread = 0
    client.connection.resume_writing()
    (found,) = await client.heard()
    assert found.endswith(b"kept")


# what others decide


async def test_a_device_has_one_session(house: House, neighbour: House) -> None:
    """The younger closes the older, on the same worker and on another; the device stays online."""
    first = await house.session()
    second = await house.session()
    await first.heard()
    assert first.transport.closed
    third = await neighbour.session()
    await asyncio.sleep(0.02)
    await second.heard()
    assert second.transport.closed
    assert not third.transport.closed
    assert "another session" in second.reason
    await house.presence.flush()
    await neighbour.presence.flush()
    assert house.registry.device(PRODUCT, DEVICE).session == "1"
    fourth = await house.session()
    await asyncio.sleep(0.02)
    await third.heard()
    assert third.transport.closed
    assert not fourth.transport.closed


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda registry: registry.set_enabled(PRODUCT, DEVICE, False), "disabled"),
        (lambda registry: registry.reset_secret(PRODUCT, DEVICE), "secret was changed"),
        (lambda registry: registry.delete_device(PRODUCT, DEVICE), "deleted"),
        (lambda registry: registry.delete_product(PRODUCT, with_devices=True), "deleted"),
    ],
)
async def test_what_ends_a_devices_rights_ends_its_session(house: House, act: object, reason: str) -> None:
    """At the next look at the registry's changes, a quarter of a second away."""
    client = await house.session()
    assert callable(act)
    act(house.registry)
    await house.cache.follow()
    await client.heard()
    assert client.transport.closed
    assert reason in client.reason


async def test_a_change_counts_while_its_session_is_restored(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it stands nobody knows that it is concerned."""
    find = house.downlink.session

    async def meanwhile(device_id: int) -> SessionRecord | None:
        house.registry.set_enabled(PRODUCT, DEVICE, False)
        await house.cache.follow()
        return await find(device_id)

    monkeypatch.setattr(house.downlink, "session", meanwhile)
    client = await house.session(clean=False)
    await client.heard()
    assert client.transport.closed
    assert "disabled" in client.reason


async def test_of_two_changes_the_later_stands(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though what was read for the earlier comes last."""
    load, later = house.cache.load, asyncio.Event()

    async def slow(device_id: int) -> Entry | None:
        entry = await load(device_id)
        if not later.is_set():
            house.registry.remove_topic_class(PRODUCT, "user/update")
            await house.cache.follow()
            later.set()
            await asyncio.sleep(0.05)
        return entry

    client = await house.session()
    monkeypatch.setattr(house.cache, "load", slow)
    house.registry.remove_topic_class(PRODUCT, "user/get")
    await house.cache.follow()
    await later.wait()
    await client.heard()
    assert await client.ask(publish(UP, b"x")) == []
    assert client.transport.closed


async def test_a_withdrawn_class_ends_its_subscriptions_alone(house: House) -> None:
    """The session goes on; what is granted anew is at hand without a new login."""
    client = await house.session()
    await client.ask(subscribe(DOWN) + subscribe(OWN + "get", number=2))
    house.registry.remove_topic_class(PRODUCT, "user/get")
    house.registry.add_topic_class(PRODUCT, "more", Right.PUBLISH)
    await house.cache.follow()
    await client.heard()
    assert client.connection.subscriptions == {OWN + "get": 1}
    assert "withdrawn" in client.reason
    assert await client.ask(publish(OWN + "more", b"x")) == [puback(1)]


async def test_a_stop_answers_what_is_under_way(house: House) -> None:
    """Then every session is closed, and told to be offline."""
    idle, busy = await house.session(), house.client()
    house.registry.create_device(PRODUCT, "busy", secret="s")
    await busy.open(login("busy", secret="s"))
    waiting: list[object] = []
    store, house.engine.publish = house.engine.publish, lambda *given: waiting.append(given)  # type: ignore[method-assign]
    busy.send(publish(f"/{PRODUCT}/busy/user/update", b"x"))
    house.mqtt.drain()
    assert idle.transport.closed
    assert not busy.transport.closed
    house.engine.publish = store  # type: ignore[method-assign]
    store(*waiting[0])  # type: ignore[misc]
    assert (await busy.heard())[-1] == puback(1)
    assert busy.transport.closed


# applications


def make_app(house: House, *, sends: bool = True, products: tuple[str, ...] = (PRODUCT,)) -> Login:
    app = App(1, "app-billing", "billing", b"", sends, 0, tuple(ProductKey(each) for each in products))
    house.apps.known[app.key] = (app, b"right")
    return Login("any", app.key, "right")


async def test_an_application_hears_its_products_and_sends_down(house: House) -> None:
    """Reports of every device over either door; what it publishes to a device's topic waits for the device."""
    reader = house.client()
    assert await reader.open(make_app(house)) == [CONNACK]
    assert await reader.ask(subscribe(f"/{PRODUCT}/#", qos=0)) == [suback(1, 1 - 1)]
    device = await house.session()
    await device.ask(publish(UP, b"hello"))
    assert await reader.heard() == [message(UP, b"hello")]
    assert await reader.ask(publish(DOWN, b"to you")) == [puback(1)]
    (answer, found) = await device.ask(subscribe(DOWN))
    assert answer == suback(1, 1)
    assert found.endswith(b"to you")


@pytest.mark.parametrize(
    "topic_filter", ["#", "/#", "/+/#", "/other/#", "/sys/#", "$SYS/#", "/$JS/#", "/as/mqtt/status/+/+"]
)
async def test_an_application_hears_nothing_else(house: House, topic_filter: str) -> None:
    """0x80, and the reason in the record."""
    reader = house.client()
    await reader.open(make_app(house))
    assert await reader.ask(subscribe(topic_filter)) == [suback(1, 0x80)]
    assert house.outcomes


@pytest.mark.parametrize(
    ("topic", "sends", "reason"),
    [
        (DOWN, False, "may read, and not send"),
        ("/other/device/user/get", True, "has nothing to do with the product 'other'"),
        (UP, True, "is not for messages to a device"),
        (f"/{PRODUCT}/unknown/user/get", True, "there is no device 'unknown'"),
    ],
)
async def test_an_application_sends_nowhere_else(house: House, topic: str, sends: bool, reason: str) -> None:
    """The connection ends, as for a device; nothing is stored as if a device had said it."""
    client = house.client()
    await client.open(make_app(house, sends=sends))
    assert await client.ask(publish(topic, b"x")) == []
    assert client.transport.closed
    assert reason in client.reason
    assert await house.engine.latest(Query(), 10) == []


async def test_an_application_that_is_deleted_is_shut_out(house: House) -> None:
    """And one with other rights signs in anew; one that is as it was stays."""
    client = house.client()
    await client.open(make_app(house))
    await house.mqtt._renew_apps([1])
    assert not client.transport.closed
    del house.apps.known["app-billing"]
    await house.mqtt._renew_apps([1])
    await client.heard()
    assert client.transport.closed


async def test_an_application_that_is_deleted_while_it_signs_in_is_shut_out(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of it is older than the change."""
    find = house.apps.signed_in

    async def meanwhile(key: str, secret: bytes) -> App | None:
        app = await find(key, secret)
        house.apps.known.clear()
        house.mqtt._changed(Change(ProductKey(""), None, app_id=1))
        await settled()
        return app

    monkeypatch.setattr(house.apps, "signed_in", meanwhile)
    client = house.client()
    await client.open(make_app(house))
    await client.heard()
    assert client.transport.closed


# however it is cut


@examples(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 400), max_size=12))
async def test_a_conversation_split_anywhere_is_the_same(house: House, cuts: list[int]) -> None:
    """TCP may cut where it likes."""
    house.flow._login_cost = house.flow._message_cost = house.flow._byte_cost = 0.0
    data = (
        connect(login()) + subscribe(DOWN) + publish(UP, b"x" * 200, number=9) + PINGREQ + publish(UP, b"", number=10)
    )
    client = house.client()
    start = 0
    for cut in sorted({*cuts, len(data)}):
        if start < len(data):
            client.send(data[start:cut])
            start = cut
    answers = await client.heard()
    assert answers[:2] == [CONNACK, suback(1, 1)]
    assert sorted(answers[2:]) == sorted([puback(9), b"\xd0\x00", puback(10)])
    client.lose()


async def test_a_broadcast_reaches_the_sessions_of_every_worker(house: House, neighbour: House) -> None:
    """Those that have subscribed, of that product; the sender learns how many."""
    house.registry.create_device(PRODUCT, "second", secret=SECRET)
    house.registry.create_device(PRODUCT, "third", secret=SECRET)
    topic = f"/broadcast/{PRODUCT}/news"
    here, there, deaf = await house.session(), await neighbour.session("second"), await house.session("third")
    for client in (here, there):
        assert await client.ask(subscribe(topic)) == [bytes.fromhex("9003000101")]
    assert await house.sending.send(topic, b"hear") == {"sessions": 2}
    for client in (here, there):
        (message,) = await client.heard()
        assert b"hear" in message
    assert await deaf.heard() == []
    assert await house.sending.send("/broadcast/other/news", b"hear") == {"sessions": 0}
