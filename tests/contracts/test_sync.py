"""sync_interval always: each acknowledgement waits for the disk, and many messages wait for it together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext

from tests.house import until
from uplinkd.core.model import Origin
from uplinkd.core.subjects import to_subject
from uplinkd.engine import Publisher, Query, Reader, open_publisher, open_reader
from uplinkd.engine.embedded import EmbeddedServer
from uplinkd.engine.jetstream import _WORTH_A_BATCH
from uplinkd.engine.stream import STREAM
from uplinkd.settings import Settings

SUBJECT = to_subject("/pk/dev/user/update").encode()
MANY = 10 * _WORTH_A_BATCH


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path, nats_listen="", sync_interval="always", publish_timeout=2)


@pytest.fixture
def server(settings: Settings) -> Iterator[EmbeddedServer]:
    started = EmbeddedServer.start(settings)
    yield started
    started.stop()


@pytest.fixture
async def publisher(settings: Settings, server: EmbeddedServer) -> AsyncIterator[Publisher]:
    made = await opened(settings, server)
    yield made
    await made.stop()


@pytest.fixture
async def reader(publisher: Publisher, server: EmbeddedServer) -> AsyncIterator[Reader]:
    made = await open_reader(server.access)
    yield made
    await made.close()


async def opened(settings: Settings, server: EmbeddedServer) -> Publisher:
    made = open_publisher(settings, server.access)
    await made.start()
    await until(lambda: made.connected)
    return made


class Told:
    """What became of each publish."""

    def __init__(self) -> None:
        self.of: dict[bytes, list[tuple[int, str]]] = {}

    def publish(self, publisher: Publisher, payload: bytes, origin: Origin = Origin.HTTPS) -> None:
        self.of[payload] = []
        publisher.publish(SUBJECT, payload, lambda *told: self.of[payload].append(told), origin)

    async def settled(self) -> None:
        await until(lambda: all(self.of.values()))

    @property
    def ids(self) -> dict[int, bytes]:
        assert all(len(told) == 1 for told in self.of.values()), "each is told once"
        assert all(fault == "" for told in self.of.values() for _, fault in told), self.of
        return {told[0][0]: payload for payload, told in self.of.items()}


async def as_uplinkd(server: EmbeddedServer) -> Client:
    access = server.access
    return await nats.connect(access.urls[0], user=access.user, password=access.password)


@pytest.mark.parametrize(("interval", "always"), [("always", True), ("100ms", False)])
async def test_the_server_syncs_as_it_is_told(tmp_path: Path, interval: str, always: bool) -> None:
    """By its own word."""
    server = EmbeddedServer.start(Settings(data=tmp_path, nats_listen="", sync_interval=interval))
    try:
        system = await nats.connect(server.access.urls[0], user="system", password=server.access.system)
        answer = json.loads((await system.request("$SYS.REQ.SERVER.PING.JSZ", b"{}", timeout=5)).data)
        config = answer["data"]["config"]
        assert bool(config.get("sync_always")) is always
        if not always:
            assert config["sync_interval"] == 100_000_000
        await system.close()
    finally:
        server.stop()


async def test_each_message_of_a_batch_has_its_own_id(
    publisher: Publisher, reader: Reader, server: EmbeddedServer
) -> None:
    """What comes at the same time is stored as one, acknowledged once, and found under the id that each was told."""
    told = Told()
    for number in range(MANY):
        told.publish(publisher, b"%d" % number, Origin.MQTT if number % 3 == 0 else Origin.HTTPS)
    await told.settled()
    ids = told.ids
    assert len(ids) == MANY
    assert [int(ids[each]) for each in sorted(ids)] == list(range(MANY)), "in the order of their coming"
    found = await reader.latest(Query(), 2 * MANY)
    assert {each.id: each.payload for each in found} == ids
    assert all((each.origin is Origin.MQTT) == (int(each.payload) % 3 == 0) for each in found)
    client = await as_uplinkd(server)
    first = await client.jetstream().get_msg(STREAM, 1)
    assert first.headers
    assert first.headers["Nats-Batch-Sequence"] == "1"
    await client.close()


async def test_few_messages_are_stored_one_by_one(publisher: Publisher, server: EmbeddedServer) -> None:
    """A batch costs the disk more than a few messages do."""
    told = Told()
    for number in range(3):
        told.publish(publisher, b"%d" % number)
    await told.settled()
    assert len(told.ids) == 3
    client = await as_uplinkd(server)
    assert (await client.jetstream().get_msg(STREAM, 1)).headers is None
    await client.close()


async def test_batches_of_two_workers_and_single_messages_mix(
    settings: Settings, publisher: Publisher, reader: Reader, server: EmbeddedServer
) -> None:
    """Whatever comes between: every id is one message's."""
    other = await opened(settings, server)
    told = Told()
    for turn in range(12):
        for worker, count in ((publisher, (1, 40, 90)[turn % 3]), (other, (60, 2, 30)[turn % 3])):
            for number in range(count):
                told.publish(worker, b"%d %d %d" % (turn, worker is other, number))
        await asyncio.sleep(0.004)
    await told.settled()
    ids = told.ids
    assert len(ids) == len(told.of)
    assert {each.id: each.payload for each in await reader.latest(Query(), 5000)} == ids
    await other.stop()


async def test_a_batch_holds_no_more_than_the_server_takes(publisher: Publisher, reader: Reader) -> None:
    """A thousand messages, and some MiB: more go as several."""
    told = Told()
    for number in range(2500):
        told.publish(publisher, b"%d" % number)
    for number in range(60):
        told.publish(publisher, b"%d" % number + bytes(128 * 1024))
    await told.settled()
    assert len(told.ids) == 2560
    assert (await reader.state()).messages == 2560


async def test_a_batch_that_is_refused_is_refused_for_all_in_it(publisher: Publisher, server: EmbeddedServer) -> None:
    """Devices send again; nothing of it is stored."""
    client = await as_uplinkd(server)
    await without_batches(client.jetstream())
    told = Told()
    for number in range(_WORTH_A_BATCH):
        told.publish(publisher, b"%d" % number)
    await told.settled()
    assert {each[0][0] for each in told.of.values()} == {0}
    assert all("the engine did not store it" in each[0][1] for each in told.of.values())
    assert (await client.jetstream().stream_info(STREAM)).state.messages == 0
    told = Told()
    told.publish(publisher, b"alone")
    await told.settled()
    assert len(told.ids) == 1
    await client.close()


async def without_batches(stream: JetStreamContext) -> None:
    """Somebody changes the stream behind our back."""
    client = stream._nc
    info = json.loads((await client.request(f"$JS.API.STREAM.INFO.{STREAM}", b"")).data)
    assert info["config"]["allow_atomic"]
    config = json.dumps({**info["config"], "allow_atomic": False}).encode()
    answer = json.loads((await client.request(f"$JS.API.STREAM.UPDATE.{STREAM}", config)).data)
    assert "error" not in answer, answer


async def test_the_stream_follows_the_setting_both_ways(settings: Settings, server: EmbeddedServer) -> None:
    """The server's own stays as it was started; the stream of an earlier start is changed."""
    client = await as_uplinkd(server)
    for interval, atomic in (("100ms", False), ("always", True), ("100ms", False)):
        other = await opened(settings.model_copy(update={"sync_interval": interval}), server)
        info = json.loads((await client.request(f"$JS.API.STREAM.INFO.{STREAM}", b"")).data)
        assert bool(info["config"].get("allow_atomic")) is atomic
        told = Told()
        for number in range(MANY):
            told.publish(other, b"%d" % number)
        await told.settled()
        assert len(told.ids) == MANY
        await other.stop()
    await client.close()
