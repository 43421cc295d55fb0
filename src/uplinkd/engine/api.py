"""The stock NATS client and JetStream's API, for all but the hot path: connections, calls, and their failures in words."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import nats.errors
from nats.aio.client import Client

from uplinkd.core.errors import Unavailable
from uplinkd.engine import Told
from uplinkd.engine.embedded import Access

if TYPE_CHECKING:
    from uplinkd.engine import Bus

__all__ = [
    "ApiError",
    "NotThere",
    "ask_api",
    "call",
    "connect",
    "consumers_with",
    "document_of",
    "first_at",
    "get_of_leader",
    "get_stored",
    "in_words",
    "moment_of",
    "sequence_in",
    "words",
]

T = TypeVar("T")

_CONNECT_SECONDS = 2
_PING_SECONDS = 2

# Each call reports its own failure; what the client logs would only repeat it, with a traceback.
logging.getLogger("nats").setLevel(logging.CRITICAL)


class ApiError(Unavailable):
    """JetStream has said no, with this code."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"the engine says: {description}")
        self.code = code


class NotThere(ApiError):  # noqa: N818 - names what is the matter
    """There is no such stream, consumer or message."""


async def connect(
    access: Access,
    name: str,
    ended: asyncio.Event | None = None,
    told: Callable[[Exception], None] | None = None,
) -> Client:
    """A connection to the first server that answers; raise Unavailable with what each has said.

    It is without the client's own reconnecting: an embedded server may come back on another port, with another password.
    `ended` is set when it ends; `told` hears what the server says is wrong.
    """
    access = access.now()
    faults = []
    for url in access.order:
        try:
            return await _connect(url, access, name, ended, told)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            access.failed(url)
            faults.append(f"{url}: {words(error)}")
    raise Unavailable(f"the engine does not answer: {'; '.join(faults)}")


async def _connect(
    url: str,
    access: Access,
    name: str,
    ended: asyncio.Event | None,
    told: Callable[[Exception], None] | None,
) -> Client:
    async def closed() -> None:
        access.failed(url)
        if ended is not None:
            ended.set()

    async def wrong(error: Exception) -> None:
        """Each call reports its own failure; the client's stray ones would only repeat it."""
        if told is not None:
            told(error)

    client = Client()
    wants_tls = urlsplit(url).scheme == "tls"

    def private(given: T) -> T:
        """`given`, once it may be told: the client (2.16) goes on in clear where a server, or who took its place, offers no TLS."""
        if wants_tls and not client._server_info.get("tls_required"):
            raise nats.errors.Error("the server offers no TLS, and nats_url asks for it by tls://")
        return given

    options: dict[str, Any] = {}
    if credentials := access.credentials():
        options["signature_cb"] = lambda nonce: private(credentials).sign(nonce).encode()
        options["user_jwt_cb"] = lambda: private(credentials).jwt.encode()
    if access.ca or access.pair:
        options["tls"] = access.context()
    await client.connect(
        url,
        name=name,
        user=(lambda: private(access.user)) if access.password else None,
        password=(lambda: private(access.password)) if access.password else None,
        token=(lambda: private(access.user)) if access.user and not access.password else None,
        tls_hostname=urlsplit(url).hostname,
        connect_timeout=_CONNECT_SECONDS,
        ping_interval=_PING_SECONDS,
        allow_reconnect=False,
        max_reconnect_attempts=1,  # without an end it would try for ever to connect for the first time
        reconnect_time_wait=0,
        error_cb=wrong,
        closed_cb=closed,
        disconnected_cb=closed,
        **options,
    )
    try:
        private(client)  # without a password nobody has asked
    except nats.errors.Error:
        await client.close()
        raise
    # The client (2.16) tells of no end whose connection is gone before its last bytes were written: its way there breaks off. What
    # ends for certain is its reading.
    if ended is not None and client._reading_task is not None:
        client._reading_task.add_done_callback(lambda _: ended.set())
    return client


async def call(client: Client, action: str, body: dict[str, Any] | None = None, *, patience: float) -> dict[str, Any]:
    """One call of the JetStream API; raise as `document_of`, or what the client raises."""
    payload = json.dumps(body).encode() if body else b""
    return document_of((await client.request(f"$JS.API.{action}", payload, timeout=patience)).data)


async def ask_api(bus: Bus, action: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One call of the JetStream API over the bus; raise as `document_of`."""
    return document_of((await bus.ask(f"$JS.API.{action}", json.dumps(body).encode() if body else b"")).payload)


async def consumers_with(list_page: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]], mark: str) -> set[str]:
    """The names of a stream's consumers that have `mark` in their metadata; `list_page` calls CONSUMER.LIST of the stream."""
    found: set[str] = set()
    offset, total = 0, 1
    while offset < total:
        try:
            answer = await list_page({"offset": offset})
        except NotThere:  # the stream
            return set()
        listed = answer.get("consumers") or []
        found |= {each["name"] for each in listed if mark in (each["config"].get("metadata") or {})}
        offset, total = offset + len(listed), answer["total"] if listed else 0
    return found


async def get_stored(bus: Bus, stream: str, wanted: Mapping[str, Any]) -> Told | None:
    """A stored message, with the headers Nats-Sequence, Nats-Subject and Nats-Time-Stamp; None when there is none. Raise
    Unavailable, also for a stream that is not there."""
    found = await bus.ask(f"$JS.API.DIRECT.GET.{stream}", json.dumps(wanted).encode())
    if found.headers.get("Nats-Sequence"):
        return found
    _check_absent(found.headers)
    return None


async def get_of_leader(bus: Bus, stream: str, wanted: Mapping[str, Any]) -> Told | None:
    """The same by the replica that leads, which has all that was ever acknowledged."""
    try:
        found = (await ask_api(bus, f"STREAM.MSG.GET.{stream}", wanted))["message"]
    except NotThere:
        return None
    lines = base64.b64decode(found.get("hdrs", "")).decode(errors="replace").split("\r\n")[1:]
    headers = {name: value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    headers |= {
        "Nats-Sequence": str(found["seq"]),
        "Nats-Subject": found["subject"],
        "Nats-Time-Stamp": found["time"],
    }
    return Told(found["subject"], base64.b64decode(found.get("data", "")), headers)


def first_at(at: int) -> dict[str, str]:
    """What asks DIRECT.GET for the first message that was stored at `at` (ms) or later.

    A consumer is made to begin at its sequence. One that begins at a time misses, where it has several filters, what lies before the
    first message of each of them (nats-server 2.15; ten messages under a.x, then ten under b.x, filters a.> and b.>, the time of
    the second: the last ten come alone).
    """
    moment = datetime.fromtimestamp(at // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return {"start_time": f"{moment}.{at % 1000:03d}Z", "next_by_subj": ">"}


def sequence_in(headers: Mapping[str, str], last: int) -> int:
    """The sequence that was answered to `first_at`; that of the next message where there is none yet. `last` is the last one of the
    stream, asked before."""
    if found := headers.get("Nats-Sequence"):
        return int(found)
    _check_absent(headers)
    return last + 1


def _check_absent(headers: Mapping[str, str]) -> None:
    """Return if DIRECT.GET has answered that there is no such message; raise Unavailable with what it says else."""
    if (status := headers.get("Status", "")) != "404":
        raise Unavailable(f"the engine answered {status} {headers.get('Description', '')}".strip())


def moment_of(text: str) -> int:
    """ms since 1970 of what JetStream writes as `2026-11-27T06:31:36.123456789Z`; Python reads six digits."""
    fraction = re.search(r"\.(\d{1,3})", text)
    seconds = round(datetime.fromisoformat(re.sub(r"\.\d+", "", text)).timestamp())
    return seconds * 1000 + (int(fraction[1].ljust(3, "0")) if fraction else 0)


def document_of(answer: bytes) -> dict[str, Any]:
    """What JetStream has answered; raise ApiError with what it says is wrong, Unavailable when that is not understood."""
    try:
        document: dict[str, Any] = json.loads(answer)
    except ValueError:
        raise Unavailable("the engine's answer is not understood") from None
    if error := document.get("error"):
        code = error.get("code", 0)
        kind = NotThere if code == 404 else ApiError
        raise kind(code, str(error.get("description", error)))
    return document


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """Failures of the client as Unavailable."""
    try:
        yield
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise Unavailable(f"the engine is away: {words(error)}") from error


def words(error: Exception) -> str:
    """What the client says is wrong, without its ornaments."""
    if isinstance(error, TimeoutError):
        return "it does not answer"
    return re.sub(r"^nats: ", "", str((isinstance(error, OSError) and error.strerror) or error)) or type(error).__name__
