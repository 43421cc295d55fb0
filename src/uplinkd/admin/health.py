"""/healthz, /readyz and /metrics: for orchestrators and Prometheus."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from uplinkd import __version__
from uplinkd.admin.doorkeeper import needs, office_of
from uplinkd.admin.exposition import Facts, exposition
from uplinkd.admin.office import Office, now
from uplinkd.core.errors import Unavailable
from uplinkd.core.model import State
from uplinkd.core.operators import Scope
from uplinkd.engine import GroupState
from uplinkd.settings import address, is_loopback

__all__ = ["router"]

router = APIRouter()

_PATIENCE = 1.5
_LOOKING = ["GET", "HEAD"]  # some balancers ask for the head alone


@router.api_route("/healthz", methods=_LOOKING, include_in_schema=False)
async def healthz() -> JSONResponse:
    """This process answers."""
    return JSONResponse({"status": "ok"})


@router.api_route("/readyz", methods=_LOOKING, include_in_schema=False)
async def readyz(office: Annotated[Office, Depends(office_of)]) -> JSONResponse:
    """Whether devices are served: a worker lives, the registry and the engine answer. 503 with what is wrong otherwise."""
    checks = {
        "workers": _workers(office),
        "registry": await _registry(office),
        "engine": await _engine(office),
    }
    ready = all(check == "ok" for check in checks.values())
    return JSONResponse({"status": "ok" if ready else "unavailable", "checks": checks}, 200 if ready else 503)


def _workers(office: Office) -> str:
    return "ok" if office.figures.read().workers_alive else "no worker is alive"


async def _registry(office: Office) -> str:
    try:
        async with asyncio.timeout(_PATIENCE):
            await run_in_threadpool(office.registry.changes_cursor)
    except Unavailable as fault:
        return str(fault)
    except TimeoutError:
        return f"the registry did not answer within {_PATIENCE} s"
    return "ok"


async def _engine(office: Office) -> str:
    try:
        await office.stored()
    except Unavailable as fault:
        return str(fault)
    return "ok"


@router.api_route("/metrics", methods=_LOOKING, include_in_schema=False)
async def metrics(request: Request, office: Annotated[Office, Depends(office_of)]) -> Response:
    """Prometheus' text format. Where the console listens beyond this machine, it needs an API key with the scope read."""
    host, _ = address(office.settings.console_listen)
    if not (host == "localhost" or is_loopback(host)):
        await needs(Scope.READ)(request)
    facts = await _facts(office)
    return Response(exposition(office.figures.read(), facts), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _facts(office: Office) -> Facts:
    try:
        census = await run_in_threadpool(office.census)
        devices = {state.value: getattr(census, state.value) for state in State}
    except Unavailable:
        devices = {}
    messages = size = 0
    connected = False
    try:
        stored = await office.stored()
        messages, size, connected = stored.messages, stored.bytes, True
    except Unavailable:
        pass
    return Facts(
        devices=devices,
        messages=messages,
        messages_bytes=size,
        engine_connected=connected,
        groups=await _groups(office) if connected else {},
        now=now(),
        version=__version__,
    )


async def _groups(office: Office) -> dict[str, GroupState]:
    try:
        groups = await run_in_threadpool(office.registry.groups.all)
        standings = await office.standings(groups)
    except Unavailable:
        return {}
    return {group.name: standing.state for group, standing in zip(groups, standings, strict=True)}
