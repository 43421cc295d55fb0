"""The console: pages rendered here, for people; what is live in them comes from the management API by server-sent events.

Each act is a form that posts, and is answered by a redirect, or by the page again with what was wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, urlencode

import fastapi_offline
from fastapi import APIRouter, Depends, FastAPI, Form, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.datastructures import UploadFile
from starlette.routing import Match
from starlette.staticfiles import StaticFiles

from uplinkd import __version__, journal
from uplinkd.admin import api, fleetwork
from uplinkd.admin import documents as doc
from uplinkd.admin.access import MINIMUM_LENGTH, Denied, Principal, TooOften, change_password, sign_in
from uplinkd.admin.doorkeeper import (
    COOKIE,
    LONGEST_MILLISECONDS,
    address_of,
    needs,
    office_of,
    principal_of,
    session_of,
)
from uplinkd.admin.office import Office, now
from uplinkd.admin.problems import status_of
from uplinkd.admin.words import LANGUAGES, age, language_of, moment, size, told, translated
from uplinkd.core import snippets
from uplinkd.core.errors import EXPLANATIONS, MESSAGES, Code, NotFound, Rejected, Unavailable
from uplinkd.core.groups import Form as HookForm
from uplinkd.core.groups import Kind, shown_url
from uplinkd.core.model import Device, Right, State
from uplinkd.core.names import DEFAULT_CLASSES
from uplinkd.core.operators import Role, Scope
from uplinkd.engine import Query as Wanted
from uplinkd.engine.reader import check as check_query
from uplinkd.settings import reachable

__all__ = [
    "CHOICES",
    "Administers",
    "In",
    "Operates",
    "Views",
    "attempt",
    "error_page",
    "go",
    "keys_in",
    "mount",
    "page",
    "prepare",
    "with_status",
]

HERE = Path(__file__).parent
THEMES = ("auto", "light", "dark")
_PAGE = 50
_YEAR = 365 * 86400
_LAST = 10
_SEARCHED = 200
# So many products are offered by name where some are chosen; the others by their keys.
CHOICES = 50
# Of so many refusals the last kinds are shown, each once.
_LOOKED_AT, _KINDS = 200, 5
_ENGINE_PATIENCE = 1.5

T = TypeVar("T")
Typed = dict[str, str]

router = APIRouter(include_in_schema=False)

In = Annotated[Office, Depends(office_of)]
Views = Annotated[Principal, Depends(needs(Scope.READ))]
Operates = Annotated[Principal, Depends(needs(Scope.OPERATE))]
Administers = Annotated[Principal, Depends(needs(Scope.ADMIN))]
Field = Annotated[str, Form()]
Text = Annotated[str, Query(max_length=255)]


def mount(app: FastAPI) -> None:
    """Add the pages and their static files to `app`."""
    app.include_router(router)
    app.mount("/static/swagger", StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"))
    app.mount("/static", StaticFiles(directory=HERE / "static"))


# -- rendering


def prepare() -> None:
    """Compile every page (10 to 30 ms each) and read the catalogues, so that no first visitor waits for it."""
    for language in LANGUAGES:
        translated(language, "")
    for template in _environment().list_templates():
        _environment().get_template(template)


_language = ContextVar("_language", default="en")
"""Of the page that is being rendered."""


@functools.cache
def _environment() -> Environment:
    """One for both languages: its templates are compiled once."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.i18n"],
    )

    def say(text: str) -> str:
        return translated(_language.get(), text)

    install: Any = environment
    install.install_gettext_callables(say, lambda one, many, count: say(one if count == 1 else many), newstyle=True)
    environment.filters.update(
        told=lambda text: told(_language.get(), text),
        ticks=_ticks,
        moment=moment,
        size=size,
        number=lambda value: f"{value:,}",
        age=age,
        shown_url=shown_url,
        path=_path,
    )
    environment.globals.update(
        LANGUAGES=LANGUAGES,
        THEMES=THEMES,
        VERSION=__version__,
        State=State,
        Kind=Kind,
        HookForm=HookForm,
        Right=Right,
        Role=Role,
        Scope=Scope,
        MESSAGES=MESSAGES,
        DEFAULT_LEVELS=[levels for levels, _ in DEFAULT_CLASSES],
    )
    return environment


def _ticks(text: str) -> Markup:
    """What stands between backticks as code; all else is text."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped before


def _path(text: str) -> str:
    return quote(text, safe="")


def page(request: Request, template: str, status: int = 200, **facts: Any) -> HTMLResponse:
    """`template` in the request's language, with who looks at it and `facts`: `fault` is what went wrong, `typed` what the form had
    then, so that nobody types it twice."""
    principal: Principal | None = getattr(request.state, "principal", None)
    language = language_of(request)
    _language.set(language)
    theme = request.cookies.get("theme")
    here = request.url.path + (f"?{request.url.query}" if request.url.query and request.method == "GET" else "")
    fault = told(language, facts.pop("fault", ""))
    html = (
        _environment()
        .get_template(template)
        .render(
            principal=principal,
            may_operate=bool(principal and principal.scope.covers(Scope.OPERATE)),
            may_administer=bool(principal and principal.scope.covers(Scope.ADMIN)),
            csrf=principal.csrf if principal else "",
            language=language,
            theme=theme if theme in THEMES else "auto",
            here=here,
            fault=fault,
            **{"done": request.query_params.get("done", ""), "typed": {}, **facts},
        )
    )
    return HTMLResponse(html, status)


async def error_page(request: Request, status: int, detail: str) -> Response:
    """What went wrong, as a page; whoever is not signed in goes to sign in."""
    if not hasattr(request.state, "principal"):
        request.state.principal = await session_of(request)
    principal: Principal | None = request.state.principal
    if status == 401 and request.method == "GET":
        return RedirectResponse(f"/sign-in?{urlencode({'back': _back(request)})}", 303)
    if status == 405 and request.method == "GET":
        return RedirectResponse(_above(request), 303)
    if principal and principal.user and principal.user.one_time and request.method == "GET":
        return RedirectResponse("/password", 303)
    back = f"/sign-in?{urlencode({'back': _above(request)})}"
    return page(
        request, "error.html", status, number=status, detail=told(language_of(request), detail), back=back, done=""
    )


def _above(request: Request) -> str:
    """The nearest page above a path that forms post to: where a reload, or a change of the language, leads from its answer."""
    path = request.url.path
    while path != "/":
        path = path.rpartition("/")[0] or "/"
        wanted = {**request.scope, "path": path, "method": "GET"}
        if any(route.matches(wanted)[0] is Match.FULL for route in request.app.router.routes):
            break
    return path


def _back(request: Request) -> str:
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def _own(path: str) -> str:
    """`path` if it is one of this server, else the overview: nobody is sent elsewhere."""
    return path if re.fullmatch(r"/(?![/\\])[^\x00-\x20]*", path) else "/"


def go(path: str, done: str = "") -> RedirectResponse:
    """To another page, which says what is `done`."""
    if done:
        path += ("&" if "?" in path else "?") + urlencode({"done": done})
    return RedirectResponse(path, 303)


async def with_status(fault: Rejected | Unavailable, shown: Awaitable[Response]) -> Response:
    """The page that is `shown` for it, with the status that the fault has in the API."""
    response = await shown
    response.status_code = status_of(fault)
    return response


async def attempt(
    act: Callable[[], T], then: Callable[[T], Response], again: Callable[[str], Awaitable[Response]]
) -> Response:
    """Do what a form asks for, in a thread; a fault of the operator's is shown on the page that the form stands on."""
    try:
        result = await run_in_threadpool(act)
    except (Rejected, Unavailable) as fault:
        return await with_status(fault, again(str(fault)))
    return then(result)


# -- signing in


@router.get("/sign-in")
async def sign_in_page(request: Request, back: Text = "/") -> Response:
    return page(request, "sign_in.html", back=_own(back), name="")


@router.post("/sign-in")
async def begin_session(
    request: Request, office: In, name: Field, password: Field, back: Annotated[str, Form()] = "/"
) -> Response:
    address = address_of(request)
    operators = office.registry.operators

    def accept(signed_in: tuple[Any, str]) -> Response:
        user, token = signed_in
        response = go("/password" if user.one_time else _own(back))
        response.set_cookie(
            COOKIE,
            token,
            max_age=LONGEST_MILLISECONDS // 1000,
            httponly=True,
            samesite="lax",
            secure=office.settings.console_tls,
        )
        return response

    async def again(fault: str) -> Response:
        return page(request, "sign_in.html", fault=fault, back=_own(back), name=name)

    try:
        async with office.attempts.turn():
            found = await run_in_threadpool(sign_in, operators, office.attempts, name, password, address)
    except (Denied, TooOften, Unavailable) as fault:
        return await with_status(fault, again(str(fault)))
    return accept(found)


@router.post("/sign-out")
async def end_session(request: Request, office: In) -> Response:
    principal = await session_of(request)
    if principal:
        await _checked(request)
        await run_in_threadpool(office.registry.operators.close_session, request.cookies[COOKIE])
    response = go("/sign-in")
    response.delete_cookie(COOKIE)
    return response


async def _checked(request: Request) -> Principal:
    """Who is signed in, also with a one-time password."""
    principal = await principal_of(request)
    if principal is None or principal.user is None:
        raise Denied("sign in first")
    return principal


@router.get("/password")
async def password_page(request: Request) -> Response:
    await _checked(request)
    return page(request, "password.html", minimum=MINIMUM_LENGTH)


@router.post("/password")
async def set_password(request: Request, office: In, old: Field, new: Field, again: Field) -> Response:
    principal = await _checked(request)
    user = principal.user
    assert user

    def act() -> None:
        if new != again:
            raise Rejected("the two new passwords are not the same")
        change_password(office.registry.operators, office.attempts, user, old, new, address_of(request))

    async def once_more(fault: str) -> Response:
        return page(request, "password.html", fault=fault, minimum=MINIMUM_LENGTH)

    try:
        async with office.attempts.turn():
            return await attempt(act, lambda _: go("/sign-in", "password"), once_more)
    except TooOften as fault:
        return await with_status(fault, once_more(str(fault)))


@router.get("/prefer")
async def prefer(back: Text = "/", language: Text = "", theme: Text = "") -> Response:
    """Remember a language or a theme in this browser."""
    response = go(_own(back))
    for name, value, known in (("language", language, LANGUAGES), ("theme", theme, THEMES)):
        if value in known:
            response.set_cookie(name, value, max_age=_YEAR, samesite="lax")
    return response


# -- overview


@router.get("/")
async def overview(request: Request, office: In, who: Views) -> Response:
    stats = await api.stats(office)
    since = now() - 3_600_000
    last = (await office.records.read(journal.Wanted(since=since), _LOOKED_AT)).refusals
    return page(
        request,
        "overview.html",
        stats=stats,
        last=_kinds(request, last),
        held=await _held_back(request, office),
        gateways=api.gateways(office),
        products=await run_in_threadpool(office.registry.count_products),
    )


async def _held_back(
    request: Request, office: Office, product: str | None = None, device: str = ""
) -> list[journal.HeldBack]:
    """What flow control did in the last hour, in the reader's language."""
    since, language = now() - 3_600_000, language_of(request)
    found = await office.records.held_back(since, product=product, device=device)
    return [replace(each, reason=told(language, each.reason)) for each in found]


def _explained(request: Request, refusals: Any) -> list[doc.RefusalDocument]:
    language = language_of(request)
    return [doc.RefusalDocument.of(each, language) for each in refusals]


def _kinds(request: Request, refusals: list[journal.Refusal]) -> list[tuple[doc.RefusalDocument, int]]:
    """The newest of each kind, newest first, and how often it came: a device that is refused says the same again and again."""
    kinds: dict[tuple[Any, ...], list[journal.Refusal]] = {}
    for each in sorted(refusals, key=lambda refusal: refusal.id, reverse=True):
        kinds.setdefault((each.code, each.product_key, each.device_name, each.topic, each.reason), []).append(each)
    shown = list(kinds.values())[:_KINDS]
    times = (sum(each.times for each in kind) for kind in shown)
    return list(zip(_explained(request, (kind[0] for kind in shown)), times, strict=True))


@router.get("/search")
async def search(office: In, who: Views, q: Text = "") -> Response:
    """Where what was typed leads: a product, a device, a requestId, a messageId."""
    text = q.strip()
    if re.fullmatch(r"[0-9a-f]{16}", text):
        return go(f"/logs?{urlencode({'requestId': text})}")
    if re.fullmatch(r"[0-9]{12,19}", text):
        return go(f"/messages/{text}")
    like = await run_in_threadpool(lambda: office.registry.product_page(text=text, limit=_SEARCHED))
    for product in like if text else []:
        if text in (product.key, product.name):
            return go(f"/products/{product.key}")
    first = await run_in_threadpool(lambda: office.registry.product_page(limit=_SEARCHED))
    found = await run_in_threadpool(_devices_named, office, [product.key for product in first], text)
    if len(found) == 1:
        return go(f"/products/{found[0].product_key}/devices/{_path(found[0].name)}")
    if found:
        return go(f"/products/{found[0].product_key}?{urlencode({'prefix': text})}")
    return go(f"/products?{urlencode({'q': text})}")


def _devices_named(office: Office, keys: list[str], prefix: str) -> list[Device]:
    """The device of that name, or those (a few) whose names begin so."""
    found: list[Device] = []
    for key in keys if prefix else []:
        some = office.registry.page(key, prefix=prefix, limit=2, timeout=office.timeout)
        if exact := [each for each in some if each.name == prefix]:
            return exact
        found += some
    return found


# -- products


async def _products_page(
    request: Request, office: Office, fault: str = "", q: str = "", typed: Typed | None = None
) -> Response:
    after = request.query_params.get("cursor", "")
    found = await run_in_threadpool(
        lambda: office.registry.product_page(text=q, after=api.number_in(after) or 0, limit=_PAGE + 1)
    )
    shown = found[:_PAGE]
    more = urlencode(({"q": q} if q else {}) | {"cursor": shown[-1].id}) if len(found) > _PAGE else ""
    counts = {each.key: await run_in_threadpool(office.census, each.key) for each in shown}
    facts: dict[str, Any] = {"products": shown, "counts": counts, "more": more, "after": after}
    return page(request, "products.html", fault=fault, q=q, typed=typed or {}, **facts)


@router.get("/products")
async def products_page(request: Request, office: In, who: Views, q: Text = "") -> Response:
    return await _products_page(request, office, q=q)


@router.post("/products")
async def create_product(request: Request, office: In, who: Operates, name: Field, key: Field = "") -> Response:
    return await attempt(
        lambda: office.registry.create_product(name.strip(), key=key.strip() or None),
        lambda product: go(f"/products/{product.key}", "product.create"),
        lambda fault: _products_page(request, office, fault, typed={"form": "product", "name": name, "key": key}),
    )


async def _product_page(
    request: Request, office: Office, product_key: str, tab: str, fault: str = "", **facts: Any
) -> Response:
    product = await run_in_threadpool(office.registry.product, product_key)
    if tab == "devices":
        facts = {**await _devices_of(request, office, product_key), **facts}
    elif tab == "topics":
        facts["classes"] = await run_in_threadpool(office.registry.topic_classes, product_key)
    return page(request, f"product_{tab}.html", product=product, tab=tab, fault=fault, **{"secret": "", **facts})


async def _devices_of(request: Request, office: Office, product_key: str) -> dict[str, Any]:
    query = request.query_params
    prefix, after = query.get("prefix", "")[:64], query.get("cursor", "")[:64]
    state = State(query["state"]) if query.get("state") in list(State) else None
    found = await run_in_threadpool(
        lambda: office.registry.page(
            product_key, prefix=prefix, state=state, after=after, limit=_PAGE + 1, timeout=office.timeout
        )
    )
    census = await run_in_threadpool(office.census, product_key)
    moment = now()
    devices = [doc.DeviceDocument.of(each, now=moment, timeout=office.timeout) for each in found[:_PAGE]]
    more = ""
    if len(found) > _PAGE:
        wanted = {"prefix": prefix, "state": state or "", "cursor": found[_PAGE - 1].name}
        more = urlencode({name: value for name, value in wanted.items() if value})
    return {"devices": devices, "census": census, "prefix": prefix, "state_wanted": state, "more": more, "after": after}


@router.get("/products/{product_key}")
async def product_page(request: Request, office: In, who: Views, product_key: str) -> Response:
    return await _product_page(request, office, product_key, "devices")


@router.get("/products/{product_key}/devices.csv")
async def export_devices(office: In, who: Operates, product_key: str, prefix: Text = "") -> StreamingResponse:
    return await run_in_threadpool(api.exported, office, product_key, prefix)


# What forms of a product's pages post to.
_FORMS = ("devices", "bulk", "delete")


@router.get("/products/{product_key}/{tab}")
async def product_tab(request: Request, office: In, who: Views, product_key: str, tab: str) -> Response:
    if tab in _FORMS:
        return go(f"/products/{product_key}")
    if tab not in ("topics", "keys", "settings"):
        raise NotFound(f"a product has no page {tab!r}")
    return await _product_page(request, office, product_key, tab)


@router.post("/products/{product_key}/topics")
async def add_topic_class(
    request: Request, office: In, who: Operates, product_key: str, levels: Field, right: Annotated[Right, Form()]
) -> Response:
    return await attempt(
        lambda: office.registry.add_topic_class(product_key, levels.strip(), right),
        lambda _: go(f"/products/{product_key}/topics", "topic.add"),
        lambda fault: _product_page(
            request, office, product_key, "topics", fault, typed={"levels": levels, "right": right}
        ),
    )


@router.post("/products/{product_key}/topics/remove")
async def remove_topic_class(request: Request, office: In, who: Operates, product_key: str, levels: Field) -> Response:
    return await attempt(
        lambda: office.registry.remove_topic_class(product_key, levels),
        lambda _: go(f"/products/{product_key}/topics", "topic.remove"),
        lambda fault: _product_page(request, office, product_key, "topics", fault),
    )


@router.post("/products/{product_key}/keys")
async def show_product_secret(request: Request, office: In, who: Operates, product_key: str) -> Response:
    return await attempt(
        lambda: api.product_secret(office, product_key).secret,
        lambda secret: page(
            request,
            "product_keys.html",
            product=office.registry.product(product_key),
            tab="keys",
            secret=secret,
        ),
        lambda fault: _product_page(request, office, product_key, "keys", fault),
    )


@router.post("/products/{product_key}/settings")
async def rename_product(
    request: Request, office: In, who: Operates, product_key: str, name: Field, version: Field
) -> Response:
    return await attempt(
        lambda: office.registry.rename_product(product_key, name.strip(), version=version),
        lambda _: go(f"/products/{product_key}/settings", "product.rename"),
        lambda fault: _product_page(request, office, product_key, "settings", fault),
    )


@router.post("/products/{product_key}/delete")
async def delete_product(request: Request, office: In, who: Operates, product_key: str, confirm: Field) -> Response:
    async def again(fault: str) -> Response:
        return await _product_page(request, office, product_key, "settings", fault)

    def act() -> tuple[Any, int]:
        if confirm.strip() != product_key:
            raise Rejected(f"type the ProductKey {product_key} to delete it with all of its devices")
        return fleetwork.deletion(office.registry, product_key), office.census(product_key).total

    return await begin(request, office, act, "product-deletion", product_key, "devices", again)


async def begin(
    request: Request,
    office: Office,
    act: Callable[[], tuple[Any, int]],
    kind: str,
    target: str,
    unit: str,
    again: Callable[[str], Awaitable[Response]],
) -> Response:
    """Start long work that `act` prepares in a thread (the work, and how much it is); then look at how far it is."""
    try:
        work, total = await run_in_threadpool(act)
        job = office.jobs.start(kind, target, unit, work, total=total)
    except (Rejected, Unavailable) as fault:
        return await with_status(fault, again(str(fault)))
    return go(f"/jobs/{job.id}")


# -- devices


@router.post("/products/{product_key}/devices")
async def create_device(
    request: Request, office: In, who: Operates, product_key: str, name: Field = "", secret: Field = ""
) -> Response:
    return await attempt(
        lambda: office.registry.create_device(product_key, name.strip() or None, secret=secret.strip() or None),
        lambda device: go(f"/products/{product_key}/devices/{_path(device.name)}", "device.create"),
        lambda fault: _product_page(
            request, office, product_key, "devices", fault, typed={"form": "device", "name": name}
        ),
    )


@router.post("/products/{product_key}/bulk")
async def create_many(
    request: Request,
    office: In,
    who: Operates,
    product_key: str,
    prefix: Field,
    count: Annotated[int, Form()],
    start: Annotated[int, Form()] = 1,
) -> Response:
    return await begin(
        request,
        office,
        lambda: (fleetwork.making(office.registry, product_key, prefix.strip(), count, start), count),
        "bulk-creation",
        f"{product_key}/{prefix.strip()}",
        "devices",
        lambda fault: _product_page(
            request,
            office,
            product_key,
            "devices",
            fault,
            typed={"form": "bulk", "prefix": prefix, "count": str(count), "start": str(start)},
        ),
    )


@router.get("/import")
async def import_page(who: Views) -> Response:
    return go("/products")


@router.post("/import")
async def import_devices(request: Request, office: In, who: Operates) -> Response:
    """The form is read here and not declared: FastAPI would read all of it before it asks who sends it."""
    form = await request.form(max_files=1)
    file, skip_bad = form.get("file"), "1" if form.get("skip_bad") else ""
    name = file.filename or "" if isinstance(file, UploadFile) else ""

    async def parts() -> AsyncGenerator[bytes]:
        if not isinstance(file, UploadFile):
            raise Rejected("choose a file to import")
        while part := await file.read(1 << 20):
            yield part

    async def again(fault: str) -> Response:
        return await _products_page(request, office, fault, typed={"form": "import", "skip_bad": skip_bad})

    try:
        stream, total = await api.uploaded(office, parts())
    except (Rejected, Unavailable) as fault:
        return await with_status(fault, again(str(fault)))
    finally:
        await request.close()

    def act() -> tuple[Any, int]:
        return fleetwork.fleet_import(office.registry, stream, total, skip_bad=bool(skip_bad)), total

    with contextlib.ExitStack() as kept:
        kept.callback(stream.close)
        response = await begin(request, office, act, "import", name, "bytes", again)
        if response.status_code == 303:
            kept.pop_all()
    return response


async def _device_page(
    request: Request, office: Office, product_key: str, name: str, fault: str = "", **facts: Any
) -> Response:
    device = await run_in_threadpool(office.registry.device, product_key, name)
    product = await run_in_threadpool(office.registry.product, product_key)
    classes = await run_in_threadpool(office.registry.topic_classes, product_key)
    refusals = (await office.records.read(journal.Wanted(product=product_key, device=name), _LOOKED_AT)).refusals
    messages, away = await _messages(office, Wanted(product_key=product_key, device_name=name), _LAST)
    published = [each.levels for each in classes if each.right.publishes] or ["user/update"]
    heard = [each.levels for each in classes if each.right.subscribes and not set(each.levels) & set("+#")]
    topic = f"/{product_key}/{name}/{published[0]}"
    return page(
        request,
        "device.html",
        product=product,
        device=device,
        document=doc.DeviceDocument.of(device, now=now(), timeout=office.timeout),
        snippets={
            language: _snippet(request, office, device, language, topic, "<DeviceSecret>")
            for language in _LANGUAGES
            if language != "mosquitto" or office.mqtt
        },
        languages={language: label for language, (label, _) in _LANGUAGES.items()},
        classes=classes,
        levels=published[0],
        hears=[f"/{product_key}/{name}/{levels}" for levels in heard] or [f"/{product_key}/{name}/user/get"],
        messages=messages,
        away=away,
        refusals=_kinds(request, refusals),
        held=await _held_back(request, office, product_key, name),
        fault=fault,
        **{"secret": "", "sent": None, "refused": "", **facts},
    )


_LANGUAGES: dict[str, tuple[str, Callable[..., str]]] = {
    "curl": ("curl", snippets.curl),
    "python": ("Python", snippets.python),
    "c": ("C", snippets.c),
    "mosquitto": ("MQTT", snippets.mosquitto),
}


def _snippet(request: Request, office: Office, device: Device, language: str, topic: str, secret: str) -> str:
    _, make = _LANGUAGES[language]
    return make(device.product_key, device.name, secret, _place(request, office), topic=topic, now=now())


def _place(request: Request, office: Office) -> snippets.Place:
    """Where devices reach this server: by the name in the browser's address line, unless a door is of this machine alone."""
    settings = office.settings
    host, port = office.https
    name = _public_name(request, host)
    mqtt_host, mqtt_port = office.mqtt or ("", 0)
    ca = "" if settings.tls_cert else str((settings.data / "tls" / "ca.pem").absolute())
    return snippets.Place(f"https://{name}:{port}", _public_name(request, mqtt_host), mqtt_port, ca)


def _public_name(request: Request, host: str) -> str:
    if host in ("0.0.0.0", "::") and request.url.hostname:  # noqa: S104 - compared, not bound
        return reachable(request.url.hostname)
    return reachable(host) if host else ""


async def _messages(office: Office, wanted: Wanted, limit: int) -> tuple[list[doc.MessageDocument], str]:
    """The newest first; and why none can be had, while the engine is away."""
    try:
        reader = await office.awake()
        async with asyncio.timeout(_ENGINE_PATIENCE):
            found = await reader.latest(wanted, limit)
    except Unavailable as fault:
        return [], str(fault)
    except TimeoutError:
        return [], f"the engine did not answer within {_ENGINE_PATIENCE} s"
    return [doc.MessageDocument.of(each) for each in reversed(found)], ""


@router.get("/products/{product_key}/devices/{name}")
async def device_page(request: Request, office: In, who: Views, product_key: str, name: str) -> Response:
    return await _device_page(request, office, product_key, name)


@router.get("/products/{product_key}/devices/{name}/snippets/{language}")
async def snippet(
    request: Request,
    office: In,
    who: Operates,
    product_key: str,
    name: str,
    language: str,
    levels: Text = "user/update",
) -> PlainTextResponse:
    """Ready to paste, with the device's secret."""
    if language not in _LANGUAGES:
        raise NotFound(f"there is no snippet in {language!r}")
    device = await run_in_threadpool(api.device_secret, office, product_key, name)
    topic = f"/{product_key}/{name}/{levels}"
    return PlainTextResponse(_snippet(request, office, device, language, topic, device.secret))


@router.post("/products/{product_key}/devices/{name}/{act}")
async def act_on_device(
    request: Request,
    office: In,
    who: Operates,
    product_key: str,
    name: str,
    act: str,
    version: Field = "",
    topic: Field = "",
    payload: Field = "",
) -> Response:
    """Enable, disable, reset its secret, delete, show its secret, send down."""
    registry = office.registry
    seen = version or None

    async def again(fault: str = "", **facts: Any) -> Response:
        return await _device_page(request, office, product_key, name, fault, **facts)

    def back(done: str) -> Response:
        return go(f"/products/{product_key}/devices/{_path(name)}", done)

    if act in ("enable", "disable"):
        wanted = act == "enable"
        return await attempt(
            lambda: registry.set_enabled(product_key, name, wanted, version=seen),
            lambda _: back(f"device.{act}"),
            again,
        )
    if act == "delete":
        return await attempt(
            lambda: registry.delete_device(product_key, name, version=seen),
            lambda _: go(f"/products/{product_key}", "device.delete"),
            again,
        )
    try:
        if act == "reset":
            device = await run_in_threadpool(registry.reset_secret, product_key, name, version=seen)
            return await again(secret=device.secret, done="device.reset")
        if act == "secret":
            device = await run_in_threadpool(api.device_secret, office, product_key, name)
            return await again(secret=device.secret)
        if act == "send":
            typed = {"topic": topic, "payload": payload}
            answer = await api.sent(office, topic.strip(), product_key, name, payload.encode(errors="surrogatepass"))
            return await again(sent=answer, typed=typed)
    except (Rejected, Unavailable) as fault:
        # The answer to what was sent stands beside its form, to which the browser scrolls.
        refused = told(language_of(request), str(fault))
        shown = again(refused=refused, typed=typed) if act == "send" else again(str(fault))
        return await with_status(fault, shown)
    raise NotFound(f"a device has no {act!r}")


# -- messages and refusals


def _since(text: str) -> int | None:
    """The beginning of a window such as 15m, 24h, 7d; None for all."""
    known = {"15m": 900, "1h": 3600, "24h": 86400, "7d": 7 * 86400}
    return now() - known[text] * 1000 if text in known else None


@router.get("/live")
async def live_page(request: Request, who: Views) -> Response:
    query = _filters(request)
    fault = ""
    try:
        check_query(Wanted(query["product"] or None, query["device"] or None, query["topic"] or None))
    except Rejected as refused:
        fault = str(refused)
    return page(request, "live.html", query=query, fault=fault)


def _filters(request: Request) -> dict[str, str]:
    names = ("product", "device", "topic", "since", "requestId", "code", "address", "endpoint")
    return {name: request.query_params.get(name, "").strip()[:255] for name in names}


@router.get("/messages")
async def messages_page(request: Request, office: In, who: Views, cursor: Text = "") -> Response:
    query = _filters(request)
    wanted = Wanted(
        product_key=query["product"] or None,
        device_name=query["device"] or None,
        topic=query["topic"] or None,
        since=_since(query["since"]),
        before=api.number_in(cursor),
    )
    fault = ""
    messages: list[doc.MessageDocument] = []
    try:
        messages, fault = await _messages(office, wanted, _PAGE + 1)
    except Rejected as refused:
        fault = str(refused)
    more = ""
    if len(messages) > _PAGE:
        more = urlencode(
            {name: value for name, value in query.items() if value} | {"cursor": messages[_PAGE - 1].message_id}
        )
    return page(request, "messages.html", query=query, messages=messages[:_PAGE], more=more, fault=fault, after=cursor)


@router.get("/messages/{message_id}")
async def message_page(request: Request, office: In, who: Views, message_id: str) -> Response:
    return page(request, "message.html", message=await api.show_message(office, who, message_id))


@router.get("/logs")
async def logs_page(request: Request, office: In, who: Views, cursor: Text = "") -> Response:
    query = _filters(request)
    code = query["code"]
    wanted = api.refusals_wanted(
        query["requestId"],
        query["product"],
        query["device"],
        api.number_in(code),
        query["address"],
        query["endpoint"],
        since=_since(query["since"]),
        before=api.number_in(cursor),
    )
    recorded = await office.records.read(wanted, _PAGE + 1)
    found = recorded.refusals
    found.sort(key=lambda refusal: refusal.id, reverse=True)
    more = ""
    if len(found) > _PAGE:
        more = urlencode({name: value for name, value in query.items() if value} | {"cursor": str(found[_PAGE - 1].id)})
    return page(
        request,
        "logs.html",
        query=query,
        refusals=_explained(request, found[:_PAGE]),
        more=more,
        after=cursor,
        silent=recorded.silent,
        codes=[(int(code), MESSAGES[code]) for code in Code if code],
    )


@router.get("/codes")
async def codes_page(request: Request, who: Views) -> Response:
    zh = language_of(request) == "zh"
    codes = [
        (int(code), MESSAGES[code], words.means_zh if zh else words.means, words.do_zh if zh else words.do)
        for code, words in EXPLANATIONS.items()
    ]
    return page(request, "codes.html", codes=codes)


# -- the workbench


@router.get("/workbench")
async def workbench_page(request: Request, who: Operates) -> Response:
    return page(request, "workbench.html", text="", examined=None, secret="")


@router.post("/workbench")
async def examine(request: Request, office: In, who: Operates, text: Field = "", secret: Field = "") -> Response:
    return await attempt(
        lambda: api.examined(office, text, secret.strip() or None),
        lambda found: page(
            request, "workbench.html", text=text, examined=doc.ExaminationDocument.of(found), secret=secret
        ),
        lambda fault: _workbench_again(request, text, fault),
    )


async def _workbench_again(request: Request, text: str, fault: str) -> Response:
    return page(request, "workbench.html", text=text, examined=None, secret="", fault=fault)


# -- applications, keys, users, the audit


async def _access_page(
    request: Request, office: Office, fault: str = "", made: Any = None, typed: Typed | None = None
) -> Response:
    apps = await run_in_threadpool(office.registry.apps)
    found = await run_in_threadpool(lambda: office.registry.product_page(limit=CHOICES + 1))
    products = found[:CHOICES]
    admin = request.state.principal.scope.covers(Scope.ADMIN)
    keys = await run_in_threadpool(office.registry.operators.api_keys) if admin else []
    return page(
        request,
        "access.html",
        apps=apps,
        keys=keys,
        products=products,
        more_products=len(found) > CHOICES,
        names={product.key: product.name for product in products},
        origin=str(request.base_url).rstrip("/"),
        fault=fault,
        made=made,
        typed=typed or {},
    )


@router.get("/access")
async def access_page(request: Request, office: In, who: Views) -> Response:
    return await _access_page(request, office)


async def _made(act: Callable[[], dict[str, str]], show: Callable[..., Awaitable[Response]], **typed: str) -> Response:
    """Make what has a secret, and show that this once; or what was wrong, with what was `typed`."""
    try:
        made = await run_in_threadpool(act)
    except Rejected as fault:
        return await with_status(fault, show(fault=str(fault), typed=typed))
    return await show(made=made)


@router.post("/access/apps")
async def create_app(
    request: Request,
    office: In,
    who: Administers,
    name: Field,
    products: Annotated[list[str], Form()] = [],  # noqa: B006 - FastAPI copies it
    further: Field = "",
    sends: Field = "",
) -> Response:
    def act() -> dict[str, str]:
        chosen = [*products, *keys_in(further)]
        app, secret = office.registry.create_app(name.strip(), products=chosen, sends=bool(sends))
        return {"what": "app", "name": app.name, "key": app.key, "secret": secret}

    return await _made(act, functools.partial(_access_page, request, office), form="app", name=name, further=further)


def keys_in(text: str) -> list[str]:
    """ProductKeys that were typed, apart by commas or white space."""
    return re.findall(r"[^\s,]+", text)


@router.post("/access/apps/{name}/products")
async def set_app_products(
    request: Request,
    office: In,
    who: Administers,
    name: str,
    version: Field,
    products: Annotated[list[str], Form()] = [],  # noqa: B006 - FastAPI copies it
    further: Field = "",
) -> Response:
    return await attempt(
        lambda: office.registry.set_app(name, [*products, *keys_in(further)], version=version),
        lambda _: go("/access", "app.products"),
        lambda fault: _access_page(request, office, fault),
    )


@router.post("/access/apps/{name}/delete")
async def delete_app(request: Request, office: In, who: Administers, name: str) -> Response:
    return await attempt(
        lambda: office.registry.delete_app(name),
        lambda _: go("/access", "app.delete"),
        lambda fault: _access_page(request, office, fault),
    )


@router.post("/access/keys")
async def create_key(
    request: Request, office: In, who: Administers, name: Field, scope: Annotated[Scope, Form()]
) -> Response:
    def act() -> dict[str, str]:
        made, key = office.registry.operators.create_key(name.strip(), scope)
        return {"what": "key", "name": made.name, "secret": key}

    return await _made(act, functools.partial(_access_page, request, office), form="key", name=name, scope=scope)


@router.post("/access/keys/{name}/delete")
async def delete_key(request: Request, office: In, who: Administers, name: str) -> Response:
    return await attempt(
        lambda: office.registry.operators.delete_key(name),
        lambda _: go("/access", "key.delete"),
        lambda fault: _access_page(request, office, fault),
    )


async def _users_page(
    request: Request, office: Office, fault: str = "", made: Any = None, typed: Typed | None = None
) -> Response:
    users = await run_in_threadpool(office.registry.operators.users)
    return page(request, "users.html", users=users, fault=fault, made=made, typed=typed or {})


@router.get("/users")
async def users_page(request: Request, office: In, who: Administers) -> Response:
    return await _users_page(request, office)


@router.post("/users")
async def create_user(
    request: Request, office: In, who: Administers, name: Field, role: Annotated[Role, Form()]
) -> Response:
    def act() -> dict[str, str]:
        made = api.new_user(office, name.strip(), role)
        return {"name": made.name, "password": made.password}

    return await _made(act, functools.partial(_users_page, request, office), name=name, role=role)


@router.post("/users/{name}/{act}")
async def act_on_user(
    request: Request, office: In, who: Administers, name: str, act: str, role: Field = ""
) -> Response:
    operators = office.registry.operators
    if act == "password":

        def renew() -> dict[str, str]:
            made = api.one_time_password(office, name)
            return {"name": made.name, "password": made.password}

        return await _made(renew, functools.partial(_users_page, request, office))

    def change() -> None:
        if act == "role" and role in list(Role):
            operators.set_role(name, Role(role))
        elif act == "delete":
            api.delete_user(office, who, name)
        else:
            raise NotFound(f"a user has no {act!r}")

    return await attempt(
        change, lambda _: go("/users", f"user.{act}"), lambda fault: _users_page(request, office, fault)
    )


@router.get("/audit")
async def audit_page(
    request: Request,
    office: In,
    who: Administers,
    actor: Text = "",
    action: Text = "",
    target: Text = "",
    cursor: Text = "",
) -> Response:
    before = api.number_in(cursor)
    found = await run_in_threadpool(
        lambda: office.registry.operators.audit(
            actor=actor, action=action, target=target, before=before, limit=_PAGE + 1
        )
    )
    query = {"actor": actor, "action": action, "target": target}
    more = ""
    if len(found) > _PAGE:
        more = urlencode({name: value for name, value in query.items() if value} | {"cursor": str(found[_PAGE - 1].id)})
    return page(request, "audit.html", entries=found[:_PAGE], query=query, more=more, after=cursor)


# -- long work, settings, the API's page


@router.get("/jobs")
async def jobs_page(request: Request, office: In, who: Views) -> Response:
    return page(request, "jobs.html", jobs=[doc.JobDocument.of(job, who.scope) for job in office.jobs.all()])


@router.get("/jobs/{job_id}")
async def job_page(request: Request, office: In, who: Views, job_id: str) -> Response:
    return page(request, "job.html", job=doc.JobDocument.of(office.jobs.get(job_id), who.scope))


@router.post("/jobs/{job_id}/cancel")
async def cancel_job(office: In, who: Operates, job_id: str) -> Response:
    office.jobs.cancel(job_id)
    return go(f"/jobs/{job_id}")


@router.get("/settings")
async def settings_page(request: Request, office: In, who: Administers) -> Response:
    return page(request, "settings.html", settings=api.settings_of(office))


@router.get("/api/v1/docs")
async def api_page(request: Request) -> Response:
    """The API's description, to read and to try."""
    return page(request, "api_docs.html")
