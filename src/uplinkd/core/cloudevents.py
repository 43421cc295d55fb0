"""Stored messages as CloudEvents 1.0, in the three content modes of its HTTP binding: github.com/cloudevents/spec.

The payload stays as the device sent it: embedded as it is where it is JSON that every parser takes, in base64 otherwise.
"""

from __future__ import annotations

import binascii
import datetime as dt
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

from uplinkd.core.groups import Form, kind_of
from uplinkd.core.model import Message

__all__ = ["Event", "event_of", "is_json", "request_of"]

_TYPE = "io.uplinkd."
_JSON, _BYTES = "application/json", "application/octet-stream"
_ONE = {"Content-Type": "application/cloudevents+json"}
_SEVERAL = {"Content-Type": "application/cloudevents-batch+json"}
# HTTP binding 3.1.3.2: a header has printable ASCII as it is, without space, quotation mark and percent sign.
_PLAIN = re.compile(r"[!#$&-~]*")
_ENCODED = re.compile(r"[^!#$&-~]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_quoted = json.encoder.encode_basestring_ascii


class Event(NamedTuple):
    """One event: `at` is when it was stored, ms; `data` is what the device sent."""

    id: str
    type: str
    subject: str
    product_key: str
    device_name: str
    at: int
    data: bytes


def event_of(message: Message) -> Event:
    return Event(
        str(message.id),
        _TYPE + kind_of(message),
        message.topic,
        message.product_key,
        message.device_name,
        message.generate_time,
        message.payload,
    )


def request_of(form: Form, events: Sequence[Event]) -> tuple[dict[str, str], bytes]:
    """Headers and body of the request that carries `events`: one, unless the form is BATCH."""
    if form is Form.BATCH:
        return dict(_SEVERAL), b"[%b]" % b",".join([_structured(event) for event in events])
    (event,) = events
    if form is Form.STRUCTURED:
        return dict(_ONE), _structured(event)
    return {
        "ce-specversion": "1.0",
        "ce-id": _encoded(event.id),
        "ce-source": _encoded(_source(event.product_key, event.device_name)),
        "ce-type": _encoded(event.type),
        "ce-subject": _encoded(event.subject),
        "ce-time": _time(event.at),
        "ce-productkey": _encoded(event.product_key),
        "ce-devicename": _encoded(event.device_name),
        "Content-Type": _JSON if is_json(event.data) else _BYTES,
    }, event.data


def is_json(payload: bytes) -> bool:
    """Whether it is JSON that every parser takes: UTF-8 without a mark before it, no NaN, no half of a surrogate pair."""
    try:
        value = _decode(payload.decode())
        if _SURROGATE.search(payload):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def _structured(event: Event) -> bytes:
    data = event.data
    if is_json(data):
        kind, name = _JSON, b"data"
    else:
        kind, name = _BYTES, b"data_base64"
        data = b'"%b"' % binascii.b2a_base64(data, newline=False)
    attributes = (
        f'{{"specversion":"1.0","id":{_quoted(event.id)},"source":{_quoted(_source(event.product_key, event.device_name))},'
        f'"type":{_quoted(event.type)},"subject":{_quoted(event.subject)},"time":"{_time(event.at)}",'
        f'"productkey":{_quoted(event.product_key)},"devicename":{_quoted(event.device_name)},"datacontenttype":"{kind}"'
    )
    return b'%b,"%b":%b}' % (attributes.encode(), name, data)


def _encoded(text: str) -> str:
    if _PLAIN.fullmatch(text):
        return text
    return _ENCODED.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode(errors="replace")), text)


@lru_cache(maxsize=4096)
def _source(product_key: str, device_name: str) -> str:
    return f"/{quote(product_key, safe='@:')}/{quote(device_name, safe='@:')}"


def _time(at: int) -> str:
    seconds, milliseconds = divmod(at, 1000)
    return f"{_second(seconds)}.{milliseconds:03d}Z"


@lru_cache(maxsize=256)
def _second(seconds: int) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _decoder() -> Any:
    return json.JSONDecoder(parse_constant=_no_constant)


_decode = _decoder().decode
