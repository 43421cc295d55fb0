"""How consumers sign in over AMQP, as bytes; no Proton is needed for it."""

from __future__ import annotations

import base64
import hmac
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uplinkd.core.apps import hash_secret
from uplinkd.core.errors import Refused
from uplinkd.core.groups import Group, Plan, Webhook
from uplinkd.core.model import App
from uplinkd.delivery.sasl import Handshake, Init, Login, Malformed, check, login_of, outcome

HEADER = b"AMQP\x03\x01\x00\x00"
MECHANISMS = b"\0\0\0\x18\x02\x01\0\0\0\x53\x40\xc0\x0b\x01\xe0\x08\x01\xa3\x05PLAIN"
USER = (
    b"client-1|iotInstanceId=iot-1,authMode=aksign,signMethod=hmacsha1,"
    b"consumerGroupId=invoices,authId=app-1,timestamp=1573489088171|"
)
CONTENT = "authId=app-1&timestamp=1573489088171"
APP = App(1, "app-1", "billing", hash_secret("secret"), True, 0, ())
GROUP = Group(7, "invoices", Plan(apps=("billing",)), 0, 1, 0)


def password(secret: str = "secret", method: str = "sha1", content: str = CONTENT) -> bytes:
    return base64.b64encode(hmac.digest(secret.encode(), content.encode(), method))


def frame(body: bytes) -> bytes:
    return (len(body) + 8).to_bytes(4, "big") + b"\x02\x01\0\0" + body


def init(response: bytes, mechanism: bytes = b"PLAIN") -> bytes:
    """A sasl-init as Proton makes it: mechanism, response, host name."""
    values = (
        b"\xa3%c%b" % (len(mechanism), mechanism)
        + b"\xb0"
        + len(response).to_bytes(4, "big")
        + response
        + b"\xa1\x04host"
    )
    return frame(b"\0\x53\x41\xd0" + (len(values) + 4).to_bytes(4, "big") + b"\0\0\0\x03" + values)


RESPONSE = b"\0" + USER + b"\0" + password()


@given(st.lists(st.integers(1, 400), max_size=6))
def test_a_sign_in_may_arrive_in_any_pieces(cuts: list[int]) -> None:
    """Wherever the bytes are split: the same answers, the same login, and nothing of what follows is lost."""
    sent = HEADER + init(RESPONSE) + b"AMQP\0\1\0\0 and more"
    handshake, answers = Handshake(), b""
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(sent)], strict=True):
        answers += handshake.feed(sent[start:end])
    assert answers == HEADER + MECHANISMS
    assert handshake.said == Init("PLAIN", RESPONSE)
    assert handshake.rest == b"AMQP\0\1\0\0 and more"


def test_the_outcome_is_one_frame() -> None:
    """A sasl-outcome with its code."""
    assert outcome(1) == b"\0\0\0\x10\x02\x01\0\0\0\x53\x44\xc0\x03\x01\x50\x01"


@pytest.mark.parametrize(
    ("descriptor", "head", "response"),
    [
        (b"\0\x53\x41", b"\xc0\x0d\x02", b"\xa0\x04resp"),
        (b"\0\x80" + bytes(7) + b"\x41", b"\xc0\x0d\x02", b"\xa0\x04resp"),
        (b"\0\xa3\x13amqp:sasl-init:list", b"\xd0\0\0\0\x11\0\0\0\x02", b"\xb0\0\0\0\x04resp"),
    ],
    ids=["small", "long", "by name"],
)
def test_a_sasl_init_is_read_in_each_of_its_forms(descriptor: bytes, head: bytes, response: bytes) -> None:
    """Clients encode descriptors, lists and binaries as they like."""
    handshake = Handshake()
    handshake.feed(HEADER + frame(descriptor + head + b"\xa3\x05PLAIN" + response))
    assert handshake.said == Init("PLAIN", b"resp")


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", r"begins with b'GET / HT'"),
        (b"\x16\x03\x01\x02", r"begins with b'\\x16"),
        (b"AMQP\x00\x00\x09\x01", r"AMQP without SASL \(00 00 09 01\)"),
        (b"AMQP\x00\x01\x00\x00", r"AMQP without SASL \(00 01 00 00\)"),
        (b"AMQP\x02\x01\x00\x00", r"TLS within AMQP"),
    ],
)
def test_another_protocol_is_named(sent: bytes, reason: str) -> None:
    """Whatever else a client speaks, it is said in the record, and the client is told what is spoken here."""
    with pytest.raises(Malformed, match=reason) as caught:
        Handshake().feed(sent)
    assert caught.value.foreign


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\0\0\x04\x02\x01\0\0",
        b"\xff\xff\xff\xff\x02\x01\0\0",
        b"\0\0\x10\x01\x02\x01\0\0",
        b"\0\0\0\x10\x01\x01\0\0",
        b"\0\0\0\x10\x02\x00\0\0",
        frame(b""),
        frame(b"\0\x53\x42\x45"),
        frame(b"\0\x53\x41"),
        frame(b"\0\x53\x41\x40"),
        frame(b"\0\x53\x41\xc0\x05"),
        frame(b"\0\x53\x41\xc0\x0d\x02\xa3\x05PLAIN\xa0\xffshort"),
        frame(b"\0\x53\x41\xc0\x0d\x02\xa3\x05PLAIN\xb0\0"),
        frame(b"\0\x53\x41\xc0\x0d\x02\x71\0\0\0\x05"),
        frame(b"\0\x53\x41\xc0\x05\x01\xa3\x02\xff\xfe"),
    ],
)
def test_a_malformed_sign_in_is_no_more_than_that(sent: bytes) -> None:
    """Frames that are too large or too short, of another type or with other things in them."""
    with pytest.raises(Malformed, match="malformed AMQP") as caught:
        Handshake().feed(HEADER + sent)
    assert not caught.value.foreign


@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail_otherwise(data: bytes) -> None:
    """Malformed, or it waits for more."""
    for start in (b"", HEADER, HEADER + (len(data) + 11).to_bytes(4, "big") + b"\x02\x01\0\0\0\x53\x41"):
        handshake = Handshake()
        try:
            handshake.feed(start + data)
        except Malformed:
            continue
        if handshake.said:
            try:
                login_of(handshake.said)
            except Refused:
                continue


def said(user: bytes = USER, sign: bytes | None = None, mechanism: str = "PLAIN") -> Login:
    return login_of(Init(mechanism, b"\0" + user + b"\0" + (sign or password())))


def test_parameters_come_in_any_order() -> None:
    """And unknown ones are passed over; the platform's own samples differ in both, and one writes Hmacsha1."""
    login = said(
        b"a:b-0|authMode=aksign,signMethod=Hmacsha1,timestamp=5,x=1,authId=app-1,iotInstanceId=,consumerGroupId=g|"
    )
    assert login == Login(client="a:b-0", auth_id="app-1", group="g", method="hmacsha1", timestamp="5", sign=password())
    assert said(USER.rstrip(b"|")).group == "invoices"


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        (b"billing", r"'billing': it is such as clientId\|authMode"),
        (b"c|authMode=aksign,signMethod=hmacsha1|", "no timestamp and no authId and no consumerGroupId"),
        (USER.replace(b"aksign", b"stsToken"), "authMode='stsToken' is not known here: it is aksign"),
        (USER.replace(b"hmacsha1", b"sha1"), "signMethod='sha1' is not one of hmacmd5, hmacsha1, hmacsha256"),
    ],
)
def test_a_user_name_that_is_none_is_explained(user: bytes, reason: str) -> None:
    """The value and the rule."""
    with pytest.raises(Refused, match=reason):
        said(user)


def test_only_plain_is_offered() -> None:
    """Another mechanism, and a response that is not PLAIN's, are refused."""
    with pytest.raises(Refused, match="'ANONYMOUS' is not offered: PLAIN is"):
        said(mechanism="ANONYMOUS")
    with pytest.raises(Refused, match="not: NUL, user name, NUL, password"):
        login_of(Init("PLAIN", b"billing"))


@pytest.mark.parametrize(("method", "digest"), [("hmacmd5", "md5"), ("hmacsha1", "sha1"), ("hmacsha256", "sha256")])
def test_each_method_of_the_platform_is_checked(method: str, digest: str) -> None:
    """The right secret passes, another one does not; the reason has what was signed, and neither secret nor sign."""
    user = USER.replace(b"hmacsha1", method.encode())
    assert check(said(user, password(method=digest)), APP, "secret", GROUP) == (APP, GROUP)
    wrong = password("other", digest)
    with pytest.raises(
        Refused, match=f"not the {method} in Base64 of 'authId=app-1&timestamp=1573489088171'"
    ) as caught:
        check(said(user, wrong), APP, "secret", GROUP)
    assert wrong.decode() not in caught.value.reason
    assert "'secret'" not in caught.value.reason


def test_what_signs_and_logins_hold_is_not_shown() -> None:
    """Neither a repr nor a traceback gives a password away."""
    assert password().decode() not in repr(said())
    assert password().decode() not in repr(Init("PLAIN", RESPONSE))


@pytest.mark.parametrize(
    ("app", "secret", "group", "reason"),
    [
        (None, None, GROUP, "no application with the key 'app-1'; `uplinkd app list`"),
        (APP, "", GROUP, "`uplinkd app renew-secret billing`"),
        (APP, "secret", None, "no consumer group 'invoices'; `uplinkd group list`"),
        (replace(APP, name="other"), "secret", GROUP, "`uplinkd group change invoices --app other` lets it"),
        (APP, "secret", replace(GROUP, plan=Plan(webhook=Webhook(url="https://x.example"))), "go to its webhook"),
    ],
)
def test_who_may_not_consume_is_told_apart(
    app: App | None, secret: str | None, group: Group | None, reason: str
) -> None:
    """For the operator, who finds in the reason what to do."""
    with pytest.raises(Refused, match=reason):
        check(said(), app, secret, group)


def test_a_group_tells_nothing_to_who_has_not_shown_who_it_is() -> None:
    """The sign is looked at first."""
    with pytest.raises(Refused, match="the password of"):
        check(said(sign=password("other")), APP, "secret", None)


def test_without_proton_one_line_says_what_to_do() -> None:
    """The door is asked for and its package is missing; nothing else of uplinkd needs it."""
    program = """
import sys
sys.modules["proton"] = None
from uplinkd.core.errors import Rejected
from uplinkd.delivery.amqp import check_available
from uplinkd.settings import Settings
check_available(Settings())
try:
    check_available(Settings(amqp_listen="127.0.0.1:5671"))
except Rejected as fault:
    print(fault)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == (
        "amqp_listen = 127.0.0.1:5671 needs python-qpid-proton, which is not installed: run `make amqp`, or "
        "`pip install 'uplinkd[amqp]'`; it is compiled for half a minute, with gcc and Python's headers\n"
    )
    assert not done.stderr
