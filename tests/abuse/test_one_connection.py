"""What one connection may cost: memory, a share of each turn of the event loop, lines in the log."""

from __future__ import annotations

import asyncio
import time
import tracemalloc

import pytest

from tests.abuse.conftest import House
from tests.clients.packets import PINGREQ, connect, publish
from tests.http.conftest import login_request, publish_request, request
from tests.mqtt.conftest import CONNACK, login
from tests.mqtt.test_websocket import Browser, frame, handshake
from tests.room import DEVICE, PRODUCT
from uplinkd.mqtt import packets

TOPIC = f"/topic/{PRODUCT}/{DEVICE}/user/update"
TINY = b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"


async def test_what_follows_a_first_get_is_not_kept(house: House) -> None:
    """Only the head that may become a WebSocket's is, and only until it is complete."""
    house.door.websocket = lambda *_: asyncio.Protocol()
    peer = house.connect()
    peer.send(request("/auth", b"", method="GET"))
    token = await house.token()
    body = b"x" * 100_000
    for _ in range(20):
        raw = publish_request(token, body)
        for start in range(0, len(raw), 10_000):
            peer.send(raw[start : start + 10_000])
        await peer.replies()
    assert len(peer.connection._raw) == 0
    peer = house.connect()
    peer.send(b"GET /mqtt HTTP/1.1\r\n")
    for _ in range(10_000):
        peer.send(b"A: 0123456789\r\n")
    assert len(peer.connection._raw) <= house.door.limits.head_bytes + 100
    assert (await peer.replies())[0].status == 431


@pytest.mark.parametrize("path", ["/nowhere", "/auth"])
async def test_a_malformed_request_behind_a_refused_one_is_answered(house: House, path: str) -> None:
    """404 or 405 for the first, 400 for the second, then the end."""
    peer = house.connect()
    peer.send(request(path, b"", method="GET" if path == "/auth" else "POST") + b"POST /auth HTTP/1.1\r\nA b\r\n\r\n")
    first, second = await peer.replies()
    assert (first.status, second.status) == (405 if path == "/auth" else 404, 400)
    assert "Connection" not in first.headers
    assert second.headers["Connection"] == "close"


async def test_a_connection_that_a_proxy_uses_again_may_become_a_websocket(house: House) -> None:
    """After any number of requests; the handshake is that of its own bytes alone."""
    browser = Browser(house)
    for _ in range(3):
        browser.send(login_request())
        await browser.quiet()
        browser.send(request("/auth", b"", method="GET"))
    assert len(browser.transport.writes) == 6
    browser.transport.writes.clear()
    raw = handshake()
    browser.send(raw[:9])
    browser.send(raw[9:])
    browser.send(frame(connect(login(), 60)))
    answer, _ = await browser.heard()
    assert answer
    assert answer.status == 101
    assert await browser.packets() == [CONNACK]


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /auth HTTP/1.1\r\nContent-Length: 0\r\n\r\n\x16\x03\x01\x02\x00",
        b"POST /auth HTTX/1.1\r\nContent-Length: 0\r\n\r\n",
        b"POST /auth HTTP/1.1\r\nContent-Length: 0\r\n\r\nFOO /auth HTTP/1.1\r\n\r\n",
    ],
)
async def test_the_reason_names_the_real_fault(house: House, raw: bytes) -> None:
    """And not the method of a request that was good."""
    peer = house.connect()
    peer.send(raw)
    assert (await peer.replies())[-1].status == 400
    assert "POST" not in house.outcomes[-1].reason
    assert "malformed" in house.outcomes[-1].reason


@pytest.mark.parametrize(
    "piece",
    [b"7;" + b"x" * 2000, b"0\r\nA: " + b"x" * 2000, b"0" * 2000],
    ids=["extension", "trailer", "zeros"],
)
async def test_what_surrounds_chunks_is_bounded(house: House, piece: bytes) -> None:
    """The parser keeps a trailer until it is complete, and looks for the end of a chunk's line for ever."""
    peer = house.connect()
    peer.send(request(TOPIC, b"", "Transfer-Encoding: chunked"))
    peer.send(piece)
    for _ in range(10):
        if not peer.transport.writes:
            peer.send(b"0" * 4000 if piece[0:2] == b"00" else b"x" * 4000)
    assert (await peer.replies())[0].status in (400, 431)
    assert peer.connection._over


async def test_a_pipelining_connection_takes_a_share_of_each_turn(house: House) -> None:
    """Fifty of them, and a good device is answered after some requests of each and not after all."""
    token = await house.token()
    peers = [house.connect(f"192.0.2.{number}") for number in range(50)]
    for peer in peers:
        peer.send(TINY * 2000)
    good = house.connect()
    good.send(publish_request(token))
    for _ in range(10):
        await asyncio.sleep(0)
        if good.transport.writes:
            break
    assert len(good.transport.writes) == 1
    assert max(len(peer.transport.writes) for peer in peers) < 200
    for peer in peers:
        peer.transport.closed = True
        peer.connection.connection_lost(None)


@pytest.mark.parametrize("framed", [False, True])
async def test_a_flood_of_packets_takes_a_share_of_each_turn(house: House, framed: bool) -> None:
    """PINGREQs by the thousand, with and without a frame around each; all are answered in the end."""
    if framed:
        browser = Browser(house)
        browser.send(handshake())
        browser.send(frame(connect(login(), 60)))
        await browser.quiet()
        transport = browser.transport
        before = len(transport.writes)
        browser.send(frame(PINGREQ) * 3000)
    else:
        client = await house.session()
        transport = client.transport  # type: ignore[assignment]
        before = len(transport.writes)
        client.send(PINGREQ * 3000)
    assert len(transport.writes) - before < 500
    assert transport.paused
    for _ in range(500):
        await asyncio.sleep(0)
    assert len(transport.writes) - before == 3000
    assert not transport.paused


def test_packets_are_taken_apart_in_linear_time() -> None:
    """Ten times the packets in one read, or the pieces of one, take about ten times as long, and not a hundred times."""

    def seconds(count: int) -> float:
        parser = packets.Parser(300_000)
        begin = time.perf_counter()
        parser.feed(PINGREQ * count)
        while parser.next():
            pass
        parser.feed(publish("/a/b/c", b"x" * count, number=1)[:-1])
        for _ in range(count):
            parser.feed(b"\x00")
        return time.perf_counter() - begin

    seconds(1000)
    assert min(seconds(200_000) for _ in range(2)) < 40 * min(seconds(20_000) for _ in range(3))


def test_a_packet_in_tiny_pieces_takes_no_more_memory_than_its_bytes() -> None:
    """A quarter of a mebibyte in pieces of two bytes."""
    raw = publish("/a/b/c", b"x" * 260_000, number=1)
    parser = packets.Parser(300_000)
    tracemalloc.start()
    for start in range(0, len(raw) - 2, 2):
        parser.feed(raw[start : start + 2])
        parser.next()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 2 * len(raw)


async def test_answers_to_nobody_are_not_written(house: House) -> None:
    """The peer has gone in the middle of what it sent; asyncio would log a line for each answer."""
    peer = house.connect()
    write = peer.transport.write

    def once(data: bytes) -> None:
        write(data)
        peer.transport.closed = True

    peer.transport.write = once  # type: ignore[method-assign]
    peer.send(TINY * 1000)
    await asyncio.sleep(0)
    assert len(peer.transport.writes) == 1
    client = await house.session()
    client.transport.closed = True
    client.send(PINGREQ * 10 + publish(f"/{PRODUCT}/{DEVICE}/user/update", b"x", number=1))
    await asyncio.sleep(0.01)
    assert len(client.transport.writes) == 1
