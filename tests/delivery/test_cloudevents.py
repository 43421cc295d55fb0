"""Messages as CloudEvents, and what they are signed with."""

from __future__ import annotations

import base64
import json
import time
from email.utils import formatdate
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from tests.delivery.receiver import message
from uplinkd.core import webhooks
from uplinkd.core.cloudevents import event_of, is_json, request_of
from uplinkd.core.errors import Rejected
from uplinkd.core.groups import Form
from uplinkd.core.model import DeviceName, Message, Origin, ProductKey
from uplinkd.core.names import make_webhook_secret
from uplinkd.core.webhooks import Verdict, id_of, key_of, one_line, retry_after, signed, verdict

LAMP = Message(
    1234567890123456789,
    "/a1XXXXXXXXX/lamp-0001/user/update",
    ProductKey("a1XXXXXXXXX"),
    DeviceName("lamp-0001"),
    1790000000012,
    b'{"on": true}',
)


def test_a_binary_event_has_its_attributes_in_headers() -> None:
    """And the payload as the device sent it for a body."""
    assert request_of(Form.BINARY, [event_of(LAMP)]) == (
        {
            "ce-specversion": "1.0",
            "ce-id": "1234567890123456789",
            "ce-source": "/a1XXXXXXXXX/lamp-0001",
            "ce-type": "io.uplinkd.uplink",
            "ce-subject": "/a1XXXXXXXXX/lamp-0001/user/update",
            "ce-time": "2026-09-21T14:13:20.012Z",
            "ce-productkey": "a1XXXXXXXXX",
            "ce-devicename": "lamp-0001",
            "Content-Type": "application/json",
        },
        b'{"on": true}',
    )


def test_a_structured_event_holds_its_json_as_it_is() -> None:
    """The payload keeps its spaces: it is not read and written anew."""
    headers, body = request_of(Form.STRUCTURED, [event_of(LAMP)])
    assert headers == {"Content-Type": "application/cloudevents+json"}
    assert body == (
        b'{"specversion":"1.0","id":"1234567890123456789","source":"/a1XXXXXXXXX/lamp-0001","type":"io.uplinkd.uplink",'
        b'"subject":"/a1XXXXXXXXX/lamp-0001/user/update","time":"2026-09-21T14:13:20.012Z","productkey":"a1XXXXXXXXX",'
        b'"devicename":"lamp-0001","datacontenttype":"application/json","data":{"on": true}}'
    )


def test_a_batch_is_an_array_of_structured_events() -> None:
    """In the order of the messages."""
    headers, body = request_of(Form.BATCH, [event_of(message(1)), event_of(message(2, payload=b"\xff"))])
    assert headers == {"Content-Type": "application/cloudevents-batch+json"}
    assert [(each["id"], each.get("data"), each.get("data_base64")) for each in json.loads(body)] == [
        ("1", {"n": 1}, None),
        ("2", None, "/w=="),
    ]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"on",
        b"\xff\xfe",
        b"NaN",
        b'{"t":Infinity}',
        b'{"t":-Infinity}',
        b'"\\ud800"',
        b'{"\\uDC00":1}',
        b'"\xed\xa0\x80"',
        b"\xef\xbb\xbf{}",
        b"{}{}",
        b"[" * 100_000,
        b"1" * 5000,
    ],
)
def test_what_not_every_parser_takes_goes_in_base64(payload: bytes) -> None:
    """A receiver that reads the event reads what the device sent, whatever that was."""
    assert not is_json(payload)
    event = json.loads(request_of(Form.STRUCTURED, [event_of(message(1, payload=payload))])[1])
    assert event["datacontenttype"] == "application/octet-stream"
    assert base64.b64decode(event["data_base64"]) == payload
    headers, body = request_of(Form.BINARY, [event_of(message(1, payload=payload))])
    assert (headers["Content-Type"], body) == ("application/octet-stream", payload)


def test_a_whole_surrogate_pair_is_json() -> None:
    """Devices that write ASCII write characters beyond it so."""
    assert is_json(b'"\\ud83d\\ude00"')


def test_headers_are_percent_encoded() -> None:
    """As the HTTP binding has it in 3.1.3.2, so that no topic makes a header of its own."""
    topic = '/a1X/d/ü "100%"\r\nx: y'
    odd = Message(1, topic, ProductKey("a1X"), DeviceName("d@x.y:z"), 0, b"", Origin.STATUS)
    headers, _ = request_of(Form.BINARY, [event_of(odd)])
    assert headers["ce-subject"] == "/a1X/d/%C3%BC%20%22100%25%22%0D%0Ax:%20y"
    assert headers["ce-source"] == "/a1X/d@x.y:z"
    assert headers["ce-type"] == "io.uplinkd.status"
    assert headers["ce-time"] == "1970-01-01T00:00:00.000Z"


@given(st.text(), st.binary())
def test_no_topic_and_no_payload_is_lost_on_the_way(topic: str, payload: bytes) -> None:
    """Any form gives back what was stored."""
    event = event_of(Message(7, topic.replace("\ud800", ""), ProductKey("a1X"), DeviceName("d"), 1, payload))
    headers, body = request_of(Form.BINARY, [event])
    assert unquote(headers["ce-subject"]) == event.subject
    assert all(value.isascii() and value.isprintable() for value in headers.values())
    assert body == payload
    parsed = json.loads(request_of(Form.STRUCTURED, [event])[1])
    assert parsed["subject"] == event.subject
    if "data" in parsed:
        assert json.dumps(parsed["data"]) == json.dumps(json.loads(payload))
    else:
        assert base64.b64decode(parsed["data_base64"]) == payload


@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), st.lists))
def test_json_stays_json(value: object) -> None:
    """What a device writes as JSON can be read as such by the receiver."""
    payload = json.dumps(value).encode()
    assert json.loads(request_of(Form.BATCH, [event_of(message(1, payload=payload))])[1])[0]["data"] == value


@given(st.text())
def test_what_is_signed_is_verified_by_standardwebhooks(text: str) -> None:
    """The library of PyPI that receivers use; a changed body is refused."""
    secret, body = make_webhook_secret(), json.dumps(text).encode()
    headers = signed(key_of(secret), "17", body, now=int(time.time()))
    assert Webhook(secret).verify(body, headers) == text
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(body + b" ", headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(make_webhook_secret()).verify(body, headers)


def test_the_signature_is_the_one_of_the_specification() -> None:
    """The example of Svix, from which Standard Webhooks comes: docs.svix.com/receiving/verifying-payloads/how-manual."""
    key = key_of("whsec_plJ3nmyCDGBKInavdOK15jsl")
    headers = signed(key, "msg_loFOjxBNrRLzqYUf", b'{"event_type":"ping","data":{"success":true}}', now=1731705121)
    assert headers["webhook-signature"] == "v1,rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0="


@pytest.mark.parametrize("secret", ["", "whsec_", "abc", "whsec_!", "whsec_abc"])
def test_a_secret_that_signs_nothing_is_refused(secret: str) -> None:
    """Rather than to send what nobody can verify."""
    with pytest.raises(Rejected, match="renew-secret"):
        key_of(secret)


def test_the_id_of_a_request_is_that_of_what_is_in_it() -> None:
    """A repetition has the same one, another selection another one."""
    assert id_of([12]) == "12"
    assert id_of([1, 2, 4]) == id_of([1, 2, 4])
    assert len({id_of([1, 2, 4]), id_of([1, 3, 4]), id_of([12, 4]), id_of([1, 2])}) == 4


def test_whose_fault_an_answer_is() -> None:
    """The table in docs/en/webhooks.md."""
    of_target = {401, 403, 404, 405, 407, 408, 410, 421, 425, 429}
    for status in range(600):
        if 200 <= status < 300:
            assert verdict(status) is Verdict.ACCEPTED
        elif 400 <= status < 500 and status not in of_target:
            assert verdict(status) is Verdict.MESSAGE
        else:
            assert verdict(status) is Verdict.TARGET


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        (" 30 ", 30),
        ("999999999999999999", 3600),
        (formatdate(1_000_060, usegmt=True), 60),
        (formatdate(999_000, usegmt=True), 0),
        (formatdate(9_000_000, usegmt=True), 3600),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("٣", None),
        ("", None),
        ("Mon, 01 Jan 2024 00:00:00 +99999999999999999999", None),
        ("Mon, 01 Jan 2024 00:00:99999999999999999999 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str, seconds: float | None) -> None:
    """Bounded; what is neither is passed over."""
    assert retry_after(text, now=1_000_000) == seconds


@given(st.text())
def test_any_retry_after_is_within_bounds(text: str) -> None:
    """Whatever a target writes there."""
    assert 0 <= (retry_after(text, now=0) or 0) <= webhooks.LONGEST_RETRY_AFTER


def test_an_answers_text_fits_into_a_sentence() -> None:
    """No line, no escape of a terminal, and an end."""
    assert one_line("no\r\n\x1b[31msuch\u2028 field\x00") == "no [31msuch field"
    assert len(one_line("x" * 1000)) == 201
