"""Flow control that holds whichever worker a request meets: one table in memory that all workers share.

Each limit is a GCRA (virtual scheduling, ITU-T I.371): the table keeps, as one double, the moment until which a rate has been
used up in advance. A request is in order if that moment lies no further ahead than the burst. So what is idle costs nothing, a
refused request is charged nothing, and there is no counter to reset. What is charged to several limits is charged to all of
them or to none.

Where other gateways live, each tells the others what it has charged (`Charges`), and they add it to their tables.
"""

from __future__ import annotations

import functools
import ipaddress
import mmap
import multiprocessing
import multiprocessing.synchronize
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from uplinkd.core.errors import Code, Refused
from uplinkd.settings import Settings

__all__ = ["Charges", "Flow", "Notes", "network_of"]

# A device's slot: messages, bytes, logins, and until when it is claimed.
_SLOT = 4
_DEVICES = 1 << 22
# The entries of the tables that go by name: how many buckets, and what is kept of each name.
_WAYS = 8
_PRODUCTS, _OF_PRODUCT = 1 << 12, 2  # messages, bytes
_NETWORKS, _OF_NETWORK = 1 << 17, 3  # requests, refused logins, look-ups for further ones
_GUESSED, _OF_GUESSED = 1 << 17, 1  # refused logins
# While no refused login counts any more, none is looked for. That is told for so long beyond the last one's time: when two processes
# tell it at once, one's word is lost, which is hardly more.
_WORRY_SECONDS = 60.0
# Marks a refusal for what somebody may be guessing; a wrong guess stays wrong for so long, unless the registry is changed.
_GUESSING, _GUESS_SECONDS = "guessed ", 0.25
_LOCKS = 16
_MINUTE = 60.0
# Beyond its refused logins an address is still looked up this many times as often, and for so long at once: see `may_look_up`.
_LOOK_UPS, _LOOK_UP_SECONDS = 10, 6.0
# Whoever holds a lock may have lost its core for a while. A worker killed in the microsecond that it holds one leaves it taken:
# then the others go on without, until the supervisor has healed it.
_LOCK_PATIENCE = 0.05
# What other gateways have charged uses up no more than so many bursts in advance.
_MOST_BURSTS = 5


@dataclass(frozen=True, slots=True)
class Charges:
    """What a gateway has charged: (device id, messages, bytes, logins); by product and by network (name, messages, bytes); and each
    refused login (product, device, network)."""

    devices: list[tuple[int, int, int, int]] = field(default_factory=list)
    products: list[tuple[str, int, int]] = field(default_factory=list)
    networks: list[tuple[str, int, int]] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)


class Notes:
    """What one worker has charged and not told yet. `rounds` counts in each how often it was passed over: what can make no difference
    to anybody is not told."""

    __slots__ = ("devices", "networks", "products", "refused")

    def __init__(self) -> None:
        self.devices: dict[int, list[int]] = {}  # messages, bytes, logins, rounds
        self.products: dict[str, list[int]] = {}
        self.networks: dict[str, list[int]] = {}
        self.refused: list[tuple[str, str, str]] = []

    def message(self, device_id: int, size: int) -> None:
        note = self.devices.get(device_id)
        if note is None:
            self.devices[device_id] = [1, size, 0, 0]
        else:
            note[0] += 1
            note[1] += size

    def wide(self, product_key: str, network: str, size: int) -> None:
        for notes, name in ((self.products, product_key), (self.networks, network)):
            if name:
                note = notes.setdefault(name, [0, 0, 0, 0])
                note[0] += 1
                note[1] += size

    def login(self, device_id: int, network: str) -> None:
        self.devices.setdefault(device_id, [0, 0, 0, 0])[2] += 1
        if network:
            self.networks.setdefault(network, [0, 0, 0, 0])[0] += 1


class Flow:
    """Made before the workers are forked, which then share its table and its locks.

    Devices whose ids differ by a multiple of 4,194,304 share a slot. Products and addresses are told apart by 64 bits of a hash
    that is salted anew in each supervisor and the same in its workers, so nobody can aim at another's.
    """

    def __init__(self, settings: Settings, *, shared: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.notes: Notes | None = None  # of this process, while other gateways live
        self._message_cost = _cost(settings.device_rate, 1.0)
        self._byte_cost = _cost(float(settings.device_bytes), 1.0)
        self._product_cost = _cost(settings.product_rate, 1.0)
        self._product_byte_cost = _cost(float(settings.product_bytes), 1.0)
        self._request_cost = _cost(settings.address_rate, 1.0)
        self._login_cost = _cost(settings.auth_rate, _MINUTE)
        self._refusal_cost = _cost(settings.address_auth_rate, _MINUTE)
        self._wide = bool(self._product_cost or self._product_byte_cost or self._request_cost)
        # Made once, for a flood of refusals; but for `wait` they stay as they are.
        self._refusals = {
            limit: Refused(Code.REQUEST_TOO_MANY, reason, limit=limit.removeprefix(_GUESSING))
            for limit, reason in _reasons(settings).items()
        }
        sizes = (
            _DEVICES * _SLOT,
            _PRODUCTS * _WAYS * (1 + _OF_PRODUCT),
            _NETWORKS * _WAYS * (1 + _OF_NETWORK),
            _GUESSED * _WAYS * (1 + _OF_GUESSED),
        )
        # Untouched pages take no memory, whatever the size.
        self._memory = mmap.mmap(
            -1, (sum(sizes) + 1) * 8, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        )
        self._until = memoryview(self._memory).cast("d")
        self._tags = memoryview(self._memory).cast("q")
        self._worried = sum(sizes)  # where it stands until when a refused login counts
        context = multiprocessing.get_context("fork")
        self._locks: list[multiprocessing.synchronize.Lock] = []

        def guards() -> list[_Guard]:
            """Of one table; who takes several takes them in the order in which they are made here."""
            if not shared:
                return [_NoGuard()]
            locks = [context.Lock() for _ in range(_LOCKS)]
            self._locks += locks
            return [_Guard(lock) for lock in locks]

        self._guards = guards()
        views = self._tags, self._until
        self._products = _Table(*views, sizes[0], _PRODUCTS, _OF_PRODUCT, guards())
        self._networks = _Table(*views, sum(sizes[:2]), _NETWORKS, _OF_NETWORK, guards())
        self._guessed = _Table(*views, sum(sizes[:3]), _GUESSED, _OF_GUESSED, guards())

    def close(self) -> None:
        self._until.release()
        self._tags.release()
        self._memory.close()

    def message(self, device_id: int, size: int, product_key: str = "", network: str = "") -> None:
        """Charge a message of `size` bytes to the device, its product and the network that it came from (see `network_of`); raise
        Refused 40000 over the rate of one of them, charging none."""
        if self._wide:
            self._charge_all(device_id, size, product_key, network)
            return
        if not self._message_cost and not self._byte_cost:
            return
        slot = device_id % _DEVICES * _SLOT
        until = self._until
        clock = self._clock
        with self._guards[device_id % len(self._guards)]:
            now = clock()
            # Nearly always there is room, and two calls of _charged say no more than this.
            messages, volume, full = until[slot], until[slot + 1], now + 1.0
            messages = (now if messages < now else messages) + self._message_cost
            volume = (now if volume < now else volume) + self._byte_cost * size
            if messages > full or volume > full:
                messages = _charged(until[slot], now, self._message_cost, 1.0)
                volume = _charged(until[slot + 1], now, self._byte_cost * size, 1.0)
            if messages and volume:
                until[slot] = messages
                until[slot + 1] = volume
                if self.notes is not None:
                    self.notes.message(device_id, size)
                return
        if messages:
            raise self._too_many("device_bytes")
        raise self._too_many("device_rate", until[slot] - now, self._message_cost)

    def _charge_all(self, device_id: int, size: int, product_key: str, network: str) -> None:
        slot, product, address = device_id % _DEVICES * _SLOT, hash(product_key), hash(network)
        until = self._until
        with (
            self._guards[device_id % len(self._guards)],
            self._products.guard(product),
            self._networks.guard(address),
        ):
            charges = [
                ("device_rate", slot, self._message_cost),
                ("device_bytes", slot + 1, self._byte_cost * size),
            ]
            if self._product_cost or self._product_byte_cost:
                place = self._products.place(product)
                charges.append(("product_rate", place, self._product_cost))
                charges.append(("product_bytes", place + 1, self._product_byte_cost * size))
            if self._request_cost and network:
                charges.append(("address_rate", self._networks.place(address), self._request_cost))
            now = self._clock()
            moments = [_charged(until[place], now, cost, 1.0) for _, place, cost in charges]
            if all(moments):
                for (_, place, _), moment in zip(charges, moments, strict=True):
                    until[place] = moment
                if self.notes is not None:
                    self.notes.message(device_id, size)
                    self.notes.wide(product_key, network if self._request_cost else "", size)
                return
        limit, place, cost = charges[moments.index(0.0)]
        if limit.endswith("_rate"):
            raise self._too_many(limit, until[place] - now, cost)
        raise self._too_many(limit)

    def login(self, device_id: int, network: str = "") -> None:
        """Charge a login with a right sign to the device and its network; raise Refused 40000 over the rate of one of them.

        Only right signs are charged to the device, so that nobody else can use its logins up.
        """
        counted = self._request_cost and network
        if not self._login_cost and not counted:
            return
        slot, address = device_id % _DEVICES * _SLOT + 2, hash(network)
        until = self._until
        with self._guards[device_id % len(self._guards)], self._networks.guard(address):
            now = self._clock()
            limit, logins = "auth_rate", _charged(until[slot], now, self._login_cost, _MINUTE)
            if logins and counted:
                place = self._networks.place(address)
                limit, requests = "address_rate", _charged(until[place], now, self._request_cost, 1.0)
                if requests:
                    until[slot], until[place] = logins, requests
                    if self.notes is not None:
                        self.notes.login(device_id, network)
                    return
            elif logins:
                until[slot] = logins
                if self.notes is not None:
                    self.notes.login(device_id, "")
                return
        raise self._too_many(limit)

    def check_network(self, network: str) -> None:
        """Raise Refused 40000 when the network has no request left now, charging nothing: before anything is done for it."""
        if self._request_cost and network:
            place = self._networks.known(hash(network))
            if place and not _charged(self._until[place], self._clock(), self._request_cost, 1.0):
                raise self._too_many("address_rate")

    def guessed(self, product_key: str, device_name: str, network: str) -> str:
        """The limit that lately refused logins have reached, of this network, or of this device from it; empty if none."""
        now = self._clock()
        if self._until[self._worried] < now:
            return ""
        return self._reached(product_key, device_name, network, now)

    def _reached(self, product_key: str, device_name: str, network: str, now: float) -> str:
        place = self._guessed.known(hash((product_key, device_name, network)))
        if self._login_cost and place and not _charged(self._until[place], now, self._login_cost, _MINUTE):
            return "auth_rate"
        if self._refusal_cost and network:
            place = self._networks.known(hash(network))
            if place and not _charged(self._until[place + 1], now, self._refusal_cost, _MINUTE):
                return "address_auth_rate"
        return ""

    def before_login(self, product_key: str, device_name: str, network: str) -> None:
        """Raise Refused 40000 when `guessed` names a limit."""
        if limit := self.guessed(product_key, device_name, network):
            raise self.guessing(limit)

    def refused_login(self, product_key: str, device_name: str, network: str) -> str:
        """Charge a refused login to its network, and to the device as seen from there; or charge neither and give the limit that it
        would break, as `guessed` does: of those that are decided at the same time no more pass than one after the other."""
        tag, pair = hash(network), hash((product_key, device_name, network))
        until = self._until
        with self._networks.guard(tag), self._guessed.guard(pair):
            now = self._clock()
            if limit := self._reached(product_key, device_name, network, now):
                return limit
            if self._login_cost:
                place = self._guessed.place(pair)
                until[place] = max(until[place], now) + self._login_cost
                self._worry(until[place])
            if network and (self._refusal_cost or self._request_cost):
                place = self._networks.place(tag)
                until[place] = max(until[place], now) + self._request_cost
                until[place + 1] = max(until[place + 1], now) + self._refusal_cost
                self._worry(until[place + 1])
            if self.notes is not None:
                self.notes.refused.append((product_key, device_name, network))
        return ""

    def charged(self, gateways: int, window: float) -> Charges:
        """What this worker has charged since the last call, `window` seconds ago, as far as it can make a difference where `gateways`
        live: what is below half of each one's share of a rate for a whole second is passed over."""
        notes = self.notes
        if notes is None:
            return Charges()

        def told(kept: dict[Any, list[int]], *costs: float) -> Iterable[tuple[Any, list[int]]]:
            shares = [window / cost / gateways for cost in costs if cost]
            found = []
            for name, note in list(kept.items()):
                note[3] += 1
                due = note[2] or any(
                    count >= max(min(share, 1.0 / window), share * note[3] / 2)
                    for count, share in zip(
                        [count for count, cost in zip(note, costs, strict=False) if cost], shares, strict=True
                    )
                )
                if due:
                    found.append((name, note))
                if due or note[3] * window >= 1.0:
                    del kept[name]
            return found

        refused, notes.refused = notes.refused, []
        return Charges(
            [(name, *note[:3]) for name, note in told(notes.devices, self._message_cost, self._byte_cost)],
            [(name, *note[:2]) for name, note in told(notes.products, self._product_cost, self._product_byte_cost)],
            [(name, *note[:2]) for name, note in told(notes.networks, self._request_cost)],
            refused,
        )

    def add(self, charges: Charges) -> None:
        """Charge what another gateway has: nothing of it is refused, it has passed there."""
        until, clock = self._until, self._clock

        def charge(place: int, cost: float, burst: float = 1.0) -> None:
            now = clock()
            until[place] = min(max(until[place], now) + cost, max(until[place], now + _MOST_BURSTS * burst))

        for device_id, messages, size, logins in charges.devices:
            slot = device_id % _DEVICES * _SLOT
            with self._guards[device_id % len(self._guards)]:
                charge(slot, messages * self._message_cost)
                charge(slot + 1, size * self._byte_cost)
                if logins:
                    charge(slot + 2, logins * self._login_cost, _MINUTE)
        for product_key, messages, size in charges.products:
            tag = hash(product_key)
            with self._products.guard(tag):
                place = self._products.place(tag)
                charge(place, messages * self._product_cost)
                charge(place + 1, size * self._product_byte_cost)
        for network, requests, _ in charges.networks:
            tag = hash(network)
            with self._networks.guard(tag):
                charge(self._networks.place(tag), requests * self._request_cost)
        for product_key, device_name, network in charges.refused:
            tag, pair = hash(network), hash((product_key, device_name, network))
            with self._networks.guard(tag), self._guessed.guard(pair):
                now = clock()
                if self._login_cost:
                    place = self._guessed.place(pair)
                    until[place] = max(until[place], now) + self._login_cost
                    self._worry(until[place])
                if network and (self._refusal_cost or self._request_cost):
                    place = self._networks.place(tag)
                    charge(place, self._request_cost)
                    until[place + 1] = max(until[place + 1], now) + self._refusal_cost
                    self._worry(until[place + 1])

    def _worry(self, moment: float) -> None:
        """A refused login counts until then."""
        if self._until[self._worried] < moment:
            self._until[self._worried] = moment + _WORRY_SECONDS

    def may_look_up(self, network: str) -> bool:
        """Whether the registry may be asked about one more login of a network whose refused logins have reached a limit; ten times
        as often as logins may be refused."""
        if not self._refusal_cost or not network:
            return True
        tag = hash(network)
        place, cost = self._networks.known(tag), self._refusal_cost / _LOOK_UPS
        if place and not _charged(self._until[place + 2], self._clock(), cost, _LOOK_UP_SECONDS):
            return False
        with self._networks.guard(tag):
            place = self._networks.place(tag) + 2
            charged = _charged(self._until[place], self._clock(), cost, _LOOK_UP_SECONDS)
            self._until[place] = charged or self._until[place]
        return bool(charged)

    def claim(self, device_id: int, seconds: float) -> bool:
        """Whether the caller alone, of all workers, may now do for the device what is done by one at a time; for `seconds`, or until
        it lets go by `release`."""
        slot = device_id % _DEVICES * _SLOT + 3
        with self._guards[device_id % len(self._guards)]:
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

    def _too_many(self, limit: str, ahead: float = 0.0, cost: float = 0.0) -> Refused:
        """`ahead` is how far the rate is used up in advance, where each request costs the same: it only grows meanwhile, whatever
        other workers do."""
        refused = self._refusals[limit]
        refused.wait = ahead - max(1.0 - cost, 0.0) if cost else 0.0
        return refused.with_traceback(None)

    def guessing(self, limit: str) -> Refused:
        """The refusal for what `guessed` has named."""
        refused = self._too_many(_GUESSING + limit)
        refused.wait = _GUESS_SECONDS
        return refused


class _Table:
    """What is charged under a name. An entry is a tag, the name's hash, and `width` moments. Of the eight entries of a bucket the
    one that is charged least gives way to a new name; its moments have passed, unless eight others are busy there at once."""

    def __init__(
        self,
        tags: memoryview[int],
        until: memoryview[float],
        first: int,
        buckets: int,
        width: int,
        guards: list[_Guard],
    ) -> None:
        self._tags = tags
        self._until = until
        self._first = first
        self._buckets = buckets
        self._stride = 1 + width
        self._guards = guards

    def guard(self, tag: int) -> _Guard:
        return self._guards[tag % self._buckets % len(self._guards)]

    def known(self, tag: int) -> int:
        """Where the first moment of the name is; 0 if it has no entry."""
        tags = self._tags
        for place in self._bucket(tag):
            if tags[place] == tag:
                return place + 1
        return 0

    def place(self, tag: int) -> int:
        """The same; it has an entry afterwards. To be called under the name's guard."""
        if known := self.known(tag):
            return known
        until, width = self._until, self._stride - 1
        place = min(self._bucket(tag), key=lambda place: max(until[place + 1 : place + 1 + width]))
        self._tags[place] = tag
        for moment in range(place + 1, place + 1 + width):
            until[moment] = 0.0
        return place + 1

    def _bucket(self, tag: int) -> range:
        first = self._first + tag % self._buckets * _WAYS * self._stride
        return range(first, first + _WAYS * self._stride, self._stride)


class _Guard:
    """One lock that many share; a plain class, since contextlib's costs a microsecond a use."""

    __slots__ = ("_acquire", "_patience", "_release", "_taken")

    def __init__(self, lock: multiprocessing.synchronize.Lock) -> None:
        self._acquire = lock.acquire
        self._release = lock.release
        self._patience = _LOCK_PATIENCE
        self._taken = False

    def __enter__(self) -> None:
        acquire = self._acquire
        self._taken = taken = acquire(True, self._patience)
        # A lock whose holder has died is waited for once, not by each.
        if not taken:
            self._patience = 0.0
        elif not self._patience:
            self._patience = _LOCK_PATIENCE

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


@functools.lru_cache(65_536)
def network_of(address: str) -> str:
    """Whom the limits by address hold for: an IPv4 address, the /64 of an IPv6 address, since that is what one household or one
    server gets; empty where `address` is none."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped:
        return str(ip.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(ip) >> 64 << 64))


def _reasons(settings: Settings) -> dict[str, str]:
    """What the operator reads, by limit, and by those that `guessed` names."""
    return {
        "device_rate": _reason(f"the device sends more than {settings.device_rate:g} messages a second (device_rate)"),
        "device_bytes": _reason(f"the device sends more than {settings.device_bytes} bytes a second (device_bytes)"),
        "product_rate": _reason(
            f"the product's devices send more than {settings.product_rate:g} messages a second together (product_rate)"
        ),
        "product_bytes": _reason(
            f"the product's devices send more than {settings.product_bytes} bytes a second together (product_bytes)"
        ),
        "address_rate": _reason(
            f"more than {settings.address_rate:g} requests a second come from this address (address_rate)"
        ),
        "auth_rate": _reason(f"the device logs in more than {settings.auth_rate:g} times a minute (auth_rate)"),
        _GUESSING + "auth_rate": _reason(
            f"more than {settings.auth_rate:g} logins of this device from this address were refused within a minute (auth_rate)"
        ),
        _GUESSING + "address_auth_rate": _reason(
            f"more than {settings.address_auth_rate:g} logins from this address were refused within a minute (address_auth_rate)"
        ),
    }


def _reason(text: str) -> str:
    """Marks what an operator reads, for whoever translates it."""
    return text


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
