"""kill -9 under load: of a worker, of the engine, of everything. What was acknowledged is found again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.house import Device, Server, alive, freeze, make_devices, serving, stored

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]

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
                self.last_success = time.monotonic()
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


async def test_a_killed_worker_is_replaced_and_loses_nothing(tmp_path: Path) -> None:
    """Its connections break, its successor takes over, the other worker does not notice."""
    with serving(tmp_path / "data", *LIMITS) as server:
        load = start_load(server)
        before = server.children("uplinkd-worker")

        def fault() -> None:
            os.kill(before[0], signal.SIGKILL)

        await load.run(4, fault, after=1.5)
        after = server.children("uplinkd-worker")
        assert len(after) == 2
        assert before[0] not in after
        assert before[1] in after
        assert load.refused == []
        assert 1000 < len(load.acknowledged) < 10_000
        load.all_found(server.data)
        assert "was killed by SIGKILL; it is started again" in server.log.read_text()


async def test_a_killed_engine_comes_back_by_itself_and_loses_nothing(tmp_path: Path) -> None:
    """Publishes meanwhile wait or answer 30001 within 2 s; the gateway stays up."""
    with serving(tmp_path / "data", *LIMITS) as server:
        load = start_load(server)

        def fault() -> None:
            (engine,) = server.children("nats-server")
            os.kill(engine, signal.SIGKILL)

        await load.run(5, fault, after=1.5)
        assert {code for code, _ in load.refused} <= {30001}
        assert load.slowest < 2
        assert load.broken == 0
        assert load.last_success > time.monotonic() - 2
        assert 1000 < len(load.acknowledged) < 10_000
        load.all_found(server.data)


async def test_a_frozen_engine_is_answered_30001_within_two_seconds(tmp_path: Path) -> None:
    """SIGSTOP, the worst kind of away; it recovers when the engine does."""
    with serving(tmp_path / "data", *LIMITS) as server:
        load = start_load(server)
        (engine,) = server.children("nats-server")

        def fault() -> None:
            freeze(engine)
            time.sleep(4)
            os.kill(engine, signal.SIGCONT)

        await load.run(7, fault, after=1)
        assert load.refused
        assert {code for code, _ in load.refused} == {30001}
        assert load.slowest < 2.1
        assert load.broken == 0
        assert load.last_success > time.monotonic() - 2
        load.all_found(server.data)


@pytest.mark.parametrize("round_", range(3))
async def test_a_killed_server_starts_again_at_once_and_has_lost_nothing(tmp_path: Path, round_: int) -> None:
    """Supervisor, workers and engine all killed -9 under load; the same tokens go on on the same port."""
    with serving(tmp_path / "data", *LIMITS) as server:
        load = start_load(server)

        def fault() -> None:
            server.kill()
            server.start()

        await load.run(6, fault, after=1.5 + 0.1 * round_)
        assert load.refused == []
        assert load.last_success > time.monotonic() - 2
        assert 1000 < len(load.acknowledged) < 10_000
        load.all_found(server.data)
        assert server.stop() == 0
        load.all_found(server.data)


async def test_a_killed_supervisor_leaves_no_orphan(tmp_path: Path) -> None:
    """Workers drain and end, the engine ends, and the next start finds neither port nor lock taken."""
    with serving(tmp_path / "data", *LIMITS) as server:
        children = server.children("")
        assert server.process
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait(5)
        server._close()
        server.start()
        end = time.monotonic() + 15
        while time.monotonic() < end and any(map(alive, children)):
            await asyncio.sleep(0.1)
        assert not [pid for pid in children if alive(pid)]
        assert server.stop() == 0


async def test_a_full_disk_is_30001_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    """The engine's store on a file system that fills up: a documented code, and service again when there is room."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    if os.system(f"mount -t tmpfs -o size=24m tmpfs {mount}"):
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        with serving(mount / "data", *LIMITS, "--keep-bytes", "1GiB") as server:
            load = Load(make_devices(server, 4))
            ballast = mount / "ballast"

            def fault() -> None:
                with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(b"\0" * 65536)
                time.sleep(3)
                ballast.unlink()

            await load.run(7, fault, after=1)
            assert {code for code, _ in load.refused} <= {30001, 10000, 20004}
            load.all_found(server.data)
    finally:
        os.system(f"umount -l {mount}")
