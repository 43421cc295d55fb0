"""Rows that are told in as many messages as it takes."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from uplinkd.core.messages import in_messages


def message(rows: Sequence[str]) -> bytes:
    return json.dumps(rows).encode()


@pytest.mark.parametrize(
    "sizes",
    [[], [3], [500], [10] * 4999, [500, 1, 1, 500, 500], [1] * 200 + [400] * 3, [95] * 7, list(range(80)) * 3],
    ids=["none", "one", "one too large", "many", "too large ones", "large ones last", "full ones", "mixed"],
)
def test_each_row_is_told_once_in_its_order_within_the_bound(sizes: list[int]) -> None:
    """But for one that is larger alone; and without a row there is one message still."""
    rows = [f"{number}".ljust(size, "x") for number, size in enumerate(sizes)]
    told = list(in_messages(rows, message, 100))
    assert [row for each in told for row in json.loads(each)] == rows
    assert all(len(each) <= 100 or len(json.loads(each)) == 1 for each in told)
    assert told


def test_few_messages_are_made() -> None:
    """Not many more than must be."""
    rows = ["x" * 20] * 1000
    assert len(list(in_messages(rows, message, 1000))) <= 2 * len(message(rows)) / 1000
    assert len(list(in_messages(rows, message, 10**6))) == 1


def test_a_message_is_made_when_the_one_before_it_was_taken() -> None:
    """So that the first can be another one."""
    first = True
    told = []

    def marked(rows: Sequence[str]) -> bytes:
        return json.dumps([first, *rows]).encode()

    for each in in_messages(["x" * 60] * 3, marked, 100):
        told.append(json.loads(each)[0])
        first = False
    assert told == [True, False, False]
