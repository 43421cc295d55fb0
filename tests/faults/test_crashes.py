"""Two hundred kills at random, of every process, under load: what was acknowledged is there, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import threading
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.load import LIMITS, Load
from tests.faults.table import Tell
from tests.house import Server, alive, make_devices, until
from uplinkd.core.errors import Unavailable
from uplinkd.registry import open_registry
from uplinkd.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.xdist_group("faults")]

KILLS = 200
CHILDREN = ("uplinkd-worker", "nats-server", "uplinkd-deliver", "uplinkd-console")
# How often each is the victim. Without its supervisor a server ends: the test starts it again, and may kill it before it stands.
VICTIMS = dict(zip(CHILDREN, (45, 17, 15, 10), strict=True)) | {"supervisor": 6, "start": 4, "everything": 3}


class Clerk(threading.Thread):
    """Makes devices in the registry meanwhile, as the command line and the console do; those in `made` were acknowledged."""

    def __init__(self, data: Path, product: str) -> None:
        super().__init__(daemon=True)
        self.made: list[str] = []
        self.running = True
        self.problem: BaseException | None = None
        self._product = product
        self._registry = open_registry(Settings(data=data))

    def run(self) -> None:
        number = 0
        try:
            while self.running:
                number += 1
                name = f"made{number:05}"
                with contextlib.suppress(Unavailable):
                    self._registry.create_device(self._product, name)
                    self.made.append(name)
                time.sleep(0.05)
        except BaseException as problem:  # the test tells it
            self.problem = problem

    def finish(self) -> None:
        self.running = False
        self.join(20)
        self._registry.close()
        assert self.problem is None, self.problem


def kill_at_random(server: Server, chance: random.Random, deadline: float) -> Counter[str]:
    """How many of each were killed; the server stands at the end."""
    killed = Counter[str]()
    while killed.total() < KILLS:
        assert time.monotonic() < deadline, f"only {killed} in time"
        time.sleep(chance.uniform(0, 0.4))
        children = {name: server.children(name) for name in CHILDREN}
        # One that was killed a moment ago may not be there again.
        names = [name for name in VICTIMS if children.get(name, True)]
        (name,) = chance.choices(names, [VICTIMS[each] for each in names])
        if name in CHILDREN:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(children[name]), signal.SIGKILL)
                killed[name] += 1
            continue
        if name == "everything":
            killed.update({each: len(pids) for each, pids in children.items()})
            server.kill()
        else:
            server.kill_supervisor()
        killed["supervisor"] += 1
        if name == "start":
            server.launch()
            time.sleep(chance.uniform(0, 1.2))
            server.kill_supervisor()
            killed["supervisor"] += 1
        server.start()
    return killed


def marked(mark: str) -> list[int]:
    """The living processes in whose environment `mark` stands: a server's, and all that came of them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes() and alive(int(folder.name)):
                found.append(int(folder.name))
    return found


@pytest.mark.timeout(600)
async def test_two_hundred_random_kills_lose_nothing_and_leave_nothing_behind(tmp_path: Path, tell: Tell) -> None:
    """What was acknowledged to devices and to operators is there, both databases are whole, no process and no lock is left."""
    seed = int(os.environ.get("FAULTS_SEED") or random.SystemRandom().randrange(1_000_000))
    print(f"FAULTS_SEED={seed}")
    mark = f"{uuid.uuid4()}"
    server = Server(tmp_path / "data", LIMITS, console_port=0, variables={"MARK": mark}).start()
    load = Load(make_devices(server, 8), pause=0.05)
    clerk = Clerk(server.data, load.devices[0].product)
    clerk.start()
    killed = Counter[str]()

    def fault() -> None:
        killed.update(kill_at_random(server, random.Random(seed), time.monotonic() + 400))

    try:
        await load.run(8, fault, after=1)
        clerk.finish()
        processes = set(marked(mark))
        assert {server.pid, *server.children("")} <= processes
        row = load.row(f"{killed.total()} random kills, seed {seed}", server.data, within=60)
        assert server.stop() == 0
        await until(lambda: not marked(mark), 15)
        _check_registry(server.data, load, clerk)
        server.start()
        assert await load.devices[0].login() == 0
        await load.devices[0].close()
        assert server.stop() == 0
    finally:
        clerk.running = False
        if server.process:
            server.kill()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
    log = server.log.read_text()
    assert "Traceback" not in log
    print(killed)
    tell(row)


def _check_registry(data: Path, load: Load, clerk: Clerk) -> None:
    for name in ("registry.sqlite", "journal.sqlite"):
        with contextlib.closing(sqlite3.connect(data / name)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert not database.execute("PRAGMA foreign_key_check").fetchall()
    assert len(clerk.made) > 100
    with contextlib.closing(open_registry(Settings(data=data))) as registry:
        names = {each.name for each in registry.devices(load.devices[0].product)}
    missing = {*clerk.made, *(each.name for each in load.devices)} - names
    assert not missing, f"{len(missing)} of {len(clerk.made)} devices are gone"
