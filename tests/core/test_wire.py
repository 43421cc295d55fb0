"""The login that a device submits and the bodies that it is answered with."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uplinkd.core import wire
from uplinkd.core.errors import MESSAGES, Code, Refused

GOOD = {"productKey": "pk", "deviceName": "device", "clientId": "12345", "sign": "AB12"}


def body(**changes: object) -> bytes:
    members: dict[str, object] = {**GOOD, **changes}
    return json.dumps({name: value for name, value in members.items() if value is not ...}).encode()


def test_the_seeds_example_gives_the_seeds_content() -> None:
    """The content is what the platform's page says for its own example."""
    login = wire.login(body(timestamp="789", signmethod="hmacsha1", version="default"))
    assert login.content == "clientId12345deviceNamedeviceproductKeypktimestamp789"
    assert (login.method, login.timestamp) == ("hmacsha1", 789)


def test_a_number_is_signed_as_the_text_that_was_submitted() -> None:
    """Neither 1.50 nor a large integer is rewritten on its way into the content."""
    raw = b'{"productKey":"p","deviceName":"d","clientId":"c","sign":"x","timestamp":1501668289957,"w":1.50,"z":1e3}'
    assert wire.login(raw).content == "clientIdcdeviceNamedproductKeyptimestamp1501668289957w1.50z1e3"


def test_unknown_members_are_signed_like_the_rest() -> None:
    """A member that the platform does not know takes part in the content, true and false in words."""
    login = wire.login(body(alpha="1", zeta=True))
    assert login.content == "alpha1clientId12345deviceNamedeviceproductKeypkzetatrue"


def test_without_signmethod_it_is_hmacmd5_and_without_timestamp_there_is_none() -> None:
    """The defaults are the platform's."""
    login = wire.login(body())
    assert (login.method, login.timestamp) == ("hmacmd5", None)


@pytest.mark.parametrize("method", ["HMACSHA1", "HmacSha256", "hmacmd5"])
def test_the_methods_letter_case_does_not_matter(method: str) -> None:
    """Any letter case names the same method."""
    assert wire.login(body(signmethod=method)).method == method.lower()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"[]", "array"),
        (b"null", "null"),
        (b'"text"', "string"),
        (b"\xff{}", "not UTF-8"),
        (b"[" * 4000, "nested"),
        (b'{"productKey":"a","productKey":"b"}', "twice"),
        (b'{"a":NaN}', "not JSON"),
        (body(extra=None), "'extra' is a JSON null"),
        (body(extra=[1]), "'extra' is a JSON array"),
        (body(extra={"a": 1}), "'extra' is a JSON object"),
        (body(productKey=...), "'productKey' is missing"),
        (body(deviceName=""), "'deviceName' is empty"),
        (body(sign=7), "'sign' is a number"),
        (body(clientId=...), "'clientId' is missing"),
        (body(clientId="c" * 65), "65 characters"),
        (body(signmethod="hmacsha512"), "hmacsha512"),
        (body(timestamp="yesterday"), "yesterday"),
        (body(timestamp=1.5), "1.5"),
        (body(timestamp=""), "timestamp"),
        (body(clientId="\ud800"), "surrogate"),
        (body(padding="x" * 4096), "4096"),
    ],
)
def test_a_malformed_login_is_10001_with_the_rule(raw: bytes, words: str) -> None:
    """The device gets 10001; the operator reads which member or rule it was."""
    with pytest.raises(Refused) as caught:
        wire.login(raw)
    assert caught.value.code is Code.PARAM_ERROR
    assert words in caught.value.reason


def test_a_client_id_of_64_characters_is_the_longest() -> None:
    """64 pass, whatever their bytes."""
    assert wire.login(body(clientId="灯" * 64)).client_id == "灯" * 64


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_refused(raw: bytes) -> None:
    """Whatever a device sends, the answer is a code."""
    try:
        wire.login(raw)
    except Refused as refused:
        assert refused.code is Code.PARAM_ERROR


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_no_json_raises_anything_but_refused(document: object) -> None:
    """Nor does any JSON."""
    with pytest.raises(Refused):
        wire.login(json.dumps(document).encode())


def test_replies_are_what_old_sdks_can_read() -> None:
    """At least 31 bytes (v3 stalls on less), at most 255 for /auth (v3 cuts there), spelt as the platform does."""
    for code in set(Code) - {Code.SUCCESS}:
        for request_id in ("", "0123456789abcdef"):
            reply = wire.refusal(code, request_id)
            assert 31 <= len(reply) <= 255
            assert json.loads(reply)["message"] == MESSAGES[code]
            assert json.loads(reply)["code"] == code
    assert json.loads(wire.refusal(Code.AUTH_CHECK_ERROR, "ab"))["info"] == {"requestId": "ab"}
    assert wire.refusal(Code.PARAM_ERROR, "") == b'{"code":10001,"message":"param error"}'
    assert (
        wire.published(892687627916247040) == b'{"code":0,"message":"success","info":{"messageId":892687627916247040}}'
    )
    assert 31 <= len(wire.token_issued("t" * 192)) <= 255


@pytest.mark.parametrize(
    ("header", "same"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        (" application/json ", True),
        (None, True),
        ("text/plain", False),
        ("application/jsonp", False),
        ("", False),
    ],
)
def test_a_content_type_is_compared_without_its_parameters(header: str | None, same: bool) -> None:
    """Parameters and letter case do not matter; a missing header does not contradict."""
    assert wire.media_type_is(header, "application/json") is same
