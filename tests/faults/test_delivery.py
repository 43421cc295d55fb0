"""Everything breaks while backends take messages. Each message that a device was told is stored reaches its backend at least once;
what comes twice is counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.faults.backend import AmqpConsumer, Target, all_there, duplicates, out_of_order
from tests.faults.load import LIMITS, Load, start_load
from tests.house import Server, cli, cli_json, serving, until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]

OPTIONS = (*LIMITS, "--webhook-networks", "127.0.0.0/8")
# Requests that may be under way when something dies, each with so many messages: they may come twice.
LANES, BATCH = 4, 50


@contextlib.asynccontextmanager
async def posting(server: Server, *options: str) -> AsyncIterator[tuple[Load, Target]]:
    """Devices, and a target to which what they report is posted."""
    load, target = start_load(server), Target()
    await target.start()
    product = load.devices[0].product
    form = ("--form", "batch", "--batch", str(BATCH), "--lanes", str(LANES), *options)
    cli("group", "create", "backend", "--product", product, "--webhook", target.url, *form, data=server.data)
    try:
        yield load, target
    finally:
        await target.stop()


def report(load: Load, target: Target, what: str) -> None:
    print(f"{what}: {len(load.acknowledged)} acknowledged, all delivered, {duplicates(target.got)} of them again")


async def test_a_target_that_answers_500_for_a_while_misses_nothing(tmp_path: Path) -> None:
    """Two seconds of 500 in the midst of it: what was refused comes again, in the order of its device, and nothing is given up."""
    with serving(tmp_path / "data", *OPTIONS) as server:
        async with posting(server) as (load, target):

            def fault() -> None:
                target.answer = lambda _: 500
                time.sleep(2)
                target.answer = lambda _: 204

            await load.run(4, fault, after=1)
            await all_there(load.acknowledged, target.got, 30)
            assert duplicates(target.got) == 0
            assert out_of_order(target.got) == []
            report(load, target, "target answers 500")


async def test_a_target_that_is_gone_for_a_while_misses_nothing(tmp_path: Path) -> None:
    """Nobody listens at its port; it comes back there."""
    with serving(tmp_path / "data", *OPTIONS) as server:
        async with posting(server) as (load, target):
            loop = asyncio.get_running_loop()

            def fault() -> None:
                asyncio.run_coroutine_threadsafe(target.stop(), loop).result(5)
                time.sleep(2)
                asyncio.run_coroutine_threadsafe(target.start(), loop).result(5)

            await load.run(4, fault, after=1)
            await all_there(load.acknowledged, target.got, 30)
            assert duplicates(target.got) <= LANES * BATCH
            assert out_of_order(target.got) == []
            report(load, target, "target gone")


async def test_a_killed_delivery_is_replaced_and_loses_nothing(tmp_path: Path) -> None:
    """kill -9 of the process that delivers: what it held comes again once its time is up; no device notices."""
    with serving(tmp_path / "data", *OPTIONS) as server:
        async with posting(server, "--ack-wait", "1s") as (load, target):

            def fault() -> None:
                (process,) = server.children("uplinkd-deliver")
                os.kill(process, signal.SIGKILL)

            await load.run(4, fault, after=1.5)
            assert load.refused == []
            assert load.broken == 0
            await all_there(load.acknowledged, target.got, 30)
            report(load, target, "delivery killed")


async def test_a_killed_server_delivers_the_rest_when_it_is_back(tmp_path: Path) -> None:
    """kill -9 of everything at once, in the midst of it."""
    with serving(tmp_path / "data", *OPTIONS) as server:
        async with posting(server, "--ack-wait", "1s") as (load, target):

            def fault() -> None:
                server.kill()
                server.start()

            await load.run(5, fault, after=1.5)
            await all_there(load.acknowledged, target.got, 30)
            report(load, target, "server killed")
            assert server.stop() == 0


async def test_a_killed_engine_delivers_the_rest_when_it_is_back(tmp_path: Path) -> None:
    """kill -9 of nats-server: pulls and acknowledgements go on at the new one."""
    with serving(tmp_path / "data", *OPTIONS) as server:
        async with posting(server, "--ack-wait", "1s") as (load, target):

            def fault() -> None:
                (engine,) = server.children("nats-server")
                os.kill(engine, signal.SIGKILL)

            await load.run(4, fault, after=1.5)
            await all_there(load.acknowledged, target.got, 30)
            report(load, target, "nats-server killed")


async def test_a_server_that_is_stopped_and_started_delivers_the_rest(tmp_path: Path) -> None:
    """SIGTERM, as at an upgrade: what is under way is finished or given back, and little comes twice."""
    with serving(tmp_path / "data", *OPTIONS) as server:
        async with posting(server) as (load, target):

            def fault() -> None:
                assert server.stop() == 0
                server.start()

            await load.run(5, fault, after=1.5)
            await all_there(load.acknowledged, target.got, 30)
            assert duplicates(target.got) <= LANES * BATCH
            report(load, target, "server stopped")


async def test_what_a_dead_consumer_held_comes_to_another(tmp_path: Path) -> None:
    """One takes messages over AMQP and accepts none, until kill -9; another gets all of them, some a second time."""
    pytest.importorskip("proton", reason="python-qpid-proton is not installed: make amqp")
    with serving(tmp_path / "data", *OPTIONS, amqp=True) as server:
        load = start_load(server)
        product = load.devices[0].product
        app = cli_json("app", "create", "backend", "--product", product, data=server.data)
        cli("group", "create", "backend", "--product", product, "--app", "backend", data=server.data)
        greedy, other = (AmqpConsumer(server, app, "backend", hold=hold) for hold in (True, False))
        try:
            await load.run(4, greedy.kill, after=2)
            assert greedy.got
            await all_there(load.acknowledged, other.got, 30)
            assert {number for number, _ in greedy.got} <= {number for number, _ in other.got}
            assert duplicates(other.got) == 0
            print(
                f"consumer killed: {len(load.acknowledged)} acknowledged, {len(greedy.got)} of them held by the dead one"
            )
        finally:
            greedy.kill()
            other.kill()


async def test_consumers_over_amqp_outlive_a_killed_server(tmp_path: Path) -> None:
    """kill -9 of everything: they connect again by themselves and get the rest."""
    pytest.importorskip("proton", reason="python-qpid-proton is not installed: make amqp")
    with serving(tmp_path / "data", *OPTIONS, amqp=True) as server:
        load = start_load(server)
        product = load.devices[0].product
        app = cli_json("app", "create", "backend", "--product", product, data=server.data)
        group = ("group", "create", "backend", "--product", product, "--app", "backend", "--ack-wait", "1s")
        cli(*group, data=server.data)
        consumers = [AmqpConsumer(server, app, "backend") for _ in range(2)]
        try:
            await until(lambda: all(each.process.poll() is None for each in consumers))

            def fault() -> None:
                server.kill()
                server.start()

            await load.run(6, fault, after=1.5)
            got: list[tuple[int, str]] = []
            end = time.monotonic() + 30
            while not load.acknowledged.keys() <= {number for number, _ in got} and time.monotonic() < end:
                await asyncio.sleep(0.1)
                got = [each for consumer in consumers for each in list(consumer.got)]
            await all_there(load.acknowledged, got, 0)
            print(f"server killed, AMQP: {len(load.acknowledged)} acknowledged, {duplicates(got)} delivered again")
        finally:
            for consumer in consumers:
                consumer.kill()
