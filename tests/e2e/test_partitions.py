"""Messages in several streams, with the whole program: devices, groups, applications and operators see one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nats
import nats.errors
import pytest

from tests.clients.fleet import Login, Thing
from tests.clients.session import Session
from tests.faults.backend import Target, all_there, duplicates, out_of_order
from tests.faults.load import LIMITS, Load
from tests.house import UPLINKD, Device, Server, cli, cli_json, environment, make_devices, serving, stored
from uplinkd.engine.stream import part_for, parts

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("partitions")]

COUNT = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("house") / "data"
    options = ("--partitions", str(COUNT), "--webhook-networks", "127.0.0.0/8", *LIMITS)
    with serving(folder, *options) as server:
        yield server


@pytest.fixture(scope="module")
def devices(server: Server) -> list[Device]:
    return make_devices(server, 9)


def by_device(acknowledged: dict[int, bytes]) -> dict[bytes, list[tuple[int, int]]]:
    """Device → (messageId, its count), in the order in which it was told."""
    found: dict[bytes, list[tuple[int, int]]] = {}
    for number, payload in acknowledged.items():
        device, _, count = payload.partition(b"/")
        found.setdefault(device, []).append((number, int(count)))
    return found


async def test_a_killed_nats_server_loses_nothing_and_a_webhook_gets_all_in_order(
    server: Server, devices: list[Device], tmp_path: Path
) -> None:
    """kill -9 of it under load over HTTPS and MQTT, and a stop and start of everything."""
    target = Target()
    await target.start()
    product = devices[0].product
    cli(
        "group",
        "create",
        "backend",
        "--product",
        product,
        "--ack-wait",
        "2s",
        "--webhook",
        target.url,
        data=server.data,
    )
    for device in devices:
        assert await device.login() == 0
    load = Load(devices[:6])
    things = [Thing(server, product, device.name, device.secret) for device in devices[6:]]
    sessions = [Session(server, thing.login()) for thing in things]
    by_mqtt: set[bytes] = set()

    def over_mqtt() -> None:
        for thing, session in zip(things, sessions, strict=True):
            assert session.connect() == 0
            for number in range(20):
                payload = f"{thing.name}/{number}".encode()
                if session.publish(thing.topic(), payload):
                    by_mqtt.add(payload)
            session.disconnect()

    def fault() -> None:
        over_mqtt()
        (engine,) = server.children("nats-server")
        os.kill(engine, signal.SIGKILL)

    await load.run(5, fault, after=1)
    assert len(load.acknowledged) > 100
    assert len(by_mqtt) == 60
    assert load.is_back()
    told = by_device(load.acknowledged)
    for each in told.values():
        assert each == sorted(each)
        assert [count for _, count in each] == sorted(count for _, count in each)
    there = await asyncio.to_thread(stored, server.data, product)
    assert load.acknowledged.items() <= there.items()
    assert by_mqtt <= set(there.values())
    await all_there(load.acknowledged, target.got, 30)
    assert by_mqtt <= {there[number] for number, _ in target.got if number in there}
    assert [number for number in out_of_order(target.got) if number in load.acknowledged] == []
    await asyncio.to_thread(server.stop)
    await asyncio.to_thread(server.start)
    assert (await asyncio.to_thread(stored, server.data, product)).items() >= load.acknowledged.items()
    ids = {device.name: [number for number, _ in told[b"%d" % place]] for place, device in enumerate(load.devices)}
    for device in devices:
        await device.close()
        assert await device.login() == 0
        code, number = await device.publish(b"after")
        assert code == 0
        assert number > max(ids.get(device.name, [0]))
        await all_there({number: b"after"}, target.got, 10)
        await device.close()
    state = cli_json("group", "show", "backend", data=server.data)["state"]
    assert state["dead"] == 0
    print(f"{len(load.acknowledged)} acknowledged, all delivered, {duplicates(target.got)} of them again")
    await target.stop()


async def test_operators_see_one_list_and_one_message(server: Server, devices: list[Device]) -> None:
    """The newest of all devices, one device's, and one by its id; and pages of the API are those of one list."""
    ids = []
    for device in devices:
        assert await device.login() == 0
        code, number = await device.publish(f"to {device.name}".encode())
        assert code == 0
        ids.append(number)
        await device.close()
        await asyncio.sleep(0.002)
    listed = await asyncio.to_thread(
        cli_json, "messages", "list", "--product", devices[0].product, "--limit", str(len(ids)), data=server.data
    )
    listed = [int(each["messageId"]) for each in listed if each["origin"] == "https"]
    assert sorted(listed) == sorted(ids)
    one = await asyncio.to_thread(cli_json, "messages", "show", str(ids[4]), data=server.data)
    assert one["deviceName"] == devices[4].name


async def test_an_application_reads_each_stream_and_hears_all_live(server: Server, devices: list[Device]) -> None:
    """Over NATS through a consumer of its own in each, over MQTT as ever."""
    made = await asyncio.to_thread(
        cli_json, "app", "create", "billing", "--product", devices[0].product, data=server.data
    )
    assert made["nats"]["streams"] == [part.name for part in parts(COUNT)]
    key, secret = made["key"], made["secret"]
    session = Session(server, Login("billing", key, secret))
    assert await asyncio.to_thread(session.connect) == 0
    await asyncio.to_thread(session.subscribe, f"/{devices[0].product}/#")
    client = await nats.connect(
        f"nats://127.0.0.1:{server.nats_port}", user=key, password=secret, inbox_prefix=f"_INBOX.{key}"
    )
    ids: dict[int, str] = {}
    for device in devices:
        assert await device.login() == 0
        code, number = await device.publish(device.name.encode())
        assert code == 0
        ids[number] = device.name
        await device.close()
    heard = {(await asyncio.to_thread(session.next)).payload.decode() for _ in devices}
    assert heard == {device.name for device in devices}
    found: dict[int, str] = {}
    for name in made["nats"]["streams"]:
        uplink = await client.jetstream().pull_subscribe_bind(key, stream=name)
        told = await uplink.consumer_info()
        assert told.config.metadata
        base, (_, _, step) = (
            int(told.config.metadata["uplinkd.base"]),
            told.config.metadata["uplinkd.partition"].partition("/"),
        )
        try:
            for message in await uplink.fetch(100, timeout=1):
                found[base + message.metadata.sequence.stream * int(step)] = message.data.decode()
                assert part_for(message.subject, COUNT).name == name
                await message.ack()
        except nats.errors.TimeoutError:
            pass
    assert found == ids
    await asyncio.to_thread(session.disconnect)
    await client.close()


def test_another_number_is_refused_with_one_line(server: Server) -> None:
    """At the start; nothing is served, nothing changed."""
    assert server.stop() == 0
    command = [*UPLINKD, "serve", "--data", str(server.data), "--listen", "127.0.0.1:0", "--console-listen", ""]
    ended = subprocess.run(
        [*command, "--partitions", "2"], env=environment(), capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 1
    assert "partitions = 2, and the NATS stream UPLINKD was made as one of 3" in ended.stderr
    assert "set partitions = 3" in ended.stderr
    assert "Traceback" not in ended.stderr
    server.start()
