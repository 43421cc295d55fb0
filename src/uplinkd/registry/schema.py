"""The registry's tables, and the revisions that led to them; times are milliseconds since 1970 UTC."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

__all__ = ["REVISIONS", "changes", "devices", "metadata", "products", "signing_keys", "topic_classes"]

REVISIONS: tuple[str, ...] = ("0001",)
"""Every Alembic revision, oldest first: known here so that an up-to-date registry opens without Alembic (160 ms)."""

# SQLite numbers rows by itself only where the type is INTEGER, which there has 64 bits.
_Id = BigInteger().with_variant(Integer(), "sqlite")

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)

products = Table(
    "products",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("key", String(30), nullable=False, unique=True),
    Column("name", String(30), nullable=False, unique=True),
    Column("secret", LargeBinary, nullable=False),
    Column("created", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

devices = Table(
    "devices",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("product_id", _Id, ForeignKey("products.id", ondelete="CASCADE"), nullable=False),
    Column("name", String(64), nullable=False),
    Column("secret", LargeBinary, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("activated", BigInteger),
    Column("last_seen", BigInteger),
    UniqueConstraint("product_id", "name"),
    sqlite_autoincrement=True,
)

topic_classes = Table(
    "topic_classes",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("product_id", _Id, ForeignKey("products.id", ondelete="CASCADE"), nullable=False),
    Column("levels", String(128), nullable=False),
    Column("right", String(9), nullable=False),
    UniqueConstraint("product_id", "levels"),
    sqlite_autoincrement=True,
)

changes = Table(
    "changes",
    metadata,
    Column("seq", _Id, primary_key=True),
    Column("product_key", String(30), nullable=False),
    Column("device_id", BigInteger),
    sqlite_autoincrement=True,
)

signing_keys = Table(
    "signing_keys",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("key", LargeBinary, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("retired", BigInteger),
)
