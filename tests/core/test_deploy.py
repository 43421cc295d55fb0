"""The files of deploy/ fit the program: what a service manager, a container and a proxy rely on."""

from __future__ import annotations

import http.server
import os
import re
import runpy
import shutil
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs.licences import ROOT

from uplinkd.settings import Settings
from uplinkd.tls import CIPHERS, LEGACY_CIPHERS
from uplinkd.worker import _CLOSING_SECONDS, DRAIN_SECONDS

UNIT = ROOT / "deploy/systemd/uplinkd.service"
CONTAINER = ROOT / "deploy/container"
CLUSTER = ROOT / "deploy/cluster"


def directives() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_stops_the_server_in_order() -> None:
    """Only the supervisor is told, and nobody is killed before it has had the time that it takes at most, with nats-server's 5 s."""
    unit = directives()
    assert unit["KillMode"] == ["mixed"]
    assert int(unit["TimeoutStopSec"][0]) > DRAIN_SECONDS + _CLOSING_SECONDS + 5
    assert (unit["LimitCORE"], unit["OOMPolicy"], unit["NoNewPrivileges"]) == (["0"], ["continue"], ["yes"])
    assert int(unit["LimitNOFILE"][0]) > Settings().max_connections


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """Each directive and value; the program itself need not be there."""
    here = tmp_path / "uplinkd.service"
    here.write_text(re.sub("(?m)^ExecStart=.*", "ExecStart=/bin/true", UNIT.read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(here)], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_is_made_of_what_is_there() -> None:
    """What is copied exists and is not kept out; whoever runs in it is not root, and each setting is one."""
    text = (CONTAINER / "Containerfile").read_text()
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for sources in re.findall(r"(?m)^COPY (?!--from)(.*) \S+$", text):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert any(source == each or source.startswith(f"{each}/") for each in let_in), source
    assert text.count("--require-hashes") == 2
    assert re.search(r"(?m)^USER 10001:10001$", text)
    for name in re.findall(r"UPLINKD_([A-Z_]+)=", text):
        assert name.lower() in Settings.model_fields


@pytest.fixture
def console() -> Iterator[http.server.HTTPServer]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503 if self.path != "/readyz" or getattr(self.server, "ill", False) else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_health_check_asks_whether_devices_are_served(
    console: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ready: quiet. Not ready, or nobody there: an error."""
    check = runpy.run_path(str(CONTAINER / "healthcheck.py"))["main"]
    monkeypatch.setenv("UPLINKD_CONSOLE_LISTEN", f"0.0.0.0:{console.server_port}")
    check()
    console.ill = True  # type: ignore[attr-defined]  # the handler asks for it
    with pytest.raises(OSError, match="503"):
        check()
    monkeypatch.setenv("UPLINKD_CONSOLE_LISTEN", "")
    monkeypatch.setenv("UPLINKD_LISTEN", "127.0.0.1:1")
    with pytest.raises(ConnectionRefusedError):
        check()


@pytest.mark.parametrize("name", ["nginx.conf", "haproxy.cfg"])
def test_a_proxy_offers_the_suites_that_devices_need(name: str) -> None:
    """Those of uplinkd's own door, in its order."""
    assert f"{CIPHERS}:{LEGACY_CIPHERS}" in (ROOT / "deploy/proxy" / name).read_text()


def test_the_files_of_a_cluster_name_what_its_environment_has() -> None:
    """Each variable has an example, none is left over, and what all gateways share are settings."""
    named = set()
    for file in CLUSTER.iterdir():
        lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
        if file.suffix in (".conf", ".cfg"):
            named |= set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", "\n".join(lines)))
    known = set(re.findall(r"(?m)^([A-Z0-9_]+)=", (CLUSTER / "cluster.env").read_text()))
    assert {name for name in known if not name.startswith("UPLINKD_")} == named
    assert {name.removeprefix("UPLINKD_").lower() for name in known - named} <= set(Settings.model_fields)
    settings = tomllib.loads((CLUSTER / "gateway.toml").read_text())
    assert Settings(**settings, nats_url="nats://a,b,c").replicas == 3


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed")
def test_haproxy_understands_the_clusters_file() -> None:
    variables = dict(re.findall(r"(?m)^([A-Z0-9_]+)=(.*)$", (CLUSTER / "cluster.env").read_text()))
    here = {name: re.sub("^gateway-.", "127.0.0.1", value) for name, value in variables.items() if "GATEWAY_" in name}
    command = ["haproxy", "-c", "-f", str(CLUSTER / "haproxy.cfg")]
    done = subprocess.run(command, env={**os.environ, **variables, **here}, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def test_no_server_of_the_cluster_differs_from_the_others_but_by_its_number() -> None:
    one, two, three = (
        re.sub(rf"NATS_{n}_|nats-{n}\b", "N", (CLUSTER / f"nats-{n}.conf").read_text()) for n in (1, 2, 3)
    )
    routes = re.compile(r"routes: \[.*\]")
    assert routes.sub("", one) == routes.sub("", two) == routes.sub("", three)
