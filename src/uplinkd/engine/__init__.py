"""The message engine: stores what devices report, answers what was stored, keeps what waits for devices, and carries what
gateways tell each other. A Protocol for each of these four."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from uplinkd.core.model import Message, Origin

if TYPE_CHECKING:
    from uplinkd.engine.embedded import Access
    from uplinkd.metrics import Meter
    from uplinkd.settings import Settings

__all__ = [
    "ORIGIN_HEADER",
    "Bus",
    "Done",
    "Downlink",
    "Glimpse",
    "Handler",
    "Publisher",
    "Query",
    "Reader",
    "SessionRecord",
    "StreamState",
    "Told",
    "Waiting",
    "open_publisher",
    "open_reader",
]

ORIGIN_HEADER = "Uplinkd-Origin"
"""Names a stored message's core.model.Origin; what came over HTTPS has no header at all, since that is the hot path."""

Done = Callable[[int, str], None]
"""Called once for each publish: (messageId, "") when it is stored, (0, reason) when it is not."""


@dataclass(frozen=True, slots=True)
class Query:
    """Which stored messages: of a product, of one device of it, of one exact topic; stored at or after `since` and not after
    `until` (ms); with ids below `before`."""

    product_key: str | None = None
    device_name: str | None = None
    topic: str | None = None
    since: int | None = None
    until: int | None = None
    before: int | None = None


@dataclass(frozen=True, slots=True)
class StreamState:
    """How much is stored: messages, and bytes on disk."""

    messages: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What has been stored since the one before: the newest `messages`, oldest of them first, and about how many older ones were
    skipped for them."""

    messages: list[Message]
    skipped: int


class Publisher(Protocol):
    """The hot path of one worker. `publish` never blocks and calls `done` within the settings' publish_timeout."""

    async def start(self) -> None:
        """Begin to connect; return whether or not the engine is there (publishes fail until it is)."""

    async def stop(self) -> None:
        """Wait for what is under way (bounded by publish_timeout), then close."""

    @property
    def connected(self) -> bool: ...

    def publish(self, subject: bytes, payload: bytes, done: Done, origin: Origin = Origin.HTTPS) -> None:
        """Store `payload` under `subject` (see core.subjects)."""


class Reader(Protocol):
    """Looks at stored messages, for the CLI and the console."""

    async def close(self) -> None: ...

    async def latest(self, query: Query, limit: int) -> list[Message]:
        """The newest `limit` messages that match, oldest of them first."""

    def follow(self, query: Query) -> AsyncIterator[Message]:
        """Messages that match as they are stored, for ever; from `query.since` where given, else from now."""

    def tail(self, query: Query, *, most: int = 50, pause: float = 0.25) -> AsyncGenerator[Glimpse]:
        """The same for people who watch: at most `most` messages in `pause` seconds (in a flood less often), however many are
        stored. At least every few seconds one comes, be it empty."""

    async def by_id(self, message_id: int) -> Message | None:
        """The message, None when it is not stored (any more)."""

    async def state(self) -> StreamState: ...


@dataclass(frozen=True, slots=True)
class Told:
    """What came over the bus: `reply` is where an answer goes, empty when none is wanted."""

    subject: str
    payload: bytes
    headers: Mapping[str, str]
    reply: str = ""


Handler = Callable[[Told], None]
"""Called in the event loop for each message; it must not block."""


class Bus(Protocol):
    """What gateways and applications tell each other, at most once: core NATS. It connects by itself and stays connected."""

    @property
    def connected(self) -> bool: ...

    def on_connected(self, act: Callable[[], Awaitable[None]]) -> None:
        """Have `act` awaited each time that the connection stands anew: what was told meanwhile was missed."""

    def tell(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Send; lost while the engine is away."""

    def listen(self, subject: str, handler: Handler, *, queue: str = "") -> Callable[[], None]:
        """Hear what matches `subject` from now on, whatever becomes of the connection; the result ends that.

        Of all listeners of one `queue` just one hears each message.
        """

    async def settled(self) -> None:
        """Return once everything that was to be listened to is heard; raise Unavailable while the engine is away."""

    async def ask(
        self, subject: str, payload: bytes = b"", headers: Mapping[str, str] | None = None, *, patience: float = 2.0
    ) -> Told:
        """The answer; raise Unavailable when there is nobody or none came within `patience` seconds."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A message that waits for a device; `sequence` orders those of one device."""

    id: int
    sequence: int
    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A persistent MQTT session: filter → QoS. `sent` is the sequence up to which waiting messages were sent at least once."""

    subscriptions: dict[str, int]
    sent: int = 0


class Downlink(Protocol):
    """Messages that wait for devices, and the persistent MQTT sessions for which they wait. All of it raises Unavailable.

    `waiting` holds the ids of devices for which something may wait: a device that is not in it costs no look at the
    engine. It is right within moments of a message's acknowledgement, on every gateway. `persistent` holds the ids of
    devices that have a persistent session.
    """

    waiting: set[int]
    persistent: set[int]

    def on_waiting(self, act: Callable[[int], None]) -> None:
        """Have `act` called with the id of a device for which something new waits."""

    async def store(self, device_id: int, topic: str, payload: bytes) -> int:
        """Keep a message for a device; its messageId, once it is stored."""

    async def count(self, device_id: int) -> int:
        """How many messages wait for the device."""

    async def next(self, device_id: int, after: int = 0) -> Waiting | None:
        """The oldest message that waits with a sequence beyond `after`."""

    async def remove(self, sequence: int) -> None:
        """The message has reached its device. One that is gone already is passed over."""

    async def session(self, device_id: int) -> SessionRecord | None: ...

    async def save_session(self, device_id: int, record: SessionRecord) -> None: ...

    async def forget_session(self, device_id: int) -> None: ...


def open_publisher(settings: Settings, access: Access, meter: Meter | None = None) -> Publisher:
    """A publisher for one worker, not started yet."""
    from uplinkd.engine.jetstream import JetStreamPublisher

    return JetStreamPublisher(settings, access, meter)


async def open_reader(access: Access) -> Reader:
    """A reader; raise Unavailable when the engine does not answer."""
    from uplinkd.engine.reader import JetStreamReader

    return await JetStreamReader.open(access)
