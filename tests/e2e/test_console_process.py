"""The console as a process beside the workers: it dies alone, stops with the others, and tells orchestrators how things stand."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.house import Server, alive, cli_json, environment, freeze, make_devices, until

pytestmark = pytest.mark.xdist_group("console")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path / "data", console_port=0, options=("--workers", "1")).start()
    try:
        yield started
    finally:
        if started.process and started.process.poll() is None:
            started.kill()


def url(server: Server, path: str) -> str:
    return f"http://127.0.0.1:{server.console_port}{path}"


def console_pid(server: Server) -> int:
    """The process that holds the console's port."""
    wanted = f"{server.console_port:04X}"
    inodes = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{wanted}") and line.split()[3] == "0A"
    }
    holders = [
        pid
        for pid in server.children("")
        if inodes & {os.readlink(fd)[8:-1] for fd in Path(f"/proc/{pid}/fd").iterdir() if "socket:" in os.readlink(fd)}
    ]
    assert len(holders) == 1, holders
    return holders[0]


@pytest.mark.slow
async def test_a_console_comes_back_with_the_certificate_that_was_there_while_another_does_not_fit(
    tmp_path: Path,
) -> None:
    """A certificate whose key was not replaced yet is left alone, by a process that is started anew as by those that run."""
    server = Server(tmp_path / "data", console_port=0, options=("--console-tls", "true", "--workers", "1")).start()

    trusted = ssl.create_default_context(cafile=str(server.ca))

    def answers() -> bool:
        try:
            return httpx.get(f"https://127.0.0.1:{server.console_port}/healthz", verify=trusted).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        tls = server.data / "tls"
        (tls / "server-rsa.key").write_bytes((tls / "ca.key").read_bytes())
        os.kill(server.children("uplinkd-console")[0], signal.SIGKILL)
        await until(lambda: "the console was killed by SIGKILL" in server.log.read_text())
        await until(answers, 15)
        assert "Traceback" not in server.log.read_text()
        assert server.stop() == 0
    finally:
        if server.process and server.process.poll() is None:
            server.kill()


@pytest.mark.slow
async def test_a_killed_console_comes_back_and_no_device_notices(server: Server) -> None:
    """Its port is held open meanwhile; who had signed in is signed in."""
    (device,) = make_devices(server, 1)
    assert await device.login() == 0
    pid = console_pid(server)
    os.kill(pid, signal.SIGKILL)
    for _ in range(20):
        assert (await device.publish(b"x"))[0] == 0
    await until(lambda: not alive(pid))

    def answers() -> bool:
        try:
            return httpx.get(url(server, "/healthz"), timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    await until(answers, 15)
    assert "the console was killed by SIGKILL; it is started again" in server.log.read_text()
    await device.close()
    assert server.stop() == 0


@pytest.mark.slow
async def test_metrics_and_readiness_tell_what_happens(server: Server) -> None:
    """Prometheus' counters rise with what devices do; without its engine the server is not ready, and with it again it is."""
    (device,) = make_devices(server, 1)
    assert await device.login() == 0
    for _ in range(5):
        assert (await device.publish(b"12345"))[0] == 0
    assert (await device.publish(b"x", "user/nope"))[0] == 30001
    await asyncio.sleep(0.6)
    text = httpx.get(url(server, "/metrics"), timeout=30).text
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["uplinkd_requests_total", "0", "topic"] == 5
    assert samples["uplinkd_requests_total", "30001", "topic"] == 1
    assert samples["uplinkd_requests_total", "0", "auth"] == 1
    assert samples["uplinkd_connections", "https"] == 1
    assert samples["uplinkd_payload_bytes_total",] >= 25
    assert samples["uplinkd_engine_connected",] == 1
    assert samples["uplinkd_devices", "online"] == 1
    assert samples["uplinkd_messages_stored",] >= 5
    assert httpx.get(url(server, "/readyz")).json()["status"] == "ok"

    (nats,) = server.children("nats-server")
    freeze(nats)
    away = httpx.get(url(server, "/readyz"), timeout=10)
    assert (away.status_code, away.json()["checks"]["registry"]) == (503, "ok")
    assert away.json()["checks"]["engine"] != "ok"
    os.kill(nats, signal.SIGCONT)
    await until(lambda: httpx.get(url(server, "/readyz"), timeout=10).status_code == 200, 20)
    await device.close()
    assert server.stop() == 0


@pytest.mark.slow
async def test_an_open_stream_does_not_hold_up_the_end(server: Server) -> None:
    """A browser that watches is let go; the whole stops within a few seconds, with no orphan."""
    key = cli_json("apikey", "create", "watcher", "--scope", "read", data=server.data)["key"]
    command = ["curl", "-sN", "-H", f"Authorization: Bearer {key}", url(server, "/api/v1/messages/stream")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as watcher:
        await asyncio.sleep(0.5)
        processes = server.children("")
        begun = time.monotonic()
        assert server.stop(within=12) == 0
        assert time.monotonic() - begun < 9
        assert not [pid for pid in processes if alive(pid)]
        watcher.terminate()


@pytest.mark.slow
def test_the_console_speaks_https_where_it_is_asked_to(tmp_path: Path) -> None:
    """With the certificate of the devices' door; its cookie is for HTTPS alone, and browsers are told to stay."""
    server = Server(tmp_path / "data", console_port=0, options=("--console-tls", "true", "--workers", "1")).start()
    try:
        base = f"https://127.0.0.1:{server.console_port}"
        assert f"console   {base}" in server.banner
        with httpx.Client(base_url=base, verify=server.context()) as client:
            page = client.get("/sign-in")
            assert page.headers["Strict-Transport-Security"] == "max-age=31536000"
            password = server.banner.split("one-time password ")[1].split()[0]
            answer = client.post("/sign-in", data={"name": "admin", "password": password})
            assert "Secure" in answer.headers["Set-Cookie"]
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--console-listen", "0.0.0.0:0"), "passwords would cross the network in clear: add --console-tls true"),
        (("--console-listen", "127.0.0.1:{taken}"), "is in use by another program; name another with --console-listen"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    """And nothing is left running."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        given = [option.format(taken=other.getsockname()[1]) for option in options]
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "uplinkd",
                    "serve",
                    "--data",
                    str(tmp_path / "data"),
                    "--listen",
                    "127.0.0.1:0",
                ),
                *("--mqtt-listen", "", "--nats-listen", "", *given),
            ],
            capture_output=True,
            text=True,
            timeout=30,
            env=environment(),
            check=False,
        )
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_start_without_a_console_has_none(tmp_path: Path) -> None:
    """console_listen empty: no process, no user made."""
    server = Server(tmp_path / "data", options=("--workers", "1")).start()
    try:
        assert "  console  " not in server.banner
        assert cli_json("user", "list", data=server.data) == []
        assert server.children("uplinkd-console") == []
    finally:
        server.stop()
