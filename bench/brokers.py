"""Servers that others run for the nearest equal work, in the same rounds as uplinkd: each on the servers' core, with ports,
configuration and data of its own. Whichever is not there, or does not start, is said in a line and left out."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import functools
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import mqtt
from bench.load import Measured, post_load, publish_load
from bench.peers import PRODUCT, Peer, context, cpu_seconds, free_port, running, uplinkd

__all__ = ["measure", "percentile"]

_PAYLOAD = "x" * 200
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "uplinkd-bench"
_CROSSBAR = "crossbar==26.10.1"
_INSTALL_SECONDS = 600
_NCHAN = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")
_RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_PATH = os.environ["PATH"] + ":/usr/sbin"
_JSON = {"Content-Type": "application/json"}
_GUEST = {"Authorization": "Basic " + base64.b64encode(b"guest:guest").decode()}


class _Missing(Exception):  # noqa: N818 - what is missing, or why it does not start, in a line
    pass


@dataclass(frozen=True, slots=True)
class _Post:
    """The request of a server that takes messages over HTTP, and what a right answer to it holds."""

    path: str
    body: str
    wanted: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Broker:
    """A running one: what its acknowledgement means is said in its name."""

    peer: Peer
    post: _Post | None = None
    mqtt_port: int = 0
    mqtt_name: str = ""
    guest: bool = True


Start = Callable[[Path, Path], AbstractContextManager[_Broker]]
"""Given a folder of its own, and the one with certificates."""


def measure(
    folder: Path,
    options: argparse.Namespace,
    say: Callable[[str], None],
    rounds: Callable[[str, Mapping[str, tuple[str, Callable[[float], Measured]]]], dict[str, Any]],
) -> dict[str, Any]:
    """`{"http": …, "mqtt": …}`: for each way the rows of report.row, by server."""
    folder.mkdir()
    count, port = options.connections, free_port()
    with ExitStack() as stack:
        ours = stack.enter_context(uplinkd(folder / "uplinkd", count, "--mqtt-listen", f"127.0.0.1:{port}"))
        synced = stack.enter_context(uplinkd(folder / "always", count, "--sync-interval", "always"))
        tls = folder / "uplinkd" / "data" / "tls"
        found = {
            "uplinkd": _Broker(
                replace(ours, name="uplinkd, HTTPS publish (stored: page cache, fsync each 100 ms)"),
                mqtt_port=port,
                mqtt_name="uplinkd, MQTT QoS 1 (stored: page cache, fsync each 100 ms)",
                guest=False,
            ),
            "uplinkd always": _Broker(replace(synced, name="uplinkd, sync_interval always (fsync)")),
        }
        for name, start in _STARTS.items():
            place = folder / name
            place.mkdir()
            try:
                found[name] = stack.enter_context(start(place, tls))
            except _Missing as missing:
                say(f"{name} is left out: {missing}")

        def post(broker: _Broker, seconds: float) -> Measured:
            if not broker.post:
                return publish_load(broker.peer, folder, connections=count, seconds=seconds)
            asked = broker.post
            return post_load(
                broker.peer,
                connections=count,
                seconds=seconds,
                target=asked.path,
                body=asked.body,
                headers=asked.headers,
                wanted=asked.wanted,
                status=asked.status,
            )

        def report(broker: _Broker, seconds: float) -> Measured:
            with mqtt.on_the_load_core():
                return asyncio.run(_report(broker, count, seconds))

        over_http = {
            name: (broker.peer.name, functools.partial(_forgiving, functools.partial(post, broker)))
            for name, broker in found.items()
            if broker.post or name.startswith("uplinkd")
        }
        over_mqtt = {
            name: (broker.mqtt_name, functools.partial(_forgiving, functools.partial(report, broker)))
            for name, broker in found.items()
            if broker.mqtt_port
        }
        return {load: rounds(load, acts) for load, acts in (("brokers_http", over_http), ("brokers_mqtt", over_mqtt))}


def _forgiving(act: Callable[[float], Measured], seconds: float) -> Measured:
    """A load that could not be put on a server is a round in which everything went wrong, not the end of the benchmark."""
    try:
        return act(seconds)
    except (SystemExit, OSError, TimeoutError, subprocess.TimeoutExpired) as fault:
        words = str(fault).splitlines() or [type(fault).__name__]
        return Measured(0, 0, seconds, 0.0, 0.0, 1, words[-1][:200])


async def _report(broker: _Broker, count: int, seconds: float) -> Measured:
    """Reports over MQTT at QoS 1, one of each client under way at a time."""
    tls, names = context(broker.peer.ca), [f"device{number:04}" for number in range(count)]
    logins = [(name, "guest", "guest") if broker.guest else mqtt.device(name) for name in names]
    clients = [await mqtt.connect(broker.mqtt_port, tls, login) for login in logins]
    took: list[float] = []
    end = time.perf_counter() + seconds

    def feed(client: mqtt.Client, topic: bytes) -> Callable[[], None]:
        number, sent = 0, 0.0

        def send() -> None:
            nonlocal number, sent
            now = time.perf_counter()
            if number:
                took.append(now - sent)
            if now < end:
                number, sent = number % 0xFFFF + 1, now
                client.publish(topic, _PAYLOAD.encode(), number)

        return send

    server, load, began = cpu_seconds(*broker.peer.roots), time.process_time(), time.perf_counter()
    for client, name in zip(clients, names, strict=True):
        client.after_ack = feed(client, f"/{PRODUCT}/{name}/user/update".encode())
        client.after_ack()
    await asyncio.sleep(seconds)
    good, passed = len(took), time.perf_counter() - began
    used, spent = cpu_seconds(*broker.peer.roots) - server, time.process_time() - load
    lost = sum(client.answered.done() for client in clients)
    await asyncio.sleep(0.2)
    for client in clients:
        client.abort()
    p50, p99 = (percentile(took[:good], share) * 1000 for share in (0.5, 0.99))
    return Measured(good, 0, passed, p50, p99, lost, "", round(used, 2), round(spent, 2))


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of them are; 0 of none."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def _needs(*tools: str, package: str) -> list[str]:
    """Where the tools are."""
    found = [shutil.which(tool, path=_PATH) for tool in tools]
    if missing := [tool for tool, place in zip(tools, found, strict=True) if not place]:
        raise _Missing(f"{', '.join(missing)} is not installed; on Debian: apt-get install {package}")
    return [place for place in found if place]


@contextlib.contextmanager
def _started(
    arguments: list[str], folder: Path, ready: Callable[[], bool], *, within: float = 20, **variables: str
) -> Iterator[int]:
    """The server's process, once `ready` says so."""
    log = folder / "log"
    with running(arguments, log, **variables) as process:
        end = time.monotonic() + within
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ready():
                    break
            time.sleep(0.1)
        else:
            words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            what = "did not answer" if process.poll() is None else "ended"
            raise _Missing(f"it {what}; its last words: {words[-1][:200] if words else 'none'}")
        yield process.pid


def _asks(
    port: int,
    tls: ssl.SSLContext | None,
    method: str,
    path: str,
    body: str = "",
    headers: Mapping[str, str] | None = None,
) -> int:
    """The status of the answer."""
    door: http.client.HTTPConnection
    if tls:
        door = http.client.HTTPSConnection("localhost", port, timeout=5, context=tls)
    else:
        door = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(door):
        door.request(method, path, body, dict(headers or {}))
        answer = door.getresponse()
        answer.read()
        return answer.status


def _posts(port: int, tls: ssl.SSLContext | None, post: _Post) -> Callable[[], bool]:
    return lambda: _asks(port, tls, "POST", post.path, post.body, post.headers) == post.status


@contextlib.contextmanager
def _rabbitmq(folder: Path, tls: Path) -> Iterator[_Broker]:
    """A node of its own, which no other knows of, with its own name server; a durable queue takes every message."""
    if not _RABBITMQ.exists():
        raise _Missing("rabbitmq-server is not installed; on Debian: apt-get install rabbitmq-server")
    (epmd,) = _needs("epmd", package="erlang-base")
    web, door, names, peers = (free_port() for _ in range(4))
    pair = {"cacertfile": tls / "ca.pem", "certfile": tls / "server-ecdsa.pem", "keyfile": tls / "server-ecdsa.key"}
    lines = ["listeners.tcp = none", f"mqtt.listeners.ssl.default = 127.0.0.1:{door}", "mqtt.listeners.tcp = none"]
    lines += ["log.console = true", "log.console.level = error", "log.file = false"]
    lines += [f"management.ssl.port = {web}", "management.ssl.ip = 127.0.0.1"]
    lines += [
        f"{prefix}.{name} = {file}" for prefix in ("management.ssl", "ssl_options") for name, file in pair.items()
    ]
    (folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
    (folder / "plugins").write_text("[rabbitmq_management,rabbitmq_mqtt].\n")
    (folder / "env").touch()
    variables = {
        "HOME": str(folder),
        "ERL_EPMD_PORT": str(names),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"bench{web}@localhost",
        "RABBITMQ_DIST_PORT": str(peers),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "env"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "none.config"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "logs"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
    }
    trust = context(tls / "ca.pem")
    headers = {**_JSON, **_GUEST}
    message = {
        "properties": {"delivery_mode": 2},
        "routing_key": "bench",
        "payload": _PAYLOAD,
        "payload_encoding": "string",
    }
    post = _Post("/api/exchanges/%2F/amq.topic/publish", json.dumps(message), '"routed":true', headers=headers)

    def ready() -> bool:
        return _asks(web, trust, "GET", "/api/overview", headers=_GUEST) == 200

    try:
        with _started([str(_RABBITMQ)], folder, ready, within=90, **variables) as pid:
            queue, binding = '{"durable":true}', '{"routing_key":"#"}'
            made = _asks(web, trust, "PUT", "/api/queues/%2F/bench", queue, headers)
            bound = _asks(web, trust, "POST", "/api/bindings/%2F/e/amq.topic/q/bench", binding, headers)
            if (made, bound) != (201, 201):
                raise _Missing(f"its queue could not be made: {made}, {bound}")
            peer = Peer("RabbitMQ, HTTP publish (confirmed: fsync)", web, tls / "ca.pem", (pid,))
            yield _Broker(peer, post, door, "RabbitMQ, MQTT QoS 1 (confirmed: fsync)")
    finally:
        subprocess.run([epmd, "-port", str(names), "-kill"], capture_output=True, timeout=10, check=False)


@contextlib.contextmanager
def _mosquitto(folder: Path, tls: Path) -> Iterator[_Broker]:
    """A client that is away has subscribed to everything, so that messages are kept."""
    mosquitto, keeper = _needs("mosquitto", "mosquitto_sub", package="mosquitto mosquitto-clients")
    port, plain = free_port(), free_port()
    (folder / "conf").write_text(f"""user root
persistence true
persistence_location {folder}/
max_queued_messages 0
allow_anonymous true
listener {plain} 127.0.0.1
listener {port} 127.0.0.1
certfile {tls}/server-ecdsa.pem
keyfile {tls}/server-ecdsa.key
""")

    def ready() -> bool:
        command = [keeper, "-p", str(plain), "-c", "-i", "keeper", "-q", "1", "-t", "#", "-E"]
        return not subprocess.run(command, capture_output=True, timeout=10, check=False).returncode

    with _started([mosquitto, "-c", str(folder / "conf")], folder, ready) as pid:
        name = "Mosquitto, MQTT QoS 1 (memory, saved now and then)"
        yield _Broker(Peer(name, port, tls / "ca.pem", (pid,)), None, port, name)


@contextlib.contextmanager
def _webdis(folder: Path, tls: Path) -> Iterator[_Broker]:
    redis, webdis = _needs("redis-server", "webdis", package="redis-server webdis")
    port, place = free_port(), folder / "redis.sock"
    config = {
        "redis_host": str(place),
        "http_host": "127.0.0.1",
        "http_port": port,
        "threads": 1,
        "pool_size": 20,
        "daemonize": False,
        "verbosity": 0,
        "logfile": str(folder / "webdis.log"),
    }
    (folder / "webdis.json").write_text(json.dumps(config))
    arguments = [redis, "--port", "0", "--unixsocket", str(place), "--dir", str(folder), "--save", ""]
    arguments += ["--appendonly", "yes", "--appendfsync", "always"]
    store = folder / "redis"
    store.mkdir()
    post = _Post("/", f"RPUSH/bench/{_PAYLOAD}", '"RPUSH":')
    with (
        _started(arguments, store, place.exists) as database,
        _started([webdis, str(folder / "webdis.json")], folder, _posts(port, None, post)) as pid,
    ):
        name = "webdis + Redis, no TLS (appendfsync always: fsync)"
        yield _Broker(Peer(name, port, tls / "ca.pem", (pid, database), tls=False), post)


@contextlib.contextmanager
def _nchan(folder: Path, tls: Path) -> Iterator[_Broker]:
    (nginx,) = _needs("nginx", package="nginx-light")
    if not _NCHAN.exists():
        raise _Missing("the module is not installed; on Debian: apt-get install libnginx-mod-nchan")
    port = free_port()
    (folder / "conf").write_text(f"""
load_module {_NCHAN}; daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 100000000; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port} ssl; ssl_protocols TLSv1.2 TLSv1.3;
    ssl_certificate {tls}/server-ecdsa.pem; ssl_certificate_key {tls}/server-ecdsa.key;
    location = /publish {{ nchan_publisher; nchan_channel_id bench; nchan_message_buffer_length 1000; }}
  }}
}}
""")
    post = _Post("/publish", _PAYLOAD, "queued messages", 202)
    trust = context(tls / "ca.pem")
    arguments = [nginx, "-p", str(folder), "-c", str(folder / "conf")]
    with _started(arguments, folder, _posts(port, trust, post)) as pid:
        yield _Broker(Peer("nchan, newest 1,000 kept (memory)", port, tls / "ca.pem", (pid,)), post)


@contextlib.contextmanager
def _crossbar(folder: Path, tls: Path) -> Iterator[_Broker]:
    binary, port = _crossbar_installed(), free_port()
    role = {"name": "anonymous", "permissions": [{"uri": "", "match": "prefix", "allow": {"publish": True}}]}
    endpoint = {
        "type": "tcp",
        "interface": "127.0.0.1",
        "port": port,
        "tls": {"certificate": f"{tls}/server-ecdsa.pem", "key": f"{tls}/server-ecdsa.key"},
    }
    bridge = {"type": "publisher", "realm": "bench", "role": "anonymous"}
    transport = {"type": "web", "endpoint": endpoint, "paths": {"/": {"type": "json", "value": {}}, "publish": bridge}}
    router = {"type": "router", "realms": [{"name": "bench", "roles": [role]}], "transports": [transport]}
    (folder / "config.json").write_text(json.dumps({"version": 2, "workers": [router]}))
    post = _Post("/publish", json.dumps({"topic": "bench.report", "args": [_PAYLOAD]}), '"id":', headers=_JSON)
    trust = context(tls / "ca.pem")
    arguments = [str(binary), "start", "--cbdir", str(folder)]
    with _started(arguments, folder, _posts(port, trust, post), within=90) as pid:
        yield _Broker(Peer("crossbar, HTTP bridge (memory)", port, tls / "ca.pem", (pid,)), post)


def _crossbar_installed() -> Path:
    """Its program, in a virtual environment of its own: its dependencies would not go with ours."""
    place = _CACHE / "crossbar"
    binary = place / "bin" / "crossbar"
    if not binary.exists():
        shutil.rmtree(place, ignore_errors=True)
        for command in ([sys.executable, "-m", "venv"], [str(place / "bin" / "pip"), "install", "-q", _CROSSBAR]):
            where = [str(place)] if "venv" in command else []
            try:
                done = subprocess.run(
                    [*command, *where], capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False
                )
            except subprocess.TimeoutExpired as error:
                raise _Missing(f"it could not be installed within {_INSTALL_SECONDS} s") from error
            if done.returncode:
                words = [line for line in done.stderr.splitlines() if "ERROR" in line or "error" in line]
                raise _Missing(f"it could not be installed: {words[0][:200] if words else 'pip gave no reason'}")
    return binary


_STARTS: dict[str, Start] = {
    "rabbitmq": _rabbitmq,
    "mosquitto": _mosquitto,
    "webdis": _webdis,
    "nchan": _nchan,
    "crossbar": _crossbar,
}
