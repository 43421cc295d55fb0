"""The streams that hold all messages: how they must look, and how their sequence numbers become messageIds.

Usually there is one. Where its leader is the limit there are several (settings.partitions), and each device has one of them for ever,
by a hash of its name and its product's: so its messages stay in order. Two streams may not take the same subjects. So a publisher puts
`uplinkd.part.<number>.` before the subject, and the stream takes that away again (its subject transform): what is stored, and with it
every filter, is the same however many there are. How many there are is fixed when they are made and stands in the metadata of each,
where readers and consumer groups find it; a setting that says otherwise is refused.

messageId = base + sequence, where base is fixed when the stream is made: its time of making in ms, shifted left by 20. So ids
rise in the order of storage, an id leads to its message by arithmetic, and a stream that is deleted and made again gives no
id twice: its base lies beyond every id of the old one, for rates up to 2^20 messages a millisecond. Of several streams, `count`, the
id is base + sequence · count, and the base of each leaves its number as the remainder: so no two have an id in common, an id tells its
stream, and those of one device rise. The rate is then 2^20 for all of them together.

A stream that is restored from a backup knows nothing of the ids that were given after the backup, under sequences that it will
give again. Its sequences cannot be set ahead (nats-server 2.15 walks through a gap of 5·10^12 one by one when it recovers). So it gets
a new base, chosen as for a stream made at that moment; the metadata keep the one before for the messages that were restored,
which thus have the ids that they had.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from uplinkd.core.errors import Unavailable
from uplinkd.core.subjects import from_subject
from uplinkd.core.topics import owner
from uplinkd.settings import Settings

__all__ = [
    "BASE",
    "BASE_SHIFT",
    "INGEST",
    "PARTITION",
    "RESTORED",
    "STREAM",
    "SUBJECTS",
    "Base",
    "Part",
    "base_metadata",
    "base_of",
    "base_of_metadata",
    "changed",
    "check_partitions",
    "check_quorum",
    "live_subject",
    "new_base",
    "part_for",
    "part_of",
    "parts",
    "restored_metadata",
    "spread",
    "wanted",
    "with_base",
]

STREAM = "UPLINKD"
SUBJECTS = "/.>"
INGEST = "uplinkd.part."
"""What stands, with the number and a dot, before the subject of what goes to one of several streams."""

BASE = "uplinkd.base"
"""Under this name the base of the ids stands in the metadata of the stream, and in that of applications' consumers."""
RESTORED = "uplinkd.restored"
"""Under this name stands, for a stream that was restored, which messages have another base: `last sequence:base`, several by spaces."""
PARTITION = "uplinkd.partition"
"""Under this name stands which of how many streams this is, `number/count`; not where there is one."""
BASE_SHIFT = 20
"""By so many bits a base is its stream's time of making (ms), shifted left."""
# A replica that lives tells so each second.
_HEARD_NANOSECONDS = 4 * 10**9
# Lifecycle and status messages have a Nats-Msg-Id. The window is named because it may not be longer than max_age, and is the server's
# own default where there is no max_age: 0 would come back as something else and look like a change for ever.
_DUPLICATE_WINDOW = 120 * 10**9


@dataclass(frozen=True, slots=True)
class Part:
    """One of the streams that hold the messages."""

    number: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        return f"{STREAM}_P{self.number}" if self.number else STREAM

    @property
    def ingest(self) -> str:
        """What stands before the subject of what is published to it."""
        return f"{INGEST}{self.number}." if self.count > 1 else ""

    @property
    def deleted(self) -> str:
        """Where JetStream tells that the stream was deleted."""
        return f"$JS.EVENT.ADVISORY.STREAM.DELETED.{self.name}"

    @property
    def shape(self) -> dict[str, Any]:
        """What of the stream's configuration makes it this part."""
        if self.count == 1:
            return {"subjects": [SUBJECTS]}
        subjects = f"{self.ingest}{SUBJECTS}"
        return {"subjects": [subjects], "subject_transform": {"src": subjects, "dest": SUBJECTS}}

    def aligned(self, base: int) -> int:
        """The lowest base for this part that is not below `base`."""
        return base + (self.number - base) % self.count


def parts(count: int) -> list[Part]:
    """All streams, where there are so many."""
    return [Part(number, count) for number in range(count)]


@functools.lru_cache(maxsize=1 << 16)
def part_for(subject: str, count: int) -> Part:
    """The stream for what is stored under `subject`: the same for all of a device's."""
    return Part(crc32("/".join(owner(from_subject(subject))).encode()) % count, count)


def part_of(config: Mapping[str, Any]) -> Part:
    """Which of how many the stream with this configuration is."""
    number, _, count = (config.get("metadata") or {}).get(PARTITION, "0/1").partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise Unavailable(f"the NATS stream {config.get('name')} has the metadata {PARTITION} = {number}/{count}")
    return Part(int(number), int(count))


def live_subject(subject: str, count: int) -> str:
    """Under what to listen for what is published under `subject`, which may have wildcards; `Told.subject` then ends in the latter."""
    return f"{INGEST}*.{subject}" if count > 1 else subject


class Base(int):
    """What makes a messageId of a sequence: the number is the base of what is stored now; those up to a sequence in `restored`
    have the base beside it, (last sequence, base), the oldest first. Between two ids lies `step`."""

    restored: tuple[tuple[int, int], ...]
    step: int

    def __new__(cls, base: int = 0, restored: tuple[tuple[int, int], ...] = (), step: int = 1) -> Base:
        made = super().__new__(cls, base)
        made.restored = restored
        made.step = step
        return made

    def id(self, sequence: int) -> int:
        """The messageId of the message with this sequence."""
        if self.restored:
            place = bisect_left(self.restored, sequence, key=lambda part: part[0])
            if place < len(self.restored):
                return self.restored[place][1] + sequence * self.step
        return self + sequence * self.step

    def sequence(self, message_id: int) -> int:
        """The sequence of the first message with this id or a later one, which need not be there."""
        first = 1
        for last, base in self.restored:
            if message_id <= base + last * self.step:
                return max(-((base - message_id) // self.step), first)
            first = last + 1
        return max(-((self - message_id) // self.step), first)


def new_base(now: int) -> int:
    """The base of a stream made at `now` (ms since 1970)."""
    return now << BASE_SHIFT


def wanted(settings: Settings, base: int, part: Part) -> dict[str, Any]:
    """The stream's configuration, as the JetStream API takes it."""
    age = round(settings.keep_age * 1e9)
    config = {
        "name": part.name,
        **part.shape,
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "max_age": age,
        "max_bytes": settings.keep_bytes // part.count,
        "max_msgs": -1,
        "max_consumers": -1,
        **spread(settings),
        "duplicate_window": min(_DUPLICATE_WINDOW, age) if age else _DUPLICATE_WINDOW,
        "allow_direct": True,
        # Where each acknowledgement waits for the disk, messages are stored in batches: see engine.jetstream.
        "allow_atomic": settings.sync_interval == "always",
    }
    return with_base(config, base, part)


def spread(settings: Settings) -> dict[str, Any]:
    """On how many servers, and on which, each of our streams is kept."""
    placement = {"placement": {"tags": list(settings.placement)}} if settings.placement else {}
    return {"num_replicas": settings.replicas, **placement}


def with_base(config: dict[str, Any], base: int, part: Part = Part()) -> dict[str, Any]:
    """`config` with the base of its ids."""
    return {**config, "metadata": {BASE: str(base), **_partition(part)}}


def _partition(part: Part) -> dict[str, str]:
    return {PARTITION: f"{part.number}/{part.count}"} if part.count > 1 else {}


def base_of_metadata(config: Mapping[str, Any]) -> Base:
    """The base that a stream of ours was made with; raise Unavailable when it is not one of ours."""
    metadata = config.get("metadata") or {}
    base = metadata.get(BASE, "")
    if not base.isdecimal():
        raise Unavailable(
            f"the NATS stream {config.get('name')} was not made by uplinkd (metadata {BASE} = {base!r}); "
            "rename or remove it, it is left as it is"
        )
    restored = (each.split(":") for each in metadata.get(RESTORED, "").split())
    return Base(int(base), tuple((int(last), int(before)) for last, before in restored), part_of(config).count)


def restored_metadata(config: Mapping[str, Any], state: Mapping[str, Any], fresh: int) -> dict[str, str]:
    """The metadata of a stream that was restored with this configuration and state, for ids beyond `fresh` from now on."""
    before, last, first = base_of_metadata(config), int(state["last_seq"]), int(state["first_seq"])
    known = [*before.restored, (last, int(before))] if last else []
    text = " ".join(f"{end}:{base}" for end, base in known if end >= first)
    return {**config["metadata"], BASE: str(part_of(config).aligned(fresh) - last * before.step), RESTORED: text}


def base_metadata(base: Base) -> dict[str, str]:
    """How a base stands in metadata."""
    restored = {RESTORED: " ".join(f"{last}:{before}" for last, before in base.restored)} if base.restored else {}
    return {BASE: str(int(base)), **restored, **_partition(Part(base % base.step, base.step))}


def base_of(config: Mapping[str, Any]) -> Base:
    """The base of an existing stream of messages; raise Unavailable when it is not one."""
    if any(config.get(name) != value for name, value in part_of(config).shape.items()):
        raise Unavailable(
            f"the NATS stream {config.get('name')} was not made by uplinkd (subjects {config.get('subjects')}); "
            "rename or remove it, it is left as it is"
        )
    return base_of_metadata(config)


def check_partitions(config: Mapping[str, Any], count: int) -> None:
    """Return if the stream is one of so many; raise Unavailable otherwise."""
    found = part_of(config).count
    if found != count:
        raise Unavailable(
            f"partitions = {count}, and the NATS stream {config.get('name')} was made as one of {found}: their number stays as it "
            f"was when they were made; set partitions = {found}"
        )


def check_quorum(info: Mapping[str, Any]) -> None:
    """Return if most of a stream's replicas are heard of by the one that has answered; raise Unavailable otherwise."""
    others = (info.get("cluster") or {}).get("replicas") or []
    heard = 1 + sum(not each.get("offline") and each.get("active", 0) < _HEARD_NANOSECONDS for each in others)
    if 2 * heard <= 1 + len(others):
        raise Unavailable(f"of {1 + len(others)} replicas of {info['config']['name']} only {heard} are in touch")


def changed(config: Mapping[str, Any], settings: Settings) -> dict[str, Any] | None:
    """The configuration to update to when age, size or syncing were set anew; None when they are as set."""
    fresh = wanted(settings, base_of(config), part_of(config))
    names = ("max_age", "max_bytes", "duplicate_window", "allow_atomic")
    if all((config.get(name) or 0) == fresh[name] for name in names):
        return None
    return {**config, **{name: fresh[name] for name in names}}
