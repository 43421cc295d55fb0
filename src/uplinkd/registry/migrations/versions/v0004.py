"""0004: consumer groups, what happens to devices, secrets of applications that can be proven."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from uplinkd.registry.schema import words

revision = "0004"
down_revision = "0003"

_Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("apps", sa.Column("secret", sa.LargeBinary()))
    op.add_column("changes", sa.Column("group_id", sa.BigInteger()))
    op.create_table(
        "groups",
        sa.Column("id", _Id, nullable=False),
        sa.Column("name", words(64), nullable=False),
        sa.Column("all_products", sa.Boolean(), nullable=False),
        sa.Column("topic", words(128), nullable=False),
        sa.Column("kinds", words(64), nullable=False),
        sa.Column("ack_wait", sa.Float(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.Column("url", words(500)),
        sa.Column("form", words(16)),
        sa.Column("batch", sa.Integer()),
        sa.Column("linger", sa.Float()),
        sa.Column("lanes", sa.Integer()),
        sa.Column("timeout", sa.Float()),
        sa.Column("secret", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("id", name="pk_groups"),
        sa.UniqueConstraint("name", name="uq_groups_name"),
        sqlite_autoincrement=True,
    )
    for other in ("product", "app"):
        op.create_table(
            f"group_{other}s",
            sa.Column("group_id", _Id, nullable=False),
            sa.Column(f"{other}_id", _Id, nullable=False),
            sa.PrimaryKeyConstraint("group_id", f"{other}_id", name=f"pk_group_{other}s"),
            sa.ForeignKeyConstraint(
                ["group_id"], ["groups.id"], name=f"fk_group_{other}s_group_id", ondelete="CASCADE"
            ),
            sa.ForeignKeyConstraint(
                [f"{other}_id"], [f"{other}s.id"], name=f"fk_group_{other}s_{other}_id", ondelete="CASCADE"
            ),
        )
    op.create_table(
        "lifecycle_changes",
        sa.Column("id", _Id, nullable=False),
        sa.Column("product_key", words(30), nullable=False),
        sa.Column("device_name", words(64), nullable=False),
        sa.Column("action", words(8), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_lifecycle_changes"),
        sqlite_autoincrement=True,
    )
