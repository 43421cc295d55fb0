"""Commands that are ended by kill -9 at any moment of their work."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence

from tests.house import UPLINKD, environment

__all__ = ["killed", "seconds_of"]


def seconds_of(*arguments: str) -> float:
    """How long this command takes here, as a measure for when to kill the next one."""
    started = time.monotonic()
    subprocess.run([*UPLINKD, *arguments], env=environment(), stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - started


def killed(arguments: Sequence[str], after: float) -> bool:
    """Run a command and kill it -9 after so many seconds; whether it was still at work."""
    command = [*UPLINKD, *arguments]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.kill()
    _, said = process.communicate()
    assert b"Traceback" not in said, said
    return process.returncode == -signal.SIGKILL
