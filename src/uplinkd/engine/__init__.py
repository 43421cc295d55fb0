"""The message engine: stores what devices report, answers what was stored, keeps what waits for devices, and carries what
gateways tell each other. A Protocol for each of these four."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from uplinkd.core.groups import Group
from uplinkd.core.model import Message, Origin

if TYPE_CHECKING:
    from uplinkd.engine.embedded import Access
    from uplinkd.metrics import Meter
    from uplinkd.settings import Settings

__all__ = [
    "ORIGIN_HEADER",
    "Bus",
    "DeadLetter",
    "Deliveries",
    "Done",
    "Downlink",
    "Feed",
    "Glimpse",
    "GroupDesk",
    "GroupState",
    "Handler",
    "Publisher",
    "Query",
    "Reader",
    "SessionRecord",
    "StreamState",
    "Taken",
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

    def publish(self, subject: bytes, payload: bytes, done: Done, origin: Origin = Origin.HTTPS, key: str = "") -> None:
        """Store `payload` under `subject` (see core.subjects). What has the same `key` within two minutes is stored once."""


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

    def tell(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None, *, reply: str = "") -> None:
        """Send; lost while the engine is away. Answers go to `reply`."""

    def tell_each(self, told: Sequence[tuple[str, bytes]]) -> None:
        """Send many at once, (subject, payload); lost while the engine is away."""

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

    async def ask_each(self, subject: str, payload: bytes = b"", *, patience: float) -> list[Told]:
        """The answers of all who gave one within `patience` seconds; raise Unavailable while the engine is away."""


class Taken(Protocol):
    """A message that a consumer of a group holds, until it says what became of it. `tries` counts how often it was offered, this
    time included."""

    @property
    def message(self) -> Message: ...
    @property
    def tries(self) -> int: ...

    def accept(self) -> None:
        """It is done with. An acceptance that gets lost on its way makes the message come again."""

    def again(self, after: float = 0.0) -> None:
        """Offer it again, to any consumer of the group, in so many seconds at the earliest."""

    def working(self) -> None:
        """It is still worked on: its time begins anew."""

    async def bury(self, reason: str, tries: int | None = None) -> None:
        """Put it to the dead letters, and be done with it; `tries` where somebody else has counted them. Raise Unavailable, and then
        it is still held."""


class Feed(Protocol):
    """The messages of a group as one consumer gets them: never more than it has asked for."""

    def want(self, count: int) -> None:
        """Ask for `count` messages more."""

    def close(self) -> None:
        """No message comes after this; what was on its way is offered to others."""


class Deliveries(Protocol):
    """Takes messages for consumer groups. An outage of the engine is waited out."""

    def feed(self, group: Group, take: Callable[[Taken], None]) -> Feed:
        """Have `take` called in the event loop with each message of the group that the feed was asked for; it must not block."""


@dataclass(frozen=True, slots=True)
class GroupState:
    """Where a group stands: messages that it has not accepted yet (`lag`), those of them that a consumer holds (`held`), when the
    oldest of them was stored (ms; None without any), how many deliveries have come to an end (`settled`, it only rises, until
    the position is set anew), dead letters, and those of them that are offered again."""

    lag: int
    held: int
    oldest: int | None
    settled: int
    dead: int
    retrying: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that a group did not accept: `number` orders those of a group, `at` is when it was given up (ms)."""

    number: int
    message: Message
    tries: int
    reason: str
    at: int


class GroupDesk(Protocol):
    """What operators look at and do to groups' messages. All of it raises Unavailable."""

    async def close(self) -> None: ...

    async def state(self, group: Group) -> GroupState: ...

    async def dead(self, group: Group, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        """The oldest dead letters with numbers beyond `after`, oldest first."""

    async def dead_letter(self, group: Group, number: int) -> DeadLetter | None: ...

    async def retry(
        self, group: Group, numbers: Sequence[int] | None = None, *, progress: Callable[[int], None] | None = None
    ) -> int:
        """Offer these dead letters, or all that there are now, to the group's consumers again, with all their tries; how many there
        were. `progress` hears how many it were so far, and ends it by raising."""

    async def purge(self, group: Group, numbers: Sequence[int] | None = None) -> int:
        """Throw these dead letters, or all, away; how many there were."""


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

    persistent: set[int]

    @property
    def waiting(self) -> Set[int]: ...

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

    async def claim(self, device_id: int) -> bool:
        """Whether no other gateway is giving the device what waits for it; none will until `unclaim`, or for ten seconds."""

    def unclaim(self, device_id: int) -> None: ...

    async def session(self, device_id: int) -> SessionRecord | None: ...

    async def save_session(self, device_id: int, record: SessionRecord) -> None: ...

    async def forget_session(self, device_id: int) -> None: ...


def open_publisher(settings: Settings, access: Access, meter: Meter | None = None) -> Publisher:
    """A publisher for one worker, not started yet."""
    from uplinkd.engine.jetstream import JetStreamPublisher, PartedPublisher

    return (JetStreamPublisher if settings.partitions == 1 else PartedPublisher)(settings, access, meter)


async def open_reader(access: Access) -> Reader:
    """A reader; raise Unavailable when the engine does not answer."""
    from uplinkd.engine.merged import MergedReader

    return await MergedReader.open(access)
