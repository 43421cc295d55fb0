"""Several streams on three NATS servers: the one that leads some of them dies, and nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import nats
import pytest
from examples.cluster import NODES, Cluster

from tests.contracts.test_engine import publish
from tests.house import until
from uplinkd.core.errors import Rejected
from uplinkd.core.groups import Group, Plan
from uplinkd.engine import Query, Taken, open_publisher, open_reader
from uplinkd.engine.bus import NatsBus
from uplinkd.engine.deliveries import JetStreamDeliveries
from uplinkd.engine.embedded import Access
from uplinkd.engine.stream import part_for
from uplinkd.engine.streams import check
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

COUNT = 3
DEVICES = [f"d{number}" for number in range(12)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        for node in NODES:
            made.start_nats(node)
        yield made
    finally:
        made.stop()


async def leads(access: Access, stream: str) -> str:
    """The server that leads the stream, once all replicas are in touch."""
    end = time.monotonic() + 30
    while True:
        client = await nats.connect(list(access.urls), user=access.user, password=access.password)
        told = json.loads((await client.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=2)).data).get(
            "cluster", {}
        )
        await client.close()
        await asyncio.sleep(0)
        if told.get("leader") and all(each["current"] for each in told.get("replicas", [{"current": False}])):
            return str(told["leader"])
        assert time.monotonic() < end
        await asyncio.sleep(0.2)


async def test_a_leader_dies_and_nothing_acknowledged_is_lost(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """kill -9 of the server that leads one of the streams: a group gets everything, and each device's in order."""
    settings = Settings(data=tmp_path, nats_url=cluster.nats_url, replicas=3, partitions=COUNT)
    access = Access.of(settings)
    publisher = open_publisher(settings, access)
    await publisher.start()
    await until(lambda: publisher.connected, 30)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        await check(settings, access)
    assert caplog.messages == []
    with pytest.raises(Rejected, match=r"partitions = 1, .*UPLINKD was made as one of 3"):
        await check(settings.model_copy(update={"partitions": 1}), access)
    bus = NatsBus(access, "test")
    running = asyncio.create_task(bus.run())
    deliveries = JetStreamDeliveries(bus)
    taken: list[Taken] = []

    def take(each: Taken) -> None:
        taken.append(each)
        each.accept()
        feed.want(1)

    feed = deliveries.feed(Group(3, "g", Plan(products=None, ack_wait=2), 0, 1, 0), take)
    feed.want(50)
    acknowledged: dict[int, tuple[str, int]] = {}

    async def devices_publish(device: str, end: float) -> None:
        count = 0
        while time.monotonic() < end:
            number, fault = await publish(publisher, f"{device}/{count}".encode(), f"/pk/{device}/user/update")
            if not fault:
                assert number not in acknowledged
                acknowledged[number] = (device, count)
            count += 1
            await asyncio.sleep(0.02)

    end = time.monotonic() + 25
    tasks = [asyncio.create_task(devices_publish(device, end)) for device in DEVICES]
    await asyncio.sleep(2)
    victim = await leads(access, part_for("/.pk.d1.user.update", COUNT).name)
    cluster.end(victim, signal.SIGKILL)
    killed = len(acknowledged)
    await asyncio.gather(*tasks)
    assert {device for device, _ in list(acknowledged.values())[killed:]} == set(DEVICES)
    await until(lambda: acknowledged.keys() <= {each.message.id for each in taken}, 30)
    for device in DEVICES:
        mine = [number for number, (name, _) in acknowledged.items() if name == device]
        assert mine == sorted(mine)
        heard = list(dict.fromkeys(each.message.id for each in taken if each.message.device_name == device))
        assert [number for number in heard if number in acknowledged] == mine
    reader = await open_reader(access)
    there = {message.id: message.payload.decode() for message in await reader.latest(Query(), 50_000)}
    assert {number: f"{device}/{count}" for number, (device, count) in acknowledged.items()}.items() <= there.items()
    print(f"{len(acknowledged)} acknowledged, {killed} of them before the kill of {victim}, all there")
    await reader.close()
    feed.close()
    await deliveries.close()
    await end_tasks(running)
    await publisher.stop()
