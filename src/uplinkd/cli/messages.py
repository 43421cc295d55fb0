"""`uplinkd messages`: what devices have reported, and what they are reporting."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import click

from uplinkd.cli.common import (
    KEY_FLAGS,
    duration,
    json_option,
    local_time,
    print_json,
    printable,
    server_elsewhere,
    settings_options,
    warn,
)
from uplinkd.core.errors import NotFound
from uplinkd.core.model import Message
from uplinkd.engine import Query, Reader, open_reader
from uplinkd.engine.embedded import access_for
from uplinkd.engine.reader import check
from uplinkd.settings import Settings

__all__ = ["may_be_there", "message_document", "messages", "payload_text"]

MOST = 10_000

T = TypeVar("T")
_options = settings_options("nats_url", "nats_server", remote=KEY_FLAGS)


@click.group()
def messages() -> None:
    """Look at stored messages, or watch them arrive."""


def _since(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    """The moment, ms since 1970, that lies the given time back."""
    if text is None:
        return None
    return max(0, round((time.time() - duration(text)) * 1000))


def _query_options(command: Any) -> Any:
    for option in (
        click.option("--since", callback=_since, metavar="AGE", help="Not older than this, such as 10m or 7d."),
        click.option("--topic", metavar="TOPIC", help="Of exactly this topic."),
        click.option("--device", metavar="DN", help="Of the devices of this name."),
        click.option("--product", metavar="PK", help="Of this product."),
    ):
        command = option(command)
    return command


@messages.command("list")
@_query_options
@click.option(
    "--limit", type=click.IntRange(1, MOST), default=20, show_default=True, help="At most this many, the newest."
)
@json_option
@_options
def list_messages(
    settings: Settings,
    product: str | None,
    device: str | None,
    topic: str | None,
    since: int | None,
    limit: int,
    as_json: bool,
) -> None:
    """The newest messages, the latest last. Works whether a server runs or not."""
    query = Query(product, device, topic, since)
    check(query)
    found: list[Message] = []
    if may_be_there(settings):
        found = _looked(settings, lambda reader: reader.latest(query, limit))
    if as_json:
        print_json([message_document(message) for message in found])
    else:
        for message in found:
            _show(message)
        if not found:
            warn("no message is stored" + (" that matches" if query != Query() else ""))


@messages.command("tail")
@_query_options
@json_option
@_options
def tail_messages(
    settings: Settings, product: str | None, device: str | None, topic: str | None, since: int | None, as_json: bool
) -> None:
    """Messages as they are stored, until Ctrl-C; with --since, first those since then."""
    query = Query(product, device, topic, since)
    check(query)

    async def follow(reader: Reader) -> None:
        async for message in reader.follow(query):
            if as_json:
                print_json(message_document(message), one_line=True)
            else:
                _show(message)

    with contextlib.suppress(KeyboardInterrupt):
        _looked(settings, follow, start=False)


@messages.command("show")
@click.argument("message_id", type=click.IntRange(0, 2**63 - 1))
@json_option
@_options
def show_message(settings: Settings, message_id: int, as_json: bool) -> None:
    """The stored message with the MESSAGE_ID that its device was given."""
    found = None
    if may_be_there(settings):
        found = _looked(settings, lambda reader: reader.by_id(message_id))
    if found is None:
        raise NotFound(f"no message {message_id} is stored; it may have been dropped for its age or for room")
    if as_json:
        print_json(message_document(found))
    else:
        _show(found)


def may_be_there(settings: Settings) -> bool:
    """False where nothing was ever stored: a look should not make a store."""
    return bool(server_elsewhere() or settings.nats_url or (settings.data / "nats").is_dir())


def _looked(settings: Settings, look: Callable[[Reader], Awaitable[T]], *, start: bool = True) -> T:
    """What `look` finds at the server elsewhere, or in the engine of this machine, which is started for it with `start`."""

    async def run(opening: Awaitable[Reader]) -> T:
        reader = await opening
        try:
            return await look(reader)
        finally:
            await reader.close()

    async def elsewhere() -> Reader:
        from uplinkd.remote import RemoteReader

        assert server
        return RemoteReader(server)

    if server := server_elsewhere():
        return asyncio.run(run(elsewhere()))
    with access_for(settings, start=start) as access:
        return asyncio.run(run(open_reader(access)))


def until_interrupted(following: Coroutine[Any, Any, None]) -> None:
    """Run until Ctrl-C, which is how such a command ends."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(following)


def message_document(message: Message) -> dict[str, object]:
    """As JSON for programs."""
    return {
        "messageId": message.id,
        "topic": message.topic,
        "productKey": message.product_key,
        "deviceName": message.device_name,
        "generateTime": message.generate_time,
        "origin": message.origin.value,
        "payload": base64.b64encode(message.payload).decode(),
    }


def _show(message: Message) -> None:
    click.echo(
        f"{local_time(message.generate_time)}  {message.id}  {message.origin:6}  {printable(message.topic)}  "
        f"{payload_text(message.payload)}"
    )


def payload_text(payload: bytes) -> str:
    """Text as text, anything else as hex."""
    with contextlib.suppress(UnicodeDecodeError):
        text = payload.decode()
        if all(char.isprintable() or char in "\t\r\n" for char in text):
            return printable(text)
    return payload.hex()
