"""How secrets lie in the registry: sealed with AES-256-GCM, bound to their owner, under a key of the data folder or a setting.

A sealed value is: version (1 byte), the key's fingerprint (4), nonce (12), ciphertext and tag. The fingerprint says which
key a value needs, so that a wrong key is named before anything is opened, and values under two keys can stand side by side.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.settings import Settings

__all__ = ["Vault", "fingerprint", "key_file", "key_of", "make_key"]

_VERSION = b"\x01"
_FINGERPRINT_BYTES = 4
_NONCE_BYTES = 12
_NONCE_AT = len(_VERSION) + _FINGERPRINT_BYTES
_BOX_AT = _NONCE_AT + _NONCE_BYTES


class Vault:
    """Seals and opens values under one key. `owner` says whose value it is: moved to another owner, it does not open."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._prefix = _VERSION + fingerprint(key)

    def seal(self, value: bytes, *, owner: str) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return self._prefix + nonce + self._cipher.encrypt(nonce, value, owner.encode())

    def open(self, sealed: bytes, *, owner: str) -> bytes:
        if sealed.startswith(self._prefix):
            try:
                return self._cipher.decrypt(sealed[_NONCE_AT:_BOX_AT], sealed[_BOX_AT:], owner.encode())
            except (InvalidTag, ValueError):
                pass
        raise Unavailable(
            f"the registry is damaged: the sealed secret of {owner} does not open; restore it from a backup, or delete "
            "its owner and make it anew"
        )


def fingerprint(key: bytes) -> bytes:
    """Names a key without telling anything about it."""
    return hashlib.sha256(b"uplinkd vault key" + key).digest()[:_FINGERPRINT_BYTES]


def key_file(settings: Settings) -> Path:
    return settings.data / "keys" / "secret.key"


def key_of(settings: Settings, *, sample: bytes, where: str) -> bytes:
    """The key that opened `sample`, a sealed value of the registry at `where`; raise Rejected if it is not to be had."""
    wanted = sample[len(_VERSION) : _NONCE_AT].hex()
    text, source = settings.secret_key.get_secret_value(), "the setting secret_key"
    if not text:
        source = str(key_file(settings))
        try:
            text = key_file(settings).read_text("ascii")
        except FileNotFoundError:
            raise Rejected(
                f"the secrets in {where} are sealed with key {wanted}, and {source} is not there: put the file back, or "
                "give the key by the setting secret_key"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise Rejected(f"the key file {source} cannot be read: {_why(error)}") from error
    key = _decoded(text, source)
    if (given := fingerprint(key).hex()) != wanted:
        raise Rejected(f"the secrets in {where} are sealed with key {wanted}; {source} holds another, {given}")
    return key


def make_key(settings: Settings) -> bytes:
    """The key for a registry that holds nothing yet: the one given or found, else a new one in the data folder."""
    if text := settings.secret_key.get_secret_value():
        return _decoded(text, "the setting secret_key")
    path = key_file(settings)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _publish(path, base64.b64encode(secrets.token_bytes(32)) + b"\n")
        return _decoded(path.read_text("ascii"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected(f"the key file {path} cannot be made or read: {_why(error)}") from error


def _publish(path: Path, content: bytes) -> None:
    """Make `path` with all of `content` or not at all; of two processes the first wins, and both go on with its file."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # a key that a power cut takes away takes every secret with it
    finally:
        os.close(folder)


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
