"""The stream that holds all messages: how it must look, and how its sequence numbers become messageIds.

messageId = base + sequence, where base is fixed when the stream is made: its time of making in ms, shifted left by 20. So ids
rise in the order of storage, an id leads to its message by arithmetic, and a stream that is deleted and made again gives no
id twice: its base lies beyond every id of the old one, for rates up to 2^20 messages a millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uplinkd.core.errors import Unavailable
from uplinkd.settings import Settings

__all__ = [
    "BASE",
    "DELETED",
    "STREAM",
    "SUBJECTS",
    "base_of",
    "base_of_metadata",
    "changed",
    "new_base",
    "wanted",
    "with_base",
]

STREAM = "UPLINKD"
SUBJECTS = "/.>"
DELETED = f"$JS.EVENT.ADVISORY.STREAM.DELETED.{STREAM}"
"""Where JetStream tells that the stream was deleted."""

BASE = "uplinkd.base"
"""Under this name the base of the ids stands in the metadata of the stream, and in that of applications' consumers."""
_BASE_SHIFT = 20
# Only lifecycle messages have a Nats-Msg-Id. The window is named because it may not be longer than max_age, and is the server's own
# default where there is no max_age: 0 would come back as something else and look like a change for ever.
_DUPLICATE_WINDOW = 120 * 10**9


def new_base(now: int) -> int:
    """The base of a stream made at `now` (ms since 1970)."""
    return now << _BASE_SHIFT


def wanted(settings: Settings, base: int) -> dict[str, Any]:
    """The stream's configuration, as the JetStream API takes it."""
    age = round(settings.keep_age * 1e9)
    config = {
        "name": STREAM,
        "subjects": [SUBJECTS],
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "max_age": age,
        "max_bytes": settings.keep_bytes,
        "max_msgs": -1,
        "max_consumers": -1,
        "num_replicas": 1,
        "duplicate_window": min(_DUPLICATE_WINDOW, age) if age else _DUPLICATE_WINDOW,
        "allow_direct": True,
        # Where each acknowledgement waits for the disk, messages are stored in batches: see engine.jetstream.
        "allow_atomic": settings.sync_interval == "always",
    }
    return with_base(config, base)


def with_base(config: dict[str, Any], base: int) -> dict[str, Any]:
    """`config` with the base of its ids."""
    return {**config, "metadata": {BASE: str(base)}}


def base_of_metadata(config: Mapping[str, Any]) -> int:
    """The base that a stream of ours was made with; raise Unavailable when it is not one of ours."""
    base = (config.get("metadata") or {}).get(BASE, "")
    if not base.isdecimal():
        raise Unavailable(
            f"the NATS stream {config.get('name')} was not made by uplinkd (metadata {BASE} = {base!r}); "
            "rename or remove it, it is left as it is"
        )
    return int(base)


def base_of(config: Mapping[str, Any]) -> int:
    """The base of the existing stream of messages; raise Unavailable when it is not the one."""
    if config.get("subjects") != [SUBJECTS]:
        raise Unavailable(
            f"the NATS stream {STREAM} was not made by uplinkd (subjects {config.get('subjects')}); "
            "rename or remove it, it is left as it is"
        )
    return base_of_metadata(config)


def changed(config: Mapping[str, Any], settings: Settings) -> dict[str, Any] | None:
    """The configuration to update to when age, size or syncing were set anew; None when they are as set."""
    fresh = wanted(settings, base_of(config))
    names = ("max_age", "max_bytes", "duplicate_window", "allow_atomic")
    if all((config.get(name) or 0) == fresh[name] for name in names):
        return None
    return {**config, **{name: fresh[name] for name in names}}
