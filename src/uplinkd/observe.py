"""How uplinkd speaks to its operator: log set-up, and warnings that do not flood."""

from __future__ import annotations

import logging
import sys
import time

__all__ = ["Occasionally", "set_up_logging"]


def set_up_logging() -> None:
    """One line a record on standard error: time, level, process, text."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s uplinkd[%(process)d] %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("uplinkd").setLevel(logging.INFO)


class Occasionally:
    """Lets a warning through once in `seconds`, so that an outage is a line and not a flood."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True
