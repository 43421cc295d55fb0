"""`uplinkd send`: a message down to a device, or to all devices of a product that listen."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click
import nats.errors

from uplinkd.asking import PATIENCE_SECONDS, check_down_topic, send_down
from uplinkd.cli.common import KEY_FLAGS, json_option, print_json, printable, server_elsewhere, settings_options
from uplinkd.core.errors import Unavailable
from uplinkd.engine.api import connect, words
from uplinkd.engine.embedded import Access, access_for
from uplinkd.settings import Settings

__all__ = ["send"]


@click.command()
@click.argument("pk")
@click.argument("target", nargs=-1, required=True, metavar="DN TOPIC [PAYLOAD]")
@click.option("--all", "everybody", is_flag=True, help="To all devices of PK that listen: TOPIC is /broadcast/PK/NAME.")
@json_option
@settings_options("nats_url", remote=KEY_FLAGS)
def send(settings: Settings, pk: str, target: tuple[str, ...], everybody: bool, as_json: bool) -> None:
    """Send PAYLOAD to the device DN of the product PK, on a TOPIC that it may subscribe to; with --all, DN is left out.

    It is delivered over MQTT where a session has subscribed, else it waits and rides home in the answer to the device's next
    report over HTTPS. A PAYLOAD of - is read from standard input.
    """
    most = 2 if everybody else 3
    if not most - 1 <= len(target) <= most:
        raise click.UsageError(
            f"PK {'TOPIC [PAYLOAD]' if everybody else 'DN TOPIC [PAYLOAD]'} is wanted, not {len(target) + 1} words"
        )
    topic, text = target[most - 2], target[most - 1] if len(target) == most else ""
    check_down_topic(topic, pk, None if everybody else target[0])
    payload = sys.stdin.buffer.read() if text == "-" else text.encode(errors="surrogateescape")
    if server := server_elsewhere():
        from uplinkd.remote import RemoteReader

        answer = RemoteReader(server).send(topic, pk, None if everybody else target[0], payload)
    else:
        with access_for(settings, start=False) as access:
            answer = asyncio.run(_send(access, topic, payload))
    if as_json:
        print_json({"topic": topic, **answer})
    elif everybody:
        count = answer["sessions"]
        click.echo(f"sent to {count} session{'' if count == 1 else 's'} listening to {printable(topic)}")
    elif answer["way"] == "mqtt":
        click.echo(f"messageId {answer['messageId']}: its MQTT session gets it")
    else:
        click.echo(
            f"messageId {answer['messageId']}: it waits for the device's next report over HTTPS, or an MQTT session"
        )


async def _send(access: Access, topic: str, payload: bytes) -> dict[str, Any]:
    client = await connect(access, "uplinkd send")

    async def ask(subject: str, payload: bytes) -> bytes:
        try:
            answer: bytes = (await client.request(subject, payload, PATIENCE_SECONDS)).data
        except nats.errors.NoRespondersError as error:
            raise Unavailable("no gateway is there to send it; start one with `uplinkd serve`") from error
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise Unavailable(f"no gateway has answered: {words(error)}; whether it was sent is not known") from error
        else:
            return answer

    try:
        return await send_down(ask, topic, payload)
    finally:
        await client.close()
        await asyncio.sleep(0)  # its transport closes in the next turn of the loop
