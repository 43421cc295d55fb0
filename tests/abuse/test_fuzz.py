"""Good input, damaged in any way and cut anywhere: a moment of each kind in the fast suite, a minute of all in the slow one.

Whatever comes, the answers are well-formed, nothing is a fault of ours, nobody is taken for a device without its secret, and the
door goes on.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st

from tests.abuse.conftest import House
from tests.clients.packets import PINGREQ, connect, publish, subscribe
from tests.http.conftest import login_body, login_request, publish_request, request
from tests.mqtt.conftest import login, packets_of
from tests.mqtt.test_websocket import Browser, frame, handshake
from tests.room import DEVICE, PRODUCT, open_room
from uplinkd.core.errors import Code
from uplinkd.settings import Settings

JSON = "Content-Type: application/json"
TOPIC = f"/{PRODUCT}/{DEVICE}/user/update"
# What parsers stumble over.
ODD = [
    b"\r\n",
    b"\r",
    b"\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b",",
    b"0",
    b"-1",
    b"chunked",
    b"Content-Length: 1\r\n",
    b"\xff",
    b"\x80",
]


def damaged(data: st.DataObject, raw: bytes) -> bytes:
    """`raw` after some accidents."""
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(start, min(len(raw), start + 20)))
        put = data.draw(st.sampled_from([*ODD, raw[start:end] * 2]) | st.binary(max_size=6))
        raw = raw[:start] + put + raw[end:]
    return raw


def pieces(data: st.DataObject, raw: bytes) -> list[bytes]:
    cuts = sorted({0, len(raw), *data.draw(st.lists(st.integers(0, len(raw)), max_size=5))})
    return [raw[start:end] for start, end in itertools.pairwise(cuts)]


async def http(house: House, data: st.DataObject) -> None:
    """Streams of requests."""
    token = await house.token()
    chunked = (
        request(f"/topic{TOPIC}", b"", "Transfer-Encoding: chunked", f"password: {token}")
        + b"3;a\r\nabc\r\n0\r\nA: b\r\n\r\n"
    )
    good = [login_request(), publish_request(token), chunked, request("/auth", b"", method="GET"), handshake()]
    raw = b"".join(data.draw(st.lists(st.sampled_from(good), min_size=1, max_size=4)))
    peer = house.connect()
    for piece in pieces(data, damaged(data, raw)):
        peer.send(piece)
    await peer.replies()
    house.later(40)
    house.later(40)
    await peer.replies()
    assert peer.transport.closed or peer.connection._stage == 0


async def bodies(house: House, data: st.DataObject) -> None:
    """What is sent to sign in: any JSON, and right bodies that are damaged."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=9), some, max_size=3),
        max_leaves=5,
    )
    members: dict[str, object] = dict(login_body())
    for name in data.draw(st.lists(st.sampled_from(sorted(members)), max_size=3)):
        members[name] = data.draw(anything)
    body = json.dumps(members).encode()
    if data.draw(st.booleans()):
        body = damaged(data, body)
    answer = await house.connect().ask(request("/auth", body, JSON))
    assert answer.status == 200


async def tokens(house: House, data: st.DataObject) -> None:
    """No other token than the one that was given lets anybody in."""
    good = await house.token()
    token = damaged(data, good.encode()).decode("latin-1")
    if any(each in token for each in "\r\n\0"):
        token = data.draw(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=90))
    raw = publish_request("TOKEN").replace(b"TOKEN", token.encode("latin-1"))
    peer = house.connect()
    peer.send(raw)
    for answer in await peer.replies():
        assert answer.code != 0 or token.strip(" \t") == good


async def signs(house: House, data: st.DataObject) -> None:
    """No other sign than the right one does."""
    method = data.draw(st.sampled_from(["hmacmd5", "hmacsha1", "hmacsha256"]))
    members = login_body(method=method)
    good = str(members["sign"])
    sign = damaged(data, good.encode()).decode("latin-1")
    answer = await house.connect().ask(request("/auth", json.dumps({**members, "sign": sign}).encode(), JSON))
    assert (answer.code == 0) <= (sign.lower() == good.lower())


async def mqtt(house: House, data: st.DataObject) -> None:
    """Packets, whole sessions of them."""
    good = [connect(login(), 60), publish(TOPIC, b"x", number=1), subscribe(f"/{PRODUCT}/{DEVICE}/user/get"), PINGREQ]
    raw = b"".join([good[0], *data.draw(st.lists(st.sampled_from(good[1:]), max_size=4))])
    client = house.client()
    for piece in pieces(data, damaged(data, raw)):
        client.send(piece)
    await client.heard()
    client.lose()
    packets_of(b"".join(client.transport.writes))


async def websocket(house: House, data: st.DataObject) -> None:
    """The handshake, and frames with packets in them."""
    good = [frame(connect(login(), 60)), frame(PINGREQ), frame(b"", 9), frame(publish(TOPIC, b"x", number=1))]
    raw = handshake() + damaged(data, b"".join(data.draw(st.lists(st.sampled_from(good), max_size=4))))
    browser = Browser(house)
    for piece in pieces(data, raw):
        browser.send(piece)
    await browser.quiet()
    browser.transport.protocol.connection_lost(None)


Target = Callable[[House, st.DataObject], Awaitable[None]]
TARGETS: list[Target] = [http, bodies, tokens, signs, mqtt, websocket]


def fuzz(folder: Path, target: Target, seconds: float, examples: int) -> None:
    with asyncio.Runner() as runner:
        limits = Settings(data=folder, device_rate=0, device_bytes=0, auth_rate=0, address_auth_rate=0)
        room = open_room(limits, House)
        house = runner.run(room.__aenter__())

        async def once(data: st.DataObject) -> None:
            await target(house, data)
            assert not [each.reason for each in house.outcomes if each.code is Code.COMMON_ERROR]
            house.outcomes.clear()

        @profile(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(data=st.data())
        def run(data: st.DataObject) -> None:
            runner.run(once(data))

        end = time.monotonic() + seconds
        try:
            while True:
                run()
                if time.monotonic() > end:
                    break

            async def good() -> int:
                return (await house.connect().ask(login_request())).code

            assert runner.run(good()) == 0
        finally:
            runner.run(room.__aexit__(None, None, None))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_damaged_input_does_no_harm(tmp_path: Path, target: Target) -> None:
    """A handful of each kind."""
    fuzz(tmp_path, target, 0.1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_much_damaged_input_does_no_harm(tmp_path: Path, target: Target) -> None:
    """A minute for all kinds together."""
    fuzz(tmp_path, target, 10, 200)
