"""The supervisor, where something fails or happens between two of its steps."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from uplinkd import app
from uplinkd.app import _Doors, _Supervisor, _Worker
from uplinkd.flow import Flow
from uplinkd.metrics import Metrics
from uplinkd.settings import Settings

# Python 3.12 and later warn of a fork beside other threads: those of the test run, which the new processes do not touch.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

PROGRAM = """
import sys
from pathlib import Path
from uplinkd.app import serve
from uplinkd.settings import Settings
def started(_):
    raise BrokenPipeError("nobody reads what is said")
nowhere = dict.fromkeys(("plain_listen", "mqtt_listen", "mqtt_plain_listen", "console_listen", "nats_listen"), "")
settings = Settings(data=Path(sys.argv[1]), workers=1, listen="127.0.0.1:0", **nowhere)
serve(settings, prepare=lambda _: None, started=started)
"""


def test_a_server_with_a_fault_ends(tmp_path: Path) -> None:
    """With its processes, so that somebody can start it again; they would go on without it and without the engine."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "data")], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "nobody reads what is said" in done.stderr


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Supervisor]:
    """Of one worker and the process that delivers, which do nothing but wait for its end."""

    def wait(here: _Supervisor, _slot: int, ready: Connection) -> None:
        here._begin("uplinkd-test")
        ready.send_bytes(b"ready")
        os.read(here.lifeline[0], 1)

    monkeypatch.setattr(_Supervisor, "_child", wait)
    monkeypatch.setattr(_Supervisor, "_delivery", wait)
    monkeypatch.setattr(app, "still_serving", lambda _: True)
    settings = Settings(data=tmp_path)
    nothing: Any = None
    flow, metrics = Flow(settings, shared=False), Metrics(1, others=1)
    made = _Supervisor(
        settings, _Doors([], [], 1), [], None, flow, metrics, nothing, None, None, None, (("localhost", 0), None)
    )
    with made.signals():
        made.start()
        yield made
        made.stop()
    for end in made.lifeline:
        os.close(end)
    metrics.close()
    flow.close()


def test_a_process_that_cannot_be_made_is_made_later(
    supervisor: _Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where memory is short, which may be why its predecessor has died: the others go on meanwhile."""
    spawn, before = _Supervisor._spawn, [*supervisor.workers]
    faults = [OSError(errno.ENOMEM, "Cannot allocate memory")]

    def short(here: _Supervisor, slot: int) -> _Worker:
        if faults:
            raise faults.pop()
        here.stopping = 1
        return spawn(here, slot)

    monkeypatch.setattr(_Supervisor, "_spawn", short)
    monkeypatch.setattr(app, "_NO_PROCESS_SECONDS", 0.1)
    assert before[0]
    before[0].process.kill()
    supervisor.watch()
    assert "Cannot allocate memory; it is tried again" in caplog.text
    assert supervisor.workers[0] not in (None, before[0])
    assert supervisor.workers[1] is before[1]


def test_a_stop_reaches_a_process_that_has_only_begun(supervisor: _Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at once, and not by SIGKILL after the time in which others drain: what it holds by then would be lost for a while."""
    monkeypatch.setattr(app, "call_me", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    worker = supervisor._spawn(0)
    worker.process.join(2)
    try:
        assert worker.process.exitcode == -signal.SIGTERM
    finally:
        worker.process.kill()
        worker.process.join()


def test_an_engine_without_room_to_start_is_started_later(
    supervisor: _Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is full may be why it has died."""
    faults = [OSError(errno.ENOSPC, "No space left on device")]

    class Engine:
        def poll(self) -> bool:
            return False

        def restart(self) -> None:
            if faults:
                raise faults.pop()
            supervisor.stopping = 1

    engine: Any = Engine()
    supervisor.engine = engine
    monkeypatch.setattr("uplinkd.app.time.sleep", lambda _: None)
    before = [*supervisor.workers]
    supervisor.watch()
    assert "nats-server could not be started: [Errno 28] No space left on device" in caplog.text
    assert "nats-server is back" in caplog.text
    assert supervisor.workers == before
