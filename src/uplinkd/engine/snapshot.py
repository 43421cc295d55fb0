"""Streams out of and into JetStream, with their consumers, by its snapshots: what the server sends in chunks, each answered for the
next to come, and takes in the same way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uplinkd.core.errors import Unavailable
from uplinkd.engine.api import call, connect, document_of, in_words
from uplinkd.engine.embedded import Access
from uplinkd.engine.stream import BASE, base_of_metadata, new_base, restored_metadata

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

__all__ = ["CHUNK_BYTES", "Shelf", "StreamFacts", "open_shelf"]

CHUNK_BYTES = 128 * 1024
_WINDOW_BYTES = 1024**2  # so much may be under way, unanswered
_SECONDS, _SILENCE_SECONDS = 10.0, 30.0
# To make a stream ready that was sent in, the server reads all of it.
_SETTLE_SECONDS = 600.0
_OURS = "UPLINKD"
# Messages to devices have ids in a range of their own, see engine.down.
_DOWN_IDS = 1 << 62


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """A stream as JetStream describes it."""

    name: str
    config: dict[str, Any]
    state: dict[str, Any]


class Shelf:
    """The streams of one server."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def version(self) -> str:
        """Of nats-server."""
        return str(self._client.connected_server_version)

    async def names(self) -> list[str]:
        """Our streams."""
        with in_words():
            found = await call(self._client, "STREAM.NAMES", patience=_SECONDS)
        return sorted(name for name in found.get("streams") or () if name.partition("_")[0] == _OURS)

    async def take(self, name: str, write: Callable[[bytes], object]) -> StreamFacts:
        """Have `write` called with the stream in parts, as it stands at the beginning or a little later. Raise Unavailable."""
        inbox = self._client.new_inbox()
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        with in_words():
            subscription = await self._client.subscribe(inbox, cb=arrived.put)
            try:
                request = {"deliver_subject": inbox, "chunk_size": CHUNK_BYTES, "window_size": _WINDOW_BYTES}
                facts = await call(self._client, f"STREAM.SNAPSHOT.{name}", request, patience=_SILENCE_SECONDS)
                while True:
                    message = await asyncio.wait_for(arrived.get(), _SILENCE_SECONDS)
                    if not message.data:
                        break
                    write(message.data)
                    if message.reply:
                        await message.respond(b"")
            finally:
                await subscription.unsubscribe()
        status = (message.headers or {}).get("Status", "204")
        if status != "204":
            raise Unavailable(f"the engine ended the snapshot of {name}: {status} {message.headers}")
        return StreamFacts(name, facts["config"], facts["state"])

    async def put(self, stream: StreamFacts, parts: Iterator[bytes], *, now: int) -> None:
        """Make the stream of what was taken, with ids from `now` on (ms) that were never given. Raise Unavailable."""
        with in_words():
            body = {"config": stream.config, "state": stream.state}
            answer = await call(self._client, f"STREAM.RESTORE.{stream.name}", body, patience=_SECONDS)
            place = answer["deliver_subject"]
            for part in parts:
                taken = await self._client.request(place, part, timeout=_SILENCE_SECONDS)
                if taken.data:
                    raise Unavailable(f"the engine does not take the stream {stream.name}: {taken.data.decode()[:200]}")
            made = await _finish(self._client, place, patience=_SETTLE_SECONDS)
            config = made["config"]
            if BASE in (config.get("metadata") or {}):
                high = _DOWN_IDS if base_of_metadata(config) >= _DOWN_IDS else 0
                metadata = restored_metadata(config, made["state"], high + new_base(now))
                update = {**config, "metadata": metadata}
                await call(self._client, f"STREAM.UPDATE.{stream.name}", update, patience=_SECONDS)


async def _finish(client: Client, subject: str, *, patience: float) -> dict[str, Any]:
    """The end of what was sent to `subject`, and what the server makes of it."""
    return document_of((await client.request(subject, b"", timeout=patience)).data)


@asynccontextmanager
async def open_shelf(access: Access) -> AsyncGenerator[Shelf]:
    """Raise Unavailable when the engine does not answer."""
    client = await connect(access, "uplinkd backup")
    try:
        yield Shelf(client)
    finally:
        await client.close()
        await asyncio.sleep(0)  # its transport closes in the next turn of the loop
