"""The pumps of all groups with a webhook: as the registry says, until the process stops."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from tests.delivery.receiver import HERE, Got, group, message, receiving
from tests.house import until
from uplinkd.core.groups import Group
from uplinkd.delivery.sender import Sender
from uplinkd.delivery.server import Hooks
from uplinkd.engine.memory import MemoryBus, MemoryDeliveries


async def test_what_is_settled_during_a_stop_begins_nothing() -> None:
    """A change of the registry that is heard then is for the next process: a pump that began now would be cut off with what it
    holds. What a change ends at that moment is waited for."""
    slow = asyncio.Event()

    async def answers(_: Got) -> int:
        await slow.wait()
        return 200

    async with receiving(answers) as receiver:
        mine = group(receiver.url)
        groups: list[Group] = [mine]
        registry: Any = SimpleNamespace(groups=SimpleNamespace(all=lambda: [*groups]))
        bus, deliveries, sender = MemoryBus(), MemoryDeliveries(), Sender(HERE)
        bus.connected = False
        hooks = Hooks(registry, bus, deliveries, sender)
        await hooks.settle()
        deliveries.offer(message(1), message(2))
        await until(lambda: receiver.got)
        groups[:] = [group(receiver.url, lanes=2)]
        changing = asyncio.create_task(hooks.settle())
        await until(lambda: not hooks.states())
        stopping = asyncio.create_task(hooks.stop(2))
        await asyncio.sleep(0.1)
        assert not stopping.done()
        slow.set()
        await stopping
        await changing
        assert [each.id for each in deliveries.accepted] == [1]
        await hooks.settle()
        assert not hooks.states()
        await asyncio.sleep(0.1)
        assert [got.ids for got in receiver.got] == [[1]]
        await sender.close()
