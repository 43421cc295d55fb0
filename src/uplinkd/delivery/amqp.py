"""The AMQP 1.0 door: what consumers of groups connect to, as to the platform's server-side subscription.

TLS is asyncio's, the sign-in is sasl.py's, and from then on bytes go through proton's engine; link.py moves messages. A consumer
that is refused hears little, and the operator the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, cast

from uplinkd import asking
from uplinkd.core.errors import Code, Refused, Rejected, Unavailable
from uplinkd.core.groups import Group
from uplinkd.core.model import App
from uplinkd.delivery.budget import Budget
from uplinkd.delivery.link import Link
from uplinkd.delivery.sasl import (
    AMQP_HEADER,
    AUTH_FAILED,
    OK,
    SASL_HEADER,
    UNAVAILABLE,
    Handshake,
    Init,
    Login,
    Malformed,
    check,
    login_of,
    outcome,
)
from uplinkd.engine import Deliveries
from uplinkd.journal import Refusal
from uplinkd.registry import Change
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks, spawn

try:
    import proton
except ImportError:  # the extra `amqp`: check_available says what to do
    _available = False
else:
    _available = True

__all__ = ["AmqpDoor", "GroupLookups", "Lookups", "check_available"]

log = logging.getLogger("uplinkd.amqp")

# The platform's rules: "Connect an AMQP client to IoT Platform".
_LEAST_IDLE, _MOST_IDLE = 30.0, 300.0
_ARRIVE_SECONDS = 15.0
_CONSUMERS_A_GROUP = 64

# A peer from which nothing comes for so long is gone; proton asks it for a sign of life in half the time.
_SILENCE_SECONDS = 240.0
_FRAME_BYTES = 16 * 1024
_MOST_SESSIONS = 8  # Qpid JMS has one of its own beside the program's
_MOST_REFUSED_LINKS = 16
_STRANGERS = 256
_UNREAD_BYTES = 256 * 1024
_READ_SECONDS = 30.0
_REFUSE_SECONDS = 1.0
_FAREWELL_SECONDS = 2.0
_PAUSE_SECONDS = 0.5
_POLL_SECONDS = 0.02

_FORCED = "amqp:connection:forced"  # clients connect again after it
_NOT_ALLOWED = "amqp:not-allowed"
_TOO_MANY = "amqp:resource-limit-exceeded"
_INVALID = "amqp:invalid-field"

_SIGNING, _CHECKING, _OPEN, _CLOSING, _OVER = range(5)


class GroupLookups(Protocol):
    def by_name(self, name: str) -> Group | None: ...


class Lookups(Protocol):
    """What the door asks of the registry, in threads. It raises Unavailable."""

    @property
    def groups(self) -> GroupLookups: ...
    def find_app(self, key: str) -> App | None: ...
    def app_secret(self, key: str) -> str | None: ...


def check_available(settings: Settings) -> None:
    """Return if there is to be no AMQP door or what it needs is installed; raise Rejected with what to do."""
    if settings.amqp_listen and not _available:
        raise Rejected(
            f"amqp_listen = {settings.amqp_listen} needs python-qpid-proton, which is not installed: run `make amqp`, or "
            "`pip install 'uplinkd[amqp]'`; it is compiled for half a minute, with gcc and Python's headers"
        )


class AmqpDoor:
    """What the AMQP connections of one process share. `record` keeps a refusal; it must neither block nor raise.

    Made in the event loop; the only thread that touches proton is the loop's.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Lookups,
        deliveries: Deliveries,
        record: Callable[[Refusal], None],
        budget: Budget | None = None,
    ) -> None:
        check_available(settings)
        self.deliveries = deliveries
        self.budget = budget or Budget()
        self.record = record
        self.most = settings.max_connections
        self.draining = False
        self.changes = 0
        self.connections: set[Connection] = set()
        self.strangers: dict[Connection, None] = {}
        """Those that have not signed in yet, in the order in which they came."""
        self._registry = registry
        self._tasks: set[asyncio.Task[None]] = set()

    def connection(self) -> Connection:
        """For `loop.create_server`, which makes the TLS around it."""
        return Connection(self)

    def consumers(self) -> list[asking.Consumer]:
        """Those that have their link."""
        return [each for connection in self.connections if (each := connection.consumer())]

    def changed(self, change: Change) -> None:
        """The registry has changed: whom it may concern is looked at anew, and has to connect again when something is different."""
        everything = change.group_id is None and change.app_id is None
        if everything and change.product_key:
            return  # a product's or a device's, and there are many
        self.changes += 1
        concerned = [
            connection
            for connection in self.connections
            if connection.member
            and (everything or change.app_id == connection.member[0].id or change.group_id == connection.member[1].id)
        ]
        if concerned:
            self.spawn(self._look_anew(concerned))

    async def drain(self, within: float) -> None:
        """Give no message more, wait a while for the outcomes of those that consumers hold, then close every connection."""
        end = asyncio.get_running_loop().time() + within
        self.draining = True
        for connection in list(self.connections):
            connection.rest()
        await _until(lambda: not any(each.holds for each in self.connections), end - within / 2)
        for connection in list(self.connections):
            connection.close(_FORCED, "the server stops; connect again")
        await _until(lambda: not self.connections, end)
        for connection in list(self.connections):
            connection.abort()
        await end_tasks(*self._tasks)

    async def admitted(self, login: Login) -> tuple[App, Group]:
        """Whose consumer it is, and of which group; raise Refused or Unavailable."""
        while True:
            seen = self.changes
            found = await asyncio.to_thread(self._look, login)
            if seen == self.changes:  # otherwise it may have been looked up just before, and nobody would look again
                return found

    def spawn(self, act: Coroutine[Any, Any, None]) -> None:
        """Run `act`, owned by the door."""
        spawn(act, self._tasks).add_done_callback(_log_fault)

    def is_full(self, group: Group) -> bool:
        """Whether a group has as many consumers here as it may have."""
        return sum(
            each.member is not None and each.member[1].id == group.id and each.linked for each in self.connections
        ) >= (_CONSUMERS_A_GROUP)

    def has_room(self) -> bool:
        """Whether one more may come. Of many strangers the one that has said nothing for longest gives way: as long as each of them
        might stay, a few hundred silent connections would keep everybody out."""
        if self.draining or len(self.connections) >= self.most:
            return False
        if len(self.strangers) < _STRANGERS:
            return True
        silent = next((each for each in self.strangers if each.silent), None)
        if silent:
            silent.give_way()
        return silent is not None

    def _look(self, login: Login) -> tuple[App, Group]:
        registry = self._registry
        return check(
            login,
            registry.find_app(login.auth_id),
            registry.app_secret(login.auth_id),
            registry.groups.by_name(login.group),
        )

    async def _look_anew(self, concerned: list[Connection]) -> None:
        for connection in concerned:
            while connection.login and connection.member:
                try:
                    _, group = await asyncio.to_thread(self._look, connection.login)
                except Unavailable:
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                except Refused as refused:
                    connection.close(_FORCED, f"not allowed any more: {refused.reason}")
                else:
                    if group != connection.member[1]:
                        connection.close(
                            _FORCED, _paused(group) or f"the consumer group {group.name!r} was changed; connect again"
                        )
                break


class Connection(asyncio.Protocol):
    """One consumer's connection. `login` and `member` are set once it has signed in."""

    def __init__(self, door: AmqpDoor) -> None:
        self.address = ""
        self.login: Login | None = None
        self.member: tuple[App, Group] | None = None
        self._door = door
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._stage = _SIGNING
        self._since = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._ticking: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None  # while the client does not read
        self._handshake = Handshake()
        self._header = b""
        self._link: Link | None = None
        self._refused_links = 0
        self._sessions = self._ended_sessions = 0  # the latter until that is written
        self._deaf = False
        self._flushing = False
        self._bye = False  # the client has closed its side

    # -- what the door asks

    @property
    def linked(self) -> bool:
        return self._link is not None

    @property
    def holds(self) -> bool:
        """Whether the client has messages that it has not settled."""
        return bool(self._link and self._link.held)

    @property
    def silent(self) -> bool:
        """Whether the client has yet to say who it is."""
        return self._stage == _SIGNING

    def give_way(self) -> None:
        self._record(Code.REQUEST_TOO_MANY, f"no sign-in had come, and {_STRANGERS} connections wait for theirs")
        self._door.strangers.pop(self, None)
        self._stage = _OVER
        self.abort()

    def consumer(self) -> asking.Consumer | None:
        if not (self._link and self.login and self.member):
            return None
        app, group = self.member
        return asking.Consumer(
            group=group.name,
            app=app.name,
            client=self.login.client,
            address=self.address,
            since=self._since,
            held=len(self._link.held),
            credit=self._link.credit,
        )

    def rest(self) -> None:
        if self._link:
            self._link.rest()

    def close(self, name: str, text: str) -> None:
        """Close with a condition that the client can read; whoever has not signed in yet gets none."""
        if self._stage in (_SIGNING, _CHECKING):
            self._end()
        if self._stage != _OPEN:
            return
        self._stage = _CLOSING
        self._unlink()
        self._connection.condition = proton.Condition(name, text)
        self._connection.open()
        self._connection.close()
        self._within(_FAREWELL_SECONDS)
        self._flush()

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()

    # -- the transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        door = self._door
        peer = transport.get_extra_info("peername")
        self.address = peer[0] if peer else ""
        if not door.has_room():
            self._stage = _OVER
            self._transport.abort()
            return
        door.connections.add(self)
        door.strangers[self] = None
        self._transport.set_write_buffer_limits(high=_UNREAD_BYTES)
        self._within(_ARRIVE_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.connections.discard(self)
        self._door.strangers.pop(self, None)
        self._unlink()
        for timer in (self._deadline, self._ticking, self._reading):
            if timer:
                timer.cancel()
        self._transport = None
        if self._stage in (_OPEN, _CLOSING):
            self._engine.unbind()
            self._connection.free()
            del self._engine, self._connection, self._collector
        self._stage = _OVER

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        if self._link:
            self._link.blocked = True
        self._reading = self._loop.call_later(_READ_SECONDS, self._unread)

    def resume_writing(self) -> None:
        if self._reading:
            self._reading.cancel()
        self._reading = None
        if self._link:
            self._link.blocked = False
        self._pump()

    def data_received(self, data: bytes) -> None:
        try:
            if self._stage == _SIGNING:
                self._sign(data)
            elif self._stage == _CHECKING:
                self._handshake.rest += data  # reading is paused: what was read before that
            elif self._stage in (_OPEN, _CLOSING):
                self._push(data)
        except Exception:
            log.exception("a fault of ours in an AMQP connection")
            self.abort()

    # -- signing in

    def _sign(self, data: bytes) -> None:
        try:
            self._write(self._handshake.feed(data))
        except Malformed as fault:
            if fault.foreign:
                self._write(SASL_HEADER)  # what is spoken here: AMQP 1.0, part 2.2
            self._record(Code.PARAM_ERROR, str(fault))
            self._end()
            return
        if said := self._handshake.said:
            self._stage = _CHECKING
            if self._transport:
                self._transport.pause_reading()
            self._door.spawn(self._check(said))

    async def _check(self, said: Init) -> None:
        try:
            login = login_of(said)
            member = await self._door.admitted(login)
        except Refused as refused:
            await self._refuse(AUTH_FAILED, refused.code, refused.reason)
        except Unavailable as fault:
            await self._refuse(UNAVAILABLE, Code.UPDATE_SESSION_ERROR, f"the login could not be checked: {fault}")
        except Exception:
            log.exception("a fault of ours while a consumer signs in")
            await self._refuse(UNAVAILABLE, Code.COMMON_ERROR, "a fault of uplinkd; its log has the traceback")
        else:
            if self._stage == _CHECKING and not self._door.draining:
                self._begin(login, member)

    async def _refuse(self, status: int, code: Code, reason: str) -> None:
        """Answer a sign-in with no, and not at once: nobody tries out many."""
        self._record(code, reason, status)
        await asyncio.sleep(_REFUSE_SECONDS)
        if self._stage == _CHECKING:
            self._write(outcome(status))
            self._end()

    def _begin(self, login: Login, member: tuple[App, Group]) -> None:
        """It is a consumer of ours: the rest is proton's."""
        self.login, self.member = login, member
        self._door.strangers.pop(self, None)
        self._since = round(time.time() * 1000)
        self._write(outcome(OK))
        self._engine = proton.Transport(proton.Transport.SERVER)
        self._engine.tracer = _hush
        self._engine.max_frame_size = _FRAME_BYTES
        self._engine.channel_max = _MOST_SESSIONS - 1
        self._engine.idle_timeout = _SILENCE_SECONDS
        self._connection = proton.Connection()
        self._connection.container = "uplinkd"
        self._collector = proton.Collector()
        self._connection.collect(self._collector)
        self._engine.bind(self._connection)
        self._stage = _OPEN
        self._within(_ARRIVE_SECONDS)
        if rest := self._handshake.rest:
            self.data_received(rest)
        if self._transport:
            self._transport.resume_reading()

    # -- proton

    def _push(self, data: bytes) -> None:
        if len(self._header) < len(AMQP_HEADER):
            # Proton would take a second SASL header as well, and sign anybody in.
            self._header += data[: len(AMQP_HEADER) - len(self._header)]
            if not AMQP_HEADER.startswith(self._header):
                self._write(AMQP_HEADER)
                self._record(Code.PARAM_ERROR, f"after the sign-in came no header of AMQP 1.0, but {self._header!r}")
                self._end()
                return
        left = b"" if self._deaf else data
        with contextlib.suppress(proton.ProtonException):  # malformed: the engine has said so in its answer
            while left and not self._deaf and (room := self._engine.capacity()) > 0:
                self._engine.push(left[:room])
                left = left[room:]
                self._react()
        self._react()
        self._pump()

    def _react(self) -> None:
        while event := self._collector.peek():
            if act := _ACTS.get(event.type.name):
                act(self, event.context)
            self._collector.pop()

    def _pump(self) -> None:
        """Write what there is to write, and let messages follow."""
        self._flush()
        while self._link and self._link.go_on():
            self._flush()

    def _flush(self) -> None:
        self._flushing = False
        if self._stage not in (_OPEN, _CLOSING) or self._transport is None:
            return
        size = 0
        while not self._reading and (size := self._engine.pending()) > 0:
            self._transport.write(self._engine.peek(size) or b"")
            self._engine.pop(size)
        if size == 0 and not self._reading:
            self._sessions -= self._ended_sessions
            self._ended_sessions = 0
        if size < 0:  # the engine has said everything
            self._stage = _CLOSING
            self._unlink()
            if self._bye:
                self._end()
            else:
                self._within(_FAREWELL_SECONDS)  # a socket that is closed while bytes come loses those on their way out

    def _stirred(self) -> None:
        """Messages that come in one turn of the event loop leave together."""
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._pump)

    def _tick(self) -> None:
        """Let proton send signs of life, and close when the client gives none."""
        if self._stage not in (_OPEN, _CLOSING):
            return
        due = self._engine.tick(self._loop.time())
        self._react()
        self._flush()
        if due and self._transport:
            self._ticking = self._loop.call_at(due, self._tick)

    # -- proton's events

    def _opened(self, connection: proton.Connection) -> None:
        idle = self._engine.remote_idle_timeout
        assert self.member
        if idle and not _LEAST_IDLE <= idle <= _MOST_IDLE:
            rule = f"idle-time-out is from {_LEAST_IDLE * 1000:,.0f} to {_MOST_IDLE * 1000:,.0f} ms, and not {idle * 1000:,.0f}"
            self._object(_INVALID, rule)
        elif reason := _paused(self.member[1]):
            self._record(Code.SUCCESS, reason)
            self._loop.call_later(_REFUSE_SECONDS, self.close, _FORCED, reason)
        else:
            connection.properties = {proton.symbol("product"): "uplinkd"}
            connection.open()
            self._ticking = self._loop.call_later(0, self._tick)

    def _closed(self, connection: proton.Connection) -> None:
        self._bye = True
        self._unlink()
        connection.close()

    def _session_opened(self, session: proton.Session) -> None:
        if self._sessions == _MOST_SESSIONS:
            # Proton would find no channel for it, and say and do nothing from then on; each costs it 3 KB until it is answered.
            self._deaf = True
            text = f"a connection has at most {_MOST_SESSIONS} sessions, with those that have just ended"
            self._object(_TOO_MANY, text)
            return
        self._sessions += 1
        session.open()

    def _session_closed(self, session: proton.Session) -> None:
        if self._link and self._link.sender.session == session:
            self._unlink()
            self._within(_ARRIVE_SECONDS)
        session.close()
        session.free()
        self._ended_sessions += 1

    def _attached(self, link: proton.Link) -> None:
        assert self.member
        group = self.member[1]
        if self._stage != _OPEN or self._door.draining or _paused(group):
            return  # the connection is about to be closed
        if not isinstance(link, proton.Sender):
            self._refuse_link(
                link, _NOT_ALLOWED, "consumers only receive here: a client opens no link on which it sends"
            )
        elif self._link:
            self._refuse_link(link, _NOT_ALLOWED, "there is a receiver link already: a connection has just one")
        elif self._door.is_full(group):
            text = f"the consumer group {group.name!r} has {_CONSUMERS_A_GROUP} consumers already, and takes no more"
            self._refuse_link(link, _TOO_MANY, text)
        else:
            link.source.copy(link.remote_source)
            link.target.copy(link.remote_target)
            link.source.filter.clear()  # none is applied: the group has its own
            link.snd_settle_mode = proton.Link.SND_UNSETTLED  # also where settled ones are asked for: none may get lost
            link.rcv_settle_mode = proton.Link.RCV_FIRST
            link.open()
            self._link = Link(
                group, self._door.deliveries, link, self._stirred, self._door.budget, blocked=self._reading is not None
            )
            self._within(None)

    def _refuse_link(self, link: proton.Link, name: str, text: str) -> None:
        self._refused_links += 1
        if self._refused_links == 1:
            self._record(Code.REQUEST_TOO_MANY if name == _TOO_MANY else Code.PARAM_ERROR, text)
        if self._refused_links > _MOST_REFUSED_LINKS:
            self.close(_NOT_ALLOWED, text)
            return
        link.source.type = link.target.type = proton.Terminus.UNSPECIFIED  # says before the detach that it is refused
        link.condition = proton.Condition(name, text)
        link.open()
        link.close()

    def _detached(self, link: proton.Link) -> None:
        if self._link and self._link.sender == link:
            self._unlink()
            self._within(_ARRIVE_SECONDS)
        link.close()
        link.free()

    def _flowed(self, link: proton.Link) -> None:
        if not (self._link and self._link.sender == link):
            return
        if link.credit < -self._link.sent:  # proton counts in 32 bits with a sign: it would send nothing, for ever
            self._object(_INVALID, f"link-credit is at most {2**31 - 1:,}")
        else:
            self._link.flowed()

    def _delivery(self, delivery: proton.Delivery) -> None:
        if delivery.link.is_receiver:
            self._object(_NOT_ALLOWED, "consumers only receive here: this client sends")
        elif self._link:
            self._link.settle(delivery)

    def _failed(self, engine: proton.Transport) -> None:
        condition = engine.condition
        if condition and condition.name == _TOO_MANY:  # what proton calls silence
            self._record(Code.SUCCESS, f"nothing came for {_SILENCE_SECONDS:g} s; the connection is closed")
        elif condition:
            self._record(Code.PARAM_ERROR, f"malformed AMQP: {condition.description}")

    # -- the end

    def _object(self, name: str, text: str) -> None:
        """Close, with the reason for the client and in the record."""
        if self._stage == _OPEN:
            self._record(Code.PARAM_ERROR, text)
            self.close(name, text)

    def _unlink(self) -> None:
        link, self._link = self._link, None
        if link:
            link.close()

    def _within(self, seconds: float | None) -> None:
        """Something has to happen within so many seconds; None: nothing has to."""
        if self._deadline:
            self._deadline.cancel()
        self._deadline = self._loop.call_later(seconds, self._expire) if seconds else None

    def _expire(self) -> None:
        if self._stage == _SIGNING:
            self._record(Code.PARAM_ERROR, f"no sign-in came within {_ARRIVE_SECONDS:g} s")
        elif self._stage == _CHECKING:
            self._record(Code.UPDATE_SESSION_ERROR, f"the login could not be decided within {_ARRIVE_SECONDS:g} s")
        elif self._stage == _OPEN:
            self._object(_NOT_ALLOWED, f"no receiver link was opened within {_ARRIVE_SECONDS:g} s")
            return
        self.abort()

    def _unread(self) -> None:
        self._record(Code.SUCCESS, f"the client has not read for {_READ_SECONDS:g} s; the connection is closed")
        self.abort()

    def _end(self) -> None:
        """Close once everything is written."""
        if self._stage in (_SIGNING, _CHECKING):
            self._stage = _OVER
        self._within(_FAREWELL_SECONDS)
        if self._transport:
            self._transport.close()

    def _write(self, data: bytes) -> None:
        if data and self._transport:
            self._transport.write(data)

    def _record(self, code: Code, reason: str, status: int = 0) -> None:
        if self.login and self.member:
            reason = f"consumer {self.login.client!r} of the group {self.member[1].name!r}: {reason}"
        self._door.record(
            Refusal(
                request_id=secrets.token_hex(8),
                at=round(time.time() * 1000),
                endpoint="amqp",
                code=code,
                status=status,
                product_key="",
                device_name="",
                address=self.address,
                topic="",
                reason=reason,
            )
        )


_ACTS: dict[str, Callable[[Connection, Any], None]] = {
    "PN_DELIVERY": Connection._delivery,
    "PN_CONNECTION_REMOTE_OPEN": Connection._opened,
    "PN_CONNECTION_REMOTE_CLOSE": Connection._closed,
    "PN_SESSION_REMOTE_OPEN": Connection._session_opened,
    "PN_SESSION_REMOTE_CLOSE": Connection._session_closed,
    "PN_LINK_REMOTE_OPEN": Connection._attached,
    "PN_LINK_REMOTE_CLOSE": Connection._detached,
    "PN_LINK_REMOTE_DETACH": Connection._detached,
    "PN_LINK_FLOW": Connection._flowed,
    "PN_TRANSPORT_ERROR": Connection._failed,
}


def _paused(group: Group) -> str:
    return f"the consumer group {group.name!r} is paused; connect again when it goes on" if group.plan.paused else ""


def _hush(_engine: proton.Transport, _line: str) -> None:
    """Where proton would print: any consumer could fill the log, and the door keeps the reasons itself."""


async def _until(condition: Callable[[], bool], end: float) -> None:
    """Return once it is so, or at `end` of the loop's clock."""
    loop = asyncio.get_running_loop()
    while not condition():
        if loop.time() >= end:
            return
        await asyncio.sleep(_POLL_SECONDS)


def _log_fault(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (fault := task.exception()):
        log.error("a fault of ours at the AMQP door", exc_info=fault)
