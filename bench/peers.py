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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from uplinkd.client import login_body
from uplinkd.engine.embedded import EmbeddedServer
from uplinkd.settings import Settings

__all__ = [
    "PIN",
    "PRODUCT",
    "SECRET",
    "Peer",
    "aiohttp",
    "context",
    "cpu_seconds",
    "fastapi",
    "free_port",
    "granian",
    "import_devices",
    "login",
    "nginx",
    "pss",
    "running",
    "start_uplinkd",
    "tree",
    "uplinkd",
]

SERVER_CORE = "0"
PRODUCT = "a1benchmark"
SECRET = "secret"
# Ends with the benchmark, even when that is killed; then `taskset` and the core.
PIN = ["setpriv", "--pdeathsig", "TERM", "taskset", "-c"]
# What a device is answered to a publish, of the same size.
_FIXED = '{"code":0,"message":"success","info":{"messageId":1880000000000000001}}'


@dataclass(frozen=True)
class Peer:
    """A running server: where it is, what certifies it, the roots of its processes (its engine's too), whether it speaks TLS."""

    name: str
    port: int
    ca: Path
    roots: tuple[int, ...]
    tls: bool = True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def context(ca: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(ca))


def _await_answer(process: subprocess.Popen[bytes], log: Path, port: int, ca: Path, *, within: float = 20) -> None:
    """Return once the first POST /auth is answered over TLS; a server that ends or stays silent ends the benchmark."""
    end = time.monotonic() + within
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(_connect(port, ca)) as door:
            door.request("POST", "/auth", b"{}", {"Content-Type": "application/json"})
            door.getresponse().read()
            return
        time.sleep(0.01)
    why = "ended" if process.poll() is not None else f"did not answer within {within:g} s"
    words = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise SystemExit(f"the server that {log.stem} should be {why}; its last words:\n{words}")


def _connect(port: int, ca: Path) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection("localhost", port, timeout=5, context=context(ca))


def login(peer: Peer, device: str) -> str:
    """A token for `device`."""
    body = login_body(PRODUCT, device, SECRET, method="hmacsha1")
    try:
        with contextlib.closing(_connect(peer.port, peer.ca)) as connection:
            connection.request("POST", "/auth", body, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SystemExit(f"{peer.name} did not answer the login of {device}: {error}") from error
    if answer["code"] != 0:
        raise SystemExit(f"{peer.name} refused the login of {device}: {answer}")
    return str(answer["info"]["token"])


@contextlib.contextmanager
def running(arguments: list[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process on the servers' core, ended with everything that it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*PIN, SERVER_CORE, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **variables},
        )
    try:
        yield process
    finally:
        family = tree(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for pid in family[1:] if process.poll() is not None else family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)


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
events {{ worker_connections 65536; multi_accept on; }}
http {{
  access_log off; keepalive_requests 100000000; keepalive_timeout 3600;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  ssl_session_cache off; ssl_protocols TLSv1.2 TLSv1.3;
  server {{
    listen 127.0.0.1:{port} ssl; {chains}
    location / {{ default_type application/json; return 200 '{_FIXED}'; }}
  }}
}}
""")
    log = folder / "nginx.log"
    with running([binary, "-p", str(folder), "-c", str(config)], log) as process:
        _await_answer(process, log, port, tls / "ca.pem")
        yield Peer("nginx, fixed answer", port, tls / "ca.pem", (process.pid,))


@contextlib.contextmanager
def _engine(data: Path) -> Iterator[EmbeddedServer]:
    """A nats-server for a peer alone, on the servers' core."""
    affinity = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {int(SERVER_CORE)})  # the engine's process inherits it
    try:
        engine = EmbeddedServer.start(Settings(data=data, nats_listen=""))
    finally:
        os.sched_setaffinity(0, affinity)
    try:
        yield engine
    finally:
        engine.stop()


@contextlib.contextmanager
def _baseline(
    name: str, log: Path, tls: Path, devices: int, command: Callable[[int, str, str], list[str]]
) -> Iterator[Peer]:
    """What `bench.baseline` decides, in the shell that `command` runs: given a port, a certificate and its key."""
    port = free_port()
    with _engine(log.with_suffix("")) as engine:
        variables = {
            "BENCH_NATS": engine.access.urls[0],
            "BENCH_USER": engine.access.user,
            "BENCH_PASSWORD": engine.access.password,
            "BENCH_DEVICES": str(devices),
        }
        arguments = command(port, f"{tls}/server-ecdsa.pem", f"{tls}/server-ecdsa.key")
        with running([sys.executable, "-m", *arguments], log, **variables) as process:
            _await_answer(process, log, port, tls / "ca.pem")
            yield Peer(name, port, tls / "ca.pem", (process.pid, engine.pid))


def fastapi(folder: Path, tls: Path, devices: int) -> AbstractContextManager[Peer]:
    """FastAPI on uvicorn with uvloop and httptools, storing through nats-py in a nats-server of its own."""

    def command(port: int, certificate: str, key: str) -> list[str]:
        return [
            *("uvicorn", "bench.baseline.on_fastapi:app", "--host", "127.0.0.1", "--port", str(port)),
            *("--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"),
            *("--ssl-certfile", certificate, "--ssl-keyfile", key),
        ]

    return _baseline("FastAPI + uvicorn + nats-py", folder / "fastapi.log", tls, devices, command)


def aiohttp(folder: Path, tls: Path, devices: int) -> AbstractContextManager[Peer]:
    """aiohttp's own server on uvloop, storing as FastAPI does."""

    def command(port: int, certificate: str, key: str) -> list[str]:
        return ["bench.baseline.on_aiohttp", str(port), certificate, key]

    return _baseline("aiohttp + nats-py", folder / "aiohttp.log", tls, devices, command)


@contextlib.contextmanager
def granian(folder: Path, tls: Path, devices: int) -> Iterator[Peer]:
    """granian, one worker with one thread, before the gateway of uplinkd, with a nats-server of its own."""
    port = free_port()
    data = folder / "granian"
    import_devices(folder / "granian.csv", data, devices)
    log = folder / "granian.log"
    arguments = [sys.executable, "-m", "granian", "--interface", "rsgi", "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--workers", "1", "--runtime-threads", "1", "--loop", "uvloop", "--http", "1", "--no-ws"]
    arguments += ["--log-level", "warning", "--backlog", "4096"]
    arguments += ["--ssl-certificate", f"{tls}/server-ecdsa.pem", "--ssl-keyfile", f"{tls}/server-ecdsa.key"]
    with (
        _engine(data) as engine,
        running([*arguments, "bench.on_granian:app"], log, BENCH_DATA=str(data)) as process,
    ):
        _await_answer(process, log, port, tls / "ca.pem")
        yield Peer("granian + uplinkd's gateway", port, tls / "ca.pem", (process.pid, engine.pid))


def import_devices(fleet: Path, data: Path, devices: int) -> None:
    """`devices` devices for the registry of `data`."""
    rows = "".join(f"{PRODUCT},device{number:04},{SECRET}\n" for number in range(devices))
    fleet.write_text("ProductKey,DeviceName,DeviceSecret\n" + rows)
    done = subprocess.run(
        [sys.executable, "-m", "uplinkd", "device", "import", str(fleet), "--data", str(data)],
        capture_output=True,
        text=True,
        timeout=60 + devices / 1000,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"uplinkd device import failed:\n{done.stderr}")


@contextlib.contextmanager
def uplinkd(folder: Path, devices: int, *options: str) -> Iterator[Peer]:
    """uplinkd with one worker and its embedded engine, and `devices` devices."""
    data = folder / "data"
    folder.mkdir(exist_ok=True)
    import_devices(folder / "fleet.csv", data, devices)
    with start_uplinkd(folder, data, *options) as peer:
        yield peer


@contextlib.contextmanager
def start_uplinkd(folder: Path, data: Path, *options: str) -> Iterator[Peer]:
    """uplinkd with one worker and no flow control, once it has answered."""
    port = free_port()
    arguments = [sys.executable, "-m", "uplinkd", "serve", "--data", str(data), "--listen", f"127.0.0.1:{port}"]
    arguments += ["--workers", "1", "--device-rate", "0", "--device-bytes", "0", "--auth-rate", "0"]
    arguments += ["--mqtt-listen", "", "--nats-listen", "", "--console-listen", "", *options]
    log = folder / "uplinkd.log"
    ca = data / "tls" / "ca.pem"
    with running(arguments, log) as process:
        _await_answer(process, log, port, ca)
        yield Peer("uplinkd, stored and acknowledged", port, ca, (process.pid,))


def tree(*roots: int) -> list[int]:
    """Processes and all that descend from them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = list(roots)
    for each in found:
        found += children.get(each, [])
    return found


def pss(*roots: int) -> int:
    """Bytes of memory of process trees, shared pages counted once."""
    total = 0
    for each in tree(*roots):
        with contextlib.suppress(OSError):
            match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{each}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(match[1]) * 1024 if match else 0
    return total


def cpu_seconds(*roots: int) -> float:
    """CPU time that process trees have used so far."""
    ticks = 0
    for each in tree(*roots):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
