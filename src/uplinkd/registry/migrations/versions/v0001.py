"""0001: products, devices, topic classes, changes, signing keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from uplinkd.registry.schema import words

revision = "0001"
down_revision = None

_Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "products",
        sa.Column("id", _Id, nullable=False),
        sa.Column("key", words(30), nullable=False),
        sa.Column("name", words(30), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_products"),
        sa.UniqueConstraint("key", name="uq_products_key"),
        sa.UniqueConstraint("name", name="uq_products_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "devices",
        sa.Column("id", _Id, nullable=False),
        sa.Column("product_id", _Id, nullable=False),
        sa.Column("name", words(64), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.Column("activated", sa.BigInteger()),
        sa.Column("last_seen", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pk_devices"),
        sa.ForeignKeyConstraint(["product_id"], ["products.id"], name="fk_devices_product_id", ondelete="CASCADE"),
        sa.UniqueConstraint("product_id", "name", name="uq_devices_product_id_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "topic_classes",
        sa.Column("id", _Id, nullable=False),
        sa.Column("product_id", _Id, nullable=False),
        sa.Column("levels", words(128), nullable=False),
        sa.Column("right", words(9), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_topic_classes"),
        sa.ForeignKeyConstraint(
            ["product_id"], ["products.id"], name="fk_topic_classes_product_id", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("product_id", "levels", name="uq_topic_classes_product_id_levels"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "changes",
        sa.Column("seq", _Id, nullable=False),
        sa.Column("product_key", words(30), nullable=False),
        sa.Column("device_id", sa.BigInteger()),
        sa.PrimaryKeyConstraint("seq", name="pk_changes"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "signing_keys",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.Column("retired", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pk_signing_keys"),
    )
