"""The old SDKs' TLS suites with the whole program: who uses them is told, and they can be switched off."""

from __future__ import annotations

import json
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.clients.fleet import Thing, until
from tests.clients.packets import connect
from tests.house import Server, cli, cli_json, login_body, make_devices, serving


def context(server: Server, *, legacy: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(server.ca))
    if legacy:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AES128-SHA")
    return context


def asked(server: Server, port: int, request: bytes, *, legacy: bool) -> bytes:
    """The beginning of the answer to a connection of its own."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context(server, legacy=legacy).wrap_socket(plain, server_hostname="localhost") as sock,
    ):
        sock.sendall(request)
        return sock.recv(4096)


def login(device: Any) -> bytes:
    body = login_body(device.product, device.name, device.secret)
    head = f"POST /auth HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def noted(server: Server, *options: str) -> list[tuple[str, str]]:
    done = cli("logs", "--endpoint", "tls", "--json", *options, data=server.data)
    return [(each["deviceName"], each["reason"].split(" (")[0]) for each in json.loads(done.stdout)]


@pytest.mark.slow
def test_devices_with_legacy_suites_are_told_of_and_others_are_not(tmp_path: Path) -> None:
    """One note for each, over either door; refusals are a list of their own."""
    with serving(tmp_path / "data", "--workers", "1") as server:
        old, older, modern = make_devices(server, 3)
        for _ in range(3):
            assert b'"token"' in asked(server, server.port, login(old), legacy=True)
        by_mqtt = Thing(server, older.product, older.name, older.secret).login()
        assert asked(server, server.mqtt_port, connect(by_mqtt), legacy=True)[:1] == b"\x20"
        assert b'"token"' in asked(server, server.port, login(modern), legacy=False)
        old.secret = "another"
        assert b"20000" in asked(server, server.port, login(old), legacy=True)
        assert until(lambda: len(noted(server)) == 2)
        assert noted(server) == [
            (old.name, "signed in over HTTPS with the TLS suite AES128-SHA"),
            (older.name, "signed in over MQTT with the TLS suite AES128-SHA"),
        ]
        assert noted(server, "--device", older.name) == noted(server)[1:]
        assert until(lambda: [each["code"] for each in cli_json("logs", data=server.data)] == [20000])
        follow = cli("logs", "--endpoint", "tls", "--follow", data=server.data, check=False)
        assert b"without --follow" in follow.stderr


@pytest.mark.slow
def test_legacy_suites_can_be_switched_off(tmp_path: Path) -> None:
    """Then who has no others is refused by the handshake, at each door, and everybody else is served."""
    with serving(tmp_path / "data", "--workers", "1", "--tls-legacy", "false") as server:
        (device,) = make_devices(server, 1)
        for port in (server.port, server.mqtt_port):
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                asked(server, port, login(device), legacy=True)
        assert b'"token"' in asked(server, server.port, login(device), legacy=False)
        done = cli("logs", "--endpoint", "tls", data=server.data)
        assert b"no device signs in over a legacy TLS suite" in done.stderr
