"""`uplinkd app`: credentials of programs that read what devices report and send messages down to them."""

from __future__ import annotations

import click

from uplinkd.cli.common import (
    KEY_FLAGS,
    json_option,
    local_time,
    print_json,
    print_table,
    server_elsewhere,
    settings_options,
    warn,
)
from uplinkd.cli.products import opened
from uplinkd.core.apps import inbox_of
from uplinkd.core.model import App
from uplinkd.engine.doors import Doors, doors
from uplinkd.settings import Settings

__all__ = ["app", "doors_of"]

_options = settings_options("database_url", "secret_key", "mqtt_listen", "nats_listen", "nats_url", remote=KEY_FLAGS)


@click.group()
def app() -> None:
    """Make, list, show, renew and delete credentials of applications; say which products they may reach."""


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
        ways = doors_of(settings)
        print_json([_document(ways, each) for each in found])
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


@app.command("renew-secret")
@click.argument("name")
@json_option
@_options
def renew_secret(settings: Settings, name: str, as_json: bool) -> None:
    """Give the application NAME a new secret, shown this once; within a second its connections with the old one are closed."""
    with opened(settings) as registry:
        renewed, secret = registry.renew_app_secret(name)
    _show(settings, renewed, as_json, secret)


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


def doors_of(settings: Settings) -> Doors:
    """Where applications connect, by the server that runs or else by the settings."""
    if server := server_elsewhere():
        from uplinkd.remote import RemoteRegistry

        return RemoteRegistry(server).doors()
    return doors(settings)


def _document(ways: Doors, app: App, secret: str = "") -> dict[str, object]:
    nats = {
        "url": ways.nats,
        "user": app.key,
        "stream": ways.streams[0],
        **({"streams": list(ways.streams)} if len(ways.streams) > 1 else {}),
        "consumer": app.key,
        "inboxPrefix": inbox_of(app),
    }
    return {
        "name": app.name,
        "key": app.key,
        **({"secret": secret} if secret else {}),
        "products": list(app.products),
        "sends": app.sends,
        "createTime": app.created,
        "nats": nats if ways.nats else None,
        "mqtt": {"url": ways.mqtt, "username": app.key} if ways.mqtt else None,
    }


def _show(settings: Settings, app: App, as_json: bool, secret: str = "") -> None:
    ways = doors_of(settings)
    if as_json:
        print_json(_document(ways, app, secret))
        return
    lines = [("name", app.name), ("key", app.key)]
    if secret:
        lines.append(("secret", f"{secret}   (shown this once)"))
    lines.append(("may", _may(app)))
    several = len(ways.streams) > 1
    streams = f"stream{'s' if several else ''} {', '.join(ways.streams)}"
    in_each = " in each" if several else ""
    if ways.nats:
        lines += [
            ("NATS", ways.nats),
            ("", "user: the key; password: the secret"),
            ("", f"{streams}, durable consumer {app.key}{in_each}, inbox prefix {inbox_of(app)}"),
        ]
    elif ways.own_nats:
        lines.append(("NATS", "on your own servers your own accounts hold; these credentials are not known there"))
    else:
        lines.append(("NATS", "not open to applications (nats_listen is empty)"))
    if ways.mqtt:
        lines += [("MQTT", ways.mqtt), ("", "user name: the key; password: the secret; any clientId")]
    for label, text in lines:
        click.echo(f"{label:<8}{text}")


def _changed(settings: Settings, app: App, as_json: bool) -> None:
    if as_json:
        print_json(_document(doors_of(settings), app))
    else:
        click.echo(f"application {app.name} may {_may(app)}")
