"""TLS on the connections of one worker: OpenSSL works on the sockets themselves, and one epoll of our own watches them all.

In place of the event loop's own transports, of the socket and of TLS, which hold 6 kB more for each connection: two buffers in memory
that OpenSSL would work on, and what stands between them and the socket. Nothing is read ahead, so what OpenSSL has not been asked for
is still with the kernel, and a peer is held back by not being read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
import ssl
from collections.abc import Callable
from typing import Any, cast

__all__ = ["Secured", "Sockets"]

log = logging.getLogger("uplinkd.secured")

_RECORD = 16 * 1024
# What one connection is read of in a turn of the event loop, and how many are.
_READ_BYTES, _EVENTS = 64 * 1024, 128
# What one connection writes in a turn, and how many connections do, before it leaves at once.
_SOON_BYTES, _SOON = 64 * 1024, 64
# The peer's close_notify is a courtesy that many devices omit.
_CLOSING_SECONDS = 2.0
# The protocol is told to write no more when so much waits, and to go on when nothing does.
_FULL_BYTES = 64 * 1024
_NOT_YET = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
_HUNG_UP = select.EPOLLHUP | select.EPOLLERR

# Plain numbers: before Python 3.12 each look-up of an enum's member costs as much as a call.
_SHAKING, _OPEN, _CLOSING, _ENDED = range(4)
_IN, _OUT = int(select.EPOLLIN), int(select.EPOLLOUT)


class Sockets:
    """The sockets of one port's connections, watched by the event loop as one.

    What is written in a turn leaves together at its end: the one write of a connection takes along all that it has, and a peer on
    another core is woken once and finds the rest as it comes. To wake it for each costs twice as much as to write.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._epoll = select.epoll()
        self._connections: dict[int, Secured] = {}
        self._leaving: list[Secured] = []
        loop.add_reader(self._epoll.fileno(), self._poll)

    def close(self) -> None:
        """Cut off the connections that are left; none begins any more."""
        for connection in list(self._connections.values()):
            connection.abort()
        self.loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def watch(self, file: int, connection: Secured) -> None:
        self._connections[file] = connection
        self._epoll.register(file, _IN)

    def change(self, file: int, events: int) -> None:
        self._epoll.modify(file, events)

    def forget(self, file: int) -> None:
        if self._connections.pop(file, None):
            self._epoll.unregister(file)

    def leave(self, connection: Secured) -> None:
        """Have its `send` called at the end of this turn."""
        leaving = self._leaving
        leaving.append(connection)
        count = len(leaving)
        if count == 1:
            self.loop.call_soon(self._leave)
        elif count == _SOON:
            self._leave()

    def _leave(self) -> None:
        leaving, self._leaving = self._leaving, []
        for connection in leaving:
            try:
                connection.send()
            except Exception:
                _ends(connection)

    def _poll(self) -> None:
        connections = self._connections
        for file, events in self._epoll.poll(0, _EVENTS):
            connection = connections.get(file)
            if connection is not None:  # or it was ended by another's event
                try:
                    connection.ready(events)
                except Exception:
                    _ends(connection)


def _ends(connection: Secured) -> None:
    """A fault of ours ends the connection that it met, and not what others wait for."""
    log.exception("a fault of ours on a connection, which ends")
    connection.abort()


class Secured(asyncio.Transport):
    """The server's end of one TLS connection, from the first byte of the handshake: the transport of what `make` makes once that is
    done.

    `shaken` is told then, with None, or with the OSError (ssl.SSLError is one) that kept it from being done. Raise OSError where
    OpenSSL cannot begin; the socket is the caller's then.
    """

    __slots__ = (
        "_blocked",
        "_context",
        "_events",
        "_file",
        "_full",
        "_leaves",
        "_make",
        "_out",
        "_paused",
        "_protocol",
        "_records",
        "_shaken",
        "_size",
        "_sock",
        "_sockets",
        "_soon",
        "_state",
        "_stuck",
        "_timer",
    )

    def __init__(
        self,
        context: ssl.SSLContext,
        sock: socket.socket,
        make: Callable[[], asyncio.Protocol],
        shaken: Callable[[Secured, OSError | None], None],
        sockets: Sockets,
    ) -> None:
        self._sock = sock
        self._file = sock.fileno()
        self._context = context
        # What ssl.SSLSocket works with, without what it puts around: a third of what a read or write costs, and for a connection a
        # second socket object and seven questions to the kernel.
        self._records: Any = getattr(context, "_wrap_socket")(sock, server_side=True)  # noqa: B009 - mypy does not know it
        self._make: Callable[[], asyncio.Protocol] | None = make
        self._shaken: Callable[[Secured, OSError | None], None] | None = shaken
        self._sockets = sockets
        self._state = _SHAKING
        self._protocol: asyncio.Protocol | None = None
        self._events = _IN
        self._soon = b""  # what leaves at the end of this turn, if it is a record and no more
        self._out: list[bytes | memoryview] | None = None  # whatever else was written and has not left
        self._size = 0  # of that
        self._stuck = False  # the first of it was refused, and has to be offered to OpenSSL again as it is
        self._leaves = False  # it leaves at the end of this turn
        self._blocked = False  # the peer does not take it
        self._full = False  # the protocol was told so
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        sockets.watch(self._file, self)

    def ready(self, events: int) -> None:
        """The socket can be read or written, or has broken."""
        if (self._state != _OPEN or self._paused or events != _IN) and not self._attend(events):
            return
        left = _READ_BYTES
        while True:
            try:
                # A record at most, and all of it, so OpenSSL keeps nothing back that the epoll does not know of.
                data: bytes = self._records.read(_RECORD)
            except ssl.SSLEOFError:
                data = b""  # without close_notify
            except _NOT_YET:  # a part of a record alone
                return
            except OSError as fault:
                self._break(fault)
                return
            protocol = self._protocol
            assert protocol
            if not data:
                protocol.eof_received()
                self.close()
                return
            protocol.data_received(data)
            left -= len(data)
            if len(data) < _RECORD or left <= 0 or self._state != _OPEN or self._paused:
                return

    def shake(self) -> None:
        """Go on with the handshake."""
        try:
            self._records.do_handshake()
        except ssl.SSLWantReadError:
            self._want(_IN)
            return
        except ssl.SSLWantWriteError:
            self._want(_OUT)
            return
        except OSError as error:
            self._break(error)
            return
        self._want(_IN)
        self._state = _OPEN
        self._answer(None)
        make, self._make = self._make, None
        assert make
        self._protocol = make()
        self._protocol.connection_made(self)

    # -- the protocol's calls

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._state != _OPEN or not data:
            return
        if not self._leaves and self._out is None and len(data) <= _RECORD:  # nearly always
            self._soon = bytes(data)
            self._leaves = True
            self._sockets.leave(self)
            return
        out = self._gathered()
        piece = bytes(data)
        out.append(memoryview(piece) if len(piece) > _RECORD else piece)
        self._size += len(piece)
        if self._blocked:
            self._press()
        elif self._size > _SOON_BYTES:
            self._write()
        elif not self._leaves:
            self._leaves = True
            self._sockets.leave(self)

    def send(self) -> None:
        """The turn in which something was written is over, or the peer takes more."""
        self._leaves = False
        soon = self._soon
        if not soon:
            if self._out and not self._blocked:
                self._write()
            return
        self._soon = b""
        try:
            self._records.write(soon)
        except OSError as fault:
            self._out, self._size = [], len(soon)
            self._refused(self._out, soon, fault)

    def close(self) -> None:
        """Send what was written and close_notify, then wait a moment for the peer to go: closed at once, what it has sent and nobody
        has read would reset the connection before it had its answer."""
        if self._state != _OPEN:
            if self._state == _SHAKING:
                self.abort()
            return
        self._state = _CLOSING
        self._timer = self._sockets.loop.call_later(_CLOSING_SECONDS, self.abort)
        if self._blocked:
            self._want(_OUT)
        else:
            self._write()

    def abort(self) -> None:
        self._end(None)

    def is_closing(self) -> bool:
        return self._state >= _CLOSING

    def pause_reading(self) -> None:
        if self._state == _OPEN and not self._paused:
            self._paused = True
            self._want(self._events & ~_IN)

    def resume_reading(self) -> None:
        if self._state == _OPEN and self._paused:
            self._paused = False
            self._want(self._events | _IN)

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
        if self._state != _ENDED:
            if name == "cipher":
                return self._records.cipher()
            if name == "tls_version":
                return self._records.version()
            if name == "peername":
                with contextlib.suppress(OSError):
                    return self._sock.getpeername()
        return default

    def get_write_buffer_size(self) -> int:
        return self._size + len(self._soon)

    # -- in between

    def _attend(self, events: int) -> bool:
        """What is rare: whether it is to be read all the same."""
        if self._state == _SHAKING:
            self.shake()
            return False
        if events & _OUT:
            self._blocked = False
            self.send()
            if events == _OUT:
                return False
        if self._state == _OPEN and not self._paused:
            return True
        if self._state == _CLOSING and not self._blocked:
            self._ignore()
        elif events & _HUNG_UP:
            self._end(ConnectionResetError("the peer has gone"))
        return False

    def _ignore(self) -> None:
        """What comes behind the end is nobody's; once the peer has ended too, so has the connection."""
        try:
            if self._sock.recv(_READ_BYTES):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._end(None)

    def _write(self) -> None:
        """Hand as much to the peer as it takes, a record at a time; then say goodbye, where that is due."""
        out = self._gathered()
        while out:
            piece = out.pop(0) if self._stuck or len(out) == 1 else _joined(out)
            if len(piece) > _RECORD:
                out.insert(0, piece[_RECORD:])
                piece = piece[:_RECORD]
            try:
                self._records.write(piece)
            except OSError as fault:
                self._refused(out, piece, fault)
                return
            self._stuck = False
            self._size -= len(piece)
        self._out = None
        if self._events & _OUT:
            self._want(self._events & ~_OUT)
        if self._state == _CLOSING:
            self._say_goodbye()
        elif self._full:
            self._full = False
            assert self._protocol
            self._protocol.resume_writing()

    def _gathered(self) -> list[bytes | memoryview]:
        """All that was written and has not left."""
        if self._out is None:
            self._out = []
        if self._soon:
            self._out.append(self._soon)
            self._size += len(self._soon)
            self._soon = b""
        return self._out

    def _refused(self, out: list[bytes | memoryview], piece: bytes | memoryview, fault: OSError) -> None:
        """`piece`, which was the first of `out`, was not taken: not yet, or the peer has gone."""
        if isinstance(fault, _NOT_YET):
            out.insert(0, piece)
            self._stuck = self._blocked = True
            self._want(self._events | _OUT)
            self._press()
        else:
            self._break(fault)

    def _press(self) -> None:
        if self._size > _FULL_BYTES and not self._full and self._state == _OPEN:
            self._full = True
            assert self._protocol
            self._protocol.pause_writing()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(OSError):  # it waits for the peer's, which may never come
            self._records.shutdown()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        self._want(_IN)

    def _want(self, events: int) -> None:
        if events != self._events:
            self._events = events
            self._sockets.change(self._file, events)

    def _break(self, fault: OSError) -> None:
        """What came is no TLS, or not what the peer's key has signed, or the peer has gone. OpenSSL has told it so; what it sent behind
        is taken, or the reset for that would overtake the alert."""
        with contextlib.suppress(OSError):
            self._sock.recv(_READ_BYTES)
        self._end(fault)

    def _end(self, fault: OSError | None) -> None:
        state, self._state = self._state, _ENDED
        if state == _ENDED:
            return
        if self._timer:
            self._timer.cancel()
        self._sockets.forget(self._file)
        self._sock.close()
        self._records = None
        self._soon, self._out = b"", None
        self._make = None
        if state == _SHAKING:
            self._answer(fault or ConnectionAbortedError("the handshake was cut off"))
        else:
            self._sockets.loop.call_soon(self._lose, fault)

    def _lose(self, fault: OSError | None) -> None:
        protocol, self._protocol = self._protocol, None
        if protocol:
            protocol.connection_lost(fault)

    def _answer(self, fault: OSError | None) -> None:
        shaken, self._shaken = self._shaken, None
        if shaken:
            shaken(self, fault)


def _joined(out: list[bytes | memoryview]) -> bytes | memoryview:
    """Taken from the front of `out`, what fits into one record; the whole first piece if that alone does not."""
    count, size = 1, len(out[0])
    while count < len(out) and size + len(out[count]) <= _RECORD:
        size += len(out[count])
        count += 1
    joined = out[0] if count == 1 else b"".join(out[:count])
    del out[:count]
    return joined
