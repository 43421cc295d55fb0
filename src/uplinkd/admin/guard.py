"""What holds for every request at the operator's door: headers that keep browsers strict, bounds on what may be sent and how
slowly, and that it was meant for this server.

A page of anybody may have its own name resolve to 127.0.0.1 and then read what it gets from there (DNS rebinding). Such a request
carries that name as its Host, so a console without TLS, which is of this machine alone, goes by an address, by localhost, and by
`tls_name` only. Over TLS the certificate has the names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uplinkd.admin.problems import problem
from uplinkd.settings import is_address

__all__ = ["Guard"]

_BODY_BYTES = 2 * 1024**2
# Fleets, which are read as a stream.
_FLEET_BYTES = 257 * 1024**2
_FLEETS = ("/api/v1/imports", "/import")
# For a whole body; of a fleet for each part of it.
_BODY_SECONDS = 30.0
_CLOSE = {"Connection": "close"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'{styles}; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_STRICT = _POLICY.format(styles="")
_API_PAGE = "/api/v1/docs"
# Swagger UI writes style attributes.
_FOR_API_PAGE = _POLICY.format(styles=" 'unsafe-inline'")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, tls: bool, names: Collection[str] = ()) -> None:
        self._app = app
        self._tls = tls
        self._names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        headers = Headers(scope=scope)
        fleet = path in _FLEETS
        most = _FLEET_BYTES if fleet else _BODY_BYTES
        received, whole = 0, False
        deadline = asyncio.get_running_loop().time() + _BODY_SECONDS

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal received, whole, deadline
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {_BODY_SECONDS:g} s", _CLOSE) from None
            if fleet:
                deadline = asyncio.get_running_loop().time() + _BODY_SECONDS
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > most:
                raise HTTPException(413, f"the body is larger than {most} bytes", _CLOSE)
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers["Content-Security-Policy"] = _FOR_API_PAGE if path == _API_PAGE else _STRICT
                if self._tls:
                    headers["Strict-Transport-Security"] = "max-age=31536000"
                if not path.startswith("/static/"):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        fault = None
        name = _name_of(headers.get("host", ""))
        if not (self._tls or _is_here(name) or name in self._names):
            fault = (
                421,
                f"this console does not go by the name {name[:255]!r}; if that is a name of it, add it to tls_name",
            )
        elif scope["method"] not in ("GET", "HEAD") and _is_foreign(headers):
            fault = 403, "this request comes from a page of another site"
        if fault is None:
            await self._app(scope, bounded, with_headers)
        else:
            answer = problem(*fault) if path.startswith("/api/") else PlainTextResponse(fault[1], fault[0])
            await answer(scope, receive, with_headers)


def _name_of(host: str) -> str:
    """The name or the address in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".").lower()


def _is_here(name: str) -> bool:
    """Whether no name server says where `name` is: an address, localhost, or none at all, which no browser sends."""
    return name in ("", "localhost") or name.endswith(".localhost") or is_address(name)


def _is_foreign(headers: Headers) -> bool:
    """Whether a page of another site has made the browser send this. Browsers of before 2023 say only where it comes from."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("cross-site", "same-site")
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()
