"""What the supervisor reads of its workers' work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import environment

# The supervisor itself, with a look at its metrics while it serves; what asks is a process of its own, like a device.
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from uplinkd import app
from uplinkd.metrics import Metrics
from uplinkd.settings import Settings

made = []

class Seen(Metrics):
    def __init__(self, *counts, **more):
        super().__init__(*counts, **more)
        made.append(self)

app.Metrics = Seen
CLIENT = '''
import http.client, ssl, sys
for number in range(20):
    door = http.client.HTTPSConnection("localhost", int(sys.argv[1]), context=ssl.create_default_context(cafile=sys.argv[2]))
    door.request("POST", "/auth", b"{}", {"Content-Type": "application/json"})
    assert door.getresponse().status == 200
    door.close()
'''

def until(condition):
    end = time.monotonic() + 10
    while not condition(made[0].read()):
        assert time.monotonic() < end, made[0].read()
        time.sleep(0.05)

def started(it):
    subprocess.run([sys.executable, "-c", CLIENT, str(it.tls[1]), str(it.authority)], check=True, timeout=20)
    until(lambda reading: reading.requests["auth", 10001] == 20)
    reading = made[0].read()
    assert reading.handshakes["TLSv1.3", "ecdhe"] == reading.accepted["https"] == 20, reading
    assert reading.latency["auth"].count == 20
    until(lambda reading: reading.connections["https"] == 0)
    os.kill(os.getpid(), signal.SIGTERM)

listen = {name: "127.0.0.1:0" for name in ("listen", "mqtt_listen")}
app.serve(Settings(data=Path(sys.argv[1]), workers=2, nats_listen="", **listen), prepare=lambda _: None, started=started)
print("done")
"""


@pytest.mark.slow
def test_the_supervisor_reads_what_its_workers_counted(tmp_path: Path) -> None:
    """Over real TLS, whichever of two workers each connection came to."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "data")],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        cwd=tmp_path,
    )
    assert done.stdout == "done\n", done.stderr
