"""FastAPI's shell, run by uvicorn."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Header, Request

from bench.baseline import Baseline

baseline = Baseline()


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await baseline.start()
    yield
    await baseline.stop()


app = FastAPI(lifespan=lifespan)


@app.post("/auth")
async def auth(request: Request) -> dict[str, Any]:
    return baseline.auth(await request.json())


@app.post("/topic/{product}/{device}/{levels:path}")
async def publish(
    product: str, device: str, levels: str, request: Request, password: str | None = Header(None)
) -> dict[str, Any]:
    return await baseline.publish(product, device, levels, password, await request.body())
