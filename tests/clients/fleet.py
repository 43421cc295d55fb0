"""A running server with a product full of devices, and what the operator asks and sends by the command line."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.house import Server, cli, cli_json, login_body

__all__ = ["Fleet", "Login", "Thing", "ask", "make_fleet", "until"]

SHARED = "shared"  # the levels of a class with both rights


def ask(*arguments: str, data: Path, check: bool = True) -> Any:
    """The JSON document that a command prints, if any."""
    done = cli(*arguments, "--json", data=data, check=check)
    return json.loads(done.stdout) if done.stdout else None


def until(holds: Callable[[], bool], within: float = 5) -> bool:
    """Whether `holds()` comes true within the time."""
    end = time.monotonic() + within
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@dataclass(frozen=True)
class Login:
    """What a CONNECT says."""

    client_id: str
    username: str
    password: str


@dataclass(frozen=True)
class Thing:
    """One device, and what it may do over HTTPS."""

    server: Server
    product: str
    name: str
    secret: str

    def topic(self, levels: str = "user/update") -> str:
        return f"/{self.product}/{self.name}/{levels}"

    def login(
        self, method: str = "hmacsha1", *, secret: str = "", timestamp: str = "", client_id: str = "", more: str = ""
    ) -> Login:
        """Signed as the platform's page tells, in this file's own words: the server's code is what is being tested."""
        client_id = client_id or f"{self.product}.{self.name}"
        content = f"clientId{client_id}deviceName{self.name}productKey{self.product}"
        content += f"timestamp{timestamp}" if timestamp else ""
        sign = hmac.new((secret or self.secret).encode(), content.encode(), getattr(hashlib, method[4:])).hexdigest()
        parameters = f"securemode=2,signmethod={method}" + (f",timestamp={timestamp}" if timestamp else "") + more
        return Login(f"{client_id}|{parameters}|", f"{self.name}&{self.product}", sign)

    def report(self, *reports: tuple[str, bytes]) -> list[dict[str, Any]]:
        """Sign in over HTTPS and publish (levels, payload) each; give what each answer's `info` says."""
        told = []
        context = self.server.context()
        connection = http.client.HTTPSConnection("localhost", self.server.port, timeout=10, context=context)
        try:
            body = login_body(self.product, self.name, self.secret)
            token = _post(connection, "/auth", body, {"Content-Type": "application/json"})["token"]
            headers = {"password": str(token), "Content-Type": "application/octet-stream"}
            for levels, payload in reports:
                told.append(_post(connection, f"/topic{self.topic(levels)}", payload, headers))
        finally:
            connection.close()
        return told

    def shown(self) -> dict[str, Any]:
        """What `device show` says."""
        found: dict[str, Any] = ask("device", "show", self.product, self.name, data=self.server.data)
        return found

    def shows(self, **wanted: Any) -> bool:
        """Whether `device show` comes to say so."""
        return until(lambda: self.shown() | wanted == self.shown(), within=4)

    def stored(self) -> list[dict[str, Any]]:
        """What it has reported, and its status, the oldest first; `payload` as bytes."""
        own = ("--product", self.product, "--device", self.name)
        rows = ask("messages", "list", *own, "--limit", "1000", data=self.server.data)
        return [row | {"payload": base64.b64decode(row["payload"])} for row in rows if row["origin"] != "lifecycle"]

    def stored_payloads(self, origin: str = "mqtt") -> list[bytes]:
        return [row["payload"] for row in self.stored() if row["origin"] == origin]

    def send(self, payload: str, levels: str = "user/get") -> None:
        """`uplinkd send` to it."""
        self.send_to(self.topic(levels), payload)

    def send_to(self, topic: str, payload: str) -> None:
        ask("send", self.product, self.name, topic, payload, data=self.server.data)

    def refusals(self) -> list[dict[str, Any]]:
        """What `uplinkd logs` says of its MQTT sessions."""
        rows = ask("logs", "--product", self.product, "--device", self.name, data=self.server.data)
        return [row for row in rows if row["endpoint"] == "mqtt"]

    def change(self, command: str) -> None:
        """`uplinkd device COMMAND` on it."""
        ask("device", command, self.product, self.name, data=self.server.data)


def _post(connection: http.client.HTTPSConnection, path: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
    connection.request("POST", path, body, headers)
    answer = json.loads(connection.getresponse().read())
    assert answer["code"] == 0, answer
    info: dict[str, Any] = answer["info"]
    return info


@dataclass
class Fleet:
    """A server and the devices of one product on it; each test takes devices that no other test has."""

    server: Server
    product: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def take(self) -> Thing:
        number = next(self._numbers)
        return Thing(self.server, self.product, f"device{number:04}", f"secret{number}")


def make_fleet(server: Server, count: int, name: str = "fleet") -> Fleet:
    """A product with `count` devices and, beside the topic classes of every product, `shared` with both rights."""
    assert server.mqtt_port, f"the banner names no mqtts:// port:\n{server.banner}"
    product = cli_json("product", "create", name, data=server.data)["productKey"]
    cli("topic", "add", product, SHARED, "--right", "both", data=server.data)
    file = server.data.parent / f"{name}.csv"
    rows = "".join(f"{product},device{number:04},secret{number}\n" for number in range(count))
    file.write_text("ProductKey,DeviceName,DeviceSecret\n" + rows)
    cli("device", "import", str(file), data=server.data)
    return Fleet(server, product)
