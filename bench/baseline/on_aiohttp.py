"""aiohttp's shell, with its own server on uvloop: `python -m bench.baseline.on_aiohttp PORT CERTIFICATE KEY`."""

from __future__ import annotations

import functools
import json
import ssl
import sys

import uvloop
from aiohttp import web

from bench.baseline import Baseline

baseline = Baseline()
# As FastAPI writes it.
compact = functools.partial(json.dumps, separators=(",", ":"))


async def auth(request: web.Request) -> web.Response:
    return web.json_response(baseline.auth(await request.json()), dumps=compact)


async def publish(request: web.Request) -> web.Response:
    names = request.match_info
    password, payload = request.headers.get("password"), await request.read()
    answer = await baseline.publish(names["product"], names["device"], names["levels"], password, payload)
    return web.json_response(answer, dumps=compact)


async def start(_app: web.Application) -> None:
    await baseline.start()


async def stop(_app: web.Application) -> None:
    await baseline.stop()


def main(port: str, certificate: str, key: str) -> None:
    app = web.Application()
    app.router.add_post("/auth", auth)
    app.router.add_post("/topic/{product}/{device}/{levels:.+}", publish)
    app.on_startup.append(start)
    app.on_cleanup.append(stop)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    loop = uvloop.new_event_loop()
    web.run_app(app, host="127.0.0.1", port=int(port), ssl_context=context, access_log=None, print=None, loop=loop)


if __name__ == "__main__":
    main(*sys.argv[1:])
