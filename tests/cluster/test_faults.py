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
from tests.databases import end_connections, execute
from tests.faults.load import Load
from tests.house import Device, cli, cli_json, make_devices, until
from uplinkd.core.errors import Code
from uplinkd.engine.stream import STREAM

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster"), pytest.mark.timeout(240)]
needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed")

DEVICES = 4


async def leader(plant: Plant) -> int:
    """The node whose replica of the stream leads, once all of them are in touch."""
    cluster = plant.cluster
    end = time.monotonic() + 30
    said: object = None
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
                said = answer = json.loads((await client.request(f"$JS.API.STREAM.INFO.{STREAM}", b"", timeout=2)).data)
            finally:
                await client.close()
            replicas = answer["cluster"]["replicas"]
            if answer["cluster"].get("leader") and all(each["current"] for each in replicas):
                return int(answer["cluster"]["leader"].rpartition("-")[2])
        except (KeyError, OSError, TimeoutError, nats.errors.Error) as error:
            said = repr(error)
        assert time.monotonic() < end, f"the replicas are not in touch: {said}"
        await asyncio.sleep(0.3)


async def _ignore(_error: Exception) -> None:
    """It is asked again."""


async def under_load(plant: Plant, what: str, act: Callable[[Load], Awaitable[None]], *, settle: float = 4.0) -> Load:
    """Devices publish through HAProxy while `act` is done; all that they were told is stored is there afterwards."""
    load = Load(make_devices(plant.front, DEVICES, what))
    async with load.under_way():
        await asyncio.sleep(2)
        assert load.acknowledged, "nothing is acknowledged before anything happens"
        before, load.longest_gap = len(load.acknowledged), 0.0
        await act(load)
        await asyncio.sleep(settle)
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


async def resumed(load: Load) -> None:
    """Wait until messages are acknowledged again, by others than whom the fault has struck a moment ago."""
    struck = time.monotonic()
    await until(lambda: load.last_success > struck + 1.5, 45)
    await asyncio.sleep(1)


@needs_haproxy
async def test_the_leader_is_killed(plant: Plant) -> None:
    """kill -9 of the nats-server that orders the messages: another one takes over."""
    node = await leader(plant)

    async def kill(load: Load) -> None:
        plant.cluster.end(f"nats-{node}", signal.SIGKILL)
        await resumed(load)
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

    async def part(load: Load) -> None:
        networks.part(node)
        await resumed(load)
        networks.heal(node)

    load = await under_load(plant, "leader parted and healed", part, settle=8)
    assert load.longest_gap < 45


@needs_haproxy
async def test_a_gateway_is_killed_in_mid_request(plant: Plant) -> None:
    """Its devices are broken off and go on at the other one."""
    await leader(plant)

    async def kill(_: Load) -> None:
        plant.cluster.end("gateway-2", signal.SIGKILL)
        await asyncio.sleep(4)
        await asyncio.to_thread(plant.cluster.start_gateway, 2)

    load = await under_load(plant, "gateway killed", kill)
    assert load.broken
    assert load.longest_gap < 10


async def served(newcomer: Device, within: float, code: int = 0) -> float:
    """How long it took until a device that no gateway knows was let in, or was answered `code`; it is answered 20004 until then, and
    soon."""
    begun = time.monotonic()
    while True:
        asked = time.monotonic()
        answer = await newcomer.login()
        assert answer in (code, Code.UPDATE_SESSION_ERROR)
        assert time.monotonic() - asked < 5
        if answer == code:
            return time.monotonic() - begun
        assert time.monotonic() - begun < within
        await asyncio.sleep(0.02)


@needs_haproxy
async def test_postgresql_is_restarted(plant: Plant) -> None:
    """Devices that are known notice nothing: they report and log in. Others are told to come again, and are let in by themselves
    within seconds of its being back."""
    cluster, newcomers = plant.cluster, make_devices(plant.front, 2, "newcomers of a restart")
    name = f"database-{cluster.primary}"
    known = make_devices(plant.front, 1, "known")[0]
    assert await known.login() == 0
    told: list[str] = []

    async def restart(_: Load) -> None:
        await asyncio.to_thread(cluster.end, name)
        assert await newcomers[0].login() == Code.UPDATE_SESSION_ERROR
        assert await known.login() == 0
        await asyncio.to_thread(cluster.start_database, cluster.primary)
        waited = [await served(newcomer, 10) for newcomer in newcomers]
        told.append(f"first logins are answered {max(waited):.1f} s after PostgreSQL was back")

    load = await under_load(plant, "PostgreSQL restarted", restart, settle=1)
    print(*told)
    assert not load.refused
    assert not load.broken
    assert load.longest_gap < 3
    for device in (*newcomers, known):
        await device.close()


@needs_haproxy
async def test_the_primary_is_killed_and_its_replica_promoted(plant: Plant) -> None:
    """What was acknowledged before is there, with a revocation; gateways find the new primary by themselves. The old one comes back
    and takes writes, which nobody sends it, not even a gateway that starts anew; then it is made a replica."""
    cluster = plant.cluster
    old, names = cluster.primary, f"database-{cluster.primary}"
    newcomers = make_devices(plant.front, 3, "newcomers of a fail-over")
    revoked, late = newcomers[1:]
    told: list[str] = []
    left: list[object] = []

    async def fail_over(_: Load) -> None:
        await asyncio.to_thread(cli, "device", "disable", revoked.product, revoked.name, data=plant.data)
        await asyncio.to_thread(cluster.end, names, signal.SIGKILL)
        killed = time.monotonic()
        await asyncio.sleep(1)
        await asyncio.to_thread(cluster.fail_over)
        waited = await served(newcomers[0], 10)
        told.append(
            f"first logins are answered {waited:.1f} s after the promotion, {time.monotonic() - killed:.1f} s after the death"
        )
        assert await served(revoked, 10, Code.AUTH_CHECK_ERROR) < 10
        await asyncio.to_thread(cluster.start_database, old)  # unaware that it was replaced
        left.extend(await asyncio.to_thread(execute, plant.database(old), COUNTS))
        await asyncio.to_thread(cluster.end, "gateway-2")
        await asyncio.to_thread(cluster.start_gateway, 2)
        assert await served(late, 10) < 10
        end_connections(plant.database(cluster.primary))
        made = await asyncio.to_thread(cli_json, "device", "create", late.product, "later", data=plant.data)
        here = Device(plant.gateway(1), late.product, "later", made["deviceSecret"])
        assert await served(here, 10) < 10
        await here.close()
        assert await asyncio.to_thread(execute, plant.database(old), COUNTS) == left
        assert await asyncio.to_thread(execute, plant.database(cluster.primary), COUNTS) != left

    try:
        load = await under_load(plant, "PostgreSQL failed over", fail_over, settle=1)
        print(*told)
        assert not load.refused
        assert load.longest_gap < 5
    finally:
        for device in newcomers:
            await device.close()
        if names in cluster.processes:
            await asyncio.to_thread(cluster.end, names)
        if cluster.primary != old:
            await asyncio.to_thread(cluster.remake_replica)
    assert await asyncio.to_thread(execute, plant.database(old), "SHOW transaction_read_only") == [["on"]]


@needs_haproxy
async def test_a_replica_is_promoted_beside_a_primary_that_lives(plant: Plant) -> None:
    """A mistake, or a network that was cut between them: the old one, without its replica, can acknowledge nothing any more, and
    gateways go over to the new one within seconds."""
    cluster = plant.cluster
    old, name = cluster.primary, f"database-{cluster.primary}"
    newcomers = make_devices(plant.front, 2, "newcomers of two primaries")
    told: list[str] = []

    async def promote(_: Load) -> None:
        await asyncio.to_thread(cluster.fail_over)
        promoted = time.monotonic()
        waited = await served(newcomers[0], 30)
        told.append(f"first logins are answered {waited:.1f} s after the promotion")
        while await asyncio.to_thread(
            execute, plant.database(cluster.primary), ACTIVATED.format(newcomers[0].name)
        ) != [[True]]:
            assert time.monotonic() < promoted + 30
            await asyncio.sleep(0.2)

    try:
        load = await under_load(plant, "PostgreSQL has two primaries", promote, settle=1)
        print(*told)
        assert not load.refused
    finally:
        for device in newcomers:
            await device.close()
        await asyncio.to_thread(cluster.end, name)
        if cluster.primary != old:
            await asyncio.to_thread(cluster.remake_replica)


ACTIVATED = (
    "SELECT activated IS NOT NULL FROM devices WHERE name = '{}' AND product_id = (SELECT max(id) FROM products)"
)
COUNTS = (
    "SELECT (SELECT count(*) FROM devices), (SELECT count(*) FROM devices WHERE activated IS NOT NULL), "
    "(SELECT max(seq) FROM changes), (SELECT sum(last_seen) FROM devices)"
)


@needs_haproxy
async def test_everything_is_restarted_in_turn(plant: Plant) -> None:
    """An upgrade: each server and each gateway is stopped in order and started again, once the one before is there."""
    await leader(plant)
    cluster = plant.cluster

    async def roll(_: Load) -> None:
        for node in NODES:
            await asyncio.to_thread(cluster.end, f"nats-{node}")
            cluster.start_nats(node)
            await leader(plant)
        for number in (3 - cluster.primary, cluster.primary):
            await asyncio.to_thread(cluster.end, f"database-{number}")
            await asyncio.to_thread(cluster.start_database, number)
        for number in GATEWAYS:
            await asyncio.to_thread(cluster.end, f"gateway-{number}")
            await asyncio.to_thread(cluster.start_gateway, number)
            await asyncio.sleep(2)

    load = await under_load(plant, "everything restarted in turn", roll)
    assert load.longest_gap < 30
