"""Files that their owner replaces while uplinkd runs."""

from __future__ import annotations

from pathlib import Path

__all__ = ["FileState", "file_state"]

FileState = tuple[int, int, int]
"""What changes when a file is replaced: time, size and inode; zeros of one that is not there."""


def file_state(path: Path) -> FileState:
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino
