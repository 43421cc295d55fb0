"""Who sends a request to the operator's door: an API key in `Authorization: Bearer`, or the session in a cookie.

A session's cookie is sent by the browser whoever made the page, so whatever changes something also carries the session's CSRF
token: in the header X-CSRF-Token, or the form field `csrf`.
"""

from __future__ import annotations

import contextlib
import hmac
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from uplinkd.admin.access import Denied, Principal, csrf_token
from uplinkd.admin.office import Office
from uplinkd.admin.problems import Forbidden
from uplinkd.core.errors import Unavailable
from uplinkd.core.operators import Actor, Scope, acting

__all__ = ["COOKIE", "address_of", "known", "needs", "office_of", "principal_of", "session_of", "while_known"]

COOKIE = "uplinkd_session"
IDLE_MILLISECONDS = 12 * 3_600_000
LONGEST_MILLISECONDS = 7 * 86_400_000
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_LONGEST = 512
_LOOK_SECONDS = 5.0

T = TypeVar("T")


def office_of(request: Request) -> Office:
    office: Office = request.app.state.office
    return office


def address_of(request: Request) -> str:
    return request.client.host if request.client else ""


async def principal_of(request: Request) -> Principal | None:
    """Who sends the request, None for nobody; raise Denied for a key that is not known, or a missing CSRF token.

    From here on `acting` is who they are.
    """
    known: Principal | None = getattr(request.state, "principal", None)
    if known is None:
        known = await _by_key(request) or await _by_session(request)
        request.state.principal = known
    if known is not None:
        acting.set(known.actor)
    return known


async def _by_key(request: Request) -> Principal | None:
    header = request.headers.get("Authorization", "")
    if not header:
        return None
    kind, _, key = header.partition(" ")
    key = key.strip()
    if kind.lower() != "bearer" or not key or len(key) > _LONGEST:
        raise Denied("Authorization must be `Bearer <API key>`; `uplinkd apikey create` makes one")
    office = office_of(request)
    operators = office.registry.operators
    found = await run_in_threadpool(operators.find_key, key)
    if found is None:
        raise Denied("this API key is not known, or was deleted")
    key_id = found.id
    office.note_use(f"key/{key_id}", lambda: operators.key_used(key_id))
    identity = f"key/{found.name}/{found.created}/{found.scope}"
    return Principal(Actor(f"key:{found.name}", "api", address_of(request)), found.scope, identity)


async def _by_session(request: Request) -> Principal | None:
    principal = await session_of(request)
    if principal is None or request.method in _SAFE:
        return principal
    given = request.headers.get("X-CSRF-Token", "")
    if not given:
        form = await request.form(max_files=1)
        field = form.get("csrf")
        given = field if isinstance(field, str) else ""
    if not hmac.compare_digest(given.encode(), principal.csrf.encode()):
        await request.close()
        raise Forbidden("the form is not of this session (CSRF token); load the page anew and try again")
    return principal


async def session_of(request: Request, *, used: bool = True) -> Principal | None:
    """Whose session the cookie is of; whether it counts as `used` by that."""
    token = request.cookies.get(COOKIE, "")
    if not token or len(token) > _LONGEST:
        return None
    office = office_of(request)
    operators = office.registry.operators
    user = await run_in_threadpool(operators.session, token, idle=IDLE_MILLISECONDS, longest=LONGEST_MILLISECONDS)
    if user is None:
        return None
    mark = csrf_token(token)
    if used:
        office.note_use(f"session/{mark}", lambda: operators.session_used(token, longest=LONGEST_MILLISECONDS))
    actor = Actor(user.name, "console", address_of(request))
    return Principal(actor, user.role.scope, f"user/{user.name}/{user.created}/{user.role}", mark, user)


async def known(request: Request) -> Principal:
    """The request's sender, who has shown who they are; raise Denied for nobody."""
    principal = await principal_of(request)
    if principal is None:
        raise Denied("sign in, or send an API key: Authorization: Bearer <key>")
    return principal


def needs(scope: Scope) -> Callable[[Request], Awaitable[Principal]]:
    """A dependency: the request's sender, who must have `scope`; raise Denied or Forbidden."""

    async def check(request: Request) -> Principal:
        principal = await known(request)
        if principal.user is not None and principal.user.one_time:
            raise Forbidden("choose a password of your own first")
        if not principal.scope.covers(scope):
            if principal.user is not None and scope is Scope.ADMIN:
                raise Forbidden("this is for admins")
            if principal.user is not None:
                raise Forbidden("this is for operators and admins")
            raise Forbidden(f"this needs the scope {scope}; you have {principal.scope}")
        return principal

    return check


async def while_known(request: Request, events: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """`events` until whoever asked for them is let in no longer: their key was deleted, or their session has ended."""
    look = time.monotonic() + _LOOK_SECONDS
    async with contextlib.aclosing(events):
        async for event in events:
            if time.monotonic() > look:
                if not await _still_known(request):
                    return
                look = time.monotonic() + _LOOK_SECONDS
            yield event


async def _still_known(request: Request) -> bool:
    try:
        return (await _by_key(request) or await session_of(request, used=False)) is not None
    except Denied:
        return False
    except Unavailable:
        return True  # the registry is away, which says nothing about them
