"""Looks at what is stored, with the stock client: the newest messages that match a query, and those that arrive.

JetStream has no "last N". A consumer that begins at a sequence says how many messages match from there on, so the right
sequence is found by interpolation, and by halving where messages are spread unevenly.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
from collections import deque
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import nats
import nats.errors

from uplinkd.core.errors import Refused, Rejected, Unavailable
from uplinkd.core.model import DeviceName, Message, Origin, ProductKey
from uplinkd.core.subjects import filters_of, from_subject, to_subject
from uplinkd.core.topics import owner, parse
from uplinkd.engine import ORIGIN_HEADER, Query
from uplinkd.engine.api import NotThere, call, connect, in_words
from uplinkd.engine.embedded import Access
from uplinkd.engine.stream import STREAM, base_of

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

__all__ = ["JetStreamReader", "check", "matches"]

_REQUEST_SECONDS = 5.0
_PULL_SECONDS = 2.0
_BATCH = 256
_MAX_FILTERS = 10_000
_PAUSE_SECONDS = 0.2
_PATIENCE_SECONDS = 2.0
# A consumer is deleted after use; the server forgets those that could not be.
_FORGET = 30 * 10**9
_NAME = re.compile(r"[A-Za-z0-9_@.:-]{1,64}")
_NO_MESSAGES, _NO_MORE = "404", "408"


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


def matches(query: Query, message: Message) -> bool:
    """Whether `query` asks for `message`."""
    return (
        (query.product_key is None or message.product_key == query.product_key)
        and (query.device_name is None or message.device_name == query.device_name)
        and (query.topic is None or message.topic == query.topic)
        and (query.since is None or message.generate_time >= query.since)
    )


class JetStreamReader:
    """Made by `open`, ended by `close`. After a connection was lost it connects anew, wherever the engine is then."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._client: Client | None = None

    @classmethod
    async def open(cls, access: Access) -> JetStreamReader:
        """Raise Unavailable when the engine does not answer."""
        reader = cls(access)
        await reader._connected()
        return reader

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await client.close()
            await asyncio.sleep(0)  # its transport closes in the next turn of the loop

    async def count(self) -> int:
        """How many messages are stored."""
        with in_words():
            stream = await self._stream()
        return int(stream["state"]["messages"]) if stream else 0

    async def latest(self, query: Query, limit: int) -> list[Message]:
        """The newest `limit` messages that match, oldest of them first. Raise Unavailable when the engine is away."""
        check(query)
        found: deque[Message] = deque(maxlen=limit)
        with in_words():
            stream = await self._stream()
            filters = await self._filters(query)
            if stream is None or not filters:
                return []
            consumer, pending = await self._newest(filters, limit, stream["state"], query.since)
            base, taken = base_of(stream["config"]), -1
            while pending > 0 and taken:
                taken = 0
                async with contextlib.aclosing(
                    self._pull(consumer, base, min(pending, _BATCH), wait=False)
                ) as messages:
                    async for message in messages:
                        taken += 1
                        if matches(query, message):
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
            stream = await self._stream()
        base = base_of(stream["config"]) if stream else 0
        start = stream["state"]["last_seq"] + 1 if stream and query.since is None else 1
        since = query.since
        while True:
            try:
                with in_words():
                    stream = await self._stream()
                    if stream is not None:
                        if base_of(stream["config"]) != base:  # another stream, whose sequences begin at 1
                            base, start = base_of(stream["config"]), 1
                        async with contextlib.aclosing(self._arriving(query, base, start, since)) as messages:
                            async for message in messages:
                                start, since = message.id - base + 1, None
                                if matches(query, message):
                                    yield message
            except Unavailable:
                await self.close()
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _arriving(self, query: Query, base: int, start: int, since: int | None) -> AsyncGenerator[Message]:
        """Messages from `start` on as they are stored; it raises Unavailable when the consumer is gone."""
        anywhere = query.topic is None and query.product_key is None
        filters = filters_of(None, None) if anywhere else await self._filters(query)
        consumer, _ = await self._consumer(filters, start, since)
        while True:
            async with contextlib.aclosing(self._pull(consumer, base, _BATCH, wait=True)) as messages:
                async for message in messages:
                    yield message

    async def _filters(self, query: Query) -> list[str]:
        """Subject filters that match what `query` asks for, no two of them overlapping; none when nothing can match."""
        if query.topic is not None:
            return [to_subject(query.topic)]
        if query.product_key is not None or query.device_name is None:
            return filters_of(query.product_key, query.device_name)
        # A device's name in any product: such filters overlap, which a consumer may not have, and match other devices'
        # topics too (`/ota/device/…` for the name `device`). So ask which of its subjects there are.
        found: set[str] = set()
        for pattern in filters_of("*", query.device_name):
            stream = await self._stream({"subjects_filter": pattern})
            found.update((stream["state"].get("subjects") or {}) if stream else ())
        mine = sorted(subject for subject in found if owner(from_subject(subject))[1] == query.device_name)
        if len(mine) > _MAX_FILTERS:
            raise Rejected(f"device {query.device_name!r} is in too many products; name one with --product")
        return mine

    async def _newest(
        self, filters: list[str], limit: int, state: dict[str, Any], since: int | None
    ) -> tuple[str, int]:
        """A consumer that begins where at least `limit` matching messages follow (or all there are) and not many more.

        With it how many follow.
        """
        most = 2 * limit + 100
        low, high = max(1, state["first_seq"]), state["last_seq"] + 1
        end, halve = high, False
        consumer, pending = await self._consumer(filters, low, since)
        while pending > most and high - low > 1:
            middle = (low + high) // 2 if halve else end - (end - low) * (limit + most) // (2 * pending)
            middle = min(max(middle, low + 1), high - 1)
            trial, count = await self._consumer(filters, middle, None)
            if count < limit:
                high, unwanted = middle, trial
            else:
                low, pending, consumer, unwanted = middle, count, trial, consumer
            await self._forget(unwanted)
            halve = not halve
        return consumer, pending

    async def _consumer(self, filters: list[str], start: int, since: int | None) -> tuple[str, int]:
        """(name, how many messages match) of a new consumer from a sequence, or from a time where `since` is given."""
        name = f"uplinkd-{secrets.token_hex(8)}"
        begin: dict[str, Any] = {"deliver_policy": "by_start_sequence", "opt_start_seq": start}
        if since is not None:
            moment = datetime.fromtimestamp(since / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
            begin = {"deliver_policy": "by_start_time", "opt_start_time": f"{moment}.{since % 1000:03d}Z"}
        config = {
            "name": name,
            "ack_policy": "none",
            "filter_subjects": filters,
            "inactive_threshold": _FORGET,
            "mem_storage": True,
            "num_replicas": 1,
            **begin,
        }
        body = {"stream_name": STREAM, "config": config, "action": "create"}
        answer = await self._call(f"CONSUMER.CREATE.{STREAM}.{name}", body)
        return name, int(answer["num_pending"])

    async def _forget(self, consumer: str) -> None:
        with contextlib.suppress(Unavailable):
            await self._call(f"CONSUMER.DELETE.{STREAM}.{consumer}")

    async def _pull(self, consumer: str, base: int, batch: int, *, wait: bool) -> AsyncGenerator[Message]:
        """At most `batch` messages: those that are there, or with `wait` also those that come within a moment."""
        client = await self._connected()
        inbox = client.new_inbox()
        subscription = await client.subscribe(inbox)
        body = {"batch": batch} | ({"expires": round(_PULL_SECONDS * 10**9)} if wait else {"no_wait": True})
        try:
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{consumer}"
            await client.publish(subject, json.dumps(body).encode(), reply=inbox)
            for _ in range(batch):
                message = await subscription.next_msg(timeout=_PULL_SECONDS + _PATIENCE_SECONDS)
                status = (message.headers or {}).get("Status") if not message.data else None
                if status in (_NO_MESSAGES, _NO_MORE):
                    return
                if status:
                    raise Unavailable(f"JetStream ended the look at the messages ({status})")
                yield _message(message, base)
        finally:
            if not client.is_closed:
                await subscription.unsubscribe()

    async def _stream(self, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """`config` and `state` of the stream, None while nothing was ever stored."""
        try:
            return await self._call(f"STREAM.INFO.{STREAM}", body)
        except NotThere:
            return None

    async def _call(self, action: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One call of the JetStream API; raise Unavailable with what it says is wrong."""
        return await call(await self._connected(), action, body, patience=_REQUEST_SECONDS)

    async def _connected(self) -> Client:
        if self._client is not None and not self._client.is_closed:
            return self._client
        self._client = await connect(self._access, "uplinkd reader")
        return self._client


def _message(message: Msg, base: int) -> Message:
    """The reply subject is `$JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.<consumer sequence>.<nanoseconds>.<pending>`;
    newer servers may put a domain and an account in front, and a token behind."""
    tokens = message.reply.split(".")
    at = tokens.index(STREAM)
    topic = from_subject(message.subject)
    product_key, device_name = owner(topic)
    return Message(
        id=base + int(tokens[at + 3]),
        topic=topic,
        product_key=ProductKey(product_key),
        device_name=DeviceName(device_name),
        generate_time=int(tokens[at + 5]) // 10**6,
        payload=message.data,
        origin=Origin((message.headers or {}).get(ORIGIN_HEADER, Origin.HTTPS)),
    )
