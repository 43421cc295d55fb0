"""What a device is answered: each code, the order of the checks, and the reason that the operator reads."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.http.conftest import House, login_body, login_request, publish_request, request
from tests.room import DEVICE, PRODUCT, SECRET
from uplinkd.core import signature, tokens
from uplinkd.core.errors import Unavailable
from uplinkd.core.model import Right
from uplinkd.engine import Query

JSON = "Content-Type: application/json"
BYTES = "Content-Type: application/octet-stream"
TOPIC = f"/{PRODUCT}/{DEVICE}/user/update"


def last_reason(house: House) -> str:
    return house.outcomes[-1].reason


async def test_a_device_signs_in_and_reports(house: House) -> None:
    """The whole job: token, then messageId, and the message is stored as it was sent."""
    peer = house.connect()
    token = (await peer.ask(login_request())).json["info"]["token"]
    reply = await peer.ask(publish_request(token, b"\x00\xff payload\x00"))
    assert reply.json["message"] == "success"
    message_id = reply.json["info"]["messageId"]
    assert 0 < message_id < 2**63
    assert reply.body == b'{"code":0,"message":"success","info":{"messageId":%d}}' % message_id
    stored = await house.engine.latest(Query(), 10)
    assert [(each.id, each.topic, each.payload) for each in stored] == [(message_id, TOPIC, b"\x00\xff payload\x00")]
    assert house.outcomes == []


@pytest.mark.parametrize("method", ["hmacmd5", "hmacsha1", "hmacsha256", "HmacSHA256"])
@pytest.mark.parametrize("case", [str.upper, str.lower])
async def test_each_method_and_letter_case_signs_in(house: House, method: str, case: Any) -> None:
    """v3 sends 40 lower-case digits, v4 sends 64 upper-case ones."""
    body = login_body(method=method.lower())
    body |= {"signmethod": method, "sign": case(body["sign"])}
    reply = await house.connect().ask(request("/auth", json.dumps(body).encode(), JSON))
    assert reply.code == 0


async def test_link_sdk_4_signs_in(house: House) -> None:
    """A query string on /auth is ignored, and without version and timestamp all is well."""
    body = login_body(method="hmacsha256")
    del body["version"]
    body["sign"] = str(body["sign"]).upper()
    reply = await house.connect().ask(request("/auth?_v=sdk-c-4.1.0&", json.dumps(body).encode(), JSON))
    assert reply.code == 0


async def test_without_signmethod_the_sign_is_hmacmd5(house: House) -> None:
    """The documented default."""
    body = login_body(method="hmacmd5")
    del body["signmethod"]
    assert (await house.connect().ask(request("/auth", json.dumps(body).encode(), JSON))).code == 0


@pytest.mark.parametrize("as_number", [False, True])
@pytest.mark.parametrize(("offset", "code"), [(0, 0), (-890, 0), (890, 0), (-910, 20000), (910, 20000)])
async def test_a_timestamp_holds_for_fifteen_minutes_either_way(
    house: House, offset: int, code: int, as_number: bool
) -> None:
    """As text or as a number (Alibaba's Node.js sample sends one); the log says by how much it is off."""
    stamp = round((house.wall + offset) * 1000)
    reply = await house.connect().ask(login_request(timestamp=stamp if as_number else str(stamp)))
    assert reply.code == code
    if code:
        assert "910 s" in last_reason(house)
        assert ("ahead of" if offset > 0 else "behind") in last_reason(house)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"device": "nobody"}, "no device 'nobody'"),
        ({"product": "a1unknown00"}, "a1unknown00"),
        ({"secret": "wrong"}, f"'clientId12345deviceName{DEVICE}productKey{PRODUCT}' with hmacsha1"),
    ],
)
async def test_who_is_not_recognised_is_20000(house: House, members: dict[str, str], words: str) -> None:
    """All alike to the device; the operator reads which, with the exact content that the server signed."""
    reply = await house.connect().ask(login_request(**members))
    assert (reply.status, reply.code, reply.json["message"]) == (200, 20000, "auth check error")
    assert set(reply.json["info"]) == {"requestId"}
    outcome = house.outcomes[-1]
    assert words in outcome.reason
    assert outcome.request_id == reply.json["info"]["requestId"]
    assert outcome.address == "192.0.2.7"


async def test_a_refusal_never_tells_the_secret_or_the_sign(house: House) -> None:
    """Even when firmware signs its secret by mistake, neither it nor the right sign is recorded."""
    body = login_body(secret="wrong", note=f"my secret is {SECRET}")
    await house.connect().ask(request("/auth", json.dumps(body).encode(), JSON))
    right = signature.sign(SECRET, signature.content_of({k: str(v) for k, v in body.items()}), "hmacsha1")
    text = repr(house.outcomes)
    assert f"is {SECRET}" not in text
    assert "is ***" in text
    assert right not in text
    assert str(body["sign"]) not in text


async def test_a_sign_of_the_wrong_length_is_pointed_out(house: House) -> None:
    """The commonest mistake: another method than the one named."""
    body = login_body(method="hmacsha1") | {"signmethod": "hmacmd5"}
    await house.connect().ask(request("/auth", json.dumps(body).encode(), JSON))
    assert "the sign has 40 digits, hmacmd5 gives 32" in last_reason(house)


async def test_all_refused_logins_cost_the_same(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown product, unknown device, wrong sign, disabled, stale: one registry look-up and two HMACs each."""
    house.registry.create_device(PRODUCT, "disabled1", secret=SECRET)
    house.registry.set_enabled(PRODUCT, "disabled1", False)
    await house.token()
    work: list[str] = []
    find, matches = house.registry.find_device, signature.matches

    def counted_find(*names: str) -> object:
        work.append("look-up")
        return find(*names)

    def counted_matches(*parts: str) -> bool:
        work.append("hmac")
        return matches(*parts)

    monkeypatch.setattr(house.registry, "find_device", counted_find)
    monkeypatch.setattr(signature, "matches", counted_matches)
    seen = []
    for members in (
        {"product": "a1unknown00"},
        {"device": "nobody"},
        {"secret": "wrong"},
        {"device": "disabled1"},
        {"device": "disabled1", "secret": "wrong"},
        {"timestamp": "1"},
    ):
        work.clear()
        assert (await house.connect().ask(login_request(**members))).code == 20000
        seen.append(sorted(work))
    assert seen == [["hmac", "hmac", "look-up"]] * 6


async def test_a_disabled_device_does_not_sign_in(house: House) -> None:
    """Its reason names the command that lets it in again."""
    house.registry.set_enabled(PRODUCT, DEVICE, False)
    assert (await house.connect().ask(login_request())).code == 20000
    assert f"uplinkd device enable {PRODUCT} {DEVICE}" in last_reason(house)


async def test_a_new_secret_counts_at_once_though_the_old_one_is_cached(house: House) -> None:
    """A refusal is decided on fresh facts."""
    await house.token()
    device = house.registry.reset_secret(PRODUCT, DEVICE)
    assert (await house.connect().ask(login_request(secret=device.secret))).code == 0


@pytest.mark.parametrize(
    "raw",
    [
        request("/auth", b"{}", JSON),
        request("/auth", b"not json", JSON),
        request("/auth", b"", JSON),
        request("/auth", b"[1]", JSON),
        request("/auth", json.dumps(login_body()).encode(), "Content-Type: text/plain"),
        request("/auth", json.dumps(login_body(padding="x" * 5000)).encode(), JSON),
        request("/auth", json.dumps(login_body(clientId="c" * 65)).encode(), JSON),
        request("/auth", json.dumps(login_body() | {"signmethod": "md5"}).encode(), JSON),
        request("/auth", json.dumps(login_body() | {"timestamp": "x"}).encode(), JSON),
    ],
)
async def test_a_malformed_login_is_10001(house: House, raw: bytes) -> None:
    """Missing, malformed or over-long member, wrong Content-Type, body not JSON."""
    reply = await house.connect().ask(raw)
    assert (reply.status, reply.code, reply.json["message"]) == (200, 10001, "param error")
    assert last_reason(house)


async def test_a_login_that_cannot_be_recorded_is_20004(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry away is a fault to retry, never 'not recognised'."""

    def away(*_: object) -> None:
        raise Unavailable("the registry is away: disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(house.registry, "activate", away)
        reply = await house.connect().ask(login_request())
        assert (reply.code, reply.json["message"]) == (20004, "update session error")
    monkeypatch.setattr(house.registry, "find_device", away)
    house.cache.forget()
    assert (await house.connect().ask(login_request())).code == 20004
    assert "disk I/O error" in last_reason(house)


async def test_the_first_login_activates_a_device(house: House) -> None:
    """Inactive is never authenticated."""
    assert house.registry.device(PRODUCT, DEVICE).activated is None
    await house.token()
    assert house.registry.device(PRODUCT, DEVICE).activated is not None


async def test_the_31st_login_in_a_minute_is_40000(house: House) -> None:
    """30 a minute, with a burst of the same size."""
    peer = house.connect()
    codes = [(await peer.ask(login_request())).code for _ in range(31)]
    assert codes == [0] * 30 + [40000]


async def test_wrong_signs_are_slowed_for_who_sends_them(house: House) -> None:
    """The 31st is 40000, and the device itself signs in from elsewhere."""
    peer = house.connect("198.51.100.1")
    codes = [(await peer.ask(login_request(secret="guess"))).code for _ in range(31)]
    assert codes == [20000] * 30 + [40000]
    assert (await house.connect("192.0.2.7").ask(login_request())).code == 0


async def test_an_unexpected_fault_is_10000_and_the_traceback_is_logged(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug of ours is answered like everything else and does not end the connection."""
    token = await house.token()

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(house.engine, "publish", broken)
        peer = house.connect()
        reply = await peer.ask(publish_request(token))
        assert (reply.status, reply.code, reply.json["message"]) == (200, 10000, "common error")
    assert "ZeroDivisionError" in caplog.text
    assert (await peer.ask(publish_request(token))).code == 0


@pytest.mark.parametrize("headers", [(BYTES,), (BYTES, "password:"), (BYTES, "password:   ")])
async def test_without_a_token_it_is_20002(house: House, headers: tuple[str, ...]) -> None:
    """No password header, or an empty one."""
    reply = await house.connect().ask(request("/topic" + TOPIC, b"x", *headers))
    assert (reply.status, reply.code, reply.json["message"]) == (200, 20002, "token is null")


@pytest.mark.parametrize("token", ["x", "6944e5bfb92e4d4ea3918d1eda3942f6", "A" * 52, "é" * 52, "x" * 500])
async def test_a_token_that_was_never_ours_is_20003(house: House, token: str) -> None:
    """The seed's own example among them."""
    raw = request("/topic" + TOPIC, b"x", BYTES).replace(b"Host: h", b"Host: h\r\npassword: " + token.encode("latin-1"))
    reply = await house.connect().ask(raw)
    assert (reply.code, reply.json["message"]) == (20003, "check token error")


@pytest.mark.parametrize("known", [False, True], ids=["a new connection", "one that has reported before"])
@pytest.mark.parametrize("end", ["expire", "disable", "reset", "delete", "disable and enable"])
async def test_a_token_dies_with_its_device(house: House, end: str, known: bool) -> None:
    """20001, on which old SDKs authenticate anew; a token from before a disable stays dead after the enable."""
    token = await house.token()
    peer = house.connect()
    for _ in range(3 * known):
        house.cache.forget()
        assert (await peer.ask(publish_request(token))).code == 0
    if end == "expire":
        house.wall += 7 * 86400 + 1
    elif end == "reset":
        house.registry.reset_secret(PRODUCT, DEVICE)
    elif end == "delete":
        house.registry.delete_device(PRODUCT, DEVICE)
    else:
        house.registry.set_enabled(PRODUCT, DEVICE, False)
        if end == "disable and enable":
            house.registry.set_enabled(PRODUCT, DEVICE, True)
    house.cache.forget()
    reply = await peer.ask(publish_request(token))
    assert (reply.code, reply.json["message"]) == (20001, "token is expired")
    if known or end != "delete":
        assert (house.outcomes[-1].product_key, house.outcomes[-1].device_name) == (PRODUCT, DEVICE)


async def test_a_token_dies_with_the_key_that_signed_it(house: House) -> None:
    """Also one that was looked at before: what this installation cannot verify is not its own."""
    token = await house.token()
    peer = house.connect()
    for _ in range(3):
        assert (await peer.ask(publish_request(token))).code == 0
    keys = house.registry.signing_keys()
    house.gateway.take_keys([replace(key, id=key.id + 1, key=bytes(32)) for key in keys])
    assert (await peer.ask(publish_request(token))).code == 20003


async def test_a_right_ends_for_reports_that_come_again(house: House) -> None:
    """Byte for byte what was allowed a moment before."""
    house.registry.add_topic_class(PRODUCT, "pub", Right.PUBLISH)
    token = await house.token()
    report = publish_request(token, topic=f"/{PRODUCT}/{DEVICE}/pub")
    peer = house.connect()
    assert [(await peer.ask(report)).code for _ in range(3)] == [0, 0, 0]
    house.registry.remove_topic_class(PRODUCT, "pub")
    await house.cache.follow()
    assert [(await peer.ask(report)).code for _ in range(2)] == [30001, 30001]
    house.registry.add_topic_class(PRODUCT, "pub", Right.BOTH)
    await house.cache.follow()
    assert [(await peer.ask(report)).code for _ in range(2)] == [0, 0]


async def test_a_report_that_was_answered_is_not_held(house: House) -> None:
    """What is learned of a device that reports again and again is kept, its last payload is not."""
    token = await house.token()
    peer = house.connect()
    for number in range(3):
        assert (await peer.ask(publish_request(token, b"%04d" % number * 200))).code == 0
    requests = [known.head.request for known in peer.connection._known]
    assert [each.body for each in requests if each] == [b""]


@pytest.mark.parametrize("change", ["reset", "disable and enable"])
async def test_a_token_that_was_just_issued_stands_though_the_cache_is_behind(house: House, change: str) -> None:
    """Another worker issued it on fresher facts; a 20001 would make old SDKs authenticate for ever."""
    await house.token()
    if change == "reset":
        house.registry.reset_secret(PRODUCT, DEVICE)
    else:
        house.registry.set_enabled(PRODUCT, DEVICE, False)
        await house.cache.load_by_name(PRODUCT, DEVICE)
        house.registry.set_enabled(PRODUCT, DEVICE, True)
    device = house.registry.device(PRODUCT, DEVICE)
    key = max(house.registry.signing_keys(), key=lambda key: key.id)
    token = tokens.issue(key, device, expires=round(house.wall * 1000) + 60_000)
    assert (await house.connect().ask(publish_request(token))).code == 0


async def test_several_tokens_of_one_device_stand_side_by_side(house: House) -> None:
    """A new login does not end the old one's token."""
    first = await house.token()
    house.wall += 1
    second = await house.token()
    assert first != second
    peer = house.connect()
    assert [(await peer.ask(publish_request(token))).code for token in (first, second, first)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("path", "headers", "words"),
    [
        ("/topic", (BYTES,), "empty"),
        ("/topic/", (BYTES,), "empty"),
        (f"/topic/{PRODUCT}//x", (BYTES,), "empty level"),
        (f"/topic{TOPIC}?", (BYTES,), "query string"),
        (f"/topic{TOPIC}?a=b", (BYTES,), "query string"),
        (f"/topic{TOPIC}", (JSON,), "application/json"),
        (f"/topic/{PRODUCT}/{DEVICE}/%zz", (BYTES,), "hexadecimal"),
        (f"/topic/{PRODUCT}/{DEVICE}/%23", (BYTES,), "wildcard"),
        (f"/topic/{PRODUCT}/{DEVICE}/" + "a" * 128, (BYTES,), "bytes"),
    ],
)
async def test_a_malformed_publish_is_10001(house: House, path: str, headers: tuple[str, ...], words: str) -> None:
    """Malformed topic, query string, wrong Content-Type."""
    token = await house.token()
    reply = await house.connect().ask(request(path, b"x", f"password: {token}", *headers))
    assert (reply.status, reply.code) == (200, 10001)
    assert words in last_reason(house)


async def test_a_topic_without_the_right_is_30001_and_the_reason_lists_the_classes(house: House) -> None:
    """The operator sees which topics the device could have used."""
    token = await house.token()
    reply = await house.connect().ask(publish_request(token, topic=f"/{PRODUCT}/{DEVICE}/user/get"))
    assert (reply.code, reply.json["message"]) == (30001, "publish message error")
    assert f"/{PRODUCT}/{DEVICE}/user/update" in last_reason(house)
    assert house.outcomes[-1].topic == f"/{PRODUCT}/{DEVICE}/user/get"
    house.registry.create_device(PRODUCT, "another1")
    assert (await house.connect().ask(publish_request(token, topic=f"/{PRODUCT}/another1/user/update"))).code == 30001


async def test_the_seeds_example_topic_is_a_custom_class(house: House) -> None:
    """/${YourProductKey}/${YourDeviceName}/pub, refused before the class is there and stored after."""
    token = await house.token()
    topic = f"/{PRODUCT}/{DEVICE}/pub"
    assert (await house.connect().ask(publish_request(token, topic=topic))).code == 30001
    house.registry.add_topic_class(PRODUCT, "pub", Right.PUBLISH)
    house.cache.forget()
    assert (await house.connect().ask(publish_request(token, topic=topic))).code == 0


async def test_the_engines_no_is_30001(house: House) -> None:
    """The log says that it was the engine, and why."""
    token = await house.token()
    house.engine.publish = lambda *given: given[2](0, "the engine is away")  # type: ignore[method-assign]
    reply = await house.connect().ask(publish_request(token))
    assert (reply.code, reply.json["message"]) == (30001, "publish message error")
    assert last_reason(house) == "the engine is away"


def within_a_moment(house: House) -> None:
    """Let no time pass for flow control, however busy the machine is."""
    now = house.flow._clock()
    house.flow._clock = lambda: now


async def test_the_31st_message_in_a_second_is_40000(house: House) -> None:
    """Whichever connection it comes by."""
    within_a_moment(house)
    token = await house.token()
    codes = [(await house.connect().ask(publish_request(token))).code for _ in range(31)]
    assert codes == [0] * 30 + [40000]
    assert "device_rate" in last_reason(house)


async def test_the_checks_come_in_the_documented_order(house: House) -> None:
    """Token present → token valid → flow control → topic well-formed → right to publish."""
    within_a_moment(house)
    token = await house.token()
    peer = house.connect()
    wrong_everything = f"/topic/{PRODUCT}//x?y"
    assert (await peer.ask(request(wrong_everything, b"", JSON))).code == 20002
    assert (await peer.ask(request(wrong_everything, b"", JSON, "password: x"))).code == 20003
    for _ in range(30):
        assert (await peer.ask(request(wrong_everything, b"", JSON, f"password: {token}"))).code == 10001
    assert (await peer.ask(request(wrong_everything, b"", JSON, f"password: {token}"))).code == 40000


@pytest.mark.parametrize("size", [0, 1, 131_072])
async def test_payloads_from_none_to_128_kib_are_stored(house: House, size: int) -> None:
    """Any octets."""
    token = await house.token()
    payload = bytes(range(256)) * (size // 256) + b"\x00" * (size % 256)
    assert (await house.connect().ask(publish_request(token, payload))).code == 0
    assert (await house.engine.latest(Query(), 1))[0].payload == payload


async def test_message_ids_rise(house: House) -> None:
    """One after the other, never the same."""
    token = await house.token()
    peer = house.connect()
    ids = [(await peer.ask(publish_request(token))).json["info"]["messageId"] for _ in range(20)]
    assert ids == sorted(set(ids))


async def test_a_token_from_before_a_restart_stands(house: House) -> None:
    """The signing key is in the registry, not in the process."""
    token = await house.token()
    house.door.gateway = house.another_gateway()
    assert (await house.connect().ask(publish_request(token))).code == 0
