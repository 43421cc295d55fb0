"""The message engine: stores what devices report and answers what was stored. One Protocol for writing, one for reading."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from uplinkd.core.model import Message

if TYPE_CHECKING:
    from uplinkd.engine.embedded import Access
    from uplinkd.settings import Settings

__all__ = ["Done", "Publisher", "Query", "Reader", "open_publisher", "open_reader"]

Done = Callable[[int, str], None]
"""Called once for each publish: (messageId, "") when it is stored, (0, reason) when it is not."""


@dataclass(frozen=True, slots=True)
class Query:
    """Which stored messages: of a product, of one device of it, of one exact topic; stored at or after `since` (ms)."""

    product_key: str | None = None
    device_name: str | None = None
    topic: str | None = None
    since: int | None = None


class Publisher(Protocol):
    """The hot path of one worker. `publish` never blocks and calls `done` within the settings' publish_timeout."""

    async def start(self) -> None:
        """Begin to connect; return whether or not the engine is there (publishes fail until it is)."""

    async def stop(self) -> None:
        """Wait for what is under way (bounded by publish_timeout), then close."""

    @property
    def connected(self) -> bool: ...

    def publish(self, subject: bytes, payload: bytes, done: Done) -> None:
        """Store `payload` under `subject` (see core.subjects)."""


class Reader(Protocol):
    """Looks at stored messages, for the CLI and the console."""

    async def close(self) -> None: ...

    async def latest(self, query: Query, limit: int) -> list[Message]:
        """The newest `limit` messages that match, oldest of them first."""

    def follow(self, query: Query) -> AsyncIterator[Message]:
        """Messages that match as they are stored, for ever; from `query.since` where given, else from now."""


def open_publisher(settings: Settings, access: Access) -> Publisher:
    """A publisher for one worker, not started yet."""
    from uplinkd.engine.jetstream import JetStreamPublisher

    return JetStreamPublisher(settings, access)


async def open_reader(access: Access) -> Reader:
    """A reader; raise Unavailable when the engine does not answer."""
    from uplinkd.engine.reader import JetStreamReader

    return await JetStreamReader.open(access)
