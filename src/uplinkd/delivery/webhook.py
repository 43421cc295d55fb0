"""Webhooks: what a consumer group gets is posted to the owner's URL, in order for each device, until it is accepted.

A group has a pump, a pump its lanes, and a lane one request under way; a device is in one lane. Whose fault a failure is decides
what happens. The target's is waited out in place, and counts against no message; a refused message is put aside with those of its
device behind it, and the lane goes on with the other devices. 5xx says neither. It is the message's as soon as others get through
in between: so it is found out, where need be by trying another one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field

from uplinkd.asking import HookState
from uplinkd.core import cloudevents, webhooks
from uplinkd.core.cloudevents import Event
from uplinkd.core.errors import Unavailable
from uplinkd.core.groups import Form, Group, Webhook, pause_before, shown_url
from uplinkd.core.webhooks import Verdict
from uplinkd.delivery.budget import Budget
from uplinkd.delivery.sender import Answer, Sender
from uplinkd.engine import Deliveries, Feed, Taken
from uplinkd.observe import Occasionally
from uplinkd.tasks import end_tasks

__all__ = ["Answer", "Pump", "Sender", "try_delivery"]

log = logging.getLogger("uplinkd.delivery")

_LARGEST_BATCH = 1024**2
# What a pump holds: enough that no lane runs dry while messages come, and within bounds however large they are.
_LEAST_HELD, _MOST_HELD = 16, 10_000
_LEAST_HELD_BYTES, _MOST_HELD_BYTES = 1024**2, 32 * 1024**2
_MOST_WANTED = 500
# Refused messages, with those behind them, are held besides. A device with more than so many of them waits no longer, nor does any
# once all together are more, or have this part of the bytes: nothing would be left for the other devices.
_MOST_ASIDE, _MOST_BEHIND = 5_000, 1_000
_MOST_ASIDE_BYTES = 1 / 2

_OPENS_AFTER = 5
_LONGEST_PAUSE = 60.0
_JITTER = 0.2
# A batch or a message is tried so often for 5xx before others are tried alone.
_SPLIT_AFTER = 3
_BURIAL_PAUSE = 5.0
# What is on its way has come after that; what is given back at once would come here again, as long as a feed that was closed hears.
_ARRIVING_SECONDS, _CLOSING_SECONDS, _GIVEN_BACK_SECONDS = 0.05, 0.15, 0.3
_WARN_SECONDS = 60.0

_Device = tuple[str, str]


@dataclass(slots=True, eq=False)
class _Held:
    """A message that this pump holds since `at`. `refusals` count against it; `unclear` 5xx do not, yet; `before` is how many
    others had got through at the last of them."""

    taken: Taken
    device: _Device
    at: float
    refusals: int = 0
    unclear: int = 0
    before: int | None = None


@dataclass(slots=True, eq=False)
class _Aside:
    """The messages of a device whose first one was refused and is tried again at `due`."""

    waiting: deque[_Held]
    due: float
    at_once: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    queue: deque[_Held] = field(default_factory=deque)
    aside: dict[_Device, _Aside] = field(default_factory=dict)
    under_way: list[_Held] = field(default_factory=list)
    stirred: asyncio.Event = field(default_factory=asyncio.Event)
    alone: int = 0  # so many messages go one by one
    failures: int = 0  # of the target, in a row
    busy: bool = False
    queue_next: bool = False  # what was put aside does not go twice while others wait


class Pump:
    """Posts the messages of `group`, which has a webhook, as long as `run` runs. Pauses pass `haste` times as fast."""

    def __init__(
        self,
        group: Group,
        deliveries: Deliveries,
        sender: Sender,
        *,
        clock: Callable[[], float] = time.time,
        haste: float = 1.0,
        budget: Budget | None = None,
    ) -> None:
        assert group.plan.webhook
        self.group = group
        self._hook: Webhook = group.plan.webhook
        self._deliveries = deliveries
        self._sender = sender
        self._clock = clock
        self._haste = haste
        self._key = webhooks.key_of(group.secret)
        self._batch = self._hook.batch if self._hook.form is Form.BATCH else 1
        self._most = min(self._hook.lanes * max(2 * self._batch, _LEAST_HELD), _MOST_HELD)
        self._lanes = [_Lane() for _ in range(self._hook.lanes)]
        self._circuit = _Circuit(group, haste)
        self._feed: Feed | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._wanted = 0
        self._holds = 0
        self._share = (budget or Budget()).share(_MOST_HELD_BYTES, _LEAST_HELD_BYTES)
        self._aside = 0
        self._aside_bytes = 0
        self._got_through = 0
        self._accepted = 0
        self._failed = 0
        self._last_success = 0
        self._last_failure = 0
        self._fault = ""

    def state(self) -> HookState:
        circuit = self._circuit
        rest = circuit.rest() if circuit.open else 0.0
        return HookState(
            group=self.group.name,
            open=circuit.open,
            accepted=self._accepted,
            failed=self._failed,
            last_success=self._last_success,
            last_failure=self._last_failure,
            fault=self._fault,
            next_try=round((self._clock() + rest) * 1000) if circuit.open else 0,
        )

    async def run(self) -> None:
        """Deliver until cancelled, or stopped."""
        if self._stopping:
            return
        self._feed = self._deliveries.feed(self.group, self._take)
        create = asyncio.get_running_loop().create_task
        self._tasks = [create(self._renew()), *(create(self._serve(lane)) for lane in self._lanes)]
        self._refill()
        try:
            await asyncio.wait(self._tasks)
        finally:
            if not self._stopping:
                self._stopping = True
                self._feed.close()
                await end_tasks(*self._tasks)
                self._give_back(_GIVEN_BACK_SECONDS)

    async def stop(self, within: float) -> None:
        """Take nothing new, have what is under way end, for `within` seconds at most, and give the others back: in a way that whoever
        goes on gets them first, and so in order."""
        if not self._feed or self._stopping:
            self._stopping = True
            return
        self._stopping = True
        renewal, *serving = self._tasks
        await end_tasks(*(task for task, lane in zip(serving, self._lanes, strict=True) if not lane.busy))
        await asyncio.wait(serving, timeout=within)
        await end_tasks(*serving)
        await asyncio.sleep(_ARRIVING_SECONDS)
        self._feed.close()
        await asyncio.sleep(_CLOSING_SECONDS)
        await end_tasks(renewal)
        self._give_back()

    # What is held.

    def _take(self, taken: Taken) -> None:
        self._wanted -= 1
        message = taken.message
        device = (message.product_key, message.device_name)
        held = _Held(taken, device, asyncio.get_running_loop().time())
        lane = self._lanes[zlib.crc32(f"{device[0]}/{device[1]}".encode()) % len(self._lanes)]
        self._holds += 1
        self._share.came(len(message.payload))
        self._share.claim(self._wanted)
        if lane.aside and (aside := lane.aside.get(device)):
            aside.waiting.append(held)
            self._count_aside(1, held)
            if self._crowded(aside.waiting):
                aside.due, aside.at_once = 0.0, True
                lane.stirred.set()
        else:
            lane.queue.append(held)
            lane.stirred.set()
        if self._wanted < _MOST_WANTED // 2:
            self._refill()

    def _refill(self) -> None:
        room = self._most + min(self._aside, _MOST_ASIDE) - self._holds - self._wanted
        room = min(room, _MOST_WANTED - self._wanted, self._share.room(self._wanted))
        if self._feed and not self._stopping and room > 0:
            self._wanted += room
            self._share.claim(self._wanted)
            self._feed.want(room)

    def _done_with(self, held: Iterable[_Held]) -> None:
        for each in held:
            self._holds -= 1
            self._share.went(len(each.taken.message.payload))
        self._share.claim(self._wanted)
        self._refill()

    def _count_aside(self, by: int, *held: _Held) -> None:
        self._aside += by * len(held)
        self._aside_bytes += by * sum(len(each.taken.message.payload) for each in held)

    def _crowded(self, waiting: Sized) -> bool:
        """Whether more wait for a further try, of a device or of all, than may."""
        return len(waiting) > _MOST_BEHIND or (
            len(waiting) > 1
            and (self._aside > _MOST_ASIDE or self._aside_bytes > self._share.allowed * _MOST_ASIDE_BYTES)
        )

    def _all_held(self) -> list[_Held]:
        held: list[_Held] = []
        for lane in self._lanes:
            held += lane.under_way
            held += lane.queue
            for aside in lane.aside.values():
                held += (each for each in aside.waiting if each not in lane.under_way)
        return held

    async def _renew(self) -> None:
        while True:
            await self._sleep(self.group.plan.ack_wait / 2)
            for held in self._all_held():
                held.taken.working()

    def _give_back(self, after: float = 0.0) -> None:
        for held in sorted(self._all_held(), key=lambda each: each.taken.message.id):
            held.taken.again(after)
        for lane in self._lanes:
            lane.under_way = []
            lane.queue.clear()
            lane.aside.clear()
        self._share.close()

    # A lane.

    async def _serve(self, lane: _Lane) -> None:
        while not self._stopping:
            try:
                lane.under_way = await self._next(lane)
                await self._deliver(lane)
            except Exception:
                log.exception("a fault of ours in the webhook of consumer group %s", self.group.name)
                lane.queue.extendleft(reversed([each for each in lane.under_way if each.device not in lane.aside]))
                lane.under_way = []
                await self._sleep(_LONGEST_PAUSE)

    async def _next(self, lane: _Lane) -> list[_Held]:
        """The messages of the next request; the first of a device that was put aside when its time has come."""
        clock = asyncio.get_running_loop().time
        while True:
            now = clock()
            ready = self._ready(lane, now) if lane.queue else math.inf
            due = math.inf
            if lane.aside:
                first = min(lane.aside.values(), key=lambda each: each.due)
                due = first.due
                if due <= now and not (lane.queue_next and ready <= now):
                    lane.queue_next = True
                    return [first.waiting[0]]
            if ready <= now:
                lane.queue_next = False
                return self._gathered(lane)
            lane.stirred.clear()
            try:
                async with asyncio.timeout_at(None if (then := min(due, ready)) == math.inf else then):
                    await lane.stirred.wait()
            except TimeoutError:
                pass

    def _ready(self, lane: _Lane, now: float) -> float:
        """When the lane's queue is to be sent: when its first message has waited for others, or now when enough are there."""
        if self._batch == 1 or not self._hook.linger or lane.alone or len(lane.queue) >= self._batch:
            return now
        ready = lane.queue[0].at + self._hook.linger / self._haste
        if ready <= now or sum(len(each.taken.message.payload) for each in lane.queue) >= _LARGEST_BATCH:
            return now
        return ready

    def _gathered(self, lane: _Lane) -> list[_Held]:
        queue = lane.queue
        if self._batch == 1:
            return [queue.popleft()]
        if lane.alone:
            lane.alone -= 1
            return [queue.popleft()]
        gathered = [queue.popleft()]
        size = len(gathered[0].taken.message.payload)
        while queue and len(gathered) < self._batch:
            size += len(queue[0].taken.message.payload)
            if size > _LARGEST_BATCH:
                break
            gathered.append(queue.popleft())
        return gathered

    async def _deliver(self, lane: _Lane) -> None:
        """Post what is under way until it is accepted, put aside, split or buried."""
        while (held := lane.under_way) and not self._stopping:
            answer = await self._attempt(lane, held)
            if self._stopping and answer.fault:
                return
            match webhooks.verdict(answer.status):
                case Verdict.ACCEPTED:
                    self._leave(lane, held)
                    self._accept(held)
                case Verdict.MESSAGE:
                    await self._refused(lane, held, answer)
                case Verdict.TARGET:
                    await self._failed_at(lane, held, answer)

    def _accept(self, held: list[_Held]) -> None:
        for each in held:
            each.taken.accept()
        self._accepted += len(held)
        self._last_success = self._now()
        self._done_with(held)

    def _leave(self, lane: _Lane, held: list[_Held]) -> None:
        """These are no longer under way; what waited behind one of them goes on."""
        lane.under_way = []
        if lane.aside and (aside := lane.aside.get(held[0].device)) and aside.waiting[0] is held[0]:
            del lane.aside[held[0].device]
            self._count_aside(-1, *aside.waiting)
            aside.waiting.popleft()
            lane.queue.extendleft(reversed(aside.waiting))

    async def _refused(self, lane: _Lane, held: list[_Held], answer: Answer) -> None:
        """The target is there, and does not take this."""
        if len(held) > 1:
            self._split(lane, held)
            return
        (one,) = held
        one.refusals += 1
        aside = lane.aside.get(one.device)
        cut_short = aside is not None and aside.at_once
        if one.refusals < self.group.plan.tries and not cut_short:
            self._put_aside(lane, one, max(pause_before(one.refusals + 1), answer.retry_after or 0.0))
            return
        times = "once" if one.refusals == 1 else f"{one.refusals} times"
        reason = f"{answer.fault}, {times}"
        if cut_short and one.refusals < self.group.plan.tries:
            reason += f" (too many messages of its device wait for a further try; there are {self.group.plan.tries})"
        if answer.text:
            reason += f": {answer.text}"
        lane.busy = True
        try:
            await one.taken.bury(reason, one.refusals)
        except Unavailable:
            self._put_aside(lane, one, _BURIAL_PAUSE)
        else:
            self._leave(lane, held)
            self._done_with(held)
        finally:
            lane.busy = False

    def _put_aside(self, lane: _Lane, one: _Held, pause: float) -> None:
        """Try it again after `pause`, and nothing of its device before."""
        lane.under_way = [each for each in lane.under_way if each is not one]
        lane.queue_next = True
        due = asyncio.get_running_loop().time() + _jittered(pause) / self._haste
        if aside := lane.aside.get(one.device):
            aside.due = due
            return
        behind = [each for each in lane.queue if each.device == one.device]
        if behind:
            lane.queue = deque(each for each in lane.queue if each.device != one.device)
        waiting = deque([one, *behind])
        self._count_aside(1, *waiting)
        crowded = self._crowded(waiting)
        lane.aside[one.device] = _Aside(waiting, 0.0 if crowded else due, at_once=crowded)
        self._refill()

    def _split(self, lane: _Lane, held: list[_Held]) -> None:
        lane.under_way = []
        lane.queue.extendleft(reversed(held))
        lane.alone = len(held)

    async def _failed_at(self, lane: _Lane, held: list[_Held], answer: Answer) -> None:
        """No answer, or one that says nothing of the message: the target is tried again. Unless the message may be why."""
        lane.failures += 1
        one = held[0]
        if answer.status >= 500 and answer.retry_after is None:
            others = one.before is not None and self._got_through > one.before
            one.before = self._got_through
            if others and len(held) == 1:
                await self._refused(lane, held, answer)
                return
            one.unclear += 1
            if others or one.unclear >= _SPLIT_AFTER:
                if len(held) > 1:
                    self._split(lane, held)
                else:
                    await self._try_another(lane, one)
        if lane.under_way and not self._circuit.open and not self._stopping:
            await self._sleep(_jittered(min(2.0 ** min(lane.failures - 1, 30), _LONGEST_PAUSE)))

    async def _try_another(self, lane: _Lane, one: _Held) -> None:
        """Whether another message gets through is what decides about `one`, which is tried once more then. One of another device,
        so that the order holds; there may be none for long, then the next of its own, unless that has had its tries as well."""
        tries = self.group.plan.tries
        aside = lane.aside.get(one.device)
        other = next((each for each in lane.queue if each.device != one.device), None)
        if other is None and one.unclear >= tries:
            behind = aside.waiting if aside else lane.queue
            other = next((each for each in behind if each is not one and each.unclear < tries), None)
            if other is None:
                for each in behind:
                    each.unclear = 0
        if other is None:
            return
        # It stays where it is meanwhile: this lane alone takes from there.
        match webhooks.verdict((await self._attempt(lane, [other])).status):
            case Verdict.ACCEPTED:
                if aside and other.device == one.device:
                    aside.waiting.remove(other)
                    self._count_aside(-1, other)
                else:
                    lane.queue.remove(other)
                if other.device == one.device:
                    one.refusals = tries - 1  # it has had its tries
                self._accept([other])
            case Verdict.MESSAGE if other.device != one.device:
                lane.queue.remove(other)
                other.refusals += 1
                self._put_aside(lane, other, pause_before(other.refusals + 1))
            case _:
                other.unclear += 1

    # An attempt.

    async def _attempt(self, lane: _Lane, held: list[_Held]) -> Answer:
        """Post once, when the circuit lets it."""
        circuit = self._circuit
        if not circuit.blocks():
            return await self._post(lane, held)
        async with circuit.turn:
            await circuit.passed()
            if circuit.open:
                return await self._post(lane, held, probing=True)
        return await self._post(lane, held)

    async def _post(self, lane: _Lane, held: list[_Held], *, probing: bool = False) -> Answer:
        messages = [each.taken.message for each in held]
        lane.busy = True
        try:
            headers, body = cloudevents.request_of(self._hook.form, [cloudevents.event_of(each) for each in messages])
            message_id = webhooks.id_of([each.id for each in messages])
            headers |= webhooks.signed(self._key, message_id, body, now=int(self._clock()))
            answer = await self._sender.post(self._hook.url, headers, body, timeout=self._hook.timeout)
        finally:
            lane.busy = False
        if answer.fault:
            self._failed += 1
            self._last_failure = self._now()
            self._fault = f"{answer.fault}: {answer.text}" if answer.text else answer.fault
        if webhooks.verdict(answer.status) is Verdict.TARGET:
            self._circuit.failed(answer, probing=probing)
        else:
            lane.failures = 0
            self._got_through += 1
            self._circuit.succeeded()
        return answer

    def _now(self) -> int:
        return round(self._clock() * 1000)

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self._haste)


class _Circuit:
    """Open after some failed attempts in a row: then one at a time goes, at `until`. `until` also stands where the target has asked
    for a rest."""

    def __init__(self, group: Group, haste: float) -> None:
        assert group.plan.webhook
        self.open = False
        self.turn = asyncio.Lock()
        self._name = group.name
        self._url = shown_url(group.plan.webhook.url)
        self._haste = haste
        self._failures = 0
        self._pauses = 0
        self._until = 0.0
        self._closed = asyncio.Event()
        self._may_warn = Occasionally(_WARN_SECONDS)
        self._warned = False

    def blocks(self) -> bool:
        return self.open or (self._until > 0.0 and self.rest() > 0)

    def rest(self) -> float:
        """Seconds until the next attempt."""
        return max(self._until - asyncio.get_running_loop().time(), 0.0) * self._haste

    async def passed(self) -> None:
        """Return when an attempt may be made: at its time, or as soon as another one has got through."""
        while (rest := self.rest()) > 0:
            self._closed.clear()
            try:
                async with asyncio.timeout(rest / self._haste):
                    await self._closed.wait()
            except TimeoutError:
                pass

    def failed(self, answer: Answer, *, probing: bool) -> None:
        self._failures += 1
        pause = answer.retry_after or 0.0
        if probing or (self._failures >= _OPENS_AFTER and not self.open):
            pause = max(pause, _jittered(min(2.0 ** min(self._pauses, 30), _LONGEST_PAUSE)))
            self._pauses += 1
        if pause:
            self._until = max(self._until, asyncio.get_running_loop().time() + pause / self._haste)
        if self._failures >= _OPENS_AFTER and not self.open:
            self.open = True
            if self._may_warn():
                self._warned = True
                log.warning(
                    "webhook of consumer group %s: %s takes no messages: %s; they wait, and it is tried again",
                    self._name,
                    self._url,
                    answer.fault,
                )

    def succeeded(self) -> None:
        self._failures = 0
        if self.open:
            self.open = False
            self._pauses = 0
            self._until = 0.0
            self._closed.set()
            if self._warned:
                self._warned = False
                log.info("webhook of consumer group %s: %s takes messages again", self._name, self._url)


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - spreads attempts


async def try_delivery(group: Group, sender: Sender) -> Answer:
    """Post a sample event, of the type io.uplinkd.test, as the group's messages are posted; once."""
    hook = group.plan.webhook
    assert hook
    at = round(time.time() * 1000)
    product_key = (group.plan.products or ("a1XXXXXXXXX",))[0]
    event = Event(
        id=f"test-{at}",
        type="io.uplinkd.test",
        subject=f"/{product_key}/test/user/update",
        product_key=product_key,
        device_name="test",
        at=at,
        data=b'{"test":true}',
    )
    headers, body = cloudevents.request_of(hook.form, [event])
    headers |= webhooks.signed(webhooks.key_of(group.secret), event.id, body, now=at // 1000)
    return await sender.post(hook.url, headers, body, timeout=hook.timeout)
