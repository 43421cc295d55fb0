"""`uplinkd logs`: why devices were refused."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import click

from uplinkd import journal
from uplinkd.cli.common import (
    KEY_FLAGS,
    duration,
    json_option,
    local_time,
    print_json,
    printable,
    server_elsewhere,
    settings_options,
)
from uplinkd.core.errors import MESSAGES, Code
from uplinkd.engine.embedded import Access
from uplinkd.journal import Refusal, Wanted
from uplinkd.settings import Settings

if TYPE_CHECKING:
    from uplinkd.records import Records

__all__ = ["logs"]

_MOST_BEFORE = 1000


@click.command()
@click.argument("request_id", required=False)
@click.option("--request", metavar="ID", help="The same as REQUEST_ID.")
@click.option("--product", metavar="PK", help="Of this product.")
@click.option("--device", metavar="DN", help="Of this device.")
@click.option("--code", type=int, help="With this code, such as 20000.")
@click.option(
    "--endpoint",
    metavar="E",
    help="Of this part: auth, topic, http, mqtt, send, amqp; tls: which devices sign in over a legacy TLS suite.",
)
@click.option("--since", metavar="AGE", help="Not older than this, such as 10m or 7d.")
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most this many, the newest."
)
@click.option("--follow", "-f", is_flag=True, help="Go on with what is refused from now on, until Ctrl-C.")
@json_option
@settings_options(remote=KEY_FLAGS)
def logs(
    settings: Settings,
    request_id: str | None,
    request: str | None,
    product: str | None,
    device: str | None,
    code: int | None,
    endpoint: str | None,
    since: str | None,
    limit: int,
    follow: bool,
    as_json: bool,
) -> None:
    """Every refusal with its reason, the latest last; one of them by the REQUEST_ID that its device was given.

    A note tells of what was not refused, and is worth knowing: ignored, slowed down, taken over, dropped.
    """
    oldest = max(0, round((time.time() - duration(since)) * 1000)) if since else None
    if request_id and request and request_id != request:
        raise click.UsageError(f"two requests are asked for: {request_id} and {request}")
    if follow and endpoint == journal.STANDING:
        raise click.UsageError(
            "--endpoint tls is one note for each device, renewed once a day: ask for it without --follow"
        )
    wanted = Wanted(request_id or request, product, device, code, oldest, endpoint=endpoint)
    if follow:
        _follow(settings, wanted, as_json)
        return
    if server := server_elsewhere():
        from uplinkd.remote import RemoteJournal

        found = RemoteJournal(server).read(wanted, limit)
    elif settings.nats_url:
        found = asyncio.run(_of_all(settings, wanted, limit))
    else:
        found = journal.read(settings, wanted, limit)
    if as_json:
        print_json([_document(refusal) for refusal in found])
        return
    for refusal in found:
        _show(refusal)
    if not found and endpoint == journal.STANDING:
        click.echo("no device signs in over a legacy TLS suite", err=True)
    elif not found:
        click.echo("nothing was refused" + (" that matches" if wanted != Wanted() else ""), err=True)


@contextlib.asynccontextmanager
async def _records(settings: Settings) -> AsyncIterator[Records]:
    """Those of all gateways, asked over the owner's NATS servers; raise Unavailable when these do not answer."""
    from uplinkd.engine.groups import open_desk
    from uplinkd.records import Records

    desk = await open_desk(Access.of(settings))
    try:
        yield Records(settings, desk.bus)
    finally:
        await desk.close()


async def _of_all(settings: Settings, wanted: Wanted, limit: int) -> list[Refusal]:
    async with _records(settings) as records:
        found = await records.read(wanted, limit)
    if found.silent:
        click.echo(f"did not answer within a second, so its refusals are missing: {', '.join(found.silent)}", err=True)
    return found.refusals


async def _follow_all(settings: Settings, wanted: Wanted) -> AsyncIterator[Refusal]:
    async with _records(settings) as records:
        if wanted.since is not None:
            for refusal in (await records.read(wanted, _MOST_BEFORE)).refusals:
                yield refusal
        cursors, _ = await records.after(wanted, None)
        while True:
            cursors, found = await records.after(wanted, cursors)
            for refusal in found:
                yield refusal


def _follow(settings: Settings, wanted: Wanted, as_json: bool) -> None:
    def show(refusal: Refusal) -> None:
        if as_json:
            print_json(_document(refusal), one_line=True)
        else:
            _show(refusal)

    async def show_each(refusals: AsyncIterator[Refusal]) -> None:
        async for refusal in refusals:
            show(refusal)

    with contextlib.suppress(KeyboardInterrupt):
        if server := server_elsewhere():
            from uplinkd.remote import RemoteJournal

            asyncio.run(show_each(RemoteJournal(server).follow(wanted)))
        elif settings.nats_url:
            asyncio.run(show_each(_follow_all(settings, wanted)))
        else:
            for refusal in journal.follow(settings, wanted):
                show(refusal)


def _document(refusal: Refusal) -> dict[str, object]:
    return {
        "requestId": refusal.request_id,
        "time": refusal.at,
        "endpoint": refusal.endpoint,
        "code": refusal.code,
        "message": _message(refusal),
        "status": refusal.status,
        "productKey": refusal.product_key,
        "deviceName": refusal.device_name,
        "address": refusal.address,
        "topic": refusal.topic,
        "reason": refusal.reason,
        "times": refusal.times,
        "gateway": refusal.gateway,
    }


def _message(refusal: Refusal) -> str:
    """Empty for a note: nothing was refused."""
    return MESSAGES[Code(refusal.code)] if refusal.code else ""


def _show(refusal: Refusal) -> None:
    if refusal.endpoint == "journal":
        click.echo(f"{local_time(refusal.at)}  {printable(refusal.reason)}")
        return
    stranger = "a consumer" if refusal.endpoint == "amqp" else "unknown device"
    who = "/".join(filter(None, (refusal.product_key, refusal.device_name))) or stranger
    where = f"  from {refusal.address}" if refusal.address else ""
    where += f"  at {refusal.gateway}" if refusal.gateway else ""
    what = f"{refusal.code} {_message(refusal)}{_status(refusal)}" if refusal.code else "note"
    if refusal.times > 1:
        what += f" × {refusal.times:,}"
    click.echo(f"{local_time(refusal.at)}  {refusal.request_id}  {what}  {printable(who)}{where}")
    if refusal.topic:
        click.echo(f"    topic   {printable(refusal.topic)}")
    click.echo(f"    reason  {printable(refusal.reason)}")


def _status(refusal: Refusal) -> str:
    """How the refusal looked on the wire, where that is not plain from the code."""
    if refusal.endpoint == "mqtt":
        return f" (CONNACK {refusal.status})" if refusal.status else " (MQTT)"
    if refusal.endpoint == "amqp":
        return f" (SASL outcome {refusal.status})" if refusal.status else " (AMQP)"
    return f" (HTTP {refusal.status})" if refusal.status != 200 else ""
