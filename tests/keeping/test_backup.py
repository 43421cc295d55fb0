"""A backup holds all that was acknowledged before it began, and what is made of it goes on where that was."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import stat
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import nats
import pytest

from tests.faults.load import LIMITS, start_load
from tests.house import UPLINKD, Device, Server, cli, cli_json, environment, serving, stored, until
from tests.keeping.killing import killed, seconds_of
from uplinkd.backup import manifest_of
from uplinkd.core.errors import Unavailable
from uplinkd.core.model import ProductKey
from uplinkd.engine.stream import Base, base_of_metadata, restored_metadata
from uplinkd.registry.sql import SqlRegistry
from uplinkd.settings import Settings

OPTIONS = ("--workers", "1", "--device-rate", "0", "--device-bytes", "0", "--auth-rate", "0", "--nats-listen", "")


def failing(*arguments: str, data: Path) -> str:
    done = cli(*arguments, data=data, check=False)
    assert done.returncode == 1
    return done.stderr.decode()


async def publish(device: Device, *payloads: bytes) -> list[int]:
    """The ids that they were given."""
    found = []
    for payload in payloads:
        code, message_id = await device.publish(payload)
        assert code == 0
        found.append(message_id)
    return found


class Homes:
    """A data folder with a product, two devices, an application, a user and a consumer group."""

    def __init__(self, data: Path) -> None:
        self.data = data
        made = cli_json("product", "create", "homes", data=data)
        self.product = ProductKey(made["productKey"])
        self.secret = cli_json("device", "create", self.product, "lamp-1", data=data)["deviceSecret"]
        self.second = cli_json("device", "create", self.product, "lamp-2", data=data)["deviceSecret"]
        cli("app", "create", "reader", "--product", self.product, data=data)
        cli("user", "create", "ada", "--role", "admin", data=data)
        cli("group", "create", "backend", "--product", self.product, "--app", "reader", "--ack-wait", "1", data=data)

    def lamp(self, server: Server, token: str = "") -> Device:
        return Device(server, self.product, "lamp-1", self.secret, token)


@pytest.mark.slow
async def test_a_restored_server_goes_on_where_the_backup_was_taken(tmp_path: Path) -> None:
    """Tokens stand; messages have the ids that they had; those given after the backup are never given again, also not to messages
    down, and also not when the same backup is restored twice; a device made after it is not taken for one made since."""
    homes = Homes(tmp_path / "data")
    file = tmp_path / "backup.tar"
    with serving(homes.data, *OPTIONS) as server:
        lamp = homes.lamp(server)
        await lamp.login()
        kept = await publish(lamp, *(b"before %d" % n for n in range(20)))
        down = cli_json("send", homes.product, "lamp-2", f"/{homes.product}/lamp-2/user/get", "waits", data=homes.data)[
            "messageId"
        ]
        told = cli_json("backup", str(file), data=homes.data)
        assert told["counts"]["devices"] == 2
        assert told["counts"]["UPLINKD"] >= 20
        lost = await publish(lamp, *(b"after %d" % n for n in range(20)))
        lost_down = cli_json(
            "send", homes.product, "lamp-2", f"/{homes.product}/lamp-2/user/get", "lost", data=homes.data
        )["messageId"]
        cli("device", "create", homes.product, "lost-device", data=homes.data)
        lost_device = SqlRegistry.open(Settings(data=homes.data)).device(homes.product, "lost-device").id
        await lamp.close()
        server.stop()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    given = set(kept + lost)
    for turn in range(2):
        data = tmp_path / f"restored{turn}"
        cli("restore", str(file), data=data)
        with serving(data, *OPTIONS) as server:
            again = homes.lamp(server, lamp.token)
            fresh = await publish(again, b"again", b"and again")
            assert not given & set(fresh)
            assert min(fresh) > max(given), "ids rise"
            given |= set(fresh)
            found = stored(data, homes.product)
            assert {number: found[number] for number in kept} == {
                number: b"before %d" % n for n, number in enumerate(kept)
            }
            assert not set(lost) & set(found)
            shown = cli_json("messages", "show", str(kept[3]), data=data)
            assert int(shown["messageId"]) == kept[3]
            fresh_down = cli_json(
                "send", homes.product, "lamp-2", f"/{homes.product}/lamp-2/user/get", "new", data=data
            )["messageId"]
            assert len({int(down), int(lost_down), int(fresh_down)}) == 3
            assert int(fresh_down) > int(lost_down)
            second = Device(server, homes.product, "lamp-2", homes.second)
            await second.login()
            answer = (await second.post(
                f"/topic/{homes.product}/lamp-2/user/update", b"x",
                f"password: {second.token}", "Content-Type: application/octet-stream",
            ))[1]  # fmt: skip
            assert "waits" in json.dumps(answer) or "d2FpdHM" in json.dumps(answer)
            made = cli_json("device", "create", homes.product, "new-device", data=data)
            assert made["deviceName"] == "new-device"
            registry = SqlRegistry.open(Settings(data=data))
            assert registry.device(homes.product, "new-device").id > lost_device
            assert [app.name for app in registry.apps()] == ["reader"]
            assert [group.name for group in registry.groups.all()] == ["backend"]
            assert "ada" in [user.name for user in registry.operators.users()]
            registry.close()
            await again.close()
            await second.close()
            server.stop()
        assert stat.S_IMODE(data.stat().st_mode) == 0o700


@pytest.mark.slow
async def test_what_was_acknowledged_before_the_backup_began_is_in_it_under_load(tmp_path: Path) -> None:
    """Sixteen devices publish over HTTPS while it is made; the server goes on at hardly another pace; what was acknowledged later
    may be there or not, but what is there is right."""
    file, data = tmp_path / "backup.tar", tmp_path / "data"
    moments: list[float] = []
    with serving(data, *LIMITS) as server:
        load = start_load(server)
        paces: list[tuple[float, int]] = []

        async def watch() -> None:
            while load.running:
                paces.append((time.monotonic(), len(load.acknowledged)))
                await asyncio.sleep(0.05)

        before: dict[int, bytes] = {}

        def back_up() -> None:
            before.update(load.acknowledged)
            moments.append(time.monotonic())
            subprocess.run(
                [*UPLINKD, "backup", str(file), "--data", str(data)], env=environment(), check=True, capture_output=True
            )
            moments.append(time.monotonic())

        watching = asyncio.create_task(watch())
        await load.run(4.5, back_up, after=1.5)
        await watching
        server.stop()
    assert not load.refused
    assert not load.broken
    quiet = _rate(paces, moments[0] - 1, moments[0])
    busy = _rate(paces, *moments)
    print(f"{quiet:.0f} messages/s before, {busy:.0f} during the backup of {moments[1] - moments[0]:.2f} s")
    assert busy > quiet * 0.3
    restored = tmp_path / "restored"
    cli("restore", str(file), data=restored)
    with serving(restored, *OPTIONS):
        found = stored(restored, load.devices[0].product)
    assert len(before) > 200
    assert {number: found.get(number) for number in before} == before
    later = {number: payload for number, payload in found.items() if number not in before}
    assert all(load.acknowledged.get(number, payload) == payload for number, payload in later.items())


def _rate(paces: list[tuple[float, int]], begin: float, end: float) -> float:
    within = [(at, count) for at, count in paces if begin <= at <= end]
    (first, low), (last, high) = within[0], within[-1]
    return (high - low) / (last - first)


@pytest.mark.slow
async def test_consumer_groups_go_on_where_they_were(tmp_path: Path) -> None:
    """What was accepted before the backup does not come again, what was not does, and what is new."""
    from uplinkd.engine.api import ask_api
    from uplinkd.engine.bus import NatsBus
    from uplinkd.engine.deliveries import JetStreamDeliveries
    from uplinkd.engine.embedded import announced

    homes = Homes(tmp_path / "data")
    file = tmp_path / "backup.tar"

    async def take(data: Path, wanted: int, accept: int) -> list[tuple[int, bytes]]:
        settings = Settings(data=data)
        bus = NatsBus(announced(settings), "test")
        running = asyncio.create_task(bus.run())
        await until(lambda: bus.connected)
        registry = SqlRegistry.open(settings)
        group = registry.groups.get("backend")
        registry.close()
        deliveries = JetStreamDeliveries(bus)
        taken: list[Any] = []
        feed = deliveries.feed(group, taken.append)
        feed.want(wanted)
        await until(lambda: len(taken) >= wanted)
        for each in taken[:accept]:
            each.accept()
        await bus.settled()
        await ask_api(bus, f"CONSUMER.INFO.UPLINKD.group-{group.id}-{group.generation}")
        await deliveries.close()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        return [(each.message.id, each.message.payload) for each in taken]

    with serving(homes.data, *OPTIONS) as server:
        lamp = homes.lamp(server)
        await lamp.login()
        ids = await publish(lamp, *(b"%d" % n for n in range(10)))
        assert await take(homes.data, 5, 4) == [(ids[n], b"%d" % n) for n in range(5)]
        cli("backup", str(file), data=homes.data)
        await lamp.close()
        server.stop()
    data = tmp_path / "restored"
    cli("restore", str(file), data=data)
    with serving(data, *OPTIONS) as server:
        again = homes.lamp(server, lamp.token)
        fresh = await publish(again, b"new")
        taken = await take(data, 7, 7)
        await again.close()
        server.stop()
    assert sorted(taken) == [*((ids[n], b"%d" % n) for n in range(4, 10)), (fresh[0], b"new")]


@pytest.mark.slow
async def test_without_a_server_it_is_the_same(tmp_path: Path) -> None:
    """nats-server is started for the backup; and a small one has everything but what lies in streams."""
    homes = Homes(tmp_path / "data")
    with serving(homes.data, *OPTIONS) as server:
        lamp = homes.lamp(server)
        await lamp.login()
        kept = await publish(lamp, b"kept")
        await lamp.close()
        server.stop()
    whole, small = tmp_path / "whole.tar", tmp_path / "small.tar"
    cli("backup", str(whole), data=homes.data)
    cli("backup", str(small), "--without-messages", "--without-journal", data=homes.data)
    assert manifest_of(small).without == ["messages", "journal"]
    assert not manifest_of(small).streams
    for file, found in ((whole, {kept[0]: b"kept"}), (small, {})):
        data = tmp_path / file.stem
        cli("restore", str(file), data=data)
        with serving(data, *OPTIONS) as server:
            assert stored(data, homes.product) == found
            again = homes.lamp(server, lamp.token)
            assert (await publish(again, b"new"))[0] > kept[0]
            await again.close()
            server.stop()


def test_beside_a_backup_nothing_stays_whatever_it_is_called(tmp_path: Path) -> None:
    """A name may have what patterns of names are made of; the copy that was taken of the registry is gone."""
    Homes(tmp_path / "data")
    where = tmp_path / "backups"
    where.mkdir()
    cli("backup", str(where / "homes[1].tar"), data=tmp_path / "data")
    assert [path.name for path in where.iterdir()] == ["homes[1].tar"]


def test_a_folder_among_the_certificates_is_left_out(tmp_path: Path) -> None:
    """Whoever puts old certificates aside there still gets a backup."""
    data = tmp_path / "data"
    Homes(data)
    (data / "tls" / "old").mkdir(parents=True)
    (data / "tls" / "ca.pem").touch()
    cli("backup", str(tmp_path / "homes.tar"), data=data)
    with tarfile.open(tmp_path / "homes.tar") as archive:
        assert [name for name in archive.getnames() if name.startswith("tls")] == ["tls/ca.pem"]


def test_a_backup_takes_no_place_of_what_is_no_file(tmp_path: Path) -> None:
    """Of a device such as /dev/stdout, a root's --overwrite would leave a file for everybody; a name can be too long as well."""
    data = tmp_path / "data"
    Homes(data)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        assert "is a device or a pipe" in failing("backup", str(tmp_path / name), "--overwrite", data=data)
    assert stat.S_ISFIFO((tmp_path / "link").stat().st_mode)
    assert "File name too long" in failing("backup", str(tmp_path / ("x" * 300)), data=data)


def test_a_backup_without_keys_wants_the_key(tmp_path: Path) -> None:
    """It holds neither key nor TLS material, and nothing is made of it without the key."""
    homes = Homes(tmp_path / "data")
    file = tmp_path / "backup.tar"
    cli("backup", str(file), "--without-keys", data=homes.data)
    with tarfile.open(file) as archive:
        assert not [name for name in archive.getnames() if name.partition("/")[0] in ("keys", "tls", "nats")]
    data = tmp_path / "restored"
    assert f"its secrets are sealed with key {manifest_of(file).key}" in failing("restore", str(file), data=data)
    assert not data.exists()
    key = (homes.data / "keys" / "secret.key").read_text().strip()
    cli("restore", str(file), "--secret-key", key, data=data)
    registry = SqlRegistry.open(Settings.model_validate({"data": data, "secret_key": key}))
    assert registry.device(homes.product, "lamp-1").secret == homes.secret
    registry.close()


def test_what_is_no_whole_backup_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    """Cut short, altered anywhere, of a newer version, another file; into a folder that is not empty; onto a file that is there."""
    homes = Homes(tmp_path / "data")
    file, data = tmp_path / "backup.tar", tmp_path / "restored"
    cli("backup", str(file), data=homes.data)
    assert "is there already" in failing("backup", str(file), data=homes.data)
    cli("backup", str(file), "--overwrite", data=homes.data)
    assert [path.name for path in tmp_path.glob(".*")] == []
    whole = file.read_bytes()

    def refused(content: bytes, words: str) -> None:
        bad = tmp_path / "bad.tar"
        bad.write_bytes(content)
        assert words in failing("restore", str(bad), data=data)
        assert not data.exists()

    refused(whole[: len(whole) // 2], "no backup of uplinkd, or only a part of one")
    refused(b"", "no backup")
    refused(b"not at all" * 1000, "no backup")
    place = whole.index(b"registry.sqlite.gz") + 600
    refused(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], "its part registry.sqlite.gz is not what")
    refused(whole.replace(b'"schema": "0005"', b'"schema": "9999"'), "install that version")
    refused(whole.replace(b'"format": 1,', b'"format": 2,'), "in a form that this version")
    assert "cannot be read" in failing("restore", str(tmp_path / "nothing.tar"), data=data)
    assert "is not empty" in failing("restore", str(file), data=homes.data)
    assert "nothing to back up" in failing("backup", str(tmp_path / "x.tar"), data=tmp_path / "nowhere")


@pytest.mark.slow
async def test_killed_at_any_moment_there_is_a_whole_backup_or_none_and_a_whole_folder_or_none(tmp_path: Path) -> None:
    """kill -9 while it is made: no file. While it is restored: a folder that nothing opens until it is emptied."""
    homes = Homes(tmp_path / "data")
    file, data = tmp_path / "backup.tar", tmp_path / "restored"
    with serving(homes.data, *OPTIONS) as server:
        lamp = homes.lamp(server)
        await lamp.login()
        await publish(lamp, *(os.urandom(60_000) for _ in range(200)))
        await lamp.close()
        command = ["backup", str(file), "--data", str(homes.data)]
        whole = seconds_of(*command)
        ended = 0
        for turn in range(8):
            file.unlink(missing_ok=True)
            early = killed(command, whole * (0.4 + 0.08 * turn))
            ended += early
            assert early or file.exists()
            if file.exists():
                assert manifest_of(file).ended
        assert ended
        cli("backup", str(file), "--overwrite", data=homes.data)
        server.stop()
    half = 0
    mark = data / "restore.unfinished"
    for turn in range(8):
        process = subprocess.Popen([*UPLINKD, "restore", str(file), "--data", str(data)], env=environment())
        await until(lambda: mark.exists() or process.poll() is not None)  # noqa: B023 - awaited here
        await asyncio.sleep(0.03 * turn)
        process.kill()
        process.wait()
        if mark.exists():
            half += 1
            await asyncio.sleep(0.1)  # its nats-server ends with it
            assert "empty the folder and restore again" in failing("device", "list", homes.product, data=data)
            assert "empty the folder and restore again" in failing("serve", data=data)
            assert "is not empty" in failing("restore", str(file), data=data)
        shutil.rmtree(data)
    assert half
    cli("restore", str(file), data=data)
    with serving(data, *OPTIONS):
        assert len(stored(data, homes.product)) == 200


def test_ids_and_sequences_lead_to_each_other_through_every_restore() -> None:
    """Each part has its own base; between two parts lies nothing; parts of which nothing is left are forgotten."""
    config: dict[str, Any] = {"name": "UPLINKD", "metadata": {"uplinkd.base": "1000", "other": "stays"}}
    for last, fresh in ((50, 10_000), (50, 20_000), (80, 30_000)):
        config["metadata"] = restored_metadata(config, {"last_seq": last, "first_seq": 1}, fresh)
    base = base_of_metadata(config)
    assert config["metadata"]["other"] == "stays"
    assert base.restored == ((50, 1000), (50, 10_000 - 50), (80, 20_000 - 50))
    assert [base.id(sequence) for sequence in (1, 50, 51, 80, 81, 100)] == [1001, 1050, 20_001, 20_030, 30_001, 30_020]
    for sequence in range(1, 200):
        assert base.sequence(base.id(sequence)) == sequence
    assert [base.sequence(number) for number in (0, 1051, 15_000, 20_031)] == [1, 51, 51, 81]
    emptied = restored_metadata(config, {"last_seq": 80, "first_seq": 81}, 40_000)
    assert base_of_metadata({"metadata": emptied}) == Base(40_000 - 80)
    assert base_of_metadata({"metadata": emptied}).restored == ()
    assert Base(7).id(3) == 10
    with pytest.raises(Unavailable, match="was not made by uplinkd"):
        base_of_metadata({"metadata": {}})


@pytest.mark.slow
async def test_an_application_makes_the_ids_that_devices_were_given_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what its consumer's metadata says, as the recipes do; it goes on where it was."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent.parent / "examples" / "recipes")
    from uplink import bases_of, report_of

    homes = Homes(tmp_path / "data")
    app = cli_json("app", "renew-secret", "reader", data=homes.data)
    key, secret = app.get("user") or app["key"], app.get("password") or app["secret"]
    file, data = tmp_path / "backup.tar", tmp_path / "restored"
    options = OPTIONS[: OPTIONS.index("--nats-listen")]

    async def fetch(server: Server, count: int) -> dict[int, bytes]:
        client = await nats.connect(
            f"nats://127.0.0.1:{server.nats_port}", user=key, password=secret, inbox_prefix=f"_INBOX.{key}"
        )
        uplink = await client.jetstream().pull_subscribe_bind(key, stream="UPLINKD")
        bases = bases_of((await uplink.consumer_info()).config.metadata or {})
        found: dict[int, bytes] = {}
        while len(found) < count:
            for message in await uplink.fetch(100, timeout=5):
                if (message.headers or {}).get("Uplinkd-Origin", "https") == "https":
                    found[report_of(message, bases).message_id] = message.data
                await message.ack_sync()
        await client.close()
        return found

    with serving(homes.data, *options) as server:
        lamp = homes.lamp(server)
        await lamp.login()
        first = await publish(lamp, b"read before")
        assert await fetch(server, 1) == {first[0]: b"read before"}
        unread = await publish(lamp, b"not read yet")
        cli("backup", str(file), data=homes.data)
        await lamp.close()
        server.stop()
    cli("restore", str(file), data=data)
    with serving(data, *options) as server:
        again = homes.lamp(server, lamp.token)
        fresh = await publish(again, b"new")
        assert await fetch(server, 2) == {unread[0]: b"not read yet", fresh[0]: b"new"}
        await again.close()
        server.stop()
