"""The real server with its registry in a real PostgreSQL: devices, operators, an outage; and the move there from SQLite."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.databases import Wire, end_connections
from tests.house import Device, Server, alive, cli, until

UNKNOWN = 20004  # a device that is not known here while the registry is away


def run(server: Server, *arguments: str) -> bytes:
    return cli(*arguments, "--database-url", server.variables["UPLINKD_DATABASE_URL"], data=server.data).stdout


def made(server: Server, ask: Callable[..., bytes], *names: str) -> list[Device]:
    product = json.loads(ask("product", "create", "lamps", "--json"))["productKey"]
    devices = [json.loads(ask("device", "create", product, name, "--json")) for name in names]
    return [Device(server, product, each["deviceName"], each["deviceSecret"]) for each in devices]


async def becomes(act: Callable[[], Any], wanted: object, seconds: float) -> float:
    """How long it took until `act` answered so."""
    begun = time.monotonic()
    while (found := await act()) != wanted:
        assert time.monotonic() - begun < seconds, f"it answers {found} still"
        await asyncio.sleep(0.02)
    return time.monotonic() - begun


@pytest.mark.slow
async def test_a_server_serves_from_postgresql_and_outlives_its_outages(postgresql: str, tmp_path: Path) -> None:
    """Devices and the console work; a revocation is heard within a second; connections that were ended are made anew; while the
    database is away known devices go on, and others are told within five seconds."""
    wire = Wire(postgresql)
    server = Server(tmp_path / "data", console_port=0, variables={"UPLINKD_DATABASE_URL": wire.url})
    server.options = ("--workers", "2")
    server.start()
    try:

        def ask(*arguments: str) -> bytes:
            return cli(*arguments, "--database-url", postgresql, data=server.data).stdout

        lamp, late, revoked = made(server, ask, "lamp-1", "late-1", "revoked-1")
        assert await lamp.login() == await revoked.login() == 0
        assert (await lamp.publish(b"1"))[0] == 0
        assert (await revoked.publish(b"1"))[0] == 0
        ask("device", "disable", revoked.product, revoked.name)
        taken = await becomes(lambda: code_of(revoked), 20001, 5)
        assert taken < 1
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.console_port}") as browser:
            key = json.loads(ask("apikey", "create", "ci", "--scope", "read", "--json"))["key"]
            answer = await browser.get(
                f"/api/v1/products/{lamp.product}/devices", headers={"Authorization": f"Bearer {key}"}
            )
            assert [each["deviceName"] for each in answer.json()["items"]] == ["lamp-1", "late-1", "revoked-1"]
        workers = server.children("uplinkd-worker")
        assert end_connections(postgresql) > 0
        assert (await lamp.publish(b"2"))[0] == 0
        await becomes(lamp.login, 0, 5)

        wire.stalled.set()
        assert (await lamp.publish(b"3"))[0] == 0
        begun = time.monotonic()
        assert await late.login() == UNKNOWN
        assert time.monotonic() - begun < 6
        assert (await lamp.publish(b"4"))[0] == 0
        await until(lambda: "is away" in server.log.read_text(), 20)
        wire.stalled.clear()
        await becomes(late.login, 0, 10)
        assert server.children("uplinkd-worker") == workers
        assert all(map(alive, workers))
        for device in (lamp, late, revoked):
            await device.close()
        assert server.stop() == 0
        told = server.log.read_text()
        assert "is away" in told
        assert "Traceback" not in told
    finally:
        if server.process:
            server.kill()
        wire.close()


async def code_of(device: Device) -> int:
    return (await device.publish(b"x"))[0]


@pytest.mark.slow
async def test_a_fleet_goes_on_after_the_move_to_postgresql(postgresql: str, tmp_path: Path) -> None:
    """The token that a device got while the registry was in SQLite is good after it, for the same device."""
    server = Server(tmp_path / "data").start()
    try:
        (lamp,) = made(server, lambda *arguments: cli(*arguments, data=server.data).stdout, "lamp-1")
        assert await lamp.login() == 0
        assert (await lamp.publish(b"before"))[0] == 0
        refused = cli("registry", "copy", "--to", postgresql, data=server.data, check=False)
        assert b"another uplinkd serves from the data folder" in refused.stderr
        await lamp.close()
        server.stop()
        cli("registry", "copy", "--to", postgresql, data=server.data)
        server.variables["UPLINKD_DATABASE_URL"] = postgresql
        (server.data / "registry.sqlite").rename(tmp_path / "old.sqlite")
        server.start()
        assert (await lamp.publish(b"after"))[0] == 0
        assert await lamp.login() == 0
        run(server, "device", "disable", lamp.product, lamp.name)
        assert await becomes(lambda: code_of(lamp), 20001, 5) < 1
        await lamp.close()
    finally:
        if server.process:
            server.kill()


def test_a_server_that_cannot_reach_its_registry_does_not_start_and_says_why(tmp_path: Path) -> None:
    """In one line, without the password."""
    url = "postgresql://me:hush@127.0.0.1:1/name"
    server = Server(tmp_path / "data", variables={"UPLINKD_DATABASE_URL": url})
    with pytest.raises(AssertionError, match="did not start"):
        server.start()
    assert server.process
    assert server.process.wait(10) == 1
    server._close()
    told = server.log.read_text()
    assert told.splitlines()[-1] == "uplinkd: the registry postgresql://127.0.0.1:1/name is away: Connection refused"
