"""Applications with the whole program: the example of the documents, revocation, and processes that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nats
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from tests.house import Device, Server, cli, cli_json, environment, make_devices, serving

pytestmark = pytest.mark.xdist_group("apps")

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "read_uplink.py"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("house") / "data", "--workers", "2") as server:
        yield server


@pytest.fixture(scope="module")
def fleet(server: Server) -> Iterator[Device]:
    return iter(make_devices(server, 10))


@pytest.fixture
def device(fleet: Iterator[Device]) -> Device:
    """A device of this test alone, of one product with the others."""
    return next(fleet)


def nats_url(server: Server) -> str:
    url: str = json.loads((server.data / "nats" / "access.json").read_text())["url"]
    return url


def report(device: Device, *payloads: bytes) -> None:
    async def go() -> None:
        try:
            assert await device.login() == 0
            for payload in payloads:
                code, _ = await device.publish(payload)
                assert code == 0
        finally:
            await device.close()

    asyncio.run(go())


class Reader:
    """The example as a process of its own; the lines that it prints."""

    def __init__(self, server: Server, key: str, secret: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, EXAMPLE],
            env=environment(NATS_URL=nats_url(server), APP_KEY=key, APP_SECRET=secret),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line.strip())

    def until(self, text: str, *, within: float = 15) -> list[str]:
        """The lines up to the one that ends with `text`."""
        found: list[str] = []
        end = time.monotonic() + within
        while not found or not found[-1].endswith(text):
            try:
                found.append(self._lines.get(timeout=max(0.01, end - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"{text!r} was not read; only {found}") from None
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join()
        assert self.process.stdout
        self.process.stdout.close()


@contextlib.contextmanager
def reading(server: Server, key: str, secret: str) -> Iterator[Reader]:
    reader = Reader(server, key, secret)
    try:
        yield reader
    finally:
        reader.close()


def create(server: Server, name: str, *products: str) -> tuple[str, str]:
    """Key and secret of a new application; one of that name that another test has left is deleted."""
    cli("app", "delete", name, data=server.data, check=False)
    options = [option for product in products for option in ("--product", product)]
    made = cli_json("app", "create", name, *options, data=server.data)
    return made["key"], made["secret"]


async def test_a_client_that_looks_at_its_consumer_first_is_answered_once(server: Server, device: Device) -> None:
    """nats-server itself says nothing about JetStream to applications; and a messageId can be made of what the consumer tells."""
    key, secret = create(server, "looking", device.product)
    heard: list[bytes] = []

    async def take(message: Msg) -> None:
        heard.append(message.data)

    nc = await nats.connect(nats_url(server), user=key, password=secret, inbox_prefix=f"_INBOX.{key}")
    try:
        await nc.subscribe(f"_INBOX.{key}.look", cb=take)
        await nc.publish(f"$JS.API.CONSUMER.INFO.UPLINKD.{key}", b"", reply=f"_INBOX.{key}.look")
        uplink = await nc.jetstream().pull_subscribe("", durable=key, stream="UPLINKD")
        info = await uplink.consumer_info()
        assert await device.login() == 0
        _, message_id = await device.publish(b"whose id is known")
        messages = await uplink.fetch(100, timeout=5)
        while messages[-1].data != b"whose id is known":
            messages = await uplink.fetch(100, timeout=5)
        assert info.config.metadata
        assert int(info.config.metadata["uplinkd.base"]) + messages[-1].metadata.sequence.stream == message_id
        assert [json.loads(each)["name"] for each in heard] == [key]
    finally:
        await device.close()
        await nc.close()


def test_the_example_reads_what_devices_report(server: Server, device: Device) -> None:
    """As it stands in the documents; and what it has acknowledged it does not read again."""
    key, secret = create(server, "billing", device.product)
    report(device, b"one", b"two")
    subject = f"/.{device.product}.{device.name}.user.update"
    with reading(server, key, secret) as reader:
        lines = [line for line in reader.until("two") if line.startswith(subject)]
        assert lines == [f"{subject} one", f"{subject} two"]
        report(device, b"three")
        assert [line for line in reader.until("three") if line.startswith(subject)] == [f"{subject} three"]
        time.sleep(0.2)
    report(device, b"four")
    with reading(server, key, secret) as reader:
        assert [line for line in reader.until("four") if line.startswith(subject)] == [f"{subject} four"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_documents_show_the_example_as_it_is_tested(language: str) -> None:
    """Word for word, and of the promised length."""
    example = EXAMPLE.read_text()
    assert f"```python\n{example}```" in (ROOT / "docs" / language / "apps.md").read_text()
    assert len([line for line in example.splitlines() if line.strip()]) <= 15


# The stock client leaves behind the socket of a connection that was refused; it is collected here, not in somebody else's test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_deleted_application_is_cut_off_within_a_second(server: Server, device: Device) -> None:
    """While it is connected and reading; it is not let in again, and its consumer goes with it."""
    key, secret = create(server, "billing", device.product)
    other, other_secret = create(server, "other", device.product)

    async def life() -> float:
        closed = asyncio.Event()

        async def gone() -> None:
            closed.set()

        async def ignore(_: Exception) -> None:
            pass

        async def connect(key: str, secret: str) -> Client:
            return await nats.connect(
                nats_url(server),
                user=key,
                password=secret,
                inbox_prefix=f"_INBOX.{key}",
                closed_cb=gone,
                error_cb=ignore,
                allow_reconnect=False,
                max_reconnect_attempts=1,
            )

        mine, theirs = await connect(key, secret), await connect(other, other_secret)
        await asyncio.to_thread(cli, "app", "delete", "billing", data=server.data)
        started = time.monotonic()
        await asyncio.wait_for(closed.wait(), 5)
        took = time.monotonic() - started
        assert mine.is_closed
        with pytest.raises(nats.errors.Error, match="Authorization Violation"):
            await connect(key, secret)
        assert theirs.is_connected
        await theirs.close()
        await asyncio.sleep(0.1)
        return took

    assert asyncio.run(life()) < 1
    gc.collect()


@pytest.mark.slow
def test_an_application_reads_on_after_kills(server: Server, device: Device) -> None:
    """kill -9 of one worker, of all workers, of nats-server: each time it goes on, and a new one is let in."""
    key, secret = create(server, "billing", device.product)
    with reading(server, key, secret) as reader:
        report(device, b"0")
        reader.until(" 0")
        victims = [server.children("python")[:1], server.children("python"), server.children("nats-server")]
        for number, pids in enumerate(victims, 1):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            end = time.monotonic() + 15
            while True:
                try:
                    report(device, b"%d" % number)
                    break
                except (AssertionError, OSError, asyncio.IncompleteReadError):
                    assert time.monotonic() < end
                    time.sleep(0.1)
            reader.until(f" {number}")
        assert reader.process.poll() is None
    newcomer, newcomer_secret = create(server, "newcomer", device.product)
    report(device, b"last")
    with reading(server, newcomer, newcomer_secret) as reader:
        reader.until(" last")


@pytest.mark.slow
def test_secrets_of_applications_are_nowhere_to_be_read(server: Server, device: Device) -> None:
    """Not in the log, nor in anything under the data folder."""
    key, secret = create(server, "billing", device.product)
    report(device, b"one")
    with reading(server, key, secret) as reader:
        reader.until(" one")
    cli("app", "delete", "billing", data=server.data)
    refusal = f"refused at NATS: user '{key}' from 127.0.0.1: there is no such application"
    with reading(server, key, secret):
        end = time.monotonic() + 15
        while refusal not in server.log.read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
    for file in filter(Path.is_file, [server.log, *server.data.rglob("*")]):
        assert secret.encode() not in file.read_bytes(), file


def test_an_application_sends_down_as_the_documents_say(server: Server, device: Device) -> None:
    """To a device that is not connected: the message waits for it."""
    key, secret = create(server, "billing", device.product)

    async def send() -> dict[str, object]:
        nc = await nats.connect(nats_url(server), user=key, password=secret, inbox_prefix=f"_INBOX.{key}")
        try:
            subject = f"uplinkd.send./.{device.product}.{device.name}.user.get"
            answer: dict[str, object] = json.loads((await nc.request(subject, b'{"on":true}', timeout=5)).data)
            return answer
        finally:
            await nc.close()
            await asyncio.sleep(0.1)

    answer = asyncio.run(send())
    assert answer["way"] == "waits"
    assert isinstance(answer["messageId"], int)
