"""`uplinkd send`: a message down to a device, or to all devices of a product that listen."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import click
import nats.errors

from uplinkd.cli.common import json_option, print_json, printable, settings_options
from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.engine.api import connect, words
from uplinkd.engine.embedded import Access, access_for
from uplinkd.sending import send_subject
from uplinkd.settings import Settings

__all__ = ["send"]

_PATIENCE = 10.0


@click.command()
@click.argument("pk")
@click.argument("target", nargs=-1, required=True, metavar="DN TOPIC [PAYLOAD]")
@click.option("--all", "everybody", is_flag=True, help="To all devices of PK that listen: TOPIC is /broadcast/PK/NAME.")
@json_option
@settings_options("nats_url")
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
    _check_topic(topic, pk, None if everybody else target[0])
    payload = sys.stdin.buffer.read() if text == "-" else text.encode(errors="surrogateescape")
    with access_for(settings, start=False) as access:
        answer = asyncio.run(_ask(access, topic, payload))
    if "error" in answer:
        raise Rejected(answer["error"])
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


def _check_topic(topic: str, pk: str, name: str | None) -> None:
    """The topic must be of the device that is named: a slip of the hand would reach another."""
    try:
        topic.encode()
    except UnicodeEncodeError as error:
        raise Rejected(f"topic {topic!r} is not UTF-8") from error
    if any(char.isspace() or char in "*>+#" or not char.isprintable() for char in topic) or not topic.startswith("/"):
        raise Rejected(f"topic {topic!r}: it begins with a slash, and has no wildcard and no white space")
    if name is None:
        if not topic.startswith(f"/broadcast/{pk}/"):
            raise Rejected(f"topic {topic!r}: with --all it is /broadcast/{pk}/ and one level more")
    elif f"/{pk}/{name}" not in topic:
        raise Rejected(f"topic {topic!r} is not of the device {name!r} of {pk}: it is such as /{pk}/{name}/user/get")


async def _ask(access: Access, topic: str, payload: bytes) -> dict[str, Any]:
    client = await connect(access, "uplinkd send")
    try:
        answer: dict[str, Any] = json.loads((await client.request(send_subject(topic), payload, _PATIENCE)).data)
    except nats.errors.NoRespondersError as error:
        raise Unavailable("no gateway is there to send it; start one with `uplinkd serve`") from error
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise Unavailable(f"no gateway has answered: {words(error)}; whether it was sent is not known") from error
    else:
        return answer
    finally:
        await client.close()
        await asyncio.sleep(0)  # its transport closes in the next turn of the loop
