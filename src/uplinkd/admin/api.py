"""The management API, /api/v1: products, devices, topic classes, messages, refusals, applications, consumer groups, keys, users,
the audit."""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Annotated, Any, BinaryIO, TypeVar

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from uplinkd import __version__, journal
from uplinkd.admin import documents as doc
from uplinkd.admin import fleetwork, groupwork
from uplinkd.admin.access import Principal, TooOften
from uplinkd.admin.doorkeeper import needs, office_of, while_known
from uplinkd.admin.figures import Sample
from uplinkd.admin.office import Office, now
from uplinkd.admin.problems import Forbidden
from uplinkd.admin.repeating import RepeatableRoute
from uplinkd.asking import PATIENCE_SECONDS, HookState, Live, check_down_topic, send_down
from uplinkd.core import workbench
from uplinkd.core.errors import NotFound, Rejected, Unavailable
from uplinkd.core.groups import Group
from uplinkd.core.model import App, Device, Product, Right, State
from uplinkd.core.operators import Role, Scope
from uplinkd.engine import DeadLetter
from uplinkd.engine import Query as Wanted
from uplinkd.engine.doors import doors
from uplinkd.engine.reader import check as check_query
from uplinkd.peers import gateways_of
from uplinkd.registry import Registry
from uplinkd.registry.fleet import written_fleet
from uplinkd.settings import Settings, shown

__all__ = ["PREFIX", "live_messages", "live_refusals", "live_stats", "number_in", "router", "stats", "uploaded"]

PREFIX = "/api/v1"
MAX_UPLOAD = 256 * 1024**2
_PING_SECONDS = 10.0
_LOOK_SECONDS = 0.5
_MOST_WATCHING = 100

T = TypeVar("T")

_problems: dict[int | str, dict[str, Any]] = {
    status: {"model": doc.Problem} for status in (400, 401, 403, 404, 405, 408, 409, 412, 413, 421, 422, 429, 503)
}
router = APIRouter(prefix=PREFIX, route_class=RepeatableRoute, responses=_problems)
uploads = APIRouter(prefix=PREFIX, responses=_problems)

In = Annotated[Office, Depends(office_of)]
Reads = Annotated[Principal, Depends(needs(Scope.READ))]
Operates = Annotated[Principal, Depends(needs(Scope.OPERATE))]
Administers = Annotated[Principal, Depends(needs(Scope.ADMIN))]

Limit = Annotated[int, Query(ge=1, le=1000, description="at most so many")]
Cursor = Annotated[str | None, Query(max_length=255, description="`next` of the page before")]
Name = Annotated[str, Path(min_length=1, max_length=255)]
Filter = Annotated[str | None, Query(max_length=255)]
Time = Annotated[int | None, Query(ge=0, le=1 << 53, description="ms since 1970 UTC")]
IfMatch = Annotated[str | None, Header(max_length=255, description="the ETag of what you saw; 412 when it has changed")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", min_length=1, max_length=255, description="a repeated creation gets the same answer"
    ),
]


def _etag(version: str) -> dict[str, str]:
    return {"ETag": f'"{version}"'}


def _version(if_match: str | None) -> str | None:
    """The version in If-Match, None for any. A weak one is taken, since proxies that compress make it so."""
    if if_match is None or if_match.strip() == "*":
        return None
    found = re.fullmatch(r'\s*(?:W/)?"?([^",]*)"?\s*', if_match)
    if found is None:
        raise Rejected(f"If-Match is {if_match[:80]!r}; it is the one ETag of what you saw")
    return found[1]


def _page(items: list[T], limit: int, cursor: Callable[[T], str]) -> tuple[list[T], str | None]:
    """The page and the next cursor, of `items` that were asked for with one more than `limit`."""
    more = len(items) > limit
    items = items[:limit]
    return items, cursor(items[-1]) if more else None


def number_in(text: str) -> int | None:
    """The number that `text` is, None where it is none that an id can be."""
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text) and int(text) < 1 << 63 else None


def _cursor(text: str | None) -> int | None:
    number = None if text is None else number_in(text)
    if number is None and text is not None:
        raise Rejected(f"cursor {text[:40]!r} is not one that this list gave")
    return number


# -- products


@router.get("/products", tags=["products"])
def list_products(
    office: In,
    who: Reads,
    text: Annotated[str, Query(max_length=64, description="what the name or the key has in it")] = "",
    limit: Limit = 100,
    cursor: Cursor = None,
) -> doc.Page[doc.ProductDocument]:
    """Products without their secrets, in the order in which they were made."""
    found = office.registry.product_page(text=text, after=_cursor(cursor) or 0, limit=limit + 1)
    products, after = _page(found, limit, lambda product: str(product.id))
    return doc.Page(items=[doc.ProductDocument.of(product) for product in products], next=after)


@router.post("/products", tags=["products"], status_code=201)
def create_product(
    office: In, who: Operates, given: doc.NewProduct, response: Response, idempotency_key: IdempotencyKey = None
) -> doc.ProductWithSecret:
    """Make a product, with the platform's default topic classes."""
    product = office.registry.create_product(given.name, key=given.product_key, secret=given.product_secret)
    response.headers.update({**_etag(product.version), "Location": f"{PREFIX}/products/{product.key}"})
    return doc.ProductWithSecret.of(product)


@router.get("/products/{product_key}", tags=["products"])
def show_product(office: In, who: Reads, product_key: Name, response: Response) -> doc.ProductDocument:
    product = office.registry.product(product_key)
    response.headers.update(_etag(product.version))
    return doc.ProductDocument.of(product)


@router.patch("/products/{product_key}", tags=["products"])
def change_product(
    office: In,
    who: Operates,
    product_key: Name,
    given: doc.ProductChange,
    response: Response,
    if_match: IfMatch = None,
) -> doc.ProductDocument:
    """Give the product another name."""
    product = office.registry.rename_product(product_key, given.name, version=_version(if_match))
    response.headers.update(_etag(product.version))
    return doc.ProductDocument.of(product)


@router.delete("/products/{product_key}", tags=["products"], status_code=204)
def delete_product(office: In, who: Operates, product_key: Name, if_match: IfMatch = None) -> None:
    """Delete a product that has no devices; `POST /product-deletions` deletes one with its devices."""
    office.registry.delete_product(product_key, version=_version(if_match))


@router.get("/products/{product_key}/secret", tags=["products"])
def show_product_secret(office: In, who: Operates, product_key: Name) -> doc.SecretDocument:
    return doc.SecretDocument(secret=product_secret(office, product_key).secret)


def product_secret(office: Office, product_key: str) -> Product:
    """The product, for somebody who will see its secret: the audit says so."""
    product = office.registry.product(product_key)
    office.registry.operators.note("product.secret", product.key)
    return product


@router.get("/products/{product_key}/census", tags=["products"])
def count_devices(office: In, who: Reads, product_key: Name) -> doc.CensusDocument:
    """How many devices the product has, by state; of a large fleet a few seconds old."""
    office.registry.product(product_key)
    return doc.CensusDocument.of(office.census(product_key))


# -- devices


@router.get("/products/{product_key}/devices", tags=["devices"])
def list_devices(
    office: In,
    who: Reads,
    product_key: Name,
    prefix: Annotated[str, Query(max_length=64)] = "",
    state: State | None = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> doc.Page[doc.DeviceDocument]:
    """Devices by name, without their secrets: those whose name begins with `prefix`, in `state`."""
    found = office.registry.page(
        product_key, prefix=prefix, state=state, after=cursor or "", limit=limit + 1, timeout=office.timeout
    )
    devices, after = _page(found, limit, lambda device: device.name)
    moment = now()
    return doc.Page(
        items=[doc.DeviceDocument.of(device, now=moment, timeout=office.timeout) for device in devices], next=after
    )


@router.post("/products/{product_key}/devices", tags=["devices"], status_code=201)
def create_device(
    office: In,
    who: Operates,
    product_key: Name,
    given: doc.NewDevice,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> doc.DeviceWithSecret:
    device = office.registry.create_device(product_key, given.device_name, secret=given.device_secret)
    response.headers["Location"] = f"{PREFIX}/products/{product_key}/devices/{device.name}"
    return _with_secret(office, device, response)


def _with_secret(office: Office, device: Device, response: Response) -> doc.DeviceWithSecret:
    response.headers.update(_etag(device.version))
    return doc.DeviceWithSecret.of(device, now=now(), timeout=office.timeout)


@router.get("/products/{product_key}/devices/{device_name}", tags=["devices"])
def show_device(office: In, who: Reads, product_key: Name, device_name: Name, response: Response) -> doc.DeviceDocument:
    device = office.registry.device(product_key, device_name)
    response.headers.update(_etag(device.version))
    return doc.DeviceDocument.of(device, now=now(), timeout=office.timeout)


@router.patch("/products/{product_key}/devices/{device_name}", tags=["devices"])
def change_device(
    office: In,
    who: Operates,
    product_key: Name,
    device_name: Name,
    given: doc.DeviceChange,
    response: Response,
    if_match: IfMatch = None,
) -> doc.DeviceDocument:
    """Disable the device (its tokens and its MQTT session end within a second) or let it in again."""
    device = office.registry.set_enabled(product_key, device_name, given.enabled, version=_version(if_match))
    response.headers.update(_etag(device.version))
    return doc.DeviceDocument.of(device, now=now(), timeout=office.timeout)


@router.delete("/products/{product_key}/devices/{device_name}", tags=["devices"], status_code=204)
def delete_device(office: In, who: Operates, product_key: Name, device_name: Name, if_match: IfMatch = None) -> None:
    """Delete the device; its messages stay."""
    office.registry.delete_device(product_key, device_name, version=_version(if_match))


@router.get("/products/{product_key}/devices/{device_name}/secret", tags=["devices"])
def show_device_secret(office: In, who: Operates, product_key: Name, device_name: Name) -> doc.SecretDocument:
    return doc.SecretDocument(secret=device_secret(office, product_key, device_name).secret)


def device_secret(office: Office, product_key: str, device_name: str) -> Device:
    """The device, for somebody who will see its secret: the audit says so."""
    device = office.registry.device(product_key, device_name)
    office.registry.operators.note("device.secret", f"{device.product_key}/{device.name}")
    return device


@router.post("/products/{product_key}/devices/{device_name}/secret", tags=["devices"])
def reset_device_secret(
    office: In,
    who: Operates,
    product_key: Name,
    device_name: Name,
    response: Response,
    if_match: IfMatch = None,
    idempotency_key: IdempotencyKey = None,
) -> doc.DeviceWithSecret:
    """Give the device a new secret; its tokens and its MQTT session end within a second."""
    device = office.registry.reset_secret(product_key, device_name, version=_version(if_match))
    return _with_secret(office, device, response)


@router.get(
    "/products/{product_key}/export",
    tags=["devices"],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
)
def export_devices(
    office: In, who: Operates, product_key: Name, prefix: Annotated[str, Query(max_length=64)] = ""
) -> StreamingResponse:
    """The devices as CSV with their secrets, as a stream: what `POST /imports` takes."""
    return exported(office, product_key, prefix)


def exported(office: Office, product_key: str, prefix: str = "") -> StreamingResponse:
    devices = office.registry.devices(product_key, prefix=prefix)
    office.registry.operators.note("device.export", f"{product_key}/{prefix}")
    headers = {"Content-Disposition": f'attachment; filename="{product_key}.csv"', "Cache-Control": "no-store"}
    return StreamingResponse(written_fleet(devices), media_type="text/csv; charset=utf-8", headers=headers)


# -- long work


@router.get("/jobs", tags=["jobs"])
async def list_jobs(office: In, who: Reads) -> doc.Page[doc.JobDocument]:
    """Long work, the newest first; a restart of the server forgets it."""
    return doc.Page(items=[doc.JobDocument.of(job, who.scope) for job in office.jobs.all()])


@router.get("/jobs/{job_id}", tags=["jobs"])
async def show_job(office: In, who: Reads, job_id: Name) -> doc.JobDocument:
    """How far it is. The rows that an import could not read are for those who may import: they may hold what was meant as a secret."""
    return doc.JobDocument.of(office.jobs.get(job_id), who.scope)


@router.delete("/jobs/{job_id}", tags=["jobs"], status_code=202)
async def cancel_job(office: In, who: Operates, job_id: Name) -> doc.JobDocument:
    """Ask the job to end; it does at its next step. An import that is cancelled has stored nothing."""
    return doc.JobDocument.of(office.jobs.cancel(job_id))


def _begun(job: Any, response: Response) -> doc.JobDocument:
    response.headers["Location"] = f"{PREFIX}/jobs/{job.id}"
    return doc.JobDocument.of(job)


@uploads.post(
    "/imports",
    tags=["jobs"],
    status_code=202,
    openapi_extra={"requestBody": {"required": True, "content": {"text/csv": {"schema": {"type": "string"}}}}},
)
async def import_devices(
    office: In,
    who: Operates,
    request: Request,
    response: Response,
    skip_bad: Annotated[
        bool, Query(alias="skipBad", description="let the good rows in; else one bad row keeps all out")
    ] = False,
) -> doc.JobDocument:
    """Import devices from CSV with the columns ProductKey, DeviceName, DeviceSecret (empty: made); the body is a stream."""
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "text/csv":
        raise Rejected(f"Content-Type is {kind!r}; it must be text/csv")
    stream, size = await uploaded(office, request.stream())
    with contextlib.ExitStack() as stack:
        stack.enter_context(stream)
        act = await run_in_threadpool(fleetwork.fleet_import, office.registry, stream, size, skip_bad=skip_bad)
        job = office.jobs.start("import", "", "bytes", act, total=size)
        stack.pop_all()  # the job closes it
    return _begun(job, response)


async def uploaded(office: Office, parts: AsyncGenerator[bytes]) -> tuple[BinaryIO, int]:
    """What arrives, in a file without a name that only this process has, and its size in bytes; raise Rejected over 256 MiB, and
    Unavailable where there is no room for it."""
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(tempfile.TemporaryFile(dir=office.settings.data))
            size = 0
            async for part in parts:
                size += len(part)
                if size > MAX_UPLOAD:
                    raise Rejected(f"the file is larger than {MAX_UPLOAD // 1024**2} MiB; import it in parts")
                await run_in_threadpool(file.write, part)
            file.seek(0)
            stack.pop_all()
    except OSError as error:
        raise Unavailable(f"the file cannot be kept in the data folder: {error.strerror}") from error
    return file, size


@router.post("/bulk-creations", tags=["jobs"], status_code=202)
async def create_many(
    office: In, who: Operates, given: doc.BulkCreation, response: Response, idempotency_key: IdempotencyKey = None
) -> doc.JobDocument:
    """Make many devices; their names are `prefix` and a number. `GET /products/…/export?prefix=…` gives them with their secrets."""
    act = await run_in_threadpool(
        fleetwork.making, office.registry, given.product_key, given.prefix, given.count, given.start
    )
    target = f"{given.product_key}/{given.prefix}"
    return _begun(office.jobs.start("bulk-creation", target, "devices", act, total=given.count), response)


@router.post("/product-deletions", tags=["jobs"], status_code=202)
async def delete_whole_product(
    office: In,
    who: Operates,
    product_key: Annotated[str, Query(alias="productKey", max_length=255)],
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> doc.JobDocument:
    """Delete a product with all of its devices. Cancelled, it leaves the product and the devices not yet deleted."""
    act = await run_in_threadpool(fleetwork.deletion, office.registry, product_key)
    total = (await run_in_threadpool(office.census, product_key)).total
    return _begun(office.jobs.start("product-deletion", product_key, "devices", act, total=total), response)


# -- topic classes


@router.get("/products/{product_key}/topic-classes", tags=["topic classes"])
def list_topic_classes(office: In, who: Reads, product_key: Name) -> doc.Page[doc.TopicClassDocument]:
    """What the product's devices may publish and subscribe to."""
    found = office.registry.topic_classes(product_key)
    return doc.Page(items=[doc.TopicClassDocument.of(product_key, each) for each in found])


@router.post("/products/{product_key}/topic-classes", tags=["topic classes"], status_code=201)
def add_topic_class(
    office: In, who: Operates, product_key: Name, given: doc.NewTopicClass, idempotency_key: IdempotencyKey = None
) -> doc.TopicClassDocument:
    added = office.registry.add_topic_class(product_key, given.levels, Right(given.right))
    return doc.TopicClassDocument.of(product_key, added)


@router.delete("/products/{product_key}/topic-classes/{levels:path}", tags=["topic classes"], status_code=204)
def remove_topic_class(office: In, who: Operates, product_key: Name, levels: Name) -> None:
    """`levels` as they stand in the list; `#` is sent as %23."""
    office.registry.remove_topic_class(product_key, levels)


# -- messages


def _wanted(
    product: Filter, device: Filter, topic: Filter, since: Time, until: Time, before: int | None = None
) -> Wanted:
    return Wanted(
        product_key=product or None,
        device_name=device or None,
        topic=topic or None,
        since=since,
        until=until,
        before=before,
    )


@router.get("/messages", tags=["messages"])
async def list_messages(
    office: In,
    who: Reads,
    product: Filter = None,
    device: Filter = None,
    topic: Filter = None,
    since: Time = None,
    until: Time = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> doc.Page[doc.MessageDocument]:
    """Stored messages, the newest first: of a product, a device, one exact topic; stored between two times."""
    wanted = _wanted(product, device, topic, since, until, _cursor(cursor))
    found = await (await office.awake()).latest(wanted, limit + 1)
    messages, before = _page(list(reversed(found)), limit, lambda message: str(message.id))
    return doc.Page(items=[doc.MessageDocument.of(message) for message in messages], next=before)


async def _watching(office: In) -> AsyncGenerator[None]:
    """A place among those who watch a stream; raise TooOften when there is none left."""
    if office.watching >= _MOST_WATCHING:
        raise TooOften(5, f"{_MOST_WATCHING} streams are watched already")
    office.watching += 1
    try:
        yield
    finally:
        office.watching -= 1


async def _tailed(office: In, product: Filter = None, device: Filter = None, topic: Filter = None) -> Wanted:
    """What to watch; raise Rejected or Unavailable while that can still be said with a status."""
    wanted = _wanted(product, device, topic, None, None)
    check_query(wanted)
    await office.stored()
    return wanted


Watches = Annotated[None, Depends(_watching)]


@router.get("/messages/stream", tags=["messages"], response_class=EventSourceResponse)
async def stream_messages(
    request: Request, office: In, who: Reads, wanted: Annotated[Wanted, Depends(_tailed)], watches: Watches
) -> AsyncGenerator[ServerSentEvent]:
    """Messages as they are stored, as server-sent events: `messages` with a list of them and how many were skipped, for a
    view by people. It never slows devices down: of very many the newest are shown."""
    async for event in while_known(request, live_messages(office, wanted)):
        yield event


async def live_messages(office: Office, wanted: Wanted) -> AsyncGenerator[ServerSentEvent]:
    reader = await office.reader()
    async for glimpse in reader.tail(wanted):
        if office.stopping.is_set():
            return
        if glimpse.messages or glimpse.skipped:
            items = [doc.MessageDocument.of(each).model_dump(by_alias=True, mode="json") for each in glimpse.messages]
            yield ServerSentEvent(event="messages", data={"items": items, "skipped": glimpse.skipped})
        else:
            yield ServerSentEvent(comment="here")


@router.get("/messages/{message_id}", tags=["messages"])
async def show_message(office: In, who: Reads, message_id: Name) -> doc.MessageDocument:
    number = message_number(message_id)
    found = await (await office.awake()).by_id(number)
    if found is None:
        raise NotFound(f"no message {message_id} is stored; it may have been dropped for its age or for room")
    return doc.MessageDocument.of(found)


def message_number(text: str) -> int:
    number = number_in(text)
    if number is None:
        raise Rejected(f"messageId {text[:40]!r}: it is a number of up to 19 digits")
    return number


@router.post("/products/{product_key}/devices/{device_name}/messages", tags=["messages"], status_code=202)
async def send_message(
    office: In,
    who: Operates,
    product_key: Name,
    device_name: Name,
    given: doc.NewMessage,
    idempotency_key: IdempotencyKey = None,
) -> doc.MessageSent:
    """Send a message down, on a topic that the device may subscribe to; answered once it is stored."""
    answer = await sent(office, given.topic, product_key, device_name, given.data())
    return doc.MessageSent(topic=given.topic, message_id=str(answer["messageId"]), way=answer["way"])


@router.post("/products/{product_key}/broadcasts", tags=["messages"], status_code=202)
async def broadcast_message(
    office: In, who: Operates, product_key: Name, given: doc.NewMessage, idempotency_key: IdempotencyKey = None
) -> doc.Broadcast:
    """Send a message to all devices of the product that listen to /broadcast/${productKey}/…; how many sessions heard it."""
    answer = await sent(office, given.topic, product_key, None, given.data())
    return doc.Broadcast(topic=given.topic, sessions=answer["sessions"])


async def sent(office: Office, topic: str, product_key: str, device_name: str | None, payload: bytes) -> dict[str, Any]:
    """What the gateway says to a message down. The audit has it first, without the payload: nothing is sent that it cannot have."""
    check_down_topic(topic, product_key, device_name)
    target = f"{product_key}/{device_name or ''}"
    await run_in_threadpool(office.registry.operators.note, "message.send", target, f"{topic}, {len(payload)} bytes")

    async def ask(subject: str, body: bytes) -> bytes:
        return (await office.bus.ask(subject, body, patience=PATIENCE_SECONDS)).payload

    try:
        return await send_down(ask, topic, payload)
    except (Rejected, Unavailable):
        with contextlib.suppress(Unavailable):
            await run_in_threadpool(office.registry.operators.note, "message.failed", target, topic)
        raise


# -- refusals


@router.get("/logs", tags=["logs"])
async def list_refusals(
    office: In,
    who: Reads,
    request: Request,
    response: Response,
    request_id: Annotated[str | None, Query(alias="requestId", max_length=64)] = None,
    product: Filter = None,
    device: Filter = None,
    code: Annotated[int | None, Query(ge=0, le=99_999)] = None,
    address: Filter = None,
    endpoint: Filter = None,
    since: Time = None,
    until: Time = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> doc.Page[doc.RefusalDocument]:
    """Why devices were refused, the newest first, at all gateways; in the language of Accept-Language (en, zh). A gateway that did not
    answer within a second is named in the header Uplinkd-Silent."""
    wanted = refusals_wanted(request_id, product, device, code, address, endpoint, since, until, _cursor(cursor))
    recorded = await office.records.read(wanted, limit + 1)
    found = recorded.refusals
    if recorded.silent:
        response.headers["Uplinkd-Silent"] = ",".join(recorded.silent)
    found.sort(key=lambda refusal: refusal.id, reverse=True)
    refusals, before = _page(found, limit, lambda refusal: str(refusal.id))
    language = _language(request)
    return doc.Page(items=[doc.RefusalDocument.of(each, language) for each in refusals], next=before)


def refusals_wanted(
    request_id: str | None = None,
    product: str | None = None,
    device: str | None = None,
    code: int | None = None,
    address: str | None = None,
    endpoint: str | None = None,
    since: int | None = None,
    until: int | None = None,
    before: int | None = None,
) -> journal.Wanted:
    return journal.Wanted(
        request_id=request_id or None,
        product=product or None,
        device=device or None,
        code=code,
        address=address or None,
        endpoint=endpoint or None,
        since=since,
        until=until,
        before=before,
    )


def _language(request: Request) -> str:
    return "zh" if request.headers.get("Accept-Language", "").lower().startswith("zh") else "en"


@router.get("/logs/stream", tags=["logs"], response_class=EventSourceResponse)
async def stream_refusals(
    office: In,
    who: Reads,
    watches: Watches,
    request: Request,
    product: Filter = None,
    device: Filter = None,
    code: Annotated[int | None, Query(ge=0, le=99_999)] = None,
) -> AsyncGenerator[ServerSentEvent]:
    """Refusals as they are recorded, as server-sent events `refusals` with a list of them."""
    wanted = refusals_wanted(None, product, device, code)
    async for event in while_known(request, live_refusals(office, wanted, _language(request))):
        yield event


async def live_refusals(office: Office, wanted: journal.Wanted, language: str) -> AsyncGenerator[ServerSentEvent]:
    last: dict[str, int] | None = None
    ping = time.monotonic() + _PING_SECONDS
    while not office.stopping.is_set():
        last, found = await office.records.after(wanted, last)
        if found:
            items = [doc.RefusalDocument.of(each, language).model_dump(by_alias=True, mode="json") for each in found]
            yield ServerSentEvent(event="refusals", data={"items": items})
        elif time.monotonic() > ping:
            ping = time.monotonic() + _PING_SECONDS
            yield ServerSentEvent(comment="here")
        await asyncio.sleep(_LOOK_SECONDS)


# -- applications


@router.get("/apps", tags=["apps"])
def list_apps(office: In, who: Reads) -> doc.Page[doc.AppDocument]:
    """Programs that read what devices report, over NATS or MQTT."""
    return doc.Page(items=[doc.AppDocument.of(app) for app in office.registry.apps()])


@router.post("/apps", tags=["apps"], status_code=201)
def create_app(
    office: In, who: Administers, given: doc.NewApp, response: Response, idempotency_key: IdempotencyKey = None
) -> doc.AppWithSecret:
    """Make credentials for an application; the secret is in this answer alone."""
    app, secret = office.registry.create_app(given.name, products=given.products, sends=given.sends)
    response.headers.update({**_etag(app.version), "Location": f"{PREFIX}/apps/{app.name}"})
    return doc.AppWithSecret(**doc.AppDocument.of(app).model_dump(), secret=secret)


def _app(app: App, response: Response) -> doc.AppDocument:
    response.headers.update(_etag(app.version))
    return doc.AppDocument.of(app)


@router.get("/apps/{name}", tags=["apps"])
def show_app(office: In, who: Reads, name: Name, response: Response) -> doc.AppDocument:
    return _app(office.registry.app(name), response)


@router.patch("/apps/{name}", tags=["apps"])
def change_app(
    office: In, who: Administers, name: Name, given: doc.AppChange, response: Response, if_match: IfMatch = None
) -> doc.AppDocument:
    """Say which products it reaches; within a second it is asked to connect anew."""
    return _app(office.registry.set_app(name, given.products, version=_version(if_match)), response)


@router.delete("/apps/{name}", tags=["apps"], status_code=204)
def delete_app(office: In, who: Administers, name: Name, if_match: IfMatch = None) -> None:
    """Revoke its credentials; within a second its connections are closed."""
    office.registry.delete_app(name, version=_version(if_match))


@router.post("/apps/{name}/secret", tags=["apps"])
def renew_app_secret(
    office: In, who: Administers, name: Name, response: Response, idempotency_key: IdempotencyKey = None
) -> doc.AppWithSecret:
    """Give it a new secret, which is in this answer alone; within a second its connections with the old one are closed."""
    app, secret = office.registry.renew_app_secret(name)
    response.headers.update(_etag(app.version))
    return doc.AppWithSecret(**doc.AppDocument.of(app).model_dump(), secret=secret)


# -- consumer groups


@router.get("/groups", tags=["groups"])
async def list_groups(office: In, who: Reads) -> doc.Page[doc.ListedGroup]:
    """All consumer groups and how far they are; of a webhook's URL without the query. It takes a second to measure rates that
    nobody has asked for lately."""
    return doc.Page(items=await listed_groups(office, rates=True))


async def listed_groups(office: Office, *, rates: bool = False) -> list[doc.ListedGroup]:
    """With `rates` not before these are known."""
    groups = await run_in_threadpool(office.registry.groups.all)
    states: list[doc.FiguresDocument | None] = [None] * len(groups)
    live: Live | None = None
    with contextlib.suppress(Unavailable):
        if groups:
            standings, live = await asyncio.gather(office.standings(groups, rates=rates), office.live())
            states = [doc.FiguresDocument.of(each) for each in standings]
    return [
        doc.ListedGroup(
            **doc.GroupDocument.of(group).model_dump(),
            state=state,
            consumers=sum(each.group == group.name for each in live.consumers) if live else None,
            webhook_open=hook.open if live and (hook := _hook_of(live, group)) else None,
        )
        for group, state in zip(groups, states, strict=True)
    ]


def _hook_of(live: Live, group: Group) -> HookState | None:
    """What the process tells that did something last: the others are there in case of its end."""
    hooks = [each for each in live.hooks if each.group == group.name]
    return max(hooks, key=lambda each: max(each.last_success, each.last_failure), default=None)


@router.post("/groups", tags=["groups"], status_code=201)
def create_group(
    office: In, who: Administers, given: doc.NewGroup, response: Response, idempotency_key: IdempotencyKey = None
) -> doc.GroupWithSecret:
    """Make a consumer group, for applications over AMQP or for a webhook; a webhook's secret is in this answer alone."""
    plan = given.plan()
    groupwork.check_target(office, plan)
    group = office.registry.groups.create(given.name, plan, start=given.start)
    response.headers["Location"] = f"{PREFIX}/groups/{group.name}"
    return _with_hook_secret(group, who, response, group.secret)


def _with_hook_secret(group: Group, who: Principal, response: Response, secret: str) -> doc.GroupWithSecret:
    response.headers.update(_etag(group.version))
    return doc.GroupWithSecret(**doc.GroupDocument.of(group, who.scope).model_dump(), secret=secret or None)


@router.get("/groups/{name}", tags=["groups"])
def show_group(office: In, who: Reads, name: Name, response: Response) -> doc.GroupDocument:
    group = office.registry.groups.get(name)
    response.headers.update(_etag(group.version))
    return doc.GroupDocument.of(group, who.scope)


@router.patch("/groups/{name}", tags=["groups"])
def change_group(
    office: In, who: Administers, name: Name, given: doc.GroupChange, response: Response, if_match: IfMatch = None
) -> doc.GroupWithSecret:
    """Change what is given; its position stays. A first webhook comes with a secret."""
    before = office.registry.groups.get(name)
    plan = given.applied(before.plan)
    groupwork.check_target(office, plan)
    group = office.registry.groups.change(name, plan, version=_version(if_match) or before.version)
    return _with_hook_secret(group, who, response, "" if before.plan.webhook else group.secret)


@router.delete("/groups/{name}", tags=["groups"], status_code=204)
def delete_group(office: In, who: Administers, name: Name, if_match: IfMatch = None) -> None:
    """Delete it with its position and its dead letters; the messages stay."""
    office.registry.groups.delete(name, version=_version(if_match))


@router.post("/groups/{name}/reset", tags=["groups"])
def reset_group(
    office: In,
    who: Operates,
    name: Name,
    given: doc.GroupReset,
    response: Response,
    if_match: IfMatch = None,
    idempotency_key: IdempotencyKey = None,
) -> doc.GroupDocument:
    """Set its position: it gets what was stored since then, also again what it had."""
    start = now() if given.start is None else given.start
    group = office.registry.groups.reset(name, start, version=_version(if_match))
    response.headers.update(_etag(group.version))
    return doc.GroupDocument.of(group, who.scope)


@router.post("/groups/{name}/secret", tags=["groups"])
def renew_group_secret(
    office: In,
    who: Administers,
    name: Name,
    response: Response,
    if_match: IfMatch = None,
    idempotency_key: IdempotencyKey = None,
) -> doc.GroupWithSecret:
    """Give its webhook a new secret, which is in this answer alone; the old one signs nothing from now on."""
    group = office.registry.groups.renew_secret(name, version=_version(if_match))
    return _with_hook_secret(group, who, response, group.secret)


@router.post("/groups/{name}/test", tags=["groups"])
async def try_group(office: In, who: Operates, name: Name, idempotency_key: IdempotencyKey = None) -> doc.TrialDocument:
    """Post a sample event, of the type io.uplinkd.test, to its webhook, and tell what became of it."""
    group = await run_in_threadpool(office.registry.groups.get, name)
    return doc.TrialDocument.of(await groupwork.try_hook(office, group))


@router.get("/groups/{name}/state", tags=["groups"])
async def show_group_state(office: In, who: Reads, name: Name) -> doc.GroupStateDocument:
    """How far it is, who consumes it, how its webhook fares. It takes a second when nobody has looked lately."""
    group = await run_in_threadpool(office.registry.groups.get, name)
    return await group_state(office, group)


async def group_state(office: Office, group: Group, *, rates: bool = True) -> doc.GroupStateDocument:
    """With `rates` not before the rate is known. Raise Unavailable."""
    (standing,), live = await asyncio.gather(office.standings([group], rates=rates), office.live())
    hook = _hook_of(live, group)
    return doc.GroupStateDocument(
        **doc.FiguresDocument.of(standing).model_dump(),
        consumers=[doc.ConsumerDocument.of(each) for each in live.consumers if each.group == group.name],
        webhook=doc.HookDocument.of(hook) if hook else None,
    )


@router.get("/groups/{name}/dead", tags=["groups"])
async def list_dead_letters(
    office: In,
    who: Reads,
    name: Name,
    after: Annotated[str | None, Query(max_length=40, description="`next` of the page before")] = None,
    limit: Limit = 100,
) -> doc.Page[doc.DeadLetterDocument]:
    """Messages that the group did not accept, the oldest first; kept for 30 days, and 100,000 of a group."""
    group = await run_in_threadpool(office.registry.groups.get, name)
    found = await office.desk.dead(group, after=_cursor(after) or 0, limit=limit + 1)
    letters, more = _page(found, limit, lambda letter: str(letter.number))
    return doc.Page(items=[doc.DeadLetterDocument.of(letter) for letter in letters], next=more)


@router.get("/groups/{name}/dead/{number}", tags=["groups"])
async def show_dead_letter(office: In, who: Reads, name: Name, number: Name) -> doc.DeadLetterDocument:
    group = await run_in_threadpool(office.registry.groups.get, name)
    return doc.DeadLetterDocument.of(await dead_letter(office, group, number))


async def dead_letter(office: Office, group: Group, number: str) -> DeadLetter:
    found = await office.desk.dead_letter(group, letter_number(number))
    if found is None:
        raise NotFound(
            f"consumer group {group.name!r} has no dead letter {number[:40]}; it may have been offered again, or gone for its age"
        )
    return found


def letter_number(text: str) -> int:
    number = number_in(text)
    if not number:
        raise Rejected(f"dead letter {text[:40]!r}: its number has up to 19 digits")
    return number


@router.post("/groups/{name}/retry", tags=["groups"])
async def retry_dead_letters(
    office: In, who: Operates, name: Name, given: doc.DeadLetters, idempotency_key: IdempotencyKey = None
) -> doc.Counted:
    """Offer these dead letters to the group's consumers again, with all their tries; how many there were."""
    group = await run_in_threadpool(office.registry.groups.get, name)
    return doc.Counted(count=await groupwork.retry(office, group, [letter_number(each) for each in given.numbers]))


@router.post("/groups/{name}/retry-all", tags=["groups"], status_code=202)
async def retry_all_dead_letters(
    office: In, who: Operates, name: Name, response: Response, idempotency_key: IdempotencyKey = None
) -> doc.JobDocument:
    """Offer all dead letters again. Cancelled, it leaves those that were not offered yet."""
    group = await run_in_threadpool(office.registry.groups.get, name)
    return _begun(await groupwork.retry_all(office, group), response)


@router.post("/groups/{name}/purge", tags=["groups"])
async def purge_dead_letters(
    office: In, who: Operates, name: Name, given: doc.DeadLettersOrAll, idempotency_key: IdempotencyKey = None
) -> doc.Counted:
    """Throw these dead letters, or all, away; how many there were."""
    group = await run_in_threadpool(office.registry.groups.get, name)
    numbers = None if given.numbers is None else [letter_number(each) for each in given.numbers]
    return doc.Counted(count=await groupwork.purge(office, group, numbers))


# -- access


@router.get("/keys", tags=["access"])
def list_keys(office: In, who: Administers) -> doc.Page[doc.KeyDocument]:
    return doc.Page(items=[doc.KeyDocument.of(key) for key in office.registry.operators.api_keys()])


@router.post("/keys", tags=["access"], status_code=201)
def create_key(
    office: In, who: Administers, given: doc.NewKey, idempotency_key: IdempotencyKey = None
) -> doc.KeyWithSecret:
    """Make an API key; it is in this answer alone, only a hash of it is kept."""
    made, key = office.registry.operators.create_key(given.name, given.scope)
    return doc.KeyWithSecret(**doc.KeyDocument.of(made).model_dump(), key=key)


@router.delete("/keys/{name}", tags=["access"], status_code=204)
def delete_key(office: In, who: Administers, name: Name) -> None:
    office.registry.operators.delete_key(name)


@router.get("/users", tags=["access"])
def list_users(office: In, who: Administers) -> doc.Page[doc.UserDocument]:
    return doc.Page(items=[doc.UserDocument.of(user) for user in office.registry.operators.users()])


@router.post("/users", tags=["access"], status_code=201)
def create_user(
    office: In, who: Administers, given: doc.NewUser, idempotency_key: IdempotencyKey = None
) -> doc.UserWithPassword:
    """Make a user with a one-time password, which they replace at their first sign-in."""
    return new_user(office, given.name, given.role)


def new_user(office: Office, name: str, role: Role) -> doc.UserWithPassword:
    user, password = office.registry.operators.invite(name, role)
    return doc.UserWithPassword(**doc.UserDocument.of(user).model_dump(), password=password)


@router.patch("/users/{name}", tags=["access"])
def change_user(office: In, who: Administers, name: Name, given: doc.UserChange) -> doc.UserDocument:
    return doc.UserDocument.of(office.registry.operators.set_role(name, given.role))


@router.post("/users/{name}/password", tags=["access"])
def renew_password(
    office: In, who: Administers, name: Name, idempotency_key: IdempotencyKey = None
) -> doc.UserWithPassword:
    """Give the user a new one-time password; their sessions end."""
    return one_time_password(office, name)


def one_time_password(office: Office, name: str) -> doc.UserWithPassword:
    user, password = office.registry.operators.renew_password(name)
    return doc.UserWithPassword(**doc.UserDocument.of(user).model_dump(), password=password)


@router.delete("/users/{name}", tags=["access"], status_code=204)
def delete_user(office: In, who: Administers, name: Name) -> None:
    if who.user and who.user.name == name:
        raise Forbidden("you cannot delete yourself; another admin can")
    office.registry.operators.delete_user(name)


@router.get("/audit", tags=["access"])
def list_audit(
    office: In,
    who: Administers,
    actor: Filter = None,
    action: Filter = None,
    target: Filter = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> doc.Page[doc.AuditDocument]:
    """Who changed what, the newest first: by one actor, of actions and targets that begin so."""
    found = office.registry.operators.audit(
        actor=actor or "", action=action or "", target=target or "", before=_cursor(cursor), limit=limit + 1
    )
    entries, before = _page(found, limit, lambda entry: str(entry.id))
    return doc.Page(items=[doc.AuditDocument.of(entry) for entry in entries], next=before)


# -- how things stand


@router.get("/stats", tags=["stats"])
async def show_stats(office: In, who: Reads) -> doc.StatsDocument:
    return await stats(office)


async def stats(office: Office) -> doc.StatsDocument:
    reading = office.figures.read()
    census = await run_in_threadpool(office.census)
    refused = await office.records.counts(now() - 3_600_000)
    messages = size = None
    with contextlib.suppress(Unavailable):
        state = await office.stored()
        messages, size = state.messages, state.bytes
    return doc.StatsDocument(
        version=__version__,
        started=round(reading.started * 1000),
        devices=doc.CensusDocument.of(census),
        now=office.figures.seconds[-1].document if office.figures.seconds else {},
        refused={str(code): count for code, count in sorted(refused.items())},
        messages=messages,
        bytes=size,
        engine=messages is not None,
        worker_restarts=reading.worker_restarts,
        engine_restarts=reading.engine_restarts,
        handshakes={f"{version} {kind}": count for (version, kind), count in reading.handshakes.items() if count},
        handshake_failures={reason: count for reason, count in reading.handshake_failures.items() if count},
    )


@router.get("/gateways", tags=["stats"])
async def list_gateways(office: In, who: Reads) -> doc.Page[doc.GatewayDocument]:
    """The gateways that live, on the NATS servers of this one."""
    return doc.Page(items=gateways(office))


def gateways(office: Office) -> list[doc.GatewayDocument]:
    return [
        doc.GatewayDocument(
            gateway=each.name,
            version=each.version,
            workers=each.workers,
            connections=each.connections,
            since=each.since,
        )
        for each in gateways_of(office.peers.all if office.peers else ())
    ]


@router.get("/stats/history", tags=["stats"])
async def show_history(
    office: In, who: Reads, by: Annotated[str, Query(pattern="^(second|minute)$")] = "second"
) -> doc.Page[dict[str, Any]]:
    """Rates and latencies, oldest first: the last quarter of an hour by the second, or the last day by the minute."""
    kept: Iterable[Sample] = office.figures.minutes if by == "minute" else office.figures.seconds
    return doc.Page(items=[each.document for each in kept])


@router.get("/stats/stream", tags=["stats"], response_class=EventSourceResponse)
async def stream_stats(request: Request, office: In, who: Reads, watches: Watches) -> AsyncGenerator[ServerSentEvent]:
    """Each second what happened in it, as server-sent events `stats`."""
    async for event in while_known(request, live_stats(office)):
        yield event


async def live_stats(office: Office) -> AsyncGenerator[ServerSentEvent]:
    async for each in office.figures.follow():
        if office.stopping.is_set():
            return
        yield ServerSentEvent(event="stats", data=each.document)


@router.get("/doors", tags=["apps"])
def show_doors(office: In, who: Reads, request: Request) -> doc.DoorsDocument:
    """Where applications connect, with the credentials that `POST /apps` gives."""
    found = doors(office.settings, host=request.url.hostname or "")
    return doc.DoorsDocument(
        nats=found.nats, mqtt=found.mqtt, own_nats=found.own_nats, amqp=found.amqp, streams=list(found.streams)
    )


@router.get("/settings", tags=["stats"])
def list_settings(office: In, who: Administers) -> doc.Page[doc.SettingDocument]:
    """The settings that the server runs with; secrets only as `(set)`."""
    return doc.Page(items=settings_of(office))


def settings_of(office: Office) -> list[doc.SettingDocument]:
    fields = Settings.model_fields.items()
    return [
        doc.SettingDocument(name=name, value=shown(office.settings, name), description=info.description or "")
        for name, info in fields
    ]


# -- the workbench


@router.post("/examinations", tags=["workbench"])
def examine(office: In, who: Operates, given: doc.ToExamine) -> doc.ExaminationDocument:
    """What is right and wrong with a login that a device sends, as JSON, MQTT parameters or content and sign."""
    return doc.ExaminationDocument.of(examined(office, given.text, given.secret))


def examined(office: Office, text: str, secret: str | None) -> workbench.Examined:
    """With the DeviceSecret of the device that the text names, unless another is given; None where neither is known."""
    if not secret:
        product_key, device_name = workbench.names_in(text)
        device = _find(office.registry, product_key, device_name)
        secret = device.secret if device else None
    window = round(office.settings.timestamp_window * 1000)
    return workbench.examine(text, secret=secret, now=now(), window=window)


def _find(registry: Registry, product_key: str, device_name: str) -> Device | None:
    return registry.find_device(product_key, device_name) if product_key and device_name else None
