"""Webhooks over the real engine: what is stored arrives, in order, and what is refused is among the dead letters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.contracts.test_bus import running
from tests.delivery.receiver import HERE, PRODUCT, Got, answer, group, receiving
from tests.house import until
from uplinkd.core.groups import Form, Group
from uplinkd.delivery.webhook import Pump, Sender
from uplinkd.engine import Bus
from uplinkd.engine.deliveries import JetStreamDeliveries
from uplinkd.engine.embedded import read_access
from uplinkd.engine.groups import JetStreamDesk
from uplinkd.engine.jetstream import JetStreamPublisher
from uplinkd.settings import Settings

DEVICES, MESSAGES = 10, 600


@asynccontextmanager
async def pumping(mine: Group, bus: Bus) -> AsyncGenerator[Pump]:
    deliveries, sender = JetStreamDeliveries(bus), Sender(HERE)
    pump = Pump(mine, deliveries, sender, haste=20)
    task = asyncio.create_task(pump.run())
    try:
        yield pump
    finally:
        await pump.stop(2)
        await task
        await deliveries.close()
        await sender.close()


async def test_what_is_stored_arrives_and_what_is_refused_is_buried(tmp_path: Path) -> None:
    """In order, also what a pump that was stopped gave back to the next one, as when its group is changed; the one bad message is
    a dead letter with its tries."""

    def answers(got: Got) -> bytes | int:
        return answer(422, "no such field") if b'{"n":7}' in got.body else 200

    settings = Settings(data=tmp_path, nats_listen="")
    async with running(settings) as line, receiving(answers) as receiver:
        publisher = JetStreamPublisher(settings, read_access(tmp_path / "nats" / "access.json"))
        await publisher.start()
        await until(lambda: publisher.connected)
        stored: list[int] = []
        for number in range(MESSAGES):
            subject = f"/.{PRODUCT}.lamp-{number % DEVICES}.user.update".encode()
            publisher.publish(subject, b'{"n":%d}' % number, lambda number, _: stored.append(number))
        await until(lambda: len(stored) == MESSAGES)
        mine = group(receiver.url, form=Form.BATCH, batch=20)
        async with pumping(mine, line.mine):
            await until(lambda: len(receiver.accepted) > MESSAGES / 3)
        assert len(receiver.accepted) < MESSAGES - 1
        desk = JetStreamDesk(line.mine)
        async with pumping(mine, line.mine):
            await until(lambda: len(receiver.accepted) >= MESSAGES - 1, 20)
            await until(lambda: any(got.ids == [stored[7]] for got in receiver.got))
            while not (dead := await desk.dead(mine)):
                await asyncio.sleep(0.05)
        await publisher.stop()
    assert sorted(receiver.accepted) == sorted(set(stored) - {stored[7]})
    for device in range(DEVICES):
        own = [number for number in receiver.accepted if stored.index(number) % DEVICES == device]
        assert own == sorted(own)
    (letter,) = dead
    assert (letter.message.payload, letter.tries) == (b'{"n":7}', 3)
    assert letter.reason == "it answered 422 Unprocessable Entity, 3 times: no such field"
