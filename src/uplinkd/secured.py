"""TLS on the connections of one worker, between the socket's transport and the door's protocol.

In place of the event loop's own, which holds 8 kB more for each connection and asks OpenSSL once more for each read, to be told by an
exception that there is nothing left. OpenSSL works on two buffers in memory; no more than one record's worth at a time lies there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any, cast

__all__ = ["Leaving", "Secured"]

_RECORD = 16 * 1024
# What one connection writes in a turn, and how many connections do, before it leaves at once.
_SOON_BYTES, _SOON = 64 * 1024, 64
# The peer's close_notify is a courtesy that many devices omit.
_CLOSING_SECONDS = 2.0

# Plain numbers: before Python 3.12 each look-up of an enum's member costs as much as a call.
_SHAKING, _OPEN, _CLOSING, _ENDED = range(4)


class Leaving:
    """What the connections of one port write in a turn of the event loop leaves together at its end: the one write of a connection
    takes along all that it has, and a peer on another core is woken once and finds the rest as it comes. To wake it for each costs
    twice as much as to write."""

    __slots__ = ("_connections", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._connections: list[Secured] = []

    def add(self, connection: Secured) -> None:
        connections = self._connections
        if not connections:
            self._loop.call_soon(self._leave)
        connections.append(connection)
        if len(connections) >= _SOON:
            self._leave()

    def _leave(self) -> None:
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.leave()


class Secured(asyncio.Transport, asyncio.Protocol):
    """The server's end of one TLS connection: a protocol to the socket, a transport to what `make` makes once the handshake is done.

    `shaken` then gets its result, or the OSError (ssl.SSLError is one) that kept it from being done. What is written leaves with
    `leaving`.
    """

    __slots__ = (
        "_context",
        "_fault",
        "_held",
        "_in",
        "_leaves",
        "_leaving",
        "_make",
        "_out",
        "_paused",
        "_protocol",
        "_raw",
        "_shaken",
        "_state",
        "_timer",
        "_tls",
    )

    def __init__(
        self,
        context: ssl.SSLContext,
        make: Callable[[], asyncio.Protocol],
        shaken: asyncio.Future[None],
        leaving: Leaving,
    ) -> None:
        self._context = context
        self._leaving = leaving
        self._leaves = False  # something waits for the end of this turn
        self._make = make
        self._shaken: asyncio.Future[None] | None = shaken
        self._state = _SHAKING
        self._protocol: asyncio.Protocol | None = None
        self._held = b""  # what has come and OpenSSL has not seen yet
        self._paused = False
        self._fault: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None

    # -- the socket's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = self._context.wrap_bio(self._in, self._out, server_side=True)

    def data_received(self, data: bytes) -> None:
        if self._state >= _CLOSING:
            return
        if self._held or self._paused:
            self._held += data
        elif len(data) <= _RECORD:
            self._in.write(data)
            self._take()
        else:
            self._held = data
            self._take_held()

    def eof_received(self) -> bool:
        """TLS has no half-open state."""
        if self._state == _OPEN and self._protocol:
            self._protocol.eof_received()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        state, self._state = self._state, _ENDED
        if self._timer:
            self._timer.cancel()
        if state == _SHAKING or self._protocol is None:
            self._answer(exc or self._fault or ConnectionResetError("the peer went before the handshake was done"))
        else:
            self._protocol.connection_lost(self._fault or exc)
        self._protocol = None
        self._held = b""
        del self._tls, self._in, self._out

    def pause_writing(self) -> None:
        if self._protocol:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._protocol:
            self._protocol.resume_writing()

    # -- the protocol's calls

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._state != _OPEN or self._raw.is_closing():
            return
        try:
            if len(data) <= _RECORD:
                self._tls.write(data)
            else:
                view = memoryview(data)
                for start in range(0, len(view), _RECORD):
                    self._tls.write(view[start : start + _RECORD])
                    self._raw.write(self._out.read())
                return
        except ssl.SSLError as error:
            self._break(error)
            return
        if not self._leaves:
            self._leaves = True
            self._leaving.add(self)
        elif self._out.pending > _SOON_BYTES:
            self._raw.write(self._out.read())

    def leave(self) -> None:
        """The turn in which something was written is over."""
        self._leaves = False
        if self._state != _ENDED:
            self._flush()

    def close(self) -> None:
        """Send what was written and close_notify, then wait a moment for the peer to go: closed at once, what it has sent and nobody
        has read would reset the connection before it had its answer."""
        if self._state != _OPEN:
            if self._state == _SHAKING:
                self.abort()
            return
        self._state = _CLOSING
        self._held = b""
        with contextlib.suppress(ssl.SSLError):  # it waits for the peer's, which may never come
            self._tls.unwrap()
        self._flush()
        self._raw.write_eof()
        if self._paused:
            self._raw.resume_reading()
        self._timer = asyncio.get_running_loop().call_later(_CLOSING_SECONDS, self._raw.abort)

    def abort(self) -> None:
        if self._state == _OPEN:
            self._state = _CLOSING
        self._raw.abort()

    def is_closing(self) -> bool:
        return self._state >= _CLOSING or self._raw.is_closing()

    def pause_reading(self) -> None:
        if self._state == _OPEN and not self._paused:
            self._paused = True
            self._raw.pause_reading()

    def resume_reading(self) -> None:
        if self._state == _OPEN and self._paused:
            self._paused = False
            asyncio.get_running_loop().call_soon(self._go_on)

    def is_reading(self) -> bool:
        return self._state == _OPEN and not self._paused

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.Protocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self._protocol
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "sslcontext":
            return self._context
        if name == "cipher" and self._state != _ENDED:
            return self._tls.cipher()
        return self._raw.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        waiting = self._out.pending if self._leaves and self._state != _ENDED else 0
        return self._raw.get_write_buffer_size() + waiting

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._raw.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._raw.set_write_buffer_limits(high, low)

    # -- in between

    def _take_held(self) -> None:
        """Hand over what is held, a record's worth at a time, until the protocol has enough."""
        while self._held and not self._paused and self._state < _CLOSING:
            piece, self._held = self._held[:_RECORD], self._held[_RECORD:]
            self._in.write(piece)
            self._take()

    def _go_on(self) -> None:
        """Reading was resumed: first what came before."""
        if self._state != _OPEN or self._paused:
            return
        self._take()
        self._take_held()
        if self._state == _OPEN and not self._paused:
            self._raw.resume_reading()

    def _take(self) -> None:
        """Let OpenSSL see what has come."""
        if self._state == _SHAKING and not self._shake():
            return
        tls, incoming = self._tls, self._in
        try:
            # A read of a record's size takes one whole record, so OpenSSL never keeps a part of one that it has opened.
            while self._state == _OPEN and not self._paused and incoming.pending:
                data = tls.read(_RECORD)
                if not data:
                    self.eof_received()
                    self.close()
                    return
                assert self._protocol
                self._protocol.data_received(data)
        except ssl.SSLWantReadError:  # a part of a record alone
            pass
        except ssl.SSLError as error:
            self._break(error)
        if self._state == _OPEN and not self._leaves:
            self._flush()

    def _shake(self) -> bool:
        """Go on with the handshake; whether it is done."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        except OSError as error:
            self._break(error)
            return False
        # What ends the handshake leaves with the first answer, where that is ready in this turn.
        self._leaves = True
        self._leaving.add(self)
        self._state = _OPEN
        self._protocol = self._make()
        self._protocol.connection_made(self)
        self._answer(None)
        return True

    def _flush(self) -> None:
        if self._out.pending:
            self._raw.write(self._out.read())

    def _break(self, fault: OSError) -> None:
        """What came is no TLS, or not what the peer's key has signed: tell it so, and end."""
        self._fault = fault
        self._flush()
        if self._state == _OPEN:
            self._state = _CLOSING
        self._raw.close()

    def _answer(self, fault: Exception | None) -> None:
        shaken, self._shaken = self._shaken, None
        if shaken and not shaken.done():
            if fault:
                shaken.set_exception(fault)
            else:
                shaken.set_result(None)
