"""One worker process: puts registry, engine, gateway and doors together, serves until told to drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection

import uvloop

from uplinkd.core.apps import check_app_secret
from uplinkd.core.errors import Code, Unavailable
from uplinkd.core.model import App, DeviceName, ProductKey
from uplinkd.core.proxy_protocol import trusting
from uplinkd.core.topics import owner
from uplinkd.engine import open_publisher
from uplinkd.engine.bus import NatsBus
from uplinkd.engine.callout import Callout
from uplinkd.engine.down import JetStreamDownlink
from uplinkd.engine.embedded import Access, account_key
from uplinkd.flow import Flow
from uplinkd.gateway import Gateway, Outcome, Sent
from uplinkd.http.limits import Limits
from uplinkd.http.protocol import Connection as HttpConnection
from uplinkd.http.protocol import Door as HttpDoor
from uplinkd.journal import STANDING, Journal, Refusal
from uplinkd.listener import Listener, Port
from uplinkd.metrics import BEAT_SECONDS, Meter
from uplinkd.mqtt.session import Connection as MqttConnection
from uplinkd.mqtt.session import Door as MqttDoor
from uplinkd.mqtt.websocket import WebSocket
from uplinkd.peers import Peers
from uplinkd.presence import Presence
from uplinkd.registry import Change, Registry, open_registry
from uplinkd.registry.cache import DeviceCache
from uplinkd.roster import Roster
from uplinkd.sending import Sending
from uplinkd.settings import Settings
from uplinkd.shares import Shares
from uplinkd.tasks import end_tasks, spawn
from uplinkd.tls import CertificateFiles, LegacyDevices, count_handshake, renew

__all__ = ["DRAIN_SECONDS", "Task", "run"]

log = logging.getLogger("uplinkd")

DRAIN_SECONDS = 4.0
_CLOSING_SECONDS = 4.0
_KNOWN_DEVICES = 100_000
_KEYS_SECONDS = 0.5
# For so long a worker hears who else is there before it does anything in the name of all; and hears others out before it
# insists on its own sessions.
_LISTEN_SECONDS = 3.0
_INTRODUCED_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """What the supervisor hands to a worker. `slot` tells it from the others, 0 the first. `ready` is written to once it
    serves; `lifeline` reports EOF when the supervisor has died."""

    slot: int
    settings: Settings
    https: list[Port] = field(repr=False)
    mqtt: list[Port] = field(repr=False)
    certificates: list[CertificateFiles]
    flow: Flow
    access: Access
    meter: Meter = field(repr=False)
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
    name = f"{settings.gateway}.{task.slot}"
    registry = open_registry(settings)
    # Of devices that report in turn, the oldest would always be the one that is asked for next: all that are connected are known.
    cache = DeviceCache(registry, capacity=max(_KNOWN_DEVICES, settings.max_connections))
    engine = open_publisher(settings, task.access, task.meter)
    bus = NatsBus(task.access, f"uplinkd worker {name}")
    roster = Roster(bus, name)
    peers = Peers(
        bus,
        roster.instance,
        connections=lambda: len(https.connections) + len(mqtt.connections),
        listen=_LISTEN_SECONDS if settings.nats_url else 0.0,
    )
    downlink = JetStreamDownlink(settings, bus, shared=lambda: peers.others)
    presence = Presence(settings, registry, engine, bus, worker=name, peers=peers)
    journal = Journal(settings)
    gateway = Gateway(
        settings,
        cache=cache,
        engine=engine,
        flow=task.flow,
        presence=presence,
        roster=roster,
        downlink=downlink,
        keys=registry.signing_keys(),
    )
    reading: set[asyncio.Task[None]] = set()
    _follow_keys(registry, gateway, cache, reading)
    record = _recorder(journal)
    sending = Sending(bus, gateway, lambda *broadcast: mqtt.deliver_to_product(*broadcast), _dropped(record))
    mqtt = MqttDoor(gateway, roster, downlink, bus, cache, record, _Apps(registry), sending, time.monotonic)
    mqtt.take_limits(settings)
    https = HttpDoor(gateway, Limits.of(settings), record, time.monotonic, settings.access_log)
    mqtt.meter = https.meter = task.meter
    mqtt.known = mqtt.places.known = https.known
    mqtt.turns = https.turns
    if settings.tls_legacy:
        mqtt.legacy = https.legacy = LegacyDevices(_legacy_recorder(journal))
    https.forwarded_for = settings.forwarded_for
    https.websocket = lambda *peer: WebSocket(lambda: MqttConnection(mqtt, peer), mqtt.turns)
    listener = partial(
        Listener,
        handshakes=settings.max_handshakes,
        waiting=settings.max_connections,
        missed=task.meter.handshake_failed,
        shook=partial(count_handshake, task.meter),
        proxies=trusting(settings.proxy_protocol) if settings.proxy_protocol else None,
    )
    doors = [
        # Without TLS this door is a proxy's, unless that has told whose the connection is; a device may come so to the other.
        listener(https, lambda tls, of: HttpConnection(https, of, proxied=not tls and of is None), task.https),
        listener(mqtt, lambda _tls, of: MqttConnection(mqtt, of), task.mqtt),
    ]

    await engine.start()
    roster.heard_of(await presence.start())
    peers.on_gone(roster.forget)
    peers.on_back(lambda: introduce_anew(roster, reading))
    duties = [
        asyncio.create_task(duty)
        for duty in (
            bus.run(),
            cache.run(),
            journal.run(),
            presence.run(),
            peers.run(),
            Shares(bus, task.flow, peers, settings.gateway).run(),
            downlink.run(),
            *map(Listener.run, doors),
            _measure(task.meter, https, mqtt),
        )
    ]
    if task.access.file and settings.nats_listen:
        callout = Callout(registry, task.access, account_key(task.access.file.parent), settings.partitions)
        cache.on_change(
            lambda change: None if change.product_key or change.group_id else callout.changed(change.app_id or 0)
        )
        duties.append(asyncio.create_task(callout.run()))
    if context := next((context for _, context in [*task.https, *task.mqtt] if context), None):
        duties.append(asyncio.create_task(renew(context, task.certificates)))
    for door in doors:
        await door.start()
    task.ready.send_bytes(b"ready")

    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([stopped, *duties], return_when=asyncio.FIRST_COMPLETED)
    loop.remove_reader(task.lifeline)
    # Whatever may hang: without a supervisor there is nobody else to end this process.
    loop.call_later(DRAIN_SECONDS + _CLOSING_SECONDS, os._exit, 1)
    cut = sum(await asyncio.gather(*(door.drain(within=DRAIN_SECONDS) for door in doors)))
    if cut:
        log.warning("%d requests had not fully arrived within %g s of the stop and were cut", cut, DRAIN_SECONDS)
    https.floods.flush()
    mqtt.floods.flush()
    await sending.drain()
    peers.beat(bye=True)
    await presence.close()
    await engine.stop()
    failed = [duty for duty in duties if duty.done() and not duty.cancelled()]
    await end_tasks(stopped, *duties, *reading)
    task.meter.flush()
    task.meter.rest()
    await journal.close()
    await cache.close()
    registry.close()
    for duty in failed:
        duty.result()


def introduce_anew(roster: Roster, owned: set[asyncio.Task[None]]) -> None:
    """Others may have forgotten this worker: hear what they say, then tell what still stands."""

    async def introduce() -> None:
        await roster.introduce()
        await asyncio.sleep(_INTRODUCED_SECONDS)
        roster.renew()

    spawn(introduce(), owned)


def _follow_keys(registry: Registry, gateway: Gateway, cache: DeviceCache, owned: set[asyncio.Task[None]]) -> None:
    """Have the gateway take the signing keys whenever they are others; they are read one time after the other, so that the last
    word is the latest."""
    reading = asyncio.Lock()

    async def read() -> None:
        async with reading:
            while True:
                try:
                    gateway.take_keys(await asyncio.to_thread(registry.signing_keys))
                except Unavailable as fault:
                    log.warning("the new signing key is not known here yet: %s", fault)
                    await asyncio.sleep(_KEYS_SECONDS)
                else:
                    return

    def changed(change: Change) -> None:
        if change.of_signing_keys:
            spawn(read(), owned)

    cache.on_change(changed)


async def _measure(meter: Meter, https: HttpDoor, mqtt: MqttDoor) -> None:
    """Keep the meter up to date; in between the hot path only takes notes."""
    while True:
        meter.connected("https", len(https.connections))
        meter.connected("mqtt", len(mqtt.connections))
        meter.stand(mqtt.sessions)
        meter.flush()
        await asyncio.sleep(BEAT_SECONDS)


class _Apps:
    """The registry's applications, asked in a thread."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def signed_in(self, key: str, secret: bytes) -> App | None:
        app = await asyncio.to_thread(self._registry.find_app, key)
        return app if check_app_secret(app, secret.decode(errors="replace")) else None

    async def by_id(self, app_id: int) -> App | None:
        return await asyncio.to_thread(self._registry.find_app_by_id, app_id)


def _dropped(record: Callable[[Outcome], None]) -> Callable[[str, Sent], None]:
    """Records that a message had to go for a newer one."""

    def drop(topic: str, sent: Sent) -> None:
        product_key, device_name = owner(topic)
        reason = (
            f"as many messages as may wait for the device (down_limit) did so; the oldest, {sent.dropped}, was dropped for "
            f"{sent.message_id}"
        )
        record(Outcome(secrets.token_hex(8), "send", 0, Code.SUCCESS, reason, "", product_key, device_name, topic))

    return drop


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
                times=outcome.times,
            )
        )

    return record


def _legacy_recorder(journal: Journal) -> Callable[[str, str, str, str, str], None]:
    """Records which devices need the legacy suites."""

    def record(product_key: str, device_name: str, address: str, door: str, suite: str) -> None:
        reason = (
            f"signed in over {door.upper()} with the TLS suite {suite} (static RSA, no forward secrecy); once no device does, "
            "tls_legacy = false switches such suites off"
        )
        journal.record(
            Refusal(
                request_id=secrets.token_hex(8),
                at=round(time.time() * 1000),
                endpoint=STANDING,
                code=Code.SUCCESS,
                status=0,
                product_key=product_key,
                device_name=device_name,
                address=address,
                topic="",
                reason=reason,
            )
        )

    return record
