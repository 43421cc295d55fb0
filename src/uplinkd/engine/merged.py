"""Reads the messages of however many streams as if there were one, in the order in which they were stored.

How many there are stands in the metadata of the first, see engine.stream. With one, its reader is all there is. What is asked of
one device is asked of its stream alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import replace

from uplinkd.core.errors import Unavailable
from uplinkd.core.model import Message
from uplinkd.core.subjects import to_subject
from uplinkd.engine import Glimpse, Query, StreamState
from uplinkd.engine.api import in_words
from uplinkd.engine.embedded import Access
from uplinkd.engine.reader import JetStreamReader, check, place_of
from uplinkd.engine.stream import part_for, part_of, parts
from uplinkd.tasks import end_tasks

__all__ = ["MergedReader"]

_PAUSE_SECONDS = 0.2
# What is followed in several streams is put in order among what comes within this time.
_GRACE_SECONDS = 0.1
_MOST_AHEAD = 1000
_EMPTY_SECONDS = 3.0


class MergedReader:
    """Made by `open`, ended by `close`."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._readers: list[JetStreamReader] = [JetStreamReader(access)]
        self._known = False

    @classmethod
    async def open(cls, access: Access) -> MergedReader:
        """Raise Unavailable when the engine does not answer."""
        reader = cls(access)
        await reader._readers[0].connected()
        return reader

    async def close(self) -> None:
        for reader in self._readers:
            await reader.close()

    async def state(self) -> StreamState:
        """How much is stored; raise Unavailable when the engine is away."""
        found = await asyncio.gather(*(reader.state() for reader in await self._all()))
        return StreamState(sum(each.messages for each in found), sum(each.bytes for each in found))

    async def by_id(self, message_id: int) -> Message | None:
        """The message; None for an id that was never given, or of a message that is gone."""
        readers = await self._all()
        return await readers[message_id % len(readers)].by_id(message_id)

    async def latest(self, query: Query, limit: int) -> list[Message]:
        """The newest `limit` messages that match, oldest of them first. Raise Unavailable when the engine is away."""
        check(query)
        readers = await self._asked(query)
        if query.before is None or len(self._readers) == 1:
            found = await asyncio.gather(*(reader.latest(query, limit) for reader in readers))
        else:
            mine = self._readers[query.before % len(self._readers)]
            edge = await mine.moment(query.before), query.before
            other = replace(query, before=None)
            found = await asyncio.gather(
                *(
                    reader.latest(query, limit) if reader is mine else reader.latest(other, limit, edge)
                    for reader in readers
                )
            )
        return list(heapq.merge(*found, key=place_of))[-limit:]

    async def follow(self, query: Query) -> AsyncGenerator[Message]:
        """Messages that match as they are stored, for ever: those of a device in order, those of several nearly so. A restart of the
        engine is waited for and nothing is missed.

        Raise Unavailable when the engine is not there at the beginning.
        """
        check(query)
        readers = await self._asked(query)
        while not self._known:  # the streams will come, and nothing in them is older than this call
            query = replace(query, since=query.since or 0)
            await asyncio.sleep(_PAUSE_SECONDS)
            with contextlib.suppress(Unavailable):
                readers = await self._asked(query)
        sources = [reader.follow(query) for reader in readers]
        async with contextlib.aclosing(sources[0] if len(sources) == 1 else _in_order(sources)) as messages:
            async for message in messages:
                yield message

    async def tail(self, query: Query, *, most: int = 50, pause: float = 0.25) -> AsyncGenerator[Glimpse]:
        """What is stored from now on, in parts for people: where more than `most` come in a `pause`, the newest are taken and the
        others counted. An engine that is away is waited for."""
        check(query)
        while True:
            with contextlib.suppress(Unavailable):
                readers = await self._asked(query)
                if self._known:
                    break
            yield Glimpse([], 0)
            await asyncio.sleep(_PAUSE_SECONDS)
        sources = [reader.tail(query, most=most, pause=pause) for reader in readers]
        glimpses = sources[0] if len(sources) == 1 else _together(sources, most, pause)
        async with contextlib.aclosing(glimpses):
            async for glimpse in glimpses:
                yield glimpse

    async def _all(self) -> list[JetStreamReader]:
        """The readers of all streams; that of the first while there is none."""
        if not self._known:
            with in_words():
                stream = await self._readers[0].stream()
            if stream is not None and not self._known:
                rest = parts(part_of(stream["config"]).count)[1:]
                self._readers += [JetStreamReader(self._access, part.name) for part in rest]
                self._known = True
        return self._readers

    async def _asked(self, query: Query) -> list[JetStreamReader]:
        """The readers of the streams in which what `query` asks for may be."""
        readers = await self._all()
        topic = query.topic
        if topic is None and query.product_key is not None and query.device_name is not None:
            topic = f"/{query.product_key}/{query.device_name}/"
        return readers if topic is None else [readers[part_for(to_subject(topic), len(readers)).number]]


async def _in_order(sources: list[AsyncGenerator[Message]]) -> AsyncGenerator[Message]:
    """What comes from all of them. Each keeps its order; among them it is that of storing, for what comes within a moment."""
    ahead: list[deque[Message]] = [deque() for _ in sources]
    came, room = asyncio.Event(), asyncio.Event()

    async def pump(source: AsyncGenerator[Message], mine: deque[Message]) -> None:
        async with contextlib.aclosing(source):
            async for message in source:
                mine.append(message)
                came.set()
                while len(mine) >= _MOST_AHEAD:
                    room.clear()
                    await room.wait()

    tasks = [asyncio.create_task(pump(source, mine)) for source, mine in zip(sources, ahead, strict=True)]
    try:
        while True:
            await _until(came, tasks)
            end = time.monotonic() + _GRACE_SECONDS
            while not all(ahead) and (left := end - time.monotonic()) > 0:
                came.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await came.wait()
            complete = all(ahead)
            came.clear()
            # Where each has something, what is older than all that may still come; else what there is.
            while all(ahead) if complete else any(ahead):
                yield min((mine for mine in ahead if mine), key=lambda mine: place_of(mine[0])).popleft()
            room.set()
            if any(ahead):
                came.set()
    finally:
        await end_tasks(*tasks)


async def _together(sources: list[AsyncGenerator[Glimpse]], most: int, pause: float) -> AsyncGenerator[Glimpse]:
    """One glimpse of what all of them have shown in a `pause`."""
    messages: list[Message] = []
    skipped = 0
    came = asyncio.Event()

    async def pump(source: AsyncGenerator[Glimpse]) -> None:
        nonlocal messages, skipped
        async with contextlib.aclosing(source):
            async for glimpse in source:
                if glimpse.messages or glimpse.skipped:
                    found = list(heapq.merge(messages, glimpse.messages, key=place_of))
                    skipped += glimpse.skipped + len(found[:-most])
                    messages = found[-most:]
                    came.set()

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EMPTY_SECONDS):
                    await _until(came, tasks)
                    await asyncio.sleep(pause)
            came.clear()
            shown, messages = Glimpse(messages, skipped), []
            skipped = 0
            yield shown
    finally:
        await end_tasks(*tasks)


async def _until(came: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    """Return once it is set; raise what has ended one of the tasks, which go on for ever."""
    waiting = asyncio.create_task(came.wait())
    try:
        done, _ = await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {waiting}:
            await task
    finally:
        await end_tasks(waiting)
