"""Applications at the NATS port, with a real nats-server: what they may do, that they may do nothing else, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import ssl
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import nats.errors
import nats.js.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig

from tests.house import until
from tests.ports import free_port
from uplinkd.core.apps import inbox_of
from uplinkd.core.errors import Rejected
from uplinkd.core.model import App
from uplinkd.core.subjects import to_subject
from uplinkd.engine import Publisher, Query, open_publisher, open_reader
from uplinkd.engine.callout import Callout
from uplinkd.engine.embedded import EmbeddedServer, account_key
from uplinkd.engine.nkeys import AccountKey, claims_of
from uplinkd.engine.stream import STREAM
from uplinkd.registry import Registry, open_registry
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks
from uplinkd.tls import ensure_material

LAMPS, DOORS = "a1Lamps", "a1Doors"
PULL = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}"

# The stock client leaves behind the sockets of connections that were refused or broken.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """They are collected here, and not in the test of somebody else."""
    yield
    gc.collect()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", nats_listen="127.0.0.1:0")


@pytest.fixture
def registry(settings: Settings) -> Iterator[Registry]:
    registry = open_registry(settings)
    registry.create_product("lamps", key=LAMPS)
    registry.create_product("doors", key=DOORS)
    yield registry
    registry.close()


@pytest.fixture
def server(settings: Settings) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer.start(settings)
    yield server
    server.stop()


@pytest.fixture
async def publisher(settings: Settings, server: EmbeddedServer) -> AsyncIterator[Publisher]:
    """What devices report goes through it; it makes the stream."""
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await until(lambda: publisher.connected)
    yield publisher
    await publisher.stop()


@pytest.fixture
async def callout(
    settings: Settings, registry: Registry, server: EmbeddedServer, publisher: Publisher
) -> AsyncIterator[Callout]:
    """As a worker runs it."""
    callout = Callout(registry, server.access, account_key(settings.data / "nats"))
    task = asyncio.create_task(callout.run())
    await until(lambda: callout.answers)
    yield callout
    await end_tasks(task)
    await asyncio.sleep(0)


async def report(publisher: Publisher, *payloads: bytes, topic: str = f"/{LAMPS}/lamp1/user/update") -> None:
    """Return once all are stored."""
    loop = asyncio.get_running_loop()

    def publish(payload: bytes) -> asyncio.Future[tuple[int, str]]:
        future: asyncio.Future[tuple[int, str]] = loop.create_future()
        publisher.publish(
            to_subject(topic).encode(), payload, lambda number, reason: future.set_result((number, reason))
        )
        return future

    for number, reason in await asyncio.wait_for(asyncio.gather(*map(publish, payloads)), 5):
        assert number, reason


class Application:
    """A program of the owner's, connected with the stock client. `denied` collects what the server forbade it."""

    def __init__(self, client: Client, app: App, denied: list[str]) -> None:
        self.client, self.app, self.denied = client, app, denied

    async def pull(self) -> JetStreamContext.PullSubscription:
        return await self.client.jetstream().pull_subscribe_bind(self.app.key, stream=STREAM)


async def connect(server: EmbeddedServer, app: App, secret: str, **options: Any) -> Application:
    """Let in at once or not at all; nats.errors.Error when not."""
    denied: list[str] = []

    async def error(fault: Exception) -> None:
        denied.append(str(fault))

    options = {"allow_reconnect": False, "max_reconnect_attempts": 1, "connect_timeout": 2} | options
    client = await nats.connect(
        options.pop("url", server.access.urls[0]),
        user=app.key,
        password=secret,
        inbox_prefix=inbox_of(app),
        error_cb=error,
        **options,
    )
    return Application(client, app, denied)


@contextlib.asynccontextmanager
async def connected(server: EmbeddedServer, app: App, secret: str, **options: Any) -> AsyncIterator[Application]:
    """Let in within a few seconds: the callout may only be starting."""
    end = time.monotonic() + 10
    while True:
        try:
            application = await connect(server, app, secret, **options)
            break
        except (nats.errors.Error, OSError, TimeoutError):
            assert time.monotonic() < end, "it was not let in"
            await asyncio.sleep(0.1)
    yield application
    await application.client.close()
    await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def operator(server: EmbeddedServer) -> AsyncIterator[Client]:
    """uplinkd's own user."""
    access = server.access
    client = await nats.connect(access.urls[0], user=access.user, password=access.password)
    yield client
    await client.close()
    await asyncio.sleep(0)


async def refused(server: EmbeddedServer, app: App, secret: str) -> None:
    with pytest.raises(nats.errors.Error, match="Authorization Violation"):
        await connect(server, app, secret)
    await asyncio.sleep(0)


async def payloads(pull: JetStreamContext.PullSubscription, count: int) -> list[bytes]:
    """What comes next, acknowledged."""
    found: list[bytes] = []
    while len(found) < count:
        for message in await pull.fetch(count - len(found), timeout=5):
            await message.ack()
            found.append(message.data)
    return found


async def test_an_application_reads_the_uplink_of_its_products(
    registry: Registry, server: EmbeddedServer, publisher: Publisher, callout: Callout
) -> None:
    """From its making on, status messages included, in order, and of no other product."""
    app, secret = registry.create_app("billing", products=[LAMPS])
    topics = [
        f"/{LAMPS}/lamp1/user/update",
        f"/sys/{LAMPS}/lamp1/thing/event/property/post",
        f"/{DOORS}/door1/user/update",
        f"/as/mqtt/status/{LAMPS}/lamp1",
        f"/sys/{DOORS}/door1/thing/event/property/post",
        f"/shadow/update/{LAMPS}/lamp1",
        f"/ota/device/inform/{LAMPS}/lamp1",
        f"/ext/ntp/{LAMPS}/lamp1/request",
    ]
    for topic in topics:
        await report(publisher, topic.encode(), topic=topic)
    async with connected(server, app, secret) as application:
        mine = [topic.encode() for topic in topics if DOORS not in topic]
        assert await payloads(await application.pull(), len(mine)) == mine
        await report(publisher, b"later")
        (message,) = await (await application.pull()).fetch(1, timeout=5)
        assert (message.subject, message.data) == (f"/.{LAMPS}.lamp1.user.update", b"later")
        await message.ack_sync()
        assert application.denied == []


async def test_what_was_not_acknowledged_comes_again_after_a_reconnect(
    registry: Registry, server: EmbeddedServer, publisher: Publisher, callout: Callout
) -> None:
    """And what was acknowledged does not; what an operator sets on the consumer by hand stays."""
    app, secret = registry.create_app("billing", products=[LAMPS])
    async with connected(server, app, secret) as application:
        await report(publisher, b"one", b"two")
        pull = await application.pull()
        first, second = await pull.fetch(2, timeout=5)
        await first.ack()
        assert second.data == b"two"
        async with operator(server) as client:
            jetstream = client.jetstream()
            config = (await jetstream.consumer_info(STREAM, app.key)).config
            config.ack_wait = 0.5
            await jetstream.add_consumer(STREAM, config)
    async with connected(server, app, secret) as application:
        assert await payloads(await application.pull(), 1) == [b"two"]


async def test_a_wrong_secret_is_refused(
    registry: Registry, server: EmbeddedServer, callout: Callout, caplog: pytest.LogCaptureFixture
) -> None:
    """An unknown application and one without products too; the log says why, and never a secret."""
    app, secret = registry.create_app("billing", products=[LAMPS])
    _, other_secret = registry.create_app("other", products=[LAMPS])
    idle, idle_secret = registry.create_app("idle")
    stranger = App(0, "app-stranger", "stranger", b"", True, 0, ())
    async with connected(server, app, secret):
        pass
    for who, word, reason in (
        (app, other_secret, "wrong secret"),
        (app, "", "wrong secret"),
        (stranger, secret, "there is no such application"),
        (idle, idle_secret, "it has no product yet; `uplinkd app grant idle PK`"),
    ):
        caplog.clear()
        callout._warn_refused._next = 0
        await refused(server, who, word)
        assert reason in caplog.text
        assert who.key in caplog.text
        for known in (secret, other_secret, idle_secret):
            assert known not in caplog.text


Breach = Callable[[Application, App], Awaitable[object]]


def subscribing(subject: str) -> Breach:
    async def breach(me: Application, victim: App) -> None:
        await me.client.subscribe(subject.format(victim=victim.key))

    return breach


def publishing(subject: str, body: str = "{}") -> Breach:
    async def breach(me: Application, victim: App) -> None:
        await me.client.publish(subject.format(victim=victim.key, me=me.app.key), body.encode())

    return breach


BREACHES = {
    f"subscribe {subject}": subscribing(subject)
    for subject in (
        ">",
        "*.>",
        "/.>",
        f"/.{DOORS}.>",
        f"/.{LAMPS}.>",  # its own product's too: before they are stored they are not reports yet
        f"/.sys.{DOORS}.>",
        f"{'uplinkd.send.'}>",
        "$SYS.>",
        "$SYS.REQ.USER.AUTH",
        "$JS.>",
        "$JS.API.>",
        "$JS.ACK.>",
        "$JS.EVENT.>",
        "_INBOX.>",
        "_INBOX.*.>",
        "_INBOX.{victim}.>",
        "_R_.>",
    )
} | {
    f"publish {subject}": publishing(subject)
    for subject in (
        f"/.{LAMPS}.lamp1.user.update",
        f"/.{DOORS}.door1.user.update",
        f"/.sys.{LAMPS}.lamp1.thing.event.property.post",
        "$JS.API.INFO",
        f"$JS.API.STREAM.INFO.{STREAM}",
        "$JS.API.STREAM.LIST",
        "$JS.API.STREAM.CREATE.MINE",
        f"$JS.API.STREAM.UPDATE.{STREAM}",
        f"$JS.API.STREAM.DELETE.{STREAM}",
        f"$JS.API.STREAM.PURGE.{STREAM}",
        f"$JS.API.STREAM.MSG.GET.{STREAM}",
        f"$JS.API.STREAM.MSG.DELETE.{STREAM}",
        f"$JS.API.DIRECT.GET.{STREAM}",
        f"$JS.API.DIRECT.GET.{STREAM}./.{DOORS}.door1.user.update",
        f"$JS.API.CONSUMER.LIST.{STREAM}",
        f"$JS.API.CONSUMER.CREATE.{STREAM}.mine",
        f"$JS.API.CONSUMER.CREATE.{STREAM}.{{me}}",
        f"$JS.API.CONSUMER.CREATE.{STREAM}.{{me}}./.>",
        f"$JS.API.CONSUMER.DURABLE.CREATE.{STREAM}.{{me}}",
        f"$JS.API.CONSUMER.DELETE.{STREAM}.{{victim}}",
        f"$JS.API.CONSUMER.DELETE.{STREAM}.{{me}}",
        f"{PULL}.{{victim}}",
        f"$JS.API.CONSUMER.INFO.{STREAM}.{{victim}}",
        f"$JS.ACK.{STREAM}.{{victim}}.1.1.1.1.1",
        "$SYS.REQ.USER.AUTH",
        "$SYS.REQ.SERVER.PING.CONNZ",
        "$SYS.REQ.ACCOUNT.UPLINKD.CONNZ",
        "_INBOX.{victim}.x",
        "_INBOX.{me}.x",
        f"uplinkd.send./.{DOORS}.door1.user.get",
        f"uplinkd.send./.sys.{DOORS}.door1.thing.model.down_raw",
        f"uplinkd.send./.broadcast.{DOORS}.all",
        f"uplinkd.send./.broadcast.{LAMPS}.all.more",
        "uplinkd.send./.>",
        "uplinkd.other",
    )
}


async def test_every_breach_of_its_borders_is_denied(
    registry: Registry, server: EmbeddedServer, publisher: Publisher, callout: Callout
) -> None:
    """Each is tried by an application that may read and send to one product; the stream and another's consumer are untouched."""
    app, secret = registry.create_app("curious", products=[LAMPS])
    victim, victim_secret = registry.create_app("victim", products=[DOORS])
    await report(publisher, b"secret", topic=f"/{DOORS}/door1/user/update")
    async with (
        connected(server, victim, victim_secret) as other,
        connected(server, app, secret) as me,
        operator(server) as client,
    ):
        before = await client.jetstream().stream_info(STREAM)
        for name, breach in BREACHES.items():
            me.denied.clear()
            await breach(me, victim)
            await me.client.flush()
            end = time.monotonic() + 2
            while not any("permissions violation" in text.lower() for text in me.denied):
                assert time.monotonic() < end, name
                await asyncio.sleep(0.002)
        after = await client.jetstream().stream_info(STREAM)
        assert (after.state, after.config) == (before.state, before.config)
        assert await payloads(await other.pull(), 1) == [b"secret"]


async def test_no_reply_forges_a_devices_message(
    registry: Registry, server: EmbeddedServer, publisher: Publisher, callout: Callout
) -> None:
    """NATS asks no permission for the subject of a reply: the border of the account has to hold it."""
    app, secret = registry.create_app("curious", products=[LAMPS])
    await report(publisher, b"one", b"two")
    async with connected(server, app, secret) as me, operator(server) as client:
        (message,) = await (await me.pull()).fetch(1, timeout=5)
        forged = f"/.{DOORS}.door1.user.update"
        await me.client.publish(message.reply, b"+ACK", reply=forged)
        await me.client.publish(message.reply, b"+NXT", reply=forged)
        await me.client.publish(f"$JS.API.CONSUMER.INFO.{STREAM}.{app.key}", b"", reply=forged)
        for body in (b"", b"1", b'{"batch":1,"no_wait":true}', b'{"batch":5,"expires":100000000}', b"nonsense"):
            await me.client.publish(f"{PULL}.{app.key}", body, reply=forged)
        await me.client.flush()
        await asyncio.sleep(0.3)
        state = (await client.jetstream().stream_info(STREAM, subjects_filter=">")).state
        assert state.subjects == {f"/.{LAMPS}.lamp1.user.update": 2}


async def test_sending_is_a_right_of_its_own(registry: Registry, server: EmbeddedServer, callout: Callout) -> None:
    """With it a request reaches the sending service, for its own products alone; without it none does."""
    sender, secret = registry.create_app("sender", products=[LAMPS])
    reader, reader_secret = registry.create_app("reader", products=[LAMPS], sends=False)

    async def serve(message: Msg) -> None:
        await message.respond(b"{}")

    subjects = [f"uplinkd.send./.{LAMPS}.lamp1.user.get", f"uplinkd.send./.broadcast.{LAMPS}.all"]
    async with (
        operator(server) as client,
        connected(server, sender, secret) as first,
        connected(server, reader, reader_secret) as second,
    ):
        await client.subscribe("uplinkd.send.>", cb=serve)
        await client.flush()
        for subject in subjects:
            assert (await first.client.request(subject, b"on", timeout=5)).data == b"{}"
            await second.client.publish(subject, b"on")
            await until(lambda: bool(second.denied))
            assert "permissions violation" in second.denied.pop().lower()
        assert first.denied == []


async def test_a_deleted_application_is_cut_off_at_once(
    registry: Registry, server: EmbeddedServer, publisher: Publisher, callout: Callout
) -> None:
    """Its connections are closed, it is not let in again, and its consumer is removed; another's stay."""
    app, secret = registry.create_app("billing", products=[LAMPS])
    other, other_secret = registry.create_app("other", products=[LAMPS])
    async with (
        connected(server, app, secret) as one,
        connected(server, app, secret) as two,
        connected(server, other, other_secret) as bystander,
    ):
        registry.delete_app("billing")
        started = time.monotonic()
        callout.changed(app.id)
        await until(lambda: one.client.is_closed and two.client.is_closed, 1)
        assert time.monotonic() - started < 0.5
        await refused(server, app, secret)
        assert bystander.client.is_connected
        async with operator(server) as client:
            names = [consumer.name for consumer in await client.jetstream().consumers_info(STREAM)]
            assert names == [other.key]
        await report(publisher, b"x")
        assert await payloads(await bystander.pull(), 1) == [b"x"]


async def test_changed_rights_hold_from_the_next_connection_on_which_is_asked_for(
    registry: Registry, server: EmbeddedServer, publisher: Publisher, callout: Callout
) -> None:
    """Granted and withdrawn products change what the same consumer reads; a client of the usual kind reconnects by itself."""
    app, secret = registry.create_app("billing", products=[LAMPS])
    doors = f"/{DOORS}/door1/user/update"
    async with connected(
        server, app, secret, allow_reconnect=True, max_reconnect_attempts=-1, reconnect_time_wait=0.05
    ) as application:

        async def after(act: Callable[[], object], reconnects: int) -> None:
            act()
            callout.changed(app.id)
            await until(
                lambda: application.client.stats["reconnects"] == reconnects and application.client.is_connected, 5
            )

        pull = await application.pull()
        await report(publisher, b"1")
        assert await payloads(pull, 1) == [b"1"]
        await after(lambda: registry.grant_app("billing", [DOORS]), 1)
        await report(publisher, b"2", topic=doors)
        await report(publisher, b"3")
        assert await payloads(pull, 2) == [b"2", b"3"]
        await after(lambda: registry.withdraw_app("billing", [LAMPS]), 2)
        await report(publisher, b"4")
        await report(publisher, b"5", topic=doors)
        assert await payloads(pull, 1) == [b"5"]
        callout.changed(app.id)  # what it may has not changed: nothing is closed
        await asyncio.sleep(0.3)
        assert application.client.stats["reconnects"] == 2


async def test_what_changed_while_no_worker_ran_is_found_when_one_does(
    settings: Settings, registry: Registry, server: EmbeddedServer, publisher: Publisher
) -> None:
    """A consumer of an application that was deleted meanwhile is removed; one that somebody else made is left alone."""
    app, _ = registry.create_app("billing", products=[LAMPS])
    async with operator(server) as client:
        jetstream = client.jetstream()
        mine = ConsumerConfig(durable_name=app.key, ack_policy=AckPolicy.EXPLICIT, metadata={"uplinkd.app": "billing"})
        await jetstream.add_consumer(STREAM, mine)
        await jetstream.add_consumer(STREAM, durable_name="app-by-hand", ack_policy=AckPolicy.EXPLICIT)
        registry.delete_app("billing")
        task = asyncio.create_task(Callout(registry, server.access, account_key(settings.data / "nats")).run())
        end = time.monotonic() + 5
        while (names := [each.name for each in await jetstream.consumers_info(STREAM)]) != ["app-by-hand"]:
            assert time.monotonic() < end, names
            await asyncio.sleep(0.02)
        await end_tasks(task)


async def test_a_consumer_comes_back_with_the_stream(
    registry: Registry, server: EmbeddedServer, publisher: Publisher, callout: Callout
) -> None:
    """An application that stays connected while somebody deletes the stream reads on."""
    app, secret = registry.create_app("billing", products=[LAMPS])
    async with connected(server, app, secret) as application, operator(server) as client:
        await client.jetstream().delete_stream(STREAM)
        pull = await application.pull()
        end = time.monotonic() + 10
        while True:
            with contextlib.suppress(AssertionError):
                await report(publisher, b"anew")
            with contextlib.suppress(nats.errors.Error):
                assert (await pull.fetch(1, timeout=0.5))[0].data == b"anew"
                break
            assert time.monotonic() < end
        assert not application.denied


@pytest.mark.slow
async def test_an_application_outlives_nats_server(
    registry: Registry, server: EmbeddedServer, publisher: Publisher, callout: Callout
) -> None:
    """kill -9 and a new start with other passwords of ours: it reconnects and reads on. What it acknowledged in the last moment
    may come again."""
    app, secret = registry.create_app("billing", products=[LAMPS])
    async with connected(
        server, app, secret, allow_reconnect=True, max_reconnect_attempts=-1, reconnect_time_wait=0.05
    ) as application:
        pull = await application.pull()
        await report(publisher, b"1", b"2")
        assert await payloads(pull, 1) == [b"1"]
        os.kill(server.pid, signal.SIGKILL)
        await until(lambda: not server.poll())
        await until(lambda: not application.client.is_connected and not publisher.connected)
        server.restart()
        await until(lambda: application.client.is_connected and publisher.connected)
        await report(publisher, b"3")
        found: list[bytes] = []
        while found[-1:] != [b"3"]:
            found += await payloads(pull, 1)
        assert found[-2:] == [b"2", b"3"]


@pytest.mark.slow
async def test_a_login_that_nobody_answers_is_refused_so_that_clients_try_again(
    settings: Settings, registry: Registry, server: EmbeddedServer, publisher: Publisher
) -> None:
    """The workers are away, or busy with something else. The stock client gives up for good when nats-server pings it first."""
    app, secret = registry.create_app("billing", products=[LAMPS])
    started = time.monotonic()
    await refused(server, app, secret)
    assert 1 < time.monotonic() - started < 2
    host, port = server.access.urls[0].removeprefix("nats://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b'CONNECT {"user":"app-x","pass":"y"}\r\nPING\r\n')
    said = await asyncio.wait_for(reader.read(), 5) + await reader.read()
    assert said.startswith(b"INFO ")
    assert said.splitlines()[1:] == [b"-ERR 'Authorization Violation'"]
    writer.close()


async def test_an_outage_of_the_registry_refuses_logins_and_ends_nothing(
    settings: Settings, registry: Registry, server: EmbeddedServer, publisher: Publisher, callout: Callout
) -> None:
    """Who is connected goes on; who comes meanwhile is refused, and let in afterwards."""
    app, secret = registry.create_app("billing", products=[LAMPS])
    file, away = settings.data / "registry.sqlite", settings.data / "away.sqlite"
    async with connected(server, app, secret) as application:
        file.rename(away)
        callout.changed(app.id)
        await refused(server, app, secret)
        await report(publisher, b"x")
        assert await payloads(await application.pull(), 1) == [b"x"]
        away.rename(file)
        async with connected(server, app, secret):
            pass


@pytest.mark.slow
async def test_tls_is_there_for_those_who_ask_and_a_renewed_certificate_is_used(
    settings: Settings, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HTTPS door's certificates. With a renewal nats-server lets go of applications, which reconnect, but not of us."""
    monkeypatch.setattr("uplinkd.engine.embedded._HEALTH_SECONDS", 0.05)
    files = ensure_material(settings)
    server = EmbeddedServer.start(settings, tls=[(pair.certificate, pair.key) for pair in files])
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    task = asyncio.create_task(Callout(registry, server.access, account_key(settings.data / "nats")).run())
    app, secret = registry.create_app("billing", products=[LAMPS])
    context = ssl.create_default_context(cafile=str(settings.data / "tls" / "ca.pem"))
    url = server.access.urls[0].replace("nats://", "tls://")

    async def serial() -> str:
        async with connected(server, app, secret, url=url, tls=context, tls_handshake_first=True) as application:
            transport: Any = application.client._transport
            found: str = transport._io_writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
            return found

    async with connected(server, app, secret, allow_reconnect=True, reconnect_time_wait=0.05) as plain:
        before = await serial()
        for pair in files:
            pair.certificate.unlink()
        ensure_material(settings)
        end = time.monotonic() + 5
        while await serial() == before:
            assert server.poll()
            assert time.monotonic() < end
        await report(publisher, b"x")
        assert await payloads(await plain.pull(), 1) == [b"x"]
        assert publisher.connected
    await end_tasks(task)
    await publisher.stop()
    server.stop()
    assert "Reloaded" in (settings.data / "nats" / "nats.log").read_text()


async def test_messages_of_earlier_versions_are_still_there(settings: Settings) -> None:
    """They were stored in NATS' global account."""
    server = EmbeddedServer.start(settings)
    publisher = open_publisher(settings, server.access)
    await publisher.start()
    await until(lambda: publisher.connected)
    await report(publisher, b"old")
    await publisher.stop()
    server.stop()
    store = settings.data / "nats" / "jetstream"
    (store / "UPLINKD").rename(store / "$G")
    for start in (1, 2):
        server = EmbeddedServer.start(settings)
        reader = await open_reader(server.access)
        assert [message.payload for message in await reader.latest(Query(), 10)] == [b"old"], start
        await reader.close()
        server.stop()
    assert [folder.name for folder in store.iterdir()] == ["UPLINKD"]


@pytest.mark.slow
def test_a_port_for_applications_that_is_taken_is_named(settings: Settings) -> None:
    """With the setting that names another; nothing is left running or locked."""
    with socket.create_server(("127.0.0.1", free_port())) as other:
        taken = settings.model_copy(update={"nats_listen": f"127.0.0.1:{other.getsockname()[1]}"})
        with pytest.raises(Rejected, match=r"127\.0\.0\.1:\d+, for applications, is in use .*--nats-listen"):
            EmbeddedServer.start(taken)
    server = EmbeddedServer.start(taken)
    assert server.access.urls == (f"nats://{taken.nats_listen}",)
    server.stop()


def test_a_server_for_applications_stays_where_they_look_for_it(settings: Settings) -> None:
    """After its death it waits for its port instead of taking another."""
    where = f"127.0.0.1:{free_port()}"
    server = EmbeddedServer.start(settings.model_copy(update={"nats_listen": where}))
    os.kill(server.pid, signal.SIGKILL)
    while server.poll():
        time.sleep(0.005)
    host, _, port = where.partition(":")
    with socket.create_server((host, int(port))), pytest.raises(Rejected, match="--nats-listen"):
        server.restart()
    server.restart()
    assert server.access.urls == (f"nats://{where}",)
    server.stop()


async def test_a_server_of_a_single_command_lets_no_application_in(settings: Settings, registry: Registry) -> None:
    """Nor does one whose owner wants none; they ask nobody."""
    app, secret = registry.create_app("billing", products=[LAMPS])
    for announced, listen in ((False, settings.nats_listen), (True, "")):
        server = EmbeddedServer.start(settings.model_copy(update={"nats_listen": listen}), announced=announced)
        await refused(server, app, secret)
        assert "auth_callout" not in (settings.data / "nats" / "nats.conf").read_text()
        server.stop()


def test_the_signing_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    """In NATS' form; something else in its file is refused."""
    file = tmp_path / "account.nk"
    made = AccountKey.of(file)
    assert made.public[0] == "A"
    assert (len(made.public), file.read_text()[:2]) == (56, "SA")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert AccountKey.of(file).public == made.public
    token = made.sign({"sub": "x", "nats": {}}, now=1_700_000_000)
    assert claims_of(token.encode()) | {"jti": ""} == {
        "sub": "x",
        "nats": {},
        "iss": made.public,
        "iat": 1_700_000_000,
        "jti": "",
    }
    for text in ("", "nonsense", file.read_text().replace("SA", "SU", 1), file.read_text().strip()[:-1] + "!"):
        file.write_text(text)
        with pytest.raises(Rejected, match=r"account\.nk does not hold the seed"):
            AccountKey.of(file)
