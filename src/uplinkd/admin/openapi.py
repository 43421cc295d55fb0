"""The management API's own description: OpenAPI, with what FastAPI does not know of it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

__all__ = ["describe"]

_DESCRIPTION = """Products, devices, topic classes, messages, refusals, applications, consumer groups and access of an uplinkd server.

Send an API key as `Authorization: Bearer uplk_…`; `uplinkd apikey create NAME --scope operate` or the console makes one. Errors are
problem documents (RFC 9457). Lists give `next`, the `cursor` of the page that follows. What was changed since you saw it is not
overwritten: send its ETag as If-Match. A creation that is sent twice with the same Idempotency-Key happens once."""

# In the order in which people meet them.
_TAGS = (
    "products",
    "devices",
    "topic classes",
    "messages",
    "logs",
    "jobs",
    "workbench",
    "stats",
    "apps",
    "groups",
    "access",
)


def describe(app: FastAPI) -> None:
    """Give `app` its OpenAPI document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
    document["tags"] = [{"name": name} for name in _TAGS]
    document["components"]["securitySchemes"] = {"apiKey": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"apiKey": []}]
    for path in document["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    content = response.get("content", {})
                    if "application/json" in content:
                        response["content"] = {"application/problem+json": content["application/json"]}
    return document
