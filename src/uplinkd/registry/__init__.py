"""Products, devices, topic classes and signing keys: what uplinkd knows, behind one Protocol and opened by `open_registry`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from uplinkd.core.groups import Group, Plan
from uplinkd.core.model import (
    App,
    Census,
    Device,
    LifecycleChange,
    Product,
    ProductKey,
    Right,
    SigningKey,
    State,
    StatusChange,
    TopicClass,
)
from uplinkd.core.operators import ApiKey, AuditEntry, Role, Scope, User

if TYPE_CHECKING:
    from collections.abc import Callable

    from uplinkd.settings import Settings

__all__ = [
    "AccessManagement",
    "Answer",
    "Change",
    "GroupManagement",
    "Groups",
    "ImportProgress",
    "ImportReport",
    "ImportRow",
    "Management",
    "Operators",
    "Registry",
    "Sighting",
    "open_registry",
]


@dataclass(frozen=True, slots=True)
class Change:
    """Something a gateway may hold in its cache has changed: one device, or (device_id None) a whole product, that is its
    topic classes or its existence; or, where app_id or group_id is given, an application or a consumer group. An empty product_key
    without either means: forget everything, the changes in between are not known; with the device_id 0: there is a new signing key."""

    @property
    def of_signing_keys(self) -> bool:
        """Whether the signing keys may be others now."""
        return not (self.product_key or self.device_id or self.app_id or self.group_id)

    product_key: ProductKey
    device_id: int | None
    app_id: int | None = None
    group_id: int | None = None


@dataclass(frozen=True, slots=True)
class ImportRow:
    """One row of a fleet file; `line` is where it stands, for people. An empty secret asks for a new one.

    A `fault` says why the row could not be read; such a row is bad whatever else it holds.
    """

    line: int
    product_key: str
    device_name: str
    secret: str = field(repr=False)
    fault: str = ""


@dataclass(slots=True)
class ImportReport:
    """What an import did, or (bad rows and not skip_bad) would have done: then `stored` is False and nothing changed.

    `bad` has the line and the fault of each bad row; `more_bad` counts those that are not in it, which a server elsewhere keeps back.
    """

    read: int = 0
    created: int = 0
    unchanged: int = 0
    secrets_made: int = 0
    products_created: list[str] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    stored: bool = False
    more_bad: int = 0

    def document(self, most: int | None = None) -> dict[str, Any]:
        """As JSON for programs, with the first `most` bad rows."""
        return {
            "stored": self.stored,
            "read": self.read,
            "created": self.created if self.stored else 0,
            "unchanged": self.unchanged,
            "secretsMade": self.secrets_made if self.stored else 0,
            "productsCreated": self.products_created if self.stored else [],
            "badRows": len(self.bad) + self.more_bad,
            "bad": [{"line": line, "reason": reason} for line, reason in self.bad[:most]],
        }


@dataclass(frozen=True, slots=True)
class Sighting:
    """A sign of life of a device at `at` (ms) from `address`: an HTTPS request; or, where `session` names the worker that
    holds it, of an MQTT session, or (`ended`) its end. Workers write at their own pace: `stamp` orders the sessions of a device,
    and what is told of an older one than the last is passed over."""

    device_id: int
    at: int
    address: str
    session: str = ""
    stamp: int = 0
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a creation was answered that comes again under the same idempotency key; None while that is not known."""

    body: bytes | None


class AccessManagement(Protocol):
    """Who may use the console and the management API: what admins do, here or at a server elsewhere. It raises as Registry does;
    what changes is in the audit."""

    def users(self) -> list[User]: ...
    def invite(self, name: str, role: Role) -> tuple[User, str]:
        """A new user and, in clear, a one-time password, which is replaced at the first sign-in."""

    def renew_password(self, name: str) -> tuple[User, str]:
        """The user and a new one-time password in clear; the user's sessions end with it."""

    def set_role(self, name: str, role: Role) -> User:
        """Conflict when no admin would be left."""

    def delete_user(self, name: str) -> None:
        """Conflict when no admin would be left."""

    def create_key(self, name: str, scope: Scope) -> tuple[ApiKey, str]:
        """A new API key and, in clear, what its owner shows; that is kept nowhere."""

    def api_keys(self) -> list[ApiKey]: ...
    def delete_key(self, name: str) -> None: ...


class Operators(AccessManagement, Protocol):
    """The same and what the operator's door needs: who signs in, sessions, the audit, answers to creations."""

    def find_user(self, name: str) -> User | None: ...
    def create_user(self, name: str, role: Role, password_hash: str, *, one_time: bool) -> User: ...
    def set_password(self, name: str, password_hash: str, *, one_time: bool, instead_of: str | None = None) -> User:
        """The user's sessions end with it. Stale where they have another than that with the hash `instead_of` by now."""

    def open_session(self, user: User, token: str) -> bool:
        """False where the user is gone, or has another password by now."""

    def session(self, token: str, *, idle: int, longest: int) -> User | None:
        """Whose session it is; None for one unused for `idle` ms, or older than `longest` ms."""

    def session_used(self, token: str, *, longest: int) -> None:
        """Remember that it was used now, and forget all sessions older than `longest` ms."""

    def close_session(self, token: str) -> None: ...

    def find_key(self, key: str) -> ApiKey | None: ...
    def key_used(self, key_id: int) -> None: ...

    def note(self, action: str, target: str, detail: str = "") -> None:
        """Record what changes nothing here: a secret was shown, a message sent down."""

    def audit(
        self, *, actor: str = "", action: str = "", target: str = "", before: int | None = None, limit: int
    ) -> list[AuditEntry]:
        """The newest entries, newest first: of `actor`, of actions and targets that begin so, with ids below `before`."""

    def begin_answer(self, key: str, request: str) -> Answer | None:
        """What was answered under the idempotency key; None for a new one, which is then under way until `keep_answer` or
        `forget_answer`. Conflict when it came with another `request`. Kept for a day."""

    def keep_answer(self, key: str, body: bytes) -> None: ...
    def forget_answer(self, key: str) -> None: ...


class GroupManagement(Protocol):
    """Consumer groups as operators look after them, here or at a server elsewhere. It raises as Registry does; what changes is in
    the audit."""

    def create(self, name: str, plan: Plan, *, start: int | None = None) -> Group:
        """A new group, whose messages are those stored from `start` on (ms), or from now on. One with a webhook has a secret."""

    def all(self) -> list[Group]:
        """In the order in which they were made."""

    def get(self, name: str) -> Group: ...
    def change(self, name: str, plan: Plan, *, version: str | None = None) -> Group:
        """Take `plan` instead of the one before; the position stays. A first webhook comes with a secret."""

    def reset(self, name: str, start: int, *, version: str | None = None) -> Group:
        """Give it the messages stored from `start` (ms) on, again those that it had; what was under way is forgotten."""

    def renew_secret(self, name: str, *, version: str | None = None) -> Group:
        """A new secret for its webhook; the old one signs nothing any more."""

    def delete(self, name: str, *, version: str | None = None) -> None:
        """Delete the group, and with it its dead letters."""


class Groups(GroupManagement, Protocol):
    """The same and what delivers to groups needs."""

    def by_id(self, group_id: int) -> Group | None: ...
    def by_name(self, name: str) -> Group | None: ...


class ImportProgress(Protocol):
    """Hears how far an import is: what is done now, such as `importing`; which share of it, 0 to 1; how many rows. None where
    that is not known."""

    def __call__(self, doing: str, share: float | None, rows: int | None) -> None: ...


class Management(Protocol):
    """What operators do, here or at a server elsewhere; what changes is in the audit. Operators' mistakes raise
    `core.errors.Rejected` (NotFound, Conflict); a database or server that is away raises `core.errors.Unavailable`.

    A secret is empty where whoever asks may not see it; that of a product or device that is made never is.
    """

    @property
    def operators(self) -> AccessManagement: ...
    @property
    def groups(self) -> GroupManagement: ...

    def close(self) -> None: ...

    def create_product(self, name: str, *, key: str | None = None, secret: str | None = None) -> Product: ...
    def products(self) -> list[Product]: ...
    def product(self, key: str) -> Product: ...
    def delete_product(self, key: str, *, with_devices: bool = False) -> int:
        """How many devices went with it; Conflict for a product that has devices, without `with_devices`."""

    def create_device(self, product_key: str, name: str | None = None, *, secret: str | None = None) -> Device: ...
    def device(self, product_key: str, name: str) -> Device: ...
    def devices(self, product_key: str, *, prefix: str = "") -> Iterator[Device]:
        """By name, those whose name begins with `prefix`; read in batches, so a large fleet costs no memory."""

    def set_enabled(self, product_key: str, name: str, enabled: bool) -> Device: ...
    def reset_secret(self, product_key: str, name: str) -> Device: ...
    def delete_device(self, product_key: str, name: str) -> None: ...
    def import_fleet(
        self, stream: BinaryIO, *, skip_bad: bool = False, progress: ImportProgress | None = None
    ) -> ImportReport:
        """Import devices from CSV, see `registry.fleet`; Rejected for a file that cannot be read as a whole."""

    def export_fleet(self, product_key: str) -> Iterator[str]:
        """The product's devices with their secrets as CSV, in parts; NotFound comes before the first."""

    def topic_classes(self, product_key: str) -> list[TopicClass]: ...
    def add_topic_class(self, product_key: str, levels: str, right: Right) -> TopicClass: ...
    def remove_topic_class(self, product_key: str, levels: str) -> None: ...

    def create_app(self, name: str, *, products: Sequence[str] = (), sends: bool = True) -> tuple[App, str]:
        """A new application and its secret in clear, which is kept nowhere."""

    def apps(self) -> list[App]: ...
    def app(self, name: str) -> App: ...
    def grant_app(self, name: str, products: Sequence[str]) -> App:
        """Let the application reach `products` too; what it has already stays."""

    def withdraw_app(self, name: str, products: Sequence[str]) -> App:
        """Take `products` from the application; NotFound, and nothing changes, when it does not have one of them."""

    def renew_app_secret(self, name: str) -> tuple[App, str]:
        """A new secret, in clear; within a second the old one is worth nothing and its connections are closed."""

    def delete_app(self, name: str) -> None: ...


class Registry(Management, Protocol):
    """The same and what the console and gateways need. Synchronous and safe to call from any thread. What changes is in the audit
    on behalf of `core.operators.acting`."""

    @property
    def operators(self) -> Operators: ...
    @property
    def groups(self) -> Groups: ...

    def check(self) -> None:
        """Look at all that is kept; raise Unavailable where it is damaged. Takes 0.7 s for a million devices."""

    def product_page(self, *, text: str = "", after: int = 0, limit: int) -> list[Product]:
        """In the order in which they were made, those with ids above `after`, whose name or key has `text` in it."""

    def count_products(self) -> int: ...

    # A `version` that is not the current one (of a product, device, application) raises `core.errors.Stale`.
    def rename_product(self, key: str, name: str, *, version: str | None = None) -> Product: ...
    def delete_product(self, key: str, *, with_devices: bool = False, version: str | None = None) -> int: ...
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
        """At most `limit` devices by name, those beyond `after`; in `state`, where online means heard of within `timeout` ms."""

    def census(self, product_key: str | None = None, *, timeout: int) -> Census:
        """How many devices a product has, or all have together; it looks at each, in 100,000 some 50 ms."""

    def set_enabled(self, product_key: str, name: str, enabled: bool, *, version: str | None = None) -> Device: ...
    def reset_secret(self, product_key: str, name: str, *, version: str | None = None) -> Device: ...
    def delete_device(self, product_key: str, name: str, *, version: str | None = None) -> None: ...
    def delete_devices(self, product_key: str, limit: int) -> int:
        """Delete at most `limit` devices of the product; how many there were to delete."""

    def import_devices(
        self,
        rows: Iterable[ImportRow],
        *,
        skip_bad: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> ImportReport: ...
    def delete_app(self, name: str, *, version: str | None = None) -> None: ...
    def set_app(self, name: str, products: Sequence[str], *, version: str | None = None) -> App:
        """Let the application reach exactly `products`."""

    # what gateways need
    def find_app(self, key: str) -> App | None: ...
    def find_app_by_id(self, app_id: int) -> App | None: ...
    def app_secret(self, key: str) -> str | None:
        """The secret in clear, by which AMQP clients sign; None for an unknown key, empty for an application that was made before
        they were kept."""

    def find_device(self, product_key: str, name: str) -> Device | None: ...
    def find_device_by_id(self, device_id: int) -> Device | None: ...
    def activate(self, logins: Sequence[tuple[int, int]]) -> None:
        """Record logins, (device id, ms): the first of a device stays as `activated`. One write for many, which wait for the disk."""

    def sighted(self, sightings: Sequence[Sighting], *, now: int, timeout: int) -> list[StatusChange]:
        """Record signs of life in their order; give the status changes that they make at `now`.

        A device is online while it is enabled and has an MQTT session, or an HTTPS request less than `timeout` ms ago. An
        older time than the recorded one, or a deleted device, is passed over; a time beyond `now` counts as `now`.

        Changes are kept until they are `told`. Of each device one is given at a time, by whatever makes or tells changes: the
        next follows when the one before was told, or somebody could be left with the wrong one.
        """

    def expired(self, *, now: int, timeout: int, limit: int) -> list[StatusChange]:
        """Devices, at most `limit`, that have gone offline because nothing was heard of them for `timeout` ms."""

    def abandoned(self, session: str | None, *, now: int, timeout: int) -> list[StatusChange]:
        """End every MQTT session that the worker `session` held: it has died; with a dot at its end, of all workers whose names begin
        so. None: every session there is, before the first worker starts, and with them the order of sessions so far."""

    def session_holders(self) -> set[str]:
        """The workers that hold MQTT sessions."""

    def last_session(self) -> int:
        """The highest stamp that a session has had, 0 without any."""

    def clock_jumped(self, by: int, *, now: int, lately: int) -> None:
        """The clock was set `by` ms ahead (or back): move the times of devices that are online with it, none beyond `now`. What
        was recorded within the last `lately` ms may be by the new clock already."""

    def untold(self, limit: int) -> list[StatusChange]:
        """Status changes that were not published yet: the oldest of each device, oldest first."""

    def told(self, changes: Sequence[int]) -> list[StatusChange]:
        """The status changes with these ids are published: forget them. The next ones of their devices, to be published now."""

    def lifecycle(self, limit: int) -> list[LifecycleChange]:
        """What happened to devices and was not published yet, oldest first."""

    def lifecycle_told(self, upto: int) -> None:
        """Those with ids up to `upto` are published: forget them."""

    def signing_keys(self) -> list[SigningKey]: ...
    def changes_cursor(self) -> int:
        """Where the changes stand now; what is read from here on is at least that fresh."""

    def changes(self, after: int) -> tuple[int, list[Change]]:
        """(cursor for the next call, what changed after the cursor `after`, each thing once).

        The registry keeps a bounded number of changes: for a cursor older than these, or from another life of the
        database (a restored backup), the one change is `Change("", None)`.
        """


def open_registry(settings: Settings) -> Registry:
    """The registry that `settings` names, brought to the current schema; made when it is not there yet."""
    from uplinkd.registry.sql import SqlRegistry

    return SqlRegistry.open(settings)
