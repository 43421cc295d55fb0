"""The keys of a registry: the one that its secrets are sealed with, and those that sign tokens; how each gives way to another.

A new sealing key is in use from one transaction on, which seals the signing keys anew: whoever writes looks there first
(`in_use`), and a registry has one writer at a time, so nothing is sealed under the old key afterwards. What was before is sealed anew
in parts, each a transaction of its own, and both keys are kept until nothing is left under the old one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ColumnElement, Select, Update, func, insert, select, update
from sqlalchemy.engine import Connection

from uplinkd.core.errors import Rejected
from uplinkd.core.model import ProductKey, SigningKey
from uplinkd.registry import Change, audit
from uplinkd.registry.database import Database
from uplinkd.registry.schema import answers, apps, changes, devices, groups, products, signing_keys
from uplinkd.registry.vault import PREFIX_BYTES, Vault, fingerprint, prefix_of

__all__ = [
    "IN_USE",
    "SIGNING_KEYS",
    "SealedUnder",
    "SigningKeyFacts",
    "SqlKeys",
    "app_owner",
    "device_owner",
    "in_use",
    "product_owner",
    "signing_key_owner",
]

SIGNING_KEYS = Change(ProductKey(""), 0)
"""What tells gateways that there is a new signing key; no device has the id 0."""

# A gateway learns of a new signing key within a second. It signs after that, so that none meets a token before its key.
_LEARNING = 2000
_LARGEST_KEY_ID = 2**16 - 1  # a token has two bytes for it
_PART = 2000
_KEY_BYTES = 32

Transactions = Callable[[], AbstractContextManager[Connection]]


def product_owner(key: str) -> str:
    return f"product/{key}"


def device_owner(product_key: str, name: str) -> str:
    return f"device/{product_key}/{name}"


def app_owner(key: str) -> str:
    return f"app/{key}"


def signing_key_owner(key_id: int) -> str:
    return f"signing-key/{key_id}"


@dataclass(frozen=True, slots=True)
class _Sealed:
    """Where sealed values are: in `column`, in the order of `place`; `whose` selects what `owner` is made of."""

    what: str
    column: Column[Any]
    place: Column[Any]
    whose: Select[Any]
    owner: Callable[..., str]


_SEALED = (
    _Sealed("signing keys", signing_keys.c.key, signing_keys.c.id, select(signing_keys.c.id), signing_key_owner),
    _Sealed("products", products.c.secret, products.c.id, select(products.c.key), product_owner),
    _Sealed(
        "devices",
        devices.c.secret,
        devices.c.id,
        select(products.c.key, devices.c.name).join_from(devices, products),
        device_owner,
    ),
    _Sealed("applications", apps.c.secret, apps.c.id, select(apps.c.key), app_owner),
    _Sealed("consumer groups", groups.c.secret, groups.c.id, select(groups.c.name), lambda name: f"group/{name}"),
    _Sealed(
        "answers",
        answers.c.answer,
        answers.c.key_hash,
        select(answers.c.key_hash),
        lambda hashed: f"answer/{hashed.hex()}",
    ),
)
IN_USE = select(func.substr(signing_keys.c.key, 1, PREFIX_BYTES)).order_by(signing_keys.c.id).limit(1)


def in_use(connection: Connection) -> bytes | None:
    """The prefix of what is sealed now."""
    prefix: bytes | None = connection.execute(IN_USE).scalar()
    return prefix


@dataclass(frozen=True, slots=True)
class SealedUnder:
    """How many values are sealed under the key with this `fingerprint`, and whether new ones are."""

    fingerprint: str
    values: int
    current: bool


@dataclass(frozen=True, slots=True)
class SigningKeyFacts:
    """A signing key without the key; times are ms."""

    id: int
    created: int
    begins: int
    retired: int | None

    def state(self, now: int, newest: int) -> str:
        if self.retired is not None:
            return "verifies" if now < self.retired else "retired"
        return "signs" if self.begins <= now or self.id != newest else "signs soon"


class SqlKeys:
    """The keys of a SqlRegistry, over its transactions."""

    def __init__(self, database: Database, reading: Transactions, writing: Transactions, vault: Vault) -> None:
        self._database = database
        self._reading = reading
        self._writing = writing
        self._vault = vault

    # what secrets are sealed with

    def in_use(self) -> str:
        """The fingerprint of the key that is sealed under now."""
        with self._reading() as connection:
            return (in_use(connection) or b"")[1:].hex()

    def sealed(self) -> list[SealedUnder]:
        """The keys that something is sealed under, that for new values first."""
        counts: dict[bytes, int] = {}
        with self._reading() as connection:
            current = in_use(connection)
            for each in _SEALED:
                prefix = func.substr(each.column, 1, PREFIX_BYTES).label("prefix")
                counted = select(prefix, func.count()).where(each.column.is_not(None)).group_by("prefix")
                for value, count in connection.execute(counted):
                    counts[value] = counts.get(value, 0) + count
        found = [SealedUnder(prefix[1:].hex(), count, prefix == current) for prefix, count in counts.items()]
        return sorted(found, key=lambda each: (not each.current, each.fingerprint))

    def begin(self, key: bytes) -> int:
        """Seal under `key` from now on, which everybody can find by now; done already, it is done again for nothing. How many values
        are under it with that."""
        with self._writing() as connection:
            return self._use(connection, key)

    def seal_anew(self, progress: Callable[[int], None]) -> int:
        """After `begin`: bring under the new key what is under another, in parts between which others write. How many values."""
        count = 0
        for each in _SEALED:
            after: Any = None
            while True:
                begun = time.monotonic()
                with self._writing() as connection:
                    after, changed = self._part(connection, each, after)
                count += changed
                progress(count)
                if after is None:
                    break
                if changed:
                    time.sleep(time.monotonic() - begun)
        return count

    def replace(self, key: bytes, progress: Callable[[int], None]) -> int:
        """`begin` and `seal_anew` in one transaction: all of it or nothing. How many values."""
        with self._writing() as connection:
            self._database.take_time(connection)
            count = self._use(connection, key)
            for each in _SEALED:
                after, changed = self._part(connection, each, None)
                count += changed
                while after is not None:
                    progress(count)
                    after, changed = self._part(connection, each, after)
                    count += changed
        return count

    def _use(self, connection: Connection, key: bytes) -> int:
        before = in_use(connection)
        self._vault.learn(key)
        self._vault.seal_under(prefix_of(key))
        if before == prefix_of(key):
            return 0
        audit.note(connection, "keys.rotate", fingerprint(key).hex(), f"instead of {(before or b'')[1:].hex()}")
        return sum(changed for _, changed in self._parts(connection, _SEALED[0]))

    def _parts(self, connection: Connection, what: _Sealed) -> Iterator[tuple[Any, int]]:
        after: Any = None
        while True:
            after, changed = self._part(connection, what, after)
            yield after, changed
            if after is None:
                return

    def _part(self, connection: Connection, what: _Sealed, after: Any) -> tuple[Any, int]:
        """Look at some values behind `after`; where the next ones begin (None: there are none), and how many were sealed anew."""
        page = what.whose.add_columns(what.place.label("place"), what.column.label("sealed"))
        page = page.order_by(what.place).limit(_PART)
        if after is not None:
            page = page.where(what.place > after)
        rows = connection.execute(page).all()
        fresh = [
            {"at": place, "fresh": self._vault.resealed(sealed, owner=what.owner(*whose))}
            for *whose, place, sealed in rows
            if sealed is not None and not self._vault.is_current(sealed)
        ]
        if fresh:

            def changed(given: Callable[[str], ColumnElement[Any]]) -> Update:
                return update(what.column.table).where(what.place == given("at")).values({what.column: given("fresh")})

            self._database.update_each(connection, changed, fresh)
        return (rows[-1].place if len(rows) == _PART else None), len(fresh)

    # what signs tokens

    def signing(self) -> list[SigningKeyFacts]:
        """Oldest first."""
        with self._reading() as connection:
            rows = connection.execute(select(signing_keys).order_by(signing_keys.c.id)).all()
        return [SigningKeyFacts(row.id, row.created, begins(row.id, row.created), row.retired) for row in rows]

    def rotate_signing(self, *, now: int, token_ttl: int, tokens_until: int, at_once: bool = False) -> SigningKeyFacts:
        """A new signing key. Those before it retire once no token of theirs can be valid any more: `token_ttl` ms after they have
        signed their last, and not before `tokens_until`; or `at_once`, and devices log in again."""
        with self._writing() as connection:
            newest: int = connection.execute(select(func.max(signing_keys.c.id))).scalar_one()
            if newest >= _LARGEST_KEY_ID:
                raise Rejected(f"there have been {newest} signing keys, and tokens have no room for more")
            key_id = newest + 1
            start = now if at_once else begins(key_id, now)
            retired = now if at_once else max(start + token_ttl, tokens_until)
            never = signing_keys.c.retired.is_(None)
            standing = never | (signing_keys.c.retired > now) if at_once else never
            connection.execute(update(signing_keys).where(standing).values(retired=retired))
            sealed = self._vault.seal(secrets.token_bytes(_KEY_BYTES), owner=signing_key_owner(key_id))
            connection.execute(insert(signing_keys).values(id=key_id, key=sealed, created=now))
            connection.execute(insert(changes).values(product_key="", device_id=SIGNING_KEYS.device_id))
            detail = "those before it retired at once" if at_once else f"those before it verify until {retired}"
            audit.note(connection, "keys.rotate-signing", str(key_id), detail)
        return SigningKeyFacts(key_id, now, start, None)

    def signing_keys(self) -> list[SigningKey]:
        with self._reading() as connection:
            rows = connection.execute(select(signing_keys).order_by(signing_keys.c.id)).all()
        return [
            SigningKey(
                row.id,
                self._vault.open(row.key, owner=signing_key_owner(row.id)),
                begins(row.id, row.created),
                row.retired,
            )
            for row in rows
        ]


def begins(key_id: int, created: int) -> int:
    """When (ms) a signing key that was made then signs: the first at once, another when every gateway knows it."""
    return created if key_id == 1 else created + _LEARNING
