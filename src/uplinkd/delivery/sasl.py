"""How a consumer signs in over AMQP: the SASL layer of AMQP 1.0 with PLAIN, and what the platform puts into user name and password.

Pure: bytes in, bytes out, and a login that is checked against what the registry knows. Proton is not used for it: its server
asks the system's accounts.
Source: the platform's page "Connect an AMQP client to IoT Platform"; OASIS AMQP 1.0, part 5.
"""

from __future__ import annotations

import base64
import hmac
import struct
from dataclasses import dataclass, field

from uplinkd.core.errors import Code, Refused
from uplinkd.core.groups import Group
from uplinkd.core.model import App
from uplinkd.core.signature import METHODS

__all__ = [
    "AMQP_HEADER",
    "AUTH_FAILED",
    "OK",
    "SASL_HEADER",
    "UNAVAILABLE",
    "Handshake",
    "Init",
    "Login",
    "Malformed",
    "check",
    "login_of",
    "outcome",
]

SASL_HEADER = b"AMQP\x03\x01\x00\x00"
AMQP_HEADER = b"AMQP\x00\x01\x00\x00"

# Outcomes: right, wrong, and cannot be told now.
OK, AUTH_FAILED, UNAVAILABLE = 0, 1, 4

_HEAD = struct.Struct(">IBBH")  # a frame's size, offset of its body in words, type, channel
_SASL_FRAME = 1
_LONGEST_FRAME = 4096
_LONGEST_SHOWN = 100
# What a sasl-init begins with: its descriptor as a small number, as a number, by name.
_INIT = (b"\x00\x53\x41", b"\x00\x80\0\0\0\0\0\0\0\x41", b"\x00\xa3\x13amqp:sasl-init:list")
_NULL = 0x40
_SHORT, _LONG = (0xA0, 0xA1, 0xA3), (0xB0, 0xB1, 0xB3)  # binary, string, symbol


class Malformed(Exception):  # noqa: N818 - says what the bytes are
    """What came is no sign-in by SASL over AMQP 1.0. `foreign`: it is another protocol."""

    def __init__(self, reason: str, *, foreign: bool = False) -> None:
        super().__init__(reason)
        self.foreign = foreign


@dataclass(frozen=True, slots=True)
class Init:
    """A client's sasl-init: the mechanism that it has chosen, and what this says."""

    mechanism: str
    response: bytes = field(repr=False)


@dataclass(slots=True)
class Handshake:
    """The bytes of one connection until its client has said who it is: then `said` is that, and `rest` what came after."""

    said: Init | None = None
    rest: bytes = field(default=b"", repr=False)
    _greeted: bool = False

    def feed(self, data: bytes) -> bytes:
        """What to answer to these bytes; raise Malformed."""
        self.rest += data
        answer = b""
        if not self._greeted:
            start = self.rest[: len(SASL_HEADER)]
            if not SASL_HEADER.startswith(start):
                raise Malformed(_described(start), foreign=True)
            if len(start) < len(SASL_HEADER):
                return b""
            self._greeted = True
            self.rest = self.rest[len(SASL_HEADER) :]
            answer = SASL_HEADER + _MECHANISMS
        if self.said is None and len(self.rest) >= _HEAD.size:
            size, offset, kind, _ = _HEAD.unpack_from(self.rest)
            if kind != _SASL_FRAME or offset < 2 or not offset * 4 <= size <= _LONGEST_FRAME:
                raise Malformed(
                    f"malformed AMQP: the first frame is not one of SASL with at most {_LONGEST_FRAME:,} bytes"
                )
            if len(self.rest) >= size:
                self.said = _init(self.rest[offset * 4 : size])
                self.rest = self.rest[size:]
        return answer


def outcome(code: int) -> bytes:
    """The frame that ends a sign-in."""
    return _frame(b"\x00\x53\x44\xc0\x03\x01\x50" + bytes([code]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """What a consumer says: `client` is what it calls itself, `auth_id` an application's key, `group` a consumerGroupId."""

    client: str
    auth_id: str
    group: str
    method: str
    timestamp: str
    sign: bytes = field(repr=False)

    @property
    def content(self) -> str:
        """What is signed."""
        return f"authId={self.auth_id}&timestamp={self.timestamp}"


def login_of(init: Init) -> Login:
    """Read `clientId|authMode=aksign,signMethod=…,timestamp=…,authId=…,consumerGroupId=…|`; raise Refused.

    Parameters come in any order, and further ones (iotInstanceId) are passed over. The platform's sample in Go writes Hmacsha1:
    letter case of the method does not matter.
    """
    if init.mechanism != "PLAIN":
        raise _refused(f"the SASL mechanism {_shown(init.mechanism)} is not offered: PLAIN is")
    parts = init.response.split(b"\0")
    if len(parts) != 3:
        raise _refused("the response to SASL PLAIN is not: NUL, user name, NUL, password")
    client, bar, listed = parts[1].decode(errors="replace").partition("|")
    if not bar:
        raise _refused(f"user name {_shown(client)}: it is such as clientId|authMode=aksign,signMethod=hmacsha1,…|")
    given = dict(_pair(each) for each in listed.rstrip("|").split(","))
    missing = [
        name for name in ("authMode", "signMethod", "timestamp", "authId", "consumerGroupId") if not given.get(name)
    ]
    if missing:
        raise _refused(f"the user name has no {' and no '.join(missing)}: it is such as clientId|authMode=aksign,…|")
    if given["authMode"] != "aksign":
        raise _refused(f"authMode={_shown(given['authMode'])} is not known here: it is aksign")
    method = given["signMethod"].lower()
    if method not in METHODS:
        raise _refused(f"signMethod={_shown(given['signMethod'])} is not one of {', '.join(METHODS)}")
    return Login(
        client=client[:_LONGEST_SHOWN],
        auth_id=given["authId"],
        group=given["consumerGroupId"],
        method=method,
        timestamp=given["timestamp"],
        sign=parts[2],
    )


def check(login: Login, app: App | None, secret: str | None, group: Group | None) -> tuple[App, Group]:
    """Whose consumer it is, and of which group; raise Refused unless it may consume. A sign does not become stale: consumers keep
    one user name for all their connections. That a group is paused is no reason here: it may go on tomorrow."""
    if app is None or secret is None:
        raise _refused(
            f"there is no application with the key {_shown(login.auth_id)}; `uplinkd app list` shows the keys"
        )
    if not secret:
        raise _refused(
            f"the secret of the application {app.name!r} is from before AMQP and not kept: give it a new one with "
            f"`uplinkd app renew-secret {app.name}`"
        )
    right = hmac.digest(secret.encode(), login.content.encode(errors="replace"), METHODS[login.method])
    if not hmac.compare_digest(base64.b64encode(right), login.sign):
        raise _refused(
            f"the password of {_shown(login.client)} is not the {login.method} in Base64 of {_shown(login.content)} with the "
            f"secret of the application {app.name!r}"
        )
    if group is None:
        raise _refused(f"there is no consumer group {_shown(login.group)}; `uplinkd group list` shows them")
    if group.plan.webhook:
        raise _refused(f"the messages of the consumer group {group.name!r} go to its webhook, and not to applications")
    if app.name not in group.plan.apps:
        raise _refused(
            f"the application {app.name!r} may not consume the group {group.name!r}: "
            f"`uplinkd group change {group.name} --app {app.name}` lets it"
        )
    return app, group


def _refused(reason: str) -> Refused:
    return Refused(Code.AUTH_CHECK_ERROR, reason)


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name.strip(), value.strip()


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")


def _described(start: bytes) -> str:
    if start.startswith(b"AMQP") and len(start) == len(SASL_HEADER):
        what = {0: "AMQP without SASL", 2: "TLS within AMQP"}.get(start[4], "another version of AMQP")
        return f"a client began with {what} ({start[4:].hex(' ')}): what is spoken is AMQP 1.0 with SASL"
    return f"what came is not AMQP 1.0 with SASL: it begins with {start!r}"


def _frame(body: bytes) -> bytes:
    return _HEAD.pack(_HEAD.size + len(body), 2, _SASL_FRAME, 0) + body


_MECHANISMS = _frame(b"\x00\x53\x40\xc0\x0b\x01\xe0\x08\x01\xa3\x05PLAIN")


def _init(body: bytes) -> Init:
    """Of a sasl-init: a described list of mechanism, initial response and host name."""
    start = next((each for each in _INIT if body.startswith(each)), None)
    if start is None:
        raise Malformed("malformed AMQP: the first frame is not a sasl-init")
    try:
        at, count = _list(body, len(start))
        fields: list[bytes] = []
        for _ in range(min(count, 2)):
            value, at = _value(body, at)
            fields.append(value)
        mechanism, response = [*fields, b"", b""][:2]
        return Init(mechanism.decode("ascii"), response)
    except (IndexError, UnicodeDecodeError, struct.error) as error:
        raise Malformed("malformed AMQP: a sasl-init that cannot be read") from error


def _list(body: bytes, at: int) -> tuple[int, int]:
    """Where the values of the list at `at` begin, and how many they are."""
    match body[at]:
        case 0x45:
            return at + 1, 0
        case 0xC0:
            return at + 3, body[at + 2]
        case 0xD0:
            return at + 9, struct.unpack_from(">I", body, at + 5)[0]
    raise Malformed("malformed AMQP: a sasl-init without a list")


def _value(body: bytes, at: int) -> tuple[bytes, int]:
    """The null, symbol, string or binary at `at`, and where the next value begins."""
    kind = body[at]
    if kind == _NULL:
        return b"", at + 1
    if kind in _SHORT:
        start, size = at + 2, body[at + 1]
    elif kind in _LONG:
        start, size = at + 5, struct.unpack_from(">I", body, at + 1)[0]
    else:
        raise Malformed(f"malformed AMQP: a sasl-init with a value of the type {kind:#04x}")
    if start + size > len(body):
        raise Malformed("malformed AMQP: a sasl-init that ends too early")
    return body[start : start + size], start + size
