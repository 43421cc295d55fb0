"""Devices that publish as fast as they are answered while something is harmed, and what they were told."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.house import Device, Server, make_devices, stored

LIMITS = ("--workers", "2", "--device-rate", "0", "--device-bytes", "0", "--auth-rate", "0")

# Between two messages of a device, so that no test stores more than one `messages list` can show.
PAUSE = 0.014


@dataclass
class Load:
    """Devices that publish as fast as they are answered, and what they were told."""

    devices: list[Device]
    acknowledged: dict[int, bytes] = field(default_factory=dict)
    refused: list[tuple[int, float]] = field(default_factory=list)
    broken: int = 0
    slowest: float = 0.0
    last_success: float = 0.0
    longest_gap: float = 0.0
    """How long at most nobody was told that a message is stored."""
    running: bool = True

    async def run(self, seconds: float, fault: Callable[[], None], *, after: float) -> None:
        """Publish for `seconds`; call `fault` after `after` seconds."""
        tasks = [asyncio.create_task(self._publish(device, number)) for number, device in enumerate(self.devices)]
        await asyncio.sleep(after)
        await asyncio.to_thread(fault)
        await asyncio.sleep(seconds - after)
        self.running = False
        await asyncio.gather(*tasks)

    async def _publish(self, device: Device, number: int) -> None:
        count = 0
        while self.running:
            payload = b"%d/%d" % (number, count)
            count += 1
            started = time.monotonic()
            try:
                if not device.token:
                    await device.login()
                code, message_id = await asyncio.wait_for(device.publish(payload), 5)
            except (OSError, ssl.SSLError, asyncio.IncompleteReadError):
                self.broken += 1
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
            else:
                self.refused.append((code, time.monotonic()))
            await asyncio.sleep(PAUSE)
        await device.close()

    def all_found(self, data: Path) -> None:
        found = stored(data, self.devices[0].product)
        missing = {number: payload for number, payload in self.acknowledged.items() if found.get(number) != payload}
        assert not missing, f"{len(missing)} of {len(self.acknowledged)} acknowledged messages are not stored"


def start_load(server: Server) -> Load:
    return Load(make_devices(server, 16))
