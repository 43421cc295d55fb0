"""What all processes count, in one piece of memory that they share: the supervisor makes it before it forks and reads it.

Each process has a row of 64-bit integers that it alone writes, so there are no locks, and a reader sees each number as it was
a moment ago. The hot path appends to plain lists, which `Meter.flush` turns into numbers a few times a second: 0.02 µs for
an append and 0.05 to sort and count it later, where finding the bucket and adding to shared memory at once took 0.27.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
import time
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add, sub
from typing import TypeVar

from uplinkd.core.errors import LIMITS, Code

__all__ = [
    "BEAT_SECONDS",
    "BOUNDS",
    "DOORS",
    "ENDPOINTS",
    "HANDSHAKES",
    "HANDSHAKE_FAILURES",
    "TIMED",
    "Latency",
    "Meter",
    "Metrics",
    "Reading",
    "spare",
]

# The E6 series of preferred numbers (IEC 60063): six to the decade, each about 1.5 times the one before.
BOUNDS: tuple[float, ...] = (
    *(float(f"{step}e{decade}") for decade in (-4, -3, -2, -1, 0) for step in (1.0, 1.5, 2.2, 3.3, 4.7, 6.8)),
    10.0,
)
"""Upper bounds of the buckets of a Latency, seconds; what takes longer is in a last bucket of its own."""

ENDPOINTS = ("auth", "topic", "http", "mqtt_connect", "mqtt_publish", "mqtt_subscribe", "mqtt_send", "mqtt")
"""What is asked for: `http` is what failed before its path was known, `mqtt_subscribe` counts filters, `mqtt_send` is an
application's message down, and `mqtt` whatever else ends a session with a code."""

TIMED = ("auth", "topic", "mqtt_publish")
"""The endpoints whose latency is known."""

DOORS = ("https", "mqtt")
"""What comes over WebSocket is accepted at `https`, then by `mqtt`; open it is at the latter."""

HANDSHAKES = tuple(itertools.product(("TLSv1.2", "TLSv1.3", "other"), ("ecdhe", "rsa")))
"""(version, key exchange); `rsa` is the static one of old firmware."""

HANDSHAKE_FAILURES = (
    "no_shared_cipher",
    "unsupported_version",
    "unknown_ca",
    "bad_certificate",
    "alert",
    "http_request",
    "not_tls",
    "proxy_header",
    "timeout_or_closed",
    "other",
)

BEAT_SECONDS = 0.25
"""How often each process says that it lives."""

_NS = 1_000_000_000
# One that has not written to its row for so long does nothing else, either.
_ALIVE_SECONDS = 3

K = TypeVar("K")

# A row's cells, given out one after the other.
_free = itertools.count()
_REQUESTS = {(endpoint, int(code)): next(_free) for endpoint in ENDPOINTS for code in Code}
_ACCEPTED = {door: next(_free) for door in DOORS}
_HANDSHAKES = {kind: next(_free) for kind in HANDSHAKES}
_FAILURES = {reason: next(_free) for reason in HANDSHAKE_FAILURES}
_LIMITED = {limit: next(_free) for limit in LIMITS}
# The buckets of each one, then the sum in ns.
_LATENCIES = {name: min([next(_free) for _ in (*BOUNDS, "more", "sum")]) for name in (*TIMED, "engine")}
_STORED, _NOT_STORED, _BYTES, _WORKER_RESTARTS, _ENGINE_RESTARTS = (next(_free) for _ in range(5))
# From here on what is now, rather than what was so far.
_CONNECTIONS = {door: next(_free) for door in DOORS}
_GAUGES = min(_CONNECTIONS.values())
_SESSIONS, _WAITING, _LAG, _BEAT = (
    next(_free) for _ in range(4)
)  # the lag in ns, and when the row was last written to
_ROW = next(_free)


@dataclass(frozen=True, slots=True)
class Latency:
    """How many took how long. `counts[i]` took at most BOUNDS[i] seconds and longer than BOUNDS[i - 1], the last of them longer
    than all bounds; `sum` is seconds."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    sum: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def __add__(self, other: Latency) -> Latency:
        """Both together."""
        return Latency(tuple(map(add, self.counts, other.counts)), self.sum + other.sum)

    def __sub__(self, earlier: Latency) -> Latency:
        """What has come since `earlier`."""
        return Latency(tuple(map(sub, self.counts, earlier.counts)), max(0.0, self.sum - earlier.sum))

    def quantile(self, q: float) -> float:
        """Seconds that the share `q` (0 to 1) of all stayed within, as Prometheus works it out: evenly spread in their bucket.
        0.0 where there are none; the highest bound where it lies beyond."""
        rank, below = q * self.count, 0
        for index, count in enumerate(self.counts[:-1]):
            if count and below + count >= rank:
                lower = BOUNDS[index - 1] if index else 0.0
                return lower + (BOUNDS[index] - lower) * max(0.0, rank - below) / count
            below += count
        return BOUNDS[-1] if self.counts[-1] else 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """All rows together, since the supervisor's start; or as it is now, where that is said."""

    requests: Mapping[tuple[str, int], int]
    """(endpoint, code) → how many; code 0 is success."""
    latency: Mapping[str, Latency]
    """For each of TIMED: from the complete request to its written answer."""
    connections: Mapping[str, int]
    """Door → open now."""
    accepted: Mapping[str, int]
    """Door → made; over TLS, those with a completed handshake."""
    handshakes: Mapping[tuple[str, str], int]
    """For each of HANDSHAKES: completed."""
    handshake_failures: Mapping[str, int]
    """For each of HANDSHAKE_FAILURES."""
    limited: Mapping[str, int]
    """For each of LIMITS: requests that it refused, and over MQTT messages that it slowed down."""
    stored: int
    """Messages that the engine has acknowledged; devices' status changes are messages too."""
    not_stored: int
    """Those that it has refused, or not acknowledged in time."""
    engine_latency: Latency
    """From publish to acknowledgement."""
    engine_waiting: int
    """Publishes without an acknowledgement now."""
    engine_lag: float
    """Age of the oldest of them now, seconds; 0.0 where there is none."""
    sessions: int
    """MQTT sessions, of devices and of applications, that stand now."""
    bytes_in: int
    """Payload bytes of stored messages."""
    workers_alive: int
    worker_restarts: int
    engine_restarts: int
    started: float
    """The supervisor's start, as of time.time()."""


class Meter:
    """One process's pen. What it is told shows in a Reading at once, but for the lists: those after `flush`."""

    __slots__ = ("_cells", "acks", "answered", "held_back", "sizes")

    def __init__(self, cells: memoryview) -> None:
        self._cells = cells
        self.answered: dict[str, list[float]] = {endpoint: [] for endpoint in TIMED}
        """For each of TIMED, seconds that each success took. Appended to by the hot path; the lists stay the same objects."""
        self.held_back: dict[str, list[float]] = {endpoint: [] for endpoint in TIMED}
        """The same for what flow control refused with 40000."""
        self.acks: list[float] = []
        """Seconds that the engine took for each stored message; its payload's bytes stand in `sizes`."""
        self.sizes: list[int] = []

    def count(self, endpoint: str, code: int = 0, seconds: float | None = None) -> None:
        """A request was answered with `code`; where it is one of TIMED, after so many seconds."""
        self._cells[_REQUESTS[endpoint, code]] += 1
        if seconds is not None:
            first = _LATENCIES[endpoint]
            self._cells[first + bisect_left(BOUNDS, seconds)] += 1
            self._cells[first + len(BOUNDS) + 1] += round(seconds * _NS)

    def accepted(self, door: str) -> None:
        self._cells[_ACCEPTED[door]] += 1

    def shook_hands(self, version: str, key_exchange: str) -> None:
        """A TLS handshake was completed; an unknown version is counted as `other`."""
        self._cells[_HANDSHAKES.get((version, key_exchange), _HANDSHAKES["other", key_exchange])] += 1

    def handshake_failed(self, reason: str) -> None:
        """`reason` is one of HANDSHAKE_FAILURES."""
        self._cells[_FAILURES[reason]] += 1

    def limited(self, limit: str) -> None:
        """Flow control has refused a request by `limit`, one of LIMITS, or slowed a message down."""
        self._cells[_LIMITED[limit]] += 1

    def not_stored(self) -> None:
        self._cells[_NOT_STORED] += 1

    def connected(self, door: str, connections: int) -> None:
        """So many connections are open now."""
        self._cells[_CONNECTIONS[door]] = connections

    def stand(self, sessions: int) -> None:
        """So many MQTT sessions stand now."""
        self._cells[_SESSIONS] = sessions

    def engine(self, waiting: int, lag: float) -> None:
        """So many publishes wait for the engine now, the oldest for `lag` seconds."""
        self._cells[_WAITING] = waiting
        self._cells[_LAG] = round(lag * _NS)

    def worker_restarted(self) -> None:
        self._cells[_WORKER_RESTARTS] += 1

    def engine_restarted(self) -> None:
        self._cells[_ENGINE_RESTARTS] += 1

    def rest(self) -> None:
        """Nothing is open, stands or waits here."""
        for index in range(_GAUGES, _ROW):
            self._cells[index] = 0

    def beat(self) -> None:
        """Say that this process lives."""
        self._cells[_BEAT] = time.monotonic_ns()

    async def beats(self) -> None:
        """`beat` as often as a worker does, until cancelled."""
        while True:
            self.beat()
            await asyncio.sleep(BEAT_SECONDS)

    def flush(self) -> None:
        """Put what the hot path has gathered into the row."""
        for code, answered in ((Code.SUCCESS, self.answered), (Code.REQUEST_TOO_MANY, self.held_back)):
            for endpoint, seconds in answered.items():
                self._cells[_REQUESTS[endpoint, code]] += self._gather(endpoint, seconds)
        self._cells[_BYTES] += sum(self.sizes)
        self.sizes.clear()
        self._cells[_STORED] += self._gather("engine", self.acks)
        self.beat()

    def _gather(self, name: str, seconds: list[float]) -> int:
        """Empty the list into its buckets; how many there were."""
        if not seconds:
            return 0
        seconds.sort()
        first, below, cells = _LATENCIES[name], 0, self._cells
        for index in range(bisect_left(BOUNDS, seconds[0]), len(BOUNDS)):
            upto = bisect_right(seconds, BOUNDS[index], below)
            if upto > below:
                cells[first + index] += upto - below
                below = upto
            if below == len(seconds):
                break
        count = len(seconds)
        cells[first + len(BOUNDS)] += count - below
        cells[first + len(BOUNDS) + 1] += round(sum(seconds) * _NS)
        seconds.clear()
        return count


class Metrics:
    """Made by the supervisor of so many workers, and of `others`, before it forks them."""

    def __init__(self, workers: int, others: int = 0) -> None:
        self._workers = workers
        count = workers + others + 1
        self._memory = mmap.mmap(-1, count * _ROW * 8, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self._cells = memoryview(self._memory).cast("q")
        self._rows = [self._cells[row * _ROW : (row + 1) * _ROW] for row in range(count)]
        self._started = time.time()
        self._own = Meter(self._rows[-1])

    def meter(self, row: int) -> Meter:
        """The pen of worker `row`, 0 the first; the others come after the last, then the supervisor. A worker that is started again
        goes on counting where the one before it ended; nothing is open, stands or waits there."""
        meter = Meter(self._rows[row])
        meter.rest()
        return meter

    def last_beat(self, row: int) -> int:
        """When that process said last that it lives, as of time.monotonic_ns(); 0 while it has not."""
        return self._rows[row][_BEAT]

    def died(self, row: int) -> None:
        """It is started again, which is counted of workers; until then nothing is open there."""
        self.meter(row)
        if row < self._workers:
            self._own.worker_restarted()

    def engine_restarted(self) -> None:
        self._own.engine_restarted()

    def read(self) -> Reading:
        rows = [row.tolist() for row in self._rows]
        cells = list(map(sum, zip(*rows, strict=True)))
        return Reading(
            requests=_picked(_REQUESTS, cells),
            latency={endpoint: _latency(endpoint, cells) for endpoint in TIMED},
            connections=_picked(_CONNECTIONS, cells),
            accepted=_picked(_ACCEPTED, cells),
            handshakes=_picked(_HANDSHAKES, cells),
            handshake_failures=_picked(_FAILURES, cells),
            limited=_picked(_LIMITED, cells),
            stored=cells[_STORED],
            not_stored=cells[_NOT_STORED],
            engine_latency=_latency("engine", cells),
            engine_waiting=cells[_WAITING],
            engine_lag=max(row[_LAG] for row in rows) / _NS,
            sessions=cells[_SESSIONS],
            bytes_in=cells[_BYTES],
            workers_alive=sum(
                time.monotonic_ns() - row[_BEAT] < _ALIVE_SECONDS * _NS for row in rows[: self._workers] if row[_BEAT]
            ),
            worker_restarts=cells[_WORKER_RESTARTS],
            engine_restarts=cells[_ENGINE_RESTARTS],
            started=self._started,
        )

    def close(self) -> None:
        for row in self._rows:
            row.release()
        self._cells.release()
        self._memory.close()


def spare() -> Meter:
    """A meter of memory of its own, that nobody reads."""
    return Meter(memoryview(bytearray(_ROW * 8)).cast("q"))


def _picked(places: Mapping[K, int], cells: Sequence[int]) -> dict[K, int]:
    return {key: cells[place] for key, place in places.items()}


def _latency(name: str, cells: Sequence[int]) -> Latency:
    first = _LATENCIES[name]
    end = first + len(BOUNDS) + 1
    return Latency(tuple(cells[first:end]), cells[end] / _NS)
