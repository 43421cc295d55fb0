"""How many bytes of messages the process that delivers has in its hands: each pump and each consumer within its own bound, and all
together within one.

What was asked for counts as if it had come. Whoever comes when nothing is left still gets a little, so that none waits for
another: the bound is `_MOST_BYTES`, and `least` for each beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Budget", "Share"]

_MOST_BYTES = 256 * 1024**2
# The first messages are asked for as if they were large, and not many: whoever gets none would take from the others what it does not
# need. From then on they count as they are.
_TYPICAL_BYTES, _OVERHEAD_BYTES = 64 * 1024, 512
_FIRST = 64


class Budget:
    """Of one process."""

    def __init__(self, most: int = _MOST_BYTES) -> None:
        self.most = most
        self.used = 0

    def share(self, most: int, least: int) -> Share:
        """For one pump or consumer: it holds up to `most` bytes, or `least` where others have the rest."""
        return Share(self, most, least)


@dataclass(slots=True, eq=False)
class Share:
    budget: Budget
    most: int
    least: int
    held: int = 0
    _claim: int = 0
    _typical: float = _TYPICAL_BYTES
    _known: bool = False

    @property
    def allowed(self) -> int:
        """How many bytes it may hold now."""
        return min(self.most, max(self.budget.most - self.budget.used + self._claim, self.least))

    def room(self, wanted: int) -> int:
        """How many messages more may be asked for, with `wanted` under way; at least one by whoever has none."""
        room = int((self.allowed - self.held) / self._typical)
        room = (room if self._known else min(room, _FIRST)) - wanted
        return max(room, 0 if self.held or wanted else 1)

    def came(self, size: int) -> None:
        self._known = True
        self.held += size
        size += _OVERHEAD_BYTES
        self._typical = max(size, self._typical + (size - self._typical) / 16)

    def went(self, size: int) -> None:
        self.held -= size

    def claim(self, wanted: int) -> None:
        """So many are under way; to be told after every change."""
        claim = self.held + int(wanted * self._typical)
        self.budget.used += claim - self._claim
        self._claim = claim

    def close(self) -> None:
        self.held = 0
        self.claim(0)
