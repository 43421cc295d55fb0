"""`uplinkd app`: credentials of programs that read what devices report and send messages down to them."""

from __future__ import annotations

import contextlib

import click

from uplinkd.cli.common import json_option, local_time, print_json, print_table, settings_options, warn
from uplinkd.cli.products import opened
from uplinkd.core.apps import inbox_of
from uplinkd.core.errors import Unavailable
from uplinkd.core.model import App
from uplinkd.engine.embedded import announced
from uplinkd.engine.stream import STREAM
from uplinkd.settings import Settings, address, reachable

__all__ = ["app"]

_options = settings_options("database_url", "secret_key", "mqtt_listen", "nats_listen", "nats_url")


@click.group()
def app() -> None:
    """Make, list, show and delete credentials of applications; say which products they may reach."""


@app.command()
@click.argument("name")
@click.option("--product", "products", multiple=True, metavar="PK", help="A product that it may reach; repeatable.")
@click.option("--read-only", is_flag=True, help="It may read, and send nothing down.")
@json_option
@_options
def create(settings: Settings, name: str, products: tuple[str, ...], read_only: bool, as_json: bool) -> None:
    """Make credentials for an application called NAME; the secret is shown this once.

    It may read what the devices of the products report and, unless --read-only, send messages down to them.
    """
    with opened(settings) as registry:
        made, secret = registry.create_app(name, products=products, sends=not read_only)
    _show(settings, made, as_json, secret)
    if not made.products:
        warn(f"it may do nothing until it has a product: uplinkd app grant {made.name} PK")


@app.command("list")
@json_option
@_options
def list_apps(settings: Settings, as_json: bool) -> None:
    """All applications."""
    with opened(settings) as registry:
        found = registry.apps()
    if as_json:
        print_json([_document(settings, each) for each in found])
    else:
        rows = [(each.name, each.key, _may(each), local_time(each.created)) for each in found]
        print_table(("NAME", "KEY", "MAY", "MADE"), rows)


@app.command()
@click.argument("name")
@json_option
@_options
def show(settings: Settings, name: str, as_json: bool) -> None:
    """One application, and how it connects; never its secret."""
    with opened(settings) as registry:
        _show(settings, registry.app(name), as_json)


@app.command()
@click.argument("name")
@click.argument("pk", nargs=-1, required=True)
@json_option
@_options
def grant(settings: Settings, name: str, pk: tuple[str, ...], as_json: bool) -> None:
    """Let the application NAME reach the products PK too; within a second it is asked to connect anew."""
    with opened(settings) as registry:
        _changed(settings, registry.grant_app(name, pk), as_json)


@app.command()
@click.argument("name")
@click.argument("pk", nargs=-1, required=True)
@json_option
@_options
def withdraw(settings: Settings, name: str, pk: tuple[str, ...], as_json: bool) -> None:
    """Take the products PK from the application NAME; within a second its connections are closed."""
    with opened(settings) as registry:
        _changed(settings, registry.withdraw_app(name, pk), as_json)


@app.command()
@click.argument("name")
@json_option
@_options
def delete(settings: Settings, name: str, as_json: bool) -> None:
    """Revoke an application's credentials; within a second its connections are closed."""
    with opened(settings) as registry:
        registry.delete_app(name)
    if as_json:
        print_json({"name": name, "deleted": True})
    else:
        click.echo(f"application {name} is deleted")


def _may(app: App) -> str:
    if not app.products:
        return "do nothing"
    return f"read {'and send to' if app.sends else 'only'} {', '.join(app.products)}"


def _url(settings: Settings) -> str:
    """Where the NATS port is, by the server that runs or else by the settings; empty where applications have none."""
    if settings.nats_url or not settings.nats_listen:
        return ""
    with contextlib.suppress(Unavailable):
        return announced(settings).urls[0]
    return _at("nats", settings.nats_listen)


def _mqtt_url(settings: Settings) -> str:
    """Where the MQTT door is by the settings; empty where there is none."""
    return _at("mqtts", settings.mqtt_listen) if settings.mqtt_listen else ""


def _at(scheme: str, listen: str) -> str:
    host, port = address(listen)
    return f"{scheme}://{reachable(host)}:{port}"


def _document(settings: Settings, app: App, secret: str = "") -> dict[str, object]:
    url, mqtt_url = _url(settings), _mqtt_url(settings)
    nats = {"url": url, "user": app.key, "stream": STREAM, "consumer": app.key, "inboxPrefix": inbox_of(app)}
    return {
        "name": app.name,
        "key": app.key,
        **({"secret": secret} if secret else {}),
        "products": list(app.products),
        "sends": app.sends,
        "createTime": app.created,
        "nats": nats if url else None,
        "mqtt": {"url": mqtt_url, "username": app.key} if mqtt_url else None,
    }


def _show(settings: Settings, app: App, as_json: bool, secret: str = "") -> None:
    if as_json:
        print_json(_document(settings, app, secret))
        return
    lines = [("name", app.name), ("key", app.key)]
    if secret:
        lines.append(("secret", f"{secret}   (shown this once)"))
    lines.append(("may", _may(app)))
    if url := _url(settings):
        lines += [
            ("NATS", url),
            ("", "user: the key; password: the secret"),
            ("", f"stream {STREAM}, durable consumer {app.key}, inbox prefix {inbox_of(app)}"),
        ]
    elif settings.nats_url:
        lines.append(("NATS", "on your own servers your own accounts hold; these credentials are not known there"))
    else:
        lines.append(("NATS", "not open to applications (nats_listen is empty)"))
    if mqtt_url := _mqtt_url(settings):
        lines += [("MQTT", mqtt_url), ("", "user name: the key; password: the secret; any clientId")]
    for label, text in lines:
        click.echo(f"{label:<8}{text}")


def _changed(settings: Settings, app: App, as_json: bool) -> None:
    if as_json:
        print_json(_document(settings, app))
    else:
        click.echo(f"application {app.name} may {_may(app)}")
