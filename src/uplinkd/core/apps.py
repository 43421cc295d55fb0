"""Applications: how a secret is kept, whether one that is shown is it, and where its owner receives what it asked for."""

from __future__ import annotations

import hashlib
import hmac

from uplinkd.core.model import App

__all__ = ["check_app_secret", "hash_secret", "inbox_of"]

_NO_HASH = bytes(32)


def hash_secret(secret: str) -> bytes:
    """SHA-256 of `secret`, the only form in which it is kept."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()


def inbox_of(app: App) -> str:
    """The prefix of the inboxes in which the application receives what it asked for over NATS; nobody else may listen there."""
    return f"_INBOX.{app.key}"


def check_app_secret(app: App | None, secret: str) -> bool:
    """Whether `secret` is that of `app`; False for None, the unknown application, after the same work."""
    same = hmac.compare_digest(hash_secret(secret), app.secret_hash if app else _NO_HASH)
    return same and app is not None
