"""An engine in memory: what the real one does, without its process. Messages are gone with it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from uplinkd.core.model import DeviceName, Message, ProductKey
from uplinkd.core.subjects import from_subject
from uplinkd.core.topics import owner
from uplinkd.engine import Done, Query
from uplinkd.engine.reader import check, matches
from uplinkd.engine.stream import new_base

__all__ = ["MemoryEngine"]


class MemoryEngine:
    """Publisher and Reader in one; keeps the newest `keep` messages."""

    def __init__(self, *, keep: int = 10_000, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._next = new_base(round(clock() * 1000)) + 1
        self._messages: deque[Message] = deque(maxlen=keep)
        self._stored = asyncio.Event()
        self._connected = False

    async def start(self) -> None:
        self._connected = True

    async def stop(self) -> None:
        self._connected = False

    async def close(self) -> None:
        self._messages.clear()

    @property
    def connected(self) -> bool:
        return self._connected

    def publish(self, subject: bytes, payload: bytes, done: Done) -> None:
        loop = asyncio.get_running_loop()
        if not self._connected:
            loop.call_soon(done, 0, "the engine is away")
            return
        topic = from_subject(subject.decode())
        product_key, device_name = owner(topic)
        message = Message(
            self._next, topic, ProductKey(product_key), DeviceName(device_name), round(self._clock() * 1000), payload
        )
        self._next += 1
        self._messages.append(message)
        self._stored.set()
        self._stored = asyncio.Event()
        loop.call_soon(done, message.id, "")

    async def latest(self, query: Query, limit: int) -> list[Message]:
        check(query)
        return [message for message in self._messages if matches(query, message)][-limit:]

    async def follow(self, query: Query) -> AsyncIterator[Message]:
        check(query)
        last = self._next - 1 if query.since is None else 0
        while True:
            stored = self._stored
            for message in [each for each in self._messages if each.id > last]:
                last = message.id
                if matches(query, message):
                    yield message
            await stored.wait()
