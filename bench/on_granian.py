"""uplinkd's gateway behind granian: an RSGI application that puts together what `uplinkd.worker` does, so that the server for HTTP
and TLS is all that differs.

Run by `bench.peers` with the data folder in the environment, where an engine runs already.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
from pathlib import Path
from typing import Any, Protocol

from uplinkd.core import wire
from uplinkd.core.errors import Code, Refused
from uplinkd.engine import open_publisher
from uplinkd.engine.bus import NatsBus
from uplinkd.engine.down import JetStreamDownlink
from uplinkd.engine.embedded import announced
from uplinkd.flow import Flow, network_of
from uplinkd.gateway import Gateway, Request, Wait
from uplinkd.peers import Peers
from uplinkd.presence import Presence
from uplinkd.registry import open_registry
from uplinkd.registry.cache import DeviceCache
from uplinkd.roster import Roster
from uplinkd.settings import Settings

_OK = [("content-type", "application/json")]


class Scope(Protocol):
    """What RSGI tells of a request."""

    path: str
    query_string: str
    client: str
    headers: Any


class Exchange(Protocol):
    """How RSGI gives the body and takes the answer."""

    async def __call__(self) -> bytes: ...

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None: ...


class Application:
    """One for each worker of granian, which calls `__rsgi_init__` in it."""

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)  # as uplinkd's own worker
        loop.run_until_complete(self._start())

    async def _start(self) -> None:
        settings = Settings(data=Path(os.environ["BENCH_DATA"]), device_rate=0, device_bytes=0, auth_rate=0)
        access = announced(settings)
        registry = open_registry(settings)
        cache = DeviceCache(registry)
        engine = open_publisher(settings, access)
        bus = NatsBus(access, "uplinkd worker 0")
        downlink = JetStreamDownlink(settings, bus)
        roster = Roster(bus, "bench.0")
        peers = Peers(bus, roster.instance)
        presence = Presence(settings, registry, engine, bus, worker="bench.0", peers=peers)
        self._gateway = Gateway(
            settings,
            cache=cache,
            engine=engine,
            flow=Flow(settings, shared=False),
            presence=presence,
            roster=roster,
            downlink=downlink,
            keys=registry.signing_keys(),
        )
        await engine.start()
        await presence.start()
        self._duties = [asyncio.create_task(each) for each in (bus.run(), cache.run(), presence.run(), downlink.run())]

    async def __rsgi__(self, scope: Scope, exchange: Exchange) -> None:
        exchange.response_bytes(200, _OK, await self._answer(scope, await exchange()))

    async def _answer(self, scope: Scope, body: bytes) -> bytes:
        headers, path = scope.headers, scope.path
        address = scope.client.rpartition(":")[0]
        request = Request(
            address,
            headers.get("content-type"),
            body,
            headers.get("password"),
            path.removeprefix("/topic").encode(),
            bool(scope.query_string),
            network_of(address),
        )
        try:
            while True:
                try:
                    if path == "/auth":
                        return wire.token_issued(self._gateway.authenticate(request))
                    return wire.published(await self._stored(request))
                except Wait as wait:
                    await wait.fetch()
        except Refused as refused:
            return wire.refusal(refused.code, secrets.token_hex(8))

    async def _stored(self, request: Request) -> int:
        """The message's id."""
        stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def done(message_id: int, fault: str) -> None:
            if stored.done():
                return
            if fault:
                stored.set_exception(Refused(Code.PUBLISH_MESSAGE_ERROR, fault))
            else:
                stored.set_result(message_id)

        self._gateway.publish(request, done)
        return await stored


app = Application()
