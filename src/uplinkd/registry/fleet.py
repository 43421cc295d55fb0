"""Fleets as CSV: the columns ProductKey, DeviceName and DeviceSecret, as the cloud's console exports them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from uplinkd.core.errors import Rejected
from uplinkd.core.model import Device
from uplinkd.registry import ImportRow

__all__ = ["COLUMNS", "read_fleet", "size_of", "written_fleet"]

COLUMNS = ("ProductKey", "DeviceName", "DeviceSecret")
_PART = 500
_LONGEST_LINE = 64 * 1024


def read_fleet(stream: BinaryIO) -> Iterator[ImportRow]:
    """The rows of a fleet file, UTF-8 with or without a BOM. Columns stand in any order, others are ignored.

    A broken row carries its fault. Raise Rejected for a file that cannot be read as a whole.
    """
    reader = csv.reader(_lines(stream), strict=True)
    try:
        heading = next(reader, None)
    except csv.Error as error:
        raise Rejected(f"line 1 is not CSV: {error}") from error
    if heading is None:
        raise Rejected(f"the file is empty; its first line names the columns {', '.join(COLUMNS)}")
    places = {name.strip().replace(" ", "").lower(): place for place, name in enumerate(heading)}
    missing = [name for name in COLUMNS if name.lower() not in places]
    if missing:
        shown = ", ".join(heading)[:200]
        raise Rejected(
            f"the column {missing[0]} is missing; the first line must name {', '.join(COLUMNS)}, it is {shown!r}"
        )
    key, name, secret = (places[column.lower()] for column in COLUMNS)
    needed = max(key, name, secret) + 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield ImportRow(reader.line_num, "", "", "", f"not CSV: {error}")
            continue
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) < needed:
            fault = f"the row has {len(cells)} cells; the first line names {len(heading)}"
            yield ImportRow(reader.line_num, "", "", "", fault)
            continue
        yield ImportRow(reader.line_num, cells[key].strip(), cells[name].strip(), cells[secret].strip())


def written_fleet(devices: Iterable[Device]) -> Iterator[str]:
    """Devices with their secrets as CSV, in parts of 500 rows, so that a large fleet costs neither memory nor many small writes."""
    part = io.StringIO(newline="")
    writer = csv.writer(part)
    writer.writerow(COLUMNS)
    for number, device in enumerate(devices, 1):
        writer.writerow((device.product_key, device.name, device.secret))
        if number % _PART == 0:
            yield part.getvalue()
            part.seek(0)
            part.truncate()
    yield part.getvalue()


def size_of(stream: BinaryIO) -> int | None:
    """How many bytes a file has; None for a pipe, or what is no file."""
    try:
        return (os.fstat(stream.fileno()).st_size or None) if stream.seekable() else None
    except OSError:
        return None


def _lines(stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE + 1), b""), 1):
        if len(line) > _LONGEST_LINE:
            raise Rejected(f"line {number} is longer than {_LONGEST_LINE} bytes; this is not a fleet as CSV")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise Rejected(
                f"line {number} is not UTF-8 (byte {error.start + 1}); save the file as CSV UTF-8, or convert it: iconv -f GBK -t UTF-8"
            ) from error
        if "\0" in text:
            raise Rejected(f"line {number} holds a NUL byte; this is not a CSV file")
        yield text
