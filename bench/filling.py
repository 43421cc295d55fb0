"""Stores many messages in the engine of a data folder, before a server is started on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uplinkd.core.subjects import to_subject
from uplinkd.engine import open_publisher
from uplinkd.engine.embedded import EmbeddedServer
from uplinkd.settings import Settings

__all__ = ["fill"]

_UNDER_WAY = 20_000


async def fill(settings: Settings, count: int, topic: Callable[[int], str]) -> None:
    """`count` small messages, the n-th under `topic(n)`."""
    engine = EmbeddedServer.start(settings)
    try:
        publisher = open_publisher(settings, engine.access)
        await publisher.start()
        while not publisher.connected:
            await asyncio.sleep(0.05)
        stored = 0

        def done(message_id: int, fault: str) -> None:
            nonlocal stored
            if fault:
                raise SystemExit(f"a message of the benchmark was not stored: {fault}")
            stored += message_id > 0

        for number in range(count):
            publisher.publish(to_subject(topic(number)).encode(), b'{"temperature":21.5,"number":%d}' % number, done)
            if number - stored > _UNDER_WAY:
                while number - stored > _UNDER_WAY // 4:
                    await asyncio.sleep(0.002)
        while stored < count:
            await asyncio.sleep(0.01)
        await publisher.stop()
    finally:
        engine.stop()
