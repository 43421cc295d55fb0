"""The operator's door without sockets: real registry and pages, the engine in memory."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from argon2 import PasswordHasher
from fastapi import FastAPI

from uplinkd.admin.access import hash_password
from uplinkd.admin.figures import Figures
from uplinkd.admin.office import Office
from uplinkd.admin.server import application
from uplinkd.core.operators import Role, Scope
from uplinkd.core.subjects import to_subject
from uplinkd.engine import Told
from uplinkd.engine.memory import MemoryBus, MemoryDesk, MemoryEngine
from uplinkd.journal import Journal, Refusal
from uplinkd.metrics import Metrics
from uplinkd.registry import open_registry, passwords
from uplinkd.settings import Settings

PASSWORD = "correct horse battery"
URL = "http://localhost"


@pytest.fixture(autouse=True)
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """A password that is worth its 64 MiB takes an eighth of a second, and tests sign in often. A check goes by what the hash
    says of itself."""
    monkeypatch.setattr(passwords, "hasher", PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))


@dataclass
class House:
    """`key(scope)` and `page(role)` give clients that are let in; `anyone` is nobody."""

    office: Office
    engine: MemoryEngine
    bus: MemoryBus
    desk: MemoryDesk
    journal: Journal
    metrics: Metrics
    transport: httpx.ASGITransport
    sent: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def registry(self) -> Any:
        return self.office.registry

    def client(self, **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=self.transport, base_url=URL, headers=headers)

    def key(self, scope: Scope = Scope.ADMIN) -> httpx.AsyncClient:
        _, key = self.registry.operators.create_key(f"{scope}-{time.monotonic_ns()}", scope)
        return self.client(Authorization=f"Bearer {key}")

    @asynccontextmanager
    async def signed_in(self, role: Role = Role.ADMIN) -> AsyncIterator[Browser]:
        name = f"{role}-{time.monotonic_ns()}"
        self.registry.operators.create_user(name, role, hash_password(PASSWORD), one_time=False)
        async with self.client() as client:
            browser = Browser(client, name)
            answer = await client.post("/sign-in", data={"name": name, "password": PASSWORD})
            assert answer.status_code == 303, answer.text
            yield browser

    async def stored(self, topic: str, payload: bytes) -> int:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.engine.publish(to_subject(topic).encode(), payload, lambda number, _: done.set_result(number))
        return await done

    async def refused(self, **facts: Any) -> Refusal:
        known = {
            "request_id": "0123456789abcdef",
            "at": round(time.time() * 1000),
            "endpoint": "auth",
            "code": 20000,
            "status": 200,
            "product_key": "pk",
            "device_name": "lamp-1",
            "address": "192.0.2.1",
            "topic": "",
            "reason": "wrong sign",
        }
        refusal = Refusal(**{**known, **facts})
        self.journal.record(refusal)
        await self.journal.flush()
        return refusal


@dataclass
class Browser:
    """Posts forms with the session's CSRF token, as pages do."""

    client: httpx.AsyncClient
    name: str

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.client.get(path, **options)

    async def post(self, path: str, **fields: Any) -> httpx.Response:
        from uplinkd.admin.access import csrf_token
        from uplinkd.admin.doorkeeper import COOKIE

        return await self.client.post(path, data={"csrf": csrf_token(self.client.cookies[COOKIE]), **fields})


@pytest.fixture(scope="session")
def application_of() -> Callable[[Office], FastAPI]:
    """One application, which is given another office: FastAPI prepares its routes at their first requests, a third of a second."""
    made: list[FastAPI] = []

    def application_of(office: Office) -> FastAPI:
        if not made:
            made.append(application(office))
        made[0].state.office = office
        return made[0]

    return application_of


@pytest.fixture
async def house(tmp_path: Path, application_of: Callable[[Office], FastAPI]) -> AsyncIterator[House]:
    settings = Settings(data=tmp_path)
    registry = open_registry(settings)
    bus = MemoryBus()
    engine = MemoryEngine(bus=bus)
    await engine.start()
    await bus.connect()
    metrics = Metrics(1)
    desk = MemoryDesk(bus)

    async def reader() -> MemoryEngine:
        return engine

    office = Office(
        settings=settings,
        registry=registry,
        bus=bus,
        figures=Figures(metrics.read),
        open_reader=reader,
        desk=desk,
        https=("127.0.0.1", 8443),
        mqtt=("127.0.0.1", 8883),
    )
    journal = Journal(settings)
    transport = httpx.ASGITransport(application_of(office), raise_app_exceptions=False, client=("192.0.2.9", 1234))
    made = House(office, engine, bus, desk, journal, metrics, transport)

    def answer(told: Told) -> None:
        made.sent.append((told.subject, told.payload))
        document = {"sessions": 3} if "broadcast" in told.subject else {"messageId": 2**60 + 1, "way": "waits"}
        bus.tell(told.reply, json.dumps(document).encode())

    bus.listen("uplinkd.send.>", answer)
    yield made
    await office.close()
    await journal.close()
    registry.close()
    metrics.close()
