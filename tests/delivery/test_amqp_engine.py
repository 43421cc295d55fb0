"""The AMQP door between a real nats-server and consumers of proton's engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.delivery.peer import GROUP, Doorway, Known, doorway, needs_proton
from tests.house import until
from uplinkd.core.subjects import to_subject
from uplinkd.engine import open_publisher
from uplinkd.engine.bus import NatsBus
from uplinkd.engine.deliveries import JetStreamDeliveries
from uplinkd.engine.embedded import EmbeddedServer
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks

pytestmark = needs_proton


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    started = EmbeddedServer.start(Settings(data=tmp_path, nats_listen=""))
    yield started
    started.stop()


@pytest.fixture
async def house(server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[Doorway]:
    """With 20 messages stored."""
    publisher = open_publisher(Settings(data=tmp_path, nats_listen=""), server.access)
    await publisher.start()
    await until(lambda: publisher.connected)
    bus = NatsBus(server.access, "test")
    running = asyncio.create_task(bus.run())
    await until(lambda: bus.connected)
    deliveries = JetStreamDeliveries(bus)
    stored: list[int] = []
    for number in range(20):
        subject = to_subject("/pk/lamp/user/update").encode()
        publisher.publish(subject, f"payload {number}".encode(), lambda at, _: stored.append(at))
    await until(lambda: len(stored) == 20)
    async with doorway(known=Known(named={GROUP.name: GROUP}), deliveries=deliveries) as opened:
        yield opened
    await deliveries.close()
    await asyncio.sleep(0.2)  # feeds that were closed hear on for a moment
    await end_tasks(running)
    await publisher.stop()


async def test_what_is_stored_reaches_consumers_and_is_done_with(house: Doorway) -> None:
    """Shared between two; what one of them released, and what it held when it died, the other one gets."""
    first, second = [await house.consumer(credit=5) for _ in range(2)]
    held = {each.id for each in await first.messages(5)}
    got = {each.id for each in await second.messages(5)}
    second.settle()
    assert not held & got
    first.settle(0x26, 2, credit=False)
    await first.until(lambda: house.door.consumers())
    first.leave()
    while len(got) < 20:
        await second.messages(1)
        got |= {each.id for _, each in second.got}
        second.settle()
    assert held <= got
    await asyncio.sleep(0.1)
    assert not second.got
