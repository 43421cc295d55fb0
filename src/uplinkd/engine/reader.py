"""Looks at stored messages with the stock NATS client: for commands and pages, not for the hot path."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from uplinkd.core.errors import Unavailable
from uplinkd.core.model import DeviceName, Message, ProductKey
from uplinkd.core.subjects import filters_of, from_subject, to_subject
from uplinkd.core.topics import owner
from uplinkd.engine import Query
from uplinkd.engine.embedded import Access
from uplinkd.engine.stream import STREAM, base_of

__all__ = ["JetStreamReader"]

_BATCH = 500
_FETCH_SECONDS = 5.0
_POLL_SECONDS = 1.0


class JetStreamReader:
    """Reads the stream UPLINKD; made by `open`, ended by `close`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._jetstream: JetStreamContext = client.jetstream()

    @classmethod
    async def open(cls, access: Access) -> JetStreamReader:
        """Raise Unavailable when the engine does not answer."""

        async def quiet(_: Exception) -> None:
            """What matters comes back as an exception of the call under way."""

        try:
            client = await nats.connect(
                list(access.urls),
                user=access.user or None,
                password=access.password or None,
                token=access.user if access.user and not access.password else None,
                connect_timeout=2,
                max_reconnect_attempts=-1,
                reconnect_time_wait=1,
                allow_reconnect=True,
                error_cb=quiet,
            )
        except (OSError, nats.errors.Error, TimeoutError) as error:
            raise Unavailable(f"the engine at {', '.join(access.urls)} does not answer: {error}") from error
        return cls(client)

    async def close(self) -> None:
        await self._client.close()
        await asyncio.sleep(0)  # its transport closes in the next turn of the loop

    async def count(self) -> int:
        """How many messages are stored."""
        return int((await self._jetstream.stream_info(STREAM)).state.messages)

    async def latest(self, query: Query, limit: int) -> list[Message]:
        """The newest `limit` messages that match, oldest of them first.

        JetStream counts what matches from a sequence on but has no "last N": so the start is sought by bisection.
        """
        state = await self._state()
        if state is None:
            return []
        first, last, base = state
        if query.since is not None:
            first = max(first, last + 1 - await self._count(Query(since=query.since), first))
        low = high = last + 1
        step = 4 * limit
        while low > first and await self._count(query, low) < limit:
            high, low, step = low, max(first, low - step), 4 * step
        while high - low > 4 * limit:
            middle = (low + high) // 2
            if await self._count(query, middle) < limit:
                high = middle
            else:
                low = middle
        found: list[Message] = []
        async for message in self._read(query, low, base, follow=False):
            found.append(message)
            if len(found) > 2 * limit + _BATCH:
                found = found[-limit:]
        return found[-limit:]

    async def follow(self, query: Query) -> AsyncIterator[Message]:
        """Messages that match as they are stored, for ever; a connection that breaks is made again and nothing is missed."""
        state = await self._state()
        while state is None:
            await asyncio.sleep(_POLL_SECONDS)
            state = await self._state()
        first, last, base = state
        start = last + 1
        if query.since is not None:
            start = max(first, last + 1 - await self._count(Query(since=query.since), first))
        async for message in self._read(query, start, base, follow=True):
            yield message

    async def _read(self, query: Query, start: int, base: int, *, follow: bool) -> AsyncIterator[Message]:
        while True:
            try:
                subscription = await self._consumer(query, start)
                while True:
                    pending = (await subscription.consumer_info()).num_pending if not follow else _BATCH
                    if not pending:
                        return
                    for raw in await self._fetch(subscription, min(pending, _BATCH), follow=follow):
                        message = _message(raw, base)
                        start = message.id - base + 1
                        yield message
            except (nats.errors.Error, nats.js.errors.Error, TimeoutError, OSError) as error:
                if not follow:
                    raise Unavailable(f"the engine did not answer: {error}") from error
                await asyncio.sleep(_POLL_SECONDS)

    async def _fetch(self, subscription: JetStreamContext.PullSubscription, count: int, *, follow: bool) -> list[Msg]:
        try:
            return await subscription.fetch(count, timeout=_POLL_SECONDS if follow else _FETCH_SECONDS)
        except TimeoutError:
            if follow and self._client.is_connected:
                await subscription.consumer_info()  # raises when the consumer has gone
                return []
            raise

    async def _consumer(self, query: Query, start: int) -> JetStreamContext.PullSubscription:
        info = await self._jetstream.add_consumer(STREAM, _config(query, start))
        return await self._jetstream.pull_subscribe_bind(consumer=info.name, stream=STREAM)

    async def _count(self, query: Query, start: int) -> int:
        """How many messages match from the sequence `start` on (or from query.since on, where it is given alone)."""
        try:
            info = await self._jetstream.add_consumer(STREAM, _config(query, start))
            await self._jetstream.delete_consumer(STREAM, info.name)
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
            raise Unavailable(f"the engine did not answer: {error}") from error
        return info.num_pending or 0

    async def _state(self) -> tuple[int, int, int] | None:
        """(first sequence, last sequence, base), or None while nothing was ever stored."""
        try:
            info = await self._jetstream.stream_info(STREAM)
        except nats.js.errors.NotFoundError:
            return None
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
            raise Unavailable(f"the engine did not answer: {error}") from error
        return (
            info.state.first_seq,
            info.state.last_seq,
            base_of({"subjects": info.config.subjects, "metadata": info.config.metadata}),
        )


def _config(query: Query, start: int) -> ConsumerConfig:
    subjects = [to_subject(query.topic)] if query.topic else filters_of(query.product_key, query.device_name)
    alone = query.since is not None and query == Query(since=query.since)
    return ConsumerConfig(
        ack_policy=AckPolicy.NONE,
        deliver_policy=DeliverPolicy.BY_START_TIME if alone else DeliverPolicy.BY_START_SEQUENCE,
        opt_start_seq=None if alone else max(start, 1),
        opt_start_time=datetime.fromtimestamp(query.since / 1000, UTC) if alone and query.since is not None else None,
        filter_subjects=subjects,
        mem_storage=True,
        inactive_threshold=30,
    )


def _message(raw: Msg, base: int) -> Message:
    topic = from_subject(raw.subject)
    product_key, device_name = owner(topic)
    stored = raw.metadata
    return Message(
        base + stored.sequence.stream,
        topic,
        ProductKey(product_key),
        DeviceName(device_name),
        int(stored.timestamp.timestamp() * 1000),
        raw.data,
    )
