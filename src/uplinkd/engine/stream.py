"""The stream that holds all messages: how it must look, and how its sequence numbers become messageIds.

messageId = base + sequence, where base is fixed when the stream is made: its time of making in ms, shifted left by 20. So ids
rise in the order of storage, an id leads to its message by arithmetic, and a stream that is deleted and made again gives no
id twice: its base lies beyond every id of the old one, for rates up to 2^20 messages a millisecond.

A stream that is restored from a backup knows nothing of the ids that were given after the backup, under sequences that it will
give again. Its sequences cannot be set ahead (nats-server 2.15 walks through a gap of 5·10^12 one by one when it recovers). So it gets
a new base, chosen as for a stream made at that moment; the metadata keep the one before for the messages that were restored,
which thus have the ids that they had.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from uplinkd.core.errors import Unavailable
from uplinkd.settings import Settings

__all__ = [
    "BASE",
    "DELETED",
    "RESTORED",
    "STREAM",
    "SUBJECTS",
    "Base",
    "base_metadata",
    "base_of",
    "base_of_metadata",
    "changed",
    "check_quorum",
    "new_base",
    "restored_metadata",
    "spread",
    "wanted",
    "with_base",
]

STREAM = "UPLINKD"
SUBJECTS = "/.>"
DELETED = f"$JS.EVENT.ADVISORY.STREAM.DELETED.{STREAM}"
"""Where JetStream tells that the stream was deleted."""

BASE = "uplinkd.base"
"""Under this name the base of the ids stands in the metadata of the stream, and in that of applications' consumers."""
RESTORED = "uplinkd.restored"
"""Under this name stands, for a stream that was restored, which messages have another base: `last sequence:base`, several by spaces."""
_BASE_SHIFT = 20
# A replica that lives tells so each second.
_HEARD_NANOSECONDS = 4 * 10**9
# Lifecycle and status messages have a Nats-Msg-Id. The window is named because it may not be longer than max_age, and is the server's
# own default where there is no max_age: 0 would come back as something else and look like a change for ever.
_DUPLICATE_WINDOW = 120 * 10**9


class Base(int):
    """What makes a messageId of a sequence: the number is the base of what is stored now; those up to a sequence in `restored`
    have the base beside it, (last sequence, base), the oldest first."""

    restored: tuple[tuple[int, int], ...]

    def __new__(cls, base: int = 0, restored: tuple[tuple[int, int], ...] = ()) -> Base:
        made = super().__new__(cls, base)
        made.restored = restored
        return made

    def id(self, sequence: int) -> int:
        """The messageId of the message with this sequence."""
        if self.restored:
            place = bisect_left(self.restored, sequence, key=lambda part: part[0])
            if place < len(self.restored):
                return self.restored[place][1] + sequence
        return self + sequence

    def sequence(self, message_id: int) -> int:
        """The sequence of the first message with this id or a later one, which need not be there."""
        first = 1
        for last, base in self.restored:
            if message_id <= base + last:
                return max(message_id - base, first)
            first = last + 1
        return max(message_id - self, first)


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
        **spread(settings),
        "duplicate_window": min(_DUPLICATE_WINDOW, age) if age else _DUPLICATE_WINDOW,
        "allow_direct": True,
        # Where each acknowledgement waits for the disk, messages are stored in batches: see engine.jetstream.
        "allow_atomic": settings.sync_interval == "always",
    }
    return with_base(config, base)


def spread(settings: Settings) -> dict[str, Any]:
    """On how many servers, and on which, each of our streams is kept."""
    placement = {"placement": {"tags": list(settings.placement)}} if settings.placement else {}
    return {"num_replicas": settings.replicas, **placement}


def with_base(config: dict[str, Any], base: int) -> dict[str, Any]:
    """`config` with the base of its ids."""
    return {**config, "metadata": {BASE: str(base)}}


def base_of_metadata(config: Mapping[str, Any]) -> Base:
    """The base that a stream of ours was made with; raise Unavailable when it is not one of ours."""
    metadata = config.get("metadata") or {}
    base = metadata.get(BASE, "")
    if not base.isdecimal():
        raise Unavailable(
            f"the NATS stream {config.get('name')} was not made by uplinkd (metadata {BASE} = {base!r}); "
            "rename or remove it, it is left as it is"
        )
    parts = (part.split(":") for part in metadata.get(RESTORED, "").split())
    return Base(int(base), tuple((int(last), int(before)) for last, before in parts))


def restored_metadata(config: Mapping[str, Any], state: Mapping[str, Any], fresh: int) -> dict[str, str]:
    """The metadata of a stream that was restored with this configuration and state, for ids beyond `fresh` from now on."""
    before, last, first = base_of_metadata(config), int(state["last_seq"]), int(state["first_seq"])
    parts = [*before.restored, (last, int(before))] if last else []
    text = " ".join(f"{end}:{base}" for end, base in parts if end >= first)
    return {**config["metadata"], BASE: str(fresh - last), RESTORED: text}


def base_metadata(base: Base) -> dict[str, str]:
    """How a base stands in metadata."""
    restored = {RESTORED: " ".join(f"{last}:{before}" for last, before in base.restored)} if base.restored else {}
    return {BASE: str(int(base)), **restored}


def base_of(config: Mapping[str, Any]) -> Base:
    """The base of the existing stream of messages; raise Unavailable when it is not the one."""
    if config.get("subjects") != [SUBJECTS]:
        raise Unavailable(
            f"the NATS stream {STREAM} was not made by uplinkd (subjects {config.get('subjects')}); "
            "rename or remove it, it is left as it is"
        )
    return base_of_metadata(config)


def check_quorum(info: Mapping[str, Any]) -> None:
    """Return if most of a stream's replicas are heard of by the one that has answered; raise Unavailable otherwise."""
    others = (info.get("cluster") or {}).get("replicas") or []
    heard = 1 + sum(not each.get("offline") and each.get("active", 0) < _HEARD_NANOSECONDS for each in others)
    if 2 * heard <= 1 + len(others):
        raise Unavailable(f"of {1 + len(others)} replicas of {STREAM} only {heard} are in touch")


def changed(config: Mapping[str, Any], settings: Settings) -> dict[str, Any] | None:
    """The configuration to update to when age, size or syncing were set anew; None when they are as set."""
    fresh = wanted(settings, base_of(config))
    names = ("max_age", "max_bytes", "duplicate_window", "allow_atomic")
    if all((config.get(name) or 0) == fresh[name] for name in names):
        return None
    return {**config, **{name: fresh[name] for name in names}}
