"""The same two endpoints as a competent team would write them: FastAPI on uvicorn, nats-py, nothing of uplinkd's.

/auth checks the HMAC of a device from a dictionary and issues a signed token; /topic checks token and owner and answers once
JetStream has acknowledged. Run by `bench.peers` with its settings in the environment.
"""

# `make lint` does without the bench group, so FastAPI may not be there.
# mypy: disable-error-code="import-not-found,untyped-decorator"

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import nats
from fastapi import FastAPI, Header, Request

PRODUCT = "a1benchmark"
DEVICES = {f"device{number:04}": "secret" for number in range(int(os.environ["BENCH_DEVICES"]))}
KEY = os.urandom(32)
DIGESTS = {"hmacmd5": "md5", "hmacsha1": "sha1", "hmacsha256": "sha256"}


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    client = await nats.connect(
        os.environ["BENCH_NATS"], user=os.environ["BENCH_USER"], password=os.environ["BENCH_PASSWORD"]
    )
    app.state.jetstream = client.jetstream()
    await app.state.jetstream.add_stream(name="BASELINE", subjects=["baseline.>"])
    yield
    await client.close()


app = FastAPI(lifespan=lifespan)


def answer(code: int, message: str, **info: object) -> dict[str, Any]:
    return {"code": code, "message": message, **({"info": info} if info else {})}


@app.post("/auth")
async def auth(request: Request) -> dict[str, Any]:
    members: dict[str, str] = await request.json()
    if not {"productKey", "deviceName", "clientId", "sign"} <= members.keys():
        return answer(10001, "param error")
    secret = DEVICES.get(members["deviceName"]) if members["productKey"] == PRODUCT else None
    if secret is None:
        return answer(20000, "auth check error")
    content = "".join(name + members[name] for name in sorted(members) if name not in ("version", "sign", "signmethod"))
    right = hmac.new(secret.encode(), content.encode(), DIGESTS[members.get("signmethod", "hmacmd5")]).hexdigest()
    if not hmac.compare_digest(right, members["sign"].lower()):
        return answer(20000, "auth check error")
    claims = json.dumps({"device": members["deviceName"], "until": time.time() + 604800}).encode()
    mac = hmac.new(KEY, claims, hashlib.sha256).digest()
    return answer(0, "success", token=base64.urlsafe_b64encode(mac + claims).decode())


@app.post("/topic/{product}/{device}/{levels:path}")
async def publish(
    product: str, device: str, levels: str, request: Request, password: str | None = Header(None)
) -> dict[str, Any]:
    if not password:
        return answer(20002, "token is null")
    raw = base64.urlsafe_b64decode(password)
    if not hmac.compare_digest(raw[:32], hmac.new(KEY, raw[32:], hashlib.sha256).digest()):
        return answer(20003, "check token error")
    claims = json.loads(raw[32:])
    if claims["until"] < time.time():
        return answer(20001, "token is expired")
    if product != PRODUCT or device != claims["device"] or levels != "user/update":
        return answer(30001, "publish message error")
    ack = await app.state.jetstream.publish(f"baseline.{product}.{device}.user.update", await request.body())
    return answer(0, "success", messageId=ack.seq)
