"""Looks at what is stored, with the stock client: the newest messages that match a query, and those that arrive.

JetStream has no "last N". A consumer that begins at a sequence says how many messages match from there on, so the right
sequence is found by interpolation, and by halving where messages are spread unevenly.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import nats
import nats.errors

from uplinkd.core.errors import Refused, Rejected, Unavailable
from uplinkd.core.model import DeviceName, Message, Origin, ProductKey
from uplinkd.core.subjects import filters_of, from_subject, to_subject
from uplinkd.core.topics import owner, parse
from uplinkd.engine import ORIGIN_HEADER, Glimpse, Query, StreamState, Told
from uplinkd.engine.api import NotThere, call, connect, first_at, in_words, moment_of, sequence_in
from uplinkd.engine.embedded import Access
from uplinkd.engine.stream import BASE_SHIFT, STREAM, Base, base_of

if TYPE_CHECKING:
    from nats.aio.client import Client

__all__ = ["ALL_TIME", "Edge", "JetStreamReader", "check", "delivered", "matches", "place_of"]

Edge = tuple[int, int]
"""(ms, messageId): a place in the order of all messages, of however many streams."""

ALL_TIME = 1 << 62

_REQUEST_SECONDS = 5.0
_PULL_SECONDS = 2.0
_BATCH = 256
_MAX_FILTERS = 10_000
_PAUSE_SECONDS = 0.2
_PATIENCE_SECONDS = 2.0
_LOOK_SECONDS = 5.0
# In a flood, which nobody reads line by line, devices come first: a look waits so many times as long as the one before it took,
# which is longer where they fill the machine.
_FLOOD_FACTOR, _FLOOD_SHARE, _FLOOD_SECONDS = 4, 40, 3.0
_NEVER = float("inf")
# A consumer is deleted after use; the server forgets those that could not be.
_FORGET = 30 * 10**9
_NAME = re.compile(r"[A-Za-z0-9_@.:-]{1,64}")
_NO_MESSAGES, _NO_MORE, _NOBODY = "404", "408", "503"
# In a cluster a consumer may be there before the server that is asked has heard of it: nobody answers then.
_NEWS_SECONDS = 1.0


def check(query: Query) -> None:
    """Raise Rejected when a name or the topic in `query` cannot be one; a wildcard in it would match what nobody asked for."""
    for what, name in (("product", query.product_key), ("device", query.device_name)):
        if name is not None and not _NAME.fullmatch(name):
            raise Rejected(f"{what} {name!r}: a name has 1 to 64 letters, digits and - _ @ . :")
    if query.topic is not None:
        try:
            parse(quote(query.topic, safe="/").encode())
        except Refused as refused:
            raise Rejected(refused.reason) from refused


def place_of(message: Message) -> Edge:
    """Where the message stands among those of all streams."""
    return message.generate_time, message.id


def matches(query: Query, message: Message) -> bool:
    """Whether `query` asks for `message`."""
    return (
        (query.product_key is None or message.product_key == query.product_key)
        and (query.device_name is None or message.device_name == query.device_name)
        and (query.topic is None or message.topic == query.topic)
        and (query.since is None or message.generate_time >= query.since)
        and (query.until is None or message.generate_time <= query.until)
        and (query.before is None or message.id < query.before)
    )


class JetStreamReader:
    """Of one stream; ended by `close`. It connects when it is asked, and after a connection was lost anew, wherever the engine is
    then."""

    def __init__(self, access: Access, name: str = STREAM) -> None:
        self._access = access
        self._name = name
        self._client: Client | None = None
        self._connecting = asyncio.Lock()

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await client.close()
            await asyncio.sleep(0)  # its transport closes in the next turn of the loop

    async def state(self) -> StreamState:
        """How much is stored; raise Unavailable when the engine is away."""
        with in_words():
            stream = await self.stream()
        return StreamState(stream["state"]["messages"], stream["state"]["bytes"]) if stream else StreamState(0, 0)

    async def by_id(self, message_id: int) -> Message | None:
        """The message; None for an id that is not this stream's, or of a message that is gone."""
        with in_words():
            stream = await self.stream()
            if stream is None:
                return None
            base = base_of(stream["config"])
            sequence = base.sequence(message_id)
            state = stream["state"]
            if base.id(sequence) != message_id or not state["first_seq"] <= sequence <= state["last_seq"]:
                return None
            try:
                answer = await self._call(f"STREAM.MSG.GET.{self._name}", {"seq": sequence})
            except NotThere:
                return None
        return _stored_message(answer["message"], base)

    async def latest(self, query: Query, limit: int, edge: Edge | None = None) -> list[Message]:
        """The newest `limit` messages that match, oldest of them first; with `edge` of those that lie before it. Raise Unavailable when
        the engine is away."""
        check(query)
        found: deque[Message] = deque(maxlen=limit)
        with in_words():
            stream = await self.stream()
            filters = await self._filters(query)
            if stream is None or not filters:
                return []
            base, taken = base_of(stream["config"]), -1
            end = await self._end(query, edge, base, stream["state"])
            low = stream["state"]["first_seq"]
            if query.since is not None:
                low = max(low, await self._at(query.since, stream["state"]))
            consumer, pending = await self._newest(filters, limit, low, end)
            while pending > 0 and taken:
                taken = 0
                async with contextlib.aclosing(
                    self._pull(consumer, base, min(pending, _BATCH), wait=False)
                ) as messages:
                    async for message in messages:
                        taken += 1
                        if matches(query, message) and (edge is None or place_of(message) < edge):
                            found.append(message)
                pending -= taken
            await self._forget(consumer)
        return list(found)

    async def follow(self, query: Query) -> AsyncGenerator[Message]:
        """Messages that match as they are stored, for ever; a restart of the engine is waited for and nothing is missed.

        Raise Unavailable when the engine is not there at the beginning.
        """
        check(query)
        with in_words():
            stream = await self.stream()
            base, start = (base_of(stream["config"]) if stream else Base()), 1
            if stream:
                state = stream["state"]
                start = state["last_seq"] + 1 if query.since is None else await self._at(query.since, state)
        while True:
            try:
                with in_words():
                    stream = await self.stream()
                    if stream is not None:
                        if base_of(stream["config"]) != base:  # another stream, whose sequences begin at 1
                            base, start = base_of(stream["config"]), 1
                        async with contextlib.aclosing(self._arriving(query, base, start)) as messages:
                            async for message in messages:
                                start = base.sequence(message.id) + 1
                                if matches(query, message):
                                    yield message
            except Unavailable:
                await self.close()
            await asyncio.sleep(_PAUSE_SECONDS)

    async def tail(self, query: Query, *, most: int = 50, pause: float = 0.25) -> AsyncGenerator[Glimpse]:
        """What is stored from now on, in parts for people: where more than `most` come in a `pause`, the newest are taken and the
        others counted. An engine that is away is waited for."""
        check(query)
        start: int | None = None
        base = Base()
        while True:
            try:
                with in_words():
                    stream = await self.stream()
                    if stream is not None:
                        if base_of(stream["config"]) != base:  # the first look, or another stream
                            start = stream["state"]["last_seq"] + 1 if start is None else 1
                            base = base_of(stream["config"])
                        assert start is not None
                        async with contextlib.aclosing(self._glimpses(query, base, start, most, pause)) as glimpses:
                            async for glimpse in glimpses:
                                if glimpse.messages:
                                    start = base.sequence(glimpse.messages[-1].id) + 1
                                yield glimpse
            except Unavailable:
                await self.close()
                yield Glimpse([], 0)
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _glimpses(self, query: Query, base: Base, start: int, most: int, pause: float) -> AsyncGenerator[Glimpse]:
        """Raise Unavailable when the consumer is gone."""
        filters = await self._filters(query, coming=True)
        if not filters:  # of a device that has never reported
            await asyncio.sleep(_PULL_SECONDS)
            yield Glimpse([], 0)
            return
        # Of a device in any product only subjects that exist can be followed: look for new ones now and then.
        known = query.topic is not None or query.product_key is not None or query.device_name is None
        end = _NEVER if known else time.monotonic() + _LOOK_SECONDS
        consumer, behind = await self._consumer(filters, start)
        while (begun := time.monotonic()) < end:
            skipped = 0
            if behind > 2 * most:
                stream = await self.stream()
                if stream is None:
                    return
                old, end_now = consumer, stream["state"]["last_seq"] + 1
                consumer, _ = await self._newest(filters, most, start, end_now)
                behind, left = await asyncio.gather(self._behind(old), self._behind(consumer))
                skipped = max(0, behind - left)
                await self._forget(old)
            found: list[Message] = []
            for batch, wait in ((1, True), (most, False)):  # the first is waited for, the others are there or not
                async with contextlib.aclosing(self._pull(consumer, base, batch, wait=wait)) as messages:
                    async for message in messages:
                        start = base.sequence(message.id) + 1
                        if matches(query, message):
                            found.append(message)
                if not found:
                    break
            yield Glimpse(found[-most:], skipped + len(found[:-most]))
            if found:
                took = time.monotonic() - begun
                flooded = min(max(pause * _FLOOD_FACTOR, took * _FLOOD_SHARE), _FLOOD_SECONDS)
                await asyncio.sleep(flooded if skipped else pause)
                behind = await self._behind(consumer)
        await self._forget(consumer)

    async def _behind(self, consumer: str) -> int:
        """How many messages that match the consumer has not seen yet."""
        return int((await self._call(f"CONSUMER.INFO.{self._name}.{consumer}"))["num_pending"])

    async def moment(self, message_id: int) -> int:
        """When the message was stored, or the first one after it in this stream (ms); for one of before the stream was made, a time
        that it was not stored before. All of time, where nothing was stored since."""
        with in_words():
            stream = await self.stream()
            if stream is None or message_id <= (base := base_of(stream["config"])).id(0):
                return message_id >> BASE_SHIFT
            client = await self.connected()
            wanted = json.dumps({"seq": base.sequence(message_id), "next_by_subj": ">"}).encode()
            answer = await client.request(f"$JS.API.DIRECT.GET.{self._name}", wanted, timeout=_REQUEST_SECONDS)
        text = (answer.headers or {}).get("Nats-Time-Stamp")
        return moment_of(text) if text else ALL_TIME

    async def _end(self, query: Query, edge: Edge | None, base: Base, state: dict[str, Any]) -> int:
        """The sequence before which the messages lie that `query` asks for."""
        end = int(state["last_seq"]) + 1
        if query.before is not None:
            end = min(end, base.sequence(query.before))
        if query.until is not None:
            end = min(end, await self._at(query.until + 1, state))
        if edge is not None and edge[0] < ALL_TIME:
            first, last = await self._at(edge[0], state), await self._at(edge[0] + 1, state)
            end = min(end, max(first, min(base.sequence(edge[1]), last)))
        return end

    async def _arriving(self, query: Query, base: Base, start: int) -> AsyncGenerator[Message]:
        """Messages from `start` on as they are stored; it raises Unavailable when the consumer is gone."""
        anywhere = query.topic is None and query.product_key is None
        filters = filters_of(None, None) if anywhere else await self._filters(query, coming=True)
        consumer, _ = await self._consumer(filters, start)
        while True:
            async with contextlib.aclosing(self._pull(consumer, base, _BATCH, wait=True)) as messages:
                async for message in messages:
                    yield message

    async def _filters(self, query: Query, *, coming: bool = False) -> list[str]:
        """Subject filters that match what `query` asks for, no two of them overlapping; none when nothing can match.

        `coming`: also for subjects that are not there yet, as far as a device's product is known.
        """
        if query.topic is not None:
            return [to_subject(query.topic)]
        if query.device_name is None or (coming and query.product_key is not None):
            return filters_of(query.product_key, query.device_name)
        # Patterns cost the server a look at every block: 200 ms among 50,000 subjects and a million messages, the device's own
        # subjects 25. And those of a device's name in any product overlap, which a consumer may not have, and match other
        # devices' topics too (`/ota/device/…` for the name `device`). So ask which of its subjects there are.
        found: set[str] = set()
        for pattern in filters_of(query.product_key or "*", query.device_name):
            stream = await self.stream({"subjects_filter": pattern})
            found.update((stream["state"].get("subjects") or {}) if stream else ())
        mine = sorted(subject for subject in found if owner(from_subject(subject))[1] == query.device_name)
        if len(mine) > _MAX_FILTERS:
            raise Rejected(f"device {query.device_name!r} is in too many products; name one with --product")
        return mine

    async def _newest(self, filters: list[str], limit: int, low: int, end: int) -> tuple[str, int]:
        """A consumer that begins where at least `limit` matching messages follow (or all there are) before the sequence `end`,
        and not many more; it looks from the sequence `low`.

        With it how many follow before `end`.
        """
        most = 2 * limit + 100
        if filters == filters_of(None, None):  # all match, and none is ever deleted from their midst
            low = max(low, end - limit)
        low, high, halve = max(1, low), end, False
        beyond = 0
        if end > low:
            after, beyond = await self._consumer(filters, end)
            await self._forget(after)
        consumer, pending = await self._consumer(filters, low)
        pending = max(0, pending - beyond) if end > low else 0
        while pending > most and high - low > 1:
            middle = (low + high) // 2 if halve else end - (end - low) * (limit + most) // (2 * pending)
            middle = min(max(middle, low + 1), high - 1)
            trial, count = await self._consumer(filters, middle)
            count = max(0, count - beyond)
            if count < limit:
                high, unwanted = middle, trial
            else:
                low, pending, consumer, unwanted = middle, count, trial, consumer
            await self._forget(unwanted)
            halve = not halve
        return consumer, pending

    async def _at(self, at: int, state: dict[str, Any]) -> int:
        """The sequence of the first message stored at `at` or later."""
        client = await self.connected()
        body = json.dumps(first_at(at)).encode()
        answer = await client.request(f"$JS.API.DIRECT.GET.{self._name}", body, timeout=_REQUEST_SECONDS)
        return sequence_in(answer.headers or {}, int(state["last_seq"]))

    async def _consumer(self, filters: list[str], start: int) -> tuple[str, int]:
        """(name, how many messages match) of a new consumer from a sequence."""
        name = f"uplinkd-{secrets.token_hex(8)}"
        config = {
            "name": name,
            "ack_policy": "none",
            "filter_subjects": filters,
            "inactive_threshold": _FORGET,
            "mem_storage": True,
            "num_replicas": 1,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": start,
        }
        body = {"stream_name": self._name, "config": config, "action": "create"}
        answer = await self._call(f"CONSUMER.CREATE.{self._name}.{name}", body)
        return name, int(answer["num_pending"])

    async def _forget(self, consumer: str) -> None:
        with contextlib.suppress(Unavailable):
            await self._call(f"CONSUMER.DELETE.{self._name}.{consumer}")

    async def _pull(self, consumer: str, base: Base, batch: int, *, wait: bool) -> AsyncGenerator[Message]:
        """At most `batch` messages: those that are there, or with `wait` also those that come within a moment."""
        client = await self.connected()
        inbox = client.new_inbox()
        subscription = await client.subscribe(inbox)
        body = {"batch": batch} | ({"expires": round(_PULL_SECONDS * 10**9)} if wait else {"no_wait": True})
        try:
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._name}.{consumer}"
            await client.publish(subject, json.dumps(body).encode(), reply=inbox)
            left, end = batch, time.monotonic() + _NEWS_SECONDS
            while left:
                message = await subscription.next_msg(timeout=_PULL_SECONDS + _PATIENCE_SECONDS)
                status = (message.headers or {}).get("Status") if not message.data else None
                if status in (_NO_MESSAGES, _NO_MORE):
                    return
                if status == _NOBODY and left == batch and time.monotonic() < end:
                    await asyncio.sleep(_NEWS_SECONDS / 20)
                    await client.publish(subject, json.dumps(body).encode(), reply=inbox)
                    continue
                if status:
                    raise Unavailable(f"JetStream ended the look at the messages ({status})")
                left -= 1
                told = Told(message.subject, message.data, message.headers or {}, message.reply)
                yield delivered(told, base, self._name)[0]
        finally:
            if not client.is_closed:
                await subscription.unsubscribe()

    async def stream(self, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """`config` and `state` of the stream, None while nothing was ever stored."""
        try:
            return await self._call(f"STREAM.INFO.{self._name}", body)
        except NotThere:
            return None

    async def _call(self, action: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One call of the JetStream API; raise Unavailable with what it says is wrong."""
        return await call(await self.connected(), action, body, patience=_REQUEST_SECONDS)

    async def connected(self) -> Client:
        """The connection; raise Unavailable when the engine does not answer."""
        async with self._connecting:
            if self._client is None or self._client.is_closed:
                self._client = await connect(self._access, "uplinkd reader")
            return self._client


def delivered(told: Told, base: Base, name: str = STREAM) -> tuple[Message, int]:
    """A message that a consumer of the stream `name` was given, and how often it was.

    The reply subject is `$JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.<consumer sequence>.<nanoseconds>.<pending>`; newer
    servers may put a domain and an account in front, and a token behind.
    """
    tokens = told.reply.split(".")
    at = tokens.index(name)
    origin = told.headers.get(ORIGIN_HEADER)
    message_id, moment = base.id(int(tokens[at + 3])), int(tokens[at + 5]) // 10**6
    return _made(message_id, told.subject, moment, told.payload, origin), int(tokens[at + 2])


def _stored_message(document: dict[str, Any], base: Base) -> Message:
    """From what STREAM.MSG.GET answers: headers and data are base64, the time has nanoseconds."""
    headers = base64.b64decode(document.get("hdrs", "")).decode(errors="replace")
    origin = re.search(rf"^{ORIGIN_HEADER}: *(\w+)", headers, re.MULTILINE)
    payload = base64.b64decode(document.get("data", ""))
    moment = moment_of(document["time"])
    return _made(base.id(document["seq"]), document["subject"], moment, payload, origin and origin[1])


def _made(message_id: int, subject: str, at: int, payload: bytes, origin: str | None) -> Message:
    topic = from_subject(subject)
    product_key, device_name = owner(topic)
    return Message(
        id=message_id,
        topic=topic,
        product_key=ProductKey(product_key),
        device_name=DeviceName(device_name),
        generate_time=at,
        payload=payload,
        origin=Origin.named(origin),
    )
