"""Flow control that holds for a device whichever worker it meets: one table in memory that all workers share.

Each limit is a GCRA (virtual scheduling, ITU-T I.371): the table keeps, as one double, the moment until which a device has
used up its rate in advance. A request is in order if that moment lies no further ahead than the burst. So an idle device
costs nothing, a refused request is charged nothing, and there is no counter to reset.
"""

from __future__ import annotations

import mmap
import multiprocessing
import multiprocessing.synchronize
import time
from collections.abc import Callable

from uplinkd.core.errors import Code, Refused
from uplinkd.settings import Settings

__all__ = ["Flow"]

# A device's slot: messages, bytes, logins, and until when it is claimed.
_SLOT = 4
_DEVICES = 1 << 22
_REFUSALS = 1 << 20
_LOCKS = 16
_MINUTE = 60.0
# A worker killed in the microsecond that it holds a lock leaves it taken: wait this long, then go on without.
_LOCK_PATIENCE = 0.002


class Flow:
    """Made before the workers are forked, which then share its table and its locks.

    Devices whose ids differ by a multiple of 4,194,304 share a slot; two addresses share one by a chance of 1 in a million,
    which nobody can aim at: Python's string hash is salted anew in each supervisor and the same in its workers.
    """

    def __init__(self, settings: Settings, *, shared: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._message_cost = _cost(settings.device_rate, 1.0)
        self._byte_cost = _cost(float(settings.device_bytes), 1.0)
        self._login_cost = _cost(settings.auth_rate, _MINUTE)
        self._refusal_cost = _cost(settings.address_auth_rate, _MINUTE)
        self._settings = settings
        size = (_DEVICES * _SLOT + 2 * _REFUSALS) * 8
        # Untouched pages take no memory, whatever the size.
        self._memory = mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
        self._until = memoryview(self._memory).cast("d")
        context = multiprocessing.get_context("fork")
        self._locks = [context.Lock() for _ in range(_LOCKS)] if shared else []
        self._guards: list[_Guard] = [_Guard(lock) for lock in self._locks] or [_NoGuard()]

    def close(self) -> None:
        self._until.release()
        self._memory.close()

    def message(self, device_id: int, size: int) -> None:
        """Charge a message of `size` bytes to the device; raise Refused 40000 over its rate, charging nothing."""
        if not self._message_cost and not self._byte_cost:
            return
        slot = device_id % _DEVICES * _SLOT
        until = self._until
        with self._locked(slot):
            now = self._clock()
            messages = _charged(until[slot], now, self._message_cost, 1.0)
            volume = _charged(until[slot + 1], now, self._byte_cost * size, 1.0)
            if messages and volume:
                until[slot] = messages
                until[slot + 1] = volume
                return
        if not messages:
            raise _too_many(
                f"the device sends more than {self._settings.device_rate:g} messages a second (device_rate)"
            )
        raise _too_many(f"the device sends more than {self._settings.device_bytes} bytes a second (device_bytes)")

    def login(self, device_id: int) -> None:
        """Charge a login with a right sign; raise Refused 40000 over the device's rate.

        Only right signs are charged, so that nobody else can use a device's logins up.
        """
        if not self._login_cost:
            return
        slot = device_id % _DEVICES * _SLOT + 2
        with self._locked(slot):
            charged = _charged(self._until[slot], self._clock(), self._login_cost, _MINUTE)
            if charged:
                self._until[slot] = charged
                return
        raise _too_many(f"the device logs in more than {self._settings.auth_rate:g} times a minute (auth_rate)")

    def before_login(self, product_key: str, device_name: str, address: str) -> None:
        """Raise Refused 40000 when too many logins of this address, or of this device from it, were refused lately."""
        now = self._clock()
        by_device, by_address = _refusal_slots(product_key, device_name, address)
        if self._login_cost and self._until[by_device] - now > _MINUTE - self._login_cost:
            raise _too_many(
                f"more than {self._settings.auth_rate:g} logins of this device from {address} were refused within a minute "
                "(auth_rate)"
            )
        if self._refusal_cost and self._until[by_address] - now > _MINUTE - self._refusal_cost:
            raise _too_many(
                f"more than {self._settings.address_auth_rate:g} logins from {address} were refused within a minute "
                "(address_auth_rate)"
            )

    def refused_login(self, product_key: str, device_name: str, address: str) -> None:
        """Charge a refused login to its address, and to the device as seen from that address."""
        for slot, cost in zip(
            _refusal_slots(product_key, device_name, address), (self._login_cost, self._refusal_cost), strict=True
        ):
            with self._locked(slot):
                self._until[slot] = max(self._until[slot], self._clock()) + cost

    def claim(self, device_id: int, seconds: float) -> bool:
        """Whether the caller alone, of all workers, may now do for the device what is done by one at a time; for `seconds`, or until
        it lets go by `release`."""
        slot = device_id % _DEVICES * _SLOT + 3
        with self._locked(slot):
            now = self._clock()
            if self._until[slot] > now:
                return False
            self._until[slot] = now + seconds
            return True

    def release(self, device_id: int) -> None:
        self._until[device_id % _DEVICES * _SLOT + 3] = 0.0

    def heal(self) -> None:
        """Free the locks that a killed worker took with it; called by the supervisor after a worker died."""
        for lock in self._locks:
            lock.acquire(timeout=1)
            lock.release()

    def _locked(self, slot: int) -> _Guard:
        return self._guards[slot // _SLOT % len(self._guards)]


class _Guard:
    """One lock that many devices share; a plain class, since contextlib's costs a microsecond a use."""

    __slots__ = ("_acquire", "_release", "_taken")

    def __init__(self, lock: multiprocessing.synchronize.Lock) -> None:
        self._acquire = lock.acquire
        self._release = lock.release
        self._taken = False

    def __enter__(self) -> None:
        self._taken = self._acquire(True, _LOCK_PATIENCE)

    def __exit__(self, *_: object) -> None:
        if self._taken:
            self._release()


class _NoGuard(_Guard):
    """For a single worker, which has nobody to guard against."""

    __slots__ = ()

    def __init__(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _refusal_slots(product_key: str, device_name: str, address: str) -> tuple[int, int]:
    first = _DEVICES * _SLOT
    return (
        first + hash((product_key, device_name, address)) % _REFUSALS,
        first + _REFUSALS + hash(address) % _REFUSALS,
    )


def _cost(rate: float, period: float) -> float:
    """Seconds that one unit takes at `rate` a period; 0 for no limit."""
    return period / rate if rate else 0.0


def _charged(until: float, now: float, cost: float, burst: float) -> float:
    """The new moment, or 0.0 when it lies further ahead than `burst` seconds. What is larger than a whole burst passes when
    nothing else was sent before it, or it never would."""
    if until < now:
        until = now
    charged = until + cost
    # A nanosecond's grace: the sum of 30 thirtieths is not quite 1.
    return charged if charged - now <= burst + 1e-9 or (until == now and cost > burst) else 0.0


def _too_many(reason: str) -> Refused:
    return Refused(Code.REQUEST_TOO_MANY, reason)
