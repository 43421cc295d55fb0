"""How soon the console's pages and the management API answer beside a large fleet: 100,000 devices, a million stored messages,
100,000 refusals."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from bench.filling import fill
from bench.peers import free_port, start_uplinkd
from uplinkd.core.operators import Role
from uplinkd.journal import Journal, Refusal
from uplinkd.registry import ImportRow, Sighting, open_registry
from uplinkd.registry.passwords import hash_password
from uplinkd.settings import Settings

__all__ = ["measure"]

PRODUCT = "pages"
DEVICES, MESSAGES, REFUSALS = 100_000, 1_000_000, 100_000
_PASSWORD = "correct horse battery"
_TIMES = 9
_BATCH = 5000


def measure(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """`{"pages": {path: {"median": ms, "worst": ms}, …}}`; the first visit counts among the `_TIMES`."""
    data = folder / "data"
    data.mkdir(parents=True)
    settings = Settings(data=data, nats_listen="")
    say(f"console: {DEVICES:,} devices, {MESSAGES:,} messages, {REFUSALS:,} refusals …")
    _fleet(settings)
    # From every second device, in turn.
    asyncio.run(fill(settings, MESSAGES, lambda number: f"/{PRODUCT}/{_name(2 * number % DEVICES)}/user/update"))
    asyncio.run(_refusals(settings))
    port = free_port()
    with start_uplinkd(folder, data, "--console-listen", f"127.0.0.1:{port}"):
        say("console: pages …")
        return {"pages": _visit(f"http://127.0.0.1:{port}")}


def _name(number: int) -> str:
    return f"device{number:06}"


def _fleet(settings: Settings) -> None:
    """Half of the devices are online; and somebody may look."""
    registry = open_registry(settings)
    try:
        registry.create_product("a large fleet", key=PRODUCT)
        registry.import_devices(ImportRow(number, PRODUCT, _name(number), "") for number in range(DEVICES))
        now = round(time.time() * 1000)
        for first in range(1, DEVICES, _BATCH):
            seen = [Sighting(number, now, "192.0.2.1") for number in range(first, first + _BATCH, 2)]
            registry.told([each.id for each in registry.sighted(seen, now=now, timeout=600_000)])
        registry.operators.create_user("bench", Role.ADMIN, hash_password(_PASSWORD), one_time=False)
    finally:
        registry.close()


async def _refusals(settings: Settings) -> None:
    journal = Journal(settings)
    now = round(time.time() * 1000)
    for number in range(REFUSALS):
        device, code = _name(2 * number % DEVICES), 20000 if number % 3 else 30001
        facts = (
            f"{number:016x}",
            now - REFUSALS + number,
            "auth",
            code,
            200,
            PRODUCT,
            device,
            f"192.0.2.{number % 200}",
        )
        journal.record(Refusal(*facts, "", "wrong sign"))
        if number % 4000 == 3999:
            await journal.flush()
    await journal.close()


def _visit(base: str) -> dict[str, dict[str, float]]:
    product, device = f"/products/{PRODUCT}", _name(50_000)
    found: dict[str, dict[str, float]] = {}
    with httpx.Client(base_url=base, timeout=30) as browser:
        if browser.post("/sign-in", data={"name": "bench", "password": _PASSWORD}).status_code != 303:
            raise SystemExit("the benchmark could not sign in to the console")
        newest = browser.get("/api/v1/messages", params={"limit": 1}).json()["items"][0]["messageId"]
        for path in (
            "/",
            "/products",
            product,
            f"{product}?prefix=device0999",
            f"{product}?state=disabled",
            f"{product}?cursor=device099000",
            f"{product}/devices/{device}",
            "/messages",
            f"/messages?product={PRODUCT}&device={device}",
            f"/messages?topic=/{PRODUCT}/{device}/user/update",
            "/messages?since=15m",
            f"/messages/{newest}",
            "/logs",
            f"/logs?device={device}",
            "/logs?code=40000",
            "/logs?requestId=00000000000001f4",
            "/audit",
            "/search?q=device0500",
            "/api/v1/stats",
            "/metrics",
        ):
            took = [_seconds(browser, path) for _ in range(_TIMES)]
            found[path] = {"median": statistics.median(took) * 1000, "worst": max(took) * 1000}
    return found


def _seconds(browser: httpx.Client, path: str) -> float:
    begun = time.perf_counter()
    answer = browser.get(path)
    if answer.status_code not in (200, 303):
        raise SystemExit(f"{path} was answered {answer.status_code}: {answer.text[:200]}")
    return time.perf_counter() - begun
