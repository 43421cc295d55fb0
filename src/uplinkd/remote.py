"""A server elsewhere through its management API: what the command line does on a data folder, done over HTTP(S).

The key is in the Authorization header alone: in no URL, no error text, and never sent after a redirect.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar
from urllib.parse import quote, urlsplit

import httpx

from uplinkd import __version__
from uplinkd.asking import Consumer, HookState, Live, Trial
from uplinkd.core.errors import Conflict, NotFound, Rejected, Stale, Unavailable
from uplinkd.core.groups import Form, Group, Kind, Plan, Webhook
from uplinkd.core.model import App, Device, DeviceName, Message, Origin, Product, ProductKey, Right, State, TopicClass
from uplinkd.core.operators import ApiKey, Role, Scope, User
from uplinkd.engine import DeadLetter, Glimpse, GroupState, Query, StreamState
from uplinkd.engine.doors import Doors
from uplinkd.engine.standing import Standing
from uplinkd.engine.stream import STREAM
from uplinkd.journal import Refusal, Wanted
from uplinkd.registry import ImportProgress, ImportReport
from uplinkd.registry.fleet import size_of
from uplinkd.settings import is_loopback

__all__ = [
    "Remote",
    "RemoteDesk",
    "RemoteDevice",
    "RemoteGroup",
    "RemoteGroups",
    "RemoteJournal",
    "RemoteOperators",
    "RemoteReader",
    "RemoteRegistry",
]

_PREFIX = "/api/v1"
_CONNECT_SECONDS = 5.0
_SECONDS = 30.0
# Sooner than the server closes an idle connection, or a request might be sent into one that is closing.
_IDLE_SECONDS = 2.0
# A job is asked for less and less often; an import of 100,000 rows takes seconds.
_POLL_SECONDS = (0.05, 1.0)
_JOB_PATIENCE_SECONDS = 30.0
_CANCEL_SECONDS = 5.0
_RETRY_SECONDS = (1.0, 10.0)
_PAGE = 1000
_FIRST_PAGE = 100
_PART = 64 * 1024
_MOST_MISSED = 10_000
_KINDS: dict[int, type[Rejected]] = {404: NotFound, 409: Conflict, 412: Stale}
# OpenSSL's numbers for a certificate that is trusted and does not name the host or the address.
_NAME_MISMATCHES = (62, 64)

Json = dict[str, Any]
Tell = Callable[[str], None]
T = TypeVar("T")


class _Forbidden(Rejected):
    """The key is known, and its scope is too small."""


class _Broken(Unavailable):
    """The connection broke under way: whether the server has acted is not known."""


class Remote:
    """One server, made by its URL (that of its console), an API key and the CA to trust. Raise Rejected for what cannot be used.

    Every call raises Rejected (NotFound, Conflict, Stale) with the server's words, or Unavailable. `tell` hears what people
    should know and no answer has, a line each.
    """

    def __init__(self, url: str, key: str, ca: Path | None = None, *, tell: Tell = lambda line: None) -> None:
        self.url = _checked(url)
        self.tell = tell
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise Rejected("this is no API key: it has letters, digits, - and _; `uplinkd apikey create` makes one")
        self._options: dict[str, Any] = {
            "base_url": self.url + _PREFIX,
            "headers": {
                "Authorization": f"Bearer {key}",
                "Accept": "application/json",
                "User-Agent": f"uplinkd/{__version__}",
            },
            "timeout": httpx.Timeout(_SECONDS, connect=_CONNECT_SECONDS),
            "limits": httpx.Limits(keepalive_expiry=_IDLE_SECONDS),
            "follow_redirects": False,
            # In clear nothing leaves this machine, not to a proxy either.
            "trust_env": self.url.startswith("https:"),
        }
        if self.url.startswith("https:"):
            try:
                self._options["verify"] = ssl.create_default_context(cafile=str(ca) if ca else None)
            except (OSError, ssl.SSLError) as error:
                raise Rejected(f"the CA file {ca} cannot be used: {error.strerror or error}") from error
        self._client: httpx.Client | None = None

    def close(self) -> None:
        client, self._client = self._client, None
        if client:
            client.close()

    def get(self, path: str, **params: Any) -> Json:
        return self._document("GET", path, params=params)

    def post(self, path: str, body: Json | None = None, *, etag: str = "", **params: Any) -> Json:
        """Create or have done. It carries an Idempotency-Key, so that it is sent again after a broken connection."""
        headers = {"Idempotency-Key": secrets.token_urlsafe(24), **_if_match(etag)}
        return self._document("POST", path, params=params, body=body or {}, headers=headers)

    def patch(self, path: str, body: Json, *, etag: str = "") -> Json:
        return self._document("PATCH", path, body=body, headers=_if_match(etag))

    def delete(self, path: str, *, etag: str = "") -> None:
        with self.stream("DELETE", path, headers=_if_match(etag)) as response:
            response.read()

    def tagged(self, path: str) -> tuple[Json, str]:
        """The document, and its ETag for a `patch` that must not undo somebody else's."""
        with self.stream("GET", path) as response:
            response.read()
            return self._parsed(response), response.headers.get("ETag", "")

    def pages(self, path: str, *, limit: int | None = None, **params: Any) -> Iterator[Json]:
        """The items of a list, at most `limit`; read page by page, as far as they are taken."""
        size, cursor = min(limit or _FIRST_PAGE, _PAGE), None
        while limit is None or limit > 0:
            page = self.get(path, **params, limit=size, cursor=cursor)
            with self.understood():
                items, cursor = list(page["items"]), page["next"]
            yield from items
            if cursor is None:
                return
            limit = None if limit is None else limit - len(items)
            size = min(limit or _PAGE, _PAGE)

    def upload(self, path: str, parts: Iterator[bytes], kind: str, **params: Any) -> Json:
        """What the server says to a body of the media type `kind` that is sent as it is read; sent once."""
        with self.stream("POST", path, params=params, content=parts, headers={"Content-Type": kind}) as response:
            response.read()
            return self._parsed(response)

    @contextlib.contextmanager
    def stream(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, **more: Any
    ) -> Iterator[httpx.Response]:
        """The answer, of which nothing is read yet but that it is a success."""
        if self._client is None:
            self._client = self._made(httpx.Client)
        with self.faults(), self._client.stream(method, path, params=_given(params), **more) as response:
            if not response.is_success:
                response.read()
                self._refuse(response)
            yield response

    def asynchronous(self) -> httpx.AsyncClient:
        """A client for what is followed; its answers go through `check`, within `faults`."""
        return self._made(httpx.AsyncClient)

    def _made(self, kind: Callable[..., T]) -> T:
        """A client of this kind, which looks at the URL and at the environment's proxies when it is made."""
        try:
            return kind(**self._options)
        except httpx.InvalidURL as error:
            raise Rejected(f"{self.url} is not a URL that can be used: {error}") from error
        except (ValueError, ImportError) as error:
            raise Rejected(
                f"the proxy that the environment names (HTTPS_PROXY, ALL_PROXY) cannot be used: {error}"
            ) from error

    async def check(self, response: httpx.Response) -> None:
        if not response.is_success:
            await response.aread()
            self._refuse(response)

    async def fetch(self, client: httpx.AsyncClient, path: str, **params: Any) -> Json:
        with self.faults():
            response = await client.get(path, params=_given(params))
            await self.check(response)
            return self._parsed(response)

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """What was answered is taken apart: a member that is missing or of another kind is Unavailable."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Unavailable(
                f"the answer of {self.url} is not understood by this uplinkd, which is {__version__}: is the server of another version?"
            ) from error

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """Failures of the connection in words."""
        try:
            yield
        except UnicodeEncodeError as error:
            raise Rejected(f"{error.object!r} is not UTF-8") from error
        except httpx.InvalidURL as error:
            raise Rejected(f"{self.url} is not a URL that can be used: {error}") from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise self._in_words(error) from error

    def _document(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: Json | None = None, **more: Any
    ) -> Json:
        """One call that may be sent twice: it changes nothing, sets what is to be, or has an Idempotency-Key."""
        more["headers"] = {**(headers or {}), **({"Content-Type": "application/json"} if body is not None else {})}
        if body is not None:
            more["content"] = json.dumps(body).encode()
        for last in (False, True):
            try:
                with self.stream(method, path, **more) as response:
                    response.read()
                    return self._parsed(response)
            except _Broken:
                if last:
                    raise
                time.sleep(_RETRY_SECONDS[0])
        raise AssertionError("unreachable")

    def _parsed(self, response: httpx.Response) -> Json:
        try:
            document = response.json()
        except ValueError:
            document = None
        if not isinstance(document, dict):
            self._stranger(response)
        return document

    def _refuse(self, response: httpx.Response) -> NoReturn:
        """Raise what a problem document says."""
        status = response.status_code
        try:
            problem = json.loads(response.content)
            detail = str(problem["detail"])
        except (ValueError, KeyError, TypeError):
            self._stranger(response)
        if status == 401:
            raise Rejected(f"{detail} (at {self.url})")
        if status == 403:
            raise _Forbidden(detail)
        if status == 503:
            raise Unavailable(detail)
        if status >= 500:
            raise Unavailable(f"{self.url} has failed: {detail}")
        raise _KINDS.get(status, Rejected)(detail)

    def _stranger(self, response: httpx.Response) -> NoReturn:
        if response.is_redirect:
            what = "sends elsewhere, where the key does not follow"
        elif response.status_code in (502, 504):
            what = "reaches no server behind it"
        else:
            what = "is not of uplinkd's management API"
        raise Unavailable(
            f"{self.url} answered {response.status_code} with something that {what}; --url is where the console is "
            "(console_listen, usually port 8080), not the port of devices"
        )

    def _in_words(self, error: Exception) -> Unavailable:
        causes = list(_causes(error))
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                if cause.verify_code in _NAME_MISMATCHES:
                    return Unavailable(
                        f"the certificate of {self.url} is for other names: add this one to the server's --tls-name, or call the "
                        "server by a name that the certificate has"
                    )
                return Unavailable(
                    f"the certificate of {self.url} is not trusted: {cause.verify_message}; name its CA with --ca or UPLINKD_CA: a "
                    "copy of tls/ca.pem in the server's data folder"
                )
            if isinstance(cause, ssl.SSLError) and "WRONG_VERSION_NUMBER" in str(cause):
                return Unavailable(f"{self.url} does not speak TLS: is it served with --console-tls true?")
            if isinstance(cause, ConnectionRefusedError):
                return Unavailable(
                    f"nothing listens at {self.url}; is `uplinkd serve` running there, and its console_listen open to this machine?"
                )
            if isinstance(cause, socket.gaierror):
                return Unavailable(f"the name {urlsplit(self.url).hostname} cannot be found: {cause.strerror}")
        if isinstance(error, httpx.ConnectTimeout):
            return Unavailable(f"{self.url} did not answer within {_CONNECT_SECONDS:g} s")
        if isinstance(error, httpx.TimeoutException):
            return Unavailable(
                f"{self.url} did not answer within {_SECONDS:g} s; what was asked may be done all the same"
            )
        if isinstance(error, httpx.RemoteProtocolError) and self.url.startswith("http:"):
            said = str(error) or type(error).__name__
            return _Broken(f"{self.url} broke off ({said}); if it is served with --console-tls true, say https://")
        kind = _Broken if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError) else Unavailable
        if isinstance(error, httpx.ConnectError):
            kind = Unavailable  # nothing was sent yet
        said = next((str(cause) for cause in reversed(causes) if str(cause)), type(error).__name__)
        return kind(f"{self.url} could not be talked to: {said}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        if isinstance(seen, BaseExceptionGroup):
            yield from seen.exceptions
        seen = seen.__cause__ or seen.__context__


def _checked(url: str) -> str:
    """The URL without a slash at its end; raise Rejected, without showing a password that may be in it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise Rejected(f"--url is not a URL: {error}") from error
    if parts.username is not None or parts.password is not None:
        raise Rejected("--url has a user name or a password in it; the API key is given with UPLINKD_KEY")
    if parts.scheme not in ("https", "http") or not host or parts.query or parts.fragment:
        raise Rejected(f"{url!r} is not a URL such as https://iot.example.com:8080")
    if parts.scheme == "http" and not (host == "localhost" or is_loopback(host)):
        raise Rejected(
            f"{url} is not of this machine, and the key would cross the network in clear: serve with --console-tls true and say https://"
        )
    return url.rstrip("/")


def _segment(name: str) -> str:
    """A name as one part of a path. One that would be several, or another path, names nothing that there is."""
    if name in ("", ".", "..") or "/" in name:
        raise NotFound(f"there is nothing called {name!r}: names have no slash, and are not empty")
    try:
        return quote(name, safe="")
    except UnicodeEncodeError as error:
        raise NotFound(f"there is nothing called {name!r}: it is not UTF-8") from error


def _given(params: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (params or {}).items() if value not in (None, "")}


def _if_match(etag: str) -> dict[str, str]:
    return {"If-Match": etag} if etag else {}


def _product_path(product_key: str) -> str:
    return f"/products/{_segment(product_key)}"


def _device_path(product_key: str, name: str) -> str:
    return f"{_product_path(product_key)}/devices/{_segment(name)}"


@dataclass(frozen=True, slots=True)
class RemoteDevice(Device):
    """A device as a server tells of it: `state` and `connection` are what it said, at its time and by its settings. `id`,
    `generation` and so `version` are not told."""

    told_state: State = State.INACTIVE
    told_connection: str = ""

    def state(self, *, now: int, online_timeout: int) -> State:
        return self.told_state

    def connection(self, *, now: int, online_timeout: int) -> str:
        return self.told_connection


class RemoteRegistry:
    """`registry.Management` of a server elsewhere. What it gives has no ids and no versions."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    @property
    def operators(self) -> RemoteOperators:
        return RemoteOperators(self._remote)

    @property
    def groups(self) -> RemoteGroups:
        return RemoteGroups(self._remote)

    def close(self) -> None:
        self._remote.close()

    # products

    def create_product(self, name: str, *, key: str | None = None, secret: str | None = None) -> Product:
        return self._product(self._remote.post("/products", {"name": name, "productKey": key, "productSecret": secret}))

    def products(self) -> list[Product]:
        return [self._product(each) for each in self._remote.pages("/products")]

    def product(self, key: str) -> Product:
        path = _product_path(key)
        found = self._remote.get(path)
        return self._product({**found, "productSecret": self._secret(path)})

    def delete_product(self, key: str, *, with_devices: bool = False) -> int:
        if not with_devices:
            self._remote.delete(_product_path(key))
            return 0
        _segment(key)
        result = _ended(self._remote, self._remote.post("/product-deletions", productKey=key))
        with self._remote.understood():
            return int(result["deleted"])

    # devices

    def create_device(self, product_key: str, name: str | None = None, *, secret: str | None = None) -> Device:
        body = {"deviceName": name, "deviceSecret": secret}
        return self._device(self._remote.post(f"{_product_path(product_key)}/devices", body))

    def device(self, product_key: str, name: str) -> Device:
        path = _device_path(product_key, name)
        found = self._remote.get(path)
        return self._device({**found, "deviceSecret": self._secret(path)})

    def devices(self, product_key: str, *, prefix: str = "") -> Iterator[Device]:
        return map(self._device, self._remote.pages(f"{_product_path(product_key)}/devices", prefix=prefix))

    def set_enabled(self, product_key: str, name: str, enabled: bool) -> Device:
        return self._device(self._remote.patch(_device_path(product_key, name), {"enabled": enabled}))

    def reset_secret(self, product_key: str, name: str) -> Device:
        return self._device(self._remote.post(f"{_device_path(product_key, name)}/secret"))

    def delete_device(self, product_key: str, name: str) -> None:
        self._remote.delete(_device_path(product_key, name))

    def import_fleet(
        self, stream: BinaryIO, *, skip_bad: bool = False, progress: ImportProgress | None = None
    ) -> ImportReport:
        """The file goes up as it is read; the server imports it then. An interrupt cancels that, and nothing is stored."""
        size = size_of(stream)

        def parts() -> Iterator[bytes]:
            sent = 0
            while part := stream.read(_PART):
                yield part
                sent += len(part)
                if progress:
                    progress("uploading", sent / size if size else None, None)

        job = self._remote.upload("/imports", parts(), "text/csv", skipBad="true" if skip_bad else "false")
        result = _ended(self._remote, job, progress)
        with self._remote.understood():
            bad = [(int(each["line"]), str(each["reason"])) for each in result["bad"]]
            return ImportReport(
                read=result["read"],
                created=result["created"],
                unchanged=result["unchanged"],
                secrets_made=result["secretsMade"],
                products_created=list(result["productsCreated"]),
                bad=bad,
                stored=result["stored"],
                more_bad=int(result["badRows"]) - len(bad),
            )

    def export_fleet(self, product_key: str) -> Iterator[str]:
        with contextlib.ExitStack() as stack:
            response = stack.enter_context(self._remote.stream("GET", f"{_product_path(product_key)}/export"))
            opened = stack.pop_all()

        def parts() -> Iterator[str]:
            with opened:
                try:
                    with self._remote.faults():
                        yield from response.iter_text()
                except Unavailable as fault:
                    raise Unavailable(f"the export broke off, and what was written is not all: {fault}") from fault

        return parts()

    # topic classes

    def topic_classes(self, product_key: str) -> list[TopicClass]:
        return [self._topic_class(each) for each in self._items(f"{_product_path(product_key)}/topic-classes")]

    def add_topic_class(self, product_key: str, levels: str, right: Right) -> TopicClass:
        body = {"levels": levels, "right": right.value}
        return self._topic_class(self._remote.post(f"{_product_path(product_key)}/topic-classes", body))

    def remove_topic_class(self, product_key: str, levels: str) -> None:
        path = "/".join(_segment(level) for level in levels.removeprefix("/").split("/"))
        self._remote.delete(f"{_product_path(product_key)}/topic-classes/{path}")

    # applications

    def create_app(self, name: str, *, products: Sequence[str] = (), sends: bool = True) -> tuple[App, str]:
        made = self._remote.post("/apps", {"name": name, "products": list(products), "sends": sends})
        with self._remote.understood():
            return self._app(made), str(made["secret"])

    def apps(self) -> list[App]:
        return [self._app(each) for each in self._items("/apps")]

    def app(self, name: str) -> App:
        return self._app(self._remote.get(f"/apps/{_segment(name)}"))

    def grant_app(self, name: str, products: Sequence[str]) -> App:
        return self._reaching(name, lambda has: [*has, *products])

    def withdraw_app(self, name: str, products: Sequence[str]) -> App:
        def without(has: list[str]) -> list[str]:
            for product_key in products:
                if product_key not in has:
                    raise NotFound(
                        f"application {name!r} does not have the product {product_key!r}; `uplinkd app show {name}` shows what it has"
                    )
            return [each for each in has if each not in products]

        return self._reaching(name, without)

    def renew_app_secret(self, name: str) -> tuple[App, str]:
        renewed = self._remote.post(f"/apps/{_segment(name)}/secret")
        with self._remote.understood():
            return self._app(renewed), str(renewed["secret"])

    def delete_app(self, name: str) -> None:
        self._remote.delete(f"/apps/{_segment(name)}")

    def doors(self) -> Doors:
        """Where applications connect."""
        told = self._remote.get("/doors")
        with self._remote.understood():
            streams = tuple(map(str, told.get("streams") or [STREAM]))
            return Doors(str(told["nats"]), str(told["mqtt"]), bool(told["ownNats"]), str(told["amqp"]), streams)

    def _reaching(self, name: str, change: Callable[[list[str]], list[str]]) -> App:
        """Read, change, and write if nobody else has meanwhile."""
        path = f"/apps/{_segment(name)}"
        for last in (False, False, True):
            found, etag = self._remote.tagged(path)
            with self._remote.understood():
                has = [str(each) for each in found["products"]]
            try:
                return self._app(self._remote.patch(path, {"products": list(dict.fromkeys(change(has)))}, etag=etag))
            except Stale:
                if last:
                    raise
        raise AssertionError("unreachable")

    # parts

    def _items(self, path: str) -> list[Json]:
        document = self._remote.get(path)
        with self._remote.understood():
            return list(document["items"])

    def _secret(self, path: str) -> str:
        """Empty where the key may not see it."""
        try:
            told = self._remote.get(f"{path}/secret")
        except _Forbidden:
            return ""
        with self._remote.understood():
            return str(told["secret"])

    def _product(self, told: Json) -> Product:
        with self._remote.understood():
            return Product(
                id=0,
                key=ProductKey(told["productKey"]),
                name=told["name"],
                secret=told.get("productSecret", ""),
                created=told["createTime"],
            )

    def _device(self, told: Json) -> Device:
        with self._remote.understood():
            state = State(told["state"])
            return RemoteDevice(
                id=0,
                product_key=ProductKey(told["productKey"]),
                name=DeviceName(told["deviceName"]),
                secret=told.get("deviceSecret", ""),
                enabled=state is not State.DISABLED,
                generation=0,
                created=told["createTime"],
                activated=told["activeTime"],
                last_seen=told["lastSeen"],
                address=told["clientIp"],
                told_state=state,
                told_connection=told["connection"],
            )

    def _topic_class(self, told: Json) -> TopicClass:
        with self._remote.understood():
            return TopicClass(told["levels"], Right(told["right"]))

    def _app(self, told: Json) -> App:
        with self._remote.understood():
            return App(
                id=0,
                key=told["key"],
                name=told["name"],
                secret_hash=b"",
                sends=told["sends"],
                created=told["createTime"],
                products=tuple(map(ProductKey, told["products"])),
            )


def _ended(remote: Remote, job: Json, progress: ImportProgress | None = None, doing: str = "importing") -> Json:
    """The result of the job once it is done. Raise Rejected for one that has failed or was cancelled."""
    with remote.understood():
        path = f"/jobs/{_segment(str(job['id']))}"
    pause, longest = _POLL_SECONDS
    heard = time.monotonic()
    try:
        while True:
            with remote.understood():
                state = str(job["state"])
                share = job["done"] / job["total"] if job["total"] else None
                result, fault = job["result"], str(job["fault"])
            if state == "done":
                return dict(result)
            if state != "running":
                raise Rejected(fault or f"the job was {state}")
            if progress:
                progress(doing, share, None)
            time.sleep(pause)
            pause = min(pause * 1.5, longest)
            try:
                job, heard = remote.get(path), time.monotonic()
            except Unavailable as fault_now:
                if time.monotonic() - heard > _JOB_PATIENCE_SECONDS:
                    raise Unavailable(f"{fault_now}; what was begun there may go on") from fault_now
    except KeyboardInterrupt:
        _cancel(remote, path)
        raise


def _cancel(remote: Remote, path: str) -> None:
    """Have the job cancelled, and tell what became of it: it may have come to its end first."""
    state = ""
    with contextlib.suppress(Rejected, Unavailable):
        remote.delete(path)
        end = time.monotonic() + _CANCEL_SECONDS
        while (state := str(remote.get(path).get("state"))) == "running" and time.monotonic() < end:
            time.sleep(_POLL_SECONDS[0])
    remote.tell(
        {
            "cancelled": "it was cancelled on the server, too",
            "done": "the server had done it all before it could be cancelled",
            "failed": "it had failed on the server",
        }.get(state, "it could not be cancelled on the server, and may go on there")
    )


@dataclass(frozen=True, slots=True)
class RemoteGroup(Group):
    """A consumer group as a server tells of it, without `id` and `generation`; `secret` only where it was made just now."""

    told_version: str = ""

    @property
    def version(self) -> str:
        return self.told_version


class RemoteGroups:
    """`registry.GroupManagement` of a server elsewhere."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def create(self, name: str, plan: Plan, *, start: int | None = None) -> Group:
        return self._group(self._remote.post("/groups", {"name": name, "start": start, **_plan_body(plan)}))

    def all(self) -> list[Group]:
        document = self._remote.get("/groups")
        with self._remote.understood():
            return [self._group(each) for each in document["items"]]

    def get(self, name: str) -> Group:
        told, etag = self._remote.tagged(_group_path(name))
        return self._group(told, etag.removeprefix("W/").strip('"'))

    def change(self, name: str, plan: Plan, *, version: str | None = None) -> Group:
        return self._group(self._remote.patch(_group_path(name), _plan_body(plan), etag=_etag(version)))

    def reset(self, name: str, start: int, *, version: str | None = None) -> Group:
        return self._group(self._remote.post(f"{_group_path(name)}/reset", {"start": start}, etag=_etag(version)))

    def renew_secret(self, name: str, *, version: str | None = None) -> Group:
        return self._group(self._remote.post(f"{_group_path(name)}/secret", etag=_etag(version)))

    def delete(self, name: str, *, version: str | None = None) -> None:
        self._remote.delete(_group_path(name), etag=_etag(version))

    def _group(self, told: Json, version: str = "") -> Group:
        with self._remote.understood():
            hook = told["webhook"]
            webhook = None
            if hook:
                webhook = Webhook(
                    url=str(hook["url"]),
                    form=Form(hook["form"]),
                    batch=int(hook["batch"]),
                    linger=float(hook["linger"]),
                    lanes=int(hook["lanes"]),
                    timeout=float(hook["timeout"]),
                )
            plan = Plan(
                products=None if told["allProducts"] else tuple(map(ProductKey, told["products"])),
                topic=str(told["topic"]),
                kinds=frozenset(map(Kind, told["kinds"])),
                ack_wait=float(told["ackWait"]),
                tries=int(told["tries"]),
                apps=tuple(map(str, told["apps"])),
                webhook=webhook,
                paused=bool(told["paused"]),
            )
            return RemoteGroup(
                id=0,
                name=str(told["name"]),
                plan=plan,
                start=int(told["start"]),
                generation=0,
                created=int(told["createTime"]),
                secret=str(told.get("secret") or ""),
                told_version=version,
            )


def _group_path(name: str) -> str:
    return f"/groups/{_segment(name)}"


def _etag(version: str | None) -> str:
    return f'"{version}"' if version else ""


def _plan_body(plan: Plan) -> Json:
    hook = plan.webhook
    return {
        "allProducts": plan.products is None,
        "products": list(plan.products or ()),
        "topic": plan.topic,
        "kinds": [kind.value for kind in Kind if kind in plan.kinds],
        "ackWait": plan.ack_wait,
        "tries": plan.tries,
        "apps": list(plan.apps),
        "paused": plan.paused,
        "webhook": {**asdict(hook), "form": hook.form.value} if hook else None,
    }


class RemoteDesk:
    """What operators look at and do to groups' messages at a server elsewhere, which goes by the groups' names."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def standings(self, groups: Sequence[Group]) -> list[Standing | None]:
        """None where the server cannot say, since its engine is away."""
        document = self._remote.get("/groups")
        with self._remote.understood():
            told = {each["name"]: each["state"] for each in document["items"]}
            return [_standing(told[group.name]) if told.get(group.name) else None for group in groups]

    def try_hook(self, group: Group) -> Trial:
        told = self._remote.post(f"{_group_path(group.name)}/test")
        with self._remote.understood():
            return Trial(int(told["status"]), str(told["fault"]), str(told["text"]), float(told["seconds"]))

    def look(self, group: Group) -> tuple[Standing, Live]:
        told = self._remote.get(f"{_group_path(group.name)}/state")
        with self._remote.understood():
            consumers = [_consumer(group, each) for each in told["consumers"]]
            hooks = [_hook(group, told["webhook"])] if told["webhook"] else []
            return _standing(told), Live(consumers, hooks)

    def dead(self, group: Group, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        found: list[DeadLetter] = []
        while len(found) < limit:
            params = {"after": after or None, "limit": min(limit - len(found), _PAGE)}
            page = self._remote.get(f"{_group_path(group.name)}/dead", **params)
            with self._remote.understood():
                letters = [_letter(each) for each in page["items"]]
                more = page["next"]
            found += letters
            if more is None or not letters:
                break
            after = letters[-1].number
        return found

    def dead_letter(self, group: Group, number: int) -> DeadLetter | None:
        try:
            told = self._remote.get(f"{_group_path(group.name)}/dead/{number}")
        except NotFound:
            self._remote.get(_group_path(group.name))  # it is the group that is not there
            return None
        with self._remote.understood():
            return _letter(told)

    def retry(self, group: Group, numbers: Sequence[int] | None = None, progress: ImportProgress | None = None) -> int:
        path = _group_path(group.name)
        if numbers is None:
            told = _ended(self._remote, self._remote.post(f"{path}/retry-all"), progress, "retrying")
        else:
            told = self._remote.post(f"{path}/retry", {"numbers": [str(number) for number in numbers]})
        return self._count(told)

    def purge(self, group: Group, numbers: Sequence[int] | None = None) -> int:
        body: Json = {"all": True} if numbers is None else {"numbers": [str(number) for number in numbers]}
        return self._count(self._remote.post(f"{_group_path(group.name)}/purge", body))

    def _count(self, told: Json) -> int:
        with self._remote.understood():
            return int(told["count"])


def _standing(told: Json) -> Standing:
    state = GroupState(
        lag=int(told["lag"]),
        held=int(told["held"]),
        oldest=told["oldest"],
        settled=int(told["settled"]),
        dead=int(told["dead"]),
        retrying=int(told["retrying"]),
    )
    return Standing(state, told["rate"])


def _consumer(group: Group, told: Json) -> Consumer:
    return Consumer(
        group.name,
        str(told["app"]),
        str(told["client"]),
        str(told["address"]),
        int(told["since"]),
        int(told["held"]),
        int(told["credit"]),
    )


def _hook(group: Group, told: Json) -> HookState:
    return HookState(
        group.name,
        bool(told["open"]),
        int(told["accepted"]),
        int(told["failed"]),
        int(told["lastSuccess"]),
        int(told["lastFailure"]),
        str(told["fault"]),
        int(told["nextTry"]),
    )


def _letter(told: Json) -> DeadLetter:
    return DeadLetter(
        int(told["number"]), _message(told["message"]), int(told["tries"]), str(told["reason"]), int(told["time"])
    )


def _message(told: Json) -> Message:
    return Message(
        id=int(told["messageId"]),
        topic=told["topic"],
        product_key=ProductKey(told["productKey"]),
        device_name=DeviceName(told["deviceName"]),
        generate_time=told["generateTime"],
        payload=base64.b64decode(told["payload"], validate=True),
        origin=Origin(told["origin"]),
    )


class RemoteOperators:
    """`registry.AccessManagement` of a server elsewhere; of passwords nothing is told but a new one."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def users(self) -> list[User]:
        document = self._remote.get("/users")
        with self._remote.understood():
            return [self._user(each) for each in document["items"]]

    def invite(self, name: str, role: Role) -> tuple[User, str]:
        return self._with_password(self._remote.post("/users", {"name": name, "role": role.value}))

    def renew_password(self, name: str) -> tuple[User, str]:
        return self._with_password(self._remote.post(f"/users/{_segment(name)}/password"))

    def set_role(self, name: str, role: Role) -> User:
        return self._user(self._remote.patch(f"/users/{_segment(name)}", {"role": role.value}))

    def delete_user(self, name: str) -> None:
        self._remote.delete(f"/users/{_segment(name)}")

    def create_key(self, name: str, scope: Scope) -> tuple[ApiKey, str]:
        made = self._remote.post("/keys", {"name": name, "scope": scope.value})
        with self._remote.understood():
            return self._key(made), str(made["key"])

    def api_keys(self) -> list[ApiKey]:
        document = self._remote.get("/keys")
        with self._remote.understood():
            return [self._key(each) for each in document["items"]]

    def delete_key(self, name: str) -> None:
        self._remote.delete(f"/keys/{_segment(name)}")

    def _with_password(self, told: Json) -> tuple[User, str]:
        with self._remote.understood():
            return self._user(told), str(told["password"])

    def _user(self, told: Json) -> User:
        with self._remote.understood():
            return User(
                id=0,
                name=told["name"],
                role=Role(told["role"]),
                password_hash="",
                one_time=told["oneTime"],
                created=told["createTime"],
                last_sign_in=told["lastSignIn"],
            )

    def _key(self, told: Json) -> ApiKey:
        with self._remote.understood():
            return ApiKey(
                id=0,
                name=told["name"],
                scope=Scope(told["scope"]),
                hint=told["hint"],
                created=told["createTime"],
                last_used=told["lastUsed"],
            )


@dataclass(frozen=True, slots=True)
class _Record:
    """A list of the API that grows, newest first, and its stream: where they are, and which member has the rising number."""

    path: str
    event: str
    number: str


_MESSAGES = _Record("/messages", "messages", "messageId")
_REFUSALS = _Record("/logs", "refusals", "id")


async def _follow(
    remote: Remote, record: _Record, filters: Json, *, listed: Json | None = None, since: int | None = None
) -> AsyncGenerator[Json]:
    """Items as they are recorded, for ever, each once and in order; from `since` (ms) where given. Raise Unavailable only when the
    server is not there at the beginning; later it is waited for.

    The stream tells what is new from its first look on, and skips what people could not read so fast. What lies between, or
    was recorded while there was no stream, comes from the list, of which `listed` filters too.
    """
    wanted = {**filters, **(listed or {})}
    pause, longest = _RETRY_SECONDS
    begun = lost = False
    last = 0
    given: dict[int, None] = {}

    def is_new(item: Json) -> bool:
        """Of several gateways or streams an item may come after a younger one."""
        nonlocal last
        number = _number(remote, record, item)
        if number in given:
            return False
        if len(given) > _MOST_MISSED:
            del given[next(iter(given))]
        given[number] = None
        last = max(last, number)
        return True

    async with remote.asynchronous() as client:
        if since is None:
            last = await _newest(remote, client, record, wanted)
        while True:
            try:
                with remote.faults():
                    async with client.stream("GET", f"{record.path}/stream", params=_given(filters)) as response:
                        await remote.check(response)
                        begun, settled, pause = True, False, _RETRY_SECONDS[0]
                        if lost:
                            lost = False
                            remote.tell(f"{remote.url} is there again")
                        for item in await _missed(remote, client, record, {**wanted, "since": since}, last):
                            if is_new(item):
                                yield item
                        async for event, data in _events(response.aiter_lines()):
                            with remote.understood():
                                told = dict(json.loads(data)) if event == record.event else {}
                            if not settled or told.get("skipped") or (told and listed):
                                # The first sign of life says that the stream has begun to look.
                                settled = True
                                missed = await _missed(remote, client, record, {**wanted, "since": since}, last)
                            else:
                                missed = []
                            for item in [*missed, *([] if listed else told.get("items", []))]:
                                if is_new(item):
                                    yield item
                    raise httpx.RemoteProtocolError("the stream was ended")
            except Unavailable as fault:
                if not begun:
                    raise
                if not lost:
                    lost = True
                    remote.tell(f"{fault}; it is tried again until it answers")
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)


def _number(remote: Remote, record: _Record, item: Json) -> int:
    with remote.understood():
        return int(item[record.number])


async def _newest(remote: Remote, client: httpx.AsyncClient, record: _Record, wanted: Json) -> int:
    page = await remote.fetch(client, record.path, **wanted, limit=1)
    with remote.understood():
        return _number(remote, record, page["items"][0]) if page["items"] else 0


async def _missed(remote: Remote, client: httpx.AsyncClient, record: _Record, wanted: Json, last: int) -> list[Json]:
    """What was recorded after the number `last`, in order: of more than _MOST_MISSED the newest."""
    found: list[Json] = []
    cursor, size = None, _FIRST_PAGE
    while True:
        page = await remote.fetch(client, record.path, **wanted, limit=size, cursor=cursor)
        with remote.understood():
            items, cursor = page["items"], page["next"]
        fresh = [item for item in items if _number(remote, record, item) > last]
        found += fresh
        if cursor is None or len(fresh) < len(items):
            break
        if len(found) >= _MOST_MISSED:
            remote.tell(f"of what came so far only the newest {len(found)} are shown")
            break
        size = _PAGE
    return found[::-1]


async def _events(lines: AsyncIterator[str]) -> AsyncGenerator[tuple[str, str]]:
    """(event, data) of a stream of server-sent events; ("", "") for a comment, which is a sign of life."""
    event, data = "", []
    async for line in lines:
        if line.startswith(":"):
            yield "", ""
        elif line.startswith("event:"):
            event = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif not line:
            if data:
                yield event, "\n".join(data)
            event, data = "", []


class RemoteReader:
    """`engine.Reader` of a server elsewhere."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    async def close(self) -> None:
        self._remote.close()

    async def latest(self, query: Query, limit: int) -> list[Message]:
        """Read in pages of 1,000."""
        params = {**_asked(query), "since": query.since, "until": query.until}
        cursor = str(query.before) if query.before is not None else None
        found: list[Message] = []
        async with self._remote.asynchronous() as client:
            while len(found) < limit:
                size = min(limit - len(found), _PAGE)
                page = await self._remote.fetch(client, "/messages", **params, limit=size, cursor=cursor)
                with self._remote.understood():
                    found += [self._message(each) for each in page["items"]]
                    cursor = page["next"]
                if cursor is None:
                    break
        return found[::-1]

    async def follow(self, query: Query) -> AsyncGenerator[Message]:
        async with contextlib.aclosing(_follow(self._remote, _MESSAGES, _asked(query), since=query.since)) as told:
            async for each in told:
                yield self._message(each)

    async def tail(self, query: Query, *, most: int = 50, pause: float = 0.25) -> AsyncGenerator[Glimpse]:
        """One message each: who asks from elsewhere is told in the server's parts already."""
        async with contextlib.aclosing(self.follow(query)) as messages:
            async for message in messages:
                yield Glimpse([message], 0)

    async def by_id(self, message_id: int) -> Message | None:
        async with self._remote.asynchronous() as client:
            try:
                told = await self._remote.fetch(client, f"/messages/{message_id}")
            except NotFound:
                return None
        return self._message(told)

    async def state(self) -> StreamState:
        async with self._remote.asynchronous() as client:
            told = await self._remote.fetch(client, "/stats")
        with self._remote.understood():
            if told["messages"] is None:
                raise Unavailable("the engine of the server is away")
            return StreamState(int(told["messages"]), int(told["bytes"]))

    def send(self, topic: str, product_key: str, device_name: str | None, payload: bytes) -> Json:
        """Send a message down as `asking.send_down` does; to all devices of the product for None."""
        body = {"topic": topic, "payload": base64.b64encode(payload).decode()}
        if device_name is None:
            told = self._remote.post(f"{_product_path(product_key)}/broadcasts", body)
            with self._remote.understood():
                return {"sessions": int(told["sessions"])}
        told = self._remote.post(f"{_device_path(product_key, device_name)}/messages", body)
        with self._remote.understood():
            return {"messageId": int(told["messageId"]), "way": str(told["way"])}

    def _message(self, told: Json) -> Message:
        with self._remote.understood():
            return _message(told)


def _asked(query: Query) -> Json:
    return {"product": query.product_key, "device": query.device_name, "topic": query.topic}


class RemoteJournal:
    """The record of refusals of a server elsewhere."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def read(self, wanted: Wanted, limit: int) -> list[Refusal]:
        """As `journal.read`."""
        params = {**_told_of(wanted), **_listed(wanted), "since": wanted.since, "until": wanted.until}
        found = [self._refusal(each) for each in self._remote.pages("/logs", limit=limit, **params)]
        return sorted(found, key=attrgetter("at", "id"))  # servers write in turn, not in the order of events

    async def follow(self, wanted: Wanted) -> AsyncGenerator[Refusal]:
        """As `journal.follow`."""
        told = _follow(
            self._remote, _REFUSALS, _told_of(wanted), listed=_given(_listed(wanted)) or None, since=wanted.since
        )
        async with contextlib.aclosing(told):
            async for each in told:
                yield self._refusal(each)

    def _refusal(self, told: Json) -> Refusal:
        with self._remote.understood():
            return Refusal(
                request_id=told["requestId"],
                at=told["time"],
                endpoint=told["endpoint"],
                code=told["code"],
                status=told["status"],
                product_key=told["productKey"],
                device_name=told["deviceName"],
                address=told["address"],
                topic=told["topic"],
                reason=told["reason"],
                times=told.get("times", 1),
                id=int(told["id"]),
                gateway=told.get("gateway", ""),
            )


def _told_of(wanted: Wanted) -> Json:
    """What the stream filters by."""
    return {"product": wanted.product, "device": wanted.device, "code": wanted.code}


def _listed(wanted: Wanted) -> Json:
    """What the list alone filters by."""
    return {"requestId": wanted.request_id, "address": wanted.address, "endpoint": wanted.endpoint}
