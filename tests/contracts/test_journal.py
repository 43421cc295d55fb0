"""The journal of refusals: what is kept and found, and that it harms nobody when it cannot be written."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
import timeit
from pathlib import Path

import pytest

from uplinkd import journal
from uplinkd.core.errors import Unavailable
from uplinkd.journal import Journal, Refusal, Wanted, follow, read
from uplinkd.settings import Settings

NOW = round(time.time() * 1000) - 60_000  # what a test numbers lies in the past, too


def refusal(number: int = 0, **changes: object) -> Refusal:
    made = Refusal(
        request_id=f"request{number}",
        at=NOW + number,
        endpoint="auth",
        code=20000,
        status=200,
        product_key="a1GFjLP3xxC",
        device_name=f"device{number % 10}",
        address="192.0.2.7",
        topic="",
        reason="wrong sign",
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]  # the caller names fields


async def write(settings: Settings, *refusals: Refusal) -> None:
    pen = Journal(settings)
    for each in refusals:
        pen.record(each)
    await pen.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path)


async def test_what_is_recorded_is_found_by_all_that_is_asked_for(settings: Settings) -> None:
    """By requestId, device, product, code and time; the newest, oldest of them first."""
    entries = [refusal(number) for number in range(30)]
    entries.append(refusal(30, product_key="other", code=30001, endpoint="topic", topic="/a/b/c"))
    await write(settings, *entries)
    assert read(settings, Wanted(), 100) == entries
    assert read(settings, Wanted(), 3) == entries[-3:]
    assert read(settings, Wanted(request_id="request7"), 50) == [entries[7]]
    assert read(settings, Wanted(device="device7"), 50) == entries[7:30:10]
    assert read(settings, Wanted(product="other", code=30001), 50) == [entries[30]]
    assert read(settings, Wanted(since=NOW + 25), 50) == entries[25:]
    assert read(settings, Wanted(code=40000), 50) == []


async def test_of_a_devices_suite_the_latest_note_is_kept_apart_from_refusals(settings: Settings) -> None:
    """A fleet of old devices neither pushes refusals out nor stands between them; each is there once, however often it signs in."""
    short = settings.model_copy(update={"log_entries": 100})
    entries = [refusal(number) for number in range(100)]
    notes = [
        refusal(number, endpoint="tls", code=0, device_name=f"old{number % 300}", reason=f"note {number}")
        for number in range(1000)
    ]
    await write(short, *notes[:500], *entries, *notes[500:])
    assert read(settings, Wanted(), 2000) == entries
    kept = read(settings, Wanted(endpoint="tls"), 2000)
    assert kept == notes[700:]
    assert read(settings, Wanted(endpoint="tls", device="old7"), 50) == [notes[907]]
    _, told, _ = journal.after(settings, Wanted(), 0)
    assert told == entries


async def test_notes_of_suites_are_kept_for_as_long_as_a_token_lasts(settings: Settings) -> None:
    """Until then a device that still needs one need not sign in, and so would not be told of again."""
    day = 86_400_000
    fresh, lately, long_ago = (
        refusal(at=NOW - days * day, endpoint="tls", code=0, device_name=f"{days} days") for days in (0, 7, 9)
    )
    await write(settings, long_ago, lately, fresh)
    assert read(settings, Wanted(endpoint="tls"), 9) == [lately, fresh]


async def test_what_stands_for_many_counts_as_many(settings: Settings) -> None:
    """In the counts of the last hour, and in what flow control has done lately: to a device, to a product, to an address."""
    held = dataclasses.replace(refusal(code=40000, device_name="lamp"), reason="too fast")
    product = dataclasses.replace(held, device_name="", reason="product too fast")
    address = dataclasses.replace(held, product_key="", device_name="", reason="address too fast")
    await write(
        settings,
        held,
        dataclasses.replace(held, times=999),
        dataclasses.replace(product, times=50),
        dataclasses.replace(address, times=70, address="198.51.100.1"),
        dataclasses.replace(address, times=20),
        dataclasses.replace(held, device_name="other", at=NOW - 7_200_000, times=5000),
        refusal(),
    )
    assert journal.counts(settings, NOW - 3_600_000) == {40000: 1140, 20000: 1}
    pk = held.product_key
    assert journal.held_back(settings, NOW - 3_600_000) == [
        journal.HeldBack(pk, "lamp", "", "too fast", 1000),
        journal.HeldBack("", "", "198.51.100.1", "address too fast", 70),
        journal.HeldBack(pk, "", "", "product too fast", 50),
        journal.HeldBack("", "", "192.0.2.7", "address too fast", 20),
    ]
    of_lamp = journal.held_back(settings, NOW - 3_600_000, product=pk, device="lamp")
    assert [each.times for each in of_lamp] == [1000, 50]
    assert [each.times for each in journal.held_back(settings, 0, product=pk, device="d")] == [50]


async def test_the_file_of_an_earlier_version_goes_on(settings: Settings) -> None:
    """What it holds stands for one each."""
    await write(settings, refusal(1))
    with sqlite3.connect(journal.journal_file(settings)) as connection:
        connection.execute("ALTER TABLE refusals DROP COLUMN times")
    connection.close()
    assert [each.times for each in read(settings, Wanted(), 10)] == [1]
    await write(settings, refusal(2, times=7))
    assert [each.times for each in read(settings, Wanted(), 10)] == [1, 7]


async def test_a_running_journal_is_written_within_a_second(settings: Settings) -> None:
    """The reader needs no server, and the writer no stop."""
    pen = Journal(settings)
    duty = asyncio.create_task(pen.run())
    pen.record(refusal())
    await asyncio.sleep(0.8)
    assert read(settings, Wanted(), 50) == [refusal()]
    duty.cancel()
    await pen.close()


def test_before_there_is_a_journal_nothing_was_refused(settings: Settings) -> None:
    """Reading makes no file, and an empty file is no error."""
    assert read(settings, Wanted(), 50) == []
    assert not journal.journal_file(settings).exists()
    journal.journal_file(settings).touch()
    assert read(settings, Wanted(), 50) == []


def test_a_file_that_is_no_journal_is_named(settings: Settings) -> None:
    """In words, not as a traceback."""
    journal.journal_file(settings).write_bytes(b"no database" * 100)
    with pytest.raises(Unavailable, match=r"journal\.sqlite cannot be read"):
        read(settings, Wanted(), 50)
    journal.journal_file(settings).unlink()
    journal.journal_file(settings).mkdir()
    with pytest.raises(Unavailable, match=r"journal\.sqlite cannot be read"):
        read(settings, Wanted(), 50)


async def test_only_its_owner_can_read_it(settings: Settings) -> None:
    """The side files too: reasons quote what devices sent."""
    pen = Journal(settings)
    pen.record(refusal())
    await pen.flush()
    files = list(settings.data.glob("journal.sqlite*"))
    assert len(files) == 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    await pen.close()


@pytest.mark.parametrize("field", ["product_key", "device_name", "topic", "reason", "address", "request_id"])
async def test_whatever_a_device_sends_can_be_kept(settings: Settings, field: str) -> None:
    """Half a surrogate pair, which JSON can carry and SQLite cannot; NUL; and it can be looked for."""
    odd = "a\0b\ud800c\U0001f600"
    await write(settings, refusal(1), refusal(2, **{field: odd}))
    assert getattr(read(settings, Wanted(), 50)[1], field) == "a\0b\\ud800c\U0001f600"
    assert read(settings, Wanted(device=odd), 50) == (read(settings, Wanted(), 1) if field == "device_name" else [])


@pytest.mark.parametrize("letter", ["x", "\u4e2d"])
async def test_a_reason_is_bounded(settings: Settings, letter: str) -> None:
    """To 8 KiB, whatever the alphabet."""
    await write(settings, refusal(reason=letter * 20_000))
    (kept,) = read(settings, Wanted(), 50)
    assert 8190 <= len(kept.reason.encode()) <= 8192
    assert set(kept.reason) == {letter}


async def test_a_flood_is_counted_not_kept(settings: Settings) -> None:
    """5,000 wait at most; one entry says how many more there were."""
    await write(settings, *(refusal(number) for number in range(6_234)))
    found = read(settings, Wanted(), 10_000)
    assert len(found) == 5_001
    assert found[-1].reason.startswith("1,234 further refusals were not kept: the journal takes 25,000 a second")
    assert (found[-1].endpoint, found[-1].code) == ("journal", 0)


async def test_what_cannot_be_written_waits(
    settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone holds the file: recording goes on, one warning is given, all is there afterwards, once and in order."""
    monkeypatch.setattr(journal, "_WRITER_PATIENCE", 0.02)
    await write(settings, refusal(0))
    holder = sqlite3.connect(journal.journal_file(settings), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    pen = Journal(settings)
    for number in range(1, 4):
        pen.record(refusal(number))
        await pen.flush()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    holder.execute("COMMIT")
    holder.close()
    await pen.close()
    assert read(settings, Wanted(), 50) == [refusal(number) for number in range(4)]


async def test_a_full_disk_loses_the_count_of_nothing(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """What fits in memory waits, the rest is counted, and the entry says why it was lost."""
    await write(settings, refusal(0))
    pen = Journal(settings)
    pen.record(refusal(1))
    await pen.flush()
    assert pen._connection
    pages = pen._connection.execute("PRAGMA page_count").fetchone()[0]
    pen._connection.execute(f"PRAGMA max_page_count = {pages}")
    for number in range(2, 5_100):
        pen.record(refusal(number, reason="y" * 500))
    await pen.flush()
    assert "full" in caplog.text
    await pen.flush()
    await pen.close()
    found = read(settings, Wanted(), 10_000)
    assert len(found) == 2 + 5_000 + 1
    assert (
        found[-1].reason
        == "98 further refusals were not kept: the journal could not be written (database or disk is full)"
    )


async def test_a_flush_that_nobody_awaits_loses_and_repeats_nothing(settings: Settings) -> None:
    """The task is cancelled in the middle of writing, as at each stop."""
    pen = Journal(settings)
    for number in range(5_000):
        pen.record(refusal(number))
    flush = asyncio.create_task(pen.flush())
    await asyncio.sleep(0.001)
    flush.cancel()
    await pen.close()
    assert read(settings, Wanted(), 10_000) == [refusal(number) for number in range(5_000)]


async def test_close_gives_up_in_time(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """A stop is not held up by a file that someone else holds; the log says how many refusals were lost."""
    await write(settings, refusal(0))
    holder = sqlite3.connect(journal.journal_file(settings), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    await write(settings, refusal(1), refusal(2))
    assert time.monotonic() - started < 3
    holder.close()
    assert "2 refusals could not be recorded" in caplog.text


async def test_old_and_many_refusals_go_first(tmp_path: Path) -> None:
    """Neither older than log_age nor more than log_entries stay, a tenth over at most in between."""
    settings = Settings(data=tmp_path, log_age=3600, log_entries=100)
    await write(settings, refusal(0, at=NOW - 3_700_000), *(refusal(number) for number in range(1, 51)))
    assert len(read(settings, Wanted(), 1000)) == 50
    pen = Journal(settings)
    for number in range(51, 301):
        pen.record(refusal(number))
        if number % 10 == 0:
            await pen.flush()
            assert len(read(settings, Wanted(), 1000)) <= 120
    await pen.close()
    assert read(settings, Wanted(), 1)[0] == refusal(300)


def _write_and_die(settings: Settings, first: int) -> None:
    async def run() -> None:
        pen = Journal(settings)
        for number in range(first, first + 500):
            pen.record(refusal(number))
            if number % 50 == 49:
                await pen.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(run())


def test_workers_write_together_and_their_death_loses_nothing(settings: Settings) -> None:
    """Three processes, each killed by kill -9 after its last flush; no reader disturbs them."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_and_die, args=(settings, 1000 * number)) for number in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        read(settings, Wanted(device="device1"), 50)
        time.sleep(0.02)
    for worker in workers:
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        worker.close()
    found = {each.request_id for each in read(settings, Wanted(), 10_000)}
    assert found == {f"request{1000 * worker + number}" for worker in range(3) for number in range(500)}


def test_following_begins_before_there_is_a_journal(settings: Settings) -> None:
    """And gives each new refusal that matches, once, in order."""
    found: list[Refusal] = []

    def reader() -> None:
        found.extend(itertools.islice(follow(settings, Wanted(device="device3")), 3))

    thread = threading.Thread(target=reader, daemon=True)
    thread.start()
    time.sleep(0.4)
    for start in (0, 20):
        asyncio.run(write(settings, *(refusal(number) for number in range(start, start + 20))))
    thread.join(5)
    assert found == [refusal(3), refusal(13), refusal(23)]


async def test_following_can_begin_in_the_past(settings: Settings) -> None:
    """With `since` what was refused since then comes first, whatever its number."""
    await write(settings, *(refusal(number) for number in range(50)))
    assert list(itertools.islice(follow(settings, Wanted(since=NOW + 40)), 10)) == [
        refusal(number) for number in range(40, 50)
    ]


async def test_refusals_are_paged_backwards_and_bounded_in_time(settings: Settings) -> None:
    """Each once, by the id of the last one of the page before; `until` and `address` hold."""
    await write(settings, *(refusal(number, address=f"192.0.2.{number % 2}") for number in range(25)))
    seen: list[str] = []
    before = None
    while page := read(settings, Wanted(address="192.0.2.1", before=before), 5):
        seen += [each.request_id for each in reversed(page)]
        before = page[0].id
    assert seen == [f"request{number}" for number in range(23, 0, -2)]
    assert [each.request_id for each in read(settings, Wanted(since=NOW + 3, until=NOW + 5), 9)] == [
        "request3",
        "request4",
        "request5",
    ]


async def test_refusals_are_counted_by_code(settings: Settings) -> None:
    """Since a time, without notes."""
    await write(settings, refusal(1), refusal(2, code=30001), refusal(3), refusal(4, code=0))
    assert journal.counts(settings, 0) == {20000: 2, 30001: 1}
    assert journal.counts(settings, NOW + 3) == {20000: 1}


async def test_one_look_gives_what_came_since_the_one_before(settings: Settings) -> None:
    """From the end at first; what does not match is passed over for good."""
    assert journal.after(settings, Wanted(), None) == (0, [], False)
    await write(settings, refusal(1))
    cursor, found, more = journal.after(settings, Wanted(code=30001), None)
    assert (found, more) == ([], False)
    await write(settings, refusal(2), refusal(3, code=30001))
    cursor, found, more = journal.after(settings, Wanted(code=30001), cursor)
    assert [each.request_id for each in found] == ["request3"]
    assert journal.after(settings, Wanted(code=30001), cursor) == (cursor, [], False)


@pytest.mark.slow
async def test_a_full_journal_is_searched_in_an_instant(settings: Settings) -> None:
    """100,000 entries: by requestId, device, time and the others in less than a tenth of what reading them all takes."""
    pen = Journal(settings)
    for number in range(100_000):
        pen.record(refusal(number, device_name=f"device{number % 1000}"))
        if number % 5000 == 4999:
            await pen.flush()
    await pen.close()

    def quickest(wanted: Wanted, limit: int) -> float:
        return min(timeit.repeat(lambda: read(settings, wanted, limit), number=1, repeat=3))

    all_of_it = quickest(Wanted(), 100_000)
    for wanted, count in (
        (Wanted(request_id="request77777"), 1),
        (Wanted(device="device77"), 50),
        (Wanted(since=NOW + 99_990), 10),
        (Wanted(device="nobody"), 0),
        (Wanted(code=40000), 0),
        (Wanted(address="192.0.2.8"), 0),
        (Wanted(before=50), 49),
        (Wanted(since=NOW + 50_000, until=NOW + 50_009), 10),
    ):
        assert len(read(settings, wanted, 50)) == count
        assert quickest(wanted, 50) < all_of_it / 10, wanted
