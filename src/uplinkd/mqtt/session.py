"""One connection over MQTT: packets → gateway → packets; and messages from the platform to the device.

The platform's subset: QoS 0 and 1, no wills, no retained messages. MQTT 3.1.1 has no other no to a PUBLISH than the end of
the connection, so that is the answer to one that is refused; what is only too fast is slowed down instead.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol, cast

from uplinkd.core import topics, wire
from uplinkd.core.errors import Code, Refused, Rejected, Unavailable
from uplinkd.core.model import App
from uplinkd.core.subjects import from_subject, subjects_of_filter
from uplinkd.engine import Bus, Downlink, SessionRecord, Told
from uplinkd.engine.stream import live_subject
from uplinkd.floods import Floods
from uplinkd.flow import network_of
from uplinkd.gateway import MAX_MQTT_PAYLOAD_BYTES, Gateway, Outcome, Request, Wait
from uplinkd.metrics import Meter, spare
from uplinkd.mqtt import packets
from uplinkd.observe import Occasionally
from uplinkd.places import Known, Places
from uplinkd.registry import Change
from uplinkd.registry.cache import DeviceCache, Entry
from uplinkd.roster import Roster
from uplinkd.settings import Settings, is_loopback
from uplinkd.tasks import Turns, spawn
from uplinkd.tls import LegacyDevices

__all__ = ["ACCEPTED", "Apps", "Connection", "Door", "Sender"]

log = logging.getLogger("uplinkd.mqtt")

# CONNACK's return codes.
ACCEPTED, BAD_VERSION, BAD_IDENTIFIER, NOT_NOW, BAD_LOGIN, FORBIDDEN = range(6)
_REFUSED = 0x80

MIN_KEEP_ALIVE, MAX_KEEP_ALIVE = 30, 1200
_CONNECT_BYTES = 4096
_PACKET_BYTES = MAX_MQTT_PAYLOAD_BYTES + 1024
_MAX_SUBSCRIPTIONS = 100
# Publishes that were not acknowledged by the engine yet: beyond it the socket is not read.
_UNSTORED = 100
# Messages to the peer that it has not acknowledged: of those that wait for a device, and of live ones.
_WINDOW, _LIVE_WINDOW = 20, 1000
# What a peer has not read: beyond it, live messages are dropped, as at any broker.
_UNREAD_BYTES = 1024 * 1024
_THROTTLE_SECONDS, _LONGEST_THROTTLE_SECONDS = 0.05, 1.0
_PAUSE_SECONDS = 0.5
# So long each session with something to deliver waits for an engine that is away: they may be many.
_AWAY_SECONDS = 2.0
_TELL_SECONDS = 5.0
_REMEMBER_SECONDS = 3600.0
_NEVER = float("inf")
# So many packets of one connection are handled before it is the others' turn.
_SHARE = 32

_WAITING, _JOINING, _STANDING, _OVER = range(4)


class Apps(Protocol):
    """The applications that there are; raise Unavailable when the registry is away."""

    async def signed_in(self, key: str, secret: bytes) -> App | None:
        """The application with this key and secret."""

    async def by_id(self, app_id: int) -> App | None: ...


class Sender(Protocol):
    """What applications do over MQTT: sends a message down, or to all devices of a product that listen."""

    async def send(self, topic: str, payload: bytes) -> object: ...


@dataclass(slots=True, eq=False)
class Door:
    """What the MQTT connections of one worker share. `record` takes an Outcome; it must neither block nor raise."""

    gateway: Gateway
    roster: Roster
    downlink: Downlink
    bus: Bus
    cache: DeviceCache
    record: Callable[[Outcome], None]
    apps_known: Apps
    sender: Sender
    clock: Callable[[], float]
    connect_timeout: float = 10.0
    write_timeout: float = 30.0
    most: int = 20_000
    partitions: int = 1
    meter: Meter = field(default_factory=spare)
    now: float = 0.0
    draining: bool = False
    connections: set[Connection] = field(default_factory=set)
    products: dict[str, set[Connection]] = field(default_factory=dict)
    apps: dict[int, set[Connection]] = field(default_factory=dict)
    app_changes: int = 0  # counts them, so that what is read meanwhile is known to be stale
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    legacy: LegacyDevices | None = None  # None where no legacy suite is offered
    known: Known = field(default_factory=Known)
    turns: Turns = field(default_factory=Turns)
    places: Places = field(init=False)
    floods: Floods = field(init=False)

    def __post_init__(self) -> None:
        self.now = self.clock()
        self.floods = Floods(self.record, self.clock)
        self.places = Places(self.known, "connections over MQTT")
        self.downlink.on_waiting(self._waits)
        self.cache.on_change(self._changed)

    def take_limits(self, settings: Settings) -> None:
        self.connect_timeout = settings.head_timeout
        self.most = settings.max_connections
        self.partitions = settings.partitions

    def tick(self) -> None:
        """Once in a fraction of a second: renew the coarse clock, end what has overstayed."""
        self.now = self.clock()
        for connection in [each for each in self.connections if each.deadline <= self.now]:
            connection.expire()
        self.floods.tick()

    @property
    def sessions(self) -> int:
        """How many stand, of devices and of applications."""
        return sum(map(len, self.products.values())) + sum(map(len, self.apps.values()))

    def drain(self) -> None:
        """Close every session; what was published and is not stored yet still gets its PUBACK."""
        self.draining = True
        for connection in list(self.connections):
            connection.drain()

    def spawn(self, act: Coroutine[Any, Any, None]) -> None:
        """Run `act`, owned by the door."""
        spawn(act, self.tasks).add_done_callback(_log_fault)

    async def deliver_to_product(self, product_key: str, topic: str, payload: bytes) -> int:
        """Give a broadcast to the sessions here that have subscribed to it; how many these are."""
        count = 0
        for number, connection in enumerate(list(self.products.get(product_key, ()))):
            count += connection.deliver_live(topic, payload)
            if number % 200 == 199:
                await asyncio.sleep(0)  # others are served meanwhile
        return count

    def _changed(self, change: Change) -> None:
        """The registry has changed: whose sessions it may concern are looked at anew."""
        if change.app_id is not None:
            self.app_changes += 1
            self.spawn(self._renew_apps([change.app_id]))
            return
        if change.group_id is not None:
            return
        if change.device_id is not None:
            concerned = [change.device_id] if self.roster.here(change.device_id) else []
        elif change.product_key:
            concerned = [each.device_id for each in self.products.get(change.product_key, ())]
        else:
            concerned = [device_id for device_id, _ in self.roster.sessions()]
            self.app_changes += 1
            self.spawn(self._renew_apps(list(self.apps)))
        if concerned:
            self.spawn(self._renew(concerned))

    async def _renew_apps(self, app_ids: list[int]) -> None:
        for app_id in app_ids:
            while self.apps.get(app_id):
                try:
                    app = await self.apps_known.by_id(app_id)
                except Unavailable:
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                for connection in list(self.apps.get(app_id, ())):
                    connection.renew_app(app)
                break

    async def _renew(self, device_ids: list[int]) -> None:
        for device_id in device_ids:
            while isinstance(held := self.roster.here(device_id), Connection):
                try:
                    entry = await self.cache.load(device_id)
                except Unavailable:
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                if entry is None or entry is self.cache.get(device_id):  # or it changed while it was read
                    held.renew(entry)
                    break

    def _waits(self, device_id: int) -> None:
        held = self.roster.here(device_id)
        if isinstance(held, Connection):
            held.deliver_soon()


class Connection(asyncio.Protocol):
    """One client's connection: a device's session, or an application's. `peer` is its address and its network (see Request) where
    the transport does not know."""

    __slots__ = (
        "_again",
        "_app",
        "_asking",
        "_auto",
        "_blocked",
        "_clean",
        "_cursor",
        "_delivering",
        "_door",
        "_dropped",
        "_ears",
        "_entry",
        "_full",
        "_held",
        "_inflight",
        "_keep_alive",
        "_leaving",
        "_legacy",
        "_network",
        "_next_id",
        "_noted",
        "_parser",
        "_paused",
        "_pumping",
        "_remembering",
        "_sent",
        "_stage",
        "_telling",
        "_transport",
        "_tries",
        "_unstored",
        "_who",
        "_yields",
        "address",
        "deadline",
        "stamp",
        "subscriptions",
    )

    def __init__(self, door: Door, peer: tuple[str, str] | None = None) -> None:
        self._door = door
        self._transport: asyncio.Transport | None = None
        self._parser: packets.Parser | None = packets.Parser(_CONNECT_BYTES)
        self._stage = _WAITING
        self.address, self._network = peer or ("", "")
        self.deadline = _NEVER
        self.stamp = 0
        self.subscriptions: dict[str, int] = {}

        self._entry: Entry | None = None
        self._app: App | None = None
        self._who = ("", "")
        self._legacy = True  # whether its TLS suite may be a legacy one
        self._clean = True
        self._auto: tuple[str, ...] = ()
        self._keep_alive = 0.0
        self._telling = 0.0  # when its signs of life are told next
        self._remembering = 0.0  # when a persistent session is kept anew

        self._pumping = False
        self._yields = False  # its share of this turn is used up
        self._paused = False  # the socket is not read
        # Nothing further is handled while an answer is being found, a message came too fast and is tried again soon, too
        # many are not stored yet, the peer does not read its answers, or the door waits for what is under way to close.
        self._asking = False
        self._held: packets.Publish | None = None
        self._tries = 0  # of the message that is slowed down
        self._full = False
        self._unstored = 0
        self._blocked = False  # the peer does not read

        self._ears: dict[str, list[Callable[[], None]]] = {}
        self._inflight: dict[int, int] = {}  # packet id → sequence of what waits for the device, 0 of a live message
        # Sequence that was acknowledged → whether the engine has removed it: a look that began before may find it still.
        self._leaving: dict[int, bool] = {}
        self._next_id = 0
        self._cursor = 0
        self._sent = 0  # sequences up to here were sent in this session's earlier life
        self._delivering = self._again = False
        self._dropped: Occasionally | None = None
        self._noted: set[str] = set()

    # -- the transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        door = self._door
        if not self.address and (peer := transport.get_extra_info("peername")):
            self.address, self._network = peer[0], network_of(peer[0])
        if door.draining or not door.places.enter(self, self._network, door.most):
            self._stage = _OVER
            self._transport.abort()
            return
        door.connections.add(self)
        door.meter.accepted("mqtt")
        self.deadline = door.now + door.connect_timeout

    def connection_lost(self, exc: Exception | None) -> None:
        door, entry = self._door, self._entry
        self._stage = _OVER
        self._transport = self._parser = self._held = None
        door.connections.discard(self)
        door.places.leave(self)
        for topic_filter in list(self._ears):
            self._stop_hearing(topic_filter)
        if self._app is not None:
            _discard(door.apps, self._app.id, self)
        if entry is not None:
            _discard(door.products, entry.device.product_key, self)
            if door.roster.closed(entry.device.id, self):
                door.gateway.left(entry, self.stamp)
                if not self._clean:
                    door.spawn(self._remember(entry.device.id))

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._blocked = True
        self.deadline = min(self.deadline, self._door.now + self._door.write_timeout)
        self._read_or_not()

    def resume_writing(self) -> None:
        self._blocked = False
        self._rest()
        self.deliver_soon()
        self._pump()

    def data_received(self, data: bytes) -> None:
        if self._stage == _OVER or self._parser is None:
            return
        now = self._door.now
        if not self._blocked:
            self._rest()
        if now >= self._telling and self._entry is not None:
            self._heard_of(now)
        if self._stage == _WAITING and not self._parser.pending and data[0] != packets.CONNECT:
            # What is no MQTT at all may look like a packet that never becomes complete.
            self._end(Code.PARAM_ERROR, "malformed MQTT: the first packet is not a CONNECT [MQTT-3.1.0-1]")
            return
        self._parser.feed(data)
        self._pump()

    def _heard_of(self, now: float) -> None:
        """Say that the device is there, not more often than anybody needs."""
        assert self._entry
        self._telling = now + _TELL_SECONDS
        if self._legacy and self._door.legacy and self._transport:
            # Once a day, also of a session that stands for weeks.
            self._legacy = self._door.legacy.signed_in(self._transport, *self._who, self.address, "mqtt")
        self._door.gateway.heard(self._entry, self.address, self.stamp)
        if not self._clean and now >= self._remembering:
            self._remembering = now + _REMEMBER_SECONDS
            self._door.spawn(self._remember(self._entry.device.id))

    # -- reading

    def _pump(self) -> None:
        """Handle what has arrived, until something has to be waited for or it is the others' turn."""
        if self._pumping or self._yields:
            return
        self._pumping = True
        share = _SHARE
        try:
            while not self._waits and self._stage != _OVER and self._parser is not None:
                if not share:
                    self._yields = self._parser.pending
                    break
                packet = self._parser.next()
                if packet is None:
                    break
                share -= 1
                self._handle(packet)
        except packets.Malformed as fault:
            self._end(Code.PARAM_ERROR, f"malformed MQTT: {fault}")
        except Exception:
            log.exception("a fault of ours in an MQTT session")
            self._end(Code.COMMON_ERROR, "a fault of uplinkd; its log has the traceback")
        finally:
            self._pumping = False
        if self._yields:
            self._door.turns.wait(self._take_turn)
        self._read_or_not()

    def _take_turn(self) -> None:
        self._yields = False
        self._pump()

    def _read_or_not(self) -> None:
        if self._transport is None or self._stage == _OVER:
            return
        if self._waits and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        elif self._paused and not self._waits:
            self._paused = False
            self._transport.resume_reading()

    @property
    def _waits(self) -> bool:
        closing = self._door.draining and self._unstored > 0
        return self._asking or self._full or self._held is not None or self._blocked or self._yields or closing

    def _go_on(self) -> None:
        """The answer was found."""
        self._asking = False
        self._pump()

    def _handle(self, packet: packets.Packet) -> None:
        if self._stage == _WAITING:
            assert isinstance(packet, packets.Connect)
            self._connect(packet)
            return
        match packet:
            case packets.Publish():
                self._publish(packet)
            case packets.Puback():
                self._acknowledged(packet.packet_id)
            case packets.Pingreq():
                self._write(packets.PINGRESP)
            case packets.Subscribe():
                self._subscribe(packet)
            case packets.Unsubscribe():
                self._unsubscribe(packet)
            case packets.Disconnect():
                self._close()
            case packets.Connect():
                raise packets.Malformed("a second CONNECT [MQTT-3.1.0-2]")

    # -- signing in

    def _connect(self, packet: packets.Connect) -> None:
        if not packet.supported:
            self._reject(BAD_VERSION, f"protocol level {packet.level} is not spoken; MQTT 3.1.1 (4) and 3.1 (3) are")
            return
        username, password = packet.username or "", packet.password or b""
        if "&" in username:
            device_name, _, product_key = username.rpartition("&")
            self._who = product_key[:64], device_name[:64]
        if not MIN_KEEP_ALIVE <= packet.keep_alive <= MAX_KEEP_ALIVE:
            self._reject(
                FORBIDDEN, f"the keep-alive is {packet.keep_alive} s; {MIN_KEEP_ALIVE} to {MAX_KEEP_ALIVE} are allowed"
            )
            return
        self._keep_alive = packet.keep_alive * 1.5
        self._clean = packet.clean
        if packet.will:
            self._note("a will came with the CONNECT; the platform has none, so it is ignored")
        self._stage = _JOINING
        self._asking = True
        if username.startswith("app-") and "&" not in username:  # a device may be called so too
            self._clean = True
            self._door.spawn(self._join_app(username, password))
            return
        try:
            login = wire.mqtt_login(packet.client_id, username, password)
        except Refused as refused:
            self._reject(BAD_IDENTIFIER if self._who[0] else BAD_LOGIN, refused.reason)
            return
        self._ask(Request(self.address, None, b"", network=self._network), login)

    def _ask(self, request: Request, login: wire.Login) -> None:
        """Ask the gateway; on Wait fetch the missing fact in a task and ask again."""
        try:
            entry = self._door.gateway.connect(request, login)
        except Refused as refused:
            self._refuse_login(refused, request)
        except Wait as wait:
            self._door.spawn(self._fetch(request, login, wait.fetch))
        else:
            self._join(entry, login)

    async def _fetch(self, request: Request, login: wire.Login, fetch: Callable[[], Awaitable[None]]) -> None:
        try:
            await fetch()
        except Refused as refused:
            self._refuse_login(refused, request)
        else:
            if self._stage == _JOINING:
                self._ask(request, login)

    def _refuse_login(self, refused: Refused, request: Request) -> None:
        number = NOT_NOW
        if refused.limit:
            self._door.meter.limited(refused.limit)
            self._door.meter.count("mqtt_connect", refused.code)
            request.product_key, request.device_name = self._who
            self._door.floods.met(refused, request, "mqtt", number)
            self._write(packets.connack(number))
            self._close()
            return
        if refused.code is Code.AUTH_CHECK_ERROR:
            number = FORBIDDEN if refused.forbidden else BAD_LOGIN
        self._reject(number, refused.reason, refused.code)

    def _join(self, entry: Entry, login: wire.Login) -> None:
        device_id = entry.device.id
        self._who = entry.device.product_key, entry.device.name
        if login.auto_subscribe:
            self._auto = tuple(topics.system_downlinks(entry.device))
        if self._clean and device_id not in self._door.downlink.persistent:
            self._stand(entry)
        else:
            self._door.spawn(self._restore(entry))

    async def _restore(self, entry: Entry) -> None:
        """A persistent session is continued, or ended by one that begins clean."""
        device_id, downlink = entry.device.id, self._door.downlink
        record: SessionRecord | None = None
        try:
            if self._clean:
                await downlink.forget_session(device_id)
            else:
                record = await downlink.session(device_id)
                kept = dict.fromkeys(self._auto, 1)
                if record:
                    kept |= {each: qos for each, qos in record.subscriptions.items() if self._may(entry, each)}
                    self._sent = record.sent
                if record is None:
                    await downlink.save_session(device_id, SessionRecord(kept))
                self.subscriptions = kept
        except Unavailable as fault:
            self._reject(NOT_NOW, str(fault), Code.UPDATE_SESSION_ERROR)
            return
        if self._stage == _JOINING:
            self._stand(entry, present=record is not None)

    def _may(self, entry: Entry, topic_filter: str) -> bool:
        if topic_filter in self._auto:
            return True
        try:
            self._door.gateway.subscribe(entry, topic_filter)
        except Refused:
            return False
        return True

    def _stand(self, entry: Entry, *, present: bool = False) -> None:
        door, device = self._door, entry.device
        assert self._parser is not None
        self._entry = entry
        self._stage = _STANDING
        door.places.prove(self)
        self._parser.limit = _PACKET_BYTES
        self.subscriptions = {**dict.fromkeys(self._auto, 1), **self.subscriptions}
        self.stamp = door.roster.stamp()
        door.products.setdefault(device.product_key, set()).add(self)
        door.roster.opened(device.id, self)
        if entry is not door.cache.get(device.id):  # it may have changed while it was signing in
            door.spawn(door._renew([device.id]))
        self._heard_of(door.now)
        self._rest()
        door.meter.count("mqtt_connect")
        self._write(packets.connack(ACCEPTED, session_present=present))
        for topic_filter in self.subscriptions:
            self._hear_own(topic_filter)
        self.deliver_soon()
        self._go_on()

    async def _join_app(self, username: str, password: bytes) -> None:
        self._who = "", username[:64]
        gateway, changes = self._door.gateway, self._door.app_changes
        try:
            gateway.before_app(username, self._network)
            app = await self._door.apps_known.signed_in(username, password)
        except Refused as refused:
            self._refuse_login(refused, Request(self.address, None, b"", network=self._network))
            return
        except Unavailable as fault:
            self._reject(NOT_NOW, str(fault), Code.UPDATE_SESSION_ERROR)
            return
        if self._stage != _JOINING or self._parser is None:
            return
        if app is None:
            gateway.refused_app(username, self._network)
            self._reject(
                BAD_LOGIN,
                f"there is no application {username[:64]!r} with this secret; `uplinkd app list` shows them",
                Code.AUTH_CHECK_ERROR,
            )
            return
        self._app = app
        assert self._transport
        if self._transport.get_extra_info("sslcontext") is None and not is_loopback(self.address):
            self._note("the application's secret has crossed the network in plain text; let it sign in over TLS")
        self._door.apps.setdefault(app.id, set()).add(self)
        if changes != self._door.app_changes:
            self._door.spawn(self._door._renew_apps([app.id]))
        self._stage = _STANDING
        self._door.places.prove(self)
        self._parser.limit = _PACKET_BYTES
        self._rest()
        self._door.meter.count("mqtt_connect")
        self._write(packets.connack(ACCEPTED))
        self._go_on()

    # -- what the client publishes

    def _publish(self, packet: packets.Publish) -> None:
        if packet.qos == 2:
            self._end(
                Code.PARAM_ERROR, "a message came at QoS 2; the platform has QoS 0 and 1", packet.topic, "mqtt_publish"
            )
            return
        if len(packet.payload) > MAX_MQTT_PAYLOAD_BYTES:
            reason = f"the payload has {len(packet.payload)} bytes; at most {MAX_MQTT_PAYLOAD_BYTES} are allowed"
            self._end(Code.PARAM_ERROR, reason, packet.topic, "mqtt_publish")
            return
        if packet.retain:
            self._note(
                "a message came with the flag RETAIN; the platform retains none, so the flag is ignored", packet.topic
            )
        if self._app is not None:
            self._asking = True
            self._door.spawn(self._send_down(self._app, packet))
            return
        self._report(packet)

    def _report(self, packet: packets.Publish) -> None:
        assert self._entry
        product_key, device_name = self._who
        request = Request(
            self.address, None, packet.payload, None, b"", False, self._network, product_key, device_name, packet.topic
        )
        done = functools.partial(self._stored, packet, monotonic())
        try:
            self._door.gateway.report(request, self._entry, done)
        except Refused as refused:
            if refused.limit:
                self._slow_down(packet, refused, request)
            else:
                self._end(refused.code, refused.reason, packet.topic, "mqtt_publish")
            return
        self._tries = 0
        self._unstored += 1
        self._full = self._full or self._unstored >= _UNSTORED

    def _slow_down(self, packet: packets.Publish, refused: Refused, request: Request) -> None:
        """Over its rate nothing is lost: the socket is read on once the message may pass."""
        pause = _THROTTLE_SECONDS
        if not self._tries:
            self._door.meter.limited(refused.limit)
            flood = self._door.floods.met(refused, request, "mqtt", 0, slowed=True)
            if not flood.more:
                self._door.meter.count("mqtt_publish", refused.code)
        elif not refused.limit.startswith("device"):
            # Many wait for the same: they do not all try all the time, nor at the same time.
            pause = random.uniform(pause, min(pause * 2**self._tries, _LONGEST_THROTTLE_SECONDS))  # noqa: S311 - no secret
        self._tries += 1
        self._held = packet
        asyncio.get_running_loop().call_later(pause, self._try_again)

    def _try_again(self) -> None:
        packet, self._held = self._held, None
        if packet is not None and self._stage == _STANDING:
            self._report(packet)
            self._pump()

    def _stored(self, packet: packets.Publish, began: float, message_id: int, fault: str) -> None:
        """The engine's word on a publish that came at `began`."""
        self._unstored -= 1
        seconds = monotonic() - began
        if fault:
            # Counted here: of a session's many that fail at once, one alone ends it and is recorded.
            self._door.meter.count("mqtt_publish", Code.PUBLISH_MESSAGE_ERROR, seconds)
        else:
            self._door.meter.answered["mqtt_publish"].append(seconds)
        if fault and packet.qos:  # it sends the message again when it is back
            self._end(Code.PUBLISH_MESSAGE_ERROR, fault, packet.topic, "")
            return
        if fault:
            self._record(Code.PUBLISH_MESSAGE_ERROR, fault, packet.topic, endpoint="")
        elif packet.qos:
            self._write(packets.puback(packet.packet_id))
        if self._door.draining and not self._unstored:
            self._close()
        elif self._full and self._unstored < _UNSTORED // 2:
            self._full = False
            self._pump()

    async def _send_down(self, app: App, packet: packets.Publish) -> None:
        """An application's publish is a message for a device, or for all devices of a product."""
        topic = packet.topic
        fault = _may_send(app, topic)
        if not fault:
            try:
                await self._door.sender.send(topic, packet.payload)
            except (Rejected, Unavailable) as error:
                fault = str(error)
        if fault:
            self._end(Code.PUBLISH_MESSAGE_ERROR, fault, topic, "mqtt_send")
            return
        self._door.meter.count("mqtt_send")
        if packet.qos:
            self._write(packets.puback(packet.packet_id))
        self._go_on()

    # -- what it subscribes to

    def _subscribe(self, packet: packets.Subscribe) -> None:
        codes = []
        granted: dict[str, int] = {}
        for topic_filter, qos in packet.filters[:_MAX_SUBSCRIPTIONS]:
            try:
                self._check_subscription(topic_filter, len(self.subscriptions | granted))
            except Refused as refused:
                self._record(refused.code, refused.reason, topic_filter[:300], endpoint="mqtt_subscribe")
                codes.append(_REFUSED)
            else:
                granted[topic_filter] = min(qos, 1)
                self._door.meter.count("mqtt_subscribe")
                codes.append(min(qos, 1))
        if further := len(packet.filters) - len(codes):
            reason = f"a SUBSCRIBE has {len(packet.filters)} filters; at most {_MAX_SUBSCRIPTIONS} are looked at"
            self._record(Code.PARAM_ERROR, reason, endpoint="mqtt_subscribe")
            codes += [_REFUSED] * further
        self.subscriptions |= granted
        self._settle(packets.suback(packet.packet_id, codes), granted)

    def _check_subscription(self, topic_filter: str, count: int) -> None:
        """Return if the client may subscribe, besides the `count` filters that it has; raise Refused otherwise."""
        if count >= _MAX_SUBSCRIPTIONS and topic_filter not in self.subscriptions:
            raise Refused(
                Code.PARAM_ERROR, f"the session has {count} subscriptions; at most {_MAX_SUBSCRIPTIONS} are allowed"
            )
        if self._app is None:
            assert self._entry
            self._door.gateway.subscribe(self._entry, topic_filter)
            return
        topics.check_filter(topic_filter)
        patterns = [pattern for product in self._app.products for pattern in topics.patterns_of_product(product)]
        if not any(topics.covers(pattern, topic_filter) for pattern in patterns):
            known = ", ".join(self._app.products) or "none"
            raise Refused(
                Code.PUBLISH_MESSAGE_ERROR,
                f"{topic_filter} reaches beyond the products of the application {self._app.name!r}: {known}",
                topic=topic_filter,
            )

    def _unsubscribe(self, packet: packets.Unsubscribe) -> None:
        for topic_filter in packet.filters:
            self._unsubscribe_from(topic_filter)
        self._settle(packets.unsuback(packet.packet_id), {})

    def _settle(self, answer: bytes, granted: Iterable[str]) -> None:
        """The subscriptions have changed: tell who must know, then the client."""
        listening = False
        for topic_filter in granted:
            listening |= self._hear_own(topic_filter)
        if self._entry is not None:
            self._door.roster.changed(self._entry.device.id)
        if self._clean and not listening:
            self._write(answer)
            self._look_again()
        else:
            self._asking = True
            self._door.spawn(self._settled(answer, listening))

    async def _settled(self, answer: bytes, listening: bool) -> None:
        """Answer once a message that is published from now on is heard, and a persistent session's subscriptions are kept."""
        try:
            if listening:
                await self._door.bus.settled()
            if self._entry is not None and not self._clean:
                record = SessionRecord(dict(self.subscriptions), self._sent)
                await self._door.downlink.save_session(self._entry.device.id, record)
        except Unavailable as fault:
            self._end(Code.PUBLISH_MESSAGE_ERROR, f"the subscriptions could not be made to stand: {fault}")
            return
        self._write(answer)
        self._look_again()
        self._go_on()

    def _hear_own(self, topic_filter: str) -> bool:
        """Hear live what devices publish on topics of this filter: an application's, and a device's own. Whether that is new."""
        if topic_filter in self._ears or topic_filter in self._auto:
            return False
        if self._entry is not None:
            own = f"/{self._entry.device.product_key}/{self._entry.device.name}/"
            if not any(topics.filter_matches(topic_filter, own + levels) for levels in self._entry.publish_levels):
                return False  # nobody publishes there: what comes is sent down
        self._ears[topic_filter] = [
            self._door.bus.listen(
                live_subject(subject, self._door.partitions), functools.partial(self._heard, topic_filter)
            )
            for subject in subjects_of_filter(topic_filter)
        ]
        return True

    def _unsubscribe_from(self, topic_filter: str) -> None:
        self.subscriptions.pop(topic_filter, None)
        self._stop_hearing(topic_filter)

    def _stop_hearing(self, topic_filter: str) -> None:
        for end in self._ears.pop(topic_filter, ()):
            end()

    # -- towards the client

    def _heard(self, topic_filter: str, told: Told) -> None:
        qos = self.subscriptions.get(topic_filter)
        if qos is not None:
            self._send_live(from_subject(told.subject[told.subject.index("/") :]), told.payload, qos)

    def deliver_live(self, topic: str, payload: bytes) -> bool:
        """Send a message that waits nowhere, if the client has subscribed to it; whether it has."""
        qos = self._granted(topic)
        return qos is not None and self._send_live(topic, payload, qos)

    def _granted(self, topic: str) -> int | None:
        """The highest QoS of the subscriptions that match `topic`; None where there is none."""
        return max(
            (qos for each, qos in self.subscriptions.items() if topics.filter_matches(each, topic)), default=None
        )

    def _send_live(self, topic: str, payload: bytes, qos: int) -> bool:
        if self._stage != _STANDING or self._transport is None:
            return False
        if self._transport.get_write_buffer_size() > _UNREAD_BYTES or (qos and len(self._inflight) >= _LIVE_WINDOW):
            self._dropped = self._dropped or Occasionally(60)
            if self._dropped():
                self._record(
                    Code.SUCCESS,
                    "the client does not keep up with its subscriptions; messages to it are dropped",
                    topic,
                )
            return False
        packet_id = 0
        if qos:
            packet_id = self._free_id(self._next_id)
            self._next_id = packet_id
            self._inflight[packet_id] = 0
        self._write(packets.publish(topic.encode(), payload, packet_id=packet_id))
        return True

    def deliver_soon(self) -> None:
        """Something may wait for the device."""
        entry = self._entry
        if entry is None or self._stage != _STANDING or not self.subscriptions:
            return
        if entry.device.id not in self._door.downlink.waiting:
            return
        if self._delivering:
            self._again = True
        else:
            self._delivering = True
            self._door.spawn(self._deliver(entry.device.id))

    def _look_again(self) -> None:
        """With other subscriptions, what was passed over may be for this session after all."""
        self._cursor = 0
        self.deliver_soon()

    async def _deliver(self, device_id: int) -> None:
        """Send what waits, oldest first, as far as the client's acknowledgements allow."""
        try:
            while self._stage == _STANDING and not self._blocked and len(self._inflight) < _WINDOW:
                try:
                    if not await self._deliver_next(device_id):
                        return
                except Unavailable as fault:
                    log.debug("what waits for the device is delivered later: %s", fault)
                    await asyncio.sleep(_AWAY_SECONDS)
        finally:
            self._delivering = False

    async def _deliver_next(self, device_id: int) -> bool:
        """Send the next of what waits, if it is for this session; whether there may be more."""
        for gone in [sequence for sequence, removed in self._leaving.items() if removed]:
            del self._leaving[gone]
        after = self._cursor
        found = await self._door.downlink.next(device_id, after)
        if after != self._cursor:  # the subscriptions are others now
            return True
        if found is None:
            again, self._again = self._again, False
            return again
        self._cursor = found.sequence
        qos = self._granted(found.topic)
        if qos is None or self._is_sent(found.sequence) or self._stage != _STANDING:
            return True
        packet_id = 0
        if qos:
            packet_id = self._free_id(found.sequence % 0xFFFF)
            self._inflight[packet_id] = found.sequence
        dup = found.sequence <= self._sent
        self._write(packets.publish(found.topic.encode(), found.payload, packet_id=packet_id, dup=dup))
        if not packet_id:
            self._leaving[found.sequence] = False
            await self._removed(found.sequence)
        return True

    def _is_sent(self, sequence: int) -> bool:
        return sequence in self._inflight.values() or sequence in self._leaving

    def _acknowledged(self, packet_id: int) -> None:
        sequence = self._inflight.pop(packet_id, None)
        if sequence:
            self._leaving[sequence] = False
            self._door.spawn(self._delivered(sequence))
        elif len(self._inflight) == _WINDOW - 1:
            self.deliver_soon()

    async def _delivered(self, sequence: int) -> None:
        await self._removed(sequence)
        self.deliver_soon()

    async def _removed(self, sequence: int) -> None:
        """Return once the engine has removed what the client has, or the session is over: then it is delivered again."""
        while True:
            try:
                await self._door.downlink.remove(sequence)
            except Unavailable as fault:
                log.debug("a message that was delivered is not removed yet: %s", fault)
                if self._stage == _OVER:
                    return
                await asyncio.sleep(_AWAY_SECONDS)
            else:
                self._leaving[sequence] = True
                return

    async def _remember(self, device_id: int) -> None:
        """Keep a persistent session anew, so that its time runs from now on; what was sent and not acknowledged is sent again
        when it goes on, and marked so."""
        record = SessionRecord(dict(self.subscriptions), max([self._sent, *self._inflight.values()]))
        try:
            await self._door.downlink.save_session(device_id, record)
        except Unavailable as fault:
            log.debug("a session's place could not be kept: %s", fault)

    def _free_id(self, before: int) -> int:
        """A packet id that is not under way, the first after `before`. A message that is sent again gets the one that it had."""
        packet_id = before % 0xFFFF + 1
        while packet_id in self._inflight:
            packet_id = packet_id % 0xFFFF + 1
        return packet_id

    def _write(self, data: bytes) -> None:
        if self._transport is not None and self._stage != _OVER and not self._transport.is_closing():
            self._transport.write(data)

    @property
    def device_id(self) -> int:
        """The device whose session it is, 0 while it is none's."""
        return self._entry.device.id if self._entry else 0

    # -- what others decide

    def taken_over(self, where: str) -> None:
        """The device has a younger session, `where` says whose; this one ends."""
        self._record(Code.SUCCESS, f"the device has opened another session {where}; this one is closed")
        self._close()

    def stands_anew(self, stamp: int) -> None:
        """Others may have taken this session for ended: it is told of again, with this stamp."""
        self.stamp = stamp
        self._heard_of(self._door.now)

    def renew(self, entry: Entry | None) -> None:
        """The registry has changed: go on with the device as it is now, or end."""
        if self._entry is None or self._stage != _STANDING:
            return
        reason = ""
        if entry is None:
            reason = "the device was deleted"
        elif not entry.device.enabled:
            reason = "the device was disabled"
        elif entry.device.generation != self._entry.device.generation:
            reason = "the device's secret was changed, or it was disabled in between"
        if reason or entry is None:
            self._end(Code.AUTH_CHECK_ERROR, reason)
            return
        self._entry = entry
        lost = [each for each in self.subscriptions if not self._may(entry, each)]
        for topic_filter in lost:
            self._unsubscribe_from(topic_filter)
            self._record(
                Code.PUBLISH_MESSAGE_ERROR, "the right to subscribe was withdrawn; the subscription ends", topic_filter
            )
        for topic_filter in self.subscriptions:
            self._hear_own(topic_filter)
        self._door.roster.changed(entry.device.id)

    def renew_app(self, app: App | None) -> None:
        """The registry has changed: an application with other rights, or none, has to sign in anew."""
        if app is None or app != self._app:
            self._end(
                Code.AUTH_CHECK_ERROR,
                "the application was deleted" if app is None else "the application's rights changed",
            )

    # -- the end

    def _rest(self) -> None:
        if self._stage == _STANDING:
            self.deadline = self._door.now + self._keep_alive

    def expire(self) -> None:
        """The deadline has passed."""
        if self._held is not None and not self._blocked:
            self._rest()  # what it has sent since lies unread: it is slowed down, not silent
            return
        if self._stage == _WAITING:
            self._record(
                Code.PARAM_ERROR, f"no CONNECT came within {self._door.connect_timeout:g} s", endpoint="mqtt_connect"
            )
        elif self._stage == _JOINING:
            reason = f"the login could not be decided within {self._door.connect_timeout:g} s"
            self._record(Code.UPDATE_SESSION_ERROR, reason, endpoint="mqtt_connect")
        elif self._blocked:
            self._record(
                Code.SUCCESS, f"the client has not read for {self._door.write_timeout:g} s; the session is closed"
            )
        elif self._stage == _STANDING:
            reason = f"nothing was heard for {self._keep_alive:g} s, one and a half times the keep-alive; the session is closed"
            self._record(Code.SUCCESS, reason)
        self.abort()

    def drain(self) -> None:
        if self._unstored:
            self._read_or_not()
        else:
            self._close()

    @property
    def under_way(self) -> bool:
        """Whether a publish has arrived that is not answered yet."""
        return bool(self._unstored)

    @property
    def spare(self) -> bool:
        """Whether it may yield its place (see Places)."""
        return self._stage == _WAITING or not (self._stage == _JOINING or self._unstored)

    def abort(self) -> None:
        self._stage = _OVER
        if self._transport is not None:
            self._transport.abort()

    def _reject(self, number: int, reason: str, code: Code = Code.PARAM_ERROR) -> None:
        """Answer a CONNECT with no."""
        self._record(code, reason, status=number, endpoint="mqtt_connect")
        self._write(packets.connack(number))
        self._close()

    def _end(self, code: Code, reason: str, topic: str = "", endpoint: str = "mqtt") -> None:
        """Close, with the reason in the record."""
        if self._stage != _OVER:
            self._record(code, reason, topic[:300], endpoint=endpoint)
            self._close()

    def _close(self) -> None:
        self._stage = _OVER
        self._held = None
        self.deadline = self._door.now + self._door.write_timeout
        if self._transport is not None:
            self._transport.close()

    def _note(self, reason: str, topic: str = "", code: Code = Code.SUCCESS, endpoint: str = "mqtt") -> None:
        """Record what is ignored or slowed down, once a session each."""
        kind = reason[:20]
        if kind not in self._noted:
            self._noted.add(kind)
            self._record(code, reason, topic[:300], endpoint=endpoint)

    def _record(self, code: Code, reason: str, topic: str = "", status: int = 0, *, endpoint: str = "mqtt") -> None:
        """Record what was refused or noted; a refusal is counted under `endpoint`, where that is not empty."""
        if code and endpoint:
            self._door.meter.count(endpoint, code)
        product_key, device_name = self._who
        self._door.record(
            Outcome(secrets.token_hex(8), "mqtt", status, code, reason, self.address, product_key, device_name, topic)
        )


def _may_send(app: App, topic: str) -> str:
    """Why an application may not send down to `topic`, empty if it may."""
    try:
        product_key = topics.broadcast_product(topic) or topics.of_text(topic).product_key
    except Refused as refused:
        return refused.reason
    if product_key not in app.products:
        return f"the application {app.name!r} has nothing to do with the product {product_key!r} of {topic}"
    return "" if app.sends else f"the application {app.name!r} may read, and not send messages down"


def _log_fault(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (fault := task.exception()):
        log.error("a fault of ours in an MQTT session", exc_info=fault)


def _discard(groups: dict[Any, set[Connection]], key: object, member: Connection) -> None:
    group = groups.get(key)
    if group is not None:
        group.discard(member)
        if not group:
            del groups[key]
