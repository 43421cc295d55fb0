"""What became of each fault: the rows of the table that `make faults` prints, as the tests have asserted them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass

import pytest

__all__ = ["Row", "Tell", "rows_of", "written"]

_KEY = "fault"
_HEAD = ("FAULT", "DEVICES SAW", "SLOWEST", "BACK AFTER", "ACKNOWLEDGED", "FOUND")


@dataclass(frozen=True, slots=True)
class Row:
    """`saw` are codes and what else devices were told; `slowest` the longest wait for an answer or for the end of the connection,
    s; `back`: so long after the harm began, or ended where it was lifted, the last device was acknowledged again, s. `found`: those of
    the acknowledged messages that are stored."""

    fault: str
    saw: str
    slowest: float
    back: float
    acknowledged: int
    found: int


Tell = Callable[[Row], None]
"""Hands a row over; a test that fails afterwards has none in the table."""


def teller(record_property: Callable[[str, object], None]) -> Tell:
    return lambda row: record_property(_KEY, asdict(row))


def rows_of(report: pytest.TestReport) -> Iterable[Row]:
    if report.when == "call" and report.passed:
        for name, value in report.user_properties:
            if name == _KEY and isinstance(value, dict):
                yield Row(**value)


def written(rows: Iterable[Row]) -> list[str]:
    """Aligned lines, the first of them the heads."""
    cells = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cells(row: Row) -> tuple[str, ...]:
    return tuple(f"{cell:.1f} s" if isinstance(cell, float) else f"{cell}" for cell in astuple(row))
