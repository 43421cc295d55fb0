"""The long work on fleets: import, making many devices at once, deleting a product with all of its devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from uplinkd.admin.jobs import Progress
from uplinkd.core import names
from uplinkd.core.errors import Rejected
from uplinkd.registry import ImportRow, Registry
from uplinkd.registry.fleet import read_fleet

__all__ = ["MOST_AT_ONCE", "deletion", "fleet_import", "making"]

MOST_AT_ONCE = 100_000
_BAD_ROWS_KEPT = 100
_BATCH = 500

Act = Callable[[Progress], dict[str, Any]]


def fleet_import(registry: Registry, stream: BinaryIO, size: int, *, skip_bad: bool) -> Act:
    """Import the CSV in `stream`, which is closed then; progress in bytes, of which it has `size`. Raise Rejected at once for a
    file that is no fleet."""
    try:
        next(read_fleet(stream), None)
        stream.seek(0)
    except Rejected:
        stream.close()
        raise

    def act(progress: Progress) -> dict[str, Any]:
        with stream:
            rows = read_fleet(stream)
            report = registry.import_devices(
                rows, skip_bad=skip_bad, progress=lambda _: progress(min(stream.tell(), size), size)
            )
        return report.document(_BAD_ROWS_KEPT)

    return act


def making(registry: Registry, product_key: str, prefix: str, count: int, start: int) -> Act:
    """Make `count` devices called `prefix` and a number from `start` on, as wide as the last. Raise Rejected at once when the
    names would break a rule."""
    registry.product(product_key)
    if not 1 <= count <= MOST_AT_ONCE:
        raise Rejected(f"count is {count}; 1 to {MOST_AT_ONCE} devices are made at once")
    if start < 0:
        raise Rejected(f"start is {start}; numbers begin at 0 or above")
    width = len(str(start + count - 1))
    names.check_device_name(f"{prefix}{start:0{width}}")

    def rows(progress: Progress) -> Iterator[ImportRow]:
        for number in range(count):
            if number % _BATCH == 0:
                progress(number, count)
            yield ImportRow(number + 1, product_key, f"{prefix}{start + number:0{width}}", "")

    def act(progress: Progress) -> dict[str, Any]:
        report = registry.import_devices(rows(progress), progress=lambda read: progress(read, count))
        return {"prefix": prefix, **report.document(_BAD_ROWS_KEPT)}

    return act


def deletion(registry: Registry, product_key: str) -> Act:
    """Delete the devices in batches, then the product. Cancelled, it leaves the product and the devices not yet deleted."""
    registry.product(product_key)

    def act(progress: Progress) -> dict[str, Any]:
        deleted = 0
        while count := registry.delete_devices(product_key, _BATCH):
            deleted += count
            progress(deleted)
        deleted += registry.delete_product(product_key, with_devices=True)
        return {"deleted": deleted}

    return act
