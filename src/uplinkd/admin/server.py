"""The console's process: puts registry, reader, figures and pages together and serves them until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import anyio.to_thread
import uvicorn
import uvloop
from fastapi import FastAPI
from starlette.types import ASGIApp

from uplinkd import __version__
from uplinkd.admin import api, console, console_groups, health
from uplinkd.admin.door import Door
from uplinkd.admin.figures import Figures
from uplinkd.admin.guard import Guard
from uplinkd.admin.office import Office
from uplinkd.admin.openapi import describe
from uplinkd.admin.problems import handle_errors
from uplinkd.core.errors import Unavailable
from uplinkd.engine import open_reader
from uplinkd.engine.bus import NatsBus
from uplinkd.engine.embedded import Access
from uplinkd.engine.groups import JetStreamDesk
from uplinkd.metrics import Meter, Metrics
from uplinkd.peers import Peers
from uplinkd.registry import open_registry
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks
from uplinkd.tls import CertificateFiles, renew

__all__ = ["ConsoleTask", "application", "run"]

log = logging.getLogger("uplinkd.admin")

# Fewer than the registry has connections: a page must not wait for one.
_THREADS = 12
_STOP_SECONDS = 2
_CONNECTIONS = 1000


@dataclass(frozen=True, slots=True)
class ConsoleTask:
    """What the supervisor hands over. `ready` is written to once it serves; `lifeline` reports EOF when the supervisor has
    died."""

    settings: Settings
    socket: socket.socket = field(repr=False)
    context: ssl.SSLContext | None
    certificates: list[CertificateFiles]
    access: Access
    metrics: Metrics
    meter: Meter = field(repr=False)
    https: tuple[str, int]
    mqtt: tuple[str, int] | None
    ready: Connection = field(repr=False)
    lifeline: int


def run(task: ConsoleTask) -> None:
    """Serve until SIGTERM or the supervisor's end; the process then exits. A SIGINT is the supervisor's to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)  # devices come first
    gc.freeze()
    # What it would say of each fault, problems.py says with the path.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(task))


async def _serve(task: ConsoleTask) -> None:
    loop = asyncio.get_running_loop()
    anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS
    registry = open_registry(task.settings)
    bus = NatsBus(task.access, "uplinkd console")
    peers = Peers(bus, f"{task.settings.gateway}.console.0")
    figures = Figures(task.metrics.read)
    office = Office(
        settings=task.settings,
        registry=registry,
        bus=bus,
        figures=figures,
        peers=peers,
        https=task.https,
        mqtt=task.mqtt,
        desk=JetStreamDesk(bus),
        open_reader=functools.partial(open_reader, task.access),
    )
    figures.count_online = lambda: office.census().online
    server = _server(application(office), task.context)

    def stop() -> None:
        office.stopping.set()
        server.should_exit = True

    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_reader(task.lifeline, stop)
    duties = [asyncio.create_task(duty) for duty in (bus.run(), figures.run(), task.meter.beats(), peers.watch())]
    if task.context:
        duties.append(asyncio.create_task(renew(task.context, task.certificates)))
    serving = asyncio.create_task(server.serve([task.socket]))
    while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn sets a flag, and no event
        await asyncio.sleep(0.005)
    task.ready.send_bytes(b"ready")
    duties.append(asyncio.create_task(_prepare(office)))
    await serving
    loop.remove_reader(task.lifeline)
    await office.close()
    await end_tasks(*duties)
    registry.close()


async def _prepare(office: Office) -> None:
    """What the first visitor of a page would wait for: compiled templates, a connection to the engine. The figures take care of the
    census."""
    await asyncio.to_thread(console.prepare)
    with contextlib.suppress(Unavailable):
        await office.stored()


def application(office: Office) -> FastAPI:
    """The management API, the console, and what orchestrators ask."""
    app = _Guarded(
        title="uplinkd management API",
        version=__version__,
        openapi_url=f"{api.PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # it would send to the name in the Host header
    )
    app.state.office = office
    app.include_router(api.uploads)
    app.include_router(api.router)
    app.include_router(health.router)
    app.include_router(console_groups.router)
    console.mount(app)
    handle_errors(app, console.error_page)
    describe(app)
    return app


class _Guarded(FastAPI):
    """With the guard around all of it: a middleware stands inside of what answers faults of ours."""

    def build_middleware_stack(self) -> ASGIApp:
        settings = self.state.office.settings
        return Guard(super().build_middleware_stack(), tls=settings.console_tls, names=settings.tls_name)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The signals are ours."""
        yield


def _server(app: FastAPI, context: ssl.SSLContext | None) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http=Door,
        ws="none",
        limit_concurrency=_CONNECTIONS,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    config.load()
    config.ssl = context
    return _Server(config)
