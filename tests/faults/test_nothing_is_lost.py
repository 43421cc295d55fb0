"""kill -9 under load: of a worker, of the engine, of everything. What was acknowledged is found again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.load import LIMITS, Load, start_load
from tests.faults.table import Tell
from tests.house import alive, freeze, make_devices, serving

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.xdist_group("faults")]


async def test_a_killed_worker_is_replaced_and_loses_nothing(tmp_path: Path, tell: Tell) -> None:
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
        row = load.row("worker killed", server.data)
        assert "was killed by SIGKILL; it is started again" in server.log.read_text()
        tell(row)


async def test_a_killed_engine_comes_back_by_itself_and_loses_nothing(tmp_path: Path, tell: Tell) -> None:
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
        tell(load.row("nats-server killed", server.data))


async def test_a_frozen_engine_is_answered_30001_within_two_seconds(tmp_path: Path, tell: Tell) -> None:
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
        tell(load.row("nats-server frozen for 4 s", server.data))


@pytest.mark.parametrize("round_", range(3))
async def test_a_killed_server_starts_again_at_once_and_has_lost_nothing(
    tmp_path: Path, round_: int, tell: Tell
) -> None:
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
        row = load.row("everything killed, and started", server.data)
        assert server.stop() == 0
        load.all_found(server.data)
        tell(row)


async def test_a_killed_supervisor_leaves_no_orphan(tmp_path: Path) -> None:
    """Workers drain and end, the engine ends, and the next start finds neither port nor lock taken."""
    with serving(tmp_path / "data", *LIMITS) as server:
        children = server.children("")
        server.kill_supervisor()
        server.start()
        end = time.monotonic() + 15
        while time.monotonic() < end and any(map(alive, children)):
            await asyncio.sleep(0.1)
        assert not [pid for pid in children if alive(pid)]
        assert server.stop() == 0


async def test_a_full_disk_is_30001_and_nothing_acknowledged_is_lost(tmp_path: Path, tell: Tell) -> None:
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
            tell(load.row("disk full for 3 s", server.data))
    finally:
        os.system(f"umount -l {mount}")
