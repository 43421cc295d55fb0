"""The engine, the bus and what waits for devices in memory: what the real ones do, without their process."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from uplinkd.core.errors import Unavailable
from uplinkd.core.groups import Group, wants
from uplinkd.core.model import DeviceName, Message, Origin, ProductKey
from uplinkd.core.subjects import from_subject
from uplinkd.core.topics import owner
from uplinkd.engine import (
    ORIGIN_HEADER,
    DeadLetter,
    Done,
    Glimpse,
    GroupState,
    Handler,
    Query,
    SessionRecord,
    StreamState,
    Taken,
    Told,
    Waiting,
)
from uplinkd.engine.reader import check, matches
from uplinkd.engine.stream import new_base

__all__ = ["MemoryBus", "MemoryDeliveries", "MemoryDesk", "MemoryDownlink", "MemoryEngine"]

_MAX_PAYLOAD = 1024**2


class MemoryEngine:
    """Publisher and Reader in one; keeps the newest `keep` messages. What is stored is told on `bus`, as NATS does."""

    def __init__(
        self, *, keep: int = 10_000, clock: Callable[[], float] = time.time, bus: MemoryBus | None = None
    ) -> None:
        self._clock = clock
        self._bus = bus
        self._next = new_base(round(clock() * 1000)) + 1
        self._messages: deque[Message] = deque(maxlen=keep)
        self._stored = asyncio.Event()
        self._connected = False
        self._keys: dict[str, int] = {}

    async def start(self) -> None:
        self._connected = True

    async def stop(self) -> None:
        self._connected = False

    async def close(self) -> None:
        self._messages.clear()

    @property
    def connected(self) -> bool:
        return self._connected

    def publish(self, subject: bytes, payload: bytes, done: Done, origin: Origin = Origin.HTTPS, key: str = "") -> None:
        loop = asyncio.get_running_loop()
        if not self._connected:
            loop.call_soon(done, 0, "the engine is away")
            return
        if key and key in self._keys:
            loop.call_soon(done, self._keys[key], "")
            return
        topic = from_subject(subject.decode())
        product_key, device_name = owner(topic)
        message = Message(
            self._next,
            topic,
            ProductKey(product_key),
            DeviceName(device_name),
            round(self._clock() * 1000),
            payload,
            origin,
        )
        self._next += 1
        if key:
            self._keys[key] = message.id
        self._messages.append(message)
        self._stored.set()
        self._stored = asyncio.Event()
        loop.call_soon(done, message.id, "")
        if self._bus:
            headers = {} if origin is Origin.HTTPS else {ORIGIN_HEADER: origin.value}
            self._bus.tell(subject.decode(), payload, headers)

    async def latest(self, query: Query, limit: int) -> list[Message]:
        check(query)
        return [message for message in self._messages if matches(query, message)][-limit:]

    async def by_id(self, message_id: int) -> Message | None:
        return next((message for message in self._messages if message.id == message_id), None)

    async def state(self) -> StreamState:
        return StreamState(len(self._messages), sum(len(message.payload) for message in self._messages))

    async def tail(self, query: Query, *, most: int = 50, pause: float = 0.25) -> AsyncGenerator[Glimpse]:
        check(query)
        last = self._next - 1
        while True:
            await asyncio.sleep(pause)
            found = [each for each in self._messages if each.id > last and matches(query, each)]
            last = self._next - 1
            yield Glimpse(found[-most:], len(found[:-most]))

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


class MemoryBus:
    """One bus that several gateways of a test may share. Nobody hears of what is larger than NATS takes, as there."""

    def __init__(self) -> None:
        self._ears: list[tuple[list[str], str, Handler]] = []
        self._acts: list[Callable[[], Awaitable[None]]] = []
        self._replies = 0
        self.connected = True

    def on_connected(self, act: Callable[[], Awaitable[None]]) -> None:
        self._acts.append(act)

    async def connect(self) -> None:
        """Play that the connection stands anew."""
        self.connected = True
        for act in self._acts:
            await act()

    def tell(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None, *, reply: str = "") -> None:
        if self.connected and len(payload) <= _MAX_PAYLOAD:
            asyncio.get_running_loop().call_soon(self._deliver, Told(subject, payload, dict(headers or {}), reply))

    def tell_each(self, told: Sequence[tuple[str, bytes]]) -> None:
        for subject, payload in told:
            self.tell(subject, payload)

    def listen(self, subject: str, handler: Handler, *, queue: str = "") -> Callable[[], None]:
        ear = (subject.split("."), queue, handler)
        self._ears.append(ear)
        return lambda: self._ears.remove(ear)

    async def settled(self) -> None:
        if not self.connected:
            raise Unavailable("the engine is away")

    async def ask(
        self, subject: str, payload: bytes = b"", headers: Mapping[str, str] | None = None, *, patience: float = 2.0
    ) -> Told:
        self._replies += 1
        inbox = f"_INBOX.memory.{self._replies}"
        answer: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        end = self.listen(inbox, lambda told: None if answer.done() else answer.set_result(told))
        try:
            if not self.connected or not self._deliver(Told(subject, payload, dict(headers or {}), inbox)):
                raise Unavailable("the engine does not answer: nobody is there")
            return await asyncio.wait_for(answer, patience)
        except TimeoutError:
            raise Unavailable("the engine does not answer: it does not answer") from None
        finally:
            end()

    async def ask_each(self, subject: str, payload: bytes = b"", *, patience: float) -> list[Told]:
        if not self.connected:
            raise Unavailable("the engine is away")
        self._replies += 1
        inbox, answers = f"_INBOX.memory.{self._replies}", list[Told]()
        end = self.listen(inbox, answers.append)
        self._deliver(Told(subject, payload, {}, inbox))
        await asyncio.sleep(patience)
        end()
        return answers

    def _deliver(self, told: Told) -> int:
        served: set[str] = set()
        heard = 0
        for pattern, queue, handler in list(self._ears):
            if queue not in served and _hears(pattern, told.subject.split(".")):
                if queue:
                    served.add(queue)
                handler(told)
                heard += 1
        return heard


class MemoryDeliveries:
    """`engine.Deliveries` of one group: what is offered goes to its feeds in turn. Pauses pass `haste` times as fast."""

    def __init__(self, *, haste: float = 1.0) -> None:
        self._haste = haste
        self._waiting: deque[tuple[Message, int]] = deque()
        self._feeds: deque[_MemoryFeed] = deque()
        self.accepted: list[Message] = []
        self.again: list[tuple[Message, float]] = []
        self.buried: list[tuple[Message, str]] = []
        self.working = 0
        self.connected = True

    def offer(self, *messages: Message) -> None:
        self._waiting.extend((message, 1) for message in messages)
        self.distribute()

    def feed(self, group: Group, take: Callable[[Taken], None]) -> _MemoryFeed:
        feed = _MemoryFeed(self, group, take)
        self._feeds.append(feed)
        return feed

    def put_back(self, message: Message, tries: int, after: float = 0.0) -> None:
        def come() -> None:
            self._waiting.append((message, tries))
            self.distribute()

        asyncio.get_running_loop().call_later(after / self._haste, come)

    def drop(self, feed: _MemoryFeed) -> None:
        if feed in self._feeds:
            self._feeds.remove(feed)

    def distribute(self) -> None:
        asyncio.get_running_loop().call_soon(self._distribute)

    def _distribute(self) -> None:
        for _ in range(len(self._waiting)):
            message, tries = self._waiting[0]
            feed = next((each for each in self._feeds if each.wanted > 0 and wants(each.group.plan, message)), None)
            if feed is None:
                return
            self._waiting.popleft()
            self._feeds.remove(feed)
            self._feeds.append(feed)
            feed.wanted -= 1
            feed.take(_MemoryTaken(self, message, tries))


class _MemoryFeed:
    def __init__(self, owner: MemoryDeliveries, group: Group, take: Callable[[Taken], None]) -> None:
        self._owner = owner
        self.group = group
        self.take = take
        self.wanted = 0

    def want(self, count: int) -> None:
        self.wanted += count
        self._owner.distribute()

    def close(self) -> None:
        self._owner.drop(self)


class _MemoryTaken:
    def __init__(self, owner: MemoryDeliveries, message: Message, tries: int) -> None:
        self._owner = owner
        self.message = message
        self.tries = tries

    def accept(self) -> None:
        self._owner.accepted.append(self.message)

    def again(self, after: float = 0.0) -> None:
        self._owner.again.append((self.message, after))
        self._owner.put_back(self.message, self.tries + 1, after)

    def working(self) -> None:
        self._owner.working += 1

    async def bury(self, reason: str, tries: int | None = None) -> None:
        await asyncio.sleep(0)
        if not self._owner.connected:
            raise Unavailable("the engine is away")
        self._owner.buried.append((self.message, reason))


class MemoryDesk:
    """`engine.GroupDesk` of what a test puts in: `states` and `letters` by the group's name. What is offered again is in `offered`."""

    def __init__(self, bus: MemoryBus) -> None:
        self._bus = bus
        self.states: dict[str, GroupState] = {}
        self.letters: dict[str, list[DeadLetter]] = {}
        self.offered: list[DeadLetter] = []

    async def close(self) -> None:
        pass

    async def state(self, group: Group) -> GroupState:
        self._check()
        known = self.states.get(group.name, GroupState(0, 0, None, 0, 0, 0))
        return replace(known, dead=len(self.letters.get(group.name, [])))

    async def dead(self, group: Group, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        self._check()
        return [each for each in self.letters.get(group.name, []) if each.number > after][:limit]

    async def dead_letter(self, group: Group, number: int) -> DeadLetter | None:
        self._check()
        return next((each for each in self.letters.get(group.name, []) if each.number == number), None)

    async def retry(
        self, group: Group, numbers: Sequence[int] | None = None, *, progress: Callable[[int], None] | None = None
    ) -> int:
        taken = self._take(group, numbers)
        self.offered += taken
        if progress:
            progress(len(taken))
        return len(taken)

    async def purge(self, group: Group, numbers: Sequence[int] | None = None) -> int:
        return len(self._take(group, numbers))

    def _take(self, group: Group, numbers: Sequence[int] | None) -> list[DeadLetter]:
        self._check()
        letters = self.letters.get(group.name, [])
        taken = [each for each in letters if numbers is None or each.number in numbers]
        self.letters[group.name] = [each for each in letters if each not in taken]
        return taken

    def _check(self) -> None:
        if not self._bus.connected:
            raise Unavailable("the engine is away")


class MemoryDownlink:
    """`engine.Downlink` for the gateways that share `bus`; at most `limit` messages a device."""

    def __init__(self, bus: MemoryBus, *, limit: int = 100) -> None:
        self._bus = bus
        self._limit = limit
        self._messages: dict[int, list[Waiting]] = {}
        self._sessions: dict[int, SessionRecord] = {}
        self._sequence = 0
        self._acts: list[Callable[[int], None]] = []
        self.waiting: set[int] = set()
        self.persistent: set[int] = set()
        self.looks = 0

    def on_waiting(self, act: Callable[[int], None]) -> None:
        self._acts.append(act)

    async def store(self, device_id: int, topic: str, payload: bytes) -> int:
        self._check()
        self._sequence += 1
        message = Waiting((1 << 62) + self._sequence, self._sequence, topic, payload)
        self._messages[device_id] = [*self._messages.get(device_id, []), message][-self._limit :]
        self.waiting.add(device_id)
        for act in self._acts:
            act(device_id)
        return message.id

    async def count(self, device_id: int) -> int:
        self._check()
        return len(self._messages.get(device_id, []))

    async def next(self, device_id: int, after: int = 0) -> Waiting | None:
        self._check()
        self.looks += 1
        await asyncio.sleep(0)
        found = next((each for each in self._messages.get(device_id, []) if each.sequence > after), None)
        if found is None and not after:
            self.waiting.discard(device_id)
        return found

    async def remove(self, sequence: int) -> None:
        self._check()
        for device_id, messages in self._messages.items():
            self._messages[device_id] = [each for each in messages if each.sequence != sequence]

    async def claim(self, device_id: int) -> bool:
        return True

    def unclaim(self, device_id: int) -> None:
        """Nobody else is there."""

    async def session(self, device_id: int) -> SessionRecord | None:
        self._check()
        return self._sessions.get(device_id)

    async def save_session(self, device_id: int, record: SessionRecord) -> None:
        self._check()
        self._sessions[device_id] = record
        self.persistent.add(device_id)

    async def forget_session(self, device_id: int) -> None:
        self._check()
        self._sessions.pop(device_id, None)
        self.persistent.discard(device_id)

    def _check(self) -> None:
        if not self._bus.connected:
            raise Unavailable("the engine is away")


def _hears(pattern: list[str], subject: list[str]) -> bool:
    for index, level in enumerate(pattern):
        if level == ">":
            return len(subject) > index
        if index == len(subject) or level not in ("*", subject[index]):
            return False
    return len(pattern) == len(subject)
