"""How consumer groups stand, with their rates: how much of two looks lies between them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from uplinkd.core.groups import Group
from uplinkd.engine import GroupDesk, GroupState

__all__ = ["Standing", "Standings"]

# A look is good for others as long; a rate is over at most so much time, and not less.
_FRESH, _WINDOW, _SHORTEST = 0.9, 10.0, 0.5
_SECOND = 1.0


@dataclass(frozen=True, slots=True)
class Standing:
    """`rate` is how many deliveries came to an end in a second, lately; None before that is known."""

    state: GroupState
    rate: float | None


@dataclass(slots=True)
class _Seen:
    looks: deque[tuple[float, int]] = field(default_factory=deque)
    last: Standing | None = None


class Standings:
    """What is seen at `desk`; many who look at the same time are one look."""

    def __init__(self, desk: GroupDesk, clock: Callable[[], float] = time.monotonic) -> None:
        self._desk = desk
        self._clock = clock
        self._seen: dict[tuple[int, int], _Seen] = {}

    async def of(self, groups: Sequence[Group]) -> list[Standing]:
        """How they stand now; raise Unavailable."""
        begun = self._clock()
        for key in [key for key, seen in self._seen.items() if begun - seen.looks[-1][0] > _WINDOW]:
            del self._seen[key]
        return await asyncio.gather(*(self._look(group) for group in groups))

    async def measured(self, groups: Sequence[Group]) -> list[Standing]:
        """The same, all with their rates: it takes a second where nobody has looked lately."""
        found = await self.of(groups)
        if any(each.rate is None for each in found):
            await asyncio.sleep(_SECOND)
            found = await self.of(groups)
        return found

    async def _look(self, group: Group) -> Standing:
        key = group.id, group.generation
        seen = self._seen.get(key)
        if seen and seen.last and self._clock() - seen.looks[-1][0] < _FRESH:
            return seen.last
        state = await self._desk.state(group)
        at = self._clock()
        seen = self._seen.setdefault(key, _Seen())
        while seen.looks and at - seen.looks[0][0] > _WINDOW:
            seen.looks.popleft()
        rate = None
        if seen.looks and at - seen.looks[0][0] >= _SHORTEST:
            before, settled = seen.looks[0]
            rate = round(max(0, state.settled - settled) / (at - before), 2)
        seen.looks.append((at, state.settled))
        seen.last = Standing(state, rate)
        return seen.last
