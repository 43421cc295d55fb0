"""Replaces keys: the one that the registry's secrets are sealed with, and the one that signs tokens.

The key of the data folder is replaced while a server runs: the new one is put beside the old one, everything is sealed anew, then
the new file takes the place of the old one. Whatever ends that half way, both files are there, and the same command goes on.
A key that is given by a setting is known to a running server only by its setting; so then no server may run.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import SecretStr

from uplinkd import __version__
from uplinkd.core.errors import Rejected
from uplinkd.files import kept_still, publish, sync_folder
from uplinkd.registry.database import is_shared
from uplinkd.registry.keys import SigningKeyFacts
from uplinkd.registry.sql import SqlRegistry
from uplinkd.registry.vault import file_keys, fingerprint, key_file, key_in, new_key_file, written_key
from uplinkd.serving import last_server, running_server, serving
from uplinkd.settings import Settings

__all__ = ["in_folder", "opened", "rotate", "rotate_signing", "rotate_to"]

Progress = Callable[[int], None]


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[SqlRegistry]:
    registry = SqlRegistry.open(settings)
    try:
        yield registry
    finally:
        registry.close()


def rotate(settings: Settings, progress: Progress) -> tuple[str, int]:
    """Replace the key in the data folder by a new one; its fingerprint, and how many values were sealed anew."""
    if settings.secret_key.get_secret_value():
        raise Rejected(
            "the key is given by the setting secret_key: stop the server, name a file with the new key by --to FILE, then give that "
            "key to the setting; `openssl rand -base64 32` makes one"
        )
    if is_shared(settings):
        raise Rejected(
            "the registry is in PostgreSQL, and gateways on other machines would not have a key that is made here: stop them all, name "
            "a file with the new key by --to FILE, then give them that key; `openssl rand -base64 32` makes one"
        )
    with opened(settings) as registry, kept_still(settings.data):
        _check_server(settings.data)
        fresh, place = new_key_file(settings), key_file(settings)
        publish(
            fresh, written_key(secrets.token_bytes(32))
        )  # one that is there is of a rotation that was ended: go on with it
        key = key_in(fresh)
        count = registry.keys.begin(key)
        count += registry.keys.seal_anew(progress)
        fresh.replace(place)
        sync_folder(place.parent)
        return fingerprint(key).hex(), count


def rotate_to(settings: Settings, file: Path, progress: Progress) -> tuple[str, int]:
    """Replace the key by that in `file`, in one transaction, and remove the old one from the data folder."""
    try:
        key = key_in(file)
    except FileNotFoundError:
        raise Rejected(f"{file} is not there: `openssl rand -base64 32 > {file}` makes a key") from None
    if server := running_server(settings.data):
        raise Rejected(
            f"a server (pid {server.pid}) serves from {settings.data} and would not have the key in {file}: stop it first"
            if server.pid
            else f"a server serves from {settings.data} and would not have the key in {file}: stop it first"
        )
    ttl = last_server(settings.data).token_ttl
    with (
        serving(settings.data, token_ttl=ttl, now=round(time.time() * 1000)),
        _opened_by_either(settings, key) as registry,
        kept_still(settings.data),
    ):
        count = registry.keys.replace(key, progress)
        for path in (key_file(settings), new_key_file(settings)):
            if path.exists() and key_in(path) != key:
                path.unlink()
                sync_folder(path.parent)
        return fingerprint(key).hex(), count


@contextlib.contextmanager
def _opened_by_either(settings: Settings, key: bytes) -> Iterator[SqlRegistry]:
    """The registry, also where `key` has taken the place of that of the settings, and the command was ended a moment later."""
    try:
        registry = SqlRegistry.open(settings)
    except Rejected as fault:
        given = settings.model_copy(update={"secret_key": SecretStr(written_key(key).decode().strip())})
        try:
            registry = SqlRegistry.open(given)
        except Rejected:
            raise fault from None
    try:
        yield registry
    finally:
        registry.close()


def rotate_signing(settings: Settings, *, at_once: bool) -> SigningKeyFacts:
    """A new signing key; see `SqlKeys.rotate_signing`."""
    with opened(settings) as registry:
        _check_server(settings.data)
        server = last_server(settings.data)
        return registry.keys.rotate_signing(
            now=round(time.time() * 1000),
            token_ttl=server.token_ttl or round(settings.token_ttl * 1000),
            tokens_until=server.tokens_until,
            at_once=at_once,
        )


def in_folder(settings: Settings) -> set[str]:
    """The fingerprints of the keys in the data folder."""
    return {fingerprint(key).hex() for key in file_keys(settings)}


def _check_server(data: Path) -> None:
    """A server of another version may not know what a rotation asks of it."""
    server = running_server(data)
    if server and server.version != __version__:
        version = f"uplinkd {server.version}" if server.version else "an older uplinkd"
        raise Rejected(
            f"{version} serves from {data}, this is {__version__}: stop it, or start this version in its place"
        )
