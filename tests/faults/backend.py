"""Backends that take what is delivered, and count: over HTTP as a webhook's target, over AMQP with the Proton client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from tests.house import Server, environment
from tests.ports import free_port
from uplinkd.core.topics import owner


@dataclass
class Target:
    """An HTTP server that answers as `answer` says (it is given how many requests there were), and remembers what it accepted."""

    port: int = field(default_factory=free_port)
    answer: Callable[[int], int] = lambda _: 204
    requests: int = 0
    got: list[tuple[int, str]] = field(default_factory=list)
    _runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/uplinkd"

    async def start(self) -> None:
        app = web.Application(client_max_size=16 * 1024**2)
        app.router.add_post("/uplinkd", self._post)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def _post(self, request: web.Request) -> web.Response:
        self.requests += 1
        body = await request.read()
        status = self.answer(self.requests)
        if status < 300:
            if request.content_type == "application/cloudevents-batch+json":
                self.got += [(int(each["id"]), each["subject"]) for each in json.loads(body)]
            else:  # the sample event's id is no number
                self.got += [(int(number), topic) for number, topic in _single(request, body) if number.isdecimal()]
        return web.Response(status=status)


def _single(request: web.Request, body: bytes) -> list[tuple[str, str]]:
    if request.content_type == "application/cloudevents+json":
        event = json.loads(body)
        return [(event["id"], event["subject"])]
    return [(request.headers["ce-id"], request.headers["ce-subject"])]


def missing(acknowledged: dict[int, bytes], got: list[tuple[int, str]]) -> set[int]:
    return acknowledged.keys() - {number for number, _ in got}


def duplicates(got: list[tuple[int, str]]) -> int:
    """How many deliveries were of a message that had come before."""
    return sum(count - 1 for count in Counter(number for number, _ in got).values())


def out_of_order(got: list[tuple[int, str]]) -> list[int]:
    """Messages whose first delivery came after that of a later message of the same device."""
    latest: dict[str, int] = {}
    seen: set[int] = set()
    late = []
    for number, topic in got:
        if number in seen:
            continue
        seen.add(number)
        device = owner(topic)[1]
        if number < latest.get(device, 0):
            late.append(number)
        latest[device] = max(number, latest.get(device, 0))
    return late


async def all_there(acknowledged: dict[int, bytes], got: list[tuple[int, str]], seconds: float) -> None:
    """Wait until everything that was acknowledged has come."""
    end = asyncio.get_running_loop().time() + seconds
    while left := missing(acknowledged, got):
        assert asyncio.get_running_loop().time() < end, f"{len(left)} of {len(acknowledged)} did not come"
        await asyncio.sleep(0.05)


class AmqpConsumer:
    """A process with the Proton client that consumes a group; with `hold` it accepts nothing of what it gets. `got` is what came."""

    def __init__(self, server: Server, app: dict[str, str], group: str, *, hold: bool = False) -> None:
        url = f"amqps://localhost:{server.amqp_port}"
        arguments = [url, app["key"], app["secret"], group, str(server.ca), "hold" if hold else "accept"]
        self.got: list[tuple[int, str]] = []
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "consumer.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            number, topic = line.split()
            self.got.append((int(number), topic))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join()
        assert self.process.stdout
        self.process.stdout.close()
