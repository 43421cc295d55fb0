"""One worker process: puts registry, engine, gateway and doors together, serves until told to drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import uvloop

from uplinkd.core.model import DeviceName, ProductKey
from uplinkd.engine import open_publisher
from uplinkd.engine.embedded import Access
from uplinkd.flow import Flow
from uplinkd.gateway import Gateway
from uplinkd.http.limits import Limits
from uplinkd.http.listener import Listener
from uplinkd.http.protocol import Door, Outcome
from uplinkd.journal import Journal, Refusal
from uplinkd.registry import open_registry
from uplinkd.registry.cache import DeviceCache
from uplinkd.settings import Settings
from uplinkd.tls import CertificateFiles, Renewal

__all__ = ["DRAIN_SECONDS", "Task", "run"]

log = logging.getLogger("uplinkd")

DRAIN_SECONDS = 4.0
_RENEWAL_SECONDS = 2.0
_CLOSING_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Task:
    """What the supervisor hands to a worker. `ready` is written to once it serves; `lifeline` reports EOF when the
    supervisor has died."""

    settings: Settings
    sockets: list[tuple[socket.socket, ssl.SSLContext | None]] = field(repr=False)
    certificates: list[CertificateFiles]
    flow: Flow
    access: Access
    ready: Connection = field(repr=False)
    lifeline: int


def run(task: Task) -> None:
    """Serve until SIGTERM or the supervisor's end; the process then exits. A SIGINT is the supervisor's to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What was imported before the fork never becomes garbage; and a server that makes few cycles need not look often.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(task))


async def _serve(task: Task) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_reader(task.lifeline, stop.set)

    settings = task.settings
    registry = open_registry(settings)
    cache = DeviceCache(registry)
    engine = open_publisher(settings, task.access)
    journal = Journal(settings)
    gateway = Gateway(settings, cache=cache, engine=engine, flow=task.flow, keys=registry.signing_keys())
    door = Door(gateway, Limits.of(settings), _recorder(journal), time.monotonic, settings.access_log)
    listener = Listener(door, task.sockets)

    await engine.start()
    duties = [asyncio.create_task(duty) for duty in (cache.run(), journal.run(), listener.run())]
    if context := next((context for _, context in task.sockets if context), None):
        duties.append(asyncio.create_task(_renew(context, task.certificates)))
    await listener.start()
    task.ready.send_bytes(b"ready")

    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([stopped, *duties], return_when=asyncio.FIRST_COMPLETED)
    loop.remove_reader(task.lifeline)
    # Whatever may hang: without a supervisor there is nobody else to end this process.
    loop.call_later(DRAIN_SECONDS + _CLOSING_SECONDS, os._exit, 1)
    cut = await listener.drain(within=DRAIN_SECONDS)
    if cut:
        log.warning("%d requests had not fully arrived within %g s of the stop and were cut", cut, DRAIN_SECONDS)
    await engine.stop()
    failed = [duty for duty in duties if duty.done() and not duty.cancelled()]
    for duty in duties:
        duty.cancel()
    await asyncio.gather(stopped, *duties, return_exceptions=True)
    await journal.close()
    await cache.close()
    registry.close()
    for duty in failed:
        duty.result()


async def _renew(context: ssl.SSLContext, certificates: list[CertificateFiles]) -> None:
    renewal = Renewal(context, certificates)
    while True:
        await asyncio.sleep(_RENEWAL_SECONDS)
        renewal.check()


def _recorder(journal: Journal) -> Callable[[Outcome], None]:
    def record(outcome: Outcome) -> None:
        journal.record(
            Refusal(
                request_id=outcome.request_id,
                at=round(time.time() * 1000),
                endpoint=outcome.endpoint,
                code=outcome.code,
                status=outcome.status,
                product_key=ProductKey(outcome.product_key),
                device_name=DeviceName(outcome.device_name),
                address=outcome.address,
                topic=outcome.topic,
                reason=outcome.reason,
            )
        )

    return record
