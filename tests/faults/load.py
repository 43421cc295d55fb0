"""Devices that publish as fast as they are answered while something is harmed, and what they were told."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.table import Row
from tests.house import Device, Server, make_devices, stored
from uplinkd.core.errors import Code

LIMITS = ("--workers", "2", "--device-rate", "0", "--device-bytes", "0", "--auth-rate", "0")

# Between two messages of a device.
PAUSE = 0.014


@dataclass
class Load:
    """Devices that publish as fast as they are answered, and what they were told."""

    devices: list[Device]
    pause: float = PAUSE
    acknowledged: dict[int, bytes] = field(default_factory=dict)
    refused: list[tuple[int, float]] = field(default_factory=list)
    broken: int = 0
    slowest: float = 0.0
    last_success: float = 0.0
    longest_gap: float = 0.0
    """How long at most nobody was told that a message is stored."""
    running: bool = True
    harmed: float = 0.0
    """When the fault had been done."""
    back: dict[int, float] = field(default_factory=dict)
    """Device → so many seconds after `harmed` it was acknowledged again."""

    async def run(self, seconds: float, fault: Callable[[], None], *, after: float) -> None:
        """Publish for `seconds`; call `fault` after `after` seconds."""
        async with self.under_way():
            await asyncio.sleep(after)
            await asyncio.to_thread(fault)
            self.harmed = time.monotonic()
            await asyncio.sleep(seconds - after)

    @contextlib.asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        """Publish meanwhile."""
        tasks = [asyncio.create_task(self._publish(device, number)) for number, device in enumerate(self.devices)]
        try:
            yield
        finally:
            self.running = False
            await asyncio.gather(*tasks)

    def is_back(self) -> bool:
        """Whether each device was acknowledged again."""
        return len(self.back) == len(self.devices)

    async def _publish(self, device: Device, number: int) -> None:
        count = 0
        while self.running:
            payload = b"%d/%d" % (number, count)
            count += 1
            started = time.monotonic()
            try:
                code, message_id = await asyncio.wait_for(self._tell(device, payload), 5)
            except (OSError, ssl.SSLError, asyncio.IncompleteReadError):
                self.broken += 1
                self.slowest = max(self.slowest, time.monotonic() - started)
                await device.close()
                await asyncio.sleep(0.02)
                continue
            self.slowest = max(self.slowest, time.monotonic() - started)
            if code == 0:
                assert message_id not in self.acknowledged, "an id was given twice"
                self.acknowledged[message_id] = payload
                now = time.monotonic()
                self.longest_gap = max(self.longest_gap, now - (self.last_success or now))
                self.last_success = now
                if 0 < self.harmed <= started:
                    self.back.setdefault(number, now - self.harmed)
            else:
                self.refused.append((code, time.monotonic()))
            await asyncio.sleep(self.pause)
        await device.close()

    async def _tell(self, device: Device, payload: bytes) -> tuple[int, int]:
        """(code, messageId or 0), signed in where that is needed."""
        if not device.token and (code := await device.login()):
            return code, 0
        code, message_id = await device.publish(payload)
        if code == Code.TOKEN_IS_EXPIRED:
            device.token = ""
        return code, message_id

    def row(self, fault: str, data: Path, *, within: float = 5) -> Row:
        """What is promised of every fault, asserted: documented codes or a closed connection within 5 s, back by itself, and all that
        was acknowledged is stored. A request that has no answer within 5 s is given up; with a larger `within` that is no failure."""
        assert {code for code, _ in self.refused} <= set(Code), self.refused
        assert self.slowest < within
        assert self.is_back(), f"{sorted(self.back)} alone are back"
        self.all_found(data)
        saw = [str(code) for code in sorted({code for code, _ in self.refused})]
        saw += ["closed connections"] if self.broken else []
        count = len(self.acknowledged)
        return Row(fault, ", ".join(saw) or "nothing", self.slowest, max(self.back.values()), count, count)

    def all_found(self, data: Path) -> None:
        found: dict[int, bytes] = {}
        for device in self.devices:  # one by one: no list shows more than 10,000
            found |= stored(data, device.product, device.name)
        missing = {number: payload for number, payload in self.acknowledged.items() if found.get(number) != payload}
        assert not missing, f"{len(missing)} of {len(self.acknowledged)} acknowledged messages are not stored"


def start_load(server: Server) -> Load:
    return Load(make_devices(server, 16))
