"""A worker without sockets, at whose doors both kinds of devices stand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.house import Device, Server, make_devices, serving
from tests.http.conftest import House as HttpHouse
from tests.mqtt.conftest import House as MqttHouse
from tests.room import open_room
from uplinkd.settings import Settings


class House(HttpHouse, MqttHouse):
    """It takes devices over HTTP and over MQTT."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path)


@pytest.fixture
async def house(settings: Settings) -> AsyncIterator[House]:
    async with open_room(settings, House) as house:
        yield house


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One worker with short patience, and no limits but those of its doors."""
    options = ["--workers", "1", "--head-timeout", "2", "--body-timeout", "2", "--device-rate", "0", "--auth-rate", "0"]
    with serving(tmp_path_factory.mktemp("abuse") / "data", *options, "--max-handshakes", "32") as server:
        yield server


@pytest.fixture(scope="package")
def device(server: Server) -> Device:
    return make_devices(server, 1)[0]
