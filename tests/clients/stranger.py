"""A client that may not come in, over any door and from any address of this machine: what is known of it is in `uplinkd logs`."""

from __future__ import annotations

import socket
import ssl
import struct

from tests.house import login_body


def ask_https(port: int, product: str, source: str, context: ssl.SSLContext | None) -> bytes:
    """The answer to a login of a device that there is not; without a context it is in plain text."""
    body = login_body(product, "stranger", "guess")
    head = "POST /auth HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return _ask(port, source, context, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def ask_mqtt(port: int, product: str, source: str, context: ssl.SSLContext | None) -> bytes:
    """The same over MQTT."""
    texts = f"{product}.stranger|securemode=2,signmethod=hmacsha1|", f"stranger&{product}", "0" * 40
    packet = b"\x00\x04MQTT\x04\xc2\x00\x3c" + b"".join(struct.pack("!H", len(text)) + text.encode() for text in texts)
    size = len(packet)
    length = bytes([size]) if size < 128 else bytes([size % 128 | 128, size // 128])
    return _ask(port, source, context, b"\x10" + length + packet)


def _ask(port: int, source: str, context: ssl.SSLContext | None, raw: bytes) -> bytes:
    here = "::1" if ":" in source else "127.0.0.1"
    with socket.create_connection((here, port), 10, source_address=(source, 0)) as sock:
        spoken = context.wrap_socket(sock, server_hostname="localhost") if context else sock
        with spoken:
            spoken.sendall(raw)
            said = b""
            while piece := spoken.recv(4096):
                said += piece
            return said
