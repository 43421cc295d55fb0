"""The registry in SQL: SQLAlchemy 2 Core, one short transaction for each act.

What differs from one database to another is behind `registry.database.Database`; every statement here is plain SQL.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any, BinaryIO, Self, TypeVar

from sqlalchemy import (
    ColumnElement,
    Select,
    Table,
    Update,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    true,
    update,
)
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from uplinkd.core import names
from uplinkd.core.apps import hash_secret
from uplinkd.core.errors import Conflict, NotFound, Rejected, Stale, Unavailable
from uplinkd.core.model import (
    App,
    Census,
    Device,
    DeviceName,
    LifecycleAction,
    LifecycleChange,
    Product,
    ProductKey,
    Right,
    SigningKey,
    State,
    StatusChange,
    TopicClass,
)
from uplinkd.files import check_whole
from uplinkd.registry import Change, ImportProgress, ImportReport, ImportRow, Sighting, audit
from uplinkd.registry.database import Database, Each, Value, open_database, outages_of
from uplinkd.registry.fleet import read_fleet, size_of, written_fleet
from uplinkd.registry.groups import SqlGroups, announce_groups
from uplinkd.registry.keys import IN_USE, SqlKeys, app_owner, device_owner, product_owner, signing_key_owner
from uplinkd.registry.operators import SqlOperators
from uplinkd.registry.schema import (
    REVISIONS,
    app_products,
    apps,
    changes,
    devices,
    folded,
    group_apps,
    group_products,
    lifecycle_changes,
    products,
    signing_keys,
    status_changes,
    topic_classes,
)
from uplinkd.registry.vault import Vault, file_keys, key_of, make_key
from uplinkd.serving import running_server
from uplinkd.settings import Settings

__all__ = ["KEPT_CHANGES", "SqlRegistry"]

KEPT_CHANGES = 100_000

_PAGE = 1000
_BATCH = 5000
# A worker that had to wait to write is behind the others by as much, ms.
_GRACE = 10_000

_FORGET_EVERYTHING = Change(ProductKey(""), None)
_DEFAULT_LEVELS = frozenset(levels for levels, _ in names.DEFAULT_CLASSES)

_PRODUCT = select(products.c.id, products.c.key, products.c.name, products.c.secret, products.c.created)
_DEVICE = select(
    devices.c.id,
    products.c.key,
    devices.c.name,
    devices.c.secret,
    devices.c.enabled,
    devices.c.generation,
    devices.c.created,
    devices.c.activated,
    devices.c.last_seen,
    devices.c.requested,
    devices.c.address,
    devices.c.session,
).join(products)
_DEVICE_BY_NAME = _DEVICE.where(products.c.key == bindparam("product_key"), devices.c.name == bindparam("device_name"))
_DEVICE_BY_ID = _DEVICE.where(devices.c.id == bindparam("device_id"))
_APP = (
    select(
        apps.c.id, apps.c.key, apps.c.name, apps.c.secret_hash, apps.c.sends, apps.c.created, products.c.key.label("pk")
    )
    .outerjoin_from(apps, app_products)
    .outerjoin(products)
    .order_by(apps.c.id, products.c.id)
)
_APP_BY_NAME = _APP.where(apps.c.name == bindparam("app_name"))
_APP_BY_KEY = _APP.where(apps.c.key == bindparam("app_key"))
_APP_BY_ID = _APP.where(apps.c.id == bindparam("app_id"))
_CLASSES = select(topic_classes.c.levels, topic_classes.c.right).order_by(topic_classes.c.id)
_STANDING = select(
    select(text("version_num")).select_from(text("alembic_version")).scalar_subquery(), IN_USE.scalar_subquery()
)
_CHANGES_KEPT = select(
    select(func.min(changes.c.seq)).scalar_subquery(), select(func.max(changes.c.seq)).scalar_subquery()
)


_Given = Callable[[str], ColumnElement[Any]]


def _latest(column: ColumnElement[Any], given: _Given) -> ColumnElement[Any]:
    """`at`, or the column's own time where that is later; one far beyond `now` is by a clock that was wrong, and gives way."""
    return case((column.between(given("at"), given("now") + _GRACE), column), else_=given("at"))


def _of(given: _Given) -> Update:
    return update(devices).where(devices.c.id == given("device_id"))


def _request(given: _Given) -> Update:
    return _of(given).values(
        last_seen=_latest(devices.c.last_seen, given),
        requested=_latest(devices.c.requested, given),
        address=given("from_address"),
    )


def _activated(given: _Given) -> Update:
    first = func.coalesce(devices.c.activated, given("at"))
    return _of(given).values(activated=first, last_seen=_latest(devices.c.last_seen, given))


def _session_begun(given: _Given) -> Update:
    newer = func.coalesce(devices.c.session_at, 0) < given("stamp")
    same = (devices.c.session_at == given("stamp")) & devices.c.session.is_not(None)
    return (
        _of(given)
        .where(newer | same)
        .values(
            last_seen=_latest(devices.c.last_seen, given),
            address=given("from_address"),
            session=given("session_of"),
            session_at=given("stamp"),
        )
    )


def _session_ended(given: _Given) -> Update:
    mine = devices.c.session_at == given("stamp")
    return _of(given).where(mine).values(last_seen=_latest(devices.c.last_seen, given), session=None)


_IS_ONLINE: ColumnElement[bool] = devices.c.online == true()  # as the partial index has it
_STATUS = select(
    status_changes.c.id,
    status_changes.c.product_key,
    status_changes.c.device_name,
    status_changes.c.online,
    status_changes.c.at,
    status_changes.c.last_seen,
    status_changes.c.address,
)
_older, _later = status_changes.alias("older"), status_changes.alias("later")
_IS_NEXT = ~exists().where(
    _older.c.product_key == status_changes.c.product_key,
    _older.c.device_name == status_changes.c.device_name,
    _older.c.id < status_changes.c.id,
)
_FOLLOWING = (
    select(func.min(_later.c.id))
    .join(
        status_changes,
        (_later.c.product_key == status_changes.c.product_key)
        & (_later.c.device_name == status_changes.c.device_name)
        & (_later.c.id > status_changes.c.id),
    )
    .group_by(_later.c.product_key, _later.c.device_name)
)

T = TypeVar("T")


class SqlRegistry:
    """`registry.Registry` in a database. Threads share it: each call takes a connection of the pool for itself."""

    def __init__(self, database: Database, vault: Vault) -> None:
        self.database = database
        self._vault = vault
        self.operators = SqlOperators(self._reading, self._writing, vault)
        self.groups = SqlGroups(self._reading, self._writing, vault)
        self.keys = SqlKeys(database, self._reading, self._writing, vault)

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """The registry of `settings`; made when absent, brought to the current schema, refused with the wrong key."""
        check_whole(settings.data)
        database = open_database(settings)
        try:
            with outages_of(database):
                sample = _sealed_sample(database)
                if sample is None:
                    with database.alone():
                        sample = _sealed_sample(database) or _prepare(database, settings)
            more = partial(file_keys, settings)
            return cls(database, Vault(key_of(settings, sample=sample, where=database.where), more))
        except BaseException:
            database.close()
            raise

    def close(self) -> None:
        self.database.close()

    def check(self) -> None:
        with self._reading() as connection:
            self.database.check(connection)

    # products

    def create_product(self, name: str, *, key: str | None = None, secret: str | None = None) -> Product:
        names.check_product_name(name)
        product_key = names.make_product_key() if key is None else names.check_product_key(key)
        product_secret = names.make_product_secret() if secret is None else names.check_product_secret(secret)
        with self._writing() as connection:
            if connection.execute(select(products.c.id).where(products.c.key == product_key)).first():
                raise Conflict(f"there is a product {product_key!r} already")
            if holder := _key_of_product_named(connection, name):
                raise Conflict(f"there is a product named {name!r} already, {holder}; names are unique")
            audit.note(connection, "product.create", product_key, name)
            return self._insert_product(connection, product_key, name, product_secret)

    def products(self) -> list[Product]:
        with self._reading() as connection:
            return [self._product(row) for row in connection.execute(_PRODUCT.order_by(products.c.id))]

    def product_page(self, *, text: str = "", after: int = 0, limit: int) -> list[Product]:
        page = _PRODUCT.where(products.c.id > after).order_by(products.c.id).limit(limit)
        if text:
            has = (
                func.lower(column).contains(folded(text), autoescape=True)
                for column in (products.c.name, products.c.key)
            )
            page = page.where(or_(*has))
        with self._reading() as connection:
            return [self._product(row) for row in connection.execute(page)]

    def count_products(self) -> int:
        with self._reading() as connection:
            return connection.execute(select(func.count()).select_from(products)).scalar_one()

    def product(self, key: str) -> Product:
        with self._reading() as connection:
            return self._product(_product_row(connection, key))

    def rename_product(self, key: str, name: str, *, version: str | None = None) -> Product:
        names.check_product_name(name)
        with self._writing() as connection:
            product = self._product(_product_row(connection, key))
            _check_version(f"product {key!r}", product.version, version)
            if (holder := _key_of_product_named(connection, name)) not in (None, key):
                raise Conflict(f"there is a product named {name!r} already, {holder}; names are unique")
            connection.execute(update(products).where(products.c.id == product.id).values(name=name))
            audit.note(connection, "product.rename", key, f"{product.name} → {name}")
            return self._product(_product_row(connection, key))

    def delete_product(self, key: str, *, with_devices: bool = False, version: str | None = None) -> int:
        """Delete the product with its topic classes; how many devices went with it."""
        with self._writing() as connection:
            self.database.take_time(connection)
            product = self._product(_product_row(connection, key))
            _check_version(f"product {key!r}", product.version, version)
            product_id = product.id
            count = connection.execute(
                select(func.count()).select_from(devices).where(devices.c.product_id == product_id)
            ).scalar_one()
            if count and not with_devices:
                what = "1 device" if count == 1 else f"{count} devices"
                raise Conflict(f"product {key!r} has {what}; delete them with it by --with-devices (withDevices=true)")
            mine = devices.c.product_id == product_id
            _shut_out(connection, mine & _IS_ONLINE)
            _happened(connection, mine, LifecycleAction.DELETE)
            announce_groups(connection, _groups_with(connection, group_products, product_id))
            readers = select(app_products.c.app_id).where(app_products.c.product_id == product_id)
            for app_id in connection.execute(readers).scalars().all():
                _announce(connection, app_id=app_id)
            connection.execute(delete(products).where(products.c.id == product_id))
            _announce(connection, key)
            audit.note(connection, "product.delete", key, f"{product.name}, with {count} devices")
            return count

    # devices

    def create_device(self, product_key: str, name: str | None = None, *, secret: str | None = None) -> Device:
        device_name = names.make_device_name() if name is None else names.check_device_name(name)
        device_secret = names.make_device_secret() if secret is None else names.check_device_secret(secret)
        with self._writing() as connection:
            product_id = _product_row(connection, product_key).id
            if connection.execute(_DEVICE_BY_NAME, {"product_key": product_key, "device_name": device_name}).first():
                raise Conflict(f"product {product_key!r} has a device {device_name!r} already")
            sealed = self._seal_device(product_key, device_name, device_secret)
            connection.execute(insert(devices), _new_device(product_id, device_name, sealed, _now()))
            made = (devices.c.product_id == product_id) & (devices.c.name == device_name)
            _happened(connection, made, LifecycleAction.CREATE)
            audit.note(connection, "device.create", f"{product_key}/{device_name}")
            return self._device(_device_row(connection, product_key, device_name))

    def device(self, product_key: str, name: str) -> Device:
        with self._reading() as connection:
            return self._device(_device_row(connection, product_key, name))

    def devices(self, product_key: str, *, prefix: str = "") -> Iterator[Device]:
        """By name, those whose name begins with `prefix`; read in batches, so that a large fleet costs no memory."""
        with self._reading() as connection:
            product_id = _product_row(connection, product_key).id
        return self._pages(product_id, prefix)

    def page(
        self,
        product_key: str,
        *,
        prefix: str = "",
        state: State | None = None,
        after: str = "",
        limit: int,
        timeout: int,
    ) -> list[Device]:
        """By name, which the index has in order; a state that few devices have is looked for among all of them."""
        with self._reading() as connection:
            product_id = _product_row(connection, product_key).id
            page = _by_name(product_id, prefix).where(devices.c.name > after).limit(limit)
            if state:
                page = page.where(_in_state(timeout)[state])
            return [self._device(row) for row in connection.execute(page)]

    def census(self, product_key: str | None = None, *, timeout: int) -> Census:
        states = _in_state(timeout)
        counts = [func.count(case((states[state], 1))) for state in _COUNTED]
        statement = select(func.count(), *counts).select_from(devices)
        with self._reading() as connection:
            if product_key is not None:
                statement = statement.where(devices.c.product_id == _product_row(connection, product_key).id)
            total, *numbers = connection.execute(statement).one()
        return Census(total, *numbers)

    def set_enabled(self, product_key: str, name: str, enabled: bool, *, version: str | None = None) -> Device:
        """Disabling kills the device's tokens for good: enabled again, it authenticates anew."""
        with self._writing() as connection:
            device = self._device(_device_row(connection, product_key, name))
            _check_version(f"device {name!r}", device.version, version)
            if device.enabled == enabled:
                return device
            action = LifecycleAction.ENABLE if enabled else LifecycleAction.DISABLE
            _happened(connection, devices.c.id == device.id, action)
            audit.note(connection, f"device.{action}", f"{product_key}/{name}")
            generation = device.generation if enabled else device.generation + 1
            return self._update_device(connection, device, enabled=enabled, generation=generation)

    def reset_secret(self, product_key: str, name: str, *, version: str | None = None) -> Device:
        """A new DeviceSecret, made here; the old one and all tokens are dead."""
        with self._writing() as connection:
            device = self._device(_device_row(connection, product_key, name))
            _check_version(f"device {name!r}", device.version, version)
            audit.note(connection, "device.reset-secret", f"{product_key}/{name}")
            sealed = self._seal_device(product_key, name, names.make_device_secret())
            return self._update_device(connection, device, secret=sealed, generation=device.generation + 1)

    def delete_device(self, product_key: str, name: str, *, version: str | None = None) -> None:
        with self._writing() as connection:
            device = self._device(_device_row(connection, product_key, name))
            _check_version(f"device {name!r}", device.version, version)
            _delete_devices(connection, devices.c.id == device.id)
            _announce(connection, product_key, device.id)
            audit.note(connection, "device.delete", f"{product_key}/{name}")

    def delete_devices(self, product_key: str, limit: int) -> int:
        with self._writing() as connection:
            product_id = _product_row(connection, product_key).id
            some = select(devices.c.id).where(devices.c.product_id == product_id).limit(limit)
            count = 0
            for part in _batches(connection.execute(some).scalars().all(), _PAGE):
                _delete_devices(connection, devices.c.id.in_(part))
                count += len(part)
            if count:
                _announce(connection, product_key)
                audit.note(connection, "device.delete", f"{product_key}/", f"{count} devices")
        return count

    def find_device(self, product_key: str, name: str) -> Device | None:
        with self._reading() as connection:
            row = connection.execute(_DEVICE_BY_NAME, {"product_key": product_key, "device_name": name}).first()
        return self._device(row) if row else None

    def find_device_by_id(self, device_id: int) -> Device | None:
        with self._reading() as connection:
            row = connection.execute(_DEVICE_BY_ID, {"device_id": device_id}).first()
        return self._device(row) if row else None

    def activate(self, logins: Sequence[tuple[int, int]]) -> None:
        with self._writing() as connection:
            now = _now()
            first = dict(reversed(logins))  # of one device that came twice
            rows: list[dict[str, Value]] = [{"device_id": each, "at": at, "now": now} for each, at in first.items()]
            self.database.update_each(connection, _activated, rows)

    # who is online

    def sighted(self, sightings: Sequence[Sighting], *, now: int, timeout: int) -> list[StatusChange]:
        if not sightings:
            return []
        changed: list[StatusChange] = []
        with self._writing() as connection:
            for batch in _once_each(sightings):
                _record(self.database, connection, batch, now)
                for part in _batches((each.device_id for each in batch), _PAGE):
                    changed += _change_status(connection, devices.c.id.in_(part), now=now, timeout=timeout)
        return changed

    def expired(self, *, now: int, timeout: int, limit: int) -> list[StatusChange]:
        silent = _IS_ONLINE & (devices.c.requested < now - timeout) & devices.c.session.is_(None)
        with self._reading() as connection:
            if connection.execute(select(devices.c.id).where(silent).limit(1)).first() is None:
                return []
        with self._writing() as connection:
            found = connection.execute(select(devices.c.id).where(silent).limit(limit)).scalars().all()
            return _change_status(connection, devices.c.id.in_(found), now=now, timeout=timeout)

    def abandoned(self, session: str | None, *, now: int, timeout: int) -> list[StatusChange]:
        changed: list[StatusChange] = []
        held: ColumnElement[bool] = devices.c.session.is_not(None)
        if session and session.endswith("."):
            held &= (devices.c.session >= session) & (devices.c.session < session + "\U0010ffff")
        elif session:
            held &= devices.c.session == session
        while True:
            with self._writing() as connection:
                found = connection.execute(select(devices.c.id).where(_IS_ONLINE & held).limit(_PAGE)).scalars().all()
                if not found:  # what is left belongs to devices that are disabled
                    connection.execute(
                        update(devices).where(held).values(session=None)
                        if session
                        else update(devices)
                        .where(devices.c.session_at.is_not(None))
                        .values(session=None, session_at=None)
                    )
                    return changed
                mine = devices.c.id.in_(found)
                connection.execute(update(devices).where(mine).values(session=None))
                changed += _change_status(connection, mine, now=now, timeout=timeout)

    def session_holders(self) -> set[str]:
        found: set[str] = set()
        following = select(func.min(devices.c.session)).where(devices.c.session > bindparam("last"))
        with self._reading() as connection:
            # One step in the index for each of them: they are few, and those whom they hold are many.
            while last := connection.execute(following, {"last": max(found, default="")}).scalar():
                found.add(last)
        return found

    def last_session(self) -> int:
        with self._reading() as connection:
            at = devices.c.session_at
            return connection.execute(select(func.max(at)).where(at.is_not(None))).scalar() or 0

    def clock_jumped(self, by: int, *, now: int, lately: int) -> None:
        def moved(column: ColumnElement[Any]) -> ColumnElement[Any]:
            return case((column + by > now, now), (column.between(now - lately, now), column), else_=column + by)

        with self._writing() as connection:
            connection.execute(
                update(devices)
                .where(_IS_ONLINE)
                .values(last_seen=moved(devices.c.last_seen), requested=moved(devices.c.requested))
            )

    def untold(self, limit: int) -> list[StatusChange]:
        with self._reading() as connection:
            rows = connection.execute(_STATUS.where(_IS_NEXT).order_by(status_changes.c.id).limit(limit)).all()
        return [_status_change(row) for row in rows]

    def told(self, changes: Sequence[int]) -> list[StatusChange]:
        following: list[StatusChange] = []
        with self._writing() as connection:
            for part in _batches(changes, _PAGE):
                ids = connection.execute(_FOLLOWING.where(status_changes.c.id.in_(part))).scalars().all()
                connection.execute(delete(status_changes).where(status_changes.c.id.in_(part)))
                following += map(_status_change, connection.execute(_STATUS.where(status_changes.c.id.in_(ids))))
        return following

    # a fleet

    def import_fleet(
        self, stream: BinaryIO, *, skip_bad: bool = False, progress: ImportProgress | None = None
    ) -> ImportReport:
        size = size_of(stream)

        def tell(rows: int) -> None:
            if progress:
                progress("importing", stream.tell() / size if size else None, rows)

        return self.import_devices(read_fleet(stream), skip_bad=skip_bad, progress=tell if progress else None)

    def export_fleet(self, product_key: str) -> Iterator[str]:
        return written_fleet(self.devices(product_key))

    def import_devices(
        self,
        rows: Iterable[ImportRow],
        *,
        skip_bad: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> ImportReport:
        """Store the good rows in one transaction; none of them when a row is bad and not `skip_bad`.

        Rows are checked and sealed before the transaction, which then holds the database for about a second in 100,000
        devices: other commands and running gateways wait for that at most. `progress` is called with the rows read so far,
        and now and then while they are stored; what it raises ends the import, and nothing is stored.
        """
        report = ImportReport()
        fleet = self._checked(rows, report, progress)
        with self._writing() as connection:
            self.database.take_time(connection)
            for product_key, members in fleet.items():
                self._import_product(connection, product_key, members, report, progress)
            if report.created > _BATCH:
                self.database.take_stock(connection)
            report.bad.sort()
            report.stored = skip_bad or not report.bad
            if report.stored:
                detail = f"{report.created} created, {report.unchanged} unchanged, {len(report.bad)} bad"
                audit.note(connection, "device.import", ", ".join(fleet), detail)
            else:
                connection.rollback()
        return report

    def _checked(
        self, rows: Iterable[ImportRow], report: ImportReport, progress: Callable[[int], None] | None
    ) -> dict[str, dict[str, tuple[ImportRow, bytes]]]:
        """The rows that keep every rule, once each, by product and name, with their sealed secrets."""
        fleet: dict[str, dict[str, tuple[ImportRow, bytes]]] = {}
        for row in rows:
            report.read += 1
            if progress and report.read % _PAGE == 0:
                progress(report.read)
            try:
                _check(row)
            except Rejected as fault:
                report.bad.append((row.line, str(fault)))
                continue
            members = fleet.setdefault(row.product_key, {})
            if row.device_name in members:
                first = members[row.device_name][0]
                if row.secret == first.secret:
                    report.unchanged += 1
                else:
                    where = f"{row.product_key}/{row.device_name}"
                    report.bad.append((row.line, f"{where} repeats line {first.line} with another DeviceSecret"))
                continue
            secret = row.secret or names.make_device_secret()
            members[row.device_name] = row, self._seal_device(row.product_key, row.device_name, secret)
        if progress:
            progress(report.read)
        return fleet

    def _import_product(
        self,
        connection: Connection,
        product_key: str,
        members: dict[str, tuple[ImportRow, bytes]],
        report: ImportReport,
        progress: Callable[[int], None] | None,
    ) -> None:
        now = _now()
        product_id = connection.execute(select(products.c.id).where(products.c.key == product_key)).scalar()
        if product_id is None:
            name = product_key if len(product_key) >= 4 else f"imported-{product_key}"
            if holder := _key_of_product_named(connection, name):
                reason = (
                    f"ProductKey {product_key!r} is new, and the product name {name!r} that it would get belongs to "
                    f"product {holder}; make it first: uplinkd product create NAME --key {product_key}"
                )
                report.bad.extend((row.line, reason) for row, _ in members.values())
                return
            key = ProductKey(product_key)
            product_id = self._insert_product(connection, key, name, names.make_product_secret()).id
            report.products_created.append(product_key)
        is_new = (
            connection.execute(select(devices.c.id).where(devices.c.product_id == product_id).limit(1)).first() is None
        )
        for batch in _batches(members.values(), _BATCH):
            wanted = [] if is_new else [row.device_name for row, _ in batch]
            known = self._secrets(connection, product_id, product_key, wanted) if wanted else {}
            fresh = []
            for row, sealed_before in batch:
                if row.device_name not in known:
                    # It was sealed before this transaction, perhaps under a key that has given way since.
                    sealed = self._vault.resealed(sealed_before, owner=device_owner(product_key, row.device_name))
                    fresh.append(_new_device(product_id, row.device_name, sealed, now))
                    report.secrets_made += not row.secret
                elif row.secret in ("", known[row.device_name]):
                    report.unchanged += 1
                else:
                    where = f"{product_key}/{row.device_name}"
                    report.bad.append((row.line, f"{where} exists with another DeviceSecret"))
            if fresh:
                self.database.insert_many(connection, devices, fresh)
                facts = {"product_key": product_key, "action": LifecycleAction.CREATE.value, "at": now}
                created = [{**facts, "device_name": device["name"]} for device in fresh]
                self.database.insert_many(connection, lifecycle_changes, created)
            report.created += len(fresh)
            if progress:
                progress(report.read)

    def _secrets(self, connection: Connection, product_id: int, product_key: str, wanted: list[str]) -> dict[str, str]:
        """The DeviceSecrets of those of the `wanted` names that exist."""
        statement = select(devices.c.name, devices.c.secret).where(
            devices.c.product_id == product_id, devices.c.name.in_(wanted)
        )
        return {
            name: self._vault.open(sealed, owner=device_owner(product_key, name)).decode()
            for name, sealed in connection.execute(statement)
        }

    # topic classes

    def topic_classes(self, product_key: str) -> list[TopicClass]:
        """In the order in which they were added."""
        with self._reading() as connection:
            product_id = _product_row(connection, product_key).id
            rows = connection.execute(_CLASSES.where(topic_classes.c.product_id == product_id))
            return [TopicClass(levels, Right(right)) for levels, right in rows]

    def add_topic_class(self, product_key: str, levels: str, right: Right) -> TopicClass:
        with self._writing() as connection:
            product_id = _product_row(connection, product_key).id
            levels = names.check_levels(levels, right, product_key=product_key)
            rows = connection.execute(_CLASSES.where(topic_classes.c.product_id == product_id))
            existing: dict[str, str] = {row.levels: row.right for row in rows}
            if levels in existing:
                raise Conflict(
                    f"product {product_key!r} has the topic class {levels!r} already, with the right {existing[levels]}"
                )
            custom = existing.keys() - _DEFAULT_LEVELS
            if levels not in _DEFAULT_LEVELS and len(custom) >= names.MAX_CUSTOM_CLASSES:
                raise Rejected(
                    f"product {product_key!r} has {len(custom)} custom topic classes; at most "
                    f"{names.MAX_CUSTOM_CLASSES} are allowed, so remove one before adding {levels!r}"
                )
            connection.execute(insert(topic_classes).values(product_id=product_id, levels=levels, right=right.value))
            _announce(connection, product_key)
            audit.note(connection, "topic.add", f"{product_key}/{levels}", right.value)
            return TopicClass(levels, right)

    def remove_topic_class(self, product_key: str, levels: str) -> None:
        with self._writing() as connection:
            product_id = _product_row(connection, product_key).id
            gone = connection.execute(
                delete(topic_classes).where(
                    topic_classes.c.product_id == product_id, topic_classes.c.levels == levels.removeprefix("/")
                )
            )
            if not gone.rowcount:
                raise NotFound(
                    f"product {product_key!r} has no topic class {levels!r}; `uplinkd topic list {product_key}` shows them"
                )
            _announce(connection, product_key)
            audit.note(connection, "topic.remove", f"{product_key}/{levels.removeprefix('/')}")

    # applications

    def create_app(self, name: str, *, products: Sequence[str] = (), sends: bool = True) -> tuple[App, str]:
        names.check_app_name(name)
        key, secret = names.make_app_key(), names.make_app_secret()
        with self._writing() as connection:
            if connection.execute(select(apps.c.id).where(apps.c.name == name)).first():
                raise Conflict(f"there is an application named {name!r} already; names are unique")
            facts = {"key": key, "name": name, "sends": sends, "created": _now(), **self._app_secret(key, secret)}
            result = connection.execute(insert(apps), facts)
            assert result.inserted_primary_key is not None
            audit.note(connection, "app.create", name, f"{'sends' if sends else 'reads only'}; {', '.join(products)}")
            return _grant(connection, result.inserted_primary_key[0], products), secret

    def apps(self) -> list[App]:
        """In the order in which they were made."""
        with self._reading() as connection:
            return _apps(connection, _APP)

    def app(self, name: str) -> App:
        with self._reading() as connection:
            return _app_named(connection, name)

    def grant_app(self, name: str, products: Sequence[str]) -> App:
        with self._writing() as connection:
            audit.note(connection, "app.grant", name, ", ".join(products))
            return _grant(connection, _app_named(connection, name).id, products)

    def set_app(self, name: str, products: Sequence[str], *, version: str | None = None) -> App:
        with self._writing() as connection:
            app = _app_named(connection, name)
            _check_version(f"application {name!r}", app.version, version)
            connection.execute(delete(app_products).where(app_products.c.app_id == app.id))
            audit.note(connection, "app.products", name, f"{', '.join(app.products)} → {', '.join(products)}")
            return _grant(connection, app.id, products)

    def withdraw_app(self, name: str, products: Sequence[str]) -> App:
        with self._writing() as connection:
            app = _app_named(connection, name)
            for product_key in products:
                if product_key not in app.products:
                    raise NotFound(
                        f"application {name!r} does not have the product {product_key!r}; `uplinkd app show {name}` shows what it has"
                    )
                product_id = _product_row(connection, product_key).id
                connection.execute(
                    delete(app_products).where(app_products.c.app_id == app.id, app_products.c.product_id == product_id)
                )
            _announce(connection, app_id=app.id)
            audit.note(connection, "app.withdraw", name, ", ".join(products))
            return _app_named(connection, name)

    def renew_app_secret(self, name: str) -> tuple[App, str]:
        secret = names.make_app_secret()
        with self._writing() as connection:
            app = _app_named(connection, name)
            connection.execute(update(apps).where(apps.c.id == app.id).values(self._app_secret(app.key, secret)))
            _announce(connection, app_id=app.id)
            audit.note(connection, "app.renew-secret", name)
            return _app_named(connection, name), secret

    def delete_app(self, name: str, *, version: str | None = None) -> None:
        with self._writing() as connection:
            app = _app_named(connection, name)
            _check_version(f"application {name!r}", app.version, version)
            announce_groups(connection, _groups_with(connection, group_apps, app.id))
            connection.execute(delete(apps).where(apps.c.id == app.id))
            _announce(connection, app_id=app.id)
            audit.note(connection, "app.delete", name)

    def find_app(self, key: str) -> App | None:
        with self._reading() as connection:
            return next(iter(_apps(connection, _APP_BY_KEY, app_key=key)), None)

    def find_app_by_id(self, app_id: int) -> App | None:
        with self._reading() as connection:
            return next(iter(_apps(connection, _APP_BY_ID, app_id=app_id)), None)

    def app_secret(self, key: str) -> str | None:
        with self._reading() as connection:
            row = connection.execute(select(apps.c.secret).where(apps.c.key == key)).first()
        if row is None:
            return None
        return self._vault.open(row.secret, owner=app_owner(key)).decode() if row.secret is not None else ""

    # what happens to devices

    def lifecycle(self, limit: int) -> list[LifecycleChange]:
        with self._reading() as connection:
            rows = connection.execute(select(lifecycle_changes).order_by(lifecycle_changes.c.id).limit(limit)).all()
        return [
            LifecycleChange(
                row.id,
                ProductKey(row.product_key),
                DeviceName(row.device_name),
                LifecycleAction(row.action),
                row.at,
            )
            for row in rows
        ]

    def lifecycle_told(self, upto: int) -> None:
        with self._writing() as connection:
            connection.execute(delete(lifecycle_changes).where(lifecycle_changes.c.id <= upto))

    # what gateways need beside devices

    def signing_keys(self) -> list[SigningKey]:
        """Oldest first; at least one is not retired."""
        return self.keys.signing_keys()

    def changes_cursor(self) -> int:
        with self._reading() as connection:
            _, newest = connection.execute(_CHANGES_KEPT).one()
        return newest or 0

    def changes(self, after: int) -> tuple[int, list[Change]]:
        # There is one writer at a time, so seq rises in the order of commits and no change is passed over.
        with self._reading() as connection:
            oldest, newest = connection.execute(_CHANGES_KEPT).one()
            newest = newest or 0
            if newest == after:
                return after, []
            if after > newest or after < oldest - 1:
                return newest, [_FORGET_EVERYTHING]
            rows = connection.execute(
                select(changes.c.product_key, changes.c.device_id, changes.c.app_id, changes.c.group_id)
                .where(changes.c.seq > after, changes.c.seq <= newest)
                .distinct()
            ).all()
        return newest, [Change(ProductKey(row.product_key), row.device_id, row.app_id, row.group_id) for row in rows]

    # within

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        with outages_of(self.database), self.database.engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction that holds the database's one write lock from its beginning: what it reads stays so."""
        try:
            with outages_of(self.database), self.database.writer.begin() as connection:
                self._check_in(connection)
                yield connection
        except IntegrityError as error:
            raise Conflict("another command made the same thing at this moment; look, and try again") from error

    def _check_in(self, connection: Connection) -> None:
        """Before anything is written: the schema is the one that is known here, and what will be sealed is sealed under the key
        that is in use now."""
        revision, prefix = connection.execute(_STANDING).one()
        if revision not in REVISIONS:
            raise Unavailable(
                f"a newer uplinkd has brought the registry {self.database.where} to the schema {revision!r}, which this one does not "
                "know: start the newer version in its place"
            )
        if prefix is not None and not self._vault.seal_under(prefix):
            raise Unavailable(
                f"the secrets of the registry {self.database.where} are sealed with key {prefix[1:].hex()} now, which this process "
                "does not have: start it again with that key"
            )

    def _insert_product(self, connection: Connection, key: ProductKey, name: str, secret: str) -> Product:
        now = _now()
        sealed = self._vault.seal(secret.encode(), owner=product_owner(key))
        result = connection.execute(insert(products).values(key=key, name=name, secret=sealed, created=now))
        assert result.inserted_primary_key is not None
        product_id: int = result.inserted_primary_key[0]
        connection.execute(
            insert(topic_classes),
            [
                {"product_id": product_id, "levels": levels, "right": right.value}
                for levels, right in names.DEFAULT_CLASSES
            ],
        )
        return Product(product_id, key, name, secret, now)

    def _update_device(self, connection: Connection, device: Device, **values: object) -> Device:
        connection.execute(update(devices).where(devices.c.id == device.id).values(**values))
        if not values.get("enabled", True):
            # Enabled again, it counts as online once it has come back, not by what it asked for before.
            connection.execute(update(devices).where(devices.c.id == device.id).values(requested=None))
            _change_status(connection, devices.c.id == device.id, now=_now(), timeout=0)
        _announce(connection, device.product_key, device.id)
        return self._device(_device_row(connection, device.product_key, device.name))

    def _pages(self, product_id: int, prefix: str) -> Iterator[Device]:
        page = _by_name(product_id, prefix).limit(_PAGE)
        last = ""
        while True:
            with self._reading() as connection:
                rows = connection.execute(page.where(devices.c.name > last)).all()
            yield from map(self._device, rows)
            if len(rows) < _PAGE:
                return
            last = rows[-1].name

    def _app_secret(self, key: str, secret: str) -> dict[str, bytes]:
        return {
            "secret_hash": hash_secret(secret),
            "secret": self._vault.seal(secret.encode(), owner=app_owner(key)),
        }

    def _seal_device(self, product_key: str, name: str, secret: str) -> bytes:
        return self._vault.seal(secret.encode(), owner=device_owner(product_key, name))

    def _product(self, row: Any) -> Product:
        product_id, key, name, sealed, created = row
        secret = self._vault.open(sealed, owner=product_owner(key)).decode()
        return Product(product_id, ProductKey(key), name, secret, created)

    def _device(self, row: Any) -> Device:
        device_id, product_key, name, sealed, enabled, generation, created, activated, *heard = row
        last_seen, requested, address, session = heard
        return Device(
            device_id,
            ProductKey(product_key),
            DeviceName(name),
            self._vault.open(sealed, owner=device_owner(product_key, name)).decode(),
            enabled,
            generation,
            created,
            activated,
            last_seen,
            requested,
            address or "",
            session or "",
        )


def _check(row: ImportRow) -> None:
    if row.fault:
        raise Rejected(row.fault)
    names.check_product_key(row.product_key)
    names.check_device_name(row.device_name, imported=True)
    if row.secret:
        names.check_device_secret(row.secret)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _once_each(sightings: Sequence[Sighting]) -> Iterator[list[Sighting]]:
    """`sightings` in their order, cut so that no part has a device twice: each of its changes is seen."""
    batch: dict[int, Sighting] = {}
    for sighting in sightings:
        if sighting.device_id in batch:
            yield list(batch.values())
            batch = {}
        batch[sighting.device_id] = sighting
    yield list(batch.values())


def _by_name(product_id: int, prefix: str) -> Select[Any]:
    """The product's devices by name, those whose name begins with `prefix`."""
    page = _DEVICE.where(devices.c.product_id == product_id).order_by(devices.c.name)
    return page.where(devices.c.name >= prefix, devices.c.name < prefix + "\U0010ffff") if prefix else page


_COUNTED = (State.ONLINE, State.OFFLINE, State.INACTIVE, State.DISABLED)  # as Census has them


def _in_state(timeout: int) -> dict[State, ColumnElement[bool]]:
    """What Device.state says, in SQL."""
    lately = func.coalesce(devices.c.requested, 0) > _now() - timeout
    connected = devices.c.session.is_not(None) | lately
    seen = devices.c.enabled & devices.c.last_seen.is_not(None)
    return {
        State.ONLINE: seen & connected,
        State.OFFLINE: seen & ~connected,
        State.INACTIVE: devices.c.enabled & devices.c.last_seen.is_(None),
        State.DISABLED: ~devices.c.enabled,
    }


def _check_version(what: str, version: str, given: str | None) -> None:
    if given is not None and given != version:
        raise Stale(f"{what} was changed meanwhile: its version is {version!r}, not {given!r}; look at it again")


def _shut_out(connection: Connection, which: ColumnElement[bool]) -> None:
    """Devices that go for good are offline first, so that whoever follows their status hears it."""
    connection.execute(update(devices).where(which).values(enabled=False))
    _change_status(connection, which, now=_now(), timeout=0)


def _delete_devices(connection: Connection, which: ColumnElement[bool]) -> None:
    _shut_out(connection, which)
    _happened(connection, which, LifecycleAction.DELETE)
    connection.execute(delete(devices).where(which))


def _happened(connection: Connection, which: ColumnElement[bool], action: LifecycleAction) -> None:
    """Keep what happens to `which` devices until it is published."""
    facts = select(products.c.key, devices.c.name, literal(action.value), literal(_now())).join_from(devices, products)
    columns = ["product_key", "device_name", "action", "at"]
    connection.execute(insert(lifecycle_changes).from_select(columns, facts.where(which)))


def _groups_with(connection: Connection, table: Table, other_id: int) -> list[int]:
    """The consumer groups that name a product or an application."""
    (other,) = (column for column in table.columns if column.name != "group_id")
    return list(connection.execute(select(table.c.group_id).where(other == other_id)).scalars())


def _record(database: Database, connection: Connection, sightings: list[Sighting], now: int) -> None:
    kinds: dict[Each, list[dict[str, Value]]] = {_request: [], _session_begun: [], _session_ended: []}
    for each in sightings:
        kind = _session_ended if each.ended else _session_begun if each.session else _request
        values: dict[str, Value] = {"device_id": each.device_id, "at": min(each.at, now), "now": now}
        if kind is not _session_ended:
            values["from_address"] = each.address
        if kind is not _request:
            values["stamp"] = each.stamp
        if kind is _session_begun:
            values["session_of"] = each.session
        kinds[kind].append(values)
    for change, rows in kinds.items():
        if rows:
            database.update_each(connection, change, rows)


def _change_status(connection: Connection, which: ColumnElement[bool], *, now: int, timeout: int) -> list[StatusChange]:
    """Mark those of `which` devices that have come online or gone offline. The changes are kept until they are told; given are
    those that may be told now, since no older one of their device waits."""
    lately = func.coalesce(devices.c.requested, 0) >= now - timeout
    should = devices.c.enabled & (devices.c.session.is_not(None) | lately)
    rows = connection.execute(
        select(
            devices.c.id,
            products.c.key,
            devices.c.name,
            devices.c.online,
            func.coalesce(devices.c.last_seen, now),
            func.coalesce(devices.c.address, ""),
        )
        .join(products)
        .where(which, devices.c.online != should)
    ).all()
    changed: list[StatusChange] = []
    for part in _batches(rows, _PAGE):
        facts = [
            {
                "product_key": product_key,
                "device_name": name,
                "online": not online,
                "at": now,
                "last_seen": min(last_seen, now),
                "address": address,
            }
            for _, product_key, name, online, last_seen, address in part
        ]
        made = connection.execute(insert(status_changes).returning(status_changes.c.id), facts).scalars().all()
        found = connection.execute(_STATUS.where(status_changes.c.id.in_(made), _IS_NEXT).order_by(status_changes.c.id))
        changed += map(_status_change, found)
        for value in (True, False):
            ids = [row.id for row in part if row.online is not value]
            if ids:
                connection.execute(update(devices).where(devices.c.id.in_(ids)).values(online=value))
    return changed


def _status_change(row: Any) -> StatusChange:
    change_id, product_key, name, online, at, last_seen, address = row
    return StatusChange(change_id, ProductKey(product_key), DeviceName(name), online, at, last_seen, address)


def _new_device(product_id: int, name: str, sealed: bytes, now: int) -> dict[str, object]:
    return {
        "product_id": product_id,
        "name": name,
        "secret": sealed,
        "enabled": True,
        "generation": 1,
        "created": now,
    }


def _product_row(connection: Connection, key: str) -> Any:
    row = connection.execute(_PRODUCT.where(products.c.key == key)).first()
    if row is None:
        raise NotFound(f"there is no product {key!r}; `uplinkd product list` shows them")
    return row


def _key_of_product_named(connection: Connection, name: str) -> str | None:
    key: str | None = connection.execute(select(products.c.key).where(products.c.name == name)).scalar()
    return key


def _apps(connection: Connection, statement: Select[Any], **which: object) -> list[App]:
    """Applications with their products, both in the order in which they were made."""
    found = []
    for app, rows in groupby(connection.execute(statement, which), key=lambda row: row[:6]):
        granted = tuple(ProductKey(row.pk) for row in rows if row.pk is not None)
        app_id, key, name, secret_hash, sends, created = app
        found.append(App(app_id, key, name, secret_hash, sends, created, granted))
    return found


def _app_named(connection: Connection, name: str) -> App:
    app = next(iter(_apps(connection, _APP_BY_NAME, app_name=name)), None)
    if app is None:
        raise NotFound(f"there is no application {name!r}; `uplinkd app list` shows them")
    return app


def _grant(connection: Connection, app_id: int, product_keys: Sequence[str]) -> App:
    """Add the products; the application as it is then."""
    (app,) = _apps(connection, _APP_BY_ID, app_id=app_id)
    for product_key in dict.fromkeys(product_keys):
        product_id = _product_row(connection, product_key).id
        if product_key not in app.products:
            connection.execute(insert(app_products).values(app_id=app_id, product_id=product_id))
    _announce(connection, app_id=app_id)
    (app,) = _apps(connection, _APP_BY_ID, app_id=app_id)
    return app


def _device_row(connection: Connection, product_key: str, name: str) -> Any:
    row = connection.execute(_DEVICE_BY_NAME, {"product_key": product_key, "device_name": name}).first()
    if row is None:
        _product_row(connection, product_key)
        raise NotFound(
            f"product {product_key!r} has no device {name!r}; `uplinkd device list {product_key}` shows its devices"
        )
    return row


def _announce(
    connection: Connection, product_key: str = "", device_id: int | None = None, *, app_id: int | None = None
) -> None:
    """Tell every gateway, with this transaction, that what it holds of the device, product or application is old."""
    result = connection.execute(insert(changes).values(product_key=product_key, device_id=device_id, app_id=app_id))
    assert result.inserted_primary_key is not None
    connection.execute(delete(changes).where(changes.c.seq <= result.inserted_primary_key[0] - KEPT_CHANGES))


def revision(database: Database, connection: Connection) -> str | None:
    """The schema that a database has, None while it is empty; raise Rejected if it is not one of ours."""
    try:
        return _revision(database.tables(connection), connection)
    except Rejected as fault:
        raise Rejected(f"the database {database.where} cannot be the registry: {fault}") from None


def _revision(tables: set[str], connection: Connection) -> str | None:
    if "alembic_version" not in tables:
        if tables:
            raise Rejected(f"it is another program's, with tables such as {min(tables)!r}")
        return None
    found: str | None = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    if found is not None and found not in REVISIONS:
        raise Rejected(
            f"a newer uplinkd made it: its schema is {found!r}, this version knows up to {REVISIONS[-1]!r}; "
            "install the newer version, or restore a backup from before"
        )
    return found


def _sealed_sample(database: Database) -> bytes | None:
    """A sealed value of a database that is ready for use; None if it must be prepared first.

    Every registry in use has a signing key, so there is no value in it that came before the sample.
    """
    with database.engine.connect() as connection:
        if revision(database, connection) != REVISIONS[-1] or not database.is_ready(connection):
            return None
        sample: bytes | None = connection.execute(select(signing_keys.c.key).order_by(signing_keys.c.id)).scalar()
        return sample


def _prepare(database: Database, settings: Settings) -> bytes:
    """Bring the database to the current schema, with a first signing key, in one transaction; a sealed value of it."""
    database.make_ready()
    with database.writer.begin() as connection:
        database.take_time(connection)
        before = revision(database, connection)
        if before != REVISIONS[-1]:
            if before and (server := running_server(settings.data)):
                version = f"uplinkd {server.version}" if server.version else "an older uplinkd"
                raise Rejected(
                    f"{version} serves from {settings.data} with the schema {before!r}, and this version would bring it to "
                    f"{REVISIONS[-1]!r}: stop that server first, and start this version in its place"
                )
            migrate(connection)
        sample: bytes | None = connection.execute(select(signing_keys.c.key).order_by(signing_keys.c.id)).scalar()
        if sample is None:
            vault = Vault(make_key(settings))
            sample = vault.seal(secrets.token_bytes(32), owner=signing_key_owner(1))
            connection.execute(insert(signing_keys).values(id=1, key=sample, created=_now()))
        return sample


def migrate(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "uplinkd.registry:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
