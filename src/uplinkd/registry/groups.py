"""Consumer groups in the registry's database."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import Select, delete, insert, select, update
from sqlalchemy.engine import Connection

from uplinkd.core import names
from uplinkd.core.errors import Conflict, NotFound, Rejected, Stale
from uplinkd.core.groups import Form, Group, Kind, Plan, Webhook, check_plan, shown_url
from uplinkd.core.model import ProductKey
from uplinkd.registry import audit
from uplinkd.registry.schema import apps, changes, group_apps, group_products, groups, products
from uplinkd.registry.vault import Vault

__all__ = ["SqlGroups", "announce_groups"]

_LATEST = 2**53
_AHEAD = 60_000  # ms that the clock of who asks may be fast
_NO_WEBHOOK = dict.fromkeys(("url", "form", "batch", "linger", "lanes", "timeout", "secret"))

Transactions = Callable[[], AbstractContextManager[Connection]]


class SqlGroups:
    """`registry.Groups` over the transactions of a SqlRegistry."""

    def __init__(self, reading: Transactions, writing: Transactions, vault: Vault) -> None:
        self._reading = reading
        self._writing = writing
        self._vault = vault

    def create(self, name: str, plan: Plan, *, start: int | None = None) -> Group:
        names.check_group_name(name)
        check_plan(plan)
        now = time.time_ns() // 1_000_000
        start = now if start is None else _checked_start(start, now)
        with self._writing() as connection:
            if connection.execute(select(groups.c.id).where(groups.c.name == name)).first():
                raise Conflict(f"there is a consumer group {name!r} already; names are unique")
            facts = {"name": name, "start": start, "generation": 1, "created": now}
            made = connection.execute(insert(groups).values(**facts, **_columns(plan), **self._hook(name, plan, "")))
            assert made.inserted_primary_key is not None
            group_id = made.inserted_primary_key[0]
            _connect(connection, group_id, plan)
            announce_groups(connection, [group_id])
            audit.note(connection, "group.create", name, _described(plan))
            return self._named(connection, name)

    def all(self) -> list[Group]:
        with self._reading() as connection:
            return self._groups(connection, select(groups).order_by(groups.c.id))

    def get(self, name: str) -> Group:
        with self._reading() as connection:
            return self._named(connection, name)

    def by_id(self, group_id: int) -> Group | None:
        with self._reading() as connection:
            return next(iter(self._groups(connection, select(groups).where(groups.c.id == group_id))), None)

    def by_name(self, name: str) -> Group | None:
        with self._reading() as connection:
            return next(iter(self._groups(connection, select(groups).where(groups.c.name == name))), None)

    def change(self, name: str, plan: Plan, *, version: str | None = None) -> Group:
        check_plan(plan)
        with self._writing() as connection:
            group = self._named(connection, name, version)
            facts = {**_columns(plan), **self._hook(name, plan, group.secret)}
            connection.execute(update(groups).where(groups.c.id == group.id).values(facts))
            for table in (group_products, group_apps):
                connection.execute(delete(table).where(table.c.group_id == group.id))
            _connect(connection, group.id, plan)
            announce_groups(connection, [group.id])
            audit.note(connection, "group.change", name, _described(plan))
            return self._named(connection, name)

    def reset(self, name: str, start: int, *, version: str | None = None) -> Group:
        with self._writing() as connection:
            group = self._named(connection, name, version)
            facts = {"start": _checked_start(start, time.time_ns() // 1_000_000), "generation": group.generation + 1}
            connection.execute(update(groups).where(groups.c.id == group.id).values(facts))
            announce_groups(connection, [group.id])
            audit.note(connection, "group.reset", name, f"to {start}")
            return self._named(connection, name)

    def renew_secret(self, name: str, *, version: str | None = None) -> Group:
        with self._writing() as connection:
            group = self._named(connection, name, version)
            if group.plan.webhook is None:
                raise Rejected(f"consumer group {name!r} has no webhook, and so no secret that signs")
            facts = self._hook(name, group.plan, "")
            connection.execute(update(groups).where(groups.c.id == group.id).values(facts))
            announce_groups(connection, [group.id])
            audit.note(connection, "group.renew-secret", name)
            return self._named(connection, name)

    def delete(self, name: str, *, version: str | None = None) -> None:
        with self._writing() as connection:
            group = self._named(connection, name, version)
            connection.execute(delete(groups).where(groups.c.id == group.id))
            announce_groups(connection, [group.id])
            audit.note(connection, "group.delete", name)

    def _hook(self, name: str, plan: Plan, secret: str) -> dict[str, Any]:
        """The columns of the plan's webhook; `secret` is the one it has, or empty for a new one."""
        webhook = plan.webhook
        if webhook is None:
            return dict(_NO_WEBHOOK)
        sealed = self._vault.seal((secret or names.make_webhook_secret()).encode(), owner=_owner(name))
        return {
            "url": webhook.url,
            "form": webhook.form.value,
            "batch": webhook.batch,
            "linger": webhook.linger,
            "lanes": webhook.lanes,
            "timeout": webhook.timeout,
            "secret": sealed,
        }

    def _named(self, connection: Connection, name: str, version: str | None = None) -> Group:
        group = next(iter(self._groups(connection, select(groups).where(groups.c.name == name))), None)
        if group is None:
            raise NotFound(f"there is no consumer group {name!r}; `uplinkd group list` shows them")
        if version is not None and version != group.version:
            raise Stale(
                f"consumer group {name!r} was changed meanwhile: its version is {group.version!r}, not {version!r}; look at it again"
            )
        return group

    def _groups(self, connection: Connection, statement: Select[Any]) -> list[Group]:
        rows = connection.execute(statement).all()
        of_products: dict[int, list[ProductKey]] = {row.id: [] for row in rows}
        of_apps: dict[int, list[str]] = {row.id: [] for row in rows}
        for group_id, key in connection.execute(
            select(group_products.c.group_id, products.c.key)
            .join(products)
            .where(group_products.c.group_id.in_(of_products))
            .order_by(products.c.id)
        ):
            of_products[group_id].append(ProductKey(key))
        for group_id, name in connection.execute(
            select(group_apps.c.group_id, apps.c.name)
            .join(apps)
            .where(group_apps.c.group_id.in_(of_apps))
            .order_by(apps.c.id)
        ):
            of_apps[group_id].append(name)
        return [self._group(row, tuple(of_products[row.id]), tuple(of_apps[row.id])) for row in rows]

    def _group(self, row: Any, product_keys: tuple[ProductKey, ...], app_names: tuple[str, ...]) -> Group:
        webhook, secret = None, ""
        if row.url is not None:
            webhook = Webhook(
                url=row.url,
                form=Form(row.form),
                batch=row.batch,
                linger=row.linger,
                lanes=row.lanes,
                timeout=row.timeout,
            )
            secret = self._vault.open(row.secret, owner=_owner(row.name)).decode()
        plan = Plan(
            products=None if row.all_products else product_keys,
            topic=row.topic,
            kinds=frozenset(map(Kind, row.kinds.split())),
            ack_wait=row.ack_wait,
            tries=row.tries,
            apps=app_names,
            webhook=webhook,
            paused=row.paused,
        )
        return Group(row.id, row.name, plan, row.start, row.generation, row.created, secret)


def announce_groups(connection: Connection, group_ids: list[int]) -> None:
    """Tell, with this transaction, who delivers to these groups that they have changed."""
    if group_ids:
        connection.execute(insert(changes), [{"product_key": "", "group_id": group_id} for group_id in group_ids])


def _columns(plan: Plan) -> dict[str, Any]:
    return {
        "all_products": plan.products is None,
        "topic": plan.topic,
        "kinds": " ".join(kind for kind in Kind if kind in plan.kinds),
        "ack_wait": plan.ack_wait,
        "tries": plan.tries,
        "paused": plan.paused,
    }


def _connect(connection: Connection, group_id: int, plan: Plan) -> None:
    """Write down the plan's products and applications; raise NotFound when one is not there."""
    for key in dict.fromkeys(plan.products or ()):
        product_id = connection.execute(select(products.c.id).where(products.c.key == key)).scalar()
        if product_id is None:
            raise NotFound(f"there is no product {key!r}; `uplinkd product list` shows them")
        connection.execute(insert(group_products).values(group_id=group_id, product_id=product_id))
    for name in dict.fromkeys(plan.apps):
        app_id = connection.execute(select(apps.c.id).where(apps.c.name == name)).scalar()
        if app_id is None:
            raise NotFound(
                f"there is no application {name!r}; `uplinkd app list` shows them, `uplinkd app create {name}` makes it"
            )
        connection.execute(insert(group_apps).values(group_id=group_id, app_id=app_id))


def _described(plan: Plan) -> str:
    what = "all products" if plan.products is None else ", ".join(plan.products) or "no product"
    to = f" → {shown_url(plan.webhook.url)}" if plan.webhook else f" → {', '.join(plan.apps)}" if plan.apps else ""
    kinds = " ".join(kind for kind in Kind if kind in plan.kinds)
    return f"{kinds} of {what}{' ' + plan.topic if plan.topic else ''}{to}{' (paused)' if plan.paused else ''}"


def _checked_start(start: int, now: int) -> int:
    if not 0 <= start < _LATEST:
        raise Rejected(f"start = {start}: it is a time in milliseconds since 1970")
    if start > now + _AHEAD:
        raise Rejected("the start lies in the future: a group begins now at the latest")
    return start


def _owner(name: str) -> str:
    return f"group/{name}"
