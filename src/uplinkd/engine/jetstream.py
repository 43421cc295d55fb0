"""Publishes to JetStream over a lean connection of our own: what is published in one turn of the event loop leaves in one
write, and acknowledgements are matched by number. 4 µs of CPU a message, where the stock client takes 35 to 45."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import secrets
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Any, cast
from urllib.parse import urlsplit

from uplinkd import __version__
from uplinkd.core.errors import Unavailable
from uplinkd.core.model import Origin
from uplinkd.engine import ORIGIN_HEADER, Done
from uplinkd.engine.embedded import Access
from uplinkd.engine.stream import (
    Base,
    Part,
    base_of,
    changed,
    check_partitions,
    new_base,
    part_for,
    parts,
    wanted,
)
from uplinkd.engine.streams import check_version, differences, told_why
from uplinkd.engine.wire import DUPLICATE, Reader, Received, ack_of, acks_from
from uplinkd.metrics import Meter, spare
from uplinkd.observe import Occasionally
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks

__all__ = ["JetStreamPublisher", "PartedPublisher"]

log = logging.getLogger("uplinkd.engine")

_CONNECT_SECONDS = 2.0
_REQUEST_SECONDS = 2.0
_AGAIN_SECONDS = 0.4
_SWEEP_SECONDS = 0.1
_PING_SECONDS = 1.0
_SILENCE_SECONDS = 4.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
# What waits for a connection, or in the socket's buffer for a server that does not read.
_HELD_BYTES = 8 * 1024**2
_HELD_COUNT = 20_000
# While a batch is under way the next one gathers, up to this many: a server on the same core costs less that way, and an
# idle one is not made to wait. 32 connections, one core for all: 22,000 messages/s without, see docs/en/performance.md.
_FULL_BATCH = 64
# Where each acknowledgement waits for the disk (sync_interval always), a message that is stored alone costs 0.5 ms and an atomic batch
# (ADR-50) 10 to 13 ms, whether it has 32 messages or 256. So from this many on they go as one, and wait a moment for others.
_WORTH_A_BATCH, _MOMENT = 24, 0.003
_LARGEST_BATCH, _LARGEST_BATCH_BYTES = 1000, 4 * 1024**2
# For this long a deleted stream may still be shown by the server.
_GHOST_SECONDS = 0.5
_GHOST_PAUSE = 0.02
# nats-server 2.15 removes a deleted stream's folder in the background, and with it the files of one of the same name that was
# made meanwhile; that one never stores anything. (1 in 60 deletions on a busy machine, when it was made at once.)
_CLEAN_UP_SECONDS = 0.1

_Publish = tuple[bytes, bytes, Done, Origin, str, float]
_Leaving = tuple[bytes, bytes, bytes, bytes]

# What names a message's origin to NATS; the usual one needs no header.
_PLAIN = Origin.HTTPS
_OUR_FAULT = "a fault of ours while answering what the engine said"
_HEADERS = {
    origin: b"" if origin is _PLAIN else f"NATS/1.0\r\n{ORIGIN_HEADER}: {origin}\r\n\r\n".encode() for origin in Origin
}


class JetStreamPublisher:
    """One worker's connection to the engine, to publish to one stream. While it is away, publishes wait for it until their time is up.

    `tell` hears how many publishes wait, and how long (s) the oldest of them already.
    """

    def __init__(
        self,
        settings: Settings,
        access: Access,
        meter: Meter | None = None,
        *,
        part: Part = Part(),  # noqa: B008 - it never changes
        tell: Callable[[int, float], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.part = part
        self._step = part.count
        self._settings = settings
        self._access = access
        self._clock = clock
        self._meter = meter or spare()
        self._told = tell or self._meter.engine
        self._took, self._weighed = self._meter.acks.append, self._meter.sizes.append
        self._patience = settings.publish_timeout
        self._wire: _Wire | None = None  # set while publishes may be sent
        # By number, oldest first: since when, and how many bytes.
        self._pending: dict[bytes, tuple[Done, float, int]] = {}
        self._held: deque[_Publish] = deque()
        self._held_bytes = 0
        self._free: list[bytes] = []  # numbers that are not under way, in digits: see publish
        self._numbers = 0
        self._base = Base()
        self._ghost = 0  # the base of a stream that was deleted
        self._sequence = 0
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._warn = Occasionally(10)
        self._warn_differs = Occasionally(3600)
        self._away = "it has not been reached yet"

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._stay_connected())
        self._sweep()

    async def stop(self) -> None:
        self._stopping = True
        end = self._loop.time() + self._patience
        while (self._pending or self._held) and self._loop.time() < end:  # noqa: ASYNC110 - an event would cost each publish
            await asyncio.sleep(0.01)
        if self._task:
            await end_tasks(self._task)
        await asyncio.sleep(0)  # its transport closes in the next turn of the loop
        if self._sweeper:
            self._sweeper.cancel()
        self._fail_pending("uplinkd is stopping")
        while self._held:
            self._give_up(self._held.popleft(), "uplinkd is stopping")

    @property
    def connected(self) -> bool:
        return self._wire is not None

    def publish(
        self,
        subject: bytes,
        payload: bytes,
        done: Done,
        origin: Origin = Origin.HTTPS,
        key: str = "",
        began: float = 0.0,
    ) -> None:
        """See Publisher. `began` is since when it waits (monotonic seconds), where it was taken before."""
        wire = self._wire
        if not began:
            if self._stopping:
                self._fail(done, "uplinkd is stopping")
                return
            # Not the loop's clock: uvloop's counts whole milliseconds, and from the beginning of the turn.
            began = monotonic()
        if wire is None or wire.full:
            self._hold((subject, payload, done, origin, key, began))
            return
        header = b"" if origin is _PLAIN and not key else _header(origin, key)
        size = len(payload)
        if size + len(header) > wire.max_payload:
            # The server would end the connection, and with it what others have under way.
            self._fail(done, f"it has {size} bytes and the NATS server takes {wire.max_payload} (its max_payload)")
            return
        # A number is used again only after JetStream has answered under it in time, and the freshest first: the server keeps the few
        # reply subjects in its cache, where rising numbers would push each other out.
        if self._free:
            number = self._free.pop()
        else:
            self._numbers += 1
            number = b"%d" % self._numbers
        self._pending[number] = (done, began, size)
        wire.publish(subject, number, payload, header)

    def _hold(self, item: _Publish) -> None:
        size = len(item[1])
        if self._held_bytes + size > _HELD_BYTES or len(self._held) >= _HELD_COUNT:
            self._fail(item[2], f"the engine is away and too much waits for it already: {self._away}")
            return
        self._held_bytes += size
        self._held.append(item)

    def release(self) -> None:
        """Send what was held while the engine was away or did not read, before anything that comes after."""
        while self._held and self._wire and not self._wire.full:
            item = self._held.popleft()
            self._held_bytes -= len(item[1])
            self.publish(*item)

    def _give_up(self, item: _Publish, reason: str) -> None:
        self._held_bytes -= len(item[1])
        self._fail(item[2], reason)

    def _sweep(self) -> None:
        """Refuse what has waited too long. Both queues are in order of time, apart from what was held before it was sent."""
        now = monotonic()
        too_old = now - self._patience
        self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
        while self._held and self._held[0][-1] <= too_old:
            self._give_up(self._held.popleft(), f"the engine is away: {self._away}")
        late = []
        for number, (_, began, _) in self._pending.items():
            if began > too_old:
                break
            late.append(number)
        for number in late:
            done, _, _ = self._pending.pop(number)
            self._fail(done, f"the engine did not acknowledge within {self._patience:g} s")
        self.release()
        if self._wire:
            self._wire.write_off(len(late))
        self._tell(now)

    def _tell(self, now: float) -> None:
        """Say what waits for the engine, and how long already."""
        oldest = [next(iter(self._pending.values()))[1]] if self._pending else []
        if self._held:
            oldest.append(self._held[0][-1])
        self._told(len(self._pending) + len(self._held), now - min(oldest) if oldest else 0.0)

    def _fail(self, done: Done, reason: str) -> None:
        self._meter.not_stored()
        _finish(done, 0, reason)

    def _fail_pending(self, reason: str) -> None:
        pending = list(self._pending.values())
        self._pending.clear()
        for done, _, _ in pending:
            self._fail(done, reason)

    # -- the wire's calls

    def acknowledged(self, acks: Iterable[tuple[bytes, bytes | int]], now: float) -> None:
        """(number, sequence) of each."""
        base, step = int(self._base), self._step
        pop, free, took, weighed = self._pending.pop, self._free.append, self._took, self._weighed
        for number, place in acks:
            entry = pop(number, None)
            if entry is None:
                continue
            done, began, size = entry
            free(number)
            sequence = int(place)
            if sequence <= self._sequence:
                # Sequences of one stream rise: this is another stream, though nobody told us.
                self._fail(done, f"the stream {self.part.name} was made again")
                self.unsettled("the stream was made again")
                continue
            self._sequence = sequence
            took(now - began)
            weighed(size)
            try:
                done(base + sequence * step, "")
            except Exception:
                log.exception(_OUR_FAULT)

    def stored_before(self, number: bytes, sequence: int) -> None:
        """Somebody has published it already, under the same key."""
        entry = self._pending.pop(number, None)
        if entry:
            self._free.append(number)
            _finish(entry[0], self._base + sequence * self._step, "")

    def refused(self, number: bytes, reason: str) -> None:
        entry = self._pending.pop(number, None)
        if entry:
            self._free.append(number)
            self._fail(entry[0], reason)

    def unsettled(self, reason: str) -> None:
        """The stream is gone, or may be: hold publishes until it was looked at anew.

        What is under way may be acknowledged by a successor, whose sequences begin at 1: added to the old base they would
        give ids for the second time. So it is refused, and devices send it again.
        """
        wire, self._wire = self._wire, None
        self._away = reason
        self._ghost = self._base
        self._fail_pending(reason)
        if wire:
            wire.stirred.set()

    def lost(self, wire: _Wire, reason: str) -> None:
        """The connection has ended; what was sent and not acknowledged may be stored or not, and says so."""
        self._access.failed(wire.url)
        if self._wire is wire:
            self._wire = None
            self._away = reason
            self._free.clear()
            self._numbers = 0
            self._fail_pending(f"the connection to the engine broke before it acknowledged: {reason}")

    # -- connecting

    async def _stay_connected(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            try:
                wire = await self._connect()
            except (OSError, ssl.SSLError, TimeoutError, Unavailable, ValueError) as error:
                self._away = str(error) or type(error).__name__
                if self._warn():
                    log.warning("the engine is away: %s", self._away)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                continue
            pause = _FIRST_PAUSE
            self._wire = wire
            self.release()
            try:
                await self._look_after(wire)
            finally:
                wire.close()

    async def _connect(self) -> _Wire:
        access = self._access.now()
        faults = []
        for url in access.order:
            try:
                return await self._open(url, access)
            except (OSError, ssl.SSLError, TimeoutError, Unavailable, ValueError) as error:
                access.failed(url)
                faults.append(f"{url}: {str(error) or 'it does not answer'}")
        raise Unavailable("; ".join(faults))

    async def _open(self, url: str, access: Access) -> _Wire:
        parts = urlsplit(url)
        host, port = parts.hostname or "127.0.0.1", parts.port or 4222
        wire = _Wire(self, url)
        async with asyncio.timeout(_CONNECT_SECONDS):
            transport, _ = await self._loop.create_connection(lambda: wire, host, port)
            try:
                info = await wire.info
                check_version(info)
                if parts.scheme == "tls" or info.get("tls_required"):
                    await wire.secure(host, access)
                await wire.greet(access, info)
                self._adopt(await self._ensure_stream(wire))
            except BaseException:
                transport.abort()
                raise
        return wire

    async def _ensure_stream(self, wire: _Wire) -> Base:
        """Make the stream when it is not there, follow the settings when they changed; return its base."""
        info = await _stream_info(wire, self.part.name)
        if (error := info.get("error")) and error.get("code") == 404:
            if self._base:
                await asyncio.sleep(_CLEAN_UP_SECONDS)
            config = wanted(self._settings, self._new_base(), self.part)
            info = await wire.request(f"$JS.API.STREAM.CREATE.{self.part.name}", config)
            if info.get("error", {}).get("code") == 400:  # another worker was quicker
                info = await _stream_info(wire, self.part.name)
        if error := info.get("error"):
            raise Unavailable(
                f"JetStream does not give us the stream {self.part.name}: {told_why(error, self._settings)}"
            )
        found = info["config"]
        base = base_of(found)
        check_partitions(found, self.part.count)
        if self._settings.nats_url:  # the owner's servers: what is otherwise there is said, and left
            if (faults := differences(found, wanted(self._settings, base, self.part))) and self._warn_differs():
                log.warning("%s", "; ".join(map(str, faults)))
        elif anew := changed(found, self._settings):
            update = await wire.request(f"$JS.API.STREAM.UPDATE.{self.part.name}", anew)
            if error := update.get("error"):
                log.warning(
                    "the stream keeps its old age, size and way of storing: %s", error.get("description", error)
                )
            else:
                found = update["config"]
        if self._settings.sync_interval == "always" and found.get("allow_atomic"):
            wire.store_together()
        return base

    def _new_base(self) -> int:
        """Beyond every id that was given here, even when the clock was set back."""
        return self.part.aligned(max(new_base(round(self._clock() * 1000)), self._base + self._sequence * self._step))

    async def _settle(self, wire: _Wire) -> None:
        """Learn the base anew; a deleted stream that is still shown is not believed at first."""
        end = self._loop.time() + _GHOST_SECONDS
        base = await self._ensure_stream(wire)
        while base == self._ghost and self._loop.time() < end:
            await asyncio.sleep(_GHOST_PAUSE)
            base = await self._ensure_stream(wire)
        self._adopt(base)

    def _adopt(self, base: Base) -> None:
        if base != self._base:
            self._base, self._sequence = base, 0

    async def _look_after(self, wire: _Wire) -> None:
        """Until the connection ends: see that the server answers, and that the stream is still the same."""
        while not wire.ended:
            # Not wait_for: before Python 3.12 it loses a cancellation that comes in the same turn as what it waits for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PING_SECONDS):
                    await wire.stirred.wait()
            if wire.ended:
                return
            if wire.stirred.is_set():
                wire.stirred.clear()
                self._wire = None
                try:
                    async with asyncio.timeout(_REQUEST_SECONDS):
                        await self._settle(wire)
                except (TimeoutError, Unavailable, OSError) as error:
                    wire.fail(str(error) or "the stream could not be looked at")
                    return
                if wire.stirred.is_set():
                    await asyncio.sleep(_GHOST_PAUSE)
                    continue
                self._wire = wire
                self.release()
            silence = self._loop.time() - wire.heard
            if silence > _SILENCE_SECONDS:
                wire.fail(f"the server has been silent for {silence:.0f} s")
                return
            wire.ping()


class PartedPublisher:
    """One worker's publisher to several streams. Each has a connection of its own: what becomes of one stream does not touch what
    goes to the others."""

    def __init__(self, settings: Settings, access: Access, meter: Meter | None = None) -> None:
        self._meter = meter or spare()
        self._count = settings.partitions
        self._waits = [(0, 0.0)] * self._count
        self._parts = [
            JetStreamPublisher(
                settings, access, self._meter, part=part, tell=functools.partial(self._told, part.number)
            )
            for part in parts(self._count)
        ]
        self._place = functools.lru_cache(maxsize=1 << 16)(self._placed)

    async def start(self) -> None:
        for part in self._parts:
            await part.start()

    async def stop(self) -> None:
        await asyncio.gather(*(part.stop() for part in self._parts))

    @property
    def connected(self) -> bool:
        return all(part.connected for part in self._parts)

    def publish(self, subject: bytes, payload: bytes, done: Done, origin: Origin = Origin.HTTPS, key: str = "") -> None:
        publisher, ingest = self._place(subject)
        publisher.publish(ingest, payload, done, origin, key)

    def _placed(self, subject: bytes) -> tuple[JetStreamPublisher, bytes]:
        part = part_for(subject.decode(), self._count)
        return self._parts[part.number], part.ingest.encode() + subject

    def _told(self, number: int, waiting: int, oldest: float) -> None:
        self._waits[number] = (waiting, oldest)
        self._meter.engine(sum(each for each, _ in self._waits), max(each for _, each in self._waits))


class _Wire(asyncio.Protocol):
    """One connection to a NATS server."""

    def __init__(self, owner: JetStreamPublisher, url: str) -> None:
        self._owner = owner
        self.url = url
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._published = 0
        self._answered = 0
        self._batch_end = 0  # how many were published when the last batch left
        self._full = _FULL_BATCH
        self._together: list[_Leaving] | None = None  # in place of _out, see store_together
        self._batches: dict[bytes, list[bytes]] = {}  # number of the last message → those of all
        self._batch_number = 0
        self._waited = False
        self._scheduled = False
        self._gathered = 0
        self._inbox = f"_INBOX.{secrets.token_hex(8)}"
        self._reader = Reader(acks_from(owner.part.name, self._inbox))
        self._batch_name = secrets.token_hex(8).encode()
        self._reply = f" {self._inbox}.".encode()
        self._pongs: deque[asyncio.Future[None]] = deque()
        self._requests: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._request_number = 0
        self._reason = "the server closed the connection"
        self.max_payload = 1024**2
        self.info: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self.stirred = asyncio.Event()
        self.heard = self._loop.time()
        self.ended = False
        self.full = False  # the server does not take what is sent

    # -- the transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_HELD_BYTES, _HELD_BYTES // 2)

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        self._owner.release()

    def data_received(self, data: bytes) -> None:
        now = monotonic()
        self.heard = self._loop.time()
        reader, acknowledged = self._reader, self._owner.acknowledged
        reader.feed(data)
        try:
            while True:
                if acks := reader.acks():
                    acknowledged(acks, now)
                    self._answered += len(acks)
                received = reader.next()
                if received is None:
                    break
                self._take(received)
        except ValueError as error:
            self.fail(str(error))
        if self._published > self._batch_end and not self._scheduled and self._answered >= self._batch_end:
            self._scheduled = True
            self._loop.call_soon(self._gather)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        reason = str(exc) if exc else self._reason
        gone = Unavailable(f"the connection to the engine ended: {reason}")
        waiting: list[asyncio.Future[Any]] = [self.info, *self._pongs, *self._requests.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(gone)
                future.exception()  # whoever waited has it; nobody else need hear of it
        self.stirred.set()
        self._owner.lost(self, reason)

    def _take(self, received: Received) -> None:
        match received.name:
            case "MSG" | "HMSG":
                self._take_message(received)
            case "PING":
                self._send(b"PONG\r\n")
            case "PONG":
                if self._pongs:
                    pong = self._pongs.popleft()
                    if not pong.done():
                        pong.set_result(None)
            case "INFO":
                info = json.loads(received.text)
                self.max_payload = info.get("max_payload", self.max_payload)
                if not self.info.done():
                    self.info.set_result(info)
            case "-ERR":
                self._reason = received.text.strip("'")

    def _take_message(self, received: Received) -> None:
        if received.sid == 1:
            sequence, reason = ack_of(received)
            answered = b"%d" % received.number
            if reason == DUPLICATE:
                self._answered += 1
                self._owner.stored_before(answered, sequence)
                return
            if reason is None:  # somebody who hears the devices' messages replies to them; JetStream's answer comes too
                return
            numbers = self._batches.pop(answered, None) or [answered]
            self._answered += len(numbers)
            if reason and received.header:
                self._owner.unsettled(reason)
            if reason:
                for number in numbers:
                    self._owner.refused(number, reason)
            else:
                first = sequence - len(numbers) + 1
                self._owner.acknowledged(zip(numbers, itertools.count(first), strict=False), monotonic())
        elif received.sid == 2:
            future = self._requests.pop(received.number, None)
            if future and not future.done():
                if received.header:
                    future.set_exception(Unavailable("JetStream is not there: is it switched on for this account?"))
                else:
                    future.set_result(json.loads(received.payload))
        else:
            self._owner.unsettled(f"the stream {self._owner.part.name} was deleted")
            self.stirred.set()

    # -- what the publisher asks for

    async def secure(self, host: str, access: Access) -> None:
        assert self._transport
        context = access.context()
        self._transport = await self._loop.start_tls(self._transport, self, context, server_hostname=host)

    async def greet(self, access: Access, info: dict[str, Any]) -> None:
        """Return once the server has let us in. All in one write: what a server that says no had not read yet would make the
        kernel throw its words away."""
        options: dict[str, Any] = {
            "verbose": False,
            "pedantic": False,
            "headers": True,
            "no_responders": True,
            "lang": "python",
            "version": __version__,
            "name": "uplinkd publisher",
            "protocol": 1,
        }
        if credentials := access.credentials():
            options |= {"jwt": credentials.jwt, "sig": credentials.sign(str(info.get("nonce", "")))}
        elif access.password:
            options |= {"user": access.user, "pass": access.password}
        elif access.user:
            options["auth_token"] = access.user
        subscriptions = f"SUB {self._inbox}.a.* 1\r\nSUB {self._inbox}.r.* 2\r\nSUB {self._owner.part.deleted} 3\r\n"
        self._reply = f" {self._inbox}.a.".encode()
        welcome: asyncio.Future[None] = self._loop.create_future()
        self._pongs.append(welcome)
        self._send(f"CONNECT {json.dumps(options)}\r\n{subscriptions}PING\r\n".encode())
        await welcome

    def ping(self) -> None:
        """Ask for a sign of life; `heard` tells whether one came."""
        if len(self._pongs) < 10:
            self._pongs.append(self._loop.create_future())
            self._send(b"PING\r\n")

    async def request(self, subject: str, document: dict[str, Any]) -> dict[str, Any]:
        self._request_number += 1
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._requests[self._request_number] = future
        payload = json.dumps(document).encode()
        self._send(
            f"PUB {subject} {self._inbox}.r.{self._request_number} {len(payload)}\r\n".encode() + payload + b"\r\n"
        )
        return await future

    def publish(self, subject: bytes, number: bytes, payload: bytes, header: bytes) -> None:
        if self._together is not None and b"Nats-Msg-Id" not in header:  # a duplicate would take its batch with it
            self._together.append((subject, number, payload, header))
        elif header:
            sizes = (len(header), len(header) + len(payload))
            self._out.append(b"HPUB %b%b%b %d %d\r\n%b%b\r\n" % (subject, self._reply, number, *sizes, header, payload))
        else:
            self._out.append(b"PUB %b%b%b %d\r\n%b\r\n" % (subject, self._reply, number, len(payload), payload))
        self._published += 1
        if not self._scheduled and (
            self._answered >= self._batch_end or self._published - self._batch_end >= self._full
        ):
            self._scheduled = True
            self._loop.call_soon(self._gather)

    def fail(self, reason: str) -> None:
        self._reason = reason
        if self._transport:
            self._transport.abort()

    def close(self) -> None:
        if self._transport:
            self.flush()
            if self._transport.get_write_buffer_size():  # the server does not read; a close would wait for it
                self._transport.abort()
            else:
                self._transport.close()

    def _gather(self) -> None:
        """Leave once a turn of the event loop has brought nothing new: a batch costs the server 45 µs, a message in it 5. Where the
        disk is waited for, those whose devices were just answered are given a moment to send again."""
        waiting = self._published - self._batch_end
        if self._published != self._gathered and waiting < self._full:
            self._gathered = self._published
            self._loop.call_soon(self._gather)
        elif self._together and not self._waited and _WORTH_A_BATCH // 2 <= waiting < self._full:
            self._waited = True
            self._loop.call_later(_MOMENT, self._gather)
        else:
            self.flush()

    def write_off(self, count: int) -> None:
        """So many publishes were not answered in time, and may never be: no batch waits for them any longer."""
        self._answered += count
        self.flush()

    def flush(self) -> None:
        """Let the batch that has gathered leave."""
        self._scheduled = self._waited = False
        out, self._out = self._out, []
        if self._together:
            for batch in _batches(self._together):
                self._take_along(batch, out)
            self._together.clear()
        self._batch_end = self._published
        if out and self._transport and not self.ended:
            self._transport.write(b"".join(out))

    def store_together(self) -> None:
        """From now on many messages are stored as one (ADR-50): all of them or none. Their ids follow from that of the last."""
        self._full = _LARGEST_BATCH
        self._together = self._together or []

    def _take_along(self, batch: list[_Leaving], out: list[bytes]) -> None:
        """Put the batch into `out`: as one, which is acknowledged at its end; or one by one, where there are few."""
        together = len(batch) >= _WORTH_A_BATCH
        if together:
            self._batch_number += 1
            self._batches[batch[-1][1]] = [number for _, number, _, _ in batch]
        for place, (subject, number, payload, header) in enumerate(batch, 1):
            reply = self._reply + number
            if together:
                header = b"%bNats-Batch-Id: %b.%d\r\nNats-Batch-Sequence: %d\r\n%b\r\n" % (
                    header[:-2] or b"NATS/1.0\r\n",
                    self._batch_name,
                    self._batch_number,
                    place,
                    b"" if place < len(batch) else b"Nats-Batch-Commit: 1\r\n",
                )
                reply = reply if place == len(batch) else b" "
            if header:
                sizes = len(header), len(header) + len(payload)
                out.append(b"HPUB %b%b %d %d\r\n%b%b\r\n" % (subject, reply, *sizes, header, payload))
            else:
                out.append(b"PUB %b%b %d\r\n%b\r\n" % (subject, reply, len(payload), payload))

    def _send(self, data: bytes) -> None:
        if self._transport and not self.ended:
            self._transport.write(data)


async def _stream_info(wire: _Wire, name: str) -> dict[str, Any]:
    """What JetStream says of the stream. While a cluster has no leader for it nobody answers, so it is asked again and again; the
    caller has a bound."""
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_AGAIN_SECONDS):
                return await wire.request(f"$JS.API.STREAM.INFO.{name}", {})


def _batches(together: list[_Leaving]) -> Iterator[list[_Leaving]]:
    """In order, each within what a batch may hold."""
    batch: list[_Leaving] = []
    size = 0
    for each in together:
        if len(batch) == _LARGEST_BATCH or size + len(each[2]) > _LARGEST_BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += len(each[2])
    if batch:
        yield batch


def _header(origin: Origin, key: str) -> bytes:
    """That of a message: where it comes from, and under which key it is stored once."""
    header = _HEADERS[origin]
    return (header[:-2] or b"NATS/1.0\r\n") + f"Nats-Msg-Id: {key}\r\n\r\n".encode() if key else header


def _finish(done: Done, message_id: int, reason: str) -> None:
    try:
        done(message_id, reason)
    except Exception:
        log.exception(_OUR_FAULT)
