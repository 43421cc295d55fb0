"""The receiver link of one consumer: takes as many messages from its group as the client has given credit for, and tells the group
what became of each.

Neither the engine's messages nor the client's bytes pile up here: what is asked for, unsent and unsettled is bounded in number
and in bytes. Knows nothing of sockets; proton's sender is given to it.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from uplinkd.core.groups import Group, pause_before
from uplinkd.core.model import Message
from uplinkd.delivery.budget import Budget, Share
from uplinkd.engine import Deliveries, Feed, Taken

if TYPE_CHECKING:
    import proton

__all__ = ["WINDOW", "Link", "encode"]

WINDOW = 1000
"""Messages that a consumer may hold without having settled them, however much credit it gives."""

_WINDOW_BYTES, _LEAST_BYTES = 4 * 1024**2, 256 * 1024
# What proton has of messages and the client's session does not take yet.
_UNSENT_BYTES = 1024**2
# A client that drains wants what is there, or to hear that nothing is. What was on its way to the feed has come by then.
_DRAIN_SECONDS = 0.25

_ACCEPTED = 0x24
_OUTCOMES = (_ACCEPTED, 0x25, 0x26, 0x27)  # and rejected, released, modified


@dataclass(slots=True, eq=False)
class Link:
    """`stirred` is called when bytes for the client may have come about outside of what the client has sent."""

    group: Group
    deliveries: Deliveries
    sender: proton.Sender
    stirred: Callable[[], None]
    budget: Budget
    blocked: bool = False  # the client does not read
    held: dict[str, Taken] = field(default_factory=dict)  # by delivery tag
    _ready: deque[Taken] = field(default_factory=deque)
    _feed: Feed | None = None
    _wanted: int = 0
    _number: int = 0
    _resting: bool = False
    _draining: asyncio.TimerHandle | None = None
    _share: Share = field(init=False)

    def __post_init__(self) -> None:
        self._share = self.budget.share(_WINDOW_BYTES, _LEAST_BYTES)

    def flowed(self) -> None:
        """The client has told how much credit it gives."""
        credit = self.credit
        if self._wanted + len(self._ready) > credit:
            self._withdraw(credit)
        if self.sender.drain_mode and credit and not self._draining:
            self._draining = asyncio.get_running_loop().call_later(_DRAIN_SECONDS, self._drained)

    @property
    def credit(self) -> int:
        """How many messages more the client would take."""
        return max(0, int(self.sender.credit))

    @property
    def sent(self) -> int:
        """How many messages went to the client: by so many its idea of the credit may differ."""
        return self._number

    def go_on(self) -> bool:
        """Send what is ready and may be sent, and ask for more; whether something was sent."""
        sent = self._send()
        self._ask()
        return sent

    def settle(self, delivery: proton.Delivery) -> None:
        """The client has said what became of a message, or will say nothing more of it."""
        state = delivery.remote_state
        if state not in _OUTCOMES and not delivery.settled:
            return
        taken = self.held.pop(delivery.tag, None)
        delivery.settle()
        if taken is None:
            return
        self._share.went(len(taken.message.payload))
        self._share.claim(self._wanted)
        if state == _ACCEPTED:
            taken.accept()
        else:
            _give_back(taken)

    def rest(self) -> None:
        """Take no message more; those that the client holds are waited for."""
        self._resting = True
        self._withdraw(0)

    def close(self) -> None:
        """Give back everything, so that other consumers get it."""
        self.rest()
        if self._draining:
            self._draining.cancel()
        for taken in self.held.values():
            _give_back(taken)
        self.held.clear()
        self._share.close()

    def _take(self, taken: Taken) -> None:
        self._wanted -= 1
        self._share.came(len(taken.message.payload))
        self._share.claim(self._wanted)
        self._ready.append(taken)
        self._send()
        self.stirred()

    def _send(self) -> bool:
        before = self._number
        if self.blocked or not self._ready:
            return False
        sender = self.sender
        session = sender.session
        for _ in range(min(self.credit, len(self._ready))):
            if session.outgoing_bytes > _UNSENT_BYTES:
                break
            taken = self._ready.popleft()
            self._number += 1
            tag = str(self._number)
            self.held[tag] = taken
            sender.delivery(tag)
            sender.stream(encode(taken.message, taken.tries))
            sender.advance()
        return self._number > before

    def _ask(self) -> None:
        if self.blocked or self._resting:
            return
        waiting = self._wanted + len(self._ready)
        count = min(self.credit - waiting, WINDOW - waiting - len(self.held))
        if count <= 0:
            return
        count = min(count, self._share.room(self._wanted))
        if count <= 0:
            return
        if self._feed is None:
            self._feed = self.deliveries.feed(self.group, self._take)
        self._wanted += count
        self._share.claim(self._wanted)
        self._feed.want(count)

    def _drained(self) -> None:
        self._draining = None
        if self.sender.drain_mode:
            self.sender.drained()
            self._withdraw(0)
            self.stirred()

    def _withdraw(self, credit: int) -> None:
        """Want nothing more than what is ready, and of that no more than `credit`. A feed cannot want less, so it ends; what was
        on its way is offered to others."""
        if self._feed is not None:
            self._feed.close()
        self._feed, self._wanted = None, 0
        while len(self._ready) > credit:
            taken = self._ready.pop()
            self._share.went(len(taken.message.payload))
            _give_back(taken)
        self._share.claim(0)


def _give_back(taken: Taken) -> None:
    taken.again(pause_before(taken.tries + 1))


_LONG_HEAD = struct.Struct(">BI")
_PROPERTIES = struct.Struct(">II")


def encode(message: Message, tries: int) -> bytes:
    """The message in AMQP 1.0: header (from the second try on), properties with message-id, application properties `topic`,
    `messageId` and `generateTime`, and the payload as data.

    By hand, because proton.Message takes 15 µs for it and this 1, of 25 that a delivery costs. Ids are text, since they exceed
    what JavaScript's numbers hold, and the platform's samples read text.
    """
    identity = _text(str(message.id))
    head = b"\x00\x53\x70\xc0\x0a\x05\x40\x40\x40\x40\x70" + (tries - 1).to_bytes(4, "big") if tries > 1 else b""
    properties = (
        b"\xa1\x05topic" + _text(message.topic) + b"\xa1\x09messageId" + identity + b"\xa1\x0cgenerateTime\x81"
    ) + message.generate_time.to_bytes(8, "big")
    return b"".join(
        (
            head,
            b"\x00\x53\x73\xc0",
            bytes((len(identity) + 1, 1)),
            identity,
            b"\x00\x53\x74\xd1",
            _PROPERTIES.pack(len(properties) + 4, 6),
            properties,
            b"\x00\x53\x75",
            _LONG_HEAD.pack(0xB0, len(message.payload)),
            message.payload,
        )
    )


def _text(text: str) -> bytes:
    data = text.encode()
    return b"\xa1%c%b" % (len(data), data) if len(data) < 256 else _LONG_HEAD.pack(0xB1, len(data)) + data
