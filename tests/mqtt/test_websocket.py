"""MQTT over WebSocket, at the port of HTTPS: from the handshake to the goodbye, in bytes."""

from __future__ import annotations

import asyncio
import base64
import functools
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.clients.packets import PINGREQ, connect, subscribe
from tests.http.conftest import Reply, login_request, replies
from tests.mqtt.conftest import CONNACK, House, login, packets_of
from tests.room import DEVICE, PRODUCT, Transport, settled
from uplinkd.http.protocol import Connection
from uplinkd.mqtt.session import Connection as MqttConnection
from uplinkd.mqtt.websocket import WebSocket
from uplinkd.settings import Settings
from uplinkd.tasks import Turns

BINARY, TEXT, CLOSE, PING, PONG, CONTINUED = 2, 1, 8, 9, 10, 0


def handshake(*more: str, path: str = "/mqtt", protocol: str = "mqtt") -> bytes:
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}",
        "Sec-WebSocket-Version: 13",
        *([f"Sec-WebSocket-Protocol: {protocol}"] if protocol else []),
        *more,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def frame(payload: bytes, kind: int = BINARY, *, last: bool = True, masked: bool = True) -> bytes:
    """A client's frame, by RFC 6455, 5.2."""
    first = bytes([last << 7 | kind])
    size = len(payload)
    length = bytes([masked << 7 | size]) if size < 126 else bytes([masked << 7 | 126]) + size.to_bytes(2)
    mask = os.urandom(4) if masked else b""
    body = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload)) if masked else payload
    return first + length + mask + body


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """(kind, payload) of each frame of the server's, none of them masked or split."""
    found = []
    while data:
        assert data[0] & 0xF0 == 0x80
        size, start = data[1], 2
        if size == 126:
            size, start = int.from_bytes(data[2:4]), 4
        assert len(data) >= start + size
        found.append((data[0] & 15, data[start : start + size]))
        data = data[start + size :]
    return found


class Browser:
    """A client at the door of HTTPS."""

    def __init__(self, house: House) -> None:
        self.house = house
        house.door.websocket = lambda *_: WebSocket(self._make)
        self._inner: MqttConnection | None = None
        self.transport = _Switchable("192.0.2.9")
        self.transport.protocol = Connection(house.door)
        self.transport.protocol.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        self.transport.protocol.data_received(data)

    def _make(self) -> MqttConnection:
        self._inner = MqttConnection(self.house.mqtt)
        return self._inner

    async def quiet(self) -> None:
        """Nothing is under way any more."""
        for _ in range(200):
            await settled(20)
            if not self.house.mqtt.tasks and not self.house.door.tasks and not (self._inner and self._inner.under_way):
                break
            await asyncio.sleep(0.003)

    async def closed(self) -> bool:
        """Whether the server closes the connection; after a refusal HTTPS leaves the client the time to read it."""
        await self.quiet()
        if not self.transport.closed:
            self.house.later(self.house.door.limits.linger + 1)
        return self.transport.closed

    async def heard(self) -> tuple[Reply | None, list[tuple[int, bytes]]]:
        """The answer to the handshake (or to whatever it was), and the frames that followed it."""
        await self.quiet()
        data = b"".join(self.transport.writes)
        head, _, rest = data.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101"):
            found = replies(data)
            assert len(found) <= 1
            return (found[0] if found else None), []
        lines = head.decode().split("\r\n")[1:]
        return Reply(
            101, "", {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}, b""
        ), frames(rest)

    async def packets(self) -> list[bytes]:
        """What came as MQTT, in binary frames alone."""
        _, found = await self.heard()
        return packets_of(b"".join(payload for kind, payload in found if kind == BINARY))


class _Switchable(Transport):
    protocol: asyncio.Protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self.protocol = protocol


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path, auth_rate=0)


@pytest.fixture
async def browser(house: House) -> AsyncIterator[Browser]:
    browser = Browser(house)
    yield browser
    browser.transport.protocol.connection_lost(None)


@pytest.mark.parametrize("name", ["mqtt", "mqttv3.1"])
async def test_a_client_shakes_hands_and_speaks_mqtt(browser: Browser, name: str) -> None:
    """The subprotocol that it asked for is granted; packets go in binary frames both ways."""
    browser.send(handshake(protocol=name))
    answer, _ = await browser.heard()
    assert answer
    assert (answer.status, answer.headers["sec-websocket-protocol"]) == (101, name)
    assert answer.headers["sec-websocket-accept"] == "ICX+Yqv66kxgM0FcWaLWlFLwTAI="  # of sixteen zeros
    browser.send(frame(connect(login())))
    assert await browser.packets() == [CONNACK]
    browser.send(frame(PINGREQ))
    assert await browser.packets() == [CONNACK, b"\xd0\x00"]


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 700), max_size=6))
async def test_split_anywhere_it_is_the_same(house: House, cuts: list[int]) -> None:
    """Handshake, frames and packets, in as many pieces as the network likes; the first packet may come with the handshake."""
    whole = handshake() + frame(connect(login())) + frame(subscribe(f"/{PRODUCT}/{DEVICE}/user/get") + PINGREQ)
    browser = Browser(house)
    marks = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    for start, end in itertools.pairwise(marks):
        browser.send(whole[start:end])
        await settled(3)
    found = await browser.packets()
    assert found == [CONNACK, bytes.fromhex("9003000101"), b"\xd0\x00"]
    browser.transport.protocol.connection_lost(None)


async def test_a_frame_without_a_byte_is_nothing(browser: Browser) -> None:
    """Nor does it keep others from their turn, where it comes in a turn of its own."""
    browser.send(handshake())
    await browser.quiet()
    browser.send(frame(b"") + frame(b"", PING) * 400 + frame(b"") + frame(connect(login())))
    assert await browser.packets() == [CONNACK]


async def test_a_fault_in_ones_turn_is_not_the_end_of_the_others() -> None:
    turns, went, faults = Turns(), list[int](), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context["exception"]))
    for number in range(3):
        turns.wait(lambda: went.append(1 // 0))
        turns.wait(functools.partial(went.append, number))
    await settled()
    assert went == [0, 1, 2]
    assert len(faults) == 3
    turns.wait(lambda: went.append(3))
    await settled()
    assert went == [0, 1, 2, 3]


async def test_packets_do_not_keep_to_frames(browser: Browser) -> None:
    """One packet in several frames or fragments, several packets in one frame; a ping between fragments is answered, and frames may
    be empty, the first one too."""
    browser.send(handshake())
    data = connect(login())
    browser.send(frame(b"") + frame(data[:5]) + frame(b"", last=False) + frame(data[5:], CONTINUED))
    assert await browser.packets() == [CONNACK]
    browser.send(frame(b"\xc0", last=False) + frame(b"now", PING) + frame(b"\x00\xc0", CONTINUED, last=False))
    browser.send(frame(b"\x00", CONTINUED))
    browser.send(frame(PINGREQ * 2))
    assert await browser.packets() == [CONNACK] + [b"\xd0\x00"] * 4
    _, found = await browser.heard()
    assert (PONG, b"now") in found


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(b"text", TEXT), 1003),
        (frame(PINGREQ, masked=False), 1002),
        (frame(b"x", CONTINUED), 1002),
        (bytes([0x82, 0xFF]) + (1 << 40).to_bytes(8) + bytes(4), 1009),
        (b"\xff\xff\xff\xff", 1002),
    ],
    ids=["text", "unmasked", "continues nothing", "too large", "garbage"],
)
async def test_what_is_no_mqtt_is_told_why_and_closed(browser: Browser, data: bytes, code: int) -> None:
    """By the number of RFC 6455; nothing of it reaches MQTT."""
    browser.send(handshake() + frame(connect(login())))
    assert await browser.packets() == [CONNACK]
    browser.send(data)
    _, found = await browser.heard()
    assert [(kind, int.from_bytes(payload[:2])) for kind, payload in found if kind == CLOSE] == [(CLOSE, code)]


async def test_a_goodbye_is_answered_and_ends_the_session(browser: Browser) -> None:
    """The connection closes, and the device has no session any more."""
    browser.send(handshake() + frame(connect(login())))
    assert await browser.packets() == [CONNACK]
    assert browser.house.roster.sessions()
    browser.send(frame((1000).to_bytes(2), CLOSE))
    _, found = await browser.heard()
    assert found[-1][0] == CLOSE
    assert await browser.closed()
    browser.transport.protocol.connection_lost(None)
    await settled()
    assert not browser.house.roster.sessions()


async def test_what_mqtt_refuses_closes_the_websocket_too(browser: Browser) -> None:
    """CONNACK first, then the goodbye."""
    browser.send(handshake() + frame(connect(login(secret="wrong"))))
    assert await browser.packets() == [bytes.fromhex("20020004")]
    _, found = await browser.heard()
    assert found[-1][0] == CLOSE
    assert await browser.closed()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (handshake(path="/auth"), 400),
        (handshake(path="/mqtt/x"), 400),
        (handshake(path="/topic/mqtt"), 400),
        (b"POST" + handshake()[3:], 400),
        (handshake().replace(b"websocket", b"h2c"), 426),
        (handshake().replace(b"Sec-WebSocket-Version: 13\r\n", b""), 400),
        (handshake().replace(b"Sec-WebSocket-Key: ", b"X: "), 400),
        (handshake(*(f"X-{number}: {'x' * 1000}" for number in range(20))), 431),
        (handshake().replace(b"Version: 13", b"Version: \xff"), 400),
        (handshake().replace(b"Key: ", b"Key: \xff"), 400),
        (handshake("Sec-WebSocket-Extensions: \xff"), 400),
        (handshake(protocol="\xff"), 400),
    ],
    ids=[
        *("auth", "deeper", "topic", "post", "h2c", "no version", "no key", "large head"),
        *("odd version", "odd key", "odd extensions", "odd protocol"),
    ],
)
async def test_other_upgrades_are_refused(
    browser: Browser, caplog: pytest.LogCaptureFixture, data: bytes, status: int
) -> None:
    """The connection closes, and no traceback is logged."""
    browser.send(data)
    answer, _ = await browser.heard()
    assert answer
    assert answer.status == status
    assert await browser.closed()
    assert not caplog.records


async def test_a_connection_that_has_served_requests_stays_https(browser: Browser) -> None:
    """What came before it on the connection is answered; two protocols do not share one connection's order of answers."""
    browser.send(login_request() + handshake())
    await browser.quiet()
    found = replies(b"".join(browser.transport.writes))
    assert [reply.status for reply in found] == [200, 400]


async def test_without_mqtt_there_is_no_websocket(house: House) -> None:
    """The path is then like any other."""
    browser = Browser(house)
    house.door.websocket = None
    browser.send(handshake())
    answer, _ = await browser.heard()
    assert answer
    assert answer.status == 400
    browser.transport.protocol.connection_lost(None)


async def test_a_device_over_websocket_hears_what_is_reported_over_https(browser: Browser) -> None:
    """One topic space."""
    house = browser.house
    browser.send(handshake() + frame(connect(login())) + frame(subscribe(f"/{PRODUCT}/{DEVICE}/user/get")))
    assert len(await browser.packets()) == 2
    await house.sending.send(f"/{PRODUCT}/{DEVICE}/user/get", b"down")
    await settled(50)
    assert b"down" in (await browser.packets())[-1]
