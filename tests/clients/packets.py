"""MQTT 3.1.1 by hand, for what no well-mannered client sends: packets as bytes on a socket."""

from __future__ import annotations

import contextlib
import socket
import time

from tests.clients.fleet import Login
from tests.house import Server

__all__ = ["PINGREQ", "Wire", "connect", "publish", "subscribe"]

PINGREQ = b"\xc0\x00"


def text(value: str) -> bytes:
    return len(value.encode()).to_bytes(2) + value.encode()


def packet(first: int, body: bytes) -> bytes:
    """The fixed header (first byte, length in 7-bit groups), then the body."""
    length, groups = len(body), bytearray()
    while True:
        length, group = divmod(length, 128)
        groups.append(group | (128 if length else 0))
        if not length:
            return bytes([first]) + bytes(groups) + body


def connect(login: Login, keepalive: int = 60, *, clean: bool = True) -> bytes:
    head = text("MQTT") + bytes([4, 0xC2 if clean else 0xC0]) + keepalive.to_bytes(2)
    return packet(0x10, head + text(login.client_id) + text(login.username) + text(login.password))


def publish(topic: str, payload: bytes, *, qos: int = 1, number: int = 1, retain: bool = False) -> bytes:
    return packet(0x30 | qos << 1 | retain, text(topic) + (number.to_bytes(2) if qos else b"") + payload)


def subscribe(topic_filter: str, *, qos: int = 1, number: int = 1) -> bytes:
    return packet(0x82, number.to_bytes(2) + text(topic_filter) + bytes([qos]))


class Wire:
    """A socket to the plain MQTT port (or the TLS port) that sends bytes and reads packets."""

    def __init__(self, server: Server, *, tls: bool = False) -> None:
        port = server.mqtt_port if tls else server.mqtt_plain_port
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=5)
        if tls:
            self._socket = server.context().wrap_socket(self._socket, server_hostname="localhost")
        self.port = int(self._socket.getsockname()[1])

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)

    def read(self, within: float = 5) -> bytes | None:
        """The next packet; empty where the connection ended, None where nothing came within the time."""
        end = time.monotonic() + within
        try:
            head = self._exactly(2, end)
            length, shift = head[1] & 127, 7
            while head[-1] & 128:
                head += self._exactly(1, end)
                length |= (head[-1] & 127) << shift
                shift += 7
            return head + self._exactly(length, end)
        except TimeoutError:
            return None
        except (EOFError, ConnectionResetError):
            return b""

    def open(self, login: Login, keepalive: int = 60, *, clean: bool = True) -> int:
        """The return code of CONNACK."""
        self.send(connect(login, keepalive, clean=clean))
        answer = self.read()
        assert answer, answer
        assert (answer[0], answer[1]) == (0x20, 2), answer
        return answer[3]

    def _exactly(self, count: int, end: float) -> bytes:
        data = b""
        while len(data) < count:
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            part = self._socket.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data
