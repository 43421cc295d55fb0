"""Any gateway serves any device: what one knows or does holds at the other."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import httpx
import pytest
from examples.cluster import _children

from tests.clients.fleet import Thing, until
from tests.clients.session import Session
from tests.cluster.conftest import GATEWAYS, Plant
from tests.house import Device, cli, cli_json
from uplinkd import __version__

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

_names = iter(range(1, 1000))


def made(plant: Plant) -> tuple[Thing, Thing]:
    """A device as it is known to each gateway's doors."""
    number = next(_names)
    product = cli_json("product", "create", f"product {number}", data=plant.data)["productKey"]
    device = cli_json("device", "create", product, f"device-{number}", data=plant.data)
    first, second = (
        Thing(plant.gateway(gate), product, device["deviceName"], device["deviceSecret"]) for gate in (1, 2)
    )
    return first, second


@pytest.fixture
def things(plant: Plant) -> tuple[Thing, Thing]:
    return made(plant)


def device_at(thing: Thing) -> Device:
    return Device(thing.server, thing.product, thing.name, thing.secret)


def statuses(thing: Thing) -> list[str]:
    return [json.loads(row["payload"])["status"] for row in thing.stored() if row["origin"] == "status"]


async def test_a_token_of_one_gateway_is_good_at_the_other(things: tuple[Thing, Thing]) -> None:
    """And no longer, at either, within a second of the device's being disabled."""
    first, second = (device_at(thing) for thing in things)
    assert await first.login() == 0
    second.token = first.token
    code, number = await second.publish(b"through the other")
    assert code == 0
    code, later = await first.publish(b"through the first")
    assert (code, later > number) == (0, True)
    cli("device", "disable", first.product, first.name, data=things[0].server.data)
    await asyncio.sleep(1)
    for device in (first, second):
        code, _ = await device.publish(b"no more")
        assert code != 0
        await device.close()


def test_a_session_at_the_other_gateway_takes_over(things: tuple[Thing, Thing]) -> None:
    """One MQTT session a device; a persistent one keeps its subscriptions and what waits for it, wherever it goes on."""
    first, second = things
    older = Session(first.server, first.login(), clean=False).opened()
    older.subscribe(first.topic("user/get"))
    first.send("while it stands")
    assert older.next().payload == b"while it stands"
    younger = Session(second.server, second.login(), clean=False).opened()
    assert younger.present
    assert older.ended(within=3)
    assert not younger.ended(within=1.5)  # nor does the end of the older one make it offline
    assert statuses(first) == ["online"]
    assert first.shows(state="online")
    first.send("at its new place")
    assert younger.next().payload == b"at its new place"
    time.sleep(0.5)  # its acknowledgement is stored
    younger.break_off()
    time.sleep(0.5)
    first.send("while it is away")
    again = Session(first.server, first.login(), clean=False).opened()
    assert again.next().payload == b"while it is away"
    assert again.nothing(within=0.5)
    again.disconnect()
    assert second.shows(state="offline")
    assert until(lambda: statuses(first)[-1] == "offline")


def test_what_waits_rides_home_through_either_gateway_and_once(things: tuple[Thing, Thing]) -> None:
    """Reports go through both in turn, and each message comes down once."""
    first, second = things
    wanted = [f"number {number}" for number in range(6)]
    for text in wanted:
        first.send(text)
    time.sleep(0.2)
    came = []
    for _ in range(8):
        for thing in things:
            (info,) = thing.report(("user/update", b"x"))
            if "data" in info:
                came.append(info["data"])
    assert came == wanted
    assert second.stored()


def test_a_device_that_moves_to_and_fro_stays_online(things: tuple[Thing, Thing]) -> None:
    """By MQTT from gateway to gateway, some goodbyes said late, and reports over HTTPS in between: one change, and one at its end."""
    first, second = things
    sessions = []
    for turn in range(6):
        here = things[turn % 2]
        sessions.append(Session(here.server, here.login()).opened())
        if turn % 3 == 0:
            here.report(("user/update", b"x"))
    assert all(each.ended(within=3) for each in sessions[:-1])
    time.sleep(1.5)
    assert sessions[-1].open
    assert statuses(first) == ["online"]
    assert second.shown()["state"] == first.shown()["state"] == "online"


def test_a_gateway_that_starts_leaves_what_is_not_its_own(plant: Plant) -> None:
    """The sessions at the others, and the first user's one-time password, which the first gateway alone has made and shown."""
    first, second = made(plant)
    session = Session(second.server, second.login()).opened()
    session.subscribe(second.topic("user/get"))
    assert first.shows(state="online")
    plant.cluster.end("gateway-1")
    plant.cluster.start_gateway(1)
    assert not session.ended(within=1)
    assert second.shown()["state"] == "online"
    assert statuses(second) == ["online"]
    first.send("it is reached")
    assert session.next().payload == b"it is reached"
    session.disconnect()
    shown = [plant.cluster.log(f"gateway-{number}").read_text().count("one-time password") for number in GATEWAYS]
    assert shown == [1, 0]


async def test_a_revocation_at_one_gateways_console_holds_at_the_other(plant: Plant) -> None:
    """Within a second: a token, a login, an MQTT session; by disabling it and by a new secret."""
    key = cli_json("apikey", "create", "ci", "--scope", "operate", data=plant.data)["key"]
    async with httpx.AsyncClient(base_url=plant.console(1), headers={"Authorization": f"Bearer {key}"}) as console:
        for act in ("disable", "reset"):
            _, second = made(plant)
            device = device_at(second)
            assert await device.login() == 0
            assert (await device.publish(b"x"))[0] == 0
            session = await asyncio.to_thread(Session(second.server, second.login()).opened)
            path = f"/api/v1/products/{second.product}/devices/{second.name}"
            asked = console.patch(path, json={"enabled": False}) if act == "disable" else console.post(f"{path}/secret")
            assert (await asked).is_success
            revoked = time.monotonic()
            while (await device.publish(b"x"))[0] == 0:
                assert time.monotonic() - revoked < 1
                await asyncio.sleep(0.01)
            print(f"\n{act}: refused at the other gateway {time.monotonic() - revoked:.2f} s later")
            assert await asyncio.to_thread(session.ended, 1 - (time.monotonic() - revoked))
            assert await device.login() != 0
            await device.close()


async def test_the_console_of_one_gateway_shows_what_comes_through_the_other(plant: Plant) -> None:
    """Live messages, in the order in which they were stored, whichever gateway they came through."""
    things = made(plant)
    key = cli_json("apikey", "create", "watch", "--scope", "read", data=plant.data)["key"]
    devices = [device_at(thing) for thing in things]
    assert [await device.login() for device in devices] == [0, 0]
    shown: list[int] = []
    headers = {"Authorization": f"Bearer {key}"}
    for number in (1, 2):
        shown.clear()
        async with (
            httpx.AsyncClient(base_url=plant.console(number), headers=headers, timeout=10) as console,
            console.stream("GET", "/api/v1/messages/stream", params={"product": things[0].product}) as stream,
        ):
            assert stream.status_code == 200
            lines = stream.aiter_lines()
            await asyncio.wait_for(anext(lines), 5)  # it has begun
            told = [(await devices[turn % 2].publish(b"x"))[1] for turn in range(10)]
            async with asyncio.timeout(5):
                while len(shown) < len(told):
                    line = await anext(lines)
                    if line.startswith("data: {"):
                        items = json.loads(line.removeprefix("data: "))["items"]
                        shown += [int(each["messageId"]) for each in items if each["origin"] == "https"]
        assert shown == told
    for device in devices:
        await device.close()


async def test_a_device_gets_its_rate_once_over_both_gateways(plant: Plant) -> None:
    """Through both as fast as it is answered: within 15 % of the rate, not twice that. The rate is a setting of all gateways, which are
    started again with it."""
    cluster = plant.cluster
    things = made(plant)
    cluster._more["device_rate"] = "20"
    try:
        await restart_gateways(plant)
        await asyncio.sleep(3)  # until they have heard of each other
        devices = [device_at(thing) for thing in things]
        passed = 0
        counting = False

        async def send(device: Device) -> None:
            nonlocal passed
            assert await device.login() == 0
            while time.monotonic() < end:
                code, _ = await device.publish(b"x")
                passed += code == 0 and counting
                await asyncio.sleep(0.005)
            await device.close()

        end = time.monotonic() + 8
        running = [asyncio.create_task(send(device)) for device in devices]
        await asyncio.sleep(3)
        counting, begun = True, time.monotonic()
        await asyncio.gather(*running)
        seconds = end - begun
        print(f"\n{passed / seconds:.1f} messages/s through two gateways at a rate of 20")
        assert 0.85 * 20 <= passed / seconds <= 1.15 * 20
    finally:
        cluster._more["device_rate"] = "0"
        await restart_gateways(plant)


async def restart_gateways(plant: Plant) -> None:
    """Both at once: nobody is served meanwhile."""
    await asyncio.gather(*(asyncio.to_thread(plant.cluster.end, f"gateway-{number}") for number in GATEWAYS))
    await asyncio.gather(*(asyncio.to_thread(plant.cluster.start_gateway, number) for number in GATEWAYS))


def test_sessions_of_a_gateway_that_died_end(plant: Plant) -> None:
    """It has no successor: the other one says, within seconds, that its devices are offline. And what is then sent to them waits."""
    first, second = made(plant)
    time.sleep(6)  # until the gateways know each other, if one has just started
    session = Session(second.server, second.login()).opened()
    session.subscribe(second.topic("user/get"))
    assert first.shows(state="online")
    plant.cluster.end("gateway-2", signal.SIGKILL)
    killed = time.monotonic()
    try:
        while first.shown()["state"] != "offline":
            assert time.monotonic() - killed < 20
            time.sleep(0.1)
        print(f"\noffline {time.monotonic() - killed:.1f} s after its gateway was killed")
        while statuses(first) != ["online", "offline"]:
            assert time.monotonic() - killed < 25
            time.sleep(0.2)
        down = ("send", first.product, first.name, first.topic("user/get"), "x")
        while cli_json(*down, data=plant.data)["way"] != "waits":  # each worker comes to know by itself
            assert time.monotonic() - killed < 25
            time.sleep(0.2)
    finally:
        plant.cluster.start_gateway(2)


def test_a_gateway_that_stood_still_says_that_its_devices_are_there(plant: Plant) -> None:
    """Stopped for so long that it counts as dead; going on, its sessions stand as before."""
    first, second = made(plant)
    time.sleep(6)
    session = Session(second.server, second.login(), keepalive=300).opened()
    assert first.shows(state="online")
    stopped = _family(plant, 2)
    for pid in stopped:
        _signal(pid, signal.SIGSTOP)
    try:
        end = time.monotonic() + 20
        while first.shown()["state"] != "offline":
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        for pid in stopped:
            _signal(pid, signal.SIGCONT)
    end = time.monotonic() + 15
    while first.shown()["state"] != "online":
        assert time.monotonic() < end
        time.sleep(0.1)
    assert session.open
    session.disconnect()


def _family(plant: Plant, number: int) -> list[int]:
    pid = plant.cluster.processes[f"gateway-{number}"].pid
    return [pid, *_children(pid)]


def _signal(pid: int, number: int) -> None:
    os.kill(pid, number)


async def test_refusals_of_every_gateway_are_found_from_any(things: tuple[Thing, Thing]) -> None:
    """By the command line of the first one's folder, with the gateway's name; pages go on where the one before ended."""
    data = things[0].server.data
    for thing, name in zip(things, ("gateway-1", "gateway-2"), strict=True):
        device = device_at(thing)
        assert await device.login() == 0
        assert (await device.publish(name.encode(), f"user/{name}"))[0] != 0
        await device.close()
    await asyncio.sleep(0.5)
    found = cli_json("logs", "--product", things[0].product, data=data)
    assert [(each["gateway"], each["topic"].rpartition("/")[2]) for each in found] == [
        ("gateway-1", "gateway-1"),
        ("gateway-2", "gateway-2"),
    ]
    (one,) = cli_json("logs", found[1]["requestId"], data=data)
    assert one["gateway"] == "gateway-2"


def test_gateways_that_live_are_listed(plant: Plant) -> None:
    time.sleep(1.5)
    rows = cli_json("gateways", data=plant.data)
    assert [(each["gateway"], each["workers"], each["version"]) for each in rows] == [
        ("gateway-1", 1, __version__),
        ("gateway-2", 1, __version__),
    ]
