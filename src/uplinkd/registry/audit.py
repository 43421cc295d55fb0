"""Who changed what: an entry in the same transaction as the change, so that there is neither without the other."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import delete, func, insert, select
from sqlalchemy.engine import Connection

from uplinkd.core.operators import Actor, AuditEntry, acting
from uplinkd.registry.schema import audit, folded

__all__ = ["KEPT_ENTRIES", "note", "page"]

KEPT_ENTRIES = 200_000
_LONGEST = 255


def note(connection: Connection, action: str, target: str, detail: str = "") -> None:
    """Record that `acting` does `action` to `target`; the oldest entries beyond KEPT_ENTRIES go. Never give it a secret."""
    actor = acting.get()
    result = connection.execute(
        insert(audit).values(
            at=time.time_ns() // 1_000_000,
            actor=actor.name[:64],
            way=actor.way,
            address=actor.address[:45],
            action=action,
            target=target[:_LONGEST],
            detail=detail[:_LONGEST],
        )
    )
    assert result.inserted_primary_key is not None
    connection.execute(delete(audit).where(audit.c.id <= result.inserted_primary_key[0] - KEPT_ENTRIES))


def page(
    connection: Connection,
    *,
    actor: str = "",
    action: str = "",
    target: str = "",
    before: int | None = None,
    limit: int,
) -> list[AuditEntry]:
    """The newest entries, newest first: of one actor, of actions that begin so, of targets that begin so; with ids below
    `before`."""
    statement = select(audit).order_by(audit.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(audit.c.id < before)
    if actor:
        statement = statement.where(audit.c.actor == actor)
    if action:
        statement = statement.where(func.lower(audit.c.action).startswith(folded(action), autoescape=True))
    if target:
        statement = statement.where(func.lower(audit.c.target).startswith(folded(target), autoescape=True))
    return [_entry(row) for row in connection.execute(statement)]


def _entry(row: Any) -> AuditEntry:
    return AuditEntry(row.id, row.at, Actor(row.actor, row.way, row.address), row.action, row.target, row.detail)
