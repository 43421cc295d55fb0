"""Refusals of all gateways, seen together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from uplinkd.core.model import DeviceName, ProductKey
from uplinkd.engine import Told
from uplinkd.engine.memory import MemoryBus
from uplinkd.journal import Journal, Refusal, Wanted
from uplinkd.records import RECORDS, Records, answer
from uplinkd.settings import Settings

NOW = 1_800_000_000_000


def refusal(at: int, device: str, code: int = 20000) -> Refusal:
    return Refusal(f"{at:x}", at, "topic", code, 200, ProductKey("pk"), DeviceName(device), "192.0.2.1", "/t", "no")


async def gateway(bus: MemoryBus, folder: Path, name: str, *refusals: Refusal) -> Settings:
    """One that answers; its delivery process does so in a thread."""
    settings = Settings(data=folder / name, nats_url="nats://nowhere", gateway=name)
    journal = Journal(settings)
    for each in refusals:
        journal.record(each)
    await journal.close()
    tasks: list[asyncio.Task[None]] = []

    async def tell(told: Told) -> None:
        bus.tell(told.reply, await asyncio.to_thread(answer, settings, told))

    bus.listen(RECORDS, lambda told: tasks.append(asyncio.create_task(tell(told))))
    return settings


def names(*gateways: str) -> Callable[[], set[str]]:
    return lambda: set(gateways)


async def test_they_come_in_the_order_of_time_with_their_gateways(tmp_path: Path) -> None:
    """And pages meet without a gap and without a repetition, whichever gateway each is from."""
    bus = MemoryBus()
    one = await gateway(bus, tmp_path, "one", *(refusal(NOW + 2 * number, "a") for number in range(10)))
    await gateway(bus, tmp_path, "two", *(refusal(NOW + 2 * number + 1, "b") for number in range(10)))
    records = Records(one, bus, names("one", "two"))
    found = await records.read(Wanted(), 100)
    assert [each.at - NOW for each in found.refusals] == list(range(20))
    assert [each.gateway for each in found.refusals[:2]] == ["one", "two"]
    assert found.silent == []
    seen: list[int] = []
    before = None
    while page := (await records.read(Wanted(before=before), 3)).refusals:
        seen = [each.at - NOW for each in page] + seen
        before = page[0].id
    assert seen == list(range(20))


async def test_one_that_does_not_answer_is_named(tmp_path: Path) -> None:
    """What the others have is shown, a second later."""
    bus = MemoryBus()
    one = await gateway(bus, tmp_path, "one", refusal(NOW, "a"))
    found = await Records(one, bus, names("one", "gone")).read(Wanted(), 10)
    assert (len(found.refusals), found.silent) == (1, ["gone"])


async def test_without_the_engine_the_own_record_is_read(tmp_path: Path) -> None:
    bus = MemoryBus()
    one = await gateway(bus, tmp_path, "one", refusal(NOW, "a"))
    bus.connected = False
    found = await Records(one, bus, names("one", "two")).read(Wanted(), 10)
    assert ([each.gateway for each in found.refusals], found.silent) == (["one"], ["two"])


async def test_counts_and_what_was_held_back_are_added_up(tmp_path: Path) -> None:
    bus = MemoryBus()
    one = await gateway(bus, tmp_path, "one", refusal(NOW, "a"), refusal(NOW + 1, "a", 40000))
    await gateway(bus, tmp_path, "two", refusal(NOW, "b"), refusal(NOW + 1, "a", 40000))
    records = Records(one, bus, names("one", "two"))
    assert await records.counts(NOW) == {20000: 2, 40000: 2}
    (held,) = await records.held_back(NOW)
    assert (held.device_name, held.times) == ("a", 2)


@pytest.mark.parametrize("shared", [True, False])
async def test_new_ones_are_followed(tmp_path: Path, shared: bool) -> None:
    """From each gateway where the look before ended, under the ids that the list has them under: whoever reads both knows them by
    that."""
    bus = MemoryBus()
    one = await gateway(bus, tmp_path, "one", refusal(NOW, "a"))
    if not shared:
        one = one.model_copy(update={"nats_url": ""})
    records = Records(one, bus, names("one"))
    cursors, found = await records.after(Wanted(), None)
    assert found == []
    journal = Journal(one)
    journal.record(refusal(NOW + 5, "b"))
    await journal.close()
    cursors, found = await records.after(Wanted(), cursors)
    assert [each.device_name for each in found] == ["b"]
    assert [each.id for each in found] == [each.id for each in (await records.read(Wanted(), 1)).refusals]
    assert (await records.after(Wanted(), cursors))[1] == []
