"""Consumer groups in JetStream: a durable consumer of the stream for each (of each stream, where there are several), dead letters
and those that are offered again in streams of their own.

A consumer's name holds the generation of its group: where the position is set anew, there is another consumer, and whoever
still asks the old one gets nothing from it once it is gone. What a consumer must be follows from the group alone, so any
process may make it, at any time: it begins at the group's time, not at the moment when it is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

from uplinkd.core.errors import Unavailable
from uplinkd.core.groups import LONGEST_PAUSE, Group, subjects_of
from uplinkd.core.model import DeviceName, Message, Origin, ProductKey
from uplinkd.core.topics import owner
from uplinkd.engine import ORIGIN_HEADER, Bus, DeadLetter, GroupState, Told
from uplinkd.engine.api import (
    ApiError,
    NotThere,
    ask_api,
    consumers_with,
    document_of,
    first_at,
    get_stored,
    moment_of,
    sequence_in,
)
from uplinkd.engine.bus import NatsBus
from uplinkd.engine.embedded import Access
from uplinkd.engine.stream import STREAM, Base, Part, base_of, part_of, parts
from uplinkd.tasks import end_tasks

__all__ = [
    "DEAD",
    "RETRIED",
    "RETRY",
    "JetStreamDesk",
    "buried",
    "bury",
    "consumer_name",
    "ensure",
    "open_desk",
    "retry_name",
    "sweep",
]

DEAD, RETRY = "UPLINKD_DEAD", "UPLINKD_RETRY"
_DEAD_SUBJECT, _RETRY_SUBJECT = "uplinkd.dead.", "uplinkd.retry."
RETRIED = "uplinkd.retried."
"""Told, with a group's id behind it, when something is offered to it again."""

_MINE = "uplinkd.group"
_NAME = re.compile(r"group-(\d+)(?:-\d+)?")
_MAX_ACK_PENDING = 20_000
_FIXED = (
    "durable_name",
    "deliver_policy",
    "opt_start_seq",
    "opt_start_time",
    "replay_policy",
    "max_waiting",
    "num_replicas",
    "mem_storage",
)
# Dead letters go after this time, and the oldest of a group beyond this number.
_DEAD_AGE, _MOST_DEAD = 30 * 86400 * 10**9, 100_000
_DUPLICATE_WINDOW = 120 * 10**9
_AT_ONCE = 200
# The oldest message of a group is looked for under each of its subject filters; under all at once where they are more.
_MOST_FILTERS = 16
_CONNECT_SECONDS = 3.0
_TOPIC, _ID, _TIME = "Uplinkd-Topic", "Uplinkd-Id", "Uplinkd-Time"
_TRIES, _REASON, _AT = "Uplinkd-Tries", "Uplinkd-Reason", "Uplinkd-At"
_LONGEST_REASON = 2000


def consumer_name(group: Group) -> str:
    return f"group-{group.id}-{group.generation}"


def retry_name(group_id: int) -> str:
    """The consumer of what is offered to a group again."""
    return f"group-{group_id}"


async def ensure(bus: Bus, group: Group) -> list[Base]:
    """See that the group's consumers are there and as its plan wants them; the base of each stream's ids. Raise Unavailable."""
    stream = await ask_api(bus, f"STREAM.INFO.{STREAM}")
    first, *rest = parts(part_of(stream["config"]).count)
    return [
        await _ensure(bus, group, first, stream),
        *await asyncio.gather(*(_ensure(bus, group, part) for part in rest)),
    ]


async def _ensure(bus: Bus, group: Group, part: Part, stream: dict[str, Any] | None = None) -> Base:
    stream = stream or await ask_api(bus, f"STREAM.INFO.{part.name}")
    name = consumer_name(group)
    wanted = {**_pace(group), "filter_subjects": subjects_of(group.plan)}
    try:
        known = (await ask_api(bus, f"CONSUMER.INFO.{part.name}.{name}"))["config"]
        config = {**_fixed(known), **wanted}
    except NotThere:
        told = await bus.ask(f"$JS.API.DIRECT.GET.{part.name}", json.dumps(first_at(group.start)).encode())
        config = {
            **wanted,
            "durable_name": name,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": sequence_in(told.headers, int(stream["state"]["last_seq"])),
        }
    await _create(bus, part.name, name, config)
    return base_of(stream["config"])


async def bury(bus: Bus, group: Group, message: Message, tries: int, reason: str, *, retried: int = 0) -> None:
    """Store a message as a dead letter of the group; raise Unavailable. Twice within two minutes is once, but not where it was
    offered again meanwhile (`retried` is its sequence in the stream for that), or the position was set anew."""
    headers = {
        **_identity(message),
        _TRIES: str(tries),
        _REASON: quote(reason[:_LONGEST_REASON], safe=" /,:;'()="),
        _AT: str(round(time.time() * 1000)),
        "Nats-Msg-Id": f"dead-{group.id}-{group.generation}-{message.id}-{retried}",
    }
    subject = f"{_DEAD_SUBJECT}{group.id}"
    try:
        document_of((await bus.ask(subject, message.payload, headers)).payload)
    except Unavailable:
        await _ensure_streams(bus)  # usually it is there
        document_of((await bus.ask(subject, message.payload, headers)).payload)


async def sweep(bus: Bus, now: Callable[[], Awaitable[Sequence[Group]]]) -> int:
    """Remove the consumers and dead letters of groups that are not among those of `now` or have another generation by now; how many
    consumers there were. Raise Unavailable.

    It is asked when all consumers are known: those of a group that is made meanwhile are no leftovers.
    """
    consumers = {part.name: await _consumers(bus, part.name) for part in await _parts(bus)}
    retrying = await _consumers(bus, RETRY)
    groups = await now()
    wanted = {consumer_name(group) for group in groups}
    alive = {group.id for group in groups}
    found = {stream: names - wanted for stream, names in consumers.items()}
    stale = set[str]().union(*found.values())
    gone = {int(match[1]) for name in (*stale, *retrying) if (match := _NAME.fullmatch(name))} - alive
    for group_id in gone:
        with contextlib.suppress(NotThere):
            await ask_api(bus, f"STREAM.PURGE.{DEAD}", {"filter": f"{_DEAD_SUBJECT}{group_id}"})
        with contextlib.suppress(NotThere):
            await ask_api(bus, f"STREAM.PURGE.{RETRY}", {"filter": f"{_RETRY_SUBJECT}{group_id}"})
        await _forget(bus, RETRY, retry_name(group_id))
    for stream, names in found.items():
        for name in names:
            await _forget(bus, stream, name)
    return len(stale)


async def open_desk(access: Access) -> JetStreamDesk:
    """A desk with a connection of its own; raise Unavailable when the engine does not answer."""
    bus = NatsBus(access, "uplinkd groups")
    there = asyncio.Event()

    async def connected() -> None:
        there.set()

    bus.on_connected(connected)
    running = asyncio.create_task(bus.run())
    try:
        await asyncio.wait_for(there.wait(), _CONNECT_SECONDS)
    except TimeoutError:
        await end_tasks(running)
        await bus.ask("uplinkd")  # says why it is away
    return JetStreamDesk(bus, lambda: end_tasks(running))


class JetStreamDesk:
    """`engine.GroupDesk` over a bus that somebody else looks after, unless `close` is given."""

    def __init__(self, bus: Bus, close: Callable[[], Any] | None = None) -> None:
        self._bus = bus
        self._close = close

    @property
    def bus(self) -> Bus:
        """Over which it asks."""
        return self._bus

    async def close(self) -> None:
        if self._close:
            await self._close()

    async def state(self, group: Group) -> GroupState:
        each = await asyncio.gather(*(self._state(group, part) for part in await _parts(self._bus)))
        lag, held, settled, oldest = (
            sum(part[0] for part in each),
            sum(part[1] for part in each),
            sum(part[2] for part in each),
            min((part[3] for part in each if part[3] is not None), default=None),
        )
        dead, retrying = await asyncio.gather(
            self._count(DEAD, f"{_DEAD_SUBJECT}{group.id}"), self._count(RETRY, f"{_RETRY_SUBJECT}{group.id}")
        )
        return GroupState(lag + retrying, held, oldest, settled, dead, retrying)

    async def dead(self, group: Group, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        found: list[DeadLetter] = []
        while len(found) < limit:
            letter = await self._next(group, found[-1].number if found else after)
            if letter is None:
                break
            found.append(letter)
        return found

    async def dead_letter(self, group: Group, number: int) -> DeadLetter | None:
        told = await self._dead({"seq": number})
        return _letter(told) if told and told.headers.get("Nats-Subject") == f"{_DEAD_SUBJECT}{group.id}" else None

    async def retry(
        self, group: Group, numbers: Sequence[int] | None = None, *, progress: Callable[[int], None] | None = None
    ) -> int:
        await _ensure_streams(self._bus)
        config = {**_pace(group), "durable_name": retry_name(group.id), "filter_subject": f"{_RETRY_SUBJECT}{group.id}"}
        await _create(self._bus, RETRY, retry_name(group.id), config)
        # What is given up meanwhile is not offered again: that might have no end.
        newest = await self._dead({"last_by_subj": f"{_DEAD_SUBJECT}{group.id}"}) if numbers is None else None
        last = _sequence_of(newest) if newest else 0
        count = after = 0
        while True:
            if numbers is None:
                letters = [each for each in await self.dead(group, after=after, limit=_AT_ONCE) if each.number <= last]
            else:
                part, numbers = numbers[:_AT_ONCE], numbers[_AT_ONCE:]
                found = await asyncio.gather(*(self.dead_letter(group, number) for number in part))
                letters = [each for each in found if each]
            await asyncio.gather(*(self._offer(group, letter) for letter in letters))
            self._bus.tell(f"{RETRIED}{group.id}", b"")
            count += len(letters)
            if progress:
                progress(count)
            if numbers is None and letters:
                after = letters[-1].number
            elif not numbers:
                return count

    async def purge(self, group: Group, numbers: Sequence[int] | None = None) -> int:
        if numbers is None:
            try:
                gone = await ask_api(self._bus, f"STREAM.PURGE.{DEAD}", {"filter": f"{_DEAD_SUBJECT}{group.id}"})
            except NotThere:
                return 0
            return int(gone["purged"])
        count = 0
        for number in numbers:
            if await self.dead_letter(group, number):
                await self._remove(number)
                count += 1
        return count

    async def _state(self, group: Group, part: Part) -> tuple[int, int, int, int | None]:
        """(lag, held, settled, oldest) in one stream, as in `GroupState`."""
        action = f"CONSUMER.INFO.{part.name}.{consumer_name(group)}"
        try:
            info = await ask_api(self._bus, action)
        except NotThere:  # nothing was delivered yet
            await ensure(self._bus, group)
            info = await ask_api(self._bus, action)
        held, pending = int(info["num_ack_pending"]), int(info["num_pending"])
        oldest = None
        if held or pending:
            after = int(info["ack_floor"]["stream_seq"]) + 1
            oldest = await self._oldest(part, info["config"]["filter_subjects"], after)
        return held + pending, held, int(info["delivered"]["consumer_seq"]) - held, oldest

    async def _oldest(self, part: Part, filters: Sequence[str], sequence: int) -> int | None:
        """When the first message from `sequence` on was stored that one of `filters` matches, ms."""
        some = filters if len(filters) <= _MOST_FILTERS else ["/.>"]
        found = await asyncio.gather(
            *(get_stored(self._bus, part.name, {"seq": sequence, "next_by_subj": each}) for each in some)
        )
        first = min((told for told in found if told), key=_sequence_of, default=None)
        return moment_of(first.headers["Nats-Time-Stamp"]) if first else None

    async def _count(self, stream: str, subject: str) -> int:
        try:
            info = await ask_api(self._bus, f"STREAM.INFO.{stream}", {"subjects_filter": subject})
        except NotThere:
            return 0
        return int((info["state"].get("subjects") or {}).get(subject, 0))

    async def _next(self, group: Group, after: int) -> DeadLetter | None:
        told = await self._dead({"seq": after + 1, "next_by_subj": f"{_DEAD_SUBJECT}{group.id}"})
        return _letter(told) if told else None

    async def _dead(self, wanted: Mapping[str, Any]) -> Told | None:
        try:
            return await get_stored(self._bus, DEAD, wanted)
        except Unavailable:
            try:
                await ask_api(self._bus, f"STREAM.INFO.{DEAD}")
            except NotThere:  # the stream comes with the first dead letter
                return None
            raise

    async def _offer(self, group: Group, letter: DeadLetter) -> None:
        message = letter.message
        headers = {**_identity(message), "Nats-Msg-Id": f"retry-{letter.number}"}
        document_of((await self._bus.ask(f"{_RETRY_SUBJECT}{group.id}", message.payload, headers)).payload)
        await self._remove(letter.number)

    async def _remove(self, number: int) -> None:
        try:
            await ask_api(self._bus, f"STREAM.MSG.DELETE.{DEAD}", {"seq": number, "no_erase": True})
        except ApiError as error:
            if error.code not in (400, 404):  # somebody else was quicker
                raise


def _identity(message: Message) -> dict[str, str]:
    """The headers from which `buried` makes the message again."""
    return {
        _TOPIC: quote(message.topic, safe="/"),
        _ID: str(message.id),
        _TIME: str(message.generate_time),
        ORIGIN_HEADER: message.origin.value,
    }


def buried(told: Told) -> Message:
    """The message in a dead letter, or in one that is offered again."""
    headers = told.headers
    topic = unquote(headers.get(_TOPIC, ""))
    product_key, device_name = owner(topic)
    return Message(
        int(headers[_ID]),
        topic,
        ProductKey(product_key),
        DeviceName(device_name),
        int(headers[_TIME]),
        told.payload,
        Origin.named(headers.get(ORIGIN_HEADER)),
    )


def _letter(told: Told) -> DeadLetter:
    headers = told.headers
    reason = unquote(headers.get(_REASON, ""))
    return DeadLetter(_sequence_of(told), buried(told), int(headers[_TRIES]), reason, int(headers[_AT]))


def _pace(group: Group) -> dict[str, Any]:
    """What both consumers of a group have: how long a message may be held before it comes again, longer each time."""
    waits = [group.plan.ack_wait]
    while waits[-1] < LONGEST_PAUSE:
        waits.append(min(waits[-1] * 2, LONGEST_PAUSE))
    return {
        "description": f"consumer group {group.name}",
        "ack_policy": "explicit",
        "ack_wait": round(group.plan.ack_wait * 1e9),
        "backoff": [round(each * 1e9) for each in waits],
        "max_deliver": -1,  # what was offered too often goes to the dead letters, and is accepted only then
        "max_ack_pending": _MAX_ACK_PENDING,
        "metadata": {_MINE: str(group.id)},
    }


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a consumer cannot be changed. All else that somebody has set by hand goes: a filter in place of ours, headers without
    payloads, a bound that no request of ours keeps."""
    return {name: config[name] for name in _FIXED if name in config}


async def _create(bus: Bus, stream: str, name: str, config: Mapping[str, Any]) -> None:
    body = {"stream_name": stream, "config": {"name": name, **config}}
    await ask_api(bus, f"CONSUMER.CREATE.{stream}.{name}", body)


async def _ensure_streams(bus: Bus) -> None:
    kept = (await ask_api(bus, f"STREAM.INFO.{STREAM}"))["config"]
    as_kept = {name: kept[name] for name in ("num_replicas", "placement") if kept.get(name)}
    for name, subject, more in (
        (
            DEAD,
            f"{_DEAD_SUBJECT}*",
            {"retention": "limits", "max_age": _DEAD_AGE, "max_msgs_per_subject": _MOST_DEAD, "discard": "old"},
        ),
        (RETRY, f"{_RETRY_SUBJECT}*", {"retention": "workqueue"}),
    ):
        config = {
            "name": name,
            "subjects": [subject],
            "storage": "file",
            **as_kept,
            "allow_direct": True,
            "duplicate_window": _DUPLICATE_WINDOW,
            **more,
        }
        try:
            await ask_api(bus, f"STREAM.INFO.{name}")
        except NotThere:
            with contextlib.suppress(ApiError):  # another process was quicker
                await ask_api(bus, f"STREAM.CREATE.{name}", config)


async def _parts(bus: Bus) -> list[Part]:
    """The streams of messages; the first alone while it is not there."""
    try:
        stream = await ask_api(bus, f"STREAM.INFO.{STREAM}")
    except NotThere:
        return parts(1)
    return parts(part_of(stream["config"]).count)


async def _consumers(bus: Bus, stream: str) -> set[str]:
    """The names of all consumers that were made for groups."""
    return await consumers_with(functools.partial(ask_api, bus, f"CONSUMER.LIST.{stream}"), _MINE)


async def _forget(bus: Bus, stream: str, consumer: str) -> None:
    with contextlib.suppress(NotThere):
        await ask_api(bus, f"CONSUMER.DELETE.{stream}.{consumer}")


def _sequence_of(told: Told) -> int:
    return int(told.headers["Nats-Sequence"])
