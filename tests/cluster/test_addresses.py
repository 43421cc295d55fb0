"""Who stands behind HAProxy: each device with its own address, at every gateway."""

from __future__ import annotations

import shutil
import time

import pytest

from tests.clients.stranger import ask_https, ask_mqtt
from tests.cluster.conftest import GATEWAYS, Plant
from tests.house import cli_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
    pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed"),
]


def test_clients_behind_haproxy_are_seen_with_their_own_addresses(plant: Plant) -> None:
    """In `uplinkd logs`, over HTTPS and MQTT; the checks, five times a second, are no line in any log."""
    front, sources = plant.front, ["127.0.0.31", "127.0.0.32"]
    for source in sources:
        assert ask_https(front.port, "behind", source, front.context())
        assert ask_mqtt(front.mqtt_port, "behind", source, front.context())
    wanted = sorted((source, door) for source in sources for door in ("auth", "mqtt"))
    end = time.monotonic() + 10
    while True:
        records = cli_json("logs", "--product", "behind", data=plant.data)
        found = sorted((each["address"], each["endpoint"]) for each in records)
        if found == wanted:
            break
        assert time.monotonic() < end, found
        time.sleep(0.2)
    for number in GATEWAYS:
        assert "PROXY header" not in plant.cluster.log(f"gateway-{number}").read_text()


def test_who_comes_to_a_gateway_itself_needs_no_header(plant: Plant) -> None:
    """Commands on its machine, for example: only HAProxy's address is believed, and asked for it."""
    for number in GATEWAYS:
        gateway = plant.gateway(number)
        assert ask_https(gateway.port, f"direct-{number}", "127.0.0.33", gateway.context())
