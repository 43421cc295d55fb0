"""A backend that gets webhooks, and answers what a test wants."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from uplinkd.core.groups import Group, Plan, Webhook
from uplinkd.core.model import DeviceName, Message, ProductKey
from uplinkd.core.names import make_webhook_secret
from uplinkd.settings import Settings
from uplinkd.tasks import end_tasks

HERE = Settings(webhook_networks=("127.0.0.0/8",))
PRODUCT = ProductKey("a1hook00000")


@dataclass(slots=True)
class Got:
    """A request: `headers` with names in lower case."""

    target: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def ids(self) -> list[int]:
        """The messages in it."""
        if "ce-id" in self.headers:
            return [int(self.headers["ce-id"])]
        document = json.loads(self.body)
        return [int(each["id"]) for each in (document if isinstance(document, list) else [document])]

    @property
    def payloads(self) -> list[Any]:
        if "ce-id" in self.headers:
            return [self.body]
        document = json.loads(self.body)
        return [each["data"] for each in (document if isinstance(document, list) else [document])]


Answers = Callable[[Got], "bytes | int | Awaitable[bytes | int]"]


def answer(status: int, text: str = "", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(text.encode())}", *headers]
    return "\r\n".join([*lines, "", text]).encode()


@dataclass(slots=True)
class Receiver:
    answers: Answers
    port: int = 0
    got: list[Got] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    connections: int = 0
    under_way: int = 0
    most_under_way: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if task := asyncio.current_task():
            self.tasks.append(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                got = Got(head[0].split()[1], headers, body, asyncio.get_running_loop().time())
                self.got.append(got)
                self.under_way += 1
                self.most_under_way = max(self.most_under_way, self.under_way)
                said = self.answers(got)
                if not isinstance(said, bytes | int):
                    said = await said
                self.under_way -= 1
                if not said and isinstance(said, bytes):
                    return
                if said in (200, 202, 204):
                    self.accepted += got.ids if "ce-id" in headers or b'"id"' in body else []
                writer.write(answer(said) if isinstance(said, int) else said)
        except (EOFError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def receiving(
    answers: Answers = lambda got: 200, *, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncGenerator[Receiver]:
    receiver = Receiver(answers)
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", port, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        await end_tasks(*receiver.tasks)


def group(url: str, *, name: str = "backend", tries: int = 3, ack_wait: float = 30.0, **hook: Any) -> Group:
    plan = Plan(tries=tries, ack_wait=ack_wait, webhook=Webhook(url=url, **hook))
    return Group(1, name, plan, 0, 1, 0, make_webhook_secret())


def message(number: int, device: str = "lamp-1", payload: bytes | None = None) -> Message:
    return Message(
        number,
        f"/{PRODUCT}/{device}/user/update",
        PRODUCT,
        DeviceName(device),
        1_790_000_000_000 + number,
        payload if payload is not None else b'{"n":%d}' % number,
    )
