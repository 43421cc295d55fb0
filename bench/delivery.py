"""Delivery to backends: how many messages a second a group gets, and how long each takes, at several rates of publishing; and a
backlog, as fast as it goes. What is published goes straight to the engine: the cost of the devices' doors is measured elsewhere."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.load import LOAD_CORE, in_turn
from bench.peers import PIN, PRODUCT, Peer, cpu_seconds, free_port, tree, uplinkd
from uplinkd.core.groups import Form, Group, Plan, Webhook
from uplinkd.core.model import ProductKey
from uplinkd.engine.embedded import Access, access_for
from uplinkd.engine.groups import open_desk
from uplinkd.engine.jetstream import JetStreamPublisher
from uplinkd.registry import Registry, open_registry
from uplinkd.settings import Settings

__all__ = ["measure"]

RATES = (1000, 5000, 15_000)
BACKLOG = 60_000
_SECONDS = 4.0
_PATIENCE = 120.0
_PAYLOAD = 200
Publish = Callable[[float, float], Awaitable[None]]
_WAYS = {
    "webhook, batches of 100": Webhook(url="", form=Form.BATCH, batch=100, lanes=4),
    "webhook, one by one": Webhook(url="", form=Form.BINARY, lanes=16),
    "AMQP, Proton client": None,
}


def measure(folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """`{"delivery": {way: {"rates": {rate: {"delivered", "p50", "p99", "left"}}, "backlog": {"rate", "cpu_micros"}}}, …}`: messages
    a second, ms from the publish to the backend, what was not delivered when the publishing ended, µs of CPU of the process that
    delivers for a message."""
    folder.mkdir()
    found = {}
    for number, (way, webhook) in enumerate(_WAYS.items()):
        place = folder / f"{number}"
        amqp = free_port()
        with (
            uplinkd(
                place, options.connections, "--webhook-networks", "127.0.0.0/8", "--amqp-listen", f"127.0.0.1:{amqp}"
            ) as peer,
            _backend(place, webhook, amqp, peer) as (backend, group),
        ):
            say(f"delivery, {way} …")
            found[way] = asyncio.run(_measured(place, peer, backend, group))
    say("delivery: HTTPS without and with a group that is posted …")
    with _posted(folder / "beside", options) as (without, peer):
        beside = in_turn(
            folder / "beside", without, peer, options, lambda number: say(f"delivery: HTTPS, round {number} …")
        )
    return {"delivery": found, "beside delivery": beside}


@contextlib.contextmanager
def _posted(folder: Path, options: argparse.Namespace) -> Iterator[tuple[Peer, Peer]]:
    folder.mkdir()
    with (
        uplinkd(folder / "off", options.connections) as without,
        uplinkd(folder / "on", options.connections, "--webhook-networks", "127.0.0.0/8") as peer,
        _backend(folder / "on", _WAYS["webhook, batches of 100"], 0, peer),
    ):
        yield without, peer


@dataclass
class _Backend:
    """A process that takes messages, on the core of the load."""

    process: subprocess.Popen[str]
    came: list[tuple[float, list[float]]] = field(default_factory=list)

    def read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            told = json.loads(line)
            self.came.append((told["at"], told["took"]))

    @property
    def count(self) -> int:
        return sum(len(took) for _, took in self.came)


@contextlib.contextmanager
def _backend(folder: Path, webhook: Webhook | None, amqp: int, peer: Peer) -> Iterator[tuple[_Backend, Group]]:
    registry = open_registry(Settings(data=folder / "data"))
    arguments = [*PIN, LOAD_CORE, sys.executable, "-m", "bench.backend"]
    plan = Plan(products=(ProductKey(PRODUCT),), ack_wait=30)
    try:
        if webhook:
            arguments += ["http", "0"]
        else:
            app, secret = registry.create_app("backend", products=[PRODUCT])
            group = registry.groups.create("backend", Plan(products=plan.products, apps=("backend",)))
            user, password = _credentials(app.key, secret, group.name)
            arguments += ["amqp", f"amqps://localhost:{amqp}", user, password, str(peer.ca)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                port = json.loads(process.stdout.readline())["port"]
                if webhook:
                    facts = {**_facts(webhook), "url": f"http://127.0.0.1:{port}/"}
                    group = registry.groups.create("backend", Plan(products=plan.products, webhook=Webhook(**facts)))
                backend = _Backend(process)
                threading.Thread(target=backend.read, daemon=True).start()
                yield backend, group
            finally:
                process.terminate()
    finally:
        registry.close()


def _facts(webhook: Webhook) -> dict[str, Any]:
    return {"form": webhook.form, "batch": webhook.batch, "lanes": webhook.lanes}


def _credentials(key: str, secret: str, group: str) -> tuple[str, str]:
    stamp = round(time.time() * 1000)
    user = f"bench|authMode=aksign,signMethod=hmacsha1,timestamp={stamp},authId={key},consumerGroupId={group}|"
    sign = hmac.new(secret.encode(), f"authId={key}&timestamp={stamp}".encode(), hashlib.sha1).digest()
    return user, base64.b64encode(sign).decode()


async def _measured(folder: Path, peer: Peer, backend: _Backend, group: Group) -> dict[str, Any]:
    settings = Settings(data=folder / "data", publish_timeout=2)
    with access_for(settings, start=False) as access:
        desk = await open_desk(access)
        try:
            async with _publishing(settings, access) as publish:
                await publish(1000, 1.0)  # a warm-up
                await _delivered(backend, 1000)
                rates = {}
                for rate in RATES:
                    before, begun = backend.count, time.monotonic()
                    await publish(rate, _SECONDS)
                    await asyncio.sleep(0.3)  # what is told of each quarter of a second
                    seconds, delivered = time.monotonic() - begun - 0.3, backend.count - before
                    left = (await desk.state(group)).lag
                    await _delivered(backend, before + round(rate * _SECONDS))
                    took = sorted(each for at, part in backend.came if at >= begun for each in part)
                    rates[str(rate)] = {
                        "delivered": min(delivered, round(rate * _SECONDS)) / seconds,
                        "p50": statistics.median(took),
                        "p99": took[int(len(took) * 0.99)],
                        "left": left,
                    }
                return {"rates": rates, "backlog": await _backlog(folder, peer, backend, publish)}
        finally:
            await desk.close()


async def _backlog(folder: Path, peer: Peer, backend: _Backend, publish: Publish) -> dict[str, float]:
    """The group is paused while messages are stored; then it gets them as fast as it goes."""
    registry = open_registry(Settings(data=folder / "data"))
    try:
        group = registry.groups.get("backend")
        deliver = next(pid for pid in tree(*peer.roots) if "uplinkd-deliver" in Path(f"/proc/{pid}/stat").read_text())
        _pause(registry, group, paused=True)
        await asyncio.sleep(1.0)
        before = backend.count
        await publish(0, BACKLOG)
        _pause(registry, group, paused=False)
        while backend.count == before:
            await asyncio.sleep(0.05)
        begun, count, cpu = time.monotonic(), backend.count, cpu_seconds(deliver)
        await _delivered(backend, before + BACKLOG)
        done = backend.count - count
        return {
            "rate": done / (time.monotonic() - begun),
            "cpu_micros": (cpu_seconds(deliver) - cpu) / done * 1e6,
        }
    finally:
        registry.close()


def _pause(registry: Registry, group: Group, *, paused: bool) -> None:
    registry.groups.change(group.name, replace(group.plan, paused=paused))


async def _delivered(backend: _Backend, count: int) -> None:
    end = time.monotonic() + _PATIENCE
    while backend.count < count:
        if time.monotonic() > end or backend.process.poll() is not None:
            raise SystemExit(f"{count - backend.count} of {count} messages were not delivered within {_PATIENCE:g} s")
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def _publishing(settings: Settings, access: Access) -> AsyncIterator[Publish]:
    """Stores messages: so many a second for so many seconds, or (rate 0) so many as fast as the engine takes them."""
    publisher = JetStreamPublisher(settings, access)
    await publisher.start()
    while not publisher.connected:
        await asyncio.sleep(0.01)
    subjects = [f"/.{PRODUCT}.device{number:04}.user.update".encode() for number in range(64)]
    under_way = 0

    def done(message_id: int, reason: str) -> None:
        nonlocal under_way
        under_way -= 1
        if not message_id:
            raise SystemExit(f"a message was not stored: {reason}")

    async def publish(rate: float, amount: float) -> None:
        nonlocal under_way
        total, begun, sent = round(rate * amount) if rate else round(amount), time.monotonic(), 0
        while sent < total:
            due = min(total, round((time.monotonic() - begun) * rate)) if rate else total
            while sent < due and under_way < 2000:
                head = b'{"sent":%d,"pad":"' % time.monotonic_ns()
                publisher.publish(subjects[sent % 64], head + b"x" * (_PAYLOAD - len(head) - 2) + b'"}', done)
                sent, under_way = sent + 1, under_way + 1
            await asyncio.sleep(0.001)
        while under_way:
            await asyncio.sleep(0.002)

    try:
        yield publish
    finally:
        await publisher.stop()
