"""The console's pages of consumer groups: what each takes, how far it is, what it did not accept."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from uplinkd.admin import api, groupwork
from uplinkd.admin import documents as doc
from uplinkd.admin.console import (
    CHOICES,
    Administers,
    In,
    Operates,
    Views,
    attempt,
    go,
    keys_in,
    page,
    with_status,
)
from uplinkd.admin.office import Office, now
from uplinkd.asking import Trial
from uplinkd.core.errors import NotFound, Rejected, Unavailable
from uplinkd.core.groups import Form, Group, Kind, Plan, Webhook
from uplinkd.core.model import ProductKey
from uplinkd.engine.doors import doors

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

_LETTERS = 20
_AGES = {"1h": 3600, "24h": 86400, "7d": 7 * 86400}

Text = Annotated[str, Query(max_length=255)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Typed:
    """What a form has in it: of a group that is there, of a new one, or as somebody typed it who is shown what is wrong."""

    name: str = ""
    version: str = ""
    all_products: str = ""
    products: list[str] = field(default_factory=list)
    further: str = ""
    kinds: list[str] = field(default_factory=lambda: [Kind.UPLINK.value])
    topic: str = ""
    to: str = "webhook"
    apps: list[str] = field(default_factory=list)
    url: str = ""
    form: str = Form.BINARY.value
    batch: str = "100"
    linger: str = "0"
    lanes: str = "4"
    timeout: str = "10"
    ack_wait: str = "30"
    tries: str = "16"
    start: str = "now"
    start_ms: str = ""

    @classmethod
    async def read(cls, request: Request) -> _Typed:
        form = await request.form()
        given: dict[str, Any] = {"kinds": [], "all_products": ""}
        for name in cls.__slots__:
            if name in ("products", "kinds", "apps"):
                given[name] = [str(value) for value in form.getlist(name)]
            elif name in form:
                given[name] = str(form[name]).strip()
        return cls(**given)

    @classmethod
    def of(cls, group: Group) -> _Typed:
        plan, hook = group.plan, group.plan.webhook
        given: dict[str, str] = {}
        if hook:
            numbers = {name: f"{getattr(hook, name):g}" for name in ("batch", "linger", "lanes", "timeout")}
            given = {"url": hook.url, "form": hook.form.value, **numbers}
        return cls(
            name=group.name,
            version=group.version,
            all_products="1" if plan.products is None else "",
            products=list(plan.products or ()),
            kinds=[kind.value for kind in plan.kinds],
            topic=plan.topic,
            to="webhook" if hook else "apps" if plan.apps else "later",
            apps=list(plan.apps),
            ack_wait=f"{plan.ack_wait:g}",
            tries=str(plan.tries),
            **given,
        )

    def plan(self, before: Plan) -> Plan:
        """Raise Rejected for what is no number or names no product."""
        products = None
        if not self.all_products:
            products = tuple(map(ProductKey, dict.fromkeys([*self.products, *keys_in(self.further)])))
            if not products and before.products != ():
                raise Rejected("choose the products, or all of them")
        webhook = None
        if self.to == "webhook":
            if not self.url:
                raise Rejected("where to? A webhook has a URL such as https://backend.example.com/uplinkd")
            webhook = Webhook(
                url=self.url,
                form=_form(self.form),
                batch=_whole(self.batch),
                linger=_number(self.linger),
                lanes=_whole(self.lanes),
                timeout=_number(self.timeout),
            )
        return replace(
            before,
            products=products,
            topic=self.topic,
            kinds=frozenset(Kind(kind) for kind in self.kinds if kind in list(Kind)),
            ack_wait=_number(self.ack_wait),
            tries=_whole(self.tries),
            apps=tuple(self.apps) if self.to == "apps" else (),
            webhook=webhook,
        )

    def moment(self) -> int:
        """Where the position is to be, ms."""
        if self.start in _AGES:
            return now() - _AGES[self.start] * 1000
        match self.start:
            case "now":
                return now()
            case "all":
                return 0
            case _:
                found = api.number_in(self.start_ms)
                if found is None:
                    raise Rejected("choose a time")
                return found


def _form(text: str) -> Form:
    if text not in list(Form):
        raise Rejected(f"form = {text[:40]!r}: it is one of {', '.join(Form)}")
    return Form(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Rejected(f"{text[:40]!r} is not a number") from None


def _whole(text: str) -> int:
    number = api.number_in(text)
    if number is None:
        raise Rejected(f"{text[:40]!r} is not a whole number")
    return number


# -- all groups


async def _groups_page(request: Request, office: Office, fault: str = "", typed: _Typed | None = None) -> Response:
    return page(
        request,
        "groups.html",
        groups=await api.listed_groups(office),
        form=typed or _Typed(),
        typed=asdict(typed) if typed else {},
        fault=fault,
        **await _choices(office),
    )


async def _choices(office: Office) -> dict[str, Any]:
    """What forms offer: the first products by name, applications."""
    found = await run_in_threadpool(lambda: office.registry.product_page(limit=CHOICES + 1))
    return {
        "products": found[:CHOICES],
        "more_products": len(found) > CHOICES,
        "names": {product.key: product.name for product in found},
        "apps": await run_in_threadpool(office.registry.apps),
    }


@router.get("/groups")
async def groups_page(request: Request, office: In, who: Views) -> Response:
    return await _groups_page(request, office)


@router.post("/groups")
async def create_group(request: Request, office: In, who: Administers) -> Response:
    typed = await _Typed.read(request)

    def act() -> Group:
        plan = typed.plan(Plan())
        groupwork.check_target(office, plan)
        return office.registry.groups.create(typed.name, plan, start=typed.moment())

    try:
        made = await run_in_threadpool(act)
    except (Rejected, Unavailable) as fault:
        return await with_status(fault, _groups_page(request, office, str(fault), typed))
    if made.secret:
        return await _group_page(request, office, made.name, made=made.secret)
    return go(f"/groups/{made.name}", "group.create")


# -- one group


async def _group_page(
    request: Request,
    office: Office,
    name: str,
    fault: str = "",
    *,
    typed: _Typed | None = None,
    made: str = "",
    trial: Trial | None = None,
) -> Response:
    group = await run_in_threadpool(office.registry.groups.get, name)
    after = request.query_params.get("after", "")
    state: doc.GroupStateDocument | None = None
    letters: list[doc.DeadLetterDocument] = []
    away = ""
    try:
        state = await api.group_state(office, group, rates=False)
        found = await office.desk.dead(group, after=api.number_in(after) or 0, limit=_LETTERS + 1)
        letters = [doc.DeadLetterDocument.of(letter) for letter in found]
    except Unavailable as unavailable:
        away = str(unavailable)
    choices = await _choices(office)
    return page(
        request,
        "group.html",
        group=group,
        state=state,
        letters=letters[:_LETTERS],
        more=f"after={letters[_LETTERS - 1].number}" if len(letters) > _LETTERS else "",
        after=after,
        away=away,
        door=doors(office.settings, host=request.url.hostname or "").amqp,
        keys={app.name: app.key for app in choices["apps"]},
        form=typed or _Typed.of(group),
        editing=typed is not None,
        made=made,
        trial=trial,
        fault=fault,
        **choices,
    )


@router.get("/groups/{name}")
async def group_page(request: Request, office: In, who: Views, name: str) -> Response:
    return await _group_page(request, office, name)


@router.post("/groups/{name}/change")
async def change_group(request: Request, office: In, who: Administers, name: str) -> Response:
    typed = await _Typed.read(request)

    def act() -> tuple[Group, Group]:
        before = office.registry.groups.get(name)
        plan = typed.plan(before.plan)
        groupwork.check_target(office, plan)
        return before, office.registry.groups.change(name, plan, version=typed.version)

    try:
        before, changed = await run_in_threadpool(act)
    except (Rejected, Unavailable) as fault:
        return await with_status(fault, _group_page(request, office, name, str(fault), typed=typed))
    if changed.secret and not before.secret:
        return await _group_page(request, office, name, made=changed.secret)
    return go(f"/groups/{name}", "group.change")


@router.post("/groups/{name}/secret")
async def renew_secret(request: Request, office: In, who: Administers, name: str) -> Response:
    try:
        renewed = await run_in_threadpool(office.registry.groups.renew_secret, name)
    except (Rejected, Unavailable) as fault:
        return await with_status(fault, _group_page(request, office, name, str(fault)))
    return await _group_page(request, office, name, made=renewed.secret)


@router.post("/groups/{name}/test")
async def try_group(request: Request, office: In, who: Operates, name: str) -> Response:
    group = await run_in_threadpool(office.registry.groups.get, name)
    try:
        trial = await groupwork.try_hook(office, group)
    except (Rejected, Unavailable) as fault:
        return await with_status(fault, _group_page(request, office, name, str(fault)))
    return await _group_page(request, office, name, trial=trial)


@router.post("/groups/{name}/pause")
async def pause_group(request: Request, office: In, who: Administers, name: str) -> Response:
    """Or, where it is paused, let it go on."""
    form = await request.form()

    def act() -> Group:
        before = office.registry.groups.get(name)
        plan = replace(before.plan, paused=bool(form.get("paused")))
        return office.registry.groups.change(name, plan, version=before.version)

    return await attempt(
        act,
        lambda group: go(f"/groups/{name}", "group.pause" if group.plan.paused else "group.resume"),
        lambda fault: _group_page(request, office, name, fault),
    )


@router.post("/groups/{name}/reset")
async def reset_group(request: Request, office: In, who: Operates, name: str) -> Response:
    typed = await _Typed.read(request)
    return await attempt(
        lambda: office.registry.groups.reset(name, typed.moment()),
        lambda _: go(f"/groups/{name}", "group.reset"),
        lambda fault: _group_page(request, office, name, fault),
    )


@router.post("/groups/{name}/delete")
async def delete_group(request: Request, office: In, who: Administers, name: str) -> Response:
    return await attempt(
        lambda: office.registry.groups.delete(name),
        lambda _: go("/groups", "group.delete"),
        lambda fault: _group_page(request, office, name, fault),
    )


@router.post("/groups/{name}/dead")
async def act_on_dead_letters(request: Request, office: In, who: Operates, name: str) -> Response:
    """One, by its number, or all of them."""
    form = await request.form()
    act, text = str(form.get("act", "")), str(form.get("number", ""))
    try:
        group = await run_in_threadpool(office.registry.groups.get, name)
        numbers = [api.letter_number(text)] if text else None
        if act == "retry" and numbers is None:
            job = await groupwork.retry_all(office, group)
            return go(f"/jobs/{job.id}")
        if act == "retry" and numbers is not None:
            await groupwork.retry(office, group, numbers)
        elif act == "purge":
            await groupwork.purge(office, group, numbers)
        else:
            raise NotFound(f"a dead letter has no {act!r}")
    except (Rejected, Unavailable) as fault:
        if isinstance(fault, NotFound):
            raise
        return await with_status(fault, _group_page(request, office, name, str(fault)))
    return go(f"/groups/{name}", f"dead.{act}")
