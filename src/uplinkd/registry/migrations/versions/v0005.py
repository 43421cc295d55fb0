"""0005: the sessions of a worker, and the last one of all, are found without looking at every device."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    for column in ("session", "session_at"):
        given = sa.text(f"{column} IS NOT NULL")
        op.create_index(
            f"ix_devices_{column}", "devices", [column], unique=False, sqlite_where=given, postgresql_where=given
        )
