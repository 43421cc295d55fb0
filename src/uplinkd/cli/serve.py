"""`uplinkd serve` and `uplinkd settings`."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from uplinkd import __version__
from uplinkd.cli.common import json_option, print_json, print_table, settings_options
from uplinkd.settings import Origins, Settings, reachable, shown

if TYPE_CHECKING:
    from uplinkd.app import Started

__all__ = ["serve", "show_settings"]

DEMO_PRODUCT = "demo product"
DEMO_DEVICE = "demo-device"


@click.command()
@settings_options("*")
@click.option("--demo", is_flag=True, help="With an empty registry, make a product and a device to try things with.")
@click.pass_context
def serve(ctx: click.Context, settings: Settings, demo: bool) -> None:
    """Serve devices over HTTPS and MQTT until Ctrl-C or SIGTERM."""
    from uplinkd import app
    from uplinkd.observe import set_up_logging

    set_up_logging(json=settings.log_format == "json")
    for line in _told_to_everybody(settings, ctx.meta["uplinkd.origins"]):
        logging.getLogger("uplinkd").warning(line)

    def prepare(settings: Settings) -> None:
        if demo:
            _make_demo(settings)

    app.serve(settings, prepare=prepare, started=_banner)
    click.echo("uplinkd has stopped; everything that was acknowledged is stored")


@click.command("settings")
@settings_options("*")
@json_option
@click.pass_context
def show_settings(ctx: click.Context, settings: Settings, as_json: bool) -> None:
    """Show each setting with its value and where it came from."""
    origins: dict[str, str] = ctx.meta["uplinkd.origins"]
    fields = Settings.model_fields.items()
    rows = [(name, shown(settings, name), origins[name], info.description or "") for name, info in fields]
    if as_json:
        print_json([dict(zip(("name", "value", "origin", "description"), row, strict=True)) for row in rows])
    else:
        print_table(("SETTING", "VALUE", "FROM", "WHAT IT IS"), rows)


def _told_to_everybody(settings: Settings, origins: Origins) -> Iterator[str]:
    """Which secrets stand on the command line."""
    secret = {
        "secret_key": bool(settings.secret_key.get_secret_value()),
        "nats_url": shown(settings, "nats_url") != settings.nats_url,
        "database_url": shown(settings, "database_url") != settings.database_url,
    }
    for name, is_set in secret.items():
        if is_set and origins[name].startswith("--"):
            yield (
                f"{origins[name]} has a secret, and each user of this machine sees the command line: put {name} into uplinkd.toml, "
                "which your user alone may read"
            )


def _make_demo(settings: Settings) -> None:
    from uplinkd.registry import open_registry

    registry = open_registry(settings)
    try:
        if not registry.products():
            product = registry.create_product(DEMO_PRODUCT)
            registry.create_device(product.key, DEMO_DEVICE)
    finally:
        registry.close()


def _banner(started: Started) -> None:
    """What listens where, and two lines that send a first message when pasted into any shell of this machine."""
    host, port = started.tls
    url = f"https://{reachable(host)}:{port}"
    lines = [
        f"uplinkd {__version__} is serving; Ctrl-C stops it",
        "",
        f"  devices   {url}   (HTTPS, {started.workers} worker{'s' if started.workers > 1 else ''})",
    ]
    if started.plain:
        lines.append(
            f"            http://{reachable(started.plain[0])}:{started.plain[1]}   (plain text, for a proxy on this network)"
        )
    for scheme, where, what in (
        ("mqtts", started.mqtt, f"MQTT; also wss://{reachable(host)}:{port}/mqtt"),
        ("mqtt", started.mqtt_plain, "MQTT without TLS"),
    ):
        if where:
            lines.append(f"            {scheme}://{reachable(where[0])}:{where[1]}   ({what})")
    if started.amqp:
        lines.append(
            f"  backends  amqps://{reachable(started.amqp[0])}:{started.amqp[1]}   (AMQP 1.0; `uplinkd group create`)"
        )
    if started.authority:
        lines.append(f"  CA        {started.authority.absolute()}   (give it to your devices and clients)")
    if started.nats:
        lines.append(f"  apps      {started.nats}   (NATS; `uplinkd app create` makes credentials)")
    if started.console:
        lines.append(f"  console   {started.console}")
        if started.password:
            lines.append(f"            first sign-in: user admin, one-time password {started.password}")
    lines += [
        f"  engine    {started.engine}",
        f"  state     {started.settings.data.absolute()}",
        "",
        *_first_message(started, url),
    ]
    click.echo("\n".join(lines))
    sys.stdout.flush()


def _first_message(started: Started, url: str) -> list[str]:
    me = _command()
    data = shlex.quote(str(started.settings.data.absolute()))
    device = _any_device(started.settings)
    if device is None:
        return [
            "There is no device yet:",
            f"  {me} product create 'my product' --data {data}",
            f"  {me} device create <productKey> my-device --data {data}",
        ]
    product_key, name = device
    who = f"--product {product_key} --device {shlex.quote(name)} --data {data}"
    topic = f"/{product_key}/{name}/user/update"
    trust = f"--cacert {shlex.quote(str(started.authority.absolute()))} " if started.authority else ""
    login = (
        f"curl -s {trust}{url}/auth -H 'Content-Type: application/json' -d \"$({me} sign {who} --body)\" "
        '| sed \'s/.*"token":"\\([^"]*\\)".*/\\1/\''
    )
    return [
        "Send a first message, as a device would:",
        f"  {me} publish {topic} 'hello from uplinkd' --url {url} {who}",
        "",
        "The same with curl: sign in at /auth, then report with the token:",
        f"  curl {trust}{url}/topic{topic} -H 'Content-Type: application/octet-stream'"
        f" -H \"password: $({login})\" -d 'hello from curl'",
        "",
        "Then look at it, or at why something was refused:",
        f"  {me} messages list --data {data}",
        f"  {me} logs --data {data}",
    ]


def _any_device(settings: Settings) -> tuple[str, str] | None:
    from uplinkd.registry import open_registry

    registry = open_registry(settings)
    try:
        for product in registry.products():
            for device in registry.devices(product.key):
                if device.enabled:
                    return device.product_key, device.name
        return None
    finally:
        registry.close()


def _command() -> str:
    """How this program is called from any folder."""
    path = Path(os.path.abspath(sys.argv[0]))
    found = shutil.which("uplinkd")
    if found and Path(found) == path:
        return "uplinkd"
    return shlex.quote(str(path)) if path.name == "uplinkd" else f"{shlex.quote(sys.executable)} -m uplinkd"
