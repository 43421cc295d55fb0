"""Where applications connect, by the settings and by the server that runs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from urllib.parse import urlsplit

from uplinkd.core.errors import Unavailable
from uplinkd.engine.embedded import announced
from uplinkd.engine.stream import STREAM, parts
from uplinkd.settings import Settings, address, reachable

__all__ = ["Doors", "doors"]

_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - to recognise it


@dataclass(frozen=True, slots=True)
class Doors:
    """URLs, empty where applications have no such door. `own_nats`: NATS is the owner's, where their own accounts hold.
    `streams`: in which the messages are."""

    nats: str
    mqtt: str
    own_nats: bool
    amqp: str = ""
    streams: tuple[str, ...] = (STREAM,)


def doors(settings: Settings, *, host: str = "") -> Doors:
    """`host` is by what name the asker reaches this machine: it stands for a door that is open at all addresses."""
    nats, count = "", settings.partitions
    if settings.nats_listen and not settings.nats_url:
        nats = _at("nats", settings.nats_listen, host)
        with contextlib.suppress(Unavailable):
            access = announced(settings)
            count = access.partitions
            if port := urlsplit(access.urls[0]).port:
                nats = f"{nats.rpartition(':')[0]}:{port}"
    mqtt = _at("mqtts", settings.mqtt_listen, host) if settings.mqtt_listen else ""
    amqp = _at("amqps", settings.amqp_listen, host) if settings.amqp_listen else ""
    streams = tuple(part.name for part in parts(count))
    return Doors(nats, mqtt, bool(settings.nats_url), amqp, streams)


def _at(scheme: str, listen: str, host: str) -> str:
    name, port = address(listen)
    return f"{scheme}://{reachable(host if host and name in _EVERYWHERE else name)}:{port}"
