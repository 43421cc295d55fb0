"""How passwords of people are kept: as argon2id hashes."""

from __future__ import annotations

from argon2 import PasswordHasher

__all__ = ["hash_password", "hasher"]

hasher = PasswordHasher()  # argon2id, the library's defaults: 64 MiB, 3 passes (RFC 9106, the second recommendation)


def hash_password(password: str) -> str:
    return hasher.hash(password)
