"""Files that their owner replaces while uplinkd runs, and files that are nobody else's business."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from uplinkd.core.errors import Rejected

__all__ = [
    "FileState",
    "check_whole",
    "file_state",
    "keep_private",
    "kept_still",
    "publish",
    "sync_folder",
    "unfinished_file",
    "written_whole",
]

# What of a data folder holds secrets, in the clear or sealed.
_SECRET = (
    "keys/*",
    "registry.sqlite*",
    "journal.sqlite*",
    "tls/*key*",
    "nats/account.nk",
    "nats/access.json",
    "nats/nats.conf",
)

FileState = tuple[int, int, int]
"""What changes when a file is replaced: time, size and inode; zeros of one that is not there."""


def file_state(path: Path) -> FileState:
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino


def keep_private(data: Path) -> list[str]:
    """See that nobody but its owner reads a data folder and the secrets in it. What others could read is mended, and said in the
    list that is given; raise Rejected where a secret cannot be mended."""
    told = []
    for path, mode in _private(data):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        if not found.st_mode & 0o077:
            continue
        what = f"{path} could be read by other users (mode {stat.S_IMODE(found.st_mode):04o})"
        try:
            path.chmod(mode)
        except OSError as error:
            fault = f"{what} and this user may not change that ({error.strerror}): chmod {mode:o} it"
            if mode == 0o600:
                raise Rejected(fault) from error
            told.append(fault)  # a mounted volume may be another's; what lies in it is looked at all the same
        else:
            told.append(f"{what}; it is now {mode:04o}")
    return told


def _private(data: Path) -> Iterator[tuple[Path, int]]:
    yield data, 0o700
    for pattern in _SECRET:
        for path in sorted(data.glob(pattern)):
            if path.is_file():
                yield path, 0o600
    for folder in ("keys", "nats"):
        yield data / folder, 0o700


@contextlib.contextmanager
def kept_still(data: Path) -> Iterator[None]:
    """Nobody else backs up the data folder or replaces its key meanwhile; raise Rejected while somebody does."""
    descriptor = os.open(data / "keep.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Rejected(f"a backup of {data}, or a rotation of its key, is under way: wait for its end") from None
        yield
    finally:
        os.close(descriptor)


def unfinished_file(data: Path) -> Path:
    """It is there while a backup is brought into a data folder."""
    return data / "restore.unfinished"


def check_whole(data: Path) -> None:
    """Raise Rejected for a data folder into which a backup was brought only in part."""
    if unfinished_file(data).exists():
        raise Rejected(
            f"a backup is being restored into {data}, or was so in part: when nothing is at work, empty the folder and restore again"
        )


def publish(path: Path, content: bytes) -> bool:
    """Make `path` with all of `content` or not at all, for its owner alone; False where it is there already and is left so."""
    draft = _draft(path)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
            sync_folder(path.parent)
            return True
        return False
    finally:
        draft.unlink()


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """A file for its owner alone, which takes the place of `path` when all is written; a device or a pipe is written as it is. Raise
    Rejected where it cannot be written."""
    try:
        whole = path.is_file() or not path.exists()
        place = path.resolve() if whole else path
        draft = _draft(place) if whole else path
        descriptor = os.open(draft, os.O_WRONLY | (os.O_CREAT | os.O_EXCL if whole else 0), 0o600)
        try:
            with os.fdopen(descriptor, "w", newline="", encoding="utf-8") as stream:
                yield stream
            if whole:
                draft.replace(place)
        finally:
            if whole:
                draft.unlink(missing_ok=True)
    except OSError as error:
        raise Rejected(f"{path} cannot be written: {error.strerror}") from error


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def sync_folder(folder: Path) -> None:
    """Have what was made, renamed or removed in `folder` outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
