"""The process that delivers: to consumer groups by webhook and over AMQP, and tells what happens to devices. One for a gateway; what
several of them take of a group, JetStream divides."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from uplinkd.asking import LIVE, TRYING, HookState, Live, Trial, answered
from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.core.groups import Group
from uplinkd.delivery.amqp import AmqpDoor
from uplinkd.delivery.budget import Budget
from uplinkd.delivery.lifecycle import Lifecycle
from uplinkd.delivery.webhook import Pump, Sender, try_delivery
from uplinkd.engine import Bus, Deliveries, Told
from uplinkd.engine.api import ApiError, NotThere
from uplinkd.engine.bus import NatsBus
from uplinkd.engine.deliveries import JetStreamDeliveries
from uplinkd.engine.embedded import Access
from uplinkd.engine.groups import ensure, sweep
from uplinkd.journal import Journal
from uplinkd.metrics import Meter
from uplinkd.observe import Occasionally
from uplinkd.records import RECORDS, answer
from uplinkd.registry import Change, Registry, open_registry
from uplinkd.registry.cache import DeviceCache
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks, spawn
from uplinkd.tls import CertificateFiles, renew

__all__ = ["DeliveryTask", "run"]

log = logging.getLogger("uplinkd.delivery")

_STOP_SECONDS = 3.0
_CLOSING_SECONDS = 4.0
_SWEEP_SECONDS = 60.0
_PAUSE_SECONDS = 1.0
_HANDSHAKE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class DeliveryTask:
    """What the supervisor hands over. `amqp` and `context` are None where there is no AMQP door. `ready` is written to once it
    delivers; `lifeline` reports EOF when the supervisor has died."""

    settings: Settings
    amqp: socket.socket | None = field(repr=False)
    context: ssl.SSLContext | None
    certificates: list[CertificateFiles]
    access: Access
    meter: Meter = field(repr=False)
    ready: Connection = field(repr=False)
    lifeline: int


def run(task: DeliveryTask) -> None:
    """Deliver until SIGTERM or the supervisor's end; the process then exits. A SIGINT is the supervisor's to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)  # devices come first: what they report is stored, and can wait a moment
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(task))
    os._exit(0)  # a thread that still looks a name up, which may take half a minute, would be waited for


async def _serve(task: DeliveryTask) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_reader(task.lifeline, stop.set)

    settings = task.settings
    registry = open_registry(settings)
    journal = Journal(settings)
    cache = DeviceCache(registry)  # of it, what follows the changes of the registry
    bus = NatsBus(task.access, "uplinkd delivery")
    deliveries = JetStreamDeliveries(bus)
    sender = Sender(settings)
    budget = Budget()
    hooks = Hooks(registry, bus, deliveries, sender, budget)
    cache.on_change(hooks.changed)
    duties = [
        asyncio.create_task(duty)
        for duty in (
            bus.run(),
            cache.run(),
            journal.run(),
            Lifecycle(registry, bus, settings.partitions).run(),
            hooks.run(),
            task.meter.beats(),
        )
    ]
    door = server = None
    if task.amqp:
        door = AmqpDoor(settings, registry, deliveries, journal.record, budget)
        cache.on_change(door.changed)
        server = await loop.create_server(
            door.connection, sock=task.amqp, ssl=task.context, ssl_handshake_timeout=_HANDSHAKE_SECONDS
        )
        assert task.context
        duties.append(asyncio.create_task(renew(task.context, task.certificates)))

    def live() -> Live:
        return Live(door.consumers() if door else [], hooks.states())

    bus.listen(LIVE, lambda told: bus.tell(told.reply, live().document()))
    trials: set[asyncio.Task[None]] = set()

    def try_hook(told: Told) -> None:
        spawn(hooks.answer_trial(told), trials)

    bus.listen(TRYING, try_hook, queue="delivery")

    async def tell_records(told: Told) -> None:
        bus.tell(told.reply, await asyncio.to_thread(answer, settings, told))

    def asked_records(told: Told) -> None:
        spawn(tell_records(told), trials)

    bus.listen(RECORDS, asked_records)
    task.ready.send_bytes(b"ready")

    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([stopped, *duties], return_when=asyncio.FIRST_COMPLETED)
    loop.remove_reader(task.lifeline)
    # Whatever may hang: without a supervisor there is nobody else to end this process.
    loop.call_later(_STOP_SECONDS + _CLOSING_SECONDS, os._exit, 1)
    if server:
        server.close()
    await asyncio.gather(hooks.stop(_STOP_SECONDS), door.drain(_STOP_SECONDS) if door else asyncio.sleep(0))
    await deliveries.close()
    with contextlib.suppress(Unavailable):
        await bus.settled()
    failed = [duty for duty in duties if duty.done() and not duty.cancelled()]
    await end_tasks(stopped, *duties, *trials)
    await sender.close()
    await journal.close()
    await cache.close()
    registry.close()
    for duty in failed:
        duty.result()


class Hooks:
    """A pump for each group with a webhook, and a consumer in JetStream for every group: both as the registry says now."""

    def __init__(
        self, registry: Registry, bus: Bus, deliveries: Deliveries, sender: Sender, budget: Budget | None = None
    ) -> None:
        self._registry = registry
        self._bus = bus
        self._deliveries = deliveries
        self._sender = sender
        self._budget = budget or Budget()
        self._pumps: dict[int, tuple[Group, Pump, asyncio.Task[None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._stirred = asyncio.Event()
        self._warn = Occasionally(10)

        async def connected() -> None:
            self._stirred.set()

        bus.on_connected(connected)

    def changed(self, change: Change) -> None:
        if change.group_id is not None or (not change.product_key and change.app_id is None):
            self._stirred.set()

    def states(self) -> list[HookState]:
        return [pump.state() for _, pump, _ in self._pumps.values()]

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._stirred.clear()
            try:
                await self.settle()
            except Unavailable as fault:
                if self._warn():
                    log.warning("%s; consumer groups stay as they were", fault)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SWEEP_SECONDS):
                    await self._stirred.wait()

    async def settle(self) -> None:
        """Start, stop and change what the registry says; raise Unavailable."""
        groups = await self._groups()
        wanted = {group.id: group for group in groups if group.plan.webhook and not group.plan.paused}
        outdated = [key for key, (group, _, task) in self._pumps.items() if group != wanted.get(key) or task.done()]
        await asyncio.gather(*(spawn(self._end(self._pumps.pop(key), _STOP_SECONDS), self._ending) for key in outdated))
        for group in wanted.values():
            if group.id not in self._pumps and not self._stopping:
                pump = Pump(group, self._deliveries, self._sender, budget=self._budget)
                self._pumps[group.id] = group, pump, asyncio.create_task(_guarded(group, pump))
        if self._bus.connected:
            for group in groups:
                try:
                    await ensure(self._bus, group)
                except NotThere:
                    raise  # the stream itself, for all of them
                except ApiError as fault:
                    if self._warn():
                        log.warning("consumer group %s: %s", group.name, fault)
            await sweep(self._bus, self._groups)

    async def _groups(self) -> list[Group]:
        return await asyncio.to_thread(self._registry.groups.all)

    async def answer_trial(self, told: Told) -> None:
        """Post a sample event to the webhook of the group that is named, and say what became of it."""
        self._bus.tell(told.reply, await answered(self._try(told.payload.decode(errors="replace"))))

    async def _try(self, name: str) -> dict[str, Any]:
        group = await asyncio.to_thread(self._registry.groups.get, name)
        if group.plan.webhook is None:
            raise Rejected(f"consumer group {name!r} has no webhook to try")
        answer = await try_delivery(group, self._sender)
        return Trial(answer.status, answer.fault, answer.text, round(answer.seconds, 3)).document()

    async def stop(self, within: float) -> None:
        """End all pumps, and begin none any more."""
        self._stopping = True
        await asyncio.gather(*(self._end(each, within) for each in self._pumps.values()), *self._ending)
        self._pumps.clear()

    async def _end(self, pumping: tuple[Group, Pump, asyncio.Task[None]], within: float) -> None:
        _, pump, task = pumping
        await pump.stop(within)
        await end_tasks(task)


async def _guarded(group: Group, pump: Pump) -> None:
    try:
        await pump.run()
    except Exception:
        log.exception("a fault of ours while posting the messages of consumer group %s", group.name)
