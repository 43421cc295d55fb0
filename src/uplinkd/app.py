"""The supervisor: prepares the data folder, starts the engine and the workers, restarts what dies, stops in order.

It forks its workers and so stays without threads and without an event loop. Everything that workers share (sockets, the TLS
context with its ticket keys, the flow control table, the metrics) is made here, before the first fork, and outlives any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.engine.embedded import Access, EmbeddedServer
from uplinkd.engine.streams import check, check_count
from uplinkd.files import keep_private
from uplinkd.flow import Flow
from uplinkd.listener import Port
from uplinkd.metrics import BEAT_SECONDS, Metrics
from uplinkd.ports import patiently, probe
from uplinkd.processes import call_me, keep_memory_private, vitals
from uplinkd.registry import Operators, open_registry
from uplinkd.registry.database import is_shared
from uplinkd.serving import gateway_name, serving, still_serving
from uplinkd.settings import Settings, address, reachable
from uplinkd.tls import CertificateFiles, ensure_material, operator_context, reissue, server_context
from uplinkd.worker import DRAIN_SECONDS, Task, run

__all__ = ["Started", "serve"]

log = logging.getLogger("uplinkd")

_READY_SECONDS = 20.0
_WATCH_SECONDS = 0.1
# A port of a server that was killed a moment ago is let go within this time.
_PATIENCE_SECONDS = 2.0
_STEADY_SECONDS = 5.0
# A process whose loop has not turned for so long, and that has not had the processor for almost as long, is frozen; one that is
# busy may be so for longer. Its devices are to be somebody else's within 5 s.
_FROZEN_SECONDS = 3.0
_STUCK_SECONDS = 15.0
_UNSURE_SECONDS = 1.0
_LONGEST_PAUSE = 5.0
_NO_PROCESS_SECONDS = 1.0
_MATERIAL_SECONDS = 12 * 3600.0

_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True, slots=True)
class Started:
    """What there is to say once everything stands."""

    settings: Settings
    workers: int
    tls: tuple[str, int]
    plain: tuple[str, int] | None
    mqtt: tuple[str, int] | None
    mqtt_plain: tuple[str, int] | None
    amqp: tuple[str, int] | None
    authority: Path | None
    engine: str
    nats: str
    """Where applications connect to it; empty where they do not."""
    console: str
    """Where operators look; empty where they cannot."""
    password: str | None
    """The one-time password of the first user, until somebody has chosen their own."""


def serve(settings: Settings, *, prepare: Callable[[Settings], None], started: Callable[[Started], None]) -> None:
    """Serve until SIGTERM or SIGINT. `prepare` is called before anything listens, `started` once all workers do.

    Raise Rejected or Unavailable with one clear line when it cannot start.
    """
    with contextlib.ExitStack() as stack:
        os.umask(0o077)  # whatever writes here, SQLite and nats-server too: nobody else reads it
        if not settings.core_dumps:
            keep_memory_private()
        _raise_file_limit()
        _data_folder(settings.data)
        ttl = round(settings.token_ttl * 1000)
        stack.enter_context(serving(settings.data, token_ttl=ttl, now=round(time.time() * 1000)))
        for warning in keep_private(settings.data):
            log.warning("%s", warning)
        settings = settings.model_copy(update={"gateway": gateway_name(settings)})
        registry = open_registry(settings)
        registry.check()
        # Nobody serves here yet: whatever session a registry tells of has died with its worker. On servers of the owner's, NATS or
        # PostgreSQL, there may be other gateways, whose sessions stand; those of gateways that are gone are found later.
        shared = is_shared(settings)
        mine = f"{settings.gateway}." if shared or settings.nats_url else None
        registry.abandoned(mine, now=round(time.time() * 1000), timeout=round(settings.online_timeout * 1000))
        password = _first_password(registry.operators, shared) if settings.console_listen else None
        registry.close()
        prepare(settings)
        certificates = ensure_material(settings)
        context = server_context(certificates, legacy=settings.tls_legacy)
        count = settings.workers or len(os.sched_getaffinity(0))
        tls = _bind(address(settings.listen), count, "listen", stack)
        plain, mqtt, mqtt_plain = (
            _bind(address(where), count, setting, stack) if where else []
            for setting, where in (
                ("plain_listen", settings.plain_listen),
                ("mqtt_listen", settings.mqtt_listen),
                ("mqtt_plain_listen", settings.mqtt_plain_listen),
            )
        )
        console = amqp = None
        if settings.console_listen:
            (console,) = _bind(address(settings.console_listen), 1, "console_listen", stack)
        if settings.amqp_listen:
            from uplinkd.delivery.amqp import check_available  # its engine is for those who have the door

            check_available(settings)
            (amqp,) = _bind(address(settings.amqp_listen), 1, "amqp_listen", stack)
        engine = None
        if settings.nats_url:
            access = Access.of(settings)
            asyncio.run(check(settings, access))
        else:
            engine = EmbeddedServer.start(settings, tls=[(pair.certificate, pair.key) for pair in certificates])
            stack.callback(engine.stop)
            access = engine.access
            asyncio.run(check_count(settings, access))
        flow = Flow(settings, shared=count > 1)
        stack.callback(flow.close)
        metrics = Metrics(count, others=1 + (console is not None))
        stack.callback(metrics.close)

        doors = _Doors([(tls, context), (plain, None)], [(mqtt, context), (mqtt_plain, None)], count)
        places = tls[0].getsockname()[:2], _where(mqtt)
        operators = operator_context(certificates) if amqp or (console and settings.console_tls) else None
        supervisor = _Supervisor(
            settings, doors, certificates, operators, flow, metrics, access, engine, console, amqp, places
        )
        stack.callback(supervisor.stop)  # also after a fault: whoever exits waits for their processes, for ever
        with supervisor.signals():
            supervisor.start()
            authority = None if settings.tls_cert else settings.data / "tls" / "ca.pem"
            started(
                Started(
                    settings,
                    count,
                    places[0],
                    _where(plain),
                    places[1],
                    _where(mqtt_plain),
                    _where([amqp] if amqp else []),
                    authority,
                    "NATS JetStream, looked after by uplinkd" if engine else "your NATS servers",
                    access.urls[0] if engine and settings.nats_listen else "",
                    _console_url(settings, console),
                    password,
                )
            )
            supervisor.watch()


def _where(sockets: list[socket.socket]) -> tuple[str, int] | None:
    return sockets[0].getsockname()[:2] if sockets else None


def _first_password(operators: Operators, shared: bool) -> str | None:
    from uplinkd.admin.access import first_password  # what checks passwords is not for the processes of gateways

    return first_password(operators, shared=shared)


def _console_url(settings: Settings, console: socket.socket | None) -> str:
    if console is None:
        return ""
    host, port = console.getsockname()[:2]
    return f"{'https' if settings.console_tls else 'http'}://{reachable(host)}:{port}"


@dataclass(slots=True)
class _Worker:
    """A process that the supervisor looks after: a worker, the one that delivers, or the console."""

    process: BaseProcess
    ready: multiprocessing.connection.Connection
    since: float
    fast_deaths: int = 0
    beat: int = 0
    heard: float = 0.0
    """When `beat` was new, and was told of otherwise."""
    ticks: int = 0
    stirred: float = 0.0
    """When it had last had the processor, or waited for the disk."""
    leaves: bool = False
    """It was told to drain, for its successor."""


@dataclass(frozen=True, slots=True)
class _Doors:
    """For each door its ports, each with a listening socket for every worker and its TLS context or None for plain text."""

    https: list[tuple[list[socket.socket], ssl.SSLContext | None]]
    mqtt: list[tuple[list[socket.socket], ssl.SSLContext | None]]
    workers: int

    def of(self, slot: int) -> tuple[list[Port], list[Port]]:
        """The sockets of one worker, in its process: those of the others are closed there."""
        self.close(but=slot)
        https, mqtt = (
            [(sockets[slot], context) for sockets, context in door if sockets] for door in (self.https, self.mqtt)
        )
        return https, mqtt

    def close(self, *, but: int | None = None) -> None:
        """In a new process: let go of the sockets that are not its own."""
        for sockets, _ in [*self.https, *self.mqtt]:
            for slot, sock in enumerate(sockets):
                if slot != but:
                    sock.close()


@dataclass(slots=True)
class _Supervisor:
    settings: Settings
    doors: _Doors = field(repr=False)
    certificates: list[CertificateFiles]
    operators: ssl.SSLContext | None = field(repr=False)
    """The context of the AMQP door and the console. A process that is started anew may find files that are just being replaced."""
    flow: Flow
    metrics: Metrics
    access: Access
    engine: EmbeddedServer | None
    console: socket.socket | None
    amqp: socket.socket | None
    places: tuple[tuple[str, int], tuple[str, int] | None]
    """Where devices reach the HTTPS and the MQTT door."""
    workers: list[_Worker | None] = field(default_factory=list)
    pauses: dict[int, tuple[float, int]] = field(default_factory=dict)
    lifeline: tuple[int, int] = (-1, -1)
    stopping: int = 0
    looked: float = 0.0

    def start(self) -> None:
        self.lifeline = os.pipe()
        gc.collect()
        count = self.doors.workers + 1 + (self.console is not None)
        for slot in range(count):
            self.workers.append(self._spawn(slot))
        end = time.monotonic() + _READY_SECONDS
        for worker in self.workers:
            assert worker
            if not worker.ready.poll(max(0.0, end - time.monotonic())) or not worker.process.is_alive():
                self.stop()
                raise Unavailable(f"{worker.process.name} did not start; its reason stands above")

    def watch(self) -> None:
        """Restart what dies until told to stop; then drain. Raise Unavailable, all ended, when there is no folder any more to serve
        from."""
        material_due = time.monotonic() + _MATERIAL_SECONDS
        while not self.stopping:
            sentinels = [worker.process.sentinel for worker in self.workers if worker]
            multiprocessing.connection.wait(sentinels, timeout=_WATCH_SECONDS)
            if self.stopping:
                break
            if not still_serving(self.settings.data):
                self._end_at_once()
                raise Unavailable(
                    f"the data folder {self.settings.data} was removed or replaced while uplinkd served from it; it has ended at once, "
                    "since what it took in now would be kept nowhere"
                )
            if self.engine and not self.engine.poll():
                self._restart_engine(self.engine)
            self._restart_workers()
            if time.monotonic() > self.looked + BEAT_SECONDS:
                self._look_after()
            if time.monotonic() > material_due:
                material_due = time.monotonic() + _MATERIAL_SECONDS
                reissue(self.settings)
        self.stop()

    def stop(self) -> None:
        """Let the workers answer what is under way, then end them."""
        processes = [worker.process for worker in self.workers if worker]
        for process in processes:
            process.terminate()
        end = time.monotonic() + DRAIN_SECONDS + 0.7
        while any(process.is_alive() for process in processes) and time.monotonic() < end and self.stopping < 2:
            multiprocessing.connection.wait(
                [process.sentinel for process in processes if process.is_alive()], timeout=0.1
            )
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()

    def _end_at_once(self) -> None:
        """Nothing more is written, not even what belongs to an orderly end: another server may have the folder's place by now."""
        if self.engine:
            self.engine.kill()
        self.stopping = 2
        self.stop()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a stop; a second one for a quick stop."""

        def ask(_signal: int, _frame: FrameType | None) -> None:
            self.stopping += 1

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _spawn(self, slot: int) -> _Worker:
        """The process of a slot: the workers', then the one that delivers, then the console's."""
        reading, writing = _fork.Pipe(duplex=False)
        target, name = {
            self.doors.workers: (self._delivery, "the delivery"),
            self.doors.workers + 1: (self._console, "the console"),
        }.get(slot, (self._child, f"worker {slot + 1}"))
        process = _fork.Process(target=target, args=(slot, writing), name=name)
        # A stop that comes before the new process has made SIGTERM its own waits for that; the handler that it inherits is ours.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        writing.close()
        now = time.monotonic()
        return _Worker(process, reading, now, heard=now, stirred=now)

    def _child(self, slot: int, ready: multiprocessing.connection.Connection) -> None:
        """In the new process: keep only this worker's own sockets, then serve."""
        self._begin("uplinkd-worker", self.console, self.amqp)
        https, mqtt = self.doors.of(slot)
        meter, files = self.metrics.meter(slot), self.certificates
        run(Task(slot, self.settings, https, mqtt, files, self.flow, self.access, meter, ready, self.lifeline[0]))

    def _delivery(self, slot: int, ready: multiprocessing.connection.Connection) -> None:
        """In the new process: deliver to backends. What it needs is imported here; no worker pays for it."""
        from uplinkd.delivery.server import DeliveryTask, run

        self._begin("uplinkd-deliver", self.console)
        self.doors.close()
        context = self.operators if self.amqp else None
        meter, lifeline = self.metrics.meter(slot), self.lifeline[0]
        run(DeliveryTask(self.settings, self.amqp, context, self.certificates, self.access, meter, ready, lifeline))

    def _console(self, slot: int, ready: multiprocessing.connection.Connection) -> None:
        """The same for operators."""
        from uplinkd.admin.server import ConsoleTask, run

        self._begin("uplinkd-console", self.amqp)
        self.doors.close()
        context = self.operators if self.settings.console_tls else None
        assert self.console
        run(
            ConsoleTask(
                self.settings,
                self.console,
                context,
                self.certificates,
                self.access,
                self.metrics,
                self.metrics.meter(slot),
                *self.places,
                ready,
                self.lifeline[0],
            )
        )

    def _begin(self, name: str, *others: socket.socket | None) -> None:
        """In a new process: bear a name of its own in `ps` and `top`, and let go of what is the supervisor's or `others`'."""
        call_me(name)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        os.close(self.lifeline[1])
        for sock in others:
            if sock:
                sock.close()

    def _restart_workers(self) -> None:
        now = time.monotonic()
        for slot, worker in enumerate(self.workers):
            if worker and not worker.process.is_alive():
                deaths = worker.fast_deaths + 1 if now - worker.since < _STEADY_SECONDS else 0
                pause = min(0.1 * 2**deaths, _LONGEST_PAUSE) if deaths else 0.0
                if worker.leaves:
                    log.info("%s %s; its successor is started", worker.process.name, _end(worker.process.exitcode))
                else:
                    log.error("%s %s; it is started again", worker.process.name, _end(worker.process.exitcode))
                worker.ready.close()
                self.flow.heal()
                self.metrics.died(slot)
                self.workers[slot] = None
                self.pauses[slot] = (now + pause, deaths)
            if self.workers[slot] is None and now >= self.pauses[slot][0]:
                deaths = self.pauses[slot][1]
                try:
                    self.workers[slot] = fresh = self._spawn(slot)
                except OSError as fault:  # neither memory nor numbers are without end
                    log.error("no process could be made: %s; it is tried again", fault.strerror)  # noqa: TRY400
                    self.pauses[slot] = now + _NO_PROCESS_SECONDS, deaths
                else:
                    fresh.fast_deaths = deaths
                    del self.pauses[slot]

    def _look_after(self) -> None:
        """End what stands still; have what has outgrown its memory drain."""
        now = time.monotonic()
        # If this process was not scheduled itself, nothing can be said of the others.
        unsure = now - self.looked > _UNSURE_SECONDS
        self.looked = now
        for slot, worker in enumerate(self.workers):
            if worker is None:
                continue
            seen, beat = vitals(worker.process.pid or 0), self.metrics.last_beat(slot)
            if unsure or beat != worker.beat or seen.state == "t":
                worker.beat, worker.heard = beat, now
            if unsure or seen.ticks != worker.ticks or seen.state == "D":
                worker.ticks, worker.stirred = seen.ticks, now
            silent, idle = now - worker.heard, now - worker.stirred
            if silent > (_FROZEN_SECONDS if beat else _READY_SECONDS) and (
                idle > _FROZEN_SECONDS - 1 or silent > _STUCK_SECONDS
            ):
                log.error("%s has stood still for %.0f s; it is killed", worker.process.name, silent)
                worker.heard = now
                worker.process.kill()
            elif (
                0 < self.settings.worker_memory < seen.memory
                and now - worker.since > _STEADY_SECONDS
                and not worker.leaves
            ):
                log.warning(
                    "%s has %d MiB of memory, more than worker_memory allows: it drains, for a successor",
                    worker.process.name,
                    seen.memory >> 20,
                )
                worker.leaves = True
                worker.process.terminate()

    def _restart_engine(self, engine: EmbeddedServer) -> None:
        log.error("nats-server has died; it is started again")
        try:
            engine.restart()
        except (Rejected, Unavailable, OSError) as fault:  # the last where there is no room for its configuration
            log.error("nats-server could not be started: %s", fault)  # noqa: TRY400 - the line says all
            time.sleep(1)
        else:
            self.metrics.engine_restarted()
            log.warning("nats-server is back")


def _end(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def _raise_file_limit() -> None:
    """As many open files as this process may have: each connection is one, and the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _data_folder(data: Path) -> None:
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = data / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Rejected(
            f"the data folder {data} cannot be written: {error.strerror}; name another with --data"
        ) from error


def _bind(where: tuple[str, int], count: int, setting: str, stack: contextlib.ExitStack) -> list[socket.socket]:
    """`count` listening sockets on one port, between which the kernel spreads connections.

    The supervisor keeps them open: what waits in the queue of a worker that dies is served by its successor.
    """
    host, port = where
    return patiently(
        lambda: _listen(host, port, count, stack),
        _PATIENCE_SECONDS,
        f"{host}:{port}",
        f"name another with --{setting.replace('_', '-')}",
    )


def _listen(host: str, port: int, count: int, stack: contextlib.ExitStack) -> list[socket.socket]:
    family, kind, protocol, target = probe(host, port)
    sockets = []
    for _ in range(count):
        sock = stack.enter_context(socket.socket(family, kind, protocol))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(target)
        sockets.append(sock)
    for sock in sockets:
        sock.listen(4096)
        sock.setblocking(False)
    return sockets
