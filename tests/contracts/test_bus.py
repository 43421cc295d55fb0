"""One contract for every bus, and that NATS's comes back by itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from nats.aio.transport import TcpTransport

from tests.house import until
from uplinkd.core.errors import Unavailable
from uplinkd.engine import Bus, Told
from uplinkd.engine.api import connect
from uplinkd.engine.bus import NatsBus
from uplinkd.engine.embedded import EmbeddedServer
from uplinkd.engine.memory import MemoryBus
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks


@dataclass
class Line:
    """Two gateways' buses, and how to take the engine away from both and give it back."""

    mine: Bus
    theirs: Bus
    cut: Callable[[], Awaitable[None]]
    mend: Callable[[], Awaitable[None]]


@contextlib.asynccontextmanager
async def running(settings: Settings, prepare: Callable[[Bus], object] = id) -> AsyncIterator[Line]:
    """Over a nats-server of its own; `prepare` is called with each bus before it connects."""
    servers = [EmbeddedServer.start(settings)]
    mine, theirs = (NatsBus(servers[0].access, name) for name in ("mine", "theirs"))
    buses = [mine, theirs]
    for bus in buses:
        prepare(bus)
    tasks = [asyncio.create_task(bus.run()) for bus in buses]

    async def cut() -> None:
        await asyncio.to_thread(servers.pop().stop)
        await until(lambda: not any(bus.connected for bus in buses))

    async def mend() -> None:
        servers.append(await asyncio.to_thread(EmbeddedServer.start, settings))
        await until(lambda: all(bus.connected for bus in buses))

    await until(lambda: all(bus.connected for bus in buses))
    yield Line(mine, theirs, cut, mend)
    await end_tasks(*tasks)
    for server in servers:
        server.stop()


@contextlib.asynccontextmanager
async def over_nats(folder: Path) -> AsyncIterator[Line]:
    async with running(Settings(data=folder, nats_listen="")) as line:
        yield line


@contextlib.asynccontextmanager
async def in_memory(_: Path) -> AsyncIterator[Line]:
    bus = MemoryBus()

    async def cut() -> None:
        bus.connected = False

    yield Line(bus, bus, cut, bus.connect)


@pytest.fixture(params=[in_memory, over_nats])
async def line(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Line]:
    async with request.param(tmp_path) as line:
        yield line


async def test_what_is_told_is_heard_with_its_headers(line: Line) -> None:
    """In its order; by those whose subject matches it, from when they are settled until they end it."""
    heard: list[Told] = []
    end = line.mine.listen("news.*", heard.append)
    line.mine.listen("news.*.*", lambda _: pytest.fail("it has another number of levels"))
    everything: list[str] = []
    line.mine.listen("news.>", lambda told: everything.append(told.subject))
    await line.mine.settled()
    line.theirs.tell("news.1", b"one", {"Kind": "first"})
    line.theirs.tell("news.2", b"\x00\xff")
    line.theirs.tell("other.3", b"three")
    await until(lambda: len(heard) == 2 and len(everything) == 2)
    assert [(told.subject, told.payload) for told in heard] == [("news.1", b"one"), ("news.2", b"\x00\xff")]
    assert heard[0].headers["Kind"] == "first"
    assert not heard[1].headers
    end()
    await line.mine.settled()
    line.theirs.tell("news.4", b"four")
    await until(lambda: "news.4" in everything)
    assert len(heard) == 2


async def test_what_is_larger_than_nats_takes_is_lost_alone(line: Line) -> None:
    """Whoever tells much has to tell it in parts."""
    heard: list[int] = []
    line.theirs.listen("much", lambda told: heard.append(len(told.payload)))
    await line.theirs.settled()
    for size in (1024**2 + 1, 1024**2, 1):
        line.mine.tell("much", bytes(size))
    await until(lambda: heard == [1024**2, 1])


async def test_of_a_queue_one_alone_hears_each_message(line: Line) -> None:
    """However many listen; who listens without the queue hears all."""
    shared: list[bytes] = []
    alone: list[bytes] = []
    for bus in (line.mine, line.theirs):
        bus.listen("work", lambda told: shared.append(told.payload), queue="workers")
    line.mine.listen("work", lambda told: alone.append(told.payload))
    await line.mine.settled()
    await line.theirs.settled()
    for number in range(50):
        line.theirs.tell("work", b"%d" % number)
    await until(lambda: len(alone) == 50 and len(shared) >= 50)
    await asyncio.sleep(0.05)
    assert sorted(shared) == sorted(alone)


async def test_a_question_is_answered_or_unavailable(line: Line) -> None:
    """By who listens; at once where nobody does, after the patience where nobody speaks."""
    line.theirs.listen(
        "add", lambda told: line.theirs.tell(told.reply, told.payload + b"1", {"Of": told.headers["For"]})
    )
    line.theirs.listen("mute", lambda _: None)
    await line.theirs.settled()
    answer = await line.mine.ask("add", b"2", {"For": "me"})
    assert (answer.payload, answer.headers["Of"]) == (b"21", "me")
    assert [(await line.mine.ask("add", b"%d" % n, {"For": "x"})).payload for n in range(5)] == [
        b"%d1" % n for n in range(5)
    ]
    started = time.monotonic()
    with pytest.raises(Unavailable):
        await line.mine.ask("nobody.there")
    assert time.monotonic() - started < 1
    with pytest.raises(Unavailable, match="does not answer"):
        await line.mine.ask("mute", patience=0.1)


async def test_after_an_outage_everybody_hears_on(line: Line) -> None:
    """What is told meanwhile is lost, questions and settling say so; the acts are called each time that it stands anew."""
    acts: list[str] = []

    async def act() -> None:
        acts.append("connected")

    heard: list[bytes] = []
    line.mine.on_connected(act)
    line.mine.listen("news", lambda told: heard.append(told.payload))
    await line.mine.settled()
    await line.cut()
    line.theirs.tell("news", b"lost")
    with pytest.raises(Unavailable):
        await line.mine.ask("anything")
    with pytest.raises(Unavailable):
        await line.mine.settled()
    line.mine.listen("later", lambda told: heard.append(told.payload))
    before = len(acts)
    await line.mend()
    await until(lambda: len(acts) > before)
    await line.mine.settled()
    line.theirs.tell("news", b"again")
    line.theirs.tell("later", b"new")
    await until(lambda: len(heard) == 2)
    assert heard == [b"again", b"new"]


async def test_who_begins_to_listen_while_it_connects_hears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after all who listened before are known to the engine."""
    flush, begun, heard = Client.flush, ["first"], list[str]()

    def listen(bus: Bus) -> None:
        bus.listen(begun[-1], lambda told: heard.append(told.subject))

    async with over_nats(tmp_path) as calm:
        listen(calm.mine)
        await calm.cut()

        async def busy(client: Client, within: int) -> None:
            await flush(client, within)
            if len(begun) < 5:
                begun.append(f"late{len(begun)}")
                listen(calm.mine)

        with monkeypatch.context() as patch:
            patch.setattr("nats.aio.client.Client.flush", busy)
            await calm.mend()
        for each in begun:
            calm.theirs.tell(each, b"")
        await until(lambda: len(heard) == 5)
    assert heard == begun


async def test_a_connection_that_ends_while_very_many_begin_to_listen_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has room for 1,024 that wait for the socket; those beyond would wait for ever."""
    heard, ended = list[str](), list[Client]()

    async def brief(*given: Any) -> Client:
        client = await connect(*given)
        if not ended:
            ended.append(client)
            assert isinstance(client._transport, TcpTransport)
            assert client._transport._io_reader
            client._transport._io_reader.feed_eof()
        return client

    async with over_nats(tmp_path) as line:
        await line.cut()
        for bus in (line.mine, line.theirs):
            for number in range(1500):
                bus.listen(f"many.{number}", lambda told: heard.append(told.subject))
        with monkeypatch.context() as patch:
            patch.setattr("uplinkd.engine.bus.connect", brief)
            await line.mend()
        line.theirs.tell("many.1499", b"")
        await until(lambda: heard == ["many.1499"] * 2)


async def test_a_listener_that_fails_does_not_stop_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A fault of ours is logged, and the next message is heard."""
    async with over_nats(tmp_path) as line:
        heard: list[bytes] = []

        def fragile(told: Told) -> None:
            heard.append(told.payload)
            if told.payload == b"bad":
                raise ValueError("fragile")

        line.mine.listen("news", fragile)
        await line.mine.settled()
        line.theirs.tell("news", b"bad")
        line.theirs.tell("news", b"good")
        await until(lambda: heard == [b"bad", b"good"])
    assert "a fault of ours while hearing news" in caplog.text


async def test_a_connection_whose_last_bytes_could_not_be_written_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client breaks off on its way to tell of the end, for what it wanted to write was refused."""

    async def refuse(client: Client) -> None:
        assert client._transport
        client._transport.close()  # type: ignore[no-untyped-call]
        raise RuntimeError("the handler is closed")

    async with over_nats(tmp_path) as line:
        with monkeypatch.context() as patch:
            patch.setattr("nats.aio.client.Client._flush_pending", refuse)
            await line.cut()
        await line.mend()
