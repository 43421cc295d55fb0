"""The log as people and machines read it."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
from collections.abc import Iterator

import pytest

from uplinkd.observe import TextFormatter, set_up_logging


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The test runner's own set-up of the log."""
    root, ours = logging.getLogger(), logging.getLogger("uplinkd")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_a_line_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    """With everything that the text has, whatever stands in the message."""
    set_up_logging(json=True)
    logging.getLogger("uplinkd.tls").warning('the certificate %s\nof 设备 "1" is due', "a.pem")
    logging.getLogger("uplinkd").info("second")
    first, second = capsys.readouterr().err.splitlines()
    line = json.loads(first)
    at = dt.datetime.fromisoformat(line.pop("time"))
    assert line == {
        "level": "WARNING",
        "logger": "uplinkd.tls",
        "pid": os.getpid(),
        "message": 'the certificate a.pem\nof 设备 "1" is due',
    }
    assert at.utcoffset() == dt.timedelta(0)
    assert abs((dt.datetime.now(dt.UTC) - at).total_seconds()) < 60
    assert json.loads(first)["time"][-5:-4] == "."
    assert first.count('Z"') == 1
    assert json.loads(second)["message"] == "second"


def test_a_traceback_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """So that what collects the log need not put it together."""
    set_up_logging(json=True)
    try:
        int("wrong")
    except ValueError:
        logging.getLogger("uplinkd").exception("a fault of ours")
    (only,) = capsys.readouterr().err.splitlines()
    line = json.loads(only)
    assert line["message"] == "a fault of ours"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("base 10: 'wrong'")


def test_without_it_a_line_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    """As people read it at a terminal."""
    set_up_logging()
    logging.getLogger("uplinkd").info("hello")
    assert capsys.readouterr().err.endswith(f"INFO uplinkd[{os.getpid()}] hello\n")


def test_what_devices_send_makes_no_line_of_its_own() -> None:
    """Nor does it steer the terminal that the log is read in; a traceback still has its lines."""
    record = logging.LogRecord(
        "uplinkd", logging.WARNING, "", 0, "at %s", ("/a\n2026 INFO \x1b[2Jfake\u2028灯\x9b",), None
    )
    assert TextFormatter("%(levelname)s %(message)s").format(record) == (
        "WARNING at /a\\n2026 INFO \\x1b[2Jfake\\u2028灯\\x9b"
    )
    fault = ValueError("x")
    record.exc_info = (ValueError, fault, None)
    assert "\nValueError: x" in TextFormatter().format(record)
