"""How uplinkd speaks to its operator: log set-up, and warnings that do not flood."""

from __future__ import annotations

import datetime as dt
import json as jsonlib
import logging
import re
import sys
import time

__all__ = ["JsonFormatter", "Occasionally", "TextFormatter", "set_up_logging"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def set_up_logging(*, json: bool = False) -> None:
    """One line a record on standard error: time, level, process, text; or a JSON object (see JsonFormatter)."""
    handler = logging.StreamHandler(sys.stderr)
    text = TextFormatter("%(asctime)s %(levelname)s uplinkd[%(process)d] %(message)s")
    handler.setFormatter(JsonFormatter() if json else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("uplinkd").setLevel(logging.INFO)


class TextFormatter(logging.Formatter):
    """One line a record, and a traceback after it: control characters of what devices and people send are shown as escapes, so
    that they neither make lines of their own nor steer a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (ISO 8601, UTC, ms), `level`, `logger`, `pid`, `message`, and `exception`, the traceback,
    where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        at = dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return jsonlib.dumps(line)


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
