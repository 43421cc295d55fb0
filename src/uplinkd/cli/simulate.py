"""`uplinkd publish` and `uplinkd sign`: what a device does, done by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from uplinkd.cli.common import json_option, print_json, printable, settings_options
from uplinkd.client import Answered, Device, login_body
from uplinkd.core import signature
from uplinkd.core.errors import EXPLANATIONS, Code, Rejected
from uplinkd.registry import open_registry
from uplinkd.settings import Settings, address, reachable

__all__ = ["publish", "sign"]

F = TypeVar("F", bound=Callable[..., Any])


def _utf8(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> str | None:
    """What is signed is UTF-8; other bytes on the command line arrive as halves of surrogate pairs."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise click.BadParameter(f"{text!r} is not UTF-8") from error
    return text


_product = click.option("--product", required=True, callback=_utf8, metavar="PK", help="ProductKey.")
_device = click.option("--device", required=True, callback=_utf8, metavar="DN", help="DeviceName.")
_secret = click.option(
    "--secret", callback=_utf8, metavar="S", help="DeviceSecret; without it the local registry is asked."
)


def _method(default: str) -> Callable[[F], F]:
    known = click.Choice(list(signature.METHODS), case_sensitive=False)
    return click.option("--method", type=known, default=default, show_default=True, help="Method of the sign.")


@click.command()
@click.argument("topic", callback=_utf8)
@click.argument("payload", default="")
@_product
@_device
@_secret
@click.option("--url", help="The server  [default: where the settings say that it listens].")
@click.option("--ca", type=click.Path(path_type=Path), help="CA to trust  [default: tls/ca.pem in the data folder].")
@_method("hmacsha256")
@json_option
@settings_options("listen", "database_url", "secret_key")
def publish(
    settings: Settings,
    topic: str,
    payload: str,
    product: str,
    device: str,
    secret: str | None,
    url: str | None,
    ca: Path | None,
    method: str,
    as_json: bool,
) -> None:
    """Act as a device, the whole way: sign in, then report PAYLOAD to TOPIC. A PAYLOAD of - is read from standard input."""
    body = sys.stdin.buffer.read() if payload == "-" else payload.encode(errors="surrogateescape")
    if not topic.startswith("/"):
        raise Rejected(f"topic {topic!r}: it begins with a slash, such as /{product}/{device}/user/update")
    own = settings.data / "tls" / "ca.pem"
    actor = Device(url or _local_url(settings), product, device, secret or _known_secret(settings, product, device),
                   ca=ca or (own if own.exists() and not settings.tls_cert else None))  # fmt: skip
    try:
        answer = actor.publish(actor.authenticate(method.lower()), topic, body)
    except Answered as refusal:
        _explain(refusal, as_json)
        sys.exit(1)
    finally:
        actor.close()
    if as_json:
        down = {} if answer.data is None else {"down": {"topic": answer.topic, "data": answer.data}}
        print_json({"code": 0, "message": "success", "messageId": answer.message_id, "topic": topic, **down})
    else:
        click.echo(f"stored as messageId {answer.message_id}: {len(body)} bytes to {printable(topic)}")
        if answer.data is not None:
            click.echo(
                f"a message for the device came with the answer, on {printable(answer.topic)}: {printable(answer.data)}"
            )


@click.command()
@_product
@_device
@_secret
@click.option("--client-id", callback=_utf8, metavar="ID", help="clientId  [default: PK.DN].")
@click.option("--timestamp", metavar="MS", help="Milliseconds since 1970; left out by default.")
@_method("hmacsha1")
@click.option("--body", "only_body", is_flag=True, help="Print the JSON body of POST /auth alone, for curl -d.")
@click.option(
    "--mqtt", "for_mqtt", is_flag=True, help="Show the clientId, user name and password of an MQTT CONNECT instead."
)
@json_option
@settings_options("database_url", "secret_key")
def sign(
    settings: Settings,
    product: str,
    device: str,
    secret: str | None,
    client_id: str | None,
    timestamp: str | None,
    method: str,
    only_body: bool,
    for_mqtt: bool,
    as_json: bool,
) -> None:
    """Show what a device signs and what comes out."""
    if only_body and for_mqtt:
        raise click.UsageError("--body is for HTTPS; --mqtt shows what a CONNECT has")
    if timestamp is not None and not timestamp.isdecimal():
        raise Rejected(f"timestamp {timestamp!r} is not a whole number of milliseconds since 1970")
    if client_id is not None and not 1 <= len(client_id) <= 64:
        raise Rejected(f"clientId has {len(client_id)} characters; 1 to 64 are allowed")
    key = secret or _known_secret(settings, product, device)
    body = login_body(product, device, key, client_id=client_id, timestamp=timestamp, method=method.lower())
    members: dict[str, str] = json.loads(body)
    content = signature.content_of(members)
    if for_mqtt:
        _show_connect(members, content, as_json)
    elif only_body:
        click.echo(body)
    elif as_json:
        print_json({"content": content, "sign": members["sign"], "signmethod": members["signmethod"], "body": members})
    else:
        click.echo(
            f"content     {printable(content)}\nsignmethod  {members['signmethod']}\nsign        {members['sign']}"
        )


def _show_connect(members: dict[str, str], content: str, as_json: bool) -> None:
    """The same identity in MQTT's form."""
    parameters = f"securemode=2,signmethod={members['signmethod']}"
    if "timestamp" in members:
        parameters += f",timestamp={members['timestamp']}"
    connect = {
        "clientId": f"{members['clientId']}|{parameters}|",
        "username": f"{members['deviceName']}&{members['productKey']}",
        "password": members["sign"],
    }
    if as_json:
        print_json({"content": content, **connect})
    else:
        click.echo(f"content   {printable(content)}")
        for name, value in connect.items():
            click.echo(f"{name:8}  {printable(value)}")


def _known_secret(settings: Settings, product: str, device: str) -> str:
    registry = open_registry(settings)
    try:
        return registry.device(product, device).secret
    finally:
        registry.close()


def _local_url(settings: Settings) -> str:
    host, port = address(settings.listen)
    return f"https://{reachable(host)}:{port}"


def _explain(answer: Answered, as_json: bool) -> None:
    known = EXPLANATIONS.get(Code(answer.code)) if answer.code in set(Code) else None
    if as_json:
        print_json(
            {"code": answer.code, "message": answer.message, "status": answer.status, "requestId": answer.request_id}
        )
        return
    lines = [f"refused: {answer.code} {answer.message} (HTTP {answer.status})"]
    if known:
        lines += [f"  it means    {known.means}", f"  what to do  {known.do}"]
    if answer.request_id:
        lines.append(f"  the reason  uplinkd logs {answer.request_id}")
    click.echo("\n".join(lines), err=True)
