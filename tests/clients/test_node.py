"""npm's package mqtt, the usual client of Node.js and of pages: a device, and an application that reads the uplink."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.fleet import SHARED, Login, Thing, ask
from tests.clients.tools import DRIVERS, ROOT, Driver, heard, needs, node_modules

pytestmark = needs("node", "npm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a script finds the package: modules are looked for beside the file that imports them."""
    (tmp_path / "node_modules").symlink_to(node_modules())
    for script in (DRIVERS / "device.mjs", ROOT / "examples" / "read_uplink.mjs"):
        shutil.copy(script, tmp_path)
    return tmp_path


@pytest.fixture
def device(folder: Path, thing: Thing) -> Iterator[Driver]:
    started = Driver(["node", "device.mjs"], cwd=folder)
    yield started
    started.close()


def options(thing: Thing, transport: str, login: Login | None = None) -> dict[str, Any]:
    login = login or thing.login()
    server = thing.server
    return {
        "url": {
            "tls": f"mqtts://localhost:{server.mqtt_port}",
            "plain": f"mqtt://127.0.0.1:{server.mqtt_plain_port}",
            "websockets": f"wss://localhost:{server.port}/mqtt",
        }[transport],
        "ca": str(server.ca),
        "clientId": login.client_id,
        "username": login.username,
        "password": login.password,
        "keepalive": 60,
    }


@pytest.mark.parametrize("transport", ["tls", "plain", "websockets"])
def test_a_node_device_reports_and_hears(device: Driver, thing: Thing, transport: str) -> None:
    """Over each transport; what it was acknowledged is stored."""
    device.do(command="connect", **options(thing, transport), clean=True)
    assert device.event("connect")["sessionPresent"] is False
    device.do(command="subscribe", filter=thing.topic("user/get"), qos=1)
    assert device.event("subscribed")["granted"] == [1]
    device.do(command="publish", topic=thing.topic(), payload="from node", qos=1)
    assert "error" not in device.event("published")
    assert thing.stored_payloads() == [b"from node"]
    thing.send("to node")
    assert device.message() == (thing.topic("user/get"), b"to node")


def test_a_node_device_of_mqtt_3_1_takes_its_session_up_again(device: Driver, thing: Thing) -> None:
    """protocolId MQIsdp; messages wait for its return."""
    old = {"protocolId": "MQIsdp", "protocolVersion": 3, "clean": False}
    device.do(command="connect", **options(thing, "tls"), **old)
    device.event("connect")
    device.do(command="subscribe", filter=thing.topic("user/get"), qos=1)
    assert device.event("subscribed")["granted"] == [1]
    device.do(command="disconnect")
    device.event("close")
    thing.send("meanwhile")
    device.do(command="connect", **options(thing, "tls"), **old)
    assert device.message() == (thing.topic("user/get"), b"meanwhile")


def test_a_node_device_is_told_why_not(device: Driver, thing: Thing) -> None:
    """Return code 4 for a wrong sign; 0x80 for a filter of others; the end for a topic of others."""
    device.do(command="connect", **options(thing, "tls", thing.login(secret="not the secret")))
    assert device.event("error")["code"] == 4
    device.do(command="connect", **options(thing, "websockets"))
    device.event("connect")
    device.do(command="subscribe", filter="#", qos=1)
    assert device.event("subscribed")["granted"] == [128]
    device.do(command="publish", topic="/a1nowhere00/x/user/update", payload="x", qos=1)
    device.event("close")


def test_the_example_reads_the_uplink(folder: Path, thing: Thing) -> None:
    """examples/read_uplink.mjs as it stands: an application hears status and reports of its product's devices."""
    server = thing.server
    app = ask("app", "create", f"node{thing.name}", "--product", thing.product, data=server.data)
    url = f"mqtts://localhost:{server.mqtt_port}"
    wanted = f"{thing.topic(SHARED)} a report over HTTPS"
    printed = heard(
        ["node", "read_uplink.mjs", url, app["key"], app["secret"], thing.product],
        wanted,
        lambda: thing.report((SHARED, b"a report over HTTPS")),
        cwd=folder,
        NODE_EXTRA_CA_CERTS=str(server.ca),
    )
    assert f"{wanted}\n" in printed
