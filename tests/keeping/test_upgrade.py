"""What every released version left behind is opened by this one, and nothing is lost; what a newer one made is refused."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine

from tests.house import Device, cli, serving, stored
from uplinkd.core.apps import check_app_secret
from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.core.model import DeviceName, ProductKey
from uplinkd.registry.schema import REVISIONS
from uplinkd.registry.sql import SqlRegistry
from uplinkd.serving import lock_file
from uplinkd.settings import Settings

FOLDERS = Path(__file__).parent.parent / "vectors" / "folders"
OPTIONS = ("--workers", "1", "--keep-age", "0", "--down-age", "3600d", "--nats-listen", "")


def unpacked(revision: str, place: Path) -> tuple[Path, dict[str, Any]]:
    data = place / "data"
    for folder in (data, data / "keys", data / "nats"):
        folder.mkdir(mode=0o700)
    with tarfile.open(FOLDERS / f"{revision}.tar.gz") as archive:
        archive.extractall(data, filter="data")
    return data, json.loads((data / "facts.json").read_text())


@contextlib.contextmanager
def held(data: Path, content: str = "") -> Iterator[None]:
    """Another process holds the lock of a server."""
    take = f"import fcntl; f = open({str(lock_file(data))!r}, 'w'); fcntl.lockf(f, 2)"
    script = f"{take}; f.write({content!r}); f.flush(); print(); input()"
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout
    holder.stdout.readline()
    try:
        yield
    finally:
        holder.communicate(b"\n")


def test_there_is_a_folder_of_every_schema() -> None:
    """A new revision comes with what the one before it left behind: see tests/vectors/folders/make.py."""
    assert {path.name.partition(".")[0] for path in FOLDERS.glob("*.tar.gz")} == set(REVISIONS)


@pytest.mark.parametrize(
    "revision", [REVISIONS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in REVISIONS[1:])]
)
async def test_what_a_version_left_behind_is_all_there(revision: str, tmp_path: Path) -> None:
    """Products, devices and their secrets, classes, applications, users, keys, groups; messages under their ids; tokens stand, and
    what waited for a device comes."""
    data, facts = unpacked(revision, tmp_path)
    product = ProductKey(facts["product"])
    with serving(data, *OPTIONS) as server:
        registry = SqlRegistry.open(Settings(data=data))
        assert [each.secret for each in registry.products()] == [facts["productSecret"]]
        assert {each.name: each.secret for each in registry.devices(product)} == facts["devices"]
        assert not registry.device(product, "disabled-1").enabled
        classes = [[each.levels, each.right.value] for each in registry.topic_classes(product)]
        assert classes == facts["topics"]
        if app := facts.get("app"):
            assert check_app_secret(registry.find_app(app["key"]), app["secret"])
        if user := facts.get("user"):
            assert registry.operators.find_user(user)
            key = registry.operators.find_key(facts["apiKey"])
            assert key
            assert key.name == "program"
        assert [group.name for group in registry.groups.all()] == [facts[name] for name in ("group",) if name in facts]
        registry.close()

        old = {int(number): payload.encode() for number, payload in facts["messages"].items()}
        assert stored(data, product) == old
        for name in ("lamp-1", "lamp-2"):
            device = Device(server, product, name, facts["devices"][name], facts["tokens"][name])
            code, message_id = await device.publish(b"under the old token")
            assert (code, message_id > max(old)) == (0, True)
            if name == "lamp-2" and "down" not in facts:
                assert await device.login() == 0
            await device.close()
        new = Device(server, product, DeviceName("lamp-1"), facts["devices"]["lamp-1"])
        assert await new.login() == 0
        assert (await new.publish(b"new", "user/own/report"))[0] == 0
        await new.close()
        refused = Device(server, product, DeviceName("disabled-1"), facts["devices"]["disabled-1"])
        assert await refused.login() != 0
        await refused.close()
        server.stop()


@pytest.mark.parametrize("arguments", [("serve",), ("product", "list"), ("backup", "x.tar"), ("keys", "list")])
def test_what_a_newer_version_made_is_refused_in_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """It says which versions these are, and nothing is touched."""
    data, _ = unpacked(REVISIONS[-1], tmp_path)
    _set_revision(data, "9999")
    before = (data / "registry.sqlite").read_bytes()
    done = cli(*arguments, data=data, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert "a newer uplinkd made it: its schema is '9999', this version knows up to" in line
    assert (data / "registry.sqlite").read_bytes() == before


def test_a_schema_is_not_brought_forward_under_a_server_that_runs(tmp_path: Path) -> None:
    """An older server would fail in ways that nobody understands: stop it first. One that says its version is named."""
    data, facts = unpacked(REVISIONS[-2], tmp_path)
    settings = Settings(data=data)
    with held(data), pytest.raises(Rejected, match=r"an older uplinkd serves from .*: stop that server first"):
        SqlRegistry.open(settings)
    told = json.dumps({"version": "0.0.9", "pid": 1, "token_ttl": 1, "tokens_until": 1})
    with held(data, told), pytest.raises(Rejected, match=r"uplinkd 0\.0\.9 serves from .* with the schema '0004'"):
        SqlRegistry.open(settings)
    registry = SqlRegistry.open(settings)
    assert registry.device(facts["product"], "lamp-1").secret == facts["devices"]["lamp-1"]
    registry.close()


def test_a_server_whose_registry_a_newer_version_took_writes_nothing_more(tmp_path: Path) -> None:
    """By a way that does not look at the lock, such as the same database in another folder: it says so in one clear line."""
    data, facts = unpacked(REVISIONS[-1], tmp_path)
    registry = SqlRegistry.open(Settings(data=data))
    _set_revision(data, "9999")
    with pytest.raises(
        Unavailable, match=r"a newer uplinkd has brought the registry .* start the newer version in its place"
    ):
        registry.create_device(facts["product"])
    registry.close()


def _set_revision(data: Path, revision: str) -> None:
    engine = create_engine(f"sqlite:///{data / 'registry.sqlite'}")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = ?", (revision,))
    engine.dispose()
