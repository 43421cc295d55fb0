"""A whole cluster: three nats-servers, each in a network of its own where that may be made, PostgreSQL with a replica, two gateways
and HAProxy.

It is the one that examples/cluster.py starts, from the files in deploy/cluster.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from examples.cluster import GATEWAYS, NODES, Cluster, find_postgresql

from tests.house import Server


class Networks:
    """A network of its own for each of the three nats-servers, joined by a bridge to this one's."""

    def __init__(self) -> None:
        number = os.getpid() % 12_000
        self._tag = f"upl{number}"
        self._prefix = f"10.{200 + number // 250}.{number % 250}"
        self.hosts = [f"{self._prefix}.{node}" for node in NODES]

    def open(self) -> bool:
        """Whether that could be done: it takes root."""
        if not shutil.which("ip") or os.geteuid():
            return False
        bridge = f"{self._tag}b"
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("addr", "add", f"{self._prefix}.254/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            for node in NODES:
                space = f"{self._tag}-{node}"
                _ip("netns", "add", space)
                _ip("link", "add", f"{self._tag}v{node}", "type", "veth", "peer", "name", "eth0", "netns", space)
                _ip("link", "set", f"{self._tag}v{node}", "master", bridge, "up")
                _ip("-n", space, "addr", "add", f"{self._prefix}.{node}/24", "dev", "eth0")
                _ip("-n", space, "link", "set", "eth0", "up")
                _ip("-n", space, "link", "set", "lo", "up")
        except subprocess.CalledProcessError:
            self.close()
            return False
        return True

    def close(self) -> None:
        for arguments in [
            *(("netns", "del", f"{self._tag}-{node}") for node in NODES),
            ("link", "del", f"{self._tag}b"),
        ]:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*arguments)

    def within(self, node: int) -> list[str]:
        return ["ip", "netns", "exec", f"{self._tag}-{node}"]

    def part(self, node: int) -> None:
        """From now on each packet to and from the node is lost."""
        _ip("link", "set", f"{self._tag}v{node}", "nomaster")

    def heal(self, node: int) -> None:
        _ip("link", "set", f"{self._tag}v{node}", "master", f"{self._tag}b")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


@dataclass
class Entrance(Server):
    """Where devices come in: a gateway's doors, or HAProxy's."""

    authority: Path = Path()

    @property
    def ca(self) -> Path:
        return self.authority

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.authority))


@dataclass
class Plant:
    """The cluster and its entrances."""

    cluster: Cluster
    networks: Networks | None

    @property
    def data(self) -> Path:
        """Of the first gateway: where commands are given."""
        return self.cluster.folder / "gateway-1"

    def gateway(self, number: int) -> Entrance:
        return self._entrance(f"https-{number}", f"mqtt-{number}")

    @property
    def front(self) -> Entrance:
        """HAProxy."""
        return self._entrance("https", "mqtt")

    def _entrance(self, https: str, mqtt: str) -> Entrance:
        ports = self.cluster.ports
        return Entrance(self.data, port=ports[https], mqtt_port=ports[mqtt], authority=self.cluster.ca)

    def console(self, number: int) -> str:
        return f"http://127.0.0.1:{self.cluster.ports[f'console-{number}']}"

    def database(self, number: int) -> str:
        """The URL of one of the two databases alone."""
        password, port = self.cluster.secrets["database"], self.cluster.ports[f"database-{number}"]
        return f"postgresql://uplinkd:{password}@127.0.0.1:{port}/uplinkd"


@pytest.fixture(scope="session")
def plant() -> Iterator[Plant]:
    if not find_postgresql():
        pytest.skip("PostgreSQL's server programs are not installed")
    networks: Networks | None = Networks()
    assert networks
    if not networks.open():
        networks = None
    limits = {"device_bytes": "0", "auth_rate": "0", "device_rate": "0"}
    folder = tempfile.TemporaryDirectory(prefix="uplinkd-plant-")
    Path(folder.name).chmod(0o711)  # root's PostgreSQL runs as another user
    try:
        cluster = Cluster(
            Path(folder.name) / "plant",
            hosts=networks.hosts if networks else ["127.0.0.1"] * 3,
            within=networks.within if networks else lambda _: [],
            settings=limits,
        )
        try:
            cluster.start()
            yield Plant(cluster, networks)
        finally:
            cluster.stop()
    finally:
        folder.cleanup()
        if networks:
            networks.close()


__all__ = ["GATEWAYS", "NODES", "Entrance", "Plant"]
