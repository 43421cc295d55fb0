"""The nouns: product, device, topic class, message. Times are milliseconds since 1970 UTC; secrets stay out of repr()."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

__all__ = ["Device", "DeviceName", "Message", "Product", "ProductKey", "Right", "SigningKey", "State", "TopicClass"]

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


@dataclass(frozen=True, slots=True)
class Device:
    """One device as the registry knows it.

    `id` is never given twice, not even after a deletion. `generation` rises whenever all tokens of the device must die
    (disabled, secret changed). `activated` is the first login, `last_seen` the latest request, each None before it.
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

    def state(self, *, now: int, online_timeout: int) -> State:
        """The device's state at `now` (ms); it is online for `online_timeout` ms after its last request."""
        if not self.enabled:
            return State.DISABLED
        if self.last_seen is None:
            return State.INACTIVE
        return State.ONLINE if now - self.last_seen < online_timeout else State.OFFLINE


@dataclass(frozen=True, slots=True)
class TopicClass:
    """`levels` is what follows `/${productKey}/${deviceName}/` in the topics of this class: `user/update`."""

    levels: str
    right: Right


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that signs tokens; a `retired` one still recognises its old tokens, which no longer stand."""

    id: int
    key: bytes = field(repr=False)
    retired: bool


@dataclass(frozen=True, slots=True)
class Message:
    """One stored message. `generate_time` is when the engine stored it, ms."""

    id: int
    topic: str
    product_key: ProductKey
    device_name: DeviceName
    generate_time: int
    payload: bytes
