"""The parts of a request, each as a function that does it once: for pyperf (`python -m bench.micro`, time) and for
`bench.micro.counts` (instructions)."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.room import DEVICE, PRODUCT, SECRET, Room, Transport, open_room

from uplinkd.client import login_body
from uplinkd.core import tokens, topics, wire
from uplinkd.core.errors import Code
from uplinkd.core.model import Origin
from uplinkd.engine import Done
from uplinkd.engine.memory import MemoryEngine
from uplinkd.gateway import Request
from uplinkd.http.protocol import Connection
from uplinkd.mqtt import packets
from uplinkd.settings import Settings

__all__ = ["Parts", "parts"]

Parts = Mapping[str, Callable[[], object]]

_ADDRESS = "192.0.2.7"
_NOW = 1_800_000_000.0
_PAYLOAD = b"x" * 200
# As good as none, but counted.
_WIDE = {"device_rate": 1_000_000, "device_bytes": 1 << 40, "auth_rate": 60_000_000}


class _Prompt(MemoryEngine):
    """Stores nothing and acknowledges at once, so that what is measured is not the engine."""

    def publish(self, subject: bytes, payload: bytes, done: Done, origin: Origin = Origin.HTTPS, key: str = "") -> None:
        done(1880000000000000001, "")


class _Last(Transport):
    """Keeps what was written last alone."""

    last = b""

    def write(self, data: Any) -> None:
        self.last = data


@contextlib.contextmanager
def parts() -> Iterator[Parts]:
    """A whole worker without sockets, and what is done in it. Each is called outside the event loop, as often as one likes."""
    with tempfile.TemporaryDirectory(prefix="uplinkd-micro-") as name, asyncio.Runner() as runner:
        opened = _open(Settings(data=Path(name), **_WIDE))
        try:
            yield runner.run(anext(opened))
        finally:
            runner.run(_end(opened))


async def _end(opened: AsyncGenerator[Parts]) -> None:
    with contextlib.suppress(StopAsyncIteration):
        await anext(opened)


async def _open(settings: Settings) -> AsyncGenerator[Parts]:
    async with open_room(settings, Room) as room:
        room.wall = _NOW
        room.engine = _Prompt()
        room.door.gateway = gateway = room.another_gateway()
        transport = _Last(_ADDRESS)
        connection = Connection(room.door)
        connection.connection_made(transport)

        body = login_body(PRODUCT, DEVICE, SECRET, method="hmacsha1").encode()
        connection.data_received(_request("/auth", "Content-Type: application/json", body=body))
        async with asyncio.timeout(10):
            while not transport.last:
                await asyncio.sleep(0.001)
        token = transport.last.partition(b'"token":"')[2].partition(b'"')[0].decode()
        assert token, transport.last

        path = f"/{PRODUCT}/{DEVICE}/user/update"
        content = "Content-Type: application/octet-stream"
        report = _request("/topic" + path, content, f"password: {token}", body=_PAYLOAD)
        keys = {key.id: key for key in room.registry.signing_keys()}
        entry = room.cache.get(tokens.read(token, keys).device_id)
        assert entry
        device = entry.device
        packet = packets.publish(path.encode(), _PAYLOAD, packet_id=7)
        parser = packets.Parser(1 << 18)

        def login() -> None:
            gateway.authenticate(Request(_ADDRESS, "application/json", body, network=_ADDRESS))

        def check_token() -> None:
            tokens.check(tokens.read(token, keys), device, keys, now=round(_NOW * 1000))

        def right_to_topic() -> None:
            assert topics.may_publish(topics.parse(path.encode()), device, entry.publish_levels)

        def publish() -> None:
            connection.data_received(report)

        def mqtt_packet() -> None:
            parser.feed(packet)
            assert parser.next()

        def answers() -> None:
            wire.published(1880000000000000001)
            wire.token_issued(token)
            wire.refusal(Code.PUBLISH_MESSAGE_ERROR, "0123456789abcdef")

        def charge() -> None:
            room.flow.message(device.id, len(_PAYLOAD), device.product_key, _ADDRESS)

        publish()
        assert b'"code":0' in transport.last, transport.last
        yield {
            "login: parse, HMAC, token": login,
            "token check": check_token,
            "topic and right to it": right_to_topic,
            "publish on a transport in memory": publish,
            "MQTT packet": mqtt_packet,
            "answers": answers,
            "flow control's charge": charge,
        }


def _request(path: str, *headers: str, body: bytes) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
