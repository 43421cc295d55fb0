"""Posts to webhooks, for a whole process: TLS verified, and connected to no address that core.networks forbids.

The address is looked at once more where the socket is made for it. So it makes no difference how a URL spells it, or whether a
name is another address from one look-up to the next. Nothing is taken from the environment, no cookie kept, no redirect followed.
"""

from __future__ import annotations

import asyncio
import io
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import Connection
from yarl import URL

from uplinkd import __version__
from uplinkd.core.networks import Network, may_reach, networks_of
from uplinkd.core.webhooks import one_line, retry_after
from uplinkd.settings import Settings

__all__ = ["Answer", "Lookup", "Sender"]

_MOST_ANSWER = 64 * 1024
_MOST_TEXT = 2048
_PASS_OVER_SECONDS = 0.5
# Beyond this aiohttp warns about a body that is sent at once; from a file it takes it in parts.
_LARGE_BODY = 1024**2
# A name that nobody answers for keeps a thread for as long as the system's resolver has patience; it is looked up once at a time.
_LOOKUP_THREADS = 64
_NAMES_SECONDS = 10
# Servers close idle connections after 5 s and more, often. One that goes just as it is used costs one repetition.
_IDLE_SECONDS = 15.0
_HEADERS = {"User-Agent": f"uplinkd/{__version__}"}
_NO_LIMIT = aiohttp.ClientTimeout(total=None, sock_connect=None)

Lookup = Callable[[str, int], Awaitable[list[str]]]
"""The addresses of a name; OSError when there are none."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request: `status`, 0 without an answer; `fault`, a sentence about the target, empty when it has accepted;
    `text`, the beginning of what else it said; `retry_after`, how many seconds it wants to be left alone; and how long it took."""

    status: int
    fault: str = ""
    text: str = ""
    retry_after: float | None = None
    seconds: float = 0.0


class _ForbiddenAddress(OSError):  # noqa: N818 - names what happened
    """The text is for the operator."""


class Sender:
    """One for a process, made in its event loop."""

    def __init__(self, settings: Settings, *, lookup: Lookup | None = None) -> None:
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, "uplinkd-names")
        self._allowed = networks_of(settings.webhook_networks)
        self._lookup = lookup or self._look_up
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        """Drop every connection."""
        for session in self._sessions.values():
            await session.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, *, timeout: float) -> Answer:  # noqa: ASYNC109
        """Post once; never raises for what the target does."""
        clock = time.monotonic
        begin = clock()
        try:
            async with asyncio.timeout(timeout) as limit:
                try:
                    answer = await self._post(url, headers, body, limit)
                except (aiohttp.ServerDisconnectedError, ConnectionResetError):
                    # Mostly an idle connection that it has closed at the same moment; it knows a repetition by its id.
                    answer = await self._post(url, headers, body, limit)
        except (TimeoutError, OSError, aiohttp.ClientError, ValueError) as fault:
            return Answer(0, _explained(fault, timeout), seconds=clock() - begin)
        return Answer(*answer, seconds=clock() - begin)

    async def _post(
        self, url: str, headers: Mapping[str, str], body: bytes, limit: asyncio.Timeout
    ) -> tuple[int, str, str, float | None]:
        target = URL(url, encoded=True)
        data = body if len(body) <= _LARGE_BODY else io.BytesIO(body)
        async with self._session(target.scheme).post(
            target, data=data, headers=headers, allow_redirects=False, timeout=_NO_LIMIT
        ) as response:
            status = response.status
            if 200 <= status < 300:
                limit.reschedule(None)  # it has accepted, whatever becomes of the rest of its answer
                await _pass_over(response)
                return status, "", "", None
            text = one_line((await _read(response))[:_MOST_TEXT].decode(errors="replace"))
            again = response.headers.get("Retry-After")
            rest = None if again is None else retry_after(again, now=time.time())
            return status, _said(status), text, rest

    def _session(self, scheme: str) -> aiohttp.ClientSession:
        session = self._sessions.get(scheme)
        if session is None:
            guard = _Guard(self._allowed, self._lookup, internet=scheme == "https")
            session = self._sessions[scheme] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,  # each group has its own: one request of a lane
                    ssl=ssl.create_default_context() if scheme == "https" else True,  # that takes 20 ms
                    resolver=guard,
                    socket_factory=guard.socket,
                    ttl_dns_cache=_NAMES_SECONDS,
                    keepalive_timeout=_IDLE_SECONDS,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=_HEADERS,
                request_class=_Request,
                skip_auto_headers=("Accept", "Accept-Encoding"),
                auto_decompress=False,
                trust_env=False,
            )
        return session

    async def _look_up(self, host: str, port: int) -> list[str]:
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(address[0]) for *_, address in found]


class _Request(aiohttp.ClientRequest):
    """One that takes no answer for its own which was there before it was sent, from a target that has answered twice."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        if conn.protocol is None or conn.protocol.should_close:
            raise aiohttp.ServerDisconnectedError
        return await super().send(conn)


class _Guard(AbstractResolver):
    """Looks names up, and lets a connection go to permitted addresses alone."""

    def __init__(self, allowed: tuple[Network, ...], lookup: Lookup, *, internet: bool) -> None:
        self._allowed = allowed
        self._lookup = lookup
        self._internet = internet

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = list(dict.fromkeys(await self._lookup(host, port)))
        permitted = [address for address in addresses if self._permits(address)]
        if not permitted:
            raise self._forbidden(f"{host} is {', '.join(addresses) or 'no address'}")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in permitted
        ]

    async def close(self) -> None:
        pass

    def socket(self, info: tuple[Any, ...]) -> socket.socket:
        """A socket for just this address."""
        family, kind, protocol, _, address = info
        if not self._permits(address[0]):
            raise self._forbidden(f"it is {address[0]}")
        return socket.socket(family, kind, protocol)

    def _permits(self, text: str) -> bool:
        try:
            return may_reach(ip_address(text), self._allowed, internet=self._internet)
        except ValueError:
            return False

    def _forbidden(self, what: str) -> _ForbiddenAddress:
        if self._internet:
            return _ForbiddenAddress(f"{what}, which is no address of the internet and not in webhook_networks")
        return _ForbiddenAddress(f"{what}, which is not in webhook_networks: anywhere else it is https:// alone")


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """What it says, up to a bound; the connection of one that says more is of no use any more."""
    content = response.content
    if content.at_eof():
        return b""
    parts, size = [], 0
    while part := await content.readany():
        parts.append(part)
        size += len(part)
        if size > _MOST_ANSWER:
            response.close()
            break
    return b"".join(parts)


async def _pass_over(response: aiohttp.ClientResponse) -> None:
    """Have the connection free for the next request, if that is soon."""
    if not response.content.at_eof():
        try:
            async with asyncio.timeout(_PASS_OVER_SECONDS):
                await _read(response)
        except (TimeoutError, aiohttp.ClientError):
            response.close()


def _said(status: int) -> str:
    if 300 <= status < 400:
        return f"it answered {status}, a redirect, which webhooks do not follow"
    try:
        return f"it answered {status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"it answered {status}"


def _explained(fault: Exception, seconds: float) -> str:
    """A fault of the connection as a sentence for people."""
    cause = fault.os_error if isinstance(fault, aiohttp.ClientConnectorError) else fault
    reason = str(cause)
    if isinstance(
        cause, OSError
    ):  # those of look-ups have negative numbers; other texts are asyncio's, with the address
        reason = os.strerror(cause.errno) if cause.errno and cause.errno > 0 else cause.strerror or reason
    match fault, cause:
        case _, _ForbiddenAddress():
            return str(cause)
        case TimeoutError(), _:
            return f"it did not answer within {seconds:g} s"
        case aiohttp.ClientConnectorCertificateError(), _:
            error = fault.certificate_error
            why = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else str(error)
            return f"its certificate is not accepted: {why}"
        case aiohttp.ClientConnectorDNSError(), _:
            return f"its name is not found: {reason}"
        case aiohttp.ClientSSLError(), ssl.SSLError():
            return f"no TLS with it: {(cause.reason or str(cause)).replace('_', ' ').lower()}"
        case aiohttp.ServerDisconnectedError() | ConnectionResetError(), _:
            return "it closed the connection without an answer"
        case aiohttp.ClientConnectorError(), _:
            return f"no connection to it: {reason}"
        case aiohttp.InvalidURL() | ValueError(), _:
            return "its URL is none that can be reached"
        case OSError(), _:
            return f"the connection to it failed: {reason}"
        case aiohttp.ClientResponseError(), _:
            return f"its answer is not HTTP: {one_line(fault.message.partition(chr(10))[0]).removesuffix(':')}"
        case _:  # not in the exception's words, which may have the URL and its query
            return f"its answer broke off ({type(fault).__name__})"
