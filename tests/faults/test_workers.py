"""Processes that stand still or grow: the supervisor notices, and devices are soon somebody else's."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import time
from pathlib import Path

import pytest

from tests.faults.load import LIMITS, Load, start_load
from tests.faults.table import Tell
from tests.house import Server, alive, freeze, make_devices, serving, until

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.xdist_group("faults")]


async def test_a_frozen_worker_is_replaced_within_five_seconds(tmp_path: Path, tell: Tell) -> None:
    """Its devices are closed and served by its successor; the other worker does not notice."""
    with serving(tmp_path / "data", *LIMITS) as server:
        load = start_load(server)
        before = server.children("uplinkd-worker")
        await load.run(7, lambda: freeze(before[0]), after=1)
        assert load.refused == []
        assert load.broken
        row = load.row("worker frozen", server.data)
        after = server.children("uplinkd-worker")
        assert len(after) == 2
        assert before[0] not in after
        assert before[1] in after
        log = server.log.read_text()
        assert "has stood still for 3 s; it is killed" in log
        assert "was killed by SIGKILL; it is started again" in log
        tell(row)


async def test_devices_do_not_notice_a_frozen_delivery_or_console(tmp_path: Path, tell: Tell) -> None:
    server = Server(tmp_path / "data", LIMITS, console_port=0).start()
    try:
        load = start_load(server)
        frozen = server.children("uplinkd-deliver") + server.children("uplinkd-console")
        assert len(frozen) == 2

        def fault() -> None:
            for pid in frozen:
                freeze(pid)

        await load.run(6, fault, after=1)
        assert not load.refused
        assert not load.broken
        row = load.row("delivery and console frozen", server.data)
        assert not any(map(alive, frozen))
        assert len(server.children("uplinkd-deliver") + server.children("uplinkd-console")) == 2
        tell(row)
    finally:
        server.kill()


async def test_a_server_that_was_frozen_as_a_whole_kills_nobody(tmp_path: Path, tell: Tell) -> None:
    """As on a machine that was suspended: the supervisor, awake again, counts anew."""
    with serving(tmp_path / "data", *LIMITS) as server:
        load = start_load(server)
        processes = [server.pid, *server.children("")]

        def fault() -> None:
            for pid in processes:
                freeze(pid)
            time.sleep(3.5)
            for pid in processes:  # the supervisor is awake first, and the others look as if they were dead
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.2)

        await load.run(8, fault, after=1)
        row = load.row("everything frozen for 3.5 s", server.data)
        assert [server.pid, *server.children("")] == processes
        assert "stood still" not in server.log.read_text()
        tell(row)


async def test_a_worker_that_outgrows_its_memory_is_replaced_without_harm(tmp_path: Path, tell: Tell) -> None:
    """Thousands of idle connections make it grow. It answers what is under way, closes them, and its successor takes over."""
    with serving(tmp_path / "data", *LIMITS, "--workers", "1", "--worker-memory", "128MiB") as server:
        (worker,) = server.children("uplinkd-worker")
        load = Load(make_devices(server, 4))
        idle: list[asyncio.StreamWriter] = []
        context = server.context()
        async with load.under_way():
            while "more than worker_memory allows" not in server.log.read_text():
                assert len(idle) < 9000
                made = await asyncio.gather(*(_connected(server, context) for _ in range(25)), return_exceptions=True)
                idle += [each for each in made if isinstance(each, asyncio.StreamWriter)]
            load.harmed = time.monotonic()
            await until(load.is_back, 15)
            await until(lambda: not alive(worker), 15)
        for writer in idle:
            writer.transport.abort()
        assert not load.refused
        row = load.row("worker outgrows its memory", server.data)
        log = server.log.read_text()
        assert "its successor is started" in log
        assert "ERROR" not in log
        tell(row)


async def _connected(server: Server, context: ssl.SSLContext) -> asyncio.StreamWriter:
    return (await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname="localhost"))[1]
