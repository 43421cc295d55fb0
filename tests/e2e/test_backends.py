"""Backends with the whole program: what devices report reaches a URL and an AMQP consumer, and operators see how that goes."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.backend import AmqpConsumer, Target, all_there
from tests.house import Device, Server, cli, cli_json, make_devices, serving, until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("backends")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        tmp_path_factory.mktemp("house") / "data", "--workers", "1", "--webhook-networks", "127.0.0.0/8"
    ) as server:
        yield server


@pytest.fixture(scope="module")
def fleet(server: Server) -> Iterator[Device]:
    return iter(make_devices(server, 10))


@pytest.fixture
async def device(fleet: Iterator[Device]) -> AsyncIterator[Device]:
    device = next(fleet)
    assert await device.login() == 0
    yield device
    await device.close()


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    target = Target()
    await target.start()
    yield target
    await target.stop()


async def report(device: Device, *payloads: bytes) -> dict[int, bytes]:
    """messageId → payload of what was acknowledged."""
    told = {}
    for payload in payloads:
        code, message_id = await device.publish(payload)
        assert code == 0
        told[message_id] = payload
    return told


def shown(server: Server, name: str) -> Any:
    return cli_json("group", "show", name, data=server.data)["state"]


@pytest.mark.parametrize("form", ["binary", "structured", "batch"])
async def test_reports_are_posted_to_a_url(server: Server, device: Device, target: Target, form: str) -> None:
    """Within moments of one command; and what became of it is told."""
    name = f"posted-{form}"
    only = ("--topic", f"/{device.product}/{device.name}/#")
    made = cli_json(
        "group",
        "create",
        name,
        "--product",
        device.product,
        *only,
        "--webhook",
        target.url,
        "--form",
        form,
        data=server.data,
    )
    assert made["secret"].startswith("whsec_")
    told = await report(device, b'{"on":true}', b"\x00\xff", b"")
    await all_there(told, target.got, 5)
    state = shown(server, name)
    assert (state["lag"], state["dead"], state["webhook"]["open"]) == (0, 0, False)
    assert state["webhook"]["accepted"] == 3
    cli("group", "delete", name, data=server.data)
    await until(lambda: name not in cli("group", "list", data=server.data).stdout.decode())


async def test_a_paused_group_gets_the_rest_when_it_goes_on(server: Server, device: Device, target: Target) -> None:
    """And one that is set back gets again what it had."""
    only = ("--product", device.product, "--topic", f"/{device.product}/{device.name}/#")
    cli("group", "create", "patient", *only, "--webhook", target.url, data=server.data)
    told = await report(device, b"before")
    await all_there(told, target.got, 5)
    cli("group", "change", "patient", "--pause", data=server.data)
    await until(lambda: shown(server, "patient")["webhook"] is None)
    told |= await report(device, b"meanwhile")
    assert shown(server, "patient")["lag"] == 1
    cli("group", "change", "patient", "--resume", data=server.data)
    await all_there(told, target.got, 5)
    cli("group", "reset", "patient", "--to", "1h", data=server.data)
    await until(lambda: len(target.got) >= 4)
    assert sorted(number for number, _ in target.got) == sorted([*told, *told])


async def test_a_webhook_is_tried_with_a_sample_event(server: Server, device: Device, target: Target) -> None:
    """The answer is told, and what is wrong when there is none."""
    cli("group", "create", "tried", "--product", device.product, "--webhook", target.url, data=server.data)
    cli("group", "change", "tried", "--pause", data=server.data)

    async def tried(*options: str) -> subprocess.CompletedProcess[bytes]:
        """The target answers in this thread."""
        return await asyncio.to_thread(cli, "group", "test", "tried", *options, data=server.data, check=False)

    good = json.loads((await tried("--json")).stdout)
    assert (good["status"], good["fault"]) == (204, "")
    target.answer = lambda _: 503
    bad = await tried()
    assert bad.returncode == 1
    assert b"it answered 503 Service Unavailable" in bad.stdout
    await target.stop()
    assert b"no connection to it" in (await tried()).stdout
    cli("group", "create", "nobody", "--product", device.product, data=server.data)
    assert b"has no webhook to try" in cli("group", "test", "nobody", data=server.data, check=False).stderr


def test_a_private_address_is_not_posted_to_unless_it_is_allowed(tmp_path: Path) -> None:
    """The command warns at once, and the group says why nothing goes there."""
    with serving(tmp_path / "data", "--workers", "1") as server:
        cli("product", "create", "lamps", "--key", "a1Lamps", data=server.data)
        url = "http://169.254.169.254/latest"
        made = cli("group", "create", "bad", "--product", "a1Lamps", "--webhook", url, data=server.data)
        assert b"is no address of the internet" in made.stderr
        tried = cli("group", "test", "bad", data=server.data, check=False)
        assert b"not in webhook_networks" in tried.stdout


async def test_a_consumer_over_amqp_gets_reports_status_and_what_the_owner_does(tmp_path: Path) -> None:
    """With the real Proton client; who consumes is told, and who may not is found in the logs."""
    pytest.importorskip("proton", reason="python-qpid-proton is not installed: make amqp")
    with serving(tmp_path / "data", "--workers", "1", amqp=True) as server:
        (device,) = make_devices(server, 1)
        app = cli_json("app", "create", "billing", "--product", device.product, data=server.data)
        kinds = ("--kind", "uplink", "--kind", "status", "--kind", "lifecycle")
        cli("group", "create", "all", "--product", device.product, *kinds, "--app", "billing", data=server.data)
        consumer = AmqpConsumer(server, app, "all")
        stranger = AmqpConsumer(server, {**app, "secret": "wrong"}, "all")
        try:
            assert await device.login() == 0
            told = await report(device, b"hello")
            status = f"/as/mqtt/status/{device.product}/{device.name}"
            life = f"/{device.product}/{device.name}/thing/lifecycle"
            await all_there(told, consumer.got, 10)
            await until(lambda: status in {topic for _, topic in consumer.got})
            cli("device", "disable", device.product, device.name, data=server.data)
            await until(lambda: {status, life} <= {topic for _, topic in consumer.got})
            await until(lambda: len(shown(server, "all")["consumers"]) == 1)
            (seen,) = shown(server, "all")["consumers"]
            assert (seen["app"], seen["client"], seen["address"]) == ("billing", "fault", "127.0.0.1")
            await until(lambda: refused(server))
            assert "password" in refused(server)[0]["reason"]
            assert app["secret"] not in json.dumps(refused(server))
            assert not stranger.got
        finally:
            await device.close()
            consumer.kill()
            stranger.kill()


def refused(server: Server) -> list[dict[str, Any]]:
    return [each for each in cli_json("logs", data=server.data) if each["endpoint"] == "amqp"]
