"""The supervisor, where something fails or happens between two of its steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
