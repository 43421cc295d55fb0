"""The registry in SQL: SQLAlchemy 2 Core over SQLite, one short transaction for each act, Alembic only when the schema is old.

Every statement is plain SQL; what depends on SQLite stands in `_open_sqlite`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy import bindparam, delete, event, func, insert, select, update
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from uplinkd.core import names
from uplinkd.core.errors import Conflict, NotFound, Rejected, Unavailable
from uplinkd.core.model import Device, DeviceName, Product, ProductKey, Right, SigningKey, TopicClass
from uplinkd.registry import Change, ImportReport, ImportRow
from uplinkd.registry.schema import REVISIONS, changes, devices, products, signing_keys, topic_classes
from uplinkd.registry.vault import Vault, key_of, make_key
from uplinkd.settings import Settings

__all__ = ["KEPT_CHANGES", "SqlRegistry"]

KEPT_CHANGES = 100_000

_BUSY_SECONDS = 5
_LOCK_SECONDS = 30.0
_PAGE = 1000
_BATCH = 2000
_FORGET_EVERYTHING = Change(ProductKey(""), None)


class SqlRegistry:
    """Implements registry.Registry; made by `open`."""

    def __init__(self, engine: Engine, vault: Vault, where: str) -> None:
        self._engine = engine
        self._vault = vault
        self._where = where

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Raise Rejected for a folder or key that cannot be used, Unavailable for a database that does not answer."""
        where = settings.database
        engine, path = _open_sqlite(settings)
        try:
            with _reported(where):
                with engine.connect() as connection:
                    current = _revision(connection)
                if current != REVISIONS[-1]:
                    _migrate(engine, path, where)
                registry = cls(engine, _open_vault(engine, settings, path), where)
                registry._ensure_signing_key()
                return registry
        except BaseException:
            engine.dispose()
            raise

    def close(self) -> None:
        self._engine.dispose()

    # -- products

    def create_product(self, name: str, *, key: str | None = None, secret: str | None = None) -> Product:
        names.check_product_name(name)
        product_key = names.check_product_key(key) if key else names.make_product_key()
        product_secret = names.check_product_secret(secret) if secret else names.make_product_secret()
        with self._write() as connection:
            return self._insert_product(connection, product_key, name, product_secret)

    def products(self) -> list[Product]:
        with self._read() as connection:
            return [self._product(row) for row in connection.execute(select(products).order_by(products.c.id))]

    def product(self, key: str) -> Product:
        with self._read() as connection:
            return self._product(_product_row(connection, key))

    def delete_product(self, key: str, *, with_devices: bool = False) -> int:
        """Delete it and, with `with_devices`, its devices; return how many these were."""
        with self._write() as connection:
            row = _product_row(connection, key)
            count = connection.scalar(select(func.count()).where(devices.c.product_id == row.id)) or 0
            if count and not with_devices:
                raise Conflict(
                    f"product {key} still has {count} devices; delete them first, or all at once with --with-devices"
                )
            connection.execute(delete(products).where(products.c.id == row.id))
            _announce(connection, key, None)
            return count

    # -- devices

    def create_device(self, product_key: str, name: str | None = None, *, secret: str | None = None) -> Device:
        device_name = names.check_device_name(name) if name is not None else names.make_device_name()
        device_secret = names.check_device_secret(secret) if secret is not None else names.make_device_secret()
        with self._write() as connection:
            row = _product_row(connection, product_key)
            if _device_row(connection, product_key, device_name):
                raise Conflict(f"product {product_key} has a device {device_name!r} already")
            connection.execute(insert(devices), self._new_device(row.id, row.key, device_name, device_secret))
            return self._device(_device_row(connection, product_key, device_name))

    def device(self, product_key: str, name: str) -> Device:
        with self._read() as connection:
            return self._device(_existing_device(connection, product_key, name))

    def devices(self, product_key: str, *, prefix: str = "") -> Iterator[Device]:
        after = ""
        while True:
            with self._read() as connection:
                row = _product_row(connection, product_key)
                page = connection.execute(
                    _DEVICES.where(devices.c.product_id == row.id, devices.c.name > after)
                    .where(devices.c.name.startswith(prefix, autoescape=True) if prefix else sa.true())
                    .order_by(devices.c.name)
                    .limit(_PAGE)
                ).all()
            for found in page:
                yield self._device(found)
            if len(page) < _PAGE:
                return
            after = page[-1].name

    def set_enabled(self, product_key: str, name: str, enabled: bool) -> Device:
        with self._write() as connection:
            row = _existing_device(connection, product_key, name)
            if row.enabled != enabled:
                # A token from before the device was disabled stays dead after it is enabled again.
                generation = row.generation if enabled else row.generation + 1
                self._change_device(connection, row, {"enabled": enabled, "generation": generation})
            return self._device(_existing_device(connection, product_key, name))

    def reset_secret(self, product_key: str, name: str) -> Device:
        with self._write() as connection:
            row = _existing_device(connection, product_key, name)
            sealed = self._vault.seal(names.make_device_secret().encode(), owner=_owner(product_key, name))
            self._change_device(connection, row, {"secret": sealed, "generation": row.generation + 1})
            return self._device(_existing_device(connection, product_key, name))

    def delete_device(self, product_key: str, name: str) -> None:
        with self._write() as connection:
            row = _existing_device(connection, product_key, name)
            connection.execute(delete(devices).where(devices.c.id == row.id))
            _announce(connection, product_key, row.id)

    def import_devices(
        self,
        rows: Iterable[ImportRow],
        *,
        skip_bad: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> ImportReport:
        """All in one transaction: with a bad row and not `skip_bad` all stay out. `progress` gets the rows read so far."""
        report = ImportReport()
        with self._write() as connection:
            work = _Import(connection, report)
            batch: list[ImportRow] = []
            for row in rows:
                batch.append(row)
                if len(batch) == _BATCH:
                    self._import_batch(work, batch)
                    batch.clear()
                    if progress:
                        progress(report.read)
            self._import_batch(work, batch)
            if progress:
                progress(report.read)
            report.stored = skip_bad or not report.bad
            if not report.stored:
                connection.rollback()
        return report

    def _import_batch(self, work: _Import, batch: list[ImportRow]) -> None:
        report, fresh = work.report, []
        known = work.known(batch)
        for row in batch:
            report.read += 1
            try:
                if row.fault:
                    raise Rejected(row.fault)
                key = names.check_product_key(row.product_key)
                name = names.check_device_name(row.device_name, imported=True)
                secret = names.check_device_secret(row.secret) if row.secret else ""
                if earlier := work.lines.get((key, name)):
                    line, earlier_secret = earlier
                    if secret != earlier_secret:
                        raise Conflict(f"device {name!r} of {key} is in line {line} already, with another DeviceSecret")
                    report.unchanged += 1
                    continue
                work.lines[key, name] = (row.line, secret)
                if sealed := known.get((key, name)):
                    there = self._vault.open(sealed, owner=_owner(key, name)).decode()
                    if secret and secret != there:
                        raise Conflict(f"device {name!r} of {key} exists with another DeviceSecret")
                    report.unchanged += 1
                    continue
                if key not in work.products:
                    product_name = key if len(key) >= 4 else f"imported-{key}"
                    product = self._insert_product(work.connection, key, product_name, names.make_product_secret())
                    work.products[key] = product.id
                    report.products_created.append(key)
                report.secrets_made += not secret
                report.created += 1
                fresh.append(self._new_device(work.products[key], key, name, secret or names.make_device_secret()))
            except Rejected as fault:
                report.bad.append((row.line, str(fault)))
        if fresh:
            work.connection.execute(insert(devices), fresh)

    # -- topic classes

    def topic_classes(self, product_key: str) -> list[TopicClass]:
        with self._read() as connection:
            return _classes(connection, _product_row(connection, product_key).id)

    def add_topic_class(self, product_key: str, levels: str, right: Right) -> TopicClass:
        levels = names.check_levels(levels, right, product_key=product_key)
        with self._write() as connection:
            row = _product_row(connection, product_key)
            there = {item.levels: item.right for item in _classes(connection, row.id)}
            if levels in there:
                raise Conflict(
                    f"product {product_key} has the topic class {levels!r} already, with the right {there[levels]}"
                )
            if len(there.keys() - {name for name, _ in names.DEFAULT_CLASSES}) >= names.MAX_CUSTOM_CLASSES:
                raise Rejected(
                    f"product {product_key} has {names.MAX_CUSTOM_CLASSES} custom topic classes, which is the most"
                )
            connection.execute(insert(topic_classes), {"product_id": row.id, "levels": levels, "right": right.value})
            _announce(connection, product_key, None)
        return TopicClass(levels, right)

    def remove_topic_class(self, product_key: str, levels: str) -> None:
        with self._write() as connection:
            row = _product_row(connection, product_key)
            gone = connection.execute(
                delete(topic_classes).where(
                    topic_classes.c.product_id == row.id, topic_classes.c.levels == levels.removeprefix("/")
                )
            )
            if not gone.rowcount:
                raise NotFound(
                    f"product {product_key} has no topic class {levels!r}; `uplinkd topic list {product_key}` lists them"
                )
            _announce(connection, product_key, None)

    # -- what gateways need

    def find_device(self, product_key: str, name: str) -> Device | None:
        with self._read() as connection:
            row = _device_row(connection, product_key, name)
            return self._device(row) if row else None

    def find_device_by_id(self, device_id: int) -> Device | None:
        with self._read() as connection:
            row = connection.execute(_DEVICES.where(devices.c.id == device_id)).one_or_none()
            return self._device(row) if row else None

    def activate(self, device_id: int, at: int) -> None:
        with self._write() as connection:
            connection.execute(
                update(devices)
                .where(devices.c.id == device_id, devices.c.activated.is_(None))
                .values(activated=at, last_seen=func.coalesce(devices.c.last_seen, at))
            )

    def seen(self, latest: Sequence[tuple[int, int]]) -> None:
        if not latest:
            return
        with self._write() as connection:
            connection.execute(_SEEN, [{"device": device_id, "at": at} for device_id, at in latest])

    def signing_keys(self) -> list[SigningKey]:
        with self._read() as connection:
            rows = connection.execute(select(signing_keys).order_by(signing_keys.c.id)).all()
        return [
            SigningKey(row.id, self._vault.open(row.key, owner=f"signing key {row.id}"), row.retired is not None)
            for row in rows
        ]

    def changes_cursor(self) -> int:
        with self._read() as connection:
            return connection.scalar(select(func.max(changes.c.seq))) or 0

    def changes(self, after: int) -> tuple[int, list[Change]]:
        with self._read() as connection:
            first, last = connection.execute(select(func.min(changes.c.seq), func.max(changes.c.seq))).one()
            if last is None:
                return (0, []) if not after else (0, [_FORGET_EVERYTHING])
            if after > last or after < first - 1:
                return last, [_FORGET_EVERYTHING]
            rows = connection.execute(select(changes).where(changes.c.seq > after).order_by(changes.c.seq)).all()
        return last, list(dict.fromkeys(Change(ProductKey(row.product_key), row.device_id) for row in rows))

    # -- how it is done

    @contextlib.contextmanager
    def _read(self) -> Iterator[Connection]:
        with _reported(self._where), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _write(self) -> Iterator[Connection]:
        """One transaction that holds the write lock from its beginning, so that what it reads is still true when it writes."""
        with (
            _reported(self._where),
            self._engine.connect().execution_options(immediate=True) as connection,
            connection.begin(),
        ):
            yield connection

    def _insert_product(self, connection: Connection, key: ProductKey, name: str, secret: str) -> Product:
        if connection.scalar(select(products.c.id).where(products.c.key == key)):
            raise Conflict(f"there is a product with the ProductKey {key} already")
        if connection.scalar(select(products.c.id).where(products.c.name == name)):
            raise Conflict(f"there is a product named {name!r} already")
        sealed = self._vault.seal(secret.encode(), owner=f"product/{key}")
        connection.execute(insert(products), {"key": key, "name": name, "secret": sealed, "created": _now()})
        row = _product_row(connection, key)
        defaults = [
            {"product_id": row.id, "levels": levels, "right": right.value} for levels, right in names.DEFAULT_CLASSES
        ]
        connection.execute(insert(topic_classes), defaults)
        return self._product(row)

    def _new_device(self, product_id: int, product_key: str, name: str, secret: str) -> dict[str, Any]:
        return {
            "product_id": product_id,
            "name": name,
            "secret": self._vault.seal(secret.encode(), owner=_owner(product_key, name)),
            "enabled": True,
            "generation": 0,
            "created": _now(),
        }

    def _change_device(self, connection: Connection, row: Any, values: dict[str, Any]) -> None:
        connection.execute(update(devices).where(devices.c.id == row.id).values(values))
        _announce(connection, row.product_key, row.id)

    def _product(self, row: Any) -> Product:
        secret = self._vault.open(row.secret, owner=f"product/{row.key}").decode()
        return Product(row.id, ProductKey(row.key), row.name, secret, row.created)

    def _device(self, row: Any) -> Device:
        return Device(
            row.id,
            ProductKey(row.product_key),
            DeviceName(row.name),
            self._vault.open(row.secret, owner=_owner(row.product_key, row.name)).decode(),
            row.enabled,
            row.generation,
            row.created,
            row.activated,
            row.last_seen,
        )

    def _ensure_signing_key(self) -> None:
        with self._read() as connection:
            if connection.scalar(select(func.count()).select_from(signing_keys)):
                return
        with self._write() as connection:
            if not connection.scalar(select(func.count()).select_from(signing_keys)):
                sealed = self._vault.seal(secrets.token_bytes(32), owner="signing key 1")
                connection.execute(insert(signing_keys), {"id": 1, "key": sealed, "created": _now()})


@dataclass(slots=True)
class _Import:
    """What an import knows so far."""

    connection: Connection
    report: ImportReport
    products: dict[str, int]
    lines: dict[tuple[str, str], tuple[int, str]]

    def __init__(self, connection: Connection, report: ImportReport) -> None:
        self.connection, self.report = connection, report
        self.products = {row.key: row.id for row in connection.execute(select(products.c.key, products.c.id))}
        self.lines = {}

    def known(self, batch: list[ImportRow]) -> dict[tuple[str, str], bytes]:
        """The sealed secrets of those devices of the batch that are there already."""
        found: dict[tuple[str, str], bytes] = {}
        for key in {row.product_key for row in batch} & self.products.keys():
            wanted = sorted({row.device_name for row in batch if row.product_key == key})
            for start in range(0, len(wanted), 500):
                rows = self.connection.execute(
                    select(devices.c.name, devices.c.secret).where(
                        devices.c.product_id == self.products[key], devices.c.name.in_(wanted[start : start + 500])
                    )
                )
                found |= {(key, row.name): row.secret for row in rows}
        return found


_DEVICES = select(devices, products.c.key.label("product_key")).join_from(devices, products)
_SEEN = (
    update(devices)
    .where(
        devices.c.id == bindparam("device"),
        sa.or_(devices.c.last_seen.is_(None), devices.c.last_seen < bindparam("at")),
    )
    .values(last_seen=bindparam("at"))
)


def _product_row(connection: Connection, key: str) -> Any:
    row = connection.execute(select(products).where(products.c.key == key)).one_or_none()
    if row is None:
        raise NotFound(f"there is no product {key!r}; `uplinkd product list` lists them")
    return row


def _device_row(connection: Connection, product_key: str, name: str) -> Any:
    return connection.execute(_DEVICES.where(products.c.key == product_key, devices.c.name == name)).one_or_none()


def _existing_device(connection: Connection, product_key: str, name: str) -> Any:
    row = _device_row(connection, product_key, name)
    if row is None:
        _product_row(connection, product_key)
        raise NotFound(f"product {product_key} has no device {name!r}; `uplinkd device list {product_key}` lists them")
    return row


def _classes(connection: Connection, product_id: int) -> list[TopicClass]:
    rows = connection.execute(
        select(topic_classes).where(topic_classes.c.product_id == product_id).order_by(topic_classes.c.id)
    )
    return [TopicClass(row.levels, Right(row.right)) for row in rows]


def _announce(connection: Connection, product_key: str, device_id: int | None) -> None:
    """Tell every gateway that it may hold something stale; in the transaction that makes it so."""
    connection.execute(insert(changes), {"product_key": product_key, "device_id": device_id})
    last = connection.scalar(select(func.max(changes.c.seq))) or 0
    connection.execute(delete(changes).where(changes.c.seq <= last - KEPT_CHANGES))


def _owner(product_key: str, name: str) -> str:
    return f"device/{product_key}/{name}"


def _now() -> int:
    return round(time.time() * 1000)


@contextlib.contextmanager
def _reported(where: str) -> Iterator[None]:
    """Turn what a database may say into one line for people."""
    try:
        yield
    except (DBAPIError, PoolTimeoutError, sqlite3.Error) as error:
        cause = getattr(error, "orig", None) or error
        raise Unavailable(f"the registry {where} is away: {cause}") from error


def _open_sqlite(settings: Settings) -> tuple[Engine, Path]:
    path = Path(make_url(settings.database).database or "")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made here for its mode: SQLite would let everybody read it.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise Rejected(f"the registry {path} cannot be written: {error.strerror}") from error
    engine = sa.create_engine(
        settings.database,
        connect_args={"timeout": _BUSY_SECONDS, "isolation_level": None},
        pool_size=4,
        max_overflow=12,
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: object) -> None:
        for pragma in (
            "journal_mode = WAL",
            # A device that was disabled or re-keyed must stay so after a power cut; such changes are rare, so the sync is paid.
            "synchronous = FULL",
            "foreign_keys = ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("immediate")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine, path


def _revision(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return version


def _migrate(engine: Engine, path: Path, where: str) -> None:
    """Bring the schema up to date; several processes that start at once take turns."""
    with path.with_suffix(".lock").open("w") as lock:
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise Unavailable(f"another process has been migrating {where} for {_LOCK_SECONDS:g} s") from None
                time.sleep(0.05)
        with engine.connect().execution_options(immediate=True) as connection, connection.begin():
            current = _revision(connection)
            if current == REVISIONS[-1]:
                return
            if current is not None and current not in REVISIONS:
                raise Rejected(
                    f"the registry {where} was made by a newer uplinkd (schema {current}, this one knows {REVISIONS[-1]}); "
                    "use that one, or restore a backup"
                )
            from alembic import command
            from alembic.config import Config

            config = Config()
            config.set_main_option("script_location", "uplinkd.registry:migrations")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _open_vault(engine: Engine, settings: Settings, path: Path) -> Vault:
    """With the key that the registry's values are sealed with; a new one only where nothing is sealed yet."""
    with engine.connect() as connection:
        sample = connection.scalar(select(signing_keys.c.key).order_by(signing_keys.c.id.desc()).limit(1))
    return Vault(key_of(settings, sample=sample, where=str(path)) if sample else make_key(settings))
