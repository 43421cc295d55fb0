"""A message that waits for a device rides home in the answer to its next report."""

from __future__ import annotations

import asyncio

import pytest

from tests.http.conftest import House, Peer, Reply, publish_request, request
from tests.room import DEVICE, PRODUCT, settled
from uplinkd.core import wire
from uplinkd.core.errors import NotFound, Rejected
from uplinkd.engine import SessionRecord, Waiting

DOWN = f"/{PRODUCT}/{DEVICE}/user/get"


async def send(house: House, payload: bytes, topic: str = DOWN) -> dict[str, object]:
    return await house.sending.send(topic, payload)


async def report(peer: Peer, token: str) -> Reply:
    """The answer to one report, once everything that it has set off is done."""
    answer = await peer.ask(publish_request(token))
    for _ in range(20):
        await settled()
        await asyncio.sleep(0.001)
    return answer


async def test_waiting_messages_ride_home_one_by_one(house: House) -> None:
    """Oldest first, exactly one a reply, with its topic; then replies are as they were."""
    token = await house.token()
    peer = house.connect()
    for payload in ("one", 'two \u00e9 "quoted"\n', ""):
        assert (await send(house, payload.encode()))["way"] == "waits"
    told = [(await report(peer, token)).json["info"] for _ in range(4)]
    assert [each.get("data") for each in told] == ["one", 'two \u00e9 "quoted"\n', "", None]
    assert [each.get("topic") for each in told] == [DOWN] * 3 + [None]
    assert await house.downlink.count(1) == 0


async def test_the_reply_is_as_the_seed_has_it(house: House) -> None:
    """Literally; UTF-8 as it is."""
    token = await house.token()
    await send(house, "灯".encode())
    answer = await report(house.connect(), token)
    number = answer.json["info"]["messageId"]
    expected = f'{{"code":0,"message":"success","info":{{"messageId":{number},"topic":"{DOWN}","data":"灯"}}}}'
    assert answer.body == expected.encode()


async def test_what_comes_while_nothing_was_found_rides_home_with_the_next_report(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though what waited before, for a session over MQTT, is not looked at with each report."""
    find, other = house.downlink.next, f"/{PRODUCT}/{DEVICE}/get"

    async def meanwhile(device_id: int, after: int = 0) -> Waiting | None:
        found = await find(device_id, after)
        if found is None:
            monkeypatch.undo()
            await send(house, b"one", other)
        return found

    token = await house.token()
    peer = house.connect()
    await house.downlink.save_session(1, SessionRecord({DOWN: 1}))
    await send(house, b"for the session")
    monkeypatch.setattr(house.downlink, "next", meanwhile)
    assert [(await report(peer, token)).json["info"].get("data") for _ in range(2)] == [None, "one"]


async def test_a_device_for_which_nothing_waits_costs_no_look(house: House) -> None:
    """Nor does one that had something once, after the look that found nothing more."""
    token = await house.token()
    peer = house.connect()
    for _ in range(5):
        await report(peer, token)
    assert house.downlink.looks == 0
    await send(house, b"one")
    for _ in range(5):
        await report(peer, token)
    assert house.downlink.looks == 2


async def test_a_message_stays_until_its_reply_has_left(house: House) -> None:
    """A peer that does not read has not got it; what it then reads counts."""
    token = await house.token()
    await send(house, b"one")
    slow = house.connect()
    slow.transport.unread = 1000
    assert (await report(slow, token)).json["info"]["data"] == "one"
    assert await house.downlink.count(1) == 1
    slow.transport.unread = 0
    await asyncio.sleep(0.05)
    assert await house.downlink.count(1) == 0


async def test_a_message_whose_reply_was_lost_comes_again(house: House) -> None:
    """The connection broke before it was written."""
    token = await house.token()
    await send(house, b"one")
    slow = house.connect()
    slow.transport.unread = 1000
    assert (await report(slow, token)).json["info"]["data"] == "one"
    slow.connection.connection_lost(ConnectionResetError())
    await asyncio.sleep(0.05)
    assert (await report(house.connect(), token)).json["info"]["data"] == "one"


async def test_a_message_for_which_a_closing_connection_has_no_answer_comes_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has ended it, and its answer is not written any more."""
    take = house.gateway.take

    async def meanwhile(device_id: int) -> Waiting | None:
        message = await take(device_id)
        peer.transport.close()
        monkeypatch.setattr(peer.transport, "write", lambda _: None)
        return message

    token = await house.token()
    await send(house, b"one")
    peer = house.connect()
    with monkeypatch.context() as patch:
        patch.setattr(house.gateway, "take", meanwhile)
        peer.send(publish_request(token))
        await asyncio.sleep(0.05)
    assert (await report(house.connect(), token)).json["info"].get("data") == "one"


async def test_a_message_whose_connection_had_to_yield_comes_again(house: House) -> None:
    """Before its answer had left."""
    token = await house.token()
    await send(house, b"one")
    peer = house.connect()
    peer.transport.unread = 1000
    assert (await report(peer, token)).json["info"]["data"] == "one"
    peer.connection.abort()
    peer.connection.connection_lost(None)
    await asyncio.sleep(0.05)
    assert (await report(house.connect(), token)).json["info"].get("data") == "one"


async def test_two_reports_at_once_never_bring_the_same_message(house: House) -> None:
    """Each message is one answer's alone while that is on its way."""
    token = await house.token()
    for number in range(6):
        await send(house, b"%d" % number)
    peers = [house.connect() for _ in range(6)]
    for peer in peers:
        peer.send(publish_request(token))
    await asyncio.sleep(0.3)
    told = [reply.json["info"].get("data") for peer in peers for reply in await peer.replies()]
    assert sorted(each for each in told if each) == sorted({each for each in told if each})
    assert len([each for each in told if each]) >= 2


async def test_pipelined_reports_bring_one_each(house: House) -> None:
    """In their order."""
    token = await house.token()
    for number in range(3):
        await send(house, b"%d" % number)
    peer = house.connect()
    peer.send(publish_request(token) * 4)
    await asyncio.sleep(0.2)
    assert [reply.json["info"].get("data") for reply in await peer.replies()] == ["0", "1", "2", None]


async def test_what_a_persistent_session_wants_is_left_to_it(house: House) -> None:
    """Also while it is away; other messages ride home past it."""
    token = await house.token()
    await house.downlink.save_session(1, SessionRecord({DOWN: 1}))
    assert (await send(house, b"\xff not text"))["way"] == "mqtt"
    assert (await send(house, b"other", f"/{PRODUCT}/{DEVICE}/get"))["way"] == "waits"
    peer = house.connect()
    assert (await report(peer, token)).json["info"]["data"] == "other"
    assert "data" not in (await report(peer, token)).json["info"]
    looks = house.downlink.looks
    for _ in range(3):
        await report(peer, token)
    assert house.downlink.looks == looks
    await house.downlink.forget_session(1)
    house.monotonic += 6
    assert "data" not in (await report(peer, token)).json["info"]
    assert await house.downlink.count(1) == 1


async def test_an_engine_that_is_away_costs_no_answer(house: House) -> None:
    """The report is stored and says so; the message comes later."""
    token = await house.token()
    await send(house, b"one")
    house.bus.connected = False
    peer = house.connect()
    assert "data" not in (await report(peer, token)).json["info"]
    house.bus.connected = True
    assert (await report(peer, token)).json["info"]["data"] == "one"


@pytest.mark.parametrize(
    ("topic", "payload", "reason"),
    [
        (DOWN, b"\xff", "its byte 0 is not UTF-8"),
        (DOWN, b"x" * 513, "it has 513 bytes as JSON text; at most 512 fit"),
        (DOWN, b"\n" * 257, "it has 514 bytes as JSON text"),
        (f"/{PRODUCT}/{DEVICE}/user/update", b"", "is not for messages to a device"),
        (f"/{PRODUCT}/{DEVICE}/user/+", b"", "the wildcard + has no place"),
        (f"/sys/{PRODUCT}/{DEVICE}/thing/event/property/post", b"", "is not for messages to a device"),
        (f"/as/mqtt/status/{PRODUCT}/{DEVICE}", b"", "is not for messages to a device"),
        ("/somewhere", b"", "is no topic of a device"),
    ],
)
async def test_what_can_never_arrive_is_refused_at_sending(
    house: House, topic: str, payload: bytes, reason: str
) -> None:
    """With the rule and the limit in words; nothing is kept."""
    with pytest.raises(Rejected, match=reason.replace("+", r"\+")):
        await send(house, payload, topic)
    assert await house.downlink.count(1) == 0


async def test_an_unknown_device_is_said_to_be_so(house: House) -> None:
    """Its product may be unknown as well."""
    with pytest.raises(NotFound, match="there is no device 'nobody'"):
        await send(house, b"", f"/{PRODUCT}/nobody/user/get")


async def test_the_oldest_of_too_many_is_dropped_and_recorded(house: House) -> None:
    """A hundred may wait for a device."""
    ids = [(await send(house, b"%d" % number))["messageId"] for number in range(102)]
    assert [each.dropped for each in house.dropped] == ids[:2]
    assert await house.downlink.count(1) == 100


def test_a_reply_stays_within_what_old_sdks_read() -> None:
    """Head and body of the largest reply that there can be."""
    body = wire.published_with((1 << 63) - 1, "/" + "t" * 127, b"x" * wire.MAX_HOME_BYTES)
    assert len(body) < 800
    assert not wire.fits_home(b"x" * wire.MAX_HOME_BYTES)


async def test_a_get_of_the_websocket_path_is_no_request(house: House) -> None:
    """Without Upgrade it is a method that is not known."""
    answer = await house.connect().ask(request("/mqtt", b"", method="GET"))
    assert answer.status in (404, 405)
