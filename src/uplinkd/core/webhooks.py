"""What a webhook's request is signed with, what an answer to it means, and which URL is none for the start.

The signature is Standard Webhooks': github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import binascii
import datetime as dt
import hashlib
import hmac
import re
from base64 import b64decode
from collections.abc import Iterable, Sequence
from email.utils import parsedate_to_datetime
from enum import Enum
from urllib.parse import urlsplit

from uplinkd.core.errors import Rejected
from uplinkd.core.groups import shown_url
from uplinkd.core.networks import literal, may_reach, networks_of

__all__ = [
    "LONGEST_RETRY_AFTER",
    "Verdict",
    "check_target",
    "id_of",
    "key_of",
    "one_line",
    "retry_after",
    "signed",
    "verdict",
]

LONGEST_RETRY_AFTER = 3600.0
"""A target that asks for a longer rest than this, in seconds, is tried after so long all the same."""

_PREFIX = "whsec_"
_LONGEST_LINE = 200
_CONTROL = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029\ufffd]+")
# Of the 4xx: who asks, where, how often. Nothing that another message would be answered differently.
_OF_TARGET = frozenset({401, 403, 404, 405, 407, 408, 410, 421, 425, 429})


class Verdict(Enum):
    """Whose fault it is that a request was not accepted: the target's, which would not take another message either, or the
    message's."""

    ACCEPTED = "accepted"
    TARGET = "target"
    MESSAGE = "message"


def verdict(status: int) -> Verdict:
    """What an answer of this status means; 0 is none."""
    if 200 <= status < 300:
        return Verdict.ACCEPTED
    if 400 <= status < 500 and status not in _OF_TARGET:
        return Verdict.MESSAGE
    return Verdict.TARGET


def key_of(secret: str) -> bytes:
    """The key that `whsec_…` stands for; raise Rejected for what is none."""
    try:
        key = b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith(_PREFIX) or not key:
        raise Rejected("a webhook's secret is whsec_ and a key in base64; uplinkd group renew-secret makes a new one")
    return key


def signed(key: bytes, message_id: str, body: bytes, *, now: int) -> dict[str, str]:
    """The three headers of Standard Webhooks; `now` is in seconds."""
    code = hmac.digest(key, f"{message_id}.{now}.".encode() + body, "sha256")
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(now),
        "webhook-signature": "v1," + binascii.b2a_base64(code, newline=False).decode(),
    }


def id_of(ids: Sequence[int]) -> str:
    """webhook-id: of one message its messageId; of several always the same for the same ones."""
    if len(ids) == 1:
        return str(ids[0])
    return "batch-" + hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:32]


def retry_after(text: str, *, now: float) -> float | None:
    """The seconds that a Retry-After header asks for, given as such or as a date; None for what is neither."""
    text = text.strip()
    if text.isascii() and text.isdecimal():
        wanted = float(text[:10])
    else:
        try:
            at = parsedate_to_datetime(text)
        except (ValueError, OverflowError):  # the latter for a number that no clock has
            return None
        wanted = (at if at.tzinfo else at.replace(tzinfo=dt.UTC)).timestamp() - now
    return min(max(wanted, 0.0), LONGEST_RETRY_AFTER)


def one_line(text: str) -> str:
    """The beginning of an answer's text as it stands in a sentence: without control characters, in one line."""
    line = _CONTROL.sub(" ", text).strip()
    return line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + "…"


def check_target(url: str, networks: Iterable[str]) -> None:
    """Raise Rejected when the URL alone shows that it may never be reached: `networks` are the setting webhook_networks."""
    allowed = networks_of(networks)
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise Rejected(f"webhook URL {shown_url(url)!r} cannot be read: {error}") from error
    address = literal(host)
    plain = parts.scheme == "http"
    if address and not may_reach(address, allowed):
        raise Rejected(
            f"webhook URL {shown_url(url)}: {host} is no address of the internet, and webhooks reach others only where the setting "
            f"webhook_networks names their network, such as {address}/{address.max_prefixlen}"
        )
    if plain and (not allowed or (address and not may_reach(address, allowed, internet=False))):
        raise Rejected(
            f"webhook URL {shown_url(url)}: it goes through the internet in clear; use https://, or name a private "
            "network in the setting webhook_networks"
        )
