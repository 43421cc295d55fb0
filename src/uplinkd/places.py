"""The places of a full door: whoever proves to be a device stays, and the greediest network yields to a newcomer.

A stranger is a connection that has had no good answer yet. Strangers yield before others do, each of the network that has most
of them; a network that has had a good answer lately may always take a stranger's place. A connection that has had one itself
yields only where its network holds more than a quarter of all places, to one that holds fewer. Everything here costs the same
however many there are.
"""

from __future__ import annotations

import logging
from itertools import islice
from typing import Protocol

from uplinkd.observe import Occasionally

__all__ = ["Holder", "Known", "Places"]

log = logging.getLogger("uplinkd.places")

_REMEMBERED = 100_000
_LOOKS = 16
_SHARE = 4
_SAY_SECONDS = 60


class Known:
    """The networks that have had a good answer, the latest 100,000 of them; each costs about 200 bytes."""

    def __init__(self) -> None:
        self._networks: dict[str, None] = {}

    def add(self, network: str) -> None:
        self._networks.pop(network, None)
        self._networks[network] = None
        if len(self._networks) > _REMEMBERED:
            del self._networks[next(iter(self._networks))]

    def __contains__(self, network: str) -> bool:
        return network in self._networks


class Holder(Protocol):
    """A connection, or what may become one."""

    @property
    def spare(self) -> bool:
        """Whether it may be ended now: nothing of it is being answered."""

    def abort(self) -> None: ...


class Places:
    """Those of one door. A network is as network_of gives it; one that is empty is nobody's and yields to nobody. Where nobody can
    prove anything yet, whoever comes from a known network is no stranger (`trusting`)."""

    def __init__(self, known: Known, what: str, *, trusting: bool = False) -> None:
        self.known = known
        self._what = what
        self._trusting = trusting
        self._strangers, self._proved = _Crowd(), _Crowd()
        self._where: dict[Holder, tuple[_Crowd, str]] = {}
        self._say = Occasionally(_SAY_SECONDS)

    def __len__(self) -> int:
        return len(self._where)

    def enter(self, holder: Holder, network: str, most: int) -> bool:
        """Give `holder` one of `most` places, if need be another's, who is ended; False where there is none for it."""
        if len(self._where) >= most:
            if self._say():
                log.warning(
                    "all %d places for %s are taken; newcomers get those of the greediest network", most, self._what
                )
            victim = self._victim(network, most)
            if victim is None:
                return False
            self.leave(victim)
            victim.abort()
        trusted = not network or (self._trusting and network in self.known)
        crowd = self._proved if trusted else self._strangers
        self._where[holder] = crowd, network
        crowd.add(network, holder)
        return True

    def shrink(self) -> bool:
        """End a stranger of the greediest network; whether there was one."""
        victim = self._strangers.spare()
        if victim is None:
            return False
        self.leave(victim)
        victim.abort()
        return True

    def leave(self, holder: Holder) -> None:
        """Nothing happens where it has no place."""
        crowd, network = self._where.pop(holder, (None, ""))
        if crowd is not None:
            crowd.remove(network, holder)

    def prove(self, holder: Holder) -> None:
        """It has had a good answer."""
        crowd, network = self._where.get(holder, (None, ""))
        if network:
            self.known.add(network)
        if crowd is self._strangers:
            self._strangers.remove(network, holder)
            self._proved.add(network, holder)
            self._where[holder] = self._proved, network

    def _victim(self, network: str, most: int) -> Holder | None:
        strangers, proved = self._strangers, self._proved
        may = not network or network in self.known or strangers.count(network) < strangers.most
        if may and (victim := strangers.spare()):
            return victim
        if network and proved.most > max(most // _SHARE, proved.count(network) + strangers.count(network) + 1):
            return proved.spare()
        return None


class _Crowd:
    """Holders by network, and the networks by how many each has."""

    def __init__(self) -> None:
        self._of: dict[str, dict[Holder, None]] = {}
        self._by_size: list[dict[str, None]] = [{}]

    @property
    def most(self) -> int:
        """How many the greediest network has."""
        return len(self._by_size) - 1

    def count(self, network: str) -> int:
        return len(self._of.get(network, ()))

    def add(self, network: str, holder: Holder) -> None:
        mine = self._of.setdefault(network, {})
        mine[holder] = None
        self._moved(network, len(mine) - 1, len(mine))

    def remove(self, network: str, holder: Holder) -> None:
        mine = self._of[network]
        del mine[holder]
        self._moved(network, len(mine) + 1, len(mine))
        if not mine:
            del self._of[network]

    def _moved(self, network: str, before: int, now: int) -> None:
        if not network:  # nobody's, and never the greediest
            return
        sizes = self._by_size
        sizes[before].pop(network, None)
        if now:
            if now == len(sizes):
                sizes.append({})
            sizes[now][network] = None
        while len(sizes) > 1 and not sizes[-1]:
            sizes.pop()

    def spare(self) -> Holder | None:
        """The one of the greediest network that has been there longest, of those that may be ended."""
        for network in self._by_size[-1]:
            return next((holder for holder in islice(self._of[network], _LOOKS) if holder.spare), None)
        return None
