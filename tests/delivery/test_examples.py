"""The receivers in examples/, as they stand, and the requests in the documents."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.clients.tools import ROOT, needs, node_modules
from tests.delivery.receiver import HERE, group, message
from tests.house import until
from tests.ports import free_port
from uplinkd.core.cloudevents import event_of, request_of
from uplinkd.core.groups import Form, Group
from uplinkd.core.model import DeviceName, Message, ProductKey
from uplinkd.core.webhooks import id_of, key_of, signed
from uplinkd.delivery.sender import Sender
from uplinkd.delivery.webhook import Pump
from uplinkd.engine.memory import MemoryDeliveries


@asynccontextmanager
async def example(*command: str, folder: Path, secret: str) -> AsyncGenerator[tuple[int, list[str]]]:
    """The port of a receiver, and the lines that it prints."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *command, str(port), cwd=folder, env=os.environ | {"WEBHOOK_SECRET": secret}, stdout=asyncio.subprocess.PIPE
    )
    lines: list[str] = []

    async def read() -> None:
        assert process.stdout
        async for line in process.stdout:
            lines.append(line.decode().rstrip("\n"))

    reading = asyncio.create_task(read())
    try:
        yield port, lines
    finally:
        process.kill()
        await process.wait()
        await reading


async def delivered(mine: Group, *messages: Message) -> None:
    """Have them delivered; the receiver may only just be starting."""
    sender, deliveries = Sender(HERE), MemoryDeliveries()
    pump = Pump(mine, deliveries, sender, haste=20)
    task = asyncio.create_task(pump.run())
    deliveries.offer(*messages)
    await until(lambda: len(deliveries.accepted) == len(messages), 20)
    await pump.stop(1)
    await task
    await sender.close()


@pytest.mark.parametrize("form", list(Form))
async def test_the_python_receiver_prints_each_message_once(form: Form, tmp_path: Path) -> None:
    """In any form; what comes twice is known by its id, and what another secret has signed is refused."""
    shutil.copy(ROOT / "examples" / "webhook_receiver.py", tmp_path)
    mine = group("http://127.0.0.1/", form=form, lanes=1)
    async with example(sys.executable, "webhook_receiver.py", folder=tmp_path, secret=mine.secret) as (port, lines):
        url = f"http://127.0.0.1:{port}/"
        mine = Group(1, "g", group(url, form=form, lanes=1).plan, 0, 1, 0, mine.secret)
        await delivered(mine, message(1), message(2), message(1))
        await until(lambda: len(lines) == 2)
        topic = message(1).topic
        assert [line.split(" b'")[0] for line in lines] == [f"1 {topic}", f"2 {topic}"]
        assert "{" in lines[0]
        sender = Sender(HERE)
        headers, body = request_of(form, [event_of(message(3))])
        headers |= signed(key_of(group(url).secret), "3", body, now=1)
        assert (await sender.post(url, headers, body, timeout=5)).status == 401
        await sender.close()


@needs("node", "npm")
@pytest.mark.parametrize("form", [Form.STRUCTURED, Form.BATCH])
async def test_the_node_receiver_prints_each_message_once(form: Form, tmp_path: Path) -> None:
    """The same with Node.js."""
    shutil.copy(ROOT / "examples" / "webhook_receiver.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(node_modules())
    mine = group("http://127.0.0.1/", form=form)
    async with example("node", "webhook_receiver.mjs", folder=tmp_path, secret=mine.secret) as (port, lines):
        url = f"http://127.0.0.1:{port}/"
        mine = Group(1, "g", group(url, form=form, lanes=1).plan, 0, 1, 0, mine.secret)
        await delivered(mine, message(1), message(2, payload=b"on"), message(1))
        await until(lambda: len(lines) == 2)
        topic = message(1).topic
        assert lines == [f'1 {topic} {{"n":1}}', f"2 {topic} on"]


SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
REPORT = Message(
    1234567890123456789,
    "/a1XXXXXXXXX/lamp-0001/user/update",
    ProductKey("a1XXXXXXXXX"),
    DeviceName("lamp-0001"),
    1790000000012,
    b'{"on":true}',
)
BYTES = Message(
    1234567890123456790,
    "/a1XXXXXXXXX/lamp-0002/user/update",
    ProductKey("a1XXXXXXXXX"),
    DeviceName("lamp-0002"),
    1790000000345,
    b"\x01\xff",
)


def written(form: Form, *messages: Message) -> str:
    """A request as it is shown in the documents."""
    headers, body = request_of(form, [event_of(each) for each in messages])
    headers |= signed(key_of(SECRET), id_of([each.id for each in messages]), body, now=1790000001)
    head = {"Host": "backend.example.com", "User-Agent": "uplinkd/0.1.0"} | headers
    head["Content-Length"] = str(len(body))
    lines = [f"{name}: {value}" for name, value in head.items()]
    return "\n".join(["POST /uplinkd HTTP/1.1", *lines, "", body.decode()])


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("form", list(Form))
def test_the_requests_in_the_documents_are_those_that_are_sent(form: Form, language: str) -> None:
    """Byte for byte, with a signature that verifies."""
    request = written(form, *([REPORT, BYTES] if form is Form.BATCH else [REPORT]))
    assert request in (ROOT / "docs" / language / "webhooks.md").read_text()
