"""Lets applications in at the NATS port: answers nats-server's authorization callout, and closes what no longer stands.

An application gets the least that reads its own durable consumer: the two calls for it, its acknowledgements, a private
inbox; and, if it sends, the subjects of the sending service for its own products. It lives in an account of its own, APPS,
into which nothing of the stream's account is let but just these services: a reply goes wherever its request says, and only
an account's border keeps a reply from being stored as a device's message.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import nats.errors

from uplinkd.core.apps import check_app_secret, inbox_of
from uplinkd.core.errors import Unavailable
from uplinkd.core.model import App
from uplinkd.core.subjects import SENDING, filters_of
from uplinkd.engine.api import NotThere, call, connect, consumers_with, first_at, in_words, sequence_in
from uplinkd.engine.embedded import APPS_ACCOUNT, Access
from uplinkd.engine.nkeys import AccountKey, claims_of
from uplinkd.engine.stream import base_metadata, base_of, parts
from uplinkd.observe import Occasionally

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

__all__ = ["Apps", "Callout", "rights_of"]

log = logging.getLogger("uplinkd.engine")

_ASKED = "$SYS.REQ.USER.AUTH"
_QUEUE = "uplinkd"
_REQUEST_SECONDS = 2.0
_PAUSE_SECONDS = 0.5
# A login that was answered in the moment before a change is seen by a second look.
_SECOND_LOOK_SECONDS = 1.0
_PAGE = 1024
_ACK_WAIT = 30 * 10**9
_MAX_ACK_PENDING = 1000
_MINE = "uplinkd.app"  # marks our consumers, in their metadata


class Apps(Protocol):
    """What the callout needs of the registry, from any thread."""

    def apps(self) -> list[App]: ...
    def find_app(self, key: str) -> App | None: ...


def rights_of(app: App, partitions: int = 1) -> dict[str, Any]:
    """What the application may do in NATS, as the claims of a user say it; nothing else is allowed."""
    publish = [
        subject
        for part in parts(partitions)
        for subject in (
            f"$JS.API.CONSUMER.MSG.NEXT.{part.name}.{app.key}",
            f"$JS.API.CONSUMER.INFO.{part.name}.{app.key}",
            f"$JS.ACK.{part.name}.{app.key}.>",
            f"$JS.ACK.*.*.{part.name}.{app.key}.>",  # a form that servers may be set to, with domain and account in front
        )
    ]
    if app.sends:
        for product_key in app.products:
            publish += [SENDING + subject for subject in filters_of(product_key, None)]
            publish.append(f"{SENDING}/.broadcast.{product_key}.*")
    return {"pub": {"allow": publish}, "sub": {"allow": [f"{inbox_of(app)}.>"]}}


class Callout:
    """Run in each worker; nats-server asks one of them about each login. An outage of engine or registry is waited out."""

    def __init__(self, apps: Apps, access: Access, key: AccountKey, partitions: int = 1) -> None:
        self._apps = apps
        self._parts = parts(partitions)
        self._access = access
        self._key = key
        self.answers = False  # whether nats-server's questions reach us
        self._stirred = asyncio.Event()
        self._warn = Occasionally(10)
        self._warn_refused = Occasionally(10)
        self._warn_plain = Occasionally(3600)

    def changed(self, _app_id: int) -> None:
        """Look at once whether what is connected still stands. All of it: there are few applications, and changes are rare."""
        self._stirred.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._serve()
            except Unavailable as fault:
                if self._warn():
                    log.warning("applications cannot sign in to NATS: %s", fault)
            except Exception:
                log.exception("a fault of ours while letting applications in")
            self.answers = False
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _serve(self) -> None:
        """As long as the connection to nats-server lasts."""
        access = self._access.now()
        async with (
            self._connected(access) as engine,
            self._connected(Access(access.urls, "system", access.system)) as system,
        ):

            async def asked(message: Msg) -> None:
                await self._asked(engine, message)

            with in_words():
                await engine.subscribe(_ASKED, queue=_QUEUE, cb=asked)
                for part in self._parts:
                    await engine.subscribe(part.deleted, cb=self._stream_deleted)
                await engine.flush()
            self.answers = again = True
            while not (engine.is_closed or system.is_closed):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SECOND_LOOK_SECONDS if again else None):
                        await self._stirred.wait()
                again = self._stirred.is_set()
                self._stirred.clear()
                try:
                    with in_words():
                        await self._look_over(engine, system)
                except Unavailable as fault:
                    again = True
                    if self._warn():
                        log.warning("the rights of applications at NATS were not looked over: %s", fault)

    @contextlib.asynccontextmanager
    async def _connected(self, access: Access) -> AsyncIterator[Client]:
        client = await connect(access, "uplinkd callout", self._stirred)
        try:
            yield client
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                await client.close()

    # -- who may come in

    async def _asked(self, engine: Client, message: Msg) -> None:
        """One login. Only nats-server can ask here: no application's account reaches this subject."""
        try:
            login = _Login.of(message.data)
        except (ValueError, KeyError, TypeError):
            log.warning("a login at NATS was asked about in words that this version does not know")
            return
        answer: dict[str, Any] = {"type": "authorization_response", "version": 2}
        try:
            answer["jwt"] = self._user(login, await self._signed_in(engine, login))
        except _No as no:
            answer["error"] = str(no)
            if self._warn_refused():
                log.warning("an application was refused at NATS: user %r from %s: %s", login.user[:64], login.host, no)
        claims = {"sub": login.nkey, "aud": login.server, "nats": answer}
        with contextlib.suppress(nats.errors.Error, OSError):
            await message.respond(self._key.sign(claims, now=round(time.time())).encode())

    async def _signed_in(self, engine: Client, login: _Login) -> App:
        try:
            app = await asyncio.to_thread(self._apps.find_app, login.user)
            if not check_app_secret(app, login.password) or app is None:
                raise _No("wrong secret" if app else "there is no such application")
            if not app.products:
                raise _No(f"it has no product yet; `uplinkd app grant {app.name} PK` gives it one")
            with in_words():
                await self._ensure_consumers(engine, app)
        except Unavailable as fault:
            raise _No(str(fault)) from fault
        if not login.encrypted and not login.local and self._warn_plain():
            log.warning(
                "application %s signs in to NATS from %s without TLS: its secret can be read on the way",
                app.name,
                login.host,
            )
        return app

    def _user(self, login: _Login, app: App) -> str:
        rights = {**rights_of(app, len(self._parts)), "subs": -1, "data": -1, "payload": -1}
        claims = {"sub": login.nkey, "aud": APPS_ACCOUNT, "name": _name_of(app)}
        return self._key.sign({**claims, "nats": {"type": "user", "version": 2, **rights}}, now=round(time.time()))

    # -- what no longer stands

    async def _stream_deleted(self, _message: Msg) -> None:
        self._stirred.set()

    async def _look_over(self, engine: Client, system: Client) -> None:
        """Close the connections of applications that were deleted or have other rights now; remove the consumers of deleted ones.

        Connections and consumers are listed first: what is known of the applications is then at least as new.
        """
        connections = [each async for each in _connections(system)]
        consumers = {
            part.name: await consumers_with(functools.partial(_call, engine, f"CONSUMER.LIST.{part.name}"), _MINE)
            for part in self._parts
        }
        apps = {app.key: app for app in await asyncio.to_thread(self._apps.apps)}
        for server, number, name in connections:
            app = apps.get(name.partition("/")[0])
            if app is None or name != _name_of(app):
                body = json.dumps({"cid": number}).encode()
                await system.request(f"$SYS.REQ.SERVER.{server}.KICK", body, timeout=_REQUEST_SECONDS)
            else:  # its consumer goes with the stream, when somebody deletes that
                await self._ensure_consumers(engine, app)
        for stream, names in consumers.items():
            for name in names - apps.keys():
                await _call(engine, f"CONSUMER.DELETE.{stream}.{name}")

    async def _ensure_consumers(self, engine: Client, app: App) -> None:
        for part in self._parts:
            await _ensure_consumer(engine, app, part.name)


class _No(Exception):  # noqa: N818 - names what happened
    """Why an application is not let in, for the log."""


@dataclass(frozen=True, slots=True)
class _Login:
    """What nats-server asks about: who wants in from where, `nkey` and `server` to answer with."""

    user: str
    password: str
    host: str
    encrypted: bool
    nkey: str
    server: str

    @classmethod
    def of(cls, token: bytes) -> _Login:
        """ValueError, KeyError or TypeError when the question is not understood."""
        asked = claims_of(token)["nats"]
        options = asked["connect_opts"]
        return cls(
            user=str(options.get("user", "")),
            password=str(options.get("pass", "")),
            host=str(asked["client_info"].get("host", "")),
            encrypted="client_tls" in asked,
            nkey=asked["user_nkey"],
            server=asked["server_id"]["id"],
        )

    @property
    def local(self) -> bool:
        return self.host.startswith("127.") or self.host == "::1"


async def _ensure_consumer(engine: Client, app: App, stream_name: str) -> None:
    """The application's durable consumer of a stream with the filters of its products; what else was set on it by hand stays. Its
    metadata has the base of the ids: what is added to a message's stream sequence makes its messageId; in a stream that was
    restored, which messages have another; and of several streams, by what the sequence is multiplied first."""
    stream = await _call(engine, f"STREAM.INFO.{stream_name}")
    metadata = {_MINE: app.name, **base_metadata(base_of(stream["config"]))}
    filters = [subject for product_key in app.products for subject in filters_of(product_key, None)]
    try:
        config = (await _call(engine, f"CONSUMER.INFO.{stream_name}.{app.key}"))["config"]
        known = config.get("metadata") or {}
        if set(config.get("filter_subjects") or ()) == set(filters) and metadata.items() <= known.items():
            return
        config = {**config, "filter_subjects": filters, "metadata": {**known, **metadata}}
    except NotThere:
        wanted = json.dumps(first_at(app.created)).encode()
        first = await engine.request(f"$JS.API.DIRECT.GET.{stream_name}", wanted, timeout=_REQUEST_SECONDS)
        config = {
            "name": app.key,
            "durable_name": app.key,
            "description": f"application {app.name}",
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": sequence_in(first.headers or {}, int(stream["state"]["last_seq"])),
            "ack_policy": "explicit",
            "ack_wait": _ACK_WAIT,
            "max_ack_pending": _MAX_ACK_PENDING,
            "filter_subjects": filters,
            "metadata": metadata,
        }
    await _call(engine, f"CONSUMER.CREATE.{stream_name}.{app.key}", {"stream_name": stream_name, "config": config})


async def _connections(system: Client) -> AsyncIterator[tuple[str, int, str]]:
    """(server, connection, name) of every application that is connected."""
    offset, total = 0, 1
    while offset < total:
        body = json.dumps({"auth": True, "acc": APPS_ACCOUNT, "limit": _PAGE, "offset": offset}).encode()
        answer = json.loads((await system.request("$SYS.REQ.SERVER.PING.CONNZ", body, timeout=_REQUEST_SECONDS)).data)
        facts = answer["data"]
        for each in facts["connections"]:
            yield answer["server"]["id"], each["cid"], each.get("authorized_user", "")
        offset, total = offset + _PAGE, facts["total"]


async def _call(engine: Client, action: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One call of the JetStream API; raise Unavailable with what it says is wrong."""
    return await call(engine, action, body, patience=_REQUEST_SECONDS)


def _name_of(app: App) -> str:
    """The name that its connections bear at nats-server: another one when it may do something else, read other products, or has
    another secret."""
    facts = json.dumps([rights_of(app), app.products, app.secret_hash.hex()]).encode()
    return f"{app.key}/{hashlib.sha256(facts).hexdigest()[:16]}"
