"""The registry's tables, and the revisions that led to them; times are milliseconds since 1970 UTC."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

__all__ = [
    "NUMBERED",
    "REVISIONS",
    "answers",
    "api_keys",
    "app_products",
    "apps",
    "audit",
    "changes",
    "devices",
    "folded",
    "group_apps",
    "group_products",
    "groups",
    "lifecycle_changes",
    "metadata",
    "products",
    "sessions",
    "signing_keys",
    "status_changes",
    "topic_classes",
    "users",
    "words",
]

REVISIONS: tuple[str, ...] = ("0001", "0002", "0003", "0004", "0005")
"""Every Alembic revision, oldest first: known here so that an up-to-date registry opens without Alembic (160 ms)."""

# SQLite numbers rows by itself only where the type is INTEGER, which there has 64 bits.
_Id = BigInteger().with_variant(Integer(), "sqlite")


def words(length: int) -> String:
    """A column of text whose order is that of its bytes in every database, so that a prefix is a range of the index. SQLite does not
    enforce lengths, and what fits there must fit elsewhere."""
    return String(length).with_variant(Text(collation="C"), "postgresql")


def folded(text: str) -> str:
    """As lower() of a column of text has it in every database, which knows the letters of ASCII alone."""
    return "".join(char.lower() if char.isascii() else char for char in text)


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
    Column("key", words(30), nullable=False, unique=True),
    Column("name", words(30), nullable=False, unique=True),
    Column("secret", LargeBinary, nullable=False),
    Column("created", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

devices = Table(
    "devices",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("product_id", _Id, ForeignKey("products.id", ondelete="CASCADE"), nullable=False),
    Column("name", words(64), nullable=False),
    Column("secret", LargeBinary, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("activated", BigInteger),
    Column("last_seen", BigInteger),
    # Presence: whether the last status change was `online`, the latest HTTPS request, where the device was heard from, and
    # which worker holds its MQTT session; `session_at` orders sessions, see registry.Sighting.
    Column("online", Boolean, nullable=False, server_default=false()),
    Column("requested", BigInteger),
    Column("address", words(45)),
    Column("session", words(64)),
    Column("session_at", BigInteger),
    UniqueConstraint("product_id", "name"),
    sqlite_autoincrement=True,
)
# Who is online is asked every few seconds, among many who are not.
Index("ix_devices_online", devices.c.requested, sqlite_where=text("online = 1"), postgresql_where=text("online = true"))
# Each worker that starts ends what its predecessor held, and asks for the last stamp. Of a fleet on HTTPS these are empty.
for _column in (devices.c.session, devices.c.session_at):
    _given = text(f"{_column.name} IS NOT NULL")
    Index(f"ix_devices_{_column.name}", _column, sqlite_where=_given, postgresql_where=_given)

status_changes = Table(
    "status_changes",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("product_key", words(30), nullable=False),
    Column("device_name", words(64), nullable=False),
    Column("online", Boolean, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("last_seen", BigInteger, nullable=False),
    Column("address", words(45), nullable=False),
    sqlite_autoincrement=True,
)
# Those of one device are told one after the other.
Index("ix_status_changes_device", status_changes.c.product_key, status_changes.c.device_name)

topic_classes = Table(
    "topic_classes",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("product_id", _Id, ForeignKey("products.id", ondelete="CASCADE"), nullable=False),
    Column("levels", words(128), nullable=False),
    Column("right", words(9), nullable=False),
    UniqueConstraint("product_id", "levels"),
    sqlite_autoincrement=True,
)

changes = Table(
    "changes",
    metadata,
    Column("seq", _Id, primary_key=True),
    Column("product_key", words(30), nullable=False),
    Column("device_id", BigInteger),
    Column("app_id", BigInteger),
    Column("group_id", BigInteger),
    sqlite_autoincrement=True,
)

apps = Table(
    "apps",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("key", words(32), nullable=False, unique=True),
    Column("name", words(64), nullable=False, unique=True),
    Column("secret_hash", LargeBinary, nullable=False),
    # Sealed, for AMQP, where clients prove that they know it; none of an application that was made before there was AMQP.
    Column("secret", LargeBinary),
    Column("sends", Boolean, nullable=False),
    Column("created", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

app_products = Table(
    "app_products",
    metadata,
    Column("app_id", _Id, ForeignKey("apps.id", ondelete="CASCADE"), primary_key=True),
    Column("product_id", _Id, ForeignKey("products.id", ondelete="CASCADE"), primary_key=True),
)

signing_keys = Table(
    "signing_keys",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("key", LargeBinary, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("retired", BigInteger),
)

users = Table(
    "users",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", words(64), nullable=False, unique=True),
    Column("role", words(8), nullable=False),
    Column("password_hash", words(255), nullable=False),
    Column("one_time", Boolean, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("last_sign_in", BigInteger),
    sqlite_autoincrement=True,
)

sessions = Table(
    "sessions",
    metadata,
    Column("token_hash", LargeBinary, primary_key=True),
    Column("user_id", _Id, ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("used", BigInteger, nullable=False),
)
Index("ix_sessions_user", sessions.c.user_id)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", words(64), nullable=False, unique=True),
    Column("scope", words(8), nullable=False),
    Column("key_hash", LargeBinary, nullable=False, unique=True),
    Column("hint", words(16), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("last_used", BigInteger),
    sqlite_autoincrement=True,
)

audit = Table(
    "audit",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", words(64), nullable=False),
    Column("way", words(8), nullable=False),
    Column("address", words(45), nullable=False),
    Column("action", words(32), nullable=False),
    Column("target", words(255), nullable=False),
    Column("detail", words(255), nullable=False),
    sqlite_autoincrement=True,
)

answers = Table(
    "answers",
    metadata,
    Column("key_hash", LargeBinary, primary_key=True),
    Column("request_hash", LargeBinary, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("answer", LargeBinary),
)

groups = Table(
    "groups",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", words(64), nullable=False, unique=True),
    Column("all_products", Boolean, nullable=False),
    Column("topic", words(128), nullable=False),
    Column("kinds", words(64), nullable=False),
    Column("ack_wait", Float, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("paused", Boolean, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("created", BigInteger, nullable=False),
    # Its webhook, all of it null without one.
    Column("url", words(500)),
    Column("form", words(16)),
    Column("batch", Integer),
    Column("linger", Float),
    Column("lanes", Integer),
    Column("timeout", Float),
    Column("secret", LargeBinary),
    sqlite_autoincrement=True,
)

group_products = Table(
    "group_products",
    metadata,
    Column("group_id", _Id, ForeignKey("groups.id", ondelete="CASCADE"), primary_key=True),
    Column("product_id", _Id, ForeignKey("products.id", ondelete="CASCADE"), primary_key=True),
)

group_apps = Table(
    "group_apps",
    metadata,
    Column("group_id", _Id, ForeignKey("groups.id", ondelete="CASCADE"), primary_key=True),
    Column("app_id", _Id, ForeignKey("apps.id", ondelete="CASCADE"), primary_key=True),
)

lifecycle_changes = Table(
    "lifecycle_changes",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("product_key", words(30), nullable=False),
    Column("device_name", words(64), nullable=False),
    Column("action", words(8), nullable=False),
    Column("at", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

NUMBERED = tuple(
    table.autoincrement_column for table in metadata.sorted_tables if table.autoincrement_column is not None
)
"""The columns that the database numbers by itself; a number is never given twice."""
