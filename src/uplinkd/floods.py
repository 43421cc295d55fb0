"""What flow control holds back again and again: the first of each kind is recorded at once, those that follow are counted, and
recorded together every ten seconds. So a flood of refusals costs neither disk nor a thought for each, and the operator sees who
it was and how many they were.

A kind is a limit and whom it holds for. All of one kind are answered with the same requestId, which leads to what was recorded.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from uplinkd.core import wire
from uplinkd.core.errors import Code, Refused
from uplinkd.gateway import Outcome, Request

__all__ = ["NO_FLOOD", "Flood", "Floods"]

_SECONDS = 10.0
# So many kinds are told apart at a time; what comes beyond them is counted by its limit alone.
_MOST = 10_000
_OF_PRODUCT = frozenset({"product_rate", "product_bytes"})
_OF_ADDRESS = frozenset({"address_rate", "address_auth_rate"})


@dataclass(slots=True)
class Flood:
    """One kind: `body` is its answer over HTTPS; `more` came since it was last recorded, and who comes within ten seconds of the
    one before may be added here."""

    outcome: Outcome
    body: bytes
    more: int = 0
    fresh: bool = True


NO_FLOOD = Flood(Outcome("", "", 0, Code.SUCCESS, "", ""), b"")
"""Stands where there is none."""


class Floods:
    """Those of one door. `record` takes an Outcome; it must neither block nor raise."""

    def __init__(self, record: Callable[[Outcome], None], clock: Callable[[], float]) -> None:
        self._record = record
        self._clock = clock
        self._due = clock() + _SECONDS
        self._floods: dict[tuple[object, ...], Flood] = {}

    def met(
        self, refused: Refused, request: Request, endpoint: str, status: int = 200, *, slowed: bool = False
    ) -> Flood:
        """One more of what `refused` stands for, which names a limit; `slowed` down and not refused, where that is so."""
        limit = refused.limit
        if limit in _OF_PRODUCT:
            kind: tuple[object, ...] = (limit, endpoint, status, request.product_key)
        elif limit in _OF_ADDRESS:
            kind = (limit, endpoint, status, request.network)
        elif limit == "auth_rate":
            kind = (limit, endpoint, status, request.product_key, request.device_name, request.address)
        else:
            kind = (limit, endpoint, status, request.product_key, request.device_name)
        flood = self._floods.get(kind)
        if flood is None:
            if len(self._floods) >= _MOST:
                kind = (limit, endpoint, status)
                flood = self._floods.get(kind)
            if flood is None:
                return self._begin(kind, refused, request, endpoint, status, slowed)
        flood.more += 1
        return flood

    def _begin(
        self, kind: tuple[object, ...], refused: Refused, request: Request, endpoint: str, status: int, slowed: bool
    ) -> Flood:
        of_address, of_device = refused.limit in _OF_ADDRESS, refused.limit not in _OF_PRODUCT | _OF_ADDRESS
        reason = refused.reason
        if slowed:
            reason = f"{reason}; it is slowed down to its rate, nothing is dropped"
        outcome = Outcome(
            secrets.token_hex(8),
            endpoint,
            status,
            refused.code,
            reason,
            "" if refused.limit in _OF_PRODUCT else request.address,
            "" if of_address else request.product_key,
            request.device_name if of_device else "",
            (request.topic or request.path[:300].decode(errors="backslashreplace")) if of_device else "",
        )
        self._record(outcome)
        flood = self._floods[kind] = Flood(outcome, wire.refusal(refused.code, outcome.request_id))
        return flood

    def tick(self) -> None:
        """Now and then: record what was counted, once it is time."""
        if self._clock() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Record what was counted; forget what has ended."""
        self._due = self._clock() + _SECONDS
        for kind, flood in list(self._floods.items()):
            if flood.more:
                self._record(replace(flood.outcome, times=flood.more))
            elif not flood.fresh:
                del self._floods[kind]
            flood.more, flood.fresh = 0, False
