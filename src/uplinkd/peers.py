"""Which workers live, of all gateways on one bus: each tells of itself once a second, and is forgotten after five seconds of silence.

Who stands still for longer, or is cut off from the others, is forgotten too, and does not know it. So whoever has heard nothing
of itself for that long, or hears again of somebody it had forgotten, takes itself for forgotten and introduces itself anew.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from uplinkd import __version__
from uplinkd.engine import Bus, Told
from uplinkd.observe import Occasionally

__all__ = ["ALIVE", "Gateway", "Peer", "Peers", "beat_of", "gateway_of", "gateways_of", "worker_of"]

log = logging.getLogger("uplinkd.peers")

ALIVE = "uplinkd.alive"
"""Where each worker tells that it lives, in JSON: its instance, version, start and connections."""

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 5.0
# Less than that: who may have been forgotten by others counts itself among the forgotten.
_ABSENT_SECONDS = 4.0
_MOST_FORGOTTEN = 1000
# Clocks that differ by more are worth a word: who is online is decided by them.
_SKEW_MILLISECONDS = 5000


def worker_of(instance: str) -> str:
    """`gateway.slot` of `gateway.slot.token`."""
    return instance.rpartition(".")[0]


def gateway_of(worker: str) -> str:
    """The gateway of a worker's name."""
    return worker.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker that lives: `instance` is `gateway.slot.token`, `heard` when it last told so (monotonic seconds), `since` when it
    started (ms since 1970), `connections` how many it has."""

    instance: str
    heard: float
    version: str = ""
    since: int = 0
    connections: int = 0

    @property
    def worker(self) -> str:
        return worker_of(self.instance)

    @property
    def gateway(self) -> str:
        return gateway_of(self.worker)


@dataclass(frozen=True, slots=True)
class Gateway:
    """One that lives: `version` of its oldest worker, how many workers and connections of devices it has, since when (ms) it runs."""

    name: str
    version: str
    workers: int
    connections: int
    since: int

    def document(self) -> dict[str, Any]:
        return {
            "gateway": self.name,
            "version": self.version,
            "workers": self.workers,
            "connections": self.connections,
            "since": self.since,
        }


def gateways_of(peers: Iterable[Peer]) -> list[Gateway]:
    """The gateways of these workers, by name."""
    found: dict[str, list[Peer]] = {}
    for peer in sorted(peers, key=lambda peer: peer.since):
        found.setdefault(peer.gateway, []).append(peer)
    return [
        Gateway(name, each[0].version, len(each), sum(peer.connections for peer in each), each[0].since)
        for name, each in sorted(found.items())
    ]


def beat_of(told: Told, now: float) -> Peer:
    """The worker that has told `told`; ValueError, KeyError or TypeError where that is not understood."""
    facts = json.loads(told.payload)
    return Peer(
        str(facts["from"]),
        now,
        str(facts["version"]),
        int(facts["since"]),
        -1 if facts["bye"] else int(facts["connections"]),
    )


class Peers:
    """One worker's view of all, itself among them. `listen` is for how many seconds it hears before it judges who is there.

    `others` is true while another gateway than its own lives; the hot path looks at it.
    """

    def __init__(
        self,
        bus: Bus,
        instance: str,
        *,
        connections: Callable[[], int] = int,
        listen: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._bus = bus
        self._instance = instance
        self._connections = connections
        self._listen = listen
        self._clock = clock
        self._wall = wall
        self._started = round(wall() * 1000)
        self._peers: dict[str, Peer] = {}
        self._forgotten: dict[str, None] = {}
        self._gone: list[Callable[[str], None]] = []
        self._back: list[Callable[[], None]] = []
        self._since = self._looked = clock()
        self._echo: float | None = None
        self._ended = False
        self._came_back = 0.0
        self._missed = 1  # how many have gone since somebody last asked
        self._warn = Occasionally(600)
        self._warn_twin = Occasionally(60)
        self.others = False
        bus.listen(ALIVE, self._heard)
        bus.on_connected(self._connected)

    def on_gone(self, act: Callable[[str], None]) -> None:
        """Have `act` called with the instance of a worker that is heard of no more."""
        self._gone.append(act)

    def on_back(self, act: Callable[[], None]) -> None:
        """Have `act` called when others may have forgotten this worker."""
        self._back.append(act)

    @property
    def gateways(self) -> set[str]:
        """Those that live, this one among them."""
        return {peer.gateway for peer in self._peers.values()} | {gateway_of(worker_of(self._instance))}

    @property
    def all(self) -> list[Peer]:
        """The workers that were heard of and live, by name."""
        return sorted(self._peers.values(), key=lambda peer: peer.worker)

    @property
    def workers(self) -> set[str]:
        """The names of workers that live, this one among them."""
        return {peer.worker for peer in self._peers.values()} | {worker_of(self._instance)}

    @property
    def leads(self) -> bool:
        """Whether this worker does what one of all should do: its name is the least. Two may think so for a moment."""
        if self._listen and not (self._bus.connected and self._clock() - self._since >= self._listen):
            return False
        return min(self.workers) == worker_of(self._instance)

    @property
    def settled(self) -> bool:
        """Whether it has heard for long enough to know who is there, and so who is not."""
        return self._bus.connected and self._clock() - self._since >= _SILENT_SECONDS

    def missed(self) -> bool:
        """Whether some have gone since the last call."""
        missed, self._missed = self._missed, 0
        return bool(missed)

    def look_again(self) -> None:
        """What was to be done for those that have gone could not be done: `missed` tells of them again."""
        self._missed = 1

    async def run(self) -> None:
        """Tell and look, until cancelled."""
        while True:
            self.beat()
            self.look()
            await asyncio.sleep(_BEAT_SECONDS)

    async def watch(self) -> None:
        """Look alone, until cancelled: for a process that serves no devices."""
        while True:
            self.look()
            await asyncio.sleep(_BEAT_SECONDS)

    def beat(self, *, bye: bool = False) -> None:
        """Tell that this worker lives; or, with `bye`, that it ends: after that it tells nothing more."""
        if self._ended:
            return
        self._ended = bye
        facts: dict[str, Any] = {
            "from": self._instance,
            "version": __version__,
            "since": self._started,
            "connections": self._connections(),
            "at": round(self._wall() * 1000),
            "bye": bye,
        }
        self._bus.tell(ALIVE, json.dumps(facts).encode())

    def look(self) -> None:
        """Forget who has been silent. Nobody is judged by what was not heard while this worker stood still or was cut off."""
        now = self._clock()
        stood_still = now - self._looked > _ABSENT_SECONDS
        self._looked = now
        if stood_still or not self._bus.connected:
            self._since = now
            return
        for peer in list(self._peers.values()):
            if now - max(peer.heard, self._since) > _SILENT_SECONDS:
                self._forget(peer.instance)
                self._forgotten[peer.instance] = None
                if peer.gateway != gateway_of(worker_of(self._instance)):
                    log.warning("nothing is heard of worker %s any more", peer.worker)
        while len(self._forgotten) > _MOST_FORGOTTEN:
            del self._forgotten[next(iter(self._forgotten))]

    async def _connected(self) -> None:
        self._since = self._clock()
        self.beat()

    def _heard(self, told: Told) -> None:
        now = self._clock()
        peer = beat_of(told, now)
        if peer.instance == self._instance:
            if self._echo is not None and now - self._echo > _ABSENT_SECONDS:
                self._come_back()
            self._echo = now
            return
        if peer.connections < 0:
            self._forget(peer.instance)
            return
        if peer.instance not in self._peers:
            if peer.worker == worker_of(self._instance) and self._warn_twin():
                log.error(
                    "another uplinkd on these NATS servers calls itself %s too; each needs a name of its own (setting gateway)",
                    peer.gateway,
                )
            if peer.instance in self._forgotten:
                del self._forgotten[peer.instance]
                self._come_back()
        self._peers[peer.instance] = peer
        self._count()
        skew = json.loads(told.payload)["at"] - self._wall() * 1000
        if abs(skew) > _SKEW_MILLISECONDS and self._warn():
            log.warning(
                "the clock of gateway %s is %.0f s %s that of this one; keep all of them right (NTP), or devices are taken for offline",
                peer.gateway,
                abs(skew) / 1000,
                "ahead of" if skew > 0 else "behind",
            )

    def _forget(self, instance: str) -> None:
        if self._peers.pop(instance, None) is not None:
            self._missed += 1
            self._count()
            for act in self._gone:
                act(instance)

    def _count(self) -> None:
        self.others = len(self.gateways) > 1

    def _come_back(self) -> None:
        """Once for all that are heard of again at the same time."""
        if self._clock() - self._came_back < _ABSENT_SECONDS:
            return
        self._came_back = self._clock()
        for act in self._back:
            act()
