"""What the HTTPS door counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.http.conftest import House, login_request, publish_request, request
from uplinkd.metrics import Metrics, Reading


@pytest.fixture
def metrics(house: House) -> Iterator[Metrics]:
    made = Metrics(1)
    house.door.meter = made.meter(0)
    yield made
    made.close()


def read(house: House, metrics: Metrics) -> Reading:
    house.door.meter.flush()
    return metrics.read()


def some(reading: Reading) -> dict[tuple[str, int], int]:
    """Those that there were."""
    return {pair: count for pair, count in reading.requests.items() if count}


async def test_each_answer_is_counted_once_with_its_code(house: House, metrics: Metrics) -> None:
    """Success or not; and so is its time."""
    peer = house.connect()
    token = (await peer.ask(login_request())).json["info"]["token"]
    for _ in range(3):
        await peer.ask(publish_request(token))
    await peer.ask(publish_request("wrong"))
    await peer.ask(publish_request(token, topic="/other/d/user/update"))
    await peer.ask(login_request(secret="wrong"))
    reading = read(house, metrics)
    assert some(reading) == {
        ("auth", 0): 1,
        ("auth", 20000): 1,
        ("topic", 0): 3,
        ("topic", 20003): 1,
        ("topic", 30001): 1,
    }
    assert reading.latency["topic"].count == 5
    assert reading.latency["auth"].count == 2
    assert 0 < reading.latency["topic"].sum < 5
    assert reading.accepted["https"] == 1


async def test_what_is_no_request_of_the_protocol_is_counted_as_http(house: House, metrics: Metrics) -> None:
    """A wrong path, a wrong method, malformed bytes: code 10001, as the answer says."""
    await house.connect().ask(request("/nowhere", b""))
    await house.connect().ask(request("/auth", b"", method="PUT"))
    await house.connect().ask(b"\x00\x01\r\n\r\n")
    assert some(read(house, metrics)) == {("http", 10001): 3}


async def test_a_message_whose_device_has_gone_is_counted(house: House, metrics: Metrics) -> None:
    """It is stored all the same."""
    token = await house.token()
    peer = house.connect()
    peer.send(publish_request(token))
    peer.connection.connection_lost(None)
    await peer.replies()
    assert read(house, metrics).requests["topic", 0] == 1
