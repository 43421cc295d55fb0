"""The account key with which uplinkd signs what applications may do, in NATS' own form: nkeys, and JWTs signed by them.

Form: https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/nkey_auth and nats-io/nkeys.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from uplinkd.core.errors import Rejected

__all__ = ["AccountKey", "Credentials", "claims_of"]

_ACCOUNT = 0
_USER = 20 << 3
_SEED = 18 << 3
_SEED_BYTES = 32
_BLOCK = re.compile(r"-+BEGIN ([A-Z ]+)-+\s+(\S+)\s+-+END \1-+")


class AccountKey:
    """`public` is what nats-server's configuration names as issuer, `A…`."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = _encode(bytes([_ACCOUNT]), self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    @classmethod
    def of(cls, file: Path) -> AccountKey:
        """The key in `file`, made when absent, for its owner alone; raise Rejected when the file holds something else."""
        try:
            text = file.read_text(errors="replace").strip()
        except FileNotFoundError:
            seed = os.urandom(_SEED_BYTES)
            text = _encode(bytes([_SEED | _ACCOUNT >> 5, (_ACCOUNT & 31) << 3]), seed)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as fresh:
                fresh.write(text + "\n")
            return cls(seed)
        try:
            return cls(_decode_seed(text, _ACCOUNT))
        except ValueError as error:
            raise Rejected(
                f"{file} does not hold the seed of a NATS account; remove it and a new one is made"
            ) from error

    def sign(self, claims: Mapping[str, Any], *, now: int) -> str:
        """A JWT of `claims` issued by this account at `now` (seconds since 1970)."""
        claims = {**claims, "iss": self.public, "iat": now}
        claims["jti"] = base64.b32encode(hashlib.sha256(_json(claims)).digest()).decode().rstrip("=")
        text = _base64(_json({"typ": "JWT", "alg": "ed25519-nkey"})) + "." + _base64(_json(claims))
        return text + "." + _base64(self._key.sign(text.encode()))


class Credentials:
    """What a credentials file holds: a user's JWT, and the key that proves it to be ours."""

    def __init__(self, jwt: str, seed: bytes) -> None:
        self.jwt = jwt
        self._key = Ed25519PrivateKey.from_private_bytes(seed)

    @classmethod
    def of(cls, file: Path) -> Credentials:
        """Raise Rejected where the file cannot be read or holds something else."""
        try:
            blocks = dict(_BLOCK.findall(file.read_text(errors="replace")))
            return cls(blocks["NATS USER JWT"], _decode_seed(blocks["USER NKEY SEED"], _USER))
        except OSError as error:
            raise Rejected(f"the credentials file {file} cannot be read: {error.strerror}") from error
        except (KeyError, ValueError):
            raise Rejected(
                f"{file} is no credentials file of NATS: it has a user's JWT and seed, as `nsc generate creds` writes them"
            ) from None

    def sign(self, nonce: str) -> str:
        """What the server wants to see of its nonce."""
        return base64.urlsafe_b64encode(self._key.sign(nonce.encode())).decode().rstrip("=")


def claims_of(token: bytes) -> dict[str, Any]:
    """What a JWT says, whoever signed it; ValueError when it is none."""
    parts = token.split(b".")
    if len(parts) != 3:
        raise ValueError("a JWT has three parts")
    claims = json.loads(base64.urlsafe_b64decode(parts[1] + b"=" * (-len(parts[1]) % 4)))
    if not isinstance(claims, dict):
        raise ValueError("the claims of a JWT are an object")  # noqa: TRY004 - it is the token that is wrong
    return claims


def _encode(prefix: bytes, raw: bytes) -> str:
    """Base32 of prefix, key and CRC-16/XMODEM, little endian."""
    body = prefix + raw
    return base64.b32encode(body + binascii.crc_hqx(body, 0).to_bytes(2, "little")).decode().rstrip("=")


def _decode_seed(text: str, kind: int) -> bytes:
    raw = base64.b32decode(text + "=" * (-len(text) % 8))
    body, checksum = raw[:-2], raw[-2:]
    if len(body) != 2 + _SEED_BYTES or body[0] & 0xF8 != _SEED or (body[0] & 7) << 5 | body[1] >> 3 != kind:
        raise ValueError("not a seed of this kind")
    if binascii.crc_hqx(body, 0).to_bytes(2, "little") != checksum:
        raise ValueError("the checksum does not fit")
    return body[2:]


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
