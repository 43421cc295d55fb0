"""Flow control across gateways: each tells the others ten times a second what it has charged, and they add that to their tables.

Within a gateway limits are exact. Between gateways a rate is exceeded by what passes before the others have heard: about a tenth
of a second of it for each further gateway, and by a burst for each where all are met at the same moment.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from uplinkd.core.messages import in_messages
from uplinkd.engine import Bus, Told
from uplinkd.flow import Charges, Flow, Notes
from uplinkd.peers import Peers

__all__ = ["Shares"]

_CHARGED = "uplinkd.charged."
_WINDOW_SECONDS = 0.1
# NATS takes a megabyte at once, if its owner has not set less; who is refused may have called itself by 4 kB.
_MOST_BYTES = 128 * 1024


class Shares:
    """One worker's part. What others tell, one worker of each gateway hears: all of them share its table."""

    def __init__(self, bus: Bus, flow: Flow, peers: Peers, gateway: str) -> None:
        self._bus = bus
        self._flow = flow
        self._peers = peers
        self._gateway = gateway
        bus.listen(f"{_CHARGED}*", self._heard, queue=f"charged-{gateway}")

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(_WINDOW_SECONDS)
            self.tell()

    def tell(self) -> None:
        """Tell what was charged since the last time; nothing is noted where there is nobody to tell."""
        if not self._peers.others:
            self._flow.notes = None
        elif self._flow.notes is None:
            self._flow.notes = Notes()
        else:
            for message in _messages(self._flow.charged(len(self._peers.gateways), _WINDOW_SECONDS)):
                self._bus.tell(_CHARGED + self._gateway, message)

    def _heard(self, told: Told) -> None:
        if told.subject != _CHARGED + self._gateway:
            document = json.loads(told.payload)
            self._flow.add(Charges(**{each.name: document.get(each.name, []) for each in fields(Charges)}))


def _messages(charges: Charges) -> Iterator[bytes]:
    for name in (each.name for each in fields(Charges)):
        if rows := getattr(charges, name):
            yield from in_messages(rows, functools.partial(_message, name), _MOST_BYTES)


def _message(name: str, rows: Sequence[Any]) -> bytes:
    return json.dumps({name: rows}, separators=(",", ":")).encode()
