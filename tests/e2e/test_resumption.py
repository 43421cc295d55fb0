"""A device that comes back shows its TLS ticket, whichever worker it meets."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from pathlib import Path

import pytest

from tests.clients.fleet import until
from tests.house import Server, serving

WORKERS, VISITS = 2, 24
ASKED = b"POST /nothing HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"


def visit(server: Server, context: ssl.SSLContext, ticket: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession | None]:
    """Whether the ticket was good, and the one that the server gave."""
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost", session=ticket) as sock,
    ):
        sock.sendall(ASKED)
        assert sock.recv(4096).startswith(b"HTTP/1.1 404")
        return bool(sock.session_reused), sock.session


@pytest.mark.slow
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_a_ticket_is_good_at_every_worker(tmp_path: Path, version: ssl.TLSVersion) -> None:
    """And after the worker that gave it has died: its successor has the same keys."""
    with serving(tmp_path / "data", "--workers", str(WORKERS)) as server:
        context = ssl.create_default_context(cafile=str(server.ca))
        context.minimum_version = context.maximum_version = version
        reused, ticket = visit(server, context, None)
        assert not reused
        assert all(visit(server, context, ticket)[0] for _ in range(VISITS))
        before = server.children("uplinkd-worker")
        os.kill(before[0], signal.SIGKILL)
        assert until(lambda: len(set(server.children("uplinkd-worker")) - set(before)) == 1)
        assert until(lambda: answered(server, context))
        assert all(visit(server, context, ticket)[0] for _ in range(VISITS))


def answered(server: Server, context: ssl.SSLContext) -> bool:
    """Whether every one of some visits is: the successor has begun."""
    try:
        return all(visit(server, context, None) for _ in range(8))
    except OSError:
        return False
