"""The door towards devices: applications and the command line ask over NATS, and one worker sends.

A request goes to `uplinkd.send.` and the NATS subject of the topic, so that NATS itself keeps an application within its products;
its payload is the message. The answer is JSON: `{"messageId": …, "way": "mqtt" | "waits"}`, `{"sessions": n}` for a broadcast,
or `{"error": "…", "kind": "rejected" | "not_found" | "unavailable"}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from uplinkd.asking import answered
from uplinkd.core import topics
from uplinkd.core.errors import Refused, Rejected, Unavailable
from uplinkd.core.subjects import SENDING, from_subject
from uplinkd.engine import Bus, Told
from uplinkd.gateway import Gateway, Sent, check_size
from uplinkd.tasks import spawn

__all__ = ["Sending"]


_QUEUE = "uplinkd"
_BROADCAST = "uplinkd.broadcast."
_HEARD = "uplinkd.heard."
_TOPIC, _REPLY = "Uplinkd-Topic", "Uplinkd-Reply"
_BEGUN = b"begun"
# So long a broadcast waits for workers that begin to deliver, and for those that have begun.
_GATHER_SECONDS = 0.2
_LONGEST_SECONDS = 5.0
_AT_ONCE = 256
_TOO_MANY = b'{"error": "too many messages are being sent at this moment; try again", "kind": "unavailable"}'


@dataclass(slots=True)
class _Count:
    """How many workers are delivering a broadcast, and to how many sessions those have that are done."""

    busy: int = 0
    sessions: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.done.set()


class Sending:
    """One worker's part. `deliver` gives a broadcast to this worker's sessions and says how many heard it."""

    def __init__(
        self,
        bus: Bus,
        gateway: Gateway,
        deliver: Callable[[str, str, bytes], Awaitable[int]],
        dropped: Callable[[str, Sent], None],
    ) -> None:
        self._bus = bus
        self._gateway = gateway
        self._deliver = deliver
        self._dropped = dropped
        self._tasks: set[asyncio.Task[None]] = set()
        self._me = secrets.token_hex(8)
        self._numbers = itertools.count(1)
        self._counts: dict[str, _Count] = {}
        bus.listen(f"{SENDING}>", self._asked, queue=_QUEUE)
        bus.listen(f"{_BROADCAST}*", self._heard_broadcast)
        bus.listen(f"{_HEARD}{self._me}.*", self._heard_count)

    async def send(self, topic: str, payload: bytes) -> dict[str, Any]:
        """Send to a device, or to all of a product that listen; the answer's document. Raise Rejected or Unavailable."""
        if product_key := topics.broadcast_product(topic):
            return {"sessions": await self._broadcast(product_key, topic, payload)}
        sent = await self._gateway.send(topic, payload)
        if sent.dropped:
            self._dropped(topic, sent)
        return {"messageId": sent.message_id, "way": sent.way}

    async def drain(self) -> None:
        """Wait for what is under way."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=2)

    def _asked(self, told: Told) -> None:
        if len(self._tasks) >= _AT_ONCE:
            self._answer(told, _TOO_MANY)
            return
        spawn(self._serve(told), self._tasks)

    async def _serve(self, told: Told) -> None:
        topic = from_subject(told.subject.removeprefix(SENDING))
        self._answer(told, await answered(self.send(topic, told.payload)))

    def _answer(self, told: Told, answer: bytes) -> None:
        if told.reply:
            self._bus.tell(told.reply, answer)

    async def _broadcast(self, product_key: str, topic: str, payload: bytes) -> int:
        """Every worker delivers to its sessions; how many heard it, as far as the workers have said so in time."""
        try:
            topics.check_filter(topic)
        except Refused as refused:
            raise Rejected(refused.reason) from refused
        check_size(payload)
        if not self._bus.connected:
            raise Unavailable("the engine is away")
        number = str(next(self._numbers))
        self._counts[number] = count = _Count()
        headers = {_TOPIC: quote(topic, safe="/"), _REPLY: f"{_HEARD}{self._me}.{number}"}
        self._bus.tell(f"{_BROADCAST}{product_key}", payload, headers)
        await asyncio.sleep(_GATHER_SECONDS)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(count.done.wait(), _LONGEST_SECONDS)
        del self._counts[number]
        return count.sessions

    def _heard_broadcast(self, told: Told) -> None:
        spawn(self._deliver_broadcast(told), self._tasks)

    async def _deliver_broadcast(self, told: Told) -> None:
        reply = told.headers[_REPLY]
        self._bus.tell(reply, _BEGUN)
        product_key = told.subject.removeprefix(_BROADCAST)
        count = await self._deliver(product_key, unquote(told.headers[_TOPIC]), told.payload)
        self._bus.tell(reply, str(count).encode())

    def _heard_count(self, told: Told) -> None:
        count = self._counts.get(told.subject.rpartition(".")[2])
        if count is None:
            return
        if told.payload == _BEGUN:
            count.busy += 1
            count.done.clear()
        else:
            count.busy -= 1
            count.sessions += int(told.payload)
            if not count.busy:
                count.done.set()
