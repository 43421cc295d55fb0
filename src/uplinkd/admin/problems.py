"""Every error of the management API as a problem document (RFC 9457), and of the console as a page."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path

from uplinkd.admin.access import Denied, TooOften
from uplinkd.core.errors import Conflict, NotFound, Rejected, Stale, Unavailable

__all__ = ["Forbidden", "handle_errors", "problem", "status_of"]

log = logging.getLogger("uplinkd.admin")

_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (TooOften, 429),
    (Denied, 401),
    (NotFound, 404),
    (Conflict, 409),
    (Stale, 412),
    (Rejected, 400),
    (Unavailable, 503),
)


class Forbidden(Rejected):
    """Signed in, but not with what this needs."""


def _allowed(app: FastAPI, path: str) -> list[str]:
    """The methods of all routes of this path: Starlette names those of the first alone."""
    known = app.openapi()["paths"].items()
    return sorted(
        {
            method.upper()
            for known_path, methods in known
            if compile_path(known_path)[0].match(path)
            for method in methods
        }
    )


def status_of(fault: Exception) -> int:
    """The HTTP status that says what kind of fault it is."""
    if isinstance(fault, Forbidden):
        return 403
    return next((status for kind, status in _STATUS if isinstance(fault, kind)), 500)


def problem(status: int, detail: str, *, headers: dict[str, str] | None = None, **more: Any) -> Response:
    document = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    return JSONResponse(document, status, headers, media_type="application/problem+json")


Page = Callable[[Request, int, str], Awaitable[Response]]


def handle_errors(app: FastAPI, page: Page) -> None:
    """Answer faults: below /api/ as problem documents, elsewhere by `page(request, status, detail)`."""

    async def answer(
        request: Request, status: int, detail: str, headers: dict[str, str] | None = None, **more: Any
    ) -> Response:
        if request.url.path.startswith("/api/"):
            return problem(status, detail, headers=headers, **more)
        response = await page(request, status, detail)
        response.headers.update(headers or {})
        return response

    async def on_fault(request: Request, fault: Exception) -> Response:
        status = status_of(fault)
        headers = {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if isinstance(fault, TooOften):
            headers["Retry-After"] = str(fault.seconds)
        if status == 503:
            headers["Retry-After"] = "2"
        return await answer(request, status, str(fault), headers)

    async def on_http(request: Request, fault: Exception) -> Response:
        assert isinstance(fault, HTTPException)
        headers = dict(fault.headers or {})
        if fault.status_code == 404:
            return await answer(request, 404, f"there is nothing at {request.url.path}", headers)
        if fault.status_code == 405:
            if allowed := _allowed(app, request.url.path):
                headers["Allow"] = ", ".join(allowed)
            return await answer(request, 405, f"{request.method} is not for {request.url.path}", headers)
        return await answer(request, fault.status_code, str(fault.detail), headers)

    async def on_invalid(request: Request, fault: Exception) -> Response:
        assert isinstance(fault, RequestValidationError)
        errors = [
            {"where": ".".join(str(part) for part in error["loc"]), "what": error["msg"]} for error in fault.errors()
        ]
        detail = "; ".join(f"{error['where']}: {error['what']}" for error in errors[:5])
        return await answer(request, 422, detail, errors=errors)

    async def on_bug(request: Request, fault: Exception) -> Response:
        log.exception("a fault of ours at %s %s", request.method, request.url.path, exc_info=fault)
        return await answer(request, 500, "a fault of uplinkd; its log has the traceback")

    async def on_gone(request: Request, fault: Exception) -> Response:
        return Response(status_code=400)  # whoever sent a part of a body has gone; nobody reads this

    app.add_exception_handler(ClientDisconnect, on_gone)
    for kind in (Rejected, Unavailable):
        app.add_exception_handler(kind, on_fault)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_bug)
