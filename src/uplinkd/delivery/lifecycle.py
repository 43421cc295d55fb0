"""What happens to devices, told as messages: the registry keeps each change until it is stored in the stream.

A change that is told twice, since whoever told it died before it could say so, or by two gateways at once, is stored once: its
Nats-Msg-Id is the same, and JetStream remembers those for two minutes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence

from uplinkd.core.errors import Unavailable
from uplinkd.core.model import LifecycleChange, Origin
from uplinkd.core.subjects import to_subject
from uplinkd.engine import ORIGIN_HEADER, Bus
from uplinkd.engine.api import document_of
from uplinkd.engine.stream import part_for
from uplinkd.observe import Occasionally
from uplinkd.registry import Registry

__all__ = ["Lifecycle", "lifecycle_message", "lifecycle_topic"]

log = logging.getLogger("uplinkd.delivery")

_LOOK_SECONDS = 0.25
_PAGE = 1000
_AT_ONCE = 250


class Lifecycle:
    """Tells what the registry has to tell. `run` does so until cancelled; an outage is waited out."""

    def __init__(self, registry: Registry, bus: Bus, partitions: int = 1) -> None:
        self._partitions = partitions
        self._registry = registry
        self._bus = bus
        self._warn = Occasionally(10)

    async def run(self) -> None:
        while True:
            try:
                while self._bus.connected and await self.tell():
                    pass
            except Unavailable as fault:
                if self._warn():
                    log.warning("%s; what happened to devices is told later", fault)
            await asyncio.sleep(_LOOK_SECONDS)

    async def tell(self) -> int:
        """Tell some of what is to be told; how many. Raise Unavailable, and then the rest is told another time."""
        changes = await asyncio.to_thread(self._registry.lifecycle, _PAGE)
        for part in _one_each(changes):
            stored = await asyncio.gather(*map(self._store, part), return_exceptions=True)
            fault = next((each for each in stored if isinstance(each, BaseException)), None)
            done = stored.index(fault) if fault else len(part)
            if done:
                await asyncio.to_thread(self._registry.lifecycle_told, part[done - 1].id)
            if fault:
                raise fault
        return len(changes)

    async def _store(self, change: LifecycleChange) -> None:
        headers = {ORIGIN_HEADER: Origin.LIFECYCLE.value, "Nats-Msg-Id": f"lifecycle-{change.id}-{change.at}"}
        subject = to_subject(lifecycle_topic(change))
        subject = part_for(subject, self._partitions).ingest + subject
        document_of((await self._bus.ask(subject, lifecycle_message(change), headers)).payload)


def lifecycle_topic(change: LifecycleChange) -> str:
    return f"/{change.product_key}/{change.device_name}/thing/lifecycle"


def lifecycle_message(change: LifecycleChange) -> bytes:
    """The platform's form, without the DeviceSecret that it sends along."""
    document = {
        "action": change.action.value,
        "productKey": change.product_key,
        "deviceName": change.device_name,
        "messageCreateTime": change.at,
    }
    return json.dumps(document, separators=(",", ":")).encode()


def _one_each(changes: Sequence[LifecycleChange]) -> Iterator[list[LifecycleChange]]:
    """`changes` in parts in which no device is twice: what is told at once may be stored in any order."""
    part: list[LifecycleChange] = []
    seen: set[tuple[str, str]] = set()
    for change in changes:
        device = change.product_key, change.device_name
        if device in seen or len(part) == _AT_ONCE:
            yield part
            part, seen = [], set()
        part.append(change)
        seen.add(device)
    if part:
        yield part
