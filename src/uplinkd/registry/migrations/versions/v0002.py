"""0002: presence of devices, status changes that wait to be published, applications."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from uplinkd.registry.schema import words

revision = "0002"
down_revision = "0001"

_Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("devices", sa.Column("online", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("devices", sa.Column("requested", sa.BigInteger()))
    op.execute("UPDATE devices SET requested = last_seen")
    op.add_column("devices", sa.Column("address", words(45)))
    op.add_column("devices", sa.Column("session", words(64)))
    op.add_column("devices", sa.Column("session_at", sa.BigInteger()))
    op.create_index(
        "ix_devices_online",
        "devices",
        ["requested"],
        sqlite_where=sa.text("online = 1"),
        postgresql_where=sa.text("online = true"),
    )
    op.add_column("changes", sa.Column("app_id", sa.BigInteger()))
    op.create_table(
        "status_changes",
        sa.Column("id", _Id, nullable=False),
        sa.Column("product_key", words(30), nullable=False),
        sa.Column("device_name", words(64), nullable=False),
        sa.Column("online", sa.Boolean(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("last_seen", sa.BigInteger(), nullable=False),
        sa.Column("address", words(45), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_status_changes"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_status_changes_device", "status_changes", ["product_key", "device_name"])
    op.create_table(
        "apps",
        sa.Column("id", _Id, nullable=False),
        sa.Column("key", words(32), nullable=False),
        sa.Column("name", words(64), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("sends", sa.Boolean(), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_apps"),
        sa.UniqueConstraint("key", name="uq_apps_key"),
        sa.UniqueConstraint("name", name="uq_apps_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "app_products",
        sa.Column("app_id", _Id, nullable=False),
        sa.Column("product_id", _Id, nullable=False),
        sa.PrimaryKeyConstraint("app_id", "product_id", name="pk_app_products"),
        sa.ForeignKeyConstraint(["app_id"], ["apps.id"], name="fk_app_products_app_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["product_id"], ["products.id"], name="fk_app_products_product_id", ondelete="CASCADE"),
    )
