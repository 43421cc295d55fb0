"""Keys give way to others, and nobody is logged out, and nothing is lost, whenever that is ended."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import secrets
import shutil
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.house import UPLINKD, Device, cli, cli_json, environment, serving, until
from tests.http.conftest import House, publish_request
from tests.http.conftest import house as house_of_http
from tests.keeping.killing import killed, seconds_of
from uplinkd import rotation
from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.core.groups import Plan, Webhook
from uplinkd.core.model import SigningKey
from uplinkd.files import keep_private
from uplinkd.registry import ImportRow
from uplinkd.registry.sql import SqlRegistry
from uplinkd.registry.vault import key_file, key_in, new_key_file
from uplinkd.serving import Server as Served
from uplinkd.serving import last_server, lock_file, running_server
from uplinkd.serving import serving as holding
from uplinkd.settings import Settings
from uplinkd.worker import _follow_keys

house = house_of_http


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data")


PRODUCT = "a1keys"


def quiet(_count: int) -> None:
    pass


def furnish(settings: Settings, devices: int) -> SqlRegistry:
    """A registry with every kind of sealed value in it."""
    registry = SqlRegistry.open(settings)
    registry.create_product("keys", key=PRODUCT, secret="ProductSecret")
    registry.import_devices(ImportRow(n, PRODUCT, f"d{n:06}", f"secret{n}") for n in range(devices))
    registry.create_app("reader", products=[PRODUCT])
    registry.groups.create("hook", Plan(webhook=Webhook(url="https://example.com/in")))
    registry.operators.begin_answer("answer", "request")
    registry.operators.keep_answer("answer", b"what was answered")
    return registry


def everything(registry: SqlRegistry) -> list[object]:
    """All that is sealed, in clear."""
    answer = registry.operators.begin_answer("answer", "request")
    assert answer
    return [
        registry.products(),
        list(registry.devices(PRODUCT)),
        registry.app_secret(registry.app("reader").key),
        registry.groups.get("hook").secret,
        answer.body,
        [key.key for key in registry.signing_keys()],
    ]


def test_every_secret_is_sealed_anew_and_the_old_key_is_gone(tmp_path: Path) -> None:
    """Secrets of all kinds; who has the registry open goes on, reading and writing, without being told."""
    settings = Settings(data=tmp_path / "data")
    registry = furnish(settings, 50)
    before, old = everything(registry), key_in(key_file(settings))
    name, count = rotation.rotate(settings, quiet)
    assert count == 50 + 5
    assert everything(registry) == before
    (under,) = registry.keys.sealed()
    assert (under.fingerprint, under.current, under.values) == (name, True, 50 + 5)
    assert key_in(key_file(settings)) != old
    assert not new_key_file(settings).exists()
    assert stat.S_IMODE(key_file(settings).stat().st_mode) == 0o600
    registry.create_device(PRODUCT, "later", secret="ThisSecretIsNew1")
    assert [each.fingerprint for each in registry.keys.sealed()] == [name]
    again = SqlRegistry.open(settings)
    assert again.device(PRODUCT, "later").secret == "ThisSecretIsNew1"
    assert [entry.target for entry in again.operators.audit(action="keys.rotate", limit=9)] == [name]
    again.close()
    registry.close()


@pytest.mark.slow
def test_others_read_and_write_while_a_rotation_is_under_way(tmp_path: Path) -> None:
    """What they seal meanwhile is under the new key too, also what was sealed before and is stored only then."""
    settings = Settings(data=tmp_path / "data")
    registry = furnish(settings, 6000)
    other = SqlRegistry.open(settings)
    done = threading.Event()
    made: list[str] = []

    def work() -> None:
        while not done.is_set():
            name = f"made{len(made):05}"
            if len(made) % 2:
                registry.create_device(PRODUCT, name, secret=f"secret-of-{name}")
            else:
                registry.import_devices([ImportRow(1, PRODUCT, name, f"secret-of-{name}")])
            assert other.device(PRODUCT, name).secret == f"secret-of-{name}"
            assert other.device(PRODUCT, "d000007").secret == "secret7"
            made.append(name)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(3):
        rotation.rotate(settings, quiet)
    done.set()
    thread.join()
    assert len(made) > 3
    assert len(registry.keys.sealed()) == 1
    assert len(list(other.devices(PRODUCT))) == 6000 + len(made)
    registry.close()
    other.close()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["folder", "file"])
def test_a_rotation_killed_at_any_moment_loses_nothing(tmp_path: Path, way: str) -> None:
    """kill -9 again and again: whoever opens the registry in between finds everything, and the same command goes on."""
    settings = Settings(data=tmp_path / "data")
    registry = furnish(settings, 20_000)
    before = everything(registry)
    registry.close()
    command = ["keys", "rotate", *(["--to", str(tmp_path / "key")] if way == "file" else []), "--data"]
    if way == "file":
        (tmp_path / "key").write_bytes(base64.b64encode(secrets.token_bytes(32)))
    shutil.copytree(settings.data, tmp_path / "copy")
    whole = seconds_of(*command, str(tmp_path / "copy"))
    ended = between = 0
    for turn in range(12):
        if not killed([*command, str(settings.data)], whole * (0.4 + 0.05 * turn + 0.05 * random.random())):
            break
        ended += 1
        try:
            there = SqlRegistry.open(settings)
        except Rejected:  # it was done a moment before
            assert way == "file"
            break
        between += len(there.keys.sealed()) > 1
        there.close()
    assert ended
    if way == "folder":
        cli("keys", "rotate", data=settings.data)
    else:
        assert not between, "all or nothing"
        cli("keys", "rotate", "--to", str(tmp_path / "key"), data=settings.data)
        assert not key_file(settings).exists()
        key = (tmp_path / "key").read_text()
        settings = Settings.model_validate({"data": settings.data, "secret_key": key})
    again = SqlRegistry.open(settings)
    assert everything(again) == before
    assert len(again.keys.sealed()) == 1
    again.close()


def test_a_rotation_that_was_ended_half_way_goes_on_with_its_key(tmp_path: Path) -> None:
    """Both keys are there, both open, and the new one seals; an older program says which key it lacks."""
    settings = Settings(data=tmp_path / "data")
    registry = furnish(settings, 30)
    before = everything(registry)

    class EndedError(Exception):
        pass

    def end(count: int) -> None:
        raise EndedError

    with pytest.raises(EndedError):
        rotation.rotate(settings, end)
    assert len(registry.keys.sealed()) == 2
    half = SqlRegistry.open(settings)
    assert everything(half) == before
    half.create_device(PRODUCT, "meanwhile")
    fresh = key_in(new_key_file(settings))
    rotation.rotate(settings, quiet)
    assert key_in(key_file(settings)) == fresh
    assert len(half.keys.sealed()) == 1
    half.close()
    registry.close()


def test_a_key_given_by_a_setting_takes_the_place_of_the_folders(tmp_path: Path) -> None:
    """And of another setting; a server must not run meanwhile, for it would not have the key."""
    data = tmp_path / "data"
    settings = Settings(data=data)
    registry = furnish(settings, 20)
    before = everything(registry)
    files = [tmp_path / "first", tmp_path / "second"]
    texts = [base64.b64encode(secrets.token_bytes(32)).decode() for _ in files]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text + "\n")
    lock_file(data).touch()
    with holding(data, token_ttl=1, now=1):
        assert running_server(data) is None, "it is this process's own"
        done = subprocess.run(
            [*UPLINKD, "keys", "rotate", "--to", str(files[0]), "--data", str(data)],
            env=environment(), capture_output=True, check=False,
        )  # fmt: skip
        assert b"stop it first" in done.stderr
    rotation.rotate_to(settings, files[0], quiet)
    assert not key_file(settings).exists()
    with pytest.raises(Rejected, match="is not there"):
        SqlRegistry.open(settings)
    with pytest.raises(Unavailable, match="which this process does not have"):
        registry.create_device(PRODUCT, "lost")
    registry.close()
    given = Settings.model_validate({"data": data, "secret_key": texts[0]})
    with pytest.raises(Rejected, match="by the setting secret_key"):
        rotation.rotate(given, quiet)
    rotation.rotate_to(given, files[1], quiet)
    again = SqlRegistry.open(Settings.model_validate({"data": data, "secret_key": texts[1]}))
    assert everything(again) == before
    again.close()


def test_a_server_of_another_version_is_not_rotated_under(tmp_path: Path) -> None:
    """It might seal on with the old key."""
    data = tmp_path / "data"
    settings = Settings(data=data)
    furnish(settings, 1).close()
    holder = subprocess.Popen(
        [*UPLINKD[:1], "-c", f"import fcntl; f = open({str(lock_file(data))!r}, 'w'); fcntl.lockf(f, 2); print(); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout
    holder.stdout.readline()
    try:
        for act in (lambda: rotation.rotate(settings, quiet), lambda: rotation.rotate_signing(settings, at_once=False)):
            with pytest.raises(Rejected, match="an older uplinkd serves from"):
                act()
    finally:
        holder.communicate(b"\n")
    rotation.rotate(settings, quiet)


# signing keys


async def test_tokens_of_the_old_signing_key_stand_until_they_expire(house: House) -> None:
    """The new one signs once every gateway knows it; the old one retires by itself when its last token has ended."""
    settings = house.settings
    ttl = settings.token_ttl
    house.wall = time.time()
    first = await house.token()
    made = rotation.rotate_signing(settings, at_once=False)
    (other,) = [house.another_gateway()]
    house.gateway.take_keys(house.registry.signing_keys())
    house.wall += 1
    second = await house.token()
    house.wall += 2
    third = await house.token()
    signed_by = [int.from_bytes(base64.urlsafe_b64decode(token)[1:3], "big") for token in (first, second, third)]
    assert signed_by == [1, 1, made.id]
    assert other is not house.gateway
    peer = house.connect()
    assert [(await peer.ask(publish_request(token))).code for token in (first, second, third)] == [0, 0, 0]
    house.wall = house.wall - 2 + ttl - 1.5
    assert [(await peer.ask(publish_request(token))).code for token in (second, third)] == [0, 0]
    house.wall += 2
    assert [(await peer.ask(publish_request(token))).code for token in (first, second, third)] == [20001, 20001, 0]
    facts = house.registry.keys.signing()  # type: ignore[attr-defined]  # the house has a SqlRegistry
    assert [each.state(round(house.wall * 1000) + 5000, made.id) for each in facts] == ["retired", "signs"]


async def test_a_leaked_signing_key_is_retired_at_once(house: House) -> None:
    """Its tokens end, devices log in again."""
    house.wall = time.time()
    token = await house.token()
    rotation.rotate_signing(house.settings, at_once=True)
    house.gateway.take_keys(house.registry.signing_keys())
    house.wall += 0.5
    peer = house.connect()
    assert (await peer.ask(publish_request(token))).code == 20001
    assert (await peer.ask(publish_request(await house.token()))).code == 0


async def test_of_two_changes_of_the_signing_keys_the_later_stands(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though what was read for the earlier comes late."""
    read, reading, told = house.registry.signing_keys, set[asyncio.Task[None]](), threading.Event()

    def slow() -> list[SigningKey]:
        found = read()
        if not told.is_set():
            told.wait(1)
            time.sleep(0.05)
        return found

    _follow_keys(house.registry, house.gateway, house.cache, reading)
    monkeypatch.setattr(house.registry, "signing_keys", slow)
    rotation.rotate_signing(house.settings, at_once=False)
    await house.cache.follow()
    await asyncio.sleep(0.05)
    made = rotation.rotate_signing(house.settings, at_once=True)
    await house.cache.follow()
    told.set()
    await asyncio.wait(reading)
    assert made.id in house.gateway._keys


def test_tokens_that_were_given_under_a_longer_setting_stand_too(tmp_path: Path) -> None:
    """A server that was started with a shorter token_ttl has devices whose tokens live longer."""
    data = tmp_path / "data"
    settings = Settings(data=data, token_ttl=60)
    registry = SqlRegistry.open(settings)
    now = round(time.time() * 1000)
    with holding(data, token_ttl=86_400_000, now=now - 1000):
        pass
    with holding(data, token_ttl=60_000, now=now):
        pass
    assert last_server(data) == Served(last_server(data).version, os.getpid(), 60_000, now + 86_400_000)
    rotation.rotate_signing(settings, at_once=False)
    rotation.rotate_signing(settings, at_once=False)
    first, second, third = registry.keys.signing()
    assert first.retired == second.retired == now + 86_400_000
    assert third.retired is None
    registry.close()


@pytest.mark.slow
async def test_a_running_server_follows_both_keys(tmp_path: Path) -> None:
    """Two gateways, the command line beside them: nobody is logged out, and a new login is signed by the new key."""
    data = tmp_path / "data"
    product = cli_json("product", "create", "keys", data=data)["productKey"]
    secret = cli_json("device", "create", product, "lamp-1", data=data)["deviceSecret"]
    with serving(data, "--workers", "2", "--auth-rate", "0") as server:
        lamp = Device(server, product, "lamp-1", secret)
        assert await lamp.login() == 0
        old = lamp.token
        assert cli_json("keys", "rotate", data=data)["sealedAnew"] == 3
        made = cli_json("keys", "rotate", "--signing", data=data)
        later = cli_json("device", "create", product, "lamp-2", data=data)["deviceSecret"]
        assert (await lamp.publish(b"under the old token"))[0] == 0
        await until(lambda: time.time() * 1000 > made["signsFrom"] + 300)
        for name, its in (("lamp-1", secret), ("lamp-2", later)):
            for _ in range(4):  # the kernel gives each connection to one of the gateways
                device = Device(server, product, name, its)
                assert await device.login() == 0
                assert base64.urlsafe_b64decode(device.token)[2] == 2
                assert (await device.publish(b"new"))[0] == 0
                await device.close()
        lamp.token = old
        assert (await lamp.publish(b"old still"))[0] == 0
        await lamp.close()
        states = {each["id"]: each["state"] for each in cli_json("keys", "list", data=data)["signingKeys"]}
        assert states == {1: "verifies", 2: "signs"}
        facts = json.loads(lock_file(data).read_text())
        assert facts["pid"] == server.pid
        assert facts["token_ttl"] == 7 * 86_400_000


# file modes


def test_what_others_could_read_is_mended_and_said(tmp_path: Path) -> None:
    """The data folder, keys, the registry; once mended there is nothing to say."""
    data = tmp_path / "data"
    settings = Settings(data=data)
    furnish(settings, 1).close()
    assert keep_private(data) == []
    data.chmod(0o755)
    key_file(settings).chmod(0o644)
    (data / "registry.sqlite").chmod(0o640)
    told = keep_private(data)
    assert [line.partition(" ")[0] for line in told] == [
        str(path) for path in (data, key_file(settings), data / "registry.sqlite")
    ]
    assert told[1].endswith("could be read by other users (mode 0644); it is now 0600")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (data, key_file(settings))] == [0o700, 0o600]
    assert keep_private(data) == []


def test_a_key_that_others_may_read_and_that_cannot_be_mended_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's file; a folder of another user's is a warning, as volumes of containers are."""
    data = tmp_path / "data"
    settings = Settings(data=data)
    furnish(settings, 1).close()

    def refuse(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    data.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refuse)
    assert ["may not change that" in line for line in keep_private(data)] == [True]
    os.chmod(key_file(settings), 0o644)
    with pytest.raises(Rejected, match="chmod 600 it"):
        keep_private(data)
