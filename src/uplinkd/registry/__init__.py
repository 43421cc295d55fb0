"""Products, devices, topic classes and signing keys: what uplinkd knows, behind one Protocol and opened by `open_registry`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from uplinkd.core.model import Device, Product, ProductKey, Right, SigningKey, TopicClass

if TYPE_CHECKING:
    from collections.abc import Callable

    from uplinkd.settings import Settings

__all__ = ["Change", "ImportReport", "ImportRow", "Registry", "open_registry"]


@dataclass(frozen=True, slots=True)
class Change:
    """Something a gateway may hold in its cache has changed: one device, or (device_id None) a whole product, that is its
    topic classes or its existence. An empty product_key means: forget everything, the changes in between are not known."""

    product_key: ProductKey
    device_id: int | None


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
    """What an import did, or (bad rows and not skip_bad) would have done: then `stored` is False and nothing changed."""

    read: int = 0
    created: int = 0
    unchanged: int = 0
    secrets_made: int = 0
    products_created: list[str] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    stored: bool = False


class Registry(Protocol):
    """Synchronous and safe to call from any thread. Operators' mistakes raise `core.errors.Rejected` (NotFound,
    Conflict); a database that is away raises `core.errors.Unavailable`."""

    def close(self) -> None: ...

    # what operators do
    def create_product(self, name: str, *, key: str | None = None, secret: str | None = None) -> Product: ...
    def products(self) -> list[Product]: ...
    def product(self, key: str) -> Product: ...
    def delete_product(self, key: str, *, with_devices: bool = False) -> int: ...
    def create_device(self, product_key: str, name: str | None = None, *, secret: str | None = None) -> Device: ...
    def device(self, product_key: str, name: str) -> Device: ...
    def devices(self, product_key: str, *, prefix: str = "") -> Iterator[Device]:
        """By name, those whose name begins with `prefix`; read in batches, so a large fleet costs no memory."""

    def set_enabled(self, product_key: str, name: str, enabled: bool) -> Device: ...
    def reset_secret(self, product_key: str, name: str) -> Device: ...
    def delete_device(self, product_key: str, name: str) -> None: ...
    def import_devices(
        self,
        rows: Iterable[ImportRow],
        *,
        skip_bad: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> ImportReport: ...
    def topic_classes(self, product_key: str) -> list[TopicClass]: ...
    def add_topic_class(self, product_key: str, levels: str, right: Right) -> TopicClass: ...
    def remove_topic_class(self, product_key: str, levels: str) -> None: ...

    # what gateways need
    def find_device(self, product_key: str, name: str) -> Device | None: ...
    def find_device_by_id(self, device_id: int) -> Device | None: ...
    def activate(self, device_id: int, at: int) -> None: ...
    def seen(self, latest: Sequence[tuple[int, int]]) -> None:
        """Record (device id, ms) of latest requests; an older time than the recorded one, or a deleted device, is passed over."""

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
