"""Fleets as CSV, of which people upload any file."""

from __future__ import annotations

import io

import pytest

from uplinkd.core.errors import Rejected
from uplinkd.registry.fleet import read_fleet


def test_a_line_without_end_is_refused_before_it_fills_memory() -> None:
    """Of a file that is no fleet at most 64 KiB are looked at."""

    class Endless(io.BytesIO):
        asked = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert size > 0
            self.asked += size
            return b"x" * size

    stream = Endless()
    with pytest.raises(Rejected, match="line 1 is longer than 65536 bytes"):
        next(read_fleet(stream))
    assert stream.asked == 65537
