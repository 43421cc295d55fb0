"""The nouns: product, device, topic class, message. Times are milliseconds since 1970 UTC; secrets stay out of repr()."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

__all__ = [
    "App",
    "Census",
    "Device",
    "DeviceName",
    "LifecycleAction",
    "LifecycleChange",
    "Message",
    "Origin",
    "Product",
    "ProductKey",
    "Right",
    "SigningKey",
    "State",
    "StatusChange",
    "TopicClass",
]

ProductKey = NewType("ProductKey", str)
DeviceName = NewType("DeviceName", str)


class Right(StrEnum):
    """What a device may do on a topic of a class."""

    PUBLISH = "publish"
    SUBSCRIBE = "subscribe"
    BOTH = "both"

    @property
    def publishes(self) -> bool:
        return self is not Right.SUBSCRIBE

    @property
    def subscribes(self) -> bool:
        return self is not Right.PUBLISH


class State(StrEnum):
    """Where a device stands: never authenticated, lately heard of, silent, or switched off by its owner."""

    INACTIVE = "inactive"
    ONLINE = "online"
    OFFLINE = "offline"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True)
class Product:
    """A kind of device; `key` names it on the wire, `name` to people."""

    id: int
    key: ProductKey
    name: str
    secret: str = field(repr=False)
    created: int

    @property
    def version(self) -> str:
        """Another one after each change, for whoever must not undo somebody else's."""
        return f"{self.id}-{zlib.crc32(self.name.encode()):08x}"


@dataclass(frozen=True, slots=True)
class Device:
    """One device as the registry knows it.

    `id` is never given twice, not even after a deletion. `generation` rises whenever all tokens of the device must die
    (disabled, secret changed). `activated` is the first login, `requested` the latest HTTPS request, `last_seen` the latest
    sign of life over either door, each None before it; `address` is where that came from, `session` the worker that holds
    the device's MQTT session, or empty.
    """

    id: int
    product_key: ProductKey
    name: DeviceName
    secret: str = field(repr=False)
    enabled: bool
    generation: int
    created: int
    activated: int | None
    last_seen: int | None
    requested: int | None = None
    address: str = ""
    session: str = ""

    @property
    def version(self) -> str:
        """Another one after each change that an operator makes; signs of life change nothing."""
        return f"{self.id}-{self.generation}{'e' if self.enabled else 'd'}"

    def state(self, *, now: int, online_timeout: int) -> State:
        """The device's state at `now` (ms): online while an MQTT session stands, or `online_timeout` ms from its last request."""
        if not self.enabled:
            return State.DISABLED
        if self.last_seen is None:
            return State.INACTIVE
        lately = self.requested is not None and now - self.requested < online_timeout
        return State.ONLINE if self.session or lately else State.OFFLINE

    def connection(self, *, now: int, online_timeout: int) -> str:
        """How the device is connected at `now`: `mqtt`, `https` (it has reported lately), or empty."""
        if self.state(now=now, online_timeout=online_timeout) is not State.ONLINE:
            return ""
        return "mqtt" if self.session else "https"


@dataclass(frozen=True, slots=True)
class Census:
    """How many devices there are, in all and by state."""

    total: int = 0
    online: int = 0
    offline: int = 0
    inactive: int = 0
    disabled: int = 0


@dataclass(frozen=True, slots=True)
class TopicClass:
    """`levels` is what follows `/${productKey}/${deviceName}/` in the topics of this class: `user/update`."""

    levels: str
    right: Right


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that signs tokens from `begins` on (ms), where none does that is newer.

    Tokens of a key that gives way stand until it is `retired` (ms); then it still recognises them, and they stand no longer.
    """

    id: int
    key: bytes = field(repr=False)
    begins: int = 0
    retired: int | None = None


@dataclass(frozen=True, slots=True)
class App:
    """A program of the owner's that reads the messages of `products` and, if it `sends`, sends messages down to their devices.

    `key` is its user name on the wire. Of its secret only a hash is kept: the secret is random, and so long that a plain
    SHA-256 cannot be searched.
    """

    id: int
    key: str
    name: str
    secret_hash: bytes = field(repr=False)
    sends: bool
    created: int
    products: tuple[ProductKey, ...]

    @property
    def version(self) -> str:
        """Another one after each change."""
        return f"{self.id}-{zlib.crc32(' '.join(self.products).encode()):08x}"


@dataclass(frozen=True, slots=True)
class StatusChange:
    """A device has come online or gone offline at `at` (ms); `last_seen` is the last time that it was heard, from `address`."""

    id: int
    product_key: ProductKey
    device_name: DeviceName
    online: bool
    at: int
    last_seen: int
    address: str


class LifecycleAction(StrEnum):
    """What the owner did to a device; the words are the platform's."""

    CREATE = "create"
    DELETE = "delete"
    ENABLE = "enable"
    DISABLE = "disable"


@dataclass(frozen=True, slots=True)
class LifecycleChange:
    """A device was made, deleted, enabled or disabled at `at` (ms)."""

    id: int
    product_key: ProductKey
    device_name: DeviceName
    action: LifecycleAction
    at: int


class Origin(StrEnum):
    """Which way a stored message came."""

    HTTPS = "https"
    MQTT = "mqtt"
    STATUS = "status"
    LIFECYCLE = "lifecycle"

    @classmethod
    def named(cls, text: str | None) -> Origin:
        """What a stored message says of itself. Nothing, or what only a later version knows, is a device's report: one that could
        not be read would come to its groups for ever."""
        try:
            return cls(text or cls.HTTPS)
        except ValueError:
            return cls.HTTPS


@dataclass(frozen=True, slots=True)
class Message:
    """One stored message. `generate_time` is when the engine stored it, ms."""

    id: int
    topic: str
    product_key: ProductKey
    device_name: DeviceName
    generate_time: int
    payload: bytes
    origin: Origin = Origin.HTTPS
