"""HMAC (RFC 2104) as two hashes. For each `hmac.digest` OpenSSL 3 looks its methods up anew, which takes longer than the hashes of a
login do; tests/core/test_mac.py holds the results against it."""

from __future__ import annotations

import hashlib

__all__ = ["Key", "digest"]

_HASHES = {"md5": hashlib.md5, "sha1": hashlib.sha1, "sha256": hashlib.sha256}
_BLOCK = 64  # bytes, of all three
_INNER = bytes(byte ^ 0x36 for byte in range(256))
_OUTER = bytes(byte ^ 0x5C for byte in range(256))


def digest(key: bytes, message: bytes, name: str) -> bytes:
    """The HMAC of `message`; `name` is md5, sha1 or sha256."""
    hashed = _HASHES[name]
    if len(key) > _BLOCK:
        key = hashed(key).digest()
    key = key.ljust(_BLOCK, b"\0")
    return hashed(key.translate(_OUTER) + hashed(key.translate(_INNER) + message).digest()).digest()


class Key:
    """A key for many messages, by SHA-256: what does not depend on the message is done once."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        if len(key) > _BLOCK:
            key = hashlib.sha256(key).digest()
        key = key.ljust(_BLOCK, b"\0")
        self._inner, self._outer = hashlib.sha256(key.translate(_INNER)), hashlib.sha256(key.translate(_OUTER))

    def digest(self, message: bytes) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return outer.digest()
