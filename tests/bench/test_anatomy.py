"""Whose work a sample of the worker's stack is. Nothing is measured here."""

from __future__ import annotations

import pytest

from bench import anatomy

BEGIN = "main (uplinkd/cli/__init__.py:58);run (uplinkd/worker.py:96);Loop__run (loop.c);uv__io_poll (linux.c)"
HTTP = "SSLProtocol__do_read (loop.c);Connection.data_received (uplinkd/http/protocol.py:231)"
ANSWER = "_Wire.data_received (uplinkd/engine/jetstream.py:4);Connection._answer (uplinkd/http/protocol.py:580)"


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        (f"{BEGIN};epoll_pwait (libc.so.6)", "waiting"),
        ("Thread.run (threading.py:1);PyThread_acquire_lock_timed (libpython3.11.so.1.0);0x7f (libc.so.6)", "waiting"),
        (f"{BEGIN};uv__read (stream.c);read (libc.so.6)", "sockets: read and write"),
        (f"{BEGIN};{HTTP}", "gateway, connection"),
        (f"{BEGIN};{HTTP};llhttp__internal_execute (llhttp.c)", "HTTP parse"),
        (f"{BEGIN};{HTTP};Gateway.publish (uplinkd/gateway.py:1);check (uplinkd/core/tokens.py:80)", "token"),
        (f"{BEGIN};{HTTP};Gateway.publish (uplinkd/gateway.py:1);Flow.message (uplinkd/flow.py:99)", "flow control"),
        (f"{BEGIN};SSLProtocol__do_read (loop.c);SSL_read_ex (libssl.so.3);0x7f (libcrypto.so.3)", "TLS"),
        (
            f"{BEGIN};{HTTP};sign (uplinkd/core/signature.py:20);digest (uplinkd/core/mac.py:1);SHA1 (libcrypto.so.3)",
            "sign of a login",
        ),
        (f"{BEGIN};{HTTP};login (uplinkd/core/wire.py:68);JSONDecoder.decode (json/decoder.py)", "login's members"),
        (f"{BEGIN};_Wire.data_received (uplinkd/engine/jetstream.py:4)", "engine's client"),
        (f"{BEGIN};{ANSWER}", "answer"),
        (f"{BEGIN};{ANSWER};SSLProtocol__write_appdata (loop.c)", "TLS"),
        (BEGIN, "event loop"),
    ],
)
def test_the_innermost_frame_that_says_so_decides(stack: str, part: str) -> None:
    """An answer that is encrypted is TLS, one that is put together in the engine's call is an answer."""
    assert anatomy.part_of(stack.split(";")) == part


def test_what_waits_is_no_work() -> None:
    """Shares are of what is left, largest first; how the process began does not count for a part."""
    samples = f"{BEGIN};epoll_pwait (libc.so.6) 900\n{BEGIN} 25\n{BEGIN};{ANSWER} 75\n"
    assert anatomy.shares(samples) == ({"answer": 0.75, "event loop": 0.25}, 100)


def test_the_kernels_share_is_perfs() -> None:
    """Modules and all; the others keep their proportion."""
    report = """# Overhead  Shared Object
    45.00%  libpython3.11.so.1.0
    29.50%  [kernel.kallsyms]
     0.50%  [nf_tables]
     0.25%  [vdso]
"""
    assert anatomy.kernels(report) == pytest.approx(0.3)
    parts = anatomy.corrected({"sockets: read and write": 0.6, "TLS": 0.3, "token": 0.1}, 0.3)
    assert parts == pytest.approx({"sockets: read and write": 0.3, "TLS": 0.525, "token": 0.175})
