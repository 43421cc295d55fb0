"""Takes messages for consumer groups: each feed pulls from its group's durable consumer what was asked for, and from what is offered
to the group again.

A pull is one request for several messages, which come one by one. The feed counts what is still on its way, and asks anew when
that is less than what is wanted; after an outage, or a silence that is too long, it begins again. What a consumer holds
outlives the connection: its answer goes wherever the engine is then.

Where there are several streams the group has a consumer in each, and what is wanted is divided among them: never more is asked for, in
all of them together, than is wanted. What was asked of a stream that has nothing is missing elsewhere; so such requests are
short, and while other streams give, it is only looked at now and then.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from uplinkd.core.errors import Unavailable
from uplinkd.core.groups import Group, wants
from uplinkd.core.model import Message
from uplinkd.engine import Bus, Taken, Told
from uplinkd.engine.groups import RETRIED, RETRY, buried, bury, consumer_name, ensure, retry_name
from uplinkd.engine.reader import delivered
from uplinkd.engine.stream import Base, Part, parts
from uplinkd.observe import Occasionally
from uplinkd.tasks import spawn

__all__ = ["JetStreamDeliveries"]

log = logging.getLogger("uplinkd.engine")

_EXPIRES = 30.0
_HEARTBEAT = 5.0
# Of several streams: how long all of them may be waited for in turn, how long one at least, and how often one is looked at that had
# nothing.
_ROUND, _SHORTEST_WAIT, _PROBE = 0.25, 0.01, 0.05
_SILENCE, _SILENCE_OF_SEVERAL = 3 * _HEARTBEAT, 3.0
_LOOK_SECONDS = 2.0
_GONE_SECONDS = 1.0
_RETRY_LOOKS = 5  # in so many looks once for what is offered again: a note tells of most
_LARGEST_PULL, _LARGEST_BYTES = 1000, 4 * 1024**2
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
# A feed that is closed hears on for a moment, and gives back what is on its way. Not at once: JetStream would send it here again,
# as long as somebody hears.
_CLOSING_SECONDS, _GIVEN_BACK_SECONDS = 0.1, 0.3
# Answers that wait for an engine that is away; those beyond are lost, and their messages come again.
_MOST_ANSWERS = 200_000
_ACK, _WORKING = b"+ACK", b"+WPI"


class JetStreamDeliveries:
    """`engine.Deliveries` of one process, over its bus. Made in the event loop."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self._feeds: set[_Feed] = set()
        self._answers: deque[tuple[str, bytes]] = deque(maxlen=_MOST_ANSWERS)
        self._scheduled = False
        self._tasks: set[asyncio.Task[None]] = set()
        bus.on_connected(self._connected)

    def feed(self, group: Group, take: Callable[[Taken], None]) -> _Feed:
        feed = _Feed(self, group, take)
        self._feeds.add(feed)
        feed.begin()
        return feed

    def answer(self, reply: str, payload: bytes) -> None:
        """Say what became of a message; what is said in one turn of the event loop leaves together."""
        self._answers.append((reply, payload))
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def forget(self, feed: _Feed) -> None:
        self._feeds.discard(feed)

    def spawn(self, act: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `act`, owned by all feeds together."""
        return spawn(act, self._tasks)

    async def close(self) -> None:
        """Close every feed, and let what was said leave."""
        for feed in list(self._feeds):
            feed.close()
        self._flush()

    def _flush(self) -> None:
        self._scheduled = False
        if self._answers and self.bus.connected:
            self.bus.tell_each(list(self._answers))
            self._answers.clear()

    async def _connected(self) -> None:
        self._flush()
        for feed in self._feeds:
            feed.begin_anew()


@dataclass(slots=True, eq=False)
class _Feed:
    """Of one group. `wanted` more messages may be taken; `asked` are on their way from each stream; `spare` came though nobody wanted
    them."""

    owner: JetStreamDeliveries
    group: Group
    take: Callable[[Taken], None]
    wanted: int = 0
    asked: list[int] = field(default_factory=lambda: [0])
    spare: deque[_Taken] = field(default_factory=deque)
    bases: list[Base] = field(default_factory=lambda: [Base()])
    parts: list[Part] = field(default_factory=lambda: parts(1))
    dry: dict[int, float] = field(default_factory=dict)  # the streams that had nothing, and when they were asked
    turn: int = 0
    heard: list[float] = field(default_factory=lambda: [0.0])
    ready: bool = False
    closed: bool = False
    inbox: str = field(default_factory=lambda: f"_INBOX.group.{secrets.token_hex(8)}")
    stirred: asyncio.Event = field(default_factory=asyncio.Event)
    ends: list[Callable[[], None]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        listen = self.owner.bus.listen
        self.ends = [
            listen(f"{self.inbox}.*", self._told),
            listen(f"{RETRIED}{self.group.id}", lambda _: self._pull_retries()),
        ]
        self.task = self.owner.spawn(self.run())

    def want(self, count: int) -> None:
        self.wanted += count
        while self.spare and self.wanted > 0:
            self._give(self.spare.popleft())
        self._pull()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.owner.forget(self)
        while self.spare:
            self.spare.popleft().again(_GIVEN_BACK_SECONDS)
        if self.task:
            self.task.cancel()
        asyncio.get_running_loop().call_later(_CLOSING_SECONDS, self._end)

    def _end(self) -> None:
        for end in self.ends:
            end()

    def begin_anew(self) -> None:
        """What was asked for is lost: see that the consumer is there, and ask again."""
        self.ready = False
        self.stirred.set()

    async def run(self) -> None:
        """See that the consumer is there, and look after what was asked for, until cancelled."""
        clock = asyncio.get_running_loop().time
        pause, warn, look = _FIRST_PAUSE, Occasionally(30), 0
        while True:
            if not self.ready:
                try:
                    self.bases = await ensure(self.owner.bus, self.group)
                except Unavailable as fault:
                    if warn() and self.owner.bus.connected:
                        log.warning("consumer group %s: %s", self.group.name, fault)
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
                    continue
                pause = _FIRST_PAUSE
                self.parts, self.asked = parts(len(self.bases)), [0] * len(self.bases)
                self.ready, self.heard, self.dry = True, [clock()] * len(self.bases), {}
                self.stirred.clear()
                self._pull()
                self._pull_retries()
            try:
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self.stirred.wait()
            except TimeoutError:
                look += 1
                if look % _RETRY_LOOKS == 0:
                    self._pull_retries()
                silence = _SILENCE if len(self.parts) == 1 else _SILENCE_OF_SEVERAL
                now = clock()
                if any(asked and now - at > silence for asked, at in zip(self.asked, self.heard, strict=True)):
                    self.ready = False

    def _pull(self) -> None:
        if len(self.parts) > 1:
            self._pull_of_several()
            return
        missing = min(self.wanted - self.asked[0], _LARGEST_PULL)
        # Not for each message that is done with: requests double until as many are on their way as are wanted.
        if not self.ready or self.closed or missing <= 0 or (self.asked[0] > missing):
            return
        self._ask(0, missing, {"expires": round(_EXPIRES * 1e9), "idle_heartbeat": round(_HEARTBEAT * 1e9)})

    def _pull_of_several(self) -> None:
        room = self.wanted - sum(self.asked)
        if not self.ready or self.closed or room <= 0:
            return
        now = asyncio.get_running_loop().time()
        count = len(self.parts)
        giving = [number for number in range(count) if number not in self.dry]
        if giving:
            for number, asked_at in self.dry.items():
                if room > 0 and not self.asked[number] and now - asked_at >= _PROBE:
                    self.dry[number] = now
                    self._ask(number, 1, {"no_wait": True})
                    room -= 1
            room -= min(len(self.dry), room // 2)  # kept for them
        order = giving or [(self.turn + place) % count for place in range(count)]
        share = -(-self.wanted // len(order))
        wait = {"expires": round(max(_ROUND * min(1.0, self.wanted / count), _SHORTEST_WAIT) * 1e9)}
        for number in order:
            missing = min(share - self.asked[number], room, _LARGEST_PULL)
            if missing > 0 and self.asked[number] <= missing:
                self._ask(number, missing, wait)
                room -= missing
                self.turn = number + 1

    def _ask(self, number: int, count: int, how: Mapping[str, object]) -> None:
        if self.asked[number] == 0:
            self.heard[number] = asyncio.get_running_loop().time()
        self.asked[number] += count
        body = {"batch": count, "max_bytes": _LARGEST_BYTES, **how}
        self._request(self.parts[number].name, consumer_name(self.group), body, f"m{number}")

    def _pull_retries(self) -> None:
        if self.ready and not self.closed and self.wanted > 0:
            body = {"batch": min(self.wanted, _LARGEST_PULL), "max_bytes": _LARGEST_BYTES, "no_wait": True}
            self._request(RETRY, retry_name(self.group.id), body, "r")

    def _request(self, stream: str, consumer: str, body: Mapping[str, object], which: str) -> None:
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self.owner.bus.tell(subject, json.dumps(body).encode(), reply=f"{self.inbox}.{which}")

    def _told(self, told: Told) -> None:
        if told.reply.startswith("$JS.ACK."):
            self._came(told)
        elif (which := told.subject.rpartition(".")[2])[0] == "m" and int(which[1:]) < len(self.parts):
            status, left = told.headers.get("Status", ""), told.headers.get("Nats-Pending-Messages", "")
            self._status(int(which[1:]), status, left)

    def _status(self, number: int, status: str, left: str) -> None:
        """What JetStream says of a request: it goes on (100), has ended with so many messages missing, or nobody knows it."""
        now = self.heard[number] = asyncio.get_running_loop().time()
        if status == "100":
            return
        if len(self.parts) > 1 and status in ("404", "408"):
            self.dry.setdefault(number, now)
        if left.isdecimal() and status in ("404", "408", "409"):
            self.asked[number] = max(0, self.asked[number] - int(left))
            self._pull()
        elif status == "404" and len(self.parts) > 1:  # of one that was only looked at
            self.asked[number] = 0
            self._pull()
        elif not self.closed:  # the consumer is gone, perhaps with the group: whoever opened this feed may close it now
            asyncio.get_running_loop().call_later(_GONE_SECONDS, self.begin_anew)

    def _came(self, told: Told) -> None:
        tokens = told.reply.split(".")
        if RETRY in tokens[:5]:
            tries, sequence = (int(each) for each in tokens[tokens.index(RETRY) + 2 :][:2])
            taken = _Taken(self, buried(told), tries, told.reply, retried=sequence)
        else:
            part = self.parts[0]
            if part.count > 1:
                part = next((each for each in self.parts if each.name in tokens[:5]), part)
                self.dry.pop(part.number, None)
            self.heard[part.number] = asyncio.get_running_loop().time()
            self.asked[part.number] = max(0, self.asked[part.number] - 1)
            message, tries = delivered(told, self.bases[part.number], part.name)
            taken = _Taken(self, message, tries, told.reply)
        plan = self.group.plan
        if self.closed:
            taken.again(_GIVEN_BACK_SECONDS)
        elif not taken.retried and not wants(plan, taken.message):
            taken.accept()  # its subject is a filter's that had to be wider than the plan
        elif plan.webhook is None and taken.tries > plan.tries:
            self.owner.spawn(self._give_up(taken))
        elif self.wanted > 0:
            self._give(taken)
        else:
            self.spare.append(taken)
        self._pull()

    def _give(self, taken: _Taken) -> None:
        self.wanted -= 1
        try:
            self.take(taken)
        except Exception:
            log.exception("a fault of ours while handing on a message of consumer group %s", self.group.name)

    async def _give_up(self, taken: _Taken) -> None:
        try:
            offered = taken.tries - 1
            await taken.bury(f"it was offered {offered} times and not accepted", offered)
        except Unavailable:
            taken.again(_LONGEST_PAUSE)


@dataclass(slots=True, eq=False)
class _Taken:
    feed: _Feed
    message: Message
    tries: int
    reply: str
    retried: int = 0  # its sequence among those that are offered again

    def accept(self) -> None:
        self.feed.owner.answer(self.reply, _ACK)

    def again(self, after: float = 0.0) -> None:
        delay = b' {"delay": %d}' % round(after * 1e9) if after > 0 else b""
        self.feed.owner.answer(self.reply, b"-NAK" + delay)
        if self.retried and not self.feed.closed:  # nobody waits for it there
            asyncio.get_running_loop().call_later(after + 0.1, self.feed._pull_retries)

    def working(self) -> None:
        self.feed.owner.answer(self.reply, _WORKING)

    async def bury(self, reason: str, tries: int | None = None) -> None:
        bus, group = self.feed.owner.bus, self.feed.group
        await bury(bus, group, self.message, tries or self.tries, reason, retried=self.retried)
        self.accept()
