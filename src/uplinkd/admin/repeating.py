"""The management API's routes: nothing is read of a body before its sender has shown who they are, and a creation may be sent
twice: with an Idempotency-Key header the second one gets the first one's answer.

The answer is kept sealed for a day, since it may hold a secret. A key belongs to whoever sent it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from uplinkd.admin.doorkeeper import known, office_of
from uplinkd.core.errors import Conflict, Rejected

__all__ = ["HEADER", "RepeatableRoute"]

HEADER = "Idempotency-Key"
_LONGEST = 255
_KEPT_HEADERS = ("content-type", "location", "etag")


class RepeatableRoute(APIRoute):
    """A route for those who are known, whose POST may carry an Idempotency-Key."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def once(request: Request) -> Response:
            principal = await known(request)
            given = request.headers.get(HEADER)
            if given is None or self.methods != {"POST"}:
                return await handle(request)
            if not 1 <= len(given) <= _LONGEST:
                raise Rejected(f"{HEADER} has 1 to {_LONGEST} characters; this one has {len(given)}")
            operators = office_of(request).registry.operators
            key = f"{principal.identity}\0{given}"
            body = hashlib.sha256(await request.body()).hexdigest()
            answered = await run_in_threadpool(
                operators.begin_answer, key, f"{request.url.path}\0{request.url.query}\0{body}"
            )
            if answered is not None:
                return _again(answered.body)
            try:
                response = await handle(request)
            except Exception:  # one that is cancelled, by a stop, may have been done all the same
                await run_in_threadpool(operators.forget_answer, key)
                raise
            if response.status_code < 300:
                await run_in_threadpool(operators.keep_answer, key, _kept(response))
            else:
                await run_in_threadpool(operators.forget_answer, key)
            return response

        return once


def _kept(response: Response) -> bytes:
    headers = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
    body = base64.b64encode(bytes(response.body)).decode()
    return json.dumps({"status": response.status_code, "headers": headers, "body": body}).encode()


def _again(kept: bytes | None) -> Response:
    if kept is None:
        raise Conflict(
            f"a request with this {HEADER} is under way, or its outcome is not known; look before you repeat it"
        )
    document = json.loads(kept)
    headers = {**document["headers"], "Idempotency-Replayed": "true"}
    return Response(base64.b64decode(document["body"]), document["status"], headers)
