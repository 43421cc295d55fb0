"""The bus over core NATS, with the stock client: it reconnects wherever the engine is then, and hears on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import nats.errors

from uplinkd.core.errors import Unavailable
from uplinkd.engine import Handler, Told
from uplinkd.engine.api import connect, words
from uplinkd.engine.embedded import Access
from uplinkd.observe import Occasionally
from uplinkd.tasks import spawn

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

__all__ = ["NatsBus"]

log = logging.getLogger("uplinkd.engine")

_SETTLE_SECONDS = 2
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


@dataclass(slots=True, eq=False)
class _Ear:
    subject: str
    queue: str
    handler: Handler
    subscription: Subscription | None = field(default=None, repr=False)


class NatsBus:
    """`engine.Bus`; one connection of one worker. Made in the event loop; `run` keeps it connected until cancelled."""

    def __init__(self, access: Access, name: str) -> None:
        self._access = access
        self._name = name
        self._client: Client | None = None
        self._ears: set[_Ear] = set()
        self._acts: list[Callable[[], Awaitable[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._warn = Occasionally(10)
        self._away = "the engine is away: it has not been reached yet"

    @property
    def connected(self) -> bool:
        return self._client is not None

    def on_connected(self, act: Callable[[], Awaitable[None]]) -> None:
        self._acts.append(act)

    async def run(self) -> None:
        """Connect, and connect anew whenever that ends."""
        pause = _FIRST_PAUSE
        while True:
            ended = asyncio.Event()
            client: Client | None = None
            try:
                client = await connect(self._access, self._name, ended)
                heard = set[_Ear]()
                while unheard := self._ears - heard:  # some begin to listen meanwhile
                    for ear in unheard:
                        await self._hear(client, ear)
                    await client.flush(_SETTLE_SECONDS)
                    heard |= unheard
                self._client = client
                for act in self._acts:
                    await act()
                pause = _FIRST_PAUSE
                await ended.wait()
            except Unavailable as fault:
                self._gone(str(fault))
            except (nats.errors.Error, OSError, TimeoutError) as error:
                self._gone(f"the engine is away: {words(error)}")
            finally:
                self._client = None
                for ear in self._ears:
                    ear.subscription = None
                if client is not None:
                    with contextlib.suppress(nats.errors.Error, OSError):
                        await client.close()
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _gone(self, fault: str) -> None:
        self._away = fault
        if self._warn():
            log.warning("%s", fault)

    def tell(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None, *, reply: str = "") -> None:
        if self._client is not None:
            self._do(self._client.publish(subject, payload, reply, headers=dict(headers) if headers else None))

    def tell_each(self, told: Sequence[tuple[str, bytes]]) -> None:
        if self._client is not None:
            self._do(_publish_each(self._client, told))

    def listen(self, subject: str, handler: Handler, *, queue: str = "") -> Callable[[], None]:
        ear = _Ear(subject, queue, handler)
        self._ears.add(ear)
        if self._client is not None:
            self._do(self._hear(self._client, ear))

        def end() -> None:
            self._ears.discard(ear)
            if ear.subscription is not None:
                self._do(_unsubscribe(ear.subscription))
                ear.subscription = None

        return end

    async def settled(self) -> None:
        client = self._client
        if client is None:
            raise Unavailable(self._away)
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=_SETTLE_SECONDS)
        try:
            await client.flush(_SETTLE_SECONDS)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise Unavailable(f"the engine does not answer: {words(error)}") from error

    async def ask(
        self, subject: str, payload: bytes = b"", headers: Mapping[str, str] | None = None, *, patience: float = 2.0
    ) -> Told:
        client = self._client
        if client is None:
            raise Unavailable(self._away)
        try:
            answer = await client.request(
                subject, payload, timeout=patience, headers=dict(headers) if headers else None
            )
        except nats.errors.NoRespondersError as error:
            raise Unavailable("no gateway is there to do it") from error
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise Unavailable(f"the engine does not answer: {words(error)}") from error
        return _told(answer)

    async def ask_each(self, subject: str, payload: bytes = b"", *, patience: float) -> list[Told]:
        if self._client is None:
            raise Unavailable(self._away)
        inbox, answers = self._client.new_inbox(), list[Told]()
        end = self.listen(inbox, answers.append)
        try:
            self.tell(subject, payload, reply=inbox)
            await asyncio.sleep(patience)
        finally:
            end()
        return [each for each in answers if "Status" not in each.headers]  # NATS says itself when nobody is there

    async def _hear(self, client: Client, ear: _Ear) -> None:
        async def take(message: Msg) -> None:
            try:
                ear.handler(_told(message))
            except Exception:
                log.exception("a fault of ours while hearing %s", ear.subject)

        # The client has room for 1,024 that wait for the socket, and forgets those beyond when the connection ends.
        async with asyncio.timeout(_SETTLE_SECONDS):
            ear.subscription = await client.subscribe(ear.subject, queue=ear.queue, cb=take)
        if ear not in self._ears:  # it was ended meanwhile
            await _unsubscribe(ear.subscription)

    def _do(self, act: Awaitable[None]) -> None:
        """Have `act` done soon; a connection that ends meanwhile is noticed elsewhere."""

        async def guarded() -> None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await act

        spawn(guarded(), self._tasks)


async def _publish_each(client: Client, told: Sequence[tuple[str, bytes]]) -> None:
    for subject, payload in told:
        await client.publish(subject, payload)


async def _unsubscribe(subscription: Subscription) -> None:
    with contextlib.suppress(nats.errors.Error, OSError, ValueError):
        async with asyncio.timeout(_SETTLE_SECONDS):
            await subscription.unsubscribe()


def _told(message: Msg) -> Told:
    return Told(message.subject, message.data, message.headers or {}, message.reply)
