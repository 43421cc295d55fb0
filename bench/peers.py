"""The servers that are measured, each with its whole process tree on one core."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from uplinkd.client import login_body
from uplinkd.engine.embedded import EmbeddedServer
from uplinkd.settings import Settings

__all__ = ["PRODUCT", "Peer", "fastapi", "free_port", "login", "nginx", "pss", "start_uplinkd", "tree", "uplinkd"]

SERVER_CORE = "0"
PRODUCT = "a1benchmark"
SECRET = "secret"
_PIN = ["taskset", "-c", SERVER_CORE]
# What a device is answered to a publish, of the same size.
_FIXED = '{"code":0,"message":"success","info":{"messageId":1880000000000000001}}'


@dataclass(frozen=True)
class Peer:
    """A running server: where it is, what certifies it, its root process."""

    name: str
    port: int
    ca: Path
    pid: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def context(ca: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(ca))


def wait_until_answered(port: int, ca: Path, *, within: float) -> float:
    """Seconds until the first POST /auth is answered over TLS."""
    started = time.monotonic()
    while time.monotonic() - started < within:
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            contextlib.closing(_connect(port, ca)) as connection,
        ):
            connection.request("POST", "/auth", b"{}", {"Content-Type": "application/json"})
            connection.getresponse().read()
            return time.monotonic() - started
        time.sleep(0.01)
    raise SystemExit(f"no answer on port {port} within {within:g} s")


def _connect(port: int, ca: Path) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection("localhost", port, timeout=5, context=context(ca))


def login(peer: Peer, device: str) -> str:
    """A token for `device`."""
    with contextlib.closing(_connect(peer.port, peer.ca)) as connection:
        body = login_body(PRODUCT, device, SECRET, method="hmacsha1")
        connection.request("POST", "/auth", body, {"Content-Type": "application/json"})
        return str(json.loads(connection.getresponse().read())["info"]["token"])


@contextlib.contextmanager
def _running(arguments: list[str], folder: Path, name: str, **variables: str) -> Iterator[int]:
    """A process, ended with everything that it started."""
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*_PIN, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **variables}
        )
        try:
            yield process.pid
        finally:
            children = tree(process.pid)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                for pid in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def nginx(folder: Path, tls: Path) -> Iterator[Peer]:
    """nginx, which reads a request over TLS and returns a fixed answer: what a machine can do at all."""
    binary = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
    assert binary
    port = free_port()
    config = folder / "nginx.conf"
    chains = "".join(
        f"ssl_certificate {tls}/server-{kind}.pem; ssl_certificate_key {tls}/server-{kind}.key;\n"
        for kind in ("rsa", "ecdsa")
    )
    config.write_text(f"""
daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log;
events {{ worker_connections 4096; multi_accept on; }}
http {{
  access_log off; keepalive_requests 100000000; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  ssl_session_cache off;
  server {{
    listen 127.0.0.1:{port} ssl; {chains}
    location / {{ default_type application/json; return 200 '{_FIXED}'; }}
  }}
}}
""")
    with _running([binary, "-p", str(folder), "-c", str(config)], folder, "nginx") as pid:
        peer = Peer("nginx, fixed answer", port, tls / "ca.pem", pid)
        wait_until_answered(port, peer.ca, within=10)
        yield peer


@contextlib.contextmanager
def fastapi(folder: Path, tls: Path) -> Iterator[Peer]:
    """FastAPI on uvicorn with uvloop and httptools, storing through nats-py in a nats-server of its own."""
    port = free_port()
    affinity = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {int(SERVER_CORE)})
    engine = EmbeddedServer.start(Settings(data=folder / "baseline"))
    os.sched_setaffinity(0, affinity)
    try:
        variables = {
            "BENCH_NATS": engine.access.urls[0],
            "BENCH_USER": engine.access.user,
            "BENCH_PASSWORD": engine.access.password,
        }
        arguments = [sys.executable, "-m", "uvicorn", "bench.baseline:app", "--host", "127.0.0.1", "--port", str(port)]
        arguments += ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
        arguments += ["--ssl-certfile", f"{tls}/server-ecdsa.pem", "--ssl-keyfile", f"{tls}/server-ecdsa.key"]
        with _running(arguments, folder, "fastapi", **variables) as pid:
            peer = Peer("FastAPI + uvicorn + nats-py", port, tls / "ca.pem", pid)
            wait_until_answered(port, peer.ca, within=20)
            yield peer
    finally:
        engine.stop()


@contextlib.contextmanager
def uplinkd(folder: Path, devices: int, *options: str) -> Iterator[Peer]:
    """uplinkd with one worker and its embedded engine, and `devices` devices."""
    data = folder / "data"
    fleet = folder / "fleet.csv"
    rows = "".join(f"{PRODUCT},device{number:04},{SECRET}\n" for number in range(devices))
    fleet.write_text("ProductKey,DeviceName,DeviceSecret\n" + rows)
    subprocess.run(
        [sys.executable, "-m", "uplinkd", "device", "import", str(fleet), "--data", str(data)],
        check=True,
        capture_output=True,
    )
    with start_uplinkd(folder, data, *options) as peer:
        yield peer


@contextlib.contextmanager
def start_uplinkd(folder: Path, data: Path, *options: str) -> Iterator[Peer]:
    port = free_port()
    arguments = [
        sys.executable,
        "-m",
        "uplinkd",
        "serve",
        "--data",
        str(data),
        "--listen",
        f"127.0.0.1:{port}",
        "--workers",
        "1",
    ]
    arguments += ["--device-rate", "0", "--device-bytes", "0", "--auth-rate", "0", *options]
    with _running(arguments, folder, "uplinkd") as pid:
        ca = data / "tls" / "ca.pem"
        while not ca.exists():
            time.sleep(0.01)
        wait_until_answered(port, ca, within=20)
        yield Peer("uplinkd, stored and acknowledged", port, ca, pid)


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def pss(pid: int) -> int:
    """Bytes of memory of a process tree, shared pages counted once."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{each}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(match[1]) * 1024 if match else 0
    return total
