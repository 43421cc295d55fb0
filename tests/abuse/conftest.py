"""A worker without sockets, at whose doors both kinds of devices stand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

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
