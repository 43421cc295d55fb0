"""One connection: bytes → Request → gateway → bytes. Terse on purpose, so that nothing else need be.

What old device SDKs force on every reply (measured, docs/en/protocol.md): `Content-Length` in exactly this case, no chunked
answers, a status line with a reason of at most 17 characters, one write for the whole reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from time import monotonic
from typing import Any, cast

import httptools

from uplinkd.core import wire
from uplinkd.core.errors import MESSAGES, Code, Refused, Unavailable
from uplinkd.floods import NO_FLOOD, Flood, Floods
from uplinkd.flow import network_of
from uplinkd.gateway import Gateway, Outcome, Request, Wait
from uplinkd.http.limits import Limits
from uplinkd.metrics import Meter, spare
from uplinkd.places import Known, Places
from uplinkd.tasks import Turns, spawn
from uplinkd.tls import LegacyDevices

__all__ = ["Connection", "Door"]

log = logging.getLogger("uplinkd.http")

_REASONS = {
    400: b"Bad Request",
    404: b"Not Found",
    405: b"Not Allowed",
    408: b"Request Timeout",
    411: b"Length Required",
    413: b"Content Too Large",
    417: b"Expect Failed",
    431: b"Head Too Large",
    505: b"Bad Version",
}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# Input is parsed in slices, so that one read full of tiny requests cannot become thousands of waiting ones: small ones where a
# request may begin, larger ones within a body.
_SLICE, _BODY_SLICE = 4 * 1024, 16 * 1024
# So many requests of one connection are answered before it is the others' turn.
_SHARE = 8


# The headers that mean something here.
_OTHER, _CONTENT_TYPE, _PASSWORD, _HOST, _EXPECT, _LENGTH, _ENCODING, _FORWARDED = range(8)
_EXPECTS, _MEASURED, _CHUNKED = 1 << _EXPECT, 1 << _LENGTH, 1 << _ENCODING
_HEADERS = {
    b"content-type": _CONTENT_TYPE,
    b"password": _PASSWORD,
    b"host": _HOST,
    b"expect": _EXPECT,
    b"content-length": _LENGTH,
    b"transfer-encoding": _ENCODING,
    b"x-forwarded-for": _FORWARDED,
}
# The spellings that nearly every request has need no lower().
_SPELLINGS = {name: kind for known, kind in _HEADERS.items() for name in (known, known.title())}
_METHOD = re.compile(rb"([A-Za-z-]{1,20}) [/*]")
_TOPIC_PREFIX = len(b"/topic")
_WEBSOCKET_PATH = b"/mqtt"
_G = ord("G")
_DRAIN_PATIENCE = 0.3
_NEVER = float("inf")
# So long an answer waits for the message that is to ride home with it.
_TAKE_SECONDS = 0.7
_LEAVING_SECONDS = 0.02
# A token that flow control has barred is not looked at for as long as nothing can pass, and not for longer than a worker may take
# to hear of a change: it may stand no more. A little less, since that was worked out a moment before.
_BARRED_SECONDS, _CLOCKS_SECONDS = 0.25, 0.001
_REFUSED_LOGINS = 1000
_KNOWN = 3


# What the parser waits for. Plain numbers: before Python 3.12 each look-up of an enum's member costs as much as a call.
_IDLE, _HEAD, _BODY = range(3)


@dataclass(slots=True)
class Door:
    """What the connections of one worker share. `refused` records an Outcome; it must neither block nor raise."""

    gateway: Gateway
    limits: Limits
    refused: Callable[[Outcome], None]
    clock: Callable[[], float]
    access_log: bool = False
    meter: Meter = field(default_factory=spare)
    now: float = 0.0
    draining: bool = False
    # Speaks MQTT over WebSocket, at /mqtt, with a device at this address, and of this network (see Request).
    websocket: Callable[[str, str], asyncio.Protocol] | None = None
    forwarded_for: bool = False  # the proxy at the plain-text port says for whom it asks
    legacy: LegacyDevices | None = None  # None where no legacy suite is offered
    connections: set[Connection] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    resting: float = 0.0  # until when a connection may rest that was answered now
    brief: bool = True  # no answer needs more thought than its body
    ok: bytes = b""
    heads: dict[int, bytes] = field(
        default_factory=dict
    )  # of answers, by the size of the body, as they were since the last tick
    known: Known = field(default_factory=Known)
    turns: Turns = field(default_factory=Turns)
    places: Places = field(init=False)
    floods: Floods = field(init=False)
    # (network, body) of logins that were refused as guesses since the last tick: firmware that is wrong says the same again.
    refused_logins: dict[tuple[str, bytes], tuple[str, Flood]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.brief = not (self.access_log or self.draining)
        self.floods = Floods(self.refused, self.clock)
        self.places = Places(self.known, "connections over HTTPS")
        self.tick()

    def tick(self) -> None:
        """Once in a fraction of a second: renew the coarse clock and the Date header, end what has overstayed."""
        self.now = self.clock()
        self.resting = self.now + self.limits.idle_timeout
        self.ok = (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nDate: "
            + formatdate(usegmt=True).encode()
            + b"\r\nContent-Length: "
        )
        self.heads.clear()
        for connection in [each for each in self.connections if each.deadline <= self.now]:
            connection.expire()
        self.floods.tick()
        self.refused_logins.clear()

    def head(self, size: int) -> bytes:
        """The head of an answer with a body of `size` bytes, where the connection stands."""
        head = self.heads[size] = b"%b%d\r\n\r\n" % (self.ok, size)
        return head

    def drain(self) -> None:
        """Answer what is under way, close what is idle; a request that is just arriving still gets its answer."""
        self.draining, self.brief = True, False
        for connection in self.connections:
            connection.drain()


# No tuples: to unpack one that has names takes as long as all else that is done with it.
@dataclass(slots=True)
class _Head:
    """What a request's head says, and where it leads: `endpoint` is auth, topic, or empty where nothing is. `request` is the last that
    came with it: what was learned of a report's head holds for the next."""

    method: bytes
    path: bytes
    query: bool
    endpoint: str
    topic: bytes
    content_type: str | None
    password: str | None
    keep_alive: bool
    old: bool
    client: tuple[str, str]
    request: Request | None = None


@dataclass(slots=True)
class _Known:
    """A head that came before, byte for byte: where the body of a request that begins with it does, and the size of both."""

    raw: bytes
    begin: int
    size: int
    head: _Head


class Connection(asyncio.Protocol):
    """One device's connection, or a proxy's (`proxied`) for many of them. `client` is the device's address and network (see Request)
    where the transport does not know. Requests are answered in order, one at a time; further ones wait, bounded."""

    __slots__ = (
        "_address",
        "_answer_old",
        "_answering",
        "_bare",
        "_barred",
        "_barred_token",
        "_barred_until",
        "_becomes_websocket",
        "_began",
        "_blocked",
        "_body",
        "_broken",
        "_client",
        "_content_type",
        "_counting",
        "_door",
        "_endpoint",
        "_fault",
        "_forwarded",
        "_head_bytes",
        "_headers",
        "_held",
        "_keep_alive",
        "_known",
        "_length",
        "_limits",
        "_looks_for_legacy",
        "_messages",
        "_old",
        "_over",
        "_parser",
        "_password",
        "_path",
        "_paused",
        "_proved",
        "_proxied",
        "_pumping",
        "_queue",
        "_raw",
        "_request",
        "_seen",
        "_stage",
        "_transport",
        "_unread",
        "_url",
        "_yields",
        "deadline",
    )

    def __init__(self, door: Door, client: tuple[str, str] | None = None, *, proxied: bool = False) -> None:
        self._door = door
        self._limits = door.limits
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._proxied = proxied
        # The address that a request comes from, and whom limits by address hold for.
        self._address, _ = self._client = client or ("", "")
        self.deadline = _NEVER

        self._held = b""  # not parsed yet
        self._queue: list[tuple[_Head, bytes]] = []  # requests not answered yet
        self._known: tuple[_Known, ...] = ()  # heads that need no parser, the newest first
        self._fault: tuple[int, str] | None = None  # why parsing ended, answered after the queue
        self._answering = False
        self._over = False  # nothing more will be answered
        self._broken = False  # the connection did not end in peace
        self._proved = False  # it has had a good answer
        self._pumping = False
        self._yields = False  # its share of this turn is used up, and more waits
        self._blocked = False  # the peer does not take its answers
        self._paused = False

        # With this token nothing passes before this time, and here is what it is refused for.
        self._barred_token = ""
        self._barred_until = 0.0
        self._barred: tuple[str, Flood] = "", NO_FLOOD

        self._request: Request | None = None
        self._endpoint = ""
        self._began = 0.0  # when the request under way was complete, and those before it answered
        self._path = b""
        self._keep_alive = True
        self._answer_old = False
        self._bare = False
        self._looks_for_legacy = True  # until its suite was found not to be one; a connection keeps its suite

        self._raw = b""  # the head under way, where it may be a WebSocket's: that one's own parser reads it anew
        self._becomes_websocket = False
        self._stage = _IDLE
        self._messages = 0
        self._counting = False
        self._url = b""
        self._head_bytes = 0  # of the head's lines that are complete
        self._unread = 0  # of the pieces that have brought no end of the head
        self._headers = 0
        self._seen = 0  # a bit for each header that means something
        self._old = False
        self._content_type: str | None = None
        self._password: str | None = None
        self._forwarded = b""
        self._length = 0
        self._body: bytes | bytearray = b""

    # -- the transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        door = self._door
        if not self._address and (peer := transport.get_extra_info("peername")):
            self._address = peer[0]
            self._client = self._address, "" if self._proxied else network_of(self._address)
        if door.draining or not door.places.enter(self, self._client[1], self._limits.connections):
            self._over = True
            self._transport.abort()
            return
        door.connections.add(self)
        door.meter.accepted("https")
        self.deadline = door.resting

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.connections.discard(self)
        self._door.places.leave(self)
        self._over = True
        self._broken = self._broken or exc is not None
        self._transport = self._parser = None
        self._queue.clear()
        self._held = b""

    def eof_received(self) -> bool:
        """Over plain TCP a peer may close its side first and still read its answer; TLS has no half-open state."""
        if self._transport is None or not self._answering or self._transport.get_extra_info("sslcontext"):
            return False
        self._keep_alive = False
        return True

    def pause_writing(self) -> None:
        self._blocked = True
        self.deadline = self._door.now + self._limits.write_timeout

    def resume_writing(self) -> None:
        self._blocked = False
        self._rest()
        self._pump()

    def data_received(self, data: bytes) -> None:
        if not (self._answering or self._blocked or self._yields or self._over):
            if self._stage == _IDLE:
                size = len(data)
                for known in self._known:
                    if size == known.size and data.startswith(known.raw):
                        self._handle(known.head, data[known.begin :])
                        return
            self._feed(data)
            self._pump()
            return
        if self._over:
            return
        self._held += data
        if not self._paused and len(self._held) > self._limits.held_bytes:
            self._paused = True
            assert self._transport
            self._transport.pause_reading()

    # -- reading

    def _pump(self) -> None:
        """Answer what is parsed, then parse what is held, until an answer has to be waited for or it is the others' turn."""
        if self._pumping or self._yields:
            return
        self._pumping = True
        share = _SHARE
        try:
            while not (self._answering or self._blocked or self._over):
                if self._queue:
                    if not share:
                        self._yields = True
                        self._door.turns.wait(self._take_turn)
                        return
                    if share < _SHARE and self._has_gone():
                        break
                    share -= 1
                    self._handle(*self._queue.pop(0))
                elif self._fault:
                    self._keep_alive = self._bare = False
                    self._path = self._url
                    self._refuse(*self._fault, ends=True)
                elif self._held:
                    held, self._held = self._held, b""
                    self._feed(held)
                else:
                    break
        finally:
            self._pumping = False
        if self._paused and not self._held and self._transport:
            self._paused = False
            self._transport.resume_reading()

    def _take_turn(self) -> None:
        self._yields = False
        self._pump()

    def _has_gone(self) -> bool:
        """Whether the peer can hear no answer any more: then none is looked for, and what it sent behind is nobody's."""
        if self._transport is None or not self._transport.is_closing():
            return False
        self._over = True
        self._queue.clear()
        self._held = b""
        return True

    def _feed(self, data: bytes) -> None:
        stage, messages, known, lines = self._stage, self._messages, len(self._body), self._headers
        size = _BODY_SLICE if stage == _BODY else _SLICE
        if len(data) > size:
            self._held = data[size:]
            data = data[:size]
        if stage == _IDLE:
            self.deadline = self._door.now + self._limits.head_timeout
            if data[0] == _G:
                self._raw = data
        elif self._raw:
            self._raw += data
        # A head that comes whole in less than the limit need not be counted.
        self._counting = stage == _HEAD or len(data) > self._limits.head_bytes or b"\r\n\r\n" not in data
        if self._parser is None:
            self._parser = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._becomes_websocket:
                self._hand_over()
                return
            # What follows a CONNECT is not HTTP/1.1 for certain: answer, then close.
            head, body = self._queue[-1]
            self._queue[-1] = replace(head, keep_alive=False), body
        except httptools.HttpParserError as error:
            # What follows a request that ends its connection is nobody's.
            if self._fault is None and not (self._queue and not self._queue[-1][0].keep_alive):
                begins = stage == _IDLE and self._stage == _HEAD and self._messages == messages + 1
                self._fault = self._malformed(data if begins else b"", error)
        if self._raw and (self._stage != _HEAD or self._messages > messages + (stage == _IDLE)):
            self._raw = b""
        if self._fault is not None:
            return
        if stage == _IDLE:
            if self._stage == _IDLE and messages + 1 == self._messages:
                self._learn(data)
        elif stage == self._stage and messages == self._messages:
            if stage == _HEAD or (known == len(self._body) and lines == self._headers):
                self._unfinished(len(data))
            else:
                self._unread = 0

    def _learn(self, data: bytes) -> None:
        """Remember the head of the one request in `data`: a device sends the same again and again, and what the parser has made of
        these bytes once it makes of them always. The parser, which takes a kilobyte, goes until it is needed again."""
        head, body = self._queue[-1]
        raw = data[: len(data) - len(body)]
        plain = self._seen & (_EXPECTS | _CHUNKED) == 0 and head.keep_alive and not head.old
        if plain and head.endpoint and head.method == b"POST" and raw.endswith(b"\r\n\r\n"):
            self._known = (_Known(raw, len(raw), len(data), head), *self._known[: _KNOWN - 1])
            self._parser = None

    def _unfinished(self, size: int) -> None:
        """Count what arrived of a line that is not complete, a header or what surrounds a chunk: the parser keeps it and tells us
        nothing yet."""
        self._unread += size
        if self._unread > self._limits.head_bytes:
            part = "head" if self._stage == _HEAD else "line of a chunk, or a trailer,"
            self._fault = (431, f"the {part} is larger than {self._limits.head_bytes} bytes")

    def _malformed(self, begin: bytes, error: Exception) -> tuple[int, str]:
        """What to answer; `begin` is that of the request at fault where it is at hand, else empty."""
        method = _METHOD.match(begin)
        if isinstance(error, httptools.HttpParserInvalidMethodError) and method and method[1] != b"POST":
            return 405, f"the method is {method[1].decode()}; only POST is known"
        return 400, f"malformed HTTP: {error}"

    # -- the parser's calls

    def on_message_begin(self) -> None:
        self._url = b""
        self._head_bytes = self._unread = self._headers = self._seen = self._length = 0
        self._old = False
        self._content_type = self._password = None
        self._forwarded = b""
        self._body = b""
        self._stage = _HEAD
        self._messages += 1

    def on_url(self, url: bytes) -> None:
        self._url += url
        if self._counting:
            self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        if self._counting:
            self._count(len(name) + len(value) + 4)
        kind = _SPELLINGS.get(name)
        if kind is None:
            kind = _HEADERS.get(name.lower(), _OTHER)
        if kind == _OTHER or self._stage == _BODY:  # a trailer means nothing to us
            if self._headers > self._limits.headers:
                self._stop(431, f"there are more than {self._limits.headers} headers")
            return
        bit = 1 << kind
        if kind == _FORWARDED:  # of several the last one is the last proxy's, as of the entries in one
            self._forwarded = value
            return
        if self._seen & bit:
            # A proxy before us may have acted on the other one.
            self._stop(400, f"the header {name.decode()} is there twice")
        self._seen |= bit
        if kind == _PASSWORD:
            self._password = value.strip().decode("latin-1")
        elif kind == _CONTENT_TYPE:
            self._content_type = value.decode("latin-1")
        elif kind == _LENGTH:
            self._length = int(value)
        elif kind == _EXPECT and value.strip().lower() != b"100-continue":
            self._stop(417, f"Expect is {value[:40]!r}; only 100-continue is known")
        elif kind == _ENCODING and value.strip().lower() != b"chunked":
            self._stop(400, f"Transfer-Encoding is {value[:40]!r}; only chunked is known")

    def on_headers_complete(self) -> None:
        limits, parser = self._limits, self._parser
        version = parser.get_http_version()
        if self._headers > limits.headers:
            self._stop(431, f"there are more than {limits.headers} headers")
        if version != "1.1":
            self._old = True
            if version != "1.0":
                self._stop(505, f"the version is HTTP/{version}; HTTP/1.1 and 1.0 are known")
            if self._seen & _CHUNKED:
                self._stop(400, "HTTP/1.0 has no Transfer-Encoding")
            if not self._seen & _MEASURED and parser.get_method() == b"POST":
                self._stop(411, "an HTTP/1.0 request needs Content-Length")
        if self._length > limits.body_bytes:
            self._stop(413, f"the body has {self._length} bytes; at most {limits.body_bytes} are allowed")
        self._stage = _BODY
        self._head_bytes = self._unread = 0
        self.deadline = self._door.now + limits.body_timeout
        if self._seen & _EXPECTS and not self._old and (self._length or self._seen & _CHUNKED) and not self._queue:
            assert self._transport
            self._transport.write(_CONTINUE)

    def on_body(self, body: bytes) -> None:
        if not self._body:
            self._body = body
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += body
        if len(self._body) > self._limits.body_bytes:
            self._stop(413, f"the body is larger than {self._limits.body_bytes} bytes")

    def on_message_complete(self) -> None:
        parser = self._parser
        method = parser.get_method()
        self._stage = _IDLE
        if parser.should_upgrade() and method != b"CONNECT":
            if method == b"GET" and self._url.partition(b"?")[0] == _WEBSOCKET_PATH and self._may_hand_over():
                self._becomes_websocket = True
                return
            # The parser takes the body for the other protocol's, so it cannot be ignored as RFC 9110, 7.8 would have it.
            self._stop(400, "the request asks for another protocol (Upgrade); only HTTP/1.1 is spoken")
        url = self._url
        if url[:1] != b"/" and url.count(b"/") >= 3:  # absolute-form, which every server must take (RFC 9112, 3.2.2)
            url = b"/" + url.split(b"/", 3)[3]
        path, mark, _ = url.partition(b"?")
        topic = b""
        if path.startswith(b"/topic/") or path == b"/topic":
            endpoint, topic = "topic", path[_TOPIC_PREFIX:]
        else:
            endpoint = "auth" if path == b"/auth" else ""
        head = _Head(
            method,
            path,
            bool(mark),
            endpoint,
            topic,
            self._content_type,
            self._password,
            parser.should_keep_alive(),
            self._old,
            self._forwarded_client() if self._forwarded else self._client,
        )
        self._queue.append((head, self._body if isinstance(self._body, bytes) else bytes(self._body)))
        self._url = self._body = b""

    def _forwarded_client(self) -> tuple[str, str]:
        """The client by a proxy's word, which counts for its own connections alone. Where it says nothing, its address is nobody's
        and not limited: that would hit all at once."""
        if self._proxied and self._door.forwarded_for:
            address = self._forwarded.rpartition(b",")[2].strip().decode("latin-1")
            if network := network_of(address):
                return address, network
        return self._client

    def _may_hand_over(self) -> bool:
        """Whether this connection can become a WebSocket: the raw bytes are at hand, and no request before it is under way."""
        return bool(self._door.websocket and self._raw and not self._queue)

    def _hand_over(self) -> None:
        """From here on the connection is another protocol's, beginning with the request that asked for it."""
        assert self._door.websocket
        assert self._transport
        transport, raw = self._transport, self._raw + self._held
        self._door.connections.discard(self)
        self._door.places.leave(self)
        self._over = True
        self._held = b""
        self._transport = self._parser = None
        if self._paused:
            transport.resume_reading()
        successor = self._door.websocket(*(self._forwarded_client() if self._forwarded else self._client))
        transport.set_protocol(successor)
        successor.connection_made(transport)
        successor.data_received(raw)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.head_bytes:
            self._stop(431, f"the head is larger than {self._limits.head_bytes} bytes")

    def _stop(self, status: int, reason: str) -> None:
        self._fault = (status, reason)
        raise ValueError(reason)

    # -- answering

    def _handle(self, head: _Head, body: bytes) -> None:
        self._keep_alive = head.keep_alive
        self._answer_old = head.old
        endpoint = head.endpoint
        if not endpoint or head.method != b"POST":
            self._path = head.path
            self._bare = head.method == b"HEAD"
            if endpoint:
                self._refuse(405, f"the method is {head.method.decode()}; only POST is known")
            else:
                self._refuse(404, "there is nothing at this path; /auth and /topic/${topic} are known")
            return
        self._endpoint = endpoint
        self._began = began = monotonic()
        request = head.request
        if endpoint != "topic":
            if (known := self._door.refused_logins.get((head.client[1], body))) and self._brief():
                self._refuse_again(*known)
                return
        elif began < self._barred_until and head.password == self._barred_token and self._brief():
            self._refuse_again(*self._barred)
            return
        if request is None:
            address, network = head.client
            request = Request(address, head.content_type, body, head.password, head.topic, head.query, network)
            if endpoint == "topic":
                head.request = request
        else:
            request.body = body
            request.fresh = False
        self._answering = True
        self.deadline = _NEVER
        self._request = request
        self._act(request)

    def _act(self, request: Request) -> None:
        """Ask the gateway; on Wait fetch the missing fact in a task and ask again."""
        try:
            if self._endpoint == "topic":
                self._door.gateway.publish(request, self._stored)
            else:
                token = self._door.gateway.authenticate(request)
                if self._looks_for_legacy and self._door.legacy and self._transport:
                    self._looks_for_legacy = self._door.legacy.signed_in(
                        self._transport, request.product_key, request.device_name, self._address, "https"
                    )
                self._answer(wire.token_issued(token))
        except Refused as refused:
            self._answer_refused(refused)
        except Wait as wait:
            spawn(self._fetch(request, wait.fetch), self._door.tasks)
        except Exception:
            self._answer_bug()

    async def _fetch(self, request: Request, fetch: Callable[[], Awaitable[None]]) -> None:
        try:
            await fetch()
        except Refused as refused:
            self._answer_refused(refused)
        except Exception:
            self._answer_bug()
        else:
            self._act(request)

    def _stored(self, message_id: int, fault: str) -> None:
        """The engine's word on the publish under way."""
        request = self._request
        if fault:
            self._answer_refused(Refused(Code.PUBLISH_MESSAGE_ERROR, fault))
        elif request and self._door.gateway.waits(request):
            spawn(self._answer_with_message(request, message_id), self._door.tasks)
        else:
            self._answer(wire.published(message_id))

    async def _answer_with_message(self, request: Request, message_id: int) -> None:
        """Let what waits for the device ride home; it is done with once the answer has left."""
        assert request.entry
        gateway, device_id = self._door.gateway, request.entry.device.id
        message = None
        try:
            async with asyncio.timeout(_TAKE_SECONDS):
                message = await gateway.take(device_id)
        except (Unavailable, TimeoutError) as fault:
            log.debug("what waits for the device stays where it is: %s", fault)
        except Exception:
            log.exception("a fault of ours while looking at what waits for a device")
        if message is None:
            self._answer(wire.published(message_id))
            return
        transport = self._transport
        if transport is not None and transport.is_closing():
            transport = None
        self._answer(wire.published_with(message_id, message.topic, message.payload))
        if await self._has_left(transport):
            with contextlib.suppress(Unavailable):
                await gateway.arrived(device_id, message)
        else:
            gateway.spared(device_id)

    async def _has_left(self, transport: asyncio.Transport | None) -> bool:
        """Whether what was just written has gone to the network, and not down with the connection; `transport` is None where that was
        closing already."""
        if transport is None:
            return False
        end = self._door.clock() + self._limits.write_timeout
        await asyncio.sleep(0)  # what is written leaves at the end of a turn
        while not self._broken and self._door.clock() < end:
            if self._transport is None or not transport.get_write_buffer_size():
                return True
            await asyncio.sleep(_LEAVING_SECONDS)
        return False

    def _answer_refused(self, refused: Refused) -> None:
        request = self._request
        assert request
        if refused.limit:
            flood = self._door.floods.met(refused, request, self._endpoint)
            wait = min(refused.wait, _BARRED_SECONDS) - _CLOCKS_SECONDS
            if self._endpoint == "auth":
                if wait > 0 and len(self._door.refused_logins) < _REFUSED_LOGINS:
                    self._door.refused_logins[request.network, request.body] = refused.limit, flood
            elif wait > 0 and request.password and not self._proxied:
                self._barred, self._barred_token = (refused.limit, flood), request.password
                self._barred_until = monotonic() + wait
            self._door.meter.limited(refused.limit)
            self._answer(flood.body, refused.code)
            return
        outcome = Outcome(
            secrets.token_hex(8),
            self._endpoint,
            200,
            refused.code,
            refused.reason,
            request.address,
            refused.product_key or request.product_key,
            refused.device_name or request.device_name,
            refused.topic or request.topic or request.path[:300].decode(errors="backslashreplace"),
        )
        self._door.refused(outcome)
        self._answer(wire.refusal(refused.code, outcome.request_id), refused.code)

    def _brief(self) -> bool:
        """Whether the answer needs no thought."""
        return self._door.brief and self._keep_alive and not self._answer_old

    def _refuse_again(self, limit: str, flood: Flood) -> None:
        """The device sends on what cannot pass yet: nothing is asked for that, and the answer is known."""
        assert self._transport
        flood.more += 1
        door = self._door
        door.meter.limited(limit)
        self._transport.write((door.heads.get(len(flood.body)) or door.head(len(flood.body))) + flood.body)
        door.meter.held_back[self._endpoint].append(monotonic() - self._began)
        self._answered()

    def _answer_bug(self) -> None:
        log.exception("a fault of ours while answering POST /%s", self._endpoint)
        self._answer_refused(Refused(Code.COMMON_ERROR, "a fault of uplinkd; its log has the traceback"))

    def _answer(self, body: bytes, code: Code = Code.SUCCESS) -> None:
        request, self._request = self._request, None
        if request is not None:
            request.body = b""
        door = self._door
        if not code:
            door.meter.answered[self._endpoint].append(monotonic() - self._began)
            if not self._proved:
                self._proved = True
                door.places.prove(self)
        elif code is Code.REQUEST_TOO_MANY:
            door.meter.held_back[self._endpoint].append(monotonic() - self._began)
        else:
            door.meter.count(self._endpoint, code, monotonic() - self._began)
        transport = self._transport
        if transport is None:  # the device has gone; what it sent is stored all the same
            return
        if door.brief and self._keep_alive and not self._answer_old:
            transport.write((door.heads.get(len(body)) or door.head(len(body))) + body)
            if self._stage == _IDLE and not (self._blocked or self._queue or self._held or self._fault):
                self._answering = False
                self.deadline = door.resting
                return
        else:
            if door.access_log and request:
                log.info("%s POST /%s%s %d %s", request.address, self._endpoint, request.topic, code, MESSAGES[code])
            transport.write(b"%b%d\r\n%b\r\n%b" % (door.ok, len(body), self._connection_header(), body))
        self._answered()

    def _refuse(self, status: int, reason: str, *, ends: bool = False) -> None:
        """Answer with an HTTP status and code 10001; `ends` where nothing behind it can be read. 404 and 405 carry the documented
        body and the id in a header."""
        assert self._transport
        path = self._path.partition(b"?")[0][:300].decode(errors="backslashreplace")
        outcome = Outcome(secrets.token_hex(8), "http", status, Code.PARAM_ERROR, reason, self._address, topic=path)
        self._door.refused(outcome)
        self._door.meter.count("http", Code.PARAM_ERROR)
        body = wire.refusal(Code.PARAM_ERROR, "" if status in (404, 405) else outcome.request_id)
        head = (
            b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\nX-Request-Id: %b\r\n%b%b\r\n"
            % (
                status,
                _REASONS[status],
                len(body),
                outcome.request_id.encode(),
                b"Allow: POST\r\n" if status == 405 else b"",
                self._connection_header(),
            )
        )
        self._transport.write(head if self._bare else head + body)
        if ends:
            self._over = True
            self._held = b""
            self.deadline = self._door.now + self._limits.linger
        else:
            self._answered()

    def _connection_header(self) -> bytes:
        """Say what HTTP's default does not: this connection closes, or one of HTTP/1.0 does not."""
        self._keep_alive = self._keep_alive and not self._door.draining
        if self._keep_alive:
            return b"Connection: keep-alive\r\n" if self._answer_old else b""
        return b"Connection: close\r\n"

    def _answered(self) -> None:
        self._answering = False
        if not self._keep_alive:
            self._close()
            return
        if self._stage == _IDLE and not self._blocked:
            self.deadline = self._door.resting
        else:
            self._rest()
        if self._queue or self._held or self._fault:
            self._pump()

    def _rest(self) -> None:
        """Set the deadline for what is awaited now that nothing is being answered."""
        limits = self._limits
        if self._answering or self._over:
            return
        if self._blocked:
            wait = limits.write_timeout
        elif self._stage == _IDLE:
            wait = limits.idle_timeout
        else:
            wait = limits.head_timeout if self._stage == _HEAD else limits.body_timeout
        self.deadline = self._door.now + wait

    # -- the end

    def _close(self) -> None:
        self._over = True
        self._held = b""
        self._queue.clear()
        self.deadline = self._door.now + self._limits.write_timeout
        if self._transport:
            self._transport.close()

    def expire(self) -> None:
        """The deadline has passed: what that means depends on what the peer owes us."""
        if self._transport is None:
            return
        if self._blocked or (self._over and self._transport.is_closing()):
            self.abort()
        elif self._over or self._stage == _IDLE:
            self._close()
        else:
            part, wait = (
                ("head", self._limits.head_timeout) if self._stage == _HEAD else ("body", self._limits.body_timeout)
            )
            self._fault = (408, f"the {part} did not arrive within {wait:g} s")
            self._pump()

    def drain(self) -> None:
        """Close soon if idle; a request that is on its way in these 0.3 s is still answered."""
        if not self.under_way and not self._over:
            self.deadline = self._door.now + _DRAIN_PATIENCE

    @property
    def under_way(self) -> bool:
        """Whether a request has arrived, at least in part, that is not answered yet."""
        return self._answering or bool(self._queue) or (self._stage != _IDLE and not self._over)

    @property
    def spare(self) -> bool:
        """Whether it may yield its place (see Places): who is no device, while it has nothing to answer; who is, while it is
        silent."""
        return not (self.under_way if self._proved else self._answering)

    def abort(self) -> None:
        self._broken = True
        if self._transport:
            self._transport.abort()
