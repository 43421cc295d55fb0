"""What the overview draws: the workers' counters, sampled each second, kept for a quarter of an hour, and by the minute for a
day."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from uplinkd.core.errors import Unavailable
from uplinkd.metrics import Reading

__all__ = ["Figures", "Sample"]

_SECOND, _MINUTE = 1.0, 60
_SECONDS_KEPT, _MINUTES_KEPT = 900, 1440
_REPORTS = {"topic": "https", "mqtt_publish": "mqtt"}


@dataclass(frozen=True, slots=True)
class Sample:
    """What happened in the `seconds` before `at` (ms): rates a second, latencies in ms (None: nothing was answered), and how
    things stood at its end; `online` are devices, None while they cannot be counted."""

    at: int
    seconds: float
    https: float
    mqtt: float
    logins: float
    refused: dict[str, float] = field(default_factory=dict)
    p50: float | None = None
    p99: float | None = None
    connections: dict[str, int] = field(default_factory=dict)
    sessions: int = 0
    waiting: int = 0
    online: int | None = None

    @property
    def document(self) -> dict[str, Any]:
        return asdict(self)


class Figures:
    """`read` gives the counters of all workers together, `count_online`, called in a thread, how many devices are online."""

    def __init__(self, read: Callable[[], Reading], clock: Callable[[], float] = time.time) -> None:
        self.read = read
        self.count_online: Callable[[], int] | None = None
        self._clock = clock
        self._online: int | None = None
        self._last: tuple[float, Reading] = clock(), read()
        self._minute = self._last
        self.seconds: deque[Sample] = deque(maxlen=_SECONDS_KEPT)
        self.minutes: deque[Sample] = deque(maxlen=_MINUTES_KEPT)
        self._fresh = asyncio.Event()

    async def run(self) -> None:
        """Sample until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._count())
            while True:
                await asyncio.sleep(_SECOND)
                self.look()

    async def _count(self) -> None:
        """Beside the samples, which do not wait for a large fleet to be counted."""
        while self.count_online is not None:
            try:
                self._online = await asyncio.to_thread(self.count_online)
            except Unavailable:
                self._online = None
            await asyncio.sleep(_SECOND)

    def look(self) -> None:
        """Take one sample."""
        here = self._clock(), self.read()
        self.seconds.append(sample(self._last, here, self._online))
        self._last = here
        if here[0] - self._minute[0] >= _MINUTE:
            self.minutes.append(sample(self._minute, here, self._online))
            self._minute = here
        fresh, self._fresh = self._fresh, asyncio.Event()
        fresh.set()

    async def follow(self) -> AsyncGenerator[Sample]:
        """Each sample as it is taken."""
        while True:
            await self._fresh.wait()
            yield self.seconds[-1]


def sample(before: tuple[float, Reading], after: tuple[float, Reading], online: int | None = None) -> Sample:
    """What happened between two readings, each with its time in s."""
    (began, old), (ended, new) = before, after
    seconds = max(ended - began, 0.001)
    rates: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for (endpoint, code), count in new.requests.items():
        more = count - old.requests.get((endpoint, code), 0)
        if not more:
            continue
        if code:
            refused[str(code)] += more
        else:
            rates[endpoint] += more
    answered = [new.latency[each] - old.latency[each] for each in _REPORTS if each in new.latency]
    together = answered[0] + answered[1] if len(answered) > 1 else answered[0]
    any_answered = any(together.counts)
    return Sample(
        at=round(ended * 1000),
        seconds=round(seconds, 3),
        https=round(rates["topic"] / seconds, 2),
        mqtt=round(rates["mqtt_publish"] / seconds, 2),
        logins=round((rates["auth"] + rates["mqtt_connect"]) / seconds, 2),
        refused={code: round(count / seconds, 3) for code, count in sorted(refused.items())},
        p50=round(together.quantile(0.5) * 1000, 3) if any_answered else None,
        p99=round(together.quantile(0.99) * 1000, 3) if any_answered else None,
        connections=dict(new.connections),
        sessions=new.sessions,
        waiting=new.engine_waiting,
        online=online,
    )
