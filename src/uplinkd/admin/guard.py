"""What holds for every request at the operator's door: headers that keep browsers strict, and a bound on what may be sent."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard"]

_BODY_BYTES = 2 * 1024**2
# Fleets, which are read as a stream.
_FLEET_BYTES = 257 * 1024**2
_FLEETS = ("/api/v1/imports", "/import")
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

    def __init__(self, app: ASGIApp, *, tls: bool) -> None:
        self._app = app
        self._tls = tls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        most = _FLEET_BYTES if path in _FLEETS else _BODY_BYTES
        received = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise HTTPException(413, f"the body is larger than {most} bytes")
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

        if scope["method"] not in ("GET", "HEAD") and Headers(scope=scope).get("sec-fetch-site") in _FOREIGN:
            await _refuse(with_headers)
            return
        await self._app(scope, bounded, with_headers)


_FOREIGN = ("cross-site", "same-site")


async def _refuse(send: Send) -> None:
    """A page of another site has made the browser send this."""
    body = b"this request comes from a page of another site"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
