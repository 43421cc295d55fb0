"""Rows that are told in as many messages as it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ["in_messages"]

T = TypeVar("T")

_ROWS = 2000


def in_messages(rows: Sequence[T], message: Callable[[Sequence[T]], bytes], most: int) -> Iterator[bytes]:
    """`message(rows)`, one at least, or of as many parts of them as it takes for none to be larger than `most` bytes; one row alone
    is told however large it is. `message` is called anew for each part, when the one before it was taken."""
    for first in range(0, max(len(rows), 1), _ROWS):
        yield from _within(rows[first : first + _ROWS], message, most)


def _within(rows: Sequence[T], message: Callable[[Sequence[T]], bytes], most: int) -> Iterator[bytes]:
    whole = message(rows)
    if len(whole) <= most or len(rows) <= 1:
        yield whole
        return
    parts = len(whole) // most + 1
    share = -(-len(rows) // parts)
    for first in range(0, len(rows), share):
        yield from _within(rows[first : first + share], message, most)
