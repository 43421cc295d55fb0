"""The guard of the hot path's cost: instructions, which are the same in every run, not time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from bench.micro import counts

from uplinkd.core import wire


def test_no_part_of_a_request_takes_more_than_it_did() -> None:
    """What it takes is kept beside; whoever makes it dearer on purpose renews that: `python -m bench.micro.counts --renew`."""
    before = counts.kept()
    if before is None:
        pytest.skip(f"bench/micro/counts.json has no counts for Python {counts.VERSION}")
    done = subprocess.run(
        [sys.executable, "-m", "bench.micro.counts"], capture_output=True, text=True, timeout=60, check=False
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == before.keys(), "renew the counts: python -m bench.micro.counts --renew"
    assert counts.dearer(found, before) == []


def test_a_part_that_grows_dearer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has it inside, and nothing else."""
    before = counts.count()
    published = wire.published

    def slower(message_id: int) -> bytes:
        for _ in range(20):
            len("")
        return published(message_id)

    monkeypatch.setattr(wire, "published", slower)
    found = counts.dearer(counts.count(), before)
    assert {line.partition(":")[0] for line in found} == {"publish on a transport in memory", "answers"}
    assert any("instructions" in line for line in found)
    assert any("calls" in line for line in found)


def test_what_moves_by_little_is_let_pass() -> None:
    """Up to 3 %, and anything that costs less; a part that nobody counted is not."""
    before = {"a": {"instructions": 1000, "calls": 100}}
    assert counts.dearer({"a": {"instructions": 1030, "calls": 90}}, before) == []
    assert counts.dearer({"a": {"instructions": 1031, "calls": 100}}, before) == [
        "a: 1031 instructions, 1000 before (+3.1%)"
    ]
    assert counts.dearer({"b": {"instructions": 1, "calls": 1}}, before) == ["b: not counted before"]
