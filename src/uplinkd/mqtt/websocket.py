"""MQTT over WebSocket: frames around the same bytes. The handshake and the frames are the library websockets', without its I/O."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, cast

from websockets.exceptions import WebSocketException
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import Event
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from uplinkd.tasks import Turns

__all__ = ["WebSocket"]

_SUBPROTOCOLS = [Subprotocol("mqtt"), Subprotocol("mqttv3.1")]
# One frame may hold several packets, and one packet may come in several frames.
_FRAME_BYTES = 1024 * 1024
_UNSUPPORTED_DATA = 1003
# The headers of the handshake that the library reads. On bytes beyond ASCII in them it fails, or logs a traceback (websockets 16).
_READ = ("Connection", "Upgrade", *(f"Sec-WebSocket-{name}" for name in ("Key", "Version", "Protocol", "Extensions")))
# The library takes all frames out of what it is given at once: it is given so many bytes at a time, until so many frames were
# handled and it is the others' turn.
_SLICE = 2 * 1024
_SHARE = 32


class WebSocket(asyncio.Protocol):
    """The outer protocol of one connection; `make` gives the inner one, which speaks MQTT and sees no frame. `turns` are those of all
    connections of the worker."""

    def __init__(self, make: Callable[[], asyncio.Protocol], turns: Turns | None = None) -> None:
        self._make = make
        self._turns = turns or Turns()
        self._inner: asyncio.Protocol | None = None
        self._frames = ServerProtocol(subprotocols=_SUBPROTOCOLS, max_size=_FRAME_BYTES)
        self._transport: asyncio.Transport | None = None
        self._held = bytearray()  # what its turn has not come for yet; meanwhile the socket is not read
        self._unwanted = False  # the inner protocol does not want it to be read either
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_writing()

    def data_received(self, data: bytes) -> None:
        waiting = bool(self._held)
        self._held += data
        if not waiting:
            self._take()

    def _take(self) -> None:
        """Take frames out of what has arrived, as many as make one turn."""
        share = _SHARE
        while self._held and share > 0:
            if self._transport is None or self._transport.is_closing():
                self._held.clear()
                return
            self._frames.receive_data(bytes(self._held[:_SLICE]))
            del self._held[:_SLICE]
            events = self._frames.events_received()
            share -= len(events)
            for event in events:
                self._event(event)
            self.flush()
        if self._held:
            self._turns.wait(self._take)
        self._read_or_not()

    def _event(self, event: Event) -> None:
        if isinstance(event, Request):
            self._shake_hands(event)
            return
        assert isinstance(event, Frame)  # a server hears no response
        if event.opcode is Opcode.TEXT:
            self._frames.fail(_UNSUPPORTED_DATA, "MQTT is binary")
        elif event.opcode in (Opcode.BINARY, Opcode.CONT) and event.data and self._inner is not None:
            self._inner.data_received(bytes(event.data))

    def read_on(self, wanted: bool) -> None:
        """Whether the inner protocol wants to hear more."""
        self._unwanted = not wanted
        self._read_or_not()

    def _read_or_not(self) -> None:
        stop = self._unwanted or bool(self._held)
        if stop is self._paused or self._transport is None or self._transport.is_closing():
            return
        self._paused = stop
        if stop:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _shake_hands(self, request: Request) -> None:
        headers = request.headers
        odd = next((name for name in _READ if not all(value.isascii() for value in headers.get_all(name))), "")
        if odd:
            response = self._frames.reject(400, f"The header {odd} holds bytes that are not ASCII.\n")
        else:
            response = self._frames.accept(request)
        self._frames.send_response(response)
        self.flush()
        if response.status_code == 101 and self._transport is not None:
            self._inner = self._make()
            self._inner.connection_made(_Framed(self, self._transport))

    def send(self, data: bytes) -> None:
        """One frame to the client."""
        try:
            self._frames.send_binary(data)
        except WebSocketException:  # the client has begun to close
            return
        self.flush()

    def close(self) -> None:
        """Say goodbye, then close."""
        with contextlib.suppress(WebSocketException):
            self._frames.send_close(1000)
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def flush(self) -> None:
        for data in self._frames.data_to_send():
            if self._transport is None or self._transport.is_closing():
                return
            if data:
                self._transport.write(data)
            else:  # the library's sign that nothing more follows
                self._transport.close()


class _Framed(asyncio.Transport):
    """The connection as the inner protocol sees it."""

    def __init__(self, socket: WebSocket, transport: asyncio.Transport) -> None:
        super().__init__()
        self._socket = socket
        self._transport = transport

    def write(self, data: Any) -> None:
        self._socket.send(bytes(data))

    def close(self) -> None:
        self._socket.close()

    def abort(self) -> None:
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def pause_reading(self) -> None:
        self._socket.read_on(False)

    def resume_reading(self) -> None:
        self._socket.read_on(True)
