"""Tokens: opaque to devices, verified without a store, dead as soon as their device's generation moves on.

A token is 52 characters of URL-safe base64, which JSON never escapes: version (1 byte), signing key id (2), device id (8),
generation (4), expiry in ms since 1970 (8), and the first 16 bytes of the HMAC-SHA256 over these.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hmac
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from uplinkd.core import mac
from uplinkd.core.errors import Code, Refused
from uplinkd.core.model import Device, SigningKey

__all__ = ["Token", "check", "holds", "is_ahead", "issue", "read", "signing_key"]

_FIELDS = struct.Struct(">BHQIQ")
_VERSION = 1
_MAC_BYTES = 16
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_LENGTH = (_FIELDS.size + _MAC_BYTES) * 4 // 3


@dataclass(frozen=True, slots=True)
class Token:
    """What a token says: whose it is, until when (ms), under which key and generation."""

    key_id: int
    device_id: int
    generation: int
    expires: int


def signing_key(keys: Iterable[SigningKey], *, now: int) -> SigningKey:
    """The key that signs at `now` (ms): the newest that has begun."""
    standing = [key for key in keys if key.retired is None or now < key.retired]
    begun = [key for key in standing if key.begins <= now] or standing
    return max(begun, key=lambda key: key.id)


def issue(key: SigningKey, device: Device, *, expires: int) -> str:
    """A token for `device` that holds until `expires` (ms)."""
    fields = _FIELDS.pack(_VERSION, key.id, device.id, device.generation, expires)
    return binascii.b2a_base64(fields + _mac(key, fields), newline=False).translate(_URL_SAFE).decode()


def read(text: str, keys: Mapping[int, SigningKey]) -> Token:
    """What `text` says, if one of `keys` signed it; raise Refused 20003 otherwise."""
    if len(text) != _LENGTH:
        raise _foreign(f"it has {len(text)} characters where ours have {_LENGTH}; was it cut short?")
    try:
        raw = base64.b64decode(text, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _foreign("it has characters that ours never have") from None
    fields = raw[: _FIELDS.size]
    version, key_id, device_id, generation, expires = _FIELDS.unpack(fields)
    key = keys.get(key_id)
    if version != _VERSION or key is None:
        raise _foreign("no signing key of this installation made it")
    if not hmac.compare_digest(_mac(key, fields), raw[_FIELDS.size :]):
        raise _foreign("its signature is not ours: altered on the way, or issued by another installation")
    return Token(key_id, device_id, generation, expires)


def is_ahead(token: Token, device: Device) -> bool:
    """Whether `token` was issued after a change that `device`, as held in a cache, does not show yet."""
    if token.generation == device.generation:
        return not device.enabled  # only after it was enabled again
    return token.generation > device.generation


def holds(token: Token, device: Device, keys: Mapping[int, SigningKey], *, now: int) -> bool:
    """Whether `token` holds for `device` at `now` (ms), and its key is not to be rotated out: the usual case, in one look."""
    return (
        token.generation == device.generation
        and device.enabled
        and now < token.expires
        and keys[token.key_id].retired is None
    )


def check(token: Token, device: Device | None, keys: Mapping[int, SigningKey], *, now: int) -> None:
    """Return quietly if `token` still holds for `device` at `now` (ms); raise Refused 20001 otherwise."""
    if device is None:
        raise Refused(Code.TOKEN_IS_EXPIRED, "the device of this token has been deleted")
    reason = ""
    if not device.enabled:
        reason = "the device is disabled"
    elif token.generation != device.generation:
        reason = "the device was disabled or its secret was changed after this token was issued"
    elif now >= token.expires:
        reason = f"the token expired {(now - token.expires) / 1000:.0f} s ago"
    elif (retired := keys[token.key_id].retired) is not None and now >= retired:
        reason = "the signing key of this token has been rotated out"
    if reason:
        raise Refused(Code.TOKEN_IS_EXPIRED, reason, product_key=device.product_key, device_name=device.name)


def _mac(key: SigningKey, fields: bytes) -> bytes:
    return _prepared(key.key).digest(fields)[:_MAC_BYTES]


@functools.lru_cache(16)
def _prepared(key: bytes) -> mac.Key:
    return mac.Key(key)


def _foreign(detail: str) -> Refused:
    return Refused(Code.CHECK_TOKEN_ERROR, f"the token is not one of ours: {detail}")
