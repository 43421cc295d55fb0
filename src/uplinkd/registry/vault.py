"""How secrets lie in the registry: sealed with AES-256-GCM, bound to their owner, under a key of the data folder or a setting.

A sealed value is: version (1 byte), the key's fingerprint (4), nonce (12), ciphertext and tag. The fingerprint says which
key a value needs, so that a wrong key is named before anything is opened, and values under two keys can stand side by side
while one key takes the other's place. The key of the first signing key is the one under which everything new is sealed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.files import publish
from uplinkd.settings import Settings

__all__ = [
    "PREFIX_BYTES",
    "Vault",
    "file_keys",
    "fingerprint",
    "key_file",
    "key_in",
    "key_of",
    "make_key",
    "new_key_file",
    "prefix_of",
    "written_key",
]

_VERSION = b"\x01"
_FINGERPRINT_BYTES = 4
_NONCE_BYTES = 12
PREFIX_BYTES = len(_VERSION) + _FINGERPRINT_BYTES
"""A sealed value begins with so many bytes that tell its key."""
_BOX_AT = PREFIX_BYTES + _NONCE_BYTES


class Vault:
    """Seals and opens values. `owner` says whose value it is: moved to another owner, it does not open.

    It seals under one key and opens under each that it knows; `more` brings those that have come since.
    """

    def __init__(self, key: bytes, more: Callable[[], Iterable[bytes]] = tuple) -> None:
        self._more = more
        self._ciphers: dict[bytes, AESGCM] = {}
        self._sealing = self._prefix, self._cipher = self._learn(key)

    def seal(self, value: bytes, *, owner: str) -> bytes:
        prefix, cipher = self._sealing
        nonce = os.urandom(_NONCE_BYTES)
        return prefix + nonce + cipher.encrypt(nonce, value, owner.encode())

    def open(self, sealed: bytes, *, owner: str) -> bytes:
        cipher = self._cipher if sealed.startswith(self._prefix) else self._find(sealed[:PREFIX_BYTES])
        if cipher is not None:
            try:
                return cipher.decrypt(sealed[PREFIX_BYTES:_BOX_AT], sealed[_BOX_AT:], owner.encode())
            except (InvalidTag, ValueError):
                pass
        raise Unavailable(
            f"the registry is damaged: the sealed secret of {owner} does not open; restore it from a backup, or delete "
            "its owner and make it anew"
        )

    def learn(self, key: bytes) -> None:
        """Open what is sealed under `key` too."""
        self._learn(key)

    def seal_under(self, prefix: bytes) -> bool:
        """Seal under the key with this prefix from now on; False when it is not to be had."""
        if prefix != self._prefix:
            cipher = self._find(prefix)
            if cipher is None:
                return False
            self._sealing = self._prefix, self._cipher = prefix, cipher
        return True

    def is_current(self, sealed: bytes) -> bool:
        return sealed.startswith(self._prefix)

    def resealed(self, sealed: bytes, *, owner: str) -> bytes:
        """The same value under the key that is used now."""
        return sealed if self.is_current(sealed) else self.seal(self.open(sealed, owner=owner), owner=owner)

    def _find(self, prefix: bytes) -> AESGCM | None:
        if prefix not in self._ciphers:
            for key in self._more():
                self._learn(key)
        return self._ciphers.get(prefix)

    def _learn(self, key: bytes) -> tuple[bytes, AESGCM]:
        prefix = prefix_of(key)
        return prefix, self._ciphers.setdefault(prefix, AESGCM(key))


def fingerprint(key: bytes) -> bytes:
    """Names a key without telling anything about it."""
    return hashlib.sha256(b"uplinkd vault key" + key).digest()[:_FINGERPRINT_BYTES]


def prefix_of(key: bytes) -> bytes:
    """With what everything begins that is sealed under `key`."""
    return _VERSION + fingerprint(key)


def key_file(settings: Settings) -> Path:
    return settings.data / "keys" / "secret.key"


def new_key_file(settings: Settings) -> Path:
    """Where the key lies that is about to take the place of the other."""
    return settings.data / "keys" / "secret.key.new"


def file_keys(settings: Settings) -> list[bytes]:
    """The keys in the data folder. The new one is looked for first: it may take the other's place meanwhile."""
    found = []
    for path in (new_key_file(settings), key_file(settings)):
        try:
            found.append(key_in(path))
        except FileNotFoundError:
            continue
    return found


def key_in(path: Path) -> bytes:
    """The key in a file; raise FileNotFoundError, or Rejected for what holds none."""
    try:
        return _decoded(path.read_text("ascii"), str(path))
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected(f"the key file {path} cannot be read: {_why(error)}") from error


def key_of(settings: Settings, *, sample: bytes, where: str) -> bytes:
    """The key that opened `sample`, a sealed value of the registry at `where`; raise Rejected if it is not to be had."""
    wanted = sample[:PREFIX_BYTES]
    name = wanted[len(_VERSION) :].hex()
    if text := settings.secret_key.get_secret_value():
        keys, source = [_decoded(text, "the setting secret_key")], "the setting secret_key"
    else:
        keys, source = file_keys(settings), str(key_file(settings))
    if not keys:
        raise Rejected(
            f"the secrets in {where} are sealed with key {name}, and {source} is not there: put the file back, or "
            "give the key by the setting secret_key"
        )
    for key in keys:
        if prefix_of(key) == wanted:
            return key
    raise Rejected(
        f"the secrets in {where} are sealed with key {name}; {source} holds another, {fingerprint(keys[-1]).hex()}"
    )


def make_key(settings: Settings) -> bytes:
    """The key for a registry that holds nothing yet: the one given or found, else a new one in the data folder."""
    if text := settings.secret_key.get_secret_value():
        return _decoded(text, "the setting secret_key")
    path = key_file(settings)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            publish(path, written_key(secrets.token_bytes(32)))
        return key_in(path)
    except OSError as error:
        raise Rejected(f"the key file {path} cannot be made or read: {_why(error)}") from error


def written_key(key: bytes) -> bytes:
    """A key as it stands in its file."""
    return base64.b64encode(key) + b"\n"


def _decoded(text: str, source: str) -> bytes:
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise Rejected(f"{source} does not hold a key: 32 bytes in base64")
    return key


def _why(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not base64"
