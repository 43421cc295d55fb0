"""Servers and streams of the owner's: whether they are as uplinkd needs them. What is not is explained, and never altered."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nats.errors

from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.engine.api import ApiError, NotThere, call, connect, in_words
from uplinkd.engine.down import shapes
from uplinkd.engine.embedded import OLDEST, Access
from uplinkd.engine.groups import DEAD, RETRY
from uplinkd.engine.stream import check_partitions, parts, spread, wanted
from uplinkd.settings import Settings

if TYPE_CHECKING:
    from nats.aio.client import Client

__all__ = ["Difference", "check", "check_count", "check_version", "differences", "told_why"]

log = logging.getLogger("uplinkd.engine")

_REQUEST_SECONDS = 3.0
_NOT_CLUSTERED, _NO_PEERS, _JETSTREAM_OFF = 10074, 10005, (10039, 10076)
# What nobody can serve with: messages would go before their time, or an acknowledgement promise less than the settings say.
_GRAVE = ("retention", "storage", "subjects", "subject_transform")


@dataclass(frozen=True, slots=True)
class Difference:
    """A stream is not as the settings say: what it has, what it should have, and the command that changes it."""

    stream: str
    name: str
    found: Any
    wanted: Any

    @property
    def grave(self) -> bool:
        return self.name in _GRAVE or (self.name == "num_replicas" and self.found < self.wanted)

    def __str__(self) -> str:
        line = (
            f"the NATS stream {self.stream} has {self.name} {_shown(self.found)}, by the settings {_shown(self.wanted)}"
        )
        if not (flag := _flag(self.name, self.wanted)):
            return f"{line}; NATS cannot change that: move or remove the stream, it is left as it is"
        return f"{line}; it is left as it is, and changed by: nats stream edit {self.stream} {flag}"


def differences(found: Mapping[str, Any], config: Mapping[str, Any]) -> list[Difference]:
    """In what the stream with the configuration `found` differs from `config`; what neither of them names is nobody's business."""
    stream = str(config["name"])
    names = [name for name in config if name not in ("name", "metadata", "allow_atomic")]
    return [
        Difference(stream, name, found.get(name), config[name])
        for name in names
        if _plain(found.get(name)) != _plain(config[name])
    ]


def told_why(error: Mapping[str, Any], settings: Settings) -> str:
    """What JetStream says is wrong with a stream that was to be made, and what to do about it."""
    text = str(error.get("description", error))
    match error.get("err_code"):
        case code if code == _NOT_CLUSTERED:
            return (
                f"{text}: replicas = {settings.replicas} needs as many nats-servers in one cluster, each with JetStream"
            )
        case code if code == _NO_PEERS:
            tags = f" with the tags {', '.join(settings.placement)}" if settings.placement else ""
            return f"{text}: replicas = {settings.replicas} needs as many nats-servers{tags} that live and have room"
        case code if code in _JETSTREAM_OFF:
            return f"{text}: switch it on in nats-server's configuration, for the account of uplinkd's user"
    return text


def check_version(info: Mapping[str, Any]) -> None:
    """Return if the server that greets with `info` is recent enough; raise Unavailable with both versions."""
    version = str(info.get("version", ""))
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts and (int(parts[1]), int(parts[2])) < OLDEST:
        raise Unavailable(f"this nats-server is {version}; {OLDEST[0]}.{OLDEST[1]} or newer is needed")


async def check(settings: Settings, access: Access) -> None:
    """Look at the owner's servers before anything relies on them. Raise Rejected, one line each, with what cannot be served with;
    what can is logged. Servers that do not answer are waited for later, by whoever needs them."""
    told: list[Exception] = []
    try:
        client = await connect(access, "uplinkd", told=told.append)
    except Unavailable as fault:
        if re.search("authori[sz]ation|certificate|too old", f"{fault}{told}", re.IGNORECASE):
            raise Rejected(_sign_in_fault(str(fault), access)) from fault
        log.warning("%s; uplinkd starts all the same", fault)
        return
    try:
        check_version({"version": str(client.connected_server_version)})
        with in_words():
            await _check_api(client, settings)
            await _check_count(client, settings)
            found = [each async for each in _streams(client, settings)]
    except ApiError as fault:
        log.warning("%s; uplinkd starts all the same", fault)
        return
    except Unavailable as fault:
        if denied := next((str(each) for each in told if "ermissions" in str(each)), ""):
            raise Rejected(f"the user of uplinkd may not use JetStream: {denied}") from fault
        if "is needed" in str(fault):
            raise Rejected(str(fault)) from fault
        log.warning("%s; uplinkd starts all the same", fault)
        return
    finally:
        with contextlib.suppress(nats.errors.Error, OSError):
            await client.close()
    grave = [str(each) for each in found if each.grave]
    if grave:
        raise Rejected("\n".join(grave))
    for each in found:
        log.warning("%s", each)


async def _check_api(client: Client, settings: Settings) -> None:
    """Raise Rejected where JetStream is off."""
    try:
        await call(client, "INFO", patience=_REQUEST_SECONDS)
    except nats.errors.NoRespondersError:
        raise Rejected(
            "JetStream is not there for the account of uplinkd's user: switch it on in nats-server's configuration"
        ) from None
    except ApiError as fault:
        if "not enabled" in str(fault):
            raise Rejected(told_why({"description": str(fault), "err_code": _JETSTREAM_OFF[0]}, settings)) from fault
        raise


async def _streams(client: Client, settings: Settings) -> AsyncIterator[Difference]:
    """In what streams of ours that exist differ from what the settings say."""
    kept = [wanted(settings, 0, part) for part in parts(settings.partitions)]
    for config in (*kept, *shapes(settings), *({"name": name, **spread(settings)} for name in (DEAD, RETRY))):
        with contextlib.suppress(NotThere):
            info = await call(client, f"STREAM.INFO.{config['name']}", patience=_REQUEST_SECONDS)
            for each in differences(info["config"], config):
                yield each


async def check_count(settings: Settings, access: Access) -> None:
    """Raise Rejected where the streams of messages were made as another number of them; servers that do not answer are passed over."""
    with contextlib.suppress(Unavailable):
        client = await connect(access, "uplinkd")
        try:
            with in_words():
                await _check_count(client, settings)
        finally:
            await client.close()


async def _check_count(client: Client, settings: Settings) -> None:
    for part in parts(max(settings.partitions, 2)):  # where the first was deleted, the second tells
        with contextlib.suppress(NotThere):
            info = await call(client, f"STREAM.INFO.{part.name}", patience=_REQUEST_SECONDS)
            try:
                check_partitions(info["config"], settings.partitions)
            except Unavailable as fault:
                raise Rejected(str(fault)) from None


def _sign_in_fault(fault: str, access: Access) -> str:
    how = f"the credentials in {access.creds}" if access.creds else "the user and password in nats_url"
    return f"{fault}; look at {how}, and at nats_ca, nats_cert and nats_key for TLS"


def _plain(value: Any) -> Any:
    """So that what is not set equals what is empty."""
    if isinstance(value, Mapping):
        return {name: part for name, part in value.items() if part} or None
    return value or None


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(value.get("tags") or ()) or "none"
    return "none" if value in (None, "") else str(value)


def _flag(name: str, value: Any) -> str:
    """What `nats stream edit` calls it; empty for what stays as the stream was made."""
    match name:
        case "num_replicas":
            return f"--replicas={value}"
        case "placement":
            return " ".join(f"--tag={tag}" for tag in value.get("tags", ()))
        case "subjects":
            return f"--subjects='{','.join(value)}'"
        case "max_age":
            return f"--max-age={value // 10**9}s"
        case "duplicate_window":
            return f"--dupe-window={value // 10**9}s"
        case "max_bytes":
            return f"--max-bytes={value}"
        case "max_msgs":
            return f"--max-msgs={value}"
        case "max_consumers":
            return ""
        case "max_msgs_per_subject":
            return f"--max-msgs-per-subject={value}"
        case "discard":
            return f"--discard={value}"
        case "allow_direct":
            return "--allow-direct" if value else "--no-allow-direct"
    return ""
