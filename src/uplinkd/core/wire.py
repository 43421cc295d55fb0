"""What is on the wire: the login a device submits, as JSON over HTTPS or in MQTT's CONNECT, and the bodies it is answered with.

Rules marked † are ours where the platform's pages are silent; docs/en/protocol.md says them too.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from uplinkd.core import signature
from uplinkd.core.errors import MESSAGES, Code, Refused

__all__ = [
    "MAX_HOME_BYTES",
    "MAX_LOGIN_BYTES",
    "Login",
    "fits_home",
    "login",
    "media_type_is",
    "mqtt_login",
    "published",
    "published_with",
    "refusal",
    "token_issued",
]

MAX_LOGIN_BYTES = 4096
MAX_CLIENT_ID = 64
MAX_HOME_BYTES = 512
"""A message that rides home in the answer to a publish has at most so many bytes, as JSON text: the old SDKs read the whole
answer into a buffer of about 1 KiB, head included."""

# The last edition of the platform's page "MQTT" has the parameters between two bars; their order is free.
_MQTT_CLIENT_ID = re.compile(r"([^|]+)\|([^|]*)\|?")
_REQUIRED = ("productKey", "deviceName", "clientId", "sign")
_TIMESTAMP_DIGITS = 15


@dataclass(slots=True)
class Login:
    """A well-formed login. `content` is what the server signs; `timestamp` is ms since 1970, None when it is not held against
    the clock. `auto_subscribe`: over MQTT, the device expects its system topics without a SUBSCRIBE."""

    product_key: str
    device_name: str
    client_id: str
    sign: str = field(repr=False)
    method: str
    timestamp: int | None
    content: str
    auto_subscribe: bool = False


class _Number(str):
    """A JSON number kept as the text that was submitted, since that text is what the device signed."""

    __slots__ = ()


def media_type_is(content_type: str | None, wanted: str) -> bool:
    """Whether a Content-Type header names `wanted`, parameters aside. A header that is missing does not contradict †."""
    if content_type is None or content_type == wanted:
        return True
    return content_type.partition(";")[0].strip().lower() == wanted


def login(body: bytes) -> Login:
    """The login in the body of POST /auth; raise Refused 10001 naming the member and the rule."""
    if len(body) > MAX_LOGIN_BYTES:
        raise Refused(Code.PARAM_ERROR, f"the body has {len(body)} bytes; at most {MAX_LOGIN_BYTES} are allowed")
    if not body:
        raise Refused(Code.PARAM_ERROR, "the body is empty; it must be a JSON object")
    members = _members(body)
    try:
        return _checked(members)
    except Refused as refused:
        refused.product_key = members.get("productKey", "")[:64]
        refused.device_name = members.get("deviceName", "")[:64]
        raise


def mqtt_login(client_id: str, username: str, password: bytes) -> Login:
    """The login in a CONNECT; raise Refused 10001 naming what is wrong.

    The clientId is `${clientId}|securemode=2,signmethod=hmacsha1,timestamp=789|`, the user name
    `${deviceName}&${productKey}`, the password the sign. The timestamp is signed, but not held against the clock: Link SDKs
    send 2524608000000.
    """
    device_name, _, product_key = username.rpartition("&")
    try:
        return _checked_mqtt(client_id, device_name, product_key, username, password)
    except Refused as refused:
        refused.product_key, refused.device_name = product_key[:64], device_name[:64]
        raise


def token_issued(token: str) -> bytes:
    return b'{"code":0,"message":"success","info":{"token":"%b"}}' % token.encode()


def published(message_id: int) -> bytes:
    return b'{"code":0,"message":"success","info":{"messageId":%d}}' % message_id


def published_with(message_id: int, topic: str, payload: bytes) -> bytes:
    """The same, with a message for the device, which `fits_home`."""
    home = b'"topic":%b,"data":%b' % (_json_text(topic), _json_text(payload.decode()))
    return b'{"code":0,"message":"success","info":{"messageId":%d,%b}}' % (message_id, home)


def fits_home(payload: bytes) -> str:
    """Why a message cannot ride home in the answer to a publish, empty if it can."""
    try:
        size = len(_json_text(payload.decode())) - 2
    except UnicodeDecodeError as error:
        return f"its byte {error.start} is not UTF-8, which an answer in JSON must be"
    if size > MAX_HOME_BYTES:
        return f"it has {size} bytes as JSON text; at most {MAX_HOME_BYTES} fit into the answer to an HTTPS report"
    return ""


def _json_text(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode()


def refusal(code: Code, request_id: str) -> bytes:
    """An error's body; without a `request_id` it has no info."""
    info = b',"info":{"requestId":"%b"}' % request_id.encode() if request_id else b""
    return b'{"code":%d,"message":"%b"%b}' % (code, MESSAGES[code].encode(), info)


def _members(body: bytes) -> dict[str, str]:
    """Name → value as submitted text; a string where the JSON has one, a _Number for a number, true and false in words."""
    try:
        text = body.decode()
        pairs, end = _decoder.raw_decode(text) if text[:1] == "{" else (None, -1)
        if end != len(text):
            pairs = _decoder.decode(text)
    except UnicodeDecodeError as error:
        raise Refused(Code.PARAM_ERROR, f"the body is not UTF-8: byte {error.start} is wrong") from error
    except json.JSONDecodeError as error:
        raise Refused(Code.PARAM_ERROR, f"the body is not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise Refused(Code.PARAM_ERROR, "the body is not a login: it is nested too deeply") from error
    if not isinstance(pairs, _Pairs):
        raise Refused(Code.PARAM_ERROR, f"the body is a JSON {_kind(pairs)}; it must be an object")
    members: dict[str, str] = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise Refused(Code.PARAM_ERROR, f"the member {twice!r} is there twice")  # † which one was signed?
    for name, value in members.items():
        if not isinstance(value, str):
            members[name] = _in_words(name, value)
    return members


def _in_words(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # † no text of null, an array or an object is certain to be what was signed
    raise Refused(Code.PARAM_ERROR, f"the member {name!r} is a JSON {_kind(value)}; it must be text or a number")


def _checked(members: dict[str, str]) -> Login:
    for name in _REQUIRED:
        value = members.get(name)
        if not value or isinstance(value, _Number):
            if value is None:
                raise Refused(Code.PARAM_ERROR, f"the member {name!r} is missing")
            what = "a number" if value else "empty"
            raise Refused(Code.PARAM_ERROR, f"the member {name!r} is {what}; it must be a string that is not empty")
    if len(members["clientId"]) > MAX_CLIENT_ID:
        raise Refused(
            Code.PARAM_ERROR, f"clientId has {len(members['clientId'])} characters; at most {MAX_CLIENT_ID} are allowed"
        )
    method = members.get("signmethod", signature.DEFAULT_METHOD).lower()
    if method not in signature.METHODS:
        known = ", ".join(signature.METHODS)
        raise Refused(Code.PARAM_ERROR, f"signmethod {members['signmethod']!r} is not known; it is one of {known}")
    timestamp = members.get("timestamp")
    if timestamp is not None and not (
        len(timestamp) <= _TIMESTAMP_DIGITS and timestamp.isascii() and timestamp.isdigit()
    ):
        raise Refused(Code.PARAM_ERROR, f"timestamp {timestamp!r} is not a whole number of milliseconds since 1970")
    content = signature.content_of(members)
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            Code.PARAM_ERROR, "a member holds half of a UTF-16 surrogate pair, which is no character"
        ) from error
    return Login(
        product_key=members["productKey"],
        device_name=members["deviceName"],
        client_id=members["clientId"],
        sign=members["sign"],
        method=method,
        timestamp=None if timestamp is None else int(timestamp),
        content=content,
    )


def _checked_mqtt(client_id: str, device_name: str, product_key: str, username: str, password: bytes) -> Login:
    if not device_name or not product_key:
        raise Refused(Code.PARAM_ERROR, f"the user name is {username[:200]!r}; it must be deviceName&productKey")
    found = _MQTT_CLIENT_ID.fullmatch(client_id)
    if not found:
        raise Refused(
            Code.PARAM_ERROR, f"the clientId is {client_id[:200]!r}; it must be ID|securemode=…,signmethod=…|"
        )
    if len(found[1]) > MAX_CLIENT_ID:
        raise Refused(Code.PARAM_ERROR, f"clientId has {len(found[1])} characters; at most {MAX_CLIENT_ID} are allowed")
    parameters = dict(part.partition("=")[::2] for part in found[2].split(",") if part)
    method = parameters.get("signmethod", signature.DEFAULT_METHOD).lower()
    if method not in signature.METHODS:
        known = ", ".join(signature.METHODS)
        raise Refused(Code.PARAM_ERROR, f"signmethod {method[:40]!r} is not known; it is one of {known}")
    if kind := parameters.get("authType"):
        raise Refused(
            Code.PARAM_ERROR, f"authType is {kind[:40]!r}: only devices with a secret of their own are let in"
        )
    members = {"clientId": found[1], "deviceName": device_name, "productKey": product_key}
    if "timestamp" in parameters:
        members["timestamp"] = parameters["timestamp"]
    return Login(
        product_key=product_key,
        device_name=device_name,
        client_id=found[1],
        sign=password.decode(errors="replace"),
        method=method,
        timestamp=None,
        content=signature.content_of(members),
        auto_subscribe=parameters.get("_ss") == "1",
    )


class _Pairs(list[tuple[str, Any]]):
    """An object's members in order, repeated names included."""


def _no_constant(name: str) -> NoReturn:
    raise json.JSONDecodeError(f"{name} is not JSON", name, 0)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, _Pairs):
        return "object"
    if isinstance(value, list):
        return "array"
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, _Number) else "string"


_decoder = json.JSONDecoder(
    object_pairs_hook=_Pairs, parse_int=_Number, parse_float=_Number, parse_constant=_no_constant
)
