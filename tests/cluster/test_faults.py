"""What befalls a cluster: nothing that was acknowledged is lost, and the windows in which nothing is acknowledged are short."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import time
from collections.abc import Awaitable, Callable

import nats
import pytest

from tests.cluster.conftest import GATEWAYS, NODES, Plant
from tests.faults.load import Load
from tests.house import cli, make_devices
from uplinkd.engine.stream import STREAM

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster"), pytest.mark.timeout(240)]
needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed")

DEVICES = 4


async def leader(plant: Plant) -> int:
    """The node whose replica of the stream leads, once all of them are in touch."""
    cluster = plant.cluster
    end = time.monotonic() + 30
    while True:
        try:
            client = await nats.connect(
                [f"nats://{cluster.hosts[node]}:{cluster.ports[f'nats-{node}']}" for node in NODES],
                user="uplinkd",
                password=cluster.secrets["uplinkd"],
                connect_timeout=1,
                max_reconnect_attempts=1,
                error_cb=_ignore,
            )
            try:
                answer = json.loads((await client.request(f"$JS.API.STREAM.INFO.{STREAM}", b"", timeout=2)).data)
            finally:
                await client.close()
            replicas = answer["cluster"]["replicas"]
            if answer["cluster"].get("leader") and all(each["current"] for each in replicas):
                return int(answer["cluster"]["leader"].rpartition("-")[2])
        except (KeyError, OSError, TimeoutError, nats.errors.Error):
            pass
        assert time.monotonic() < end, "the replicas are not in touch"
        await asyncio.sleep(0.3)


async def _ignore(_error: Exception) -> None:
    """It is asked again."""


async def under_load(plant: Plant, what: str, act: Callable[[], Awaitable[None]], *, settle: float = 4.0) -> Load:
    """Devices publish through HAProxy while `act` is done; all that they were told is stored is there afterwards."""
    load = Load(make_devices(plant.front, DEVICES, what))
    tasks = [asyncio.create_task(load._publish(device, number)) for number, device in enumerate(load.devices)]
    await asyncio.sleep(2)
    assert load.acknowledged, "nothing is acknowledged before anything happens"
    before, load.longest_gap = len(load.acknowledged), 0.0
    await act()
    await asyncio.sleep(settle)
    load.running = False
    await asyncio.gather(*tasks)
    print(
        f"\n{what}: {len(load.acknowledged)} messages acknowledged, {len(load.refused)} refused, {load.broken} connections broken; "
        f"nothing acknowledged for {load.longest_gap:.1f} s at most, slowest answer {load.slowest:.1f} s"
    )
    assert len(load.acknowledged) > before, "nothing is acknowledged afterwards"
    await leader(plant)
    for _ in range(20):  # a cluster that has just come together may not make a consumer for a reader yet
        if cli("messages", "list", "--limit", "1", data=plant.data, check=False).returncode == 0:
            break
        await asyncio.sleep(0.5)
    load.all_found(plant.data)
    return load


@needs_haproxy
async def test_the_leader_is_killed(plant: Plant) -> None:
    """kill -9 of the nats-server that orders the messages: another one takes over."""
    node = await leader(plant)

    async def kill() -> None:
        plant.cluster.end(f"nats-{node}", signal.SIGKILL)
        await asyncio.sleep(12)
        plant.cluster.start_nats(node)

    load = await under_load(plant, "leader killed", kill)
    assert load.longest_gap < 30


@needs_haproxy
async def test_a_node_is_parted_and_comes_back(plant: Plant) -> None:
    """The leader, and every packet to and from it is lost."""
    networks = plant.networks
    if networks is None:
        pytest.skip("networks cannot be made here: that takes root and iproute2")
    node = await leader(plant)

    async def part() -> None:
        networks.part(node)
        await asyncio.sleep(15)
        networks.heal(node)

    load = await under_load(plant, "leader parted and healed", part, settle=8)
    assert load.longest_gap < 45


@needs_haproxy
async def test_a_gateway_is_killed_in_mid_request(plant: Plant) -> None:
    """Its devices are broken off and go on at the other one."""
    await leader(plant)

    async def kill() -> None:
        plant.cluster.end("gateway-2", signal.SIGKILL)
        await asyncio.sleep(4)
        await asyncio.to_thread(plant.cluster.start_gateway, 2)

    load = await under_load(plant, "gateway killed", kill)
    assert load.broken
    assert load.longest_gap < 10


@needs_haproxy
async def test_everything_is_restarted_in_turn(plant: Plant) -> None:
    """An upgrade: each server and each gateway is stopped in order and started again, once the one before is there."""
    await leader(plant)
    cluster = plant.cluster

    async def roll() -> None:
        for node in NODES:
            await asyncio.to_thread(cluster.end, f"nats-{node}")
            cluster.start_nats(node)
            await leader(plant)
        for number in GATEWAYS:
            await asyncio.to_thread(cluster.end, f"gateway-{number}")
            await asyncio.to_thread(cluster.start_gateway, number)
            await asyncio.sleep(2)

    load = await under_load(plant, "everything restarted in turn", roll)
    assert load.longest_gap < 30
