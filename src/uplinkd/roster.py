"""Who has an MQTT session, and where: one session a device, on whichever worker or gateway it stands.

Each worker tells the others what opens and closes with it, and which filters it has subscribed to; each keeps all of it in
memory. So a newcomer closes the older session elsewhere within moments, and whether a message for a device has a taker is
known without asking.

The younger of two sessions stands, by their stamps: a hybrid logical clock, the time in ns or one more than the highest stamp that was
heard of. So who knows of a session makes a younger one, whatever the clocks say; and of two that did not know of each other the same
one stands everywhere.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from uplinkd.core.messages import in_messages
from uplinkd.core.topics import filter_matches
from uplinkd.engine import Bus, Told

__all__ = ["Held", "Roster"]

_NEWS, _HELLO = "uplinkd.roster.news", "uplinkd.roster.hello"
_GATHER_SECONDS = 0.005
# Many may introduce themselves at the same time: all of them get one answer.
_GREET_SECONDS = 0.05
# NATS takes a megabyte at once, if its owner has not set less; no session alone comes near this.
_MOST_BYTES = 48 * 1024


class Held(Protocol):
    """A session of this worker. `stamp` is the roster's of when it opened: the younger of two stands."""

    stamp: int

    @property
    def subscriptions(self) -> Mapping[str, int]:
        """Filter → QoS."""

    def taken_over(self, where: str) -> None:
        """The device has a younger session, `where` says whose; close."""

    def stands_anew(self, stamp: int) -> None:
        """Others may have taken it for ended: it bears this stamp from now on."""


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    worker: str
    stamp: int
    filters: tuple[str, ...]


class Roster:
    """One for each worker, `worker` its name, `gateway.slot`; names of workers are unique among those that share the bus.
    `clock` gives ns since 1970."""

    def __init__(self, bus: Bus, worker: str, *, clock: Callable[[], int] = time.time_ns) -> None:
        self._bus = bus
        self._clock = clock
        self._highest = 0
        self._greeting = False
        self.instance = f"{worker}.{secrets.token_hex(4)}"
        self._here: dict[int, Held] = {}
        self._elsewhere: dict[int, _Elsewhere] = {}
        self._news: set[int] = set()
        bus.listen(_NEWS, self._heard_news)
        bus.listen(_HELLO, self._heard_hello)
        bus.on_connected(self.introduce)

    def stamp(self) -> int:
        """For a session that opens now: higher than any that was given or heard of here."""
        self._highest = max(self._clock(), self._highest + 1)
        return self._highest

    def heard_of(self, stamp: int) -> None:
        """There has been a session with this stamp."""
        self._highest = max(self._highest, stamp)

    def opened(self, device_id: int, session: Held) -> None:
        """The device's session is this one; its older one closes, here at once and elsewhere in a moment."""
        older = self._here.get(device_id)
        self._here[device_id] = session
        self._elsewhere.pop(device_id, None)
        if older is not None and older is not session:
            older.taken_over("on this worker")
        self._tell(device_id)

    def changed(self, device_id: int) -> None:
        """The subscriptions of its session here are others now."""
        self._tell(device_id)

    def closed(self, device_id: int, session: Held) -> bool:
        """`session` has ended; whether it was the device's (and not one that was taken over)."""
        if self._here.get(device_id) is not session:
            return False
        del self._here[device_id]
        self._tell(device_id)
        return True

    def here(self, device_id: int) -> Held | None:
        return self._here.get(device_id)

    def sessions(self) -> Iterable[tuple[int, Held]]:
        """Those of this worker: (device id, session)."""
        return list(self._here.items())

    def subscribed(self, device_id: int, topic: str) -> bool:
        """Whether a session that stands, on any worker, has subscribed to `topic`."""
        held = self._here.get(device_id)
        filters: Iterable[str] = ()
        if held is not None:
            filters = held.subscriptions
        elif away := self._elsewhere.get(device_id):
            filters = away.filters
        return any(filter_matches(each, topic) for each in filters)

    def forget(self, instance: str) -> None:
        """A worker has gone, without a word, or tells of all its sessions anew: none that was known stands."""
        for device_id in [each for each, away in self._elsewhere.items() if away.worker == instance]:
            del self._elsewhere[device_id]

    async def introduce(self) -> None:
        """What was told meanwhile was missed on both sides: tell all, and ask all others to."""
        self._elsewhere.clear()
        self._bus.tell(_HELLO, self.instance.encode())
        self._send(list(self._here), anew=True)

    def renew(self) -> None:
        """Others may have taken the sessions here for ended: those that still stand, after all others had their say, are told of as if
        they had just opened."""
        for held in list(self._here.values()):
            held.stands_anew(self.stamp())
        self._send(list(self._here))

    # -- what workers tell each other

    def _tell(self, device_id: int) -> None:
        if not self._news:
            asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._send_news)
        self._news.add(device_id)

    def _send_news(self) -> None:
        news, self._news = self._news, set()
        self._send(news)

    def _send(self, device_ids: Iterable[int], *, anew: bool = False) -> None:
        """`anew`: these are all that stand here, whatever others know."""
        rows = []
        for device_id in device_ids:
            held = self._here.get(device_id)
            rows.append([device_id, held.stamp, list(held.subscriptions)] if held else [device_id, 0, []])

        def message(part: Sequence[list[Any]]) -> bytes:
            return json.dumps({"from": self.instance, "sessions": part, "anew": anew}).encode()

        for news in in_messages(rows, message, _MOST_BYTES) if rows or anew else ():
            self._bus.tell(_NEWS, news)
            anew = False

    def _heard_hello(self, told: Told) -> None:
        """A worker has started, or was away: sessions of its predecessor are gone, and of ours it does not know."""
        newcomer = told.payload.decode()
        if newcomer == self.instance:
            return
        name = newcomer.rpartition(".")[0]
        gone = [
            device_id
            for device_id, away in self._elsewhere.items()
            if away.worker != newcomer and away.worker.rpartition(".")[0] == name
        ]
        for device_id in gone:
            del self._elsewhere[device_id]
        if not self._greeting:
            self._greeting = True
            asyncio.get_running_loop().call_later(_GREET_SECONDS, self._greet)

    def _greet(self) -> None:
        self._greeting = False
        self._send(list(self._here))

    def _heard_news(self, told: Told) -> None:
        document = json.loads(told.payload)
        sender: str = document["from"]
        if sender == self.instance:
            return
        if document.get("anew"):
            self.forget(sender)
        for device_id, stamp, filters in document["sessions"]:
            known = self._elsewhere.get(device_id)
            if not stamp:
                if known and known.worker == sender:
                    del self._elsewhere[device_id]
                continue
            self._highest = max(self._highest, stamp)
            held = self._here.get(device_id)
            if held is not None:
                if (held.stamp, self.instance) > (stamp, sender):
                    continue
                del self._here[device_id]
                held.taken_over(self._where(sender))
            if known is None or known.worker == sender or (known.stamp, known.worker) < (stamp, sender):
                self._elsewhere[device_id] = _Elsewhere(sender, stamp, tuple(filters))

    def _where(self, sender: str) -> str:
        """Of a session elsewhere, for people."""
        (mine, *_), (theirs, *_) = (each.rsplit(".", 2) for each in (self.instance, sender))
        return "on another worker" if mine == theirs else f"on the gateway {theirs}"
