"""The same two endpoints as a competent team would write them, nothing of uplinkd's: what they decide, whatever the framework.

/auth checks the HMAC of a device from a dictionary and issues a signed token; /topic checks token and owner and answers once
JetStream has acknowledged. The frameworks' shells stand beside: `on_fastapi`, `on_aiohttp`; `bench.peers` runs them with their
settings in the environment.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import nats
from nats.aio.client import Client

__all__ = ["Baseline"]

_PRODUCT = "a1benchmark"
_DIGESTS = {"hmacmd5": "md5", "hmacsha1": "sha1", "hmacsha256": "sha256"}


def _answer(code: int, message: str, **info: object) -> dict[str, Any]:
    return {"code": code, "message": message, **({"info": info} if info else {})}


class Baseline:
    """One for each server."""

    def __init__(self) -> None:
        self._devices = {f"device{number:04}": "secret" for number in range(int(os.environ["BENCH_DEVICES"]))}
        self._key = os.urandom(32)
        self._client = Client()

    async def start(self) -> None:
        """Connect, and create the stream."""
        access = os.environ
        self._client = await nats.connect(
            access["BENCH_NATS"], user=access["BENCH_USER"], password=access["BENCH_PASSWORD"]
        )
        self._jetstream = self._client.jetstream()
        await self._jetstream.add_stream(name="BASELINE", subjects=["baseline.>"])

    async def stop(self) -> None:
        await self._client.close()

    def auth(self, members: Mapping[str, str]) -> dict[str, Any]:
        """The answer to a login."""
        if not {"productKey", "deviceName", "clientId", "sign"} <= members.keys():
            return _answer(10001, "param error")
        secret = self._devices.get(members["deviceName"]) if members["productKey"] == _PRODUCT else None
        if secret is None:
            return _answer(20000, "auth check error")
        content = "".join(
            name + members[name] for name in sorted(members) if name not in ("version", "sign", "signmethod")
        )
        digest = _DIGESTS[members.get("signmethod", "hmacmd5")]
        right = hmac.new(secret.encode(), content.encode(), digest).hexdigest()
        if not hmac.compare_digest(right, members["sign"].lower()):
            return _answer(20000, "auth check error")
        claims = json.dumps({"device": members["deviceName"], "until": time.time() + 604800}).encode()
        mac = hmac.new(self._key, claims, hashlib.sha256).digest()
        return _answer(0, "success", token=base64.urlsafe_b64encode(mac + claims).decode())

    async def publish(
        self, product: str, device: str, levels: str, password: str | None, payload: bytes
    ) -> dict[str, Any]:
        """The answer to a report, once it is stored."""
        if not password:
            return _answer(20002, "token is null")
        raw = base64.urlsafe_b64decode(password)
        if not hmac.compare_digest(raw[:32], hmac.new(self._key, raw[32:], hashlib.sha256).digest()):
            return _answer(20003, "check token error")
        claims = json.loads(raw[32:])
        if claims["until"] < time.time():
            return _answer(20001, "token is expired")
        if product != _PRODUCT or device != claims["device"] or levels != "user/update":
            return _answer(30001, "publish message error")
        ack = await self._jetstream.publish(f"baseline.{product}.{device}.user.update", payload)
        return _answer(0, "success", messageId=ack.seq)
