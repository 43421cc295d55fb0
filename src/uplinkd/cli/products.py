"""`uplinkd product`: kinds of devices."""

from __future__ import annotations

import contextlib
import getpass
import os
from collections.abc import Iterator

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
from uplinkd.core.model import Product
from uplinkd.core.operators import Actor, acting
from uplinkd.registry import Management, open_registry
from uplinkd.settings import Settings

__all__ = ["UNSEEN", "act_as_me", "opened", "product", "registry_options"]

registry_options = settings_options("database_url", "secret_key", remote=KEY_FLAGS)
# --key is the ProductKey there.
_create_options = settings_options("database_url", "secret_key", remote=("--api-key",))
UNSEEN = "left out: this API key may not see it; the scope operate may"


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Management]:
    """The registry for one command, or the server elsewhere that it works on; a running server sees what it changes within a
    second."""
    if server := server_elsewhere():
        from uplinkd.remote import RemoteRegistry

        yield RemoteRegistry(server)
        return
    registry = open_registry(settings)
    act_as_me()
    try:
        yield registry
    finally:
        registry.close()


def act_as_me() -> None:
    """What is done from now on stands in the audit as done by this user."""
    acting.set(Actor(_me(), "cli"))


def _me() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


@click.group()
def product() -> None:
    """Make, list, show and delete products."""


@product.command()
@click.argument("name")
@click.option("--key", metavar="PK", help="ProductKey to bring along; made when left out.")
@click.option("--secret", metavar="S", help="ProductSecret to bring along; made when left out.")
@json_option
@_create_options
def create(settings: Settings, name: str, key: str | None, secret: str | None, as_json: bool) -> None:
    """Make a product called NAME, with the platform's default topic classes."""
    with opened(settings) as registry:
        _show(registry.create_product(name, key=key, secret=secret), as_json)


@product.command("list")
@json_option
@registry_options
def list_products(settings: Settings, as_json: bool) -> None:
    """All products, without their secrets."""
    with opened(settings) as registry:
        found = registry.products()
    if as_json:
        print_json([{"productKey": each.key, "name": each.name, "createTime": each.created} for each in found])
    else:
        print_table(
            ("PRODUCT KEY", "NAME", "MADE"), [(each.key, each.name, local_time(each.created)) for each in found]
        )


@product.command()
@click.argument("pk")
@json_option
@registry_options
def show(settings: Settings, pk: str, as_json: bool) -> None:
    """One product with its secret."""
    with opened(settings) as registry:
        _show(registry.product(pk), as_json)


@product.command()
@click.argument("pk")
@click.option("--with-devices", is_flag=True, help="Delete its devices too.")
@json_option
@registry_options
def delete(settings: Settings, pk: str, with_devices: bool, as_json: bool) -> None:
    """Delete a product; one that has devices only with --with-devices."""
    with opened(settings) as registry:
        devices = registry.delete_product(pk, with_devices=with_devices)
    if as_json:
        print_json({"productKey": pk, "deleted": True, "devices": devices})
    else:
        click.echo(f"product {pk} is deleted" + (f", and its {devices} devices" if devices else ""))


def _show(found: Product, as_json: bool) -> None:
    if as_json:
        secret = {"productSecret": found.secret} if found.secret else {}
        print_json({"productKey": found.key, **secret, "name": found.name, "createTime": found.created})
        if not found.secret:
            warn(f"productSecret is {UNSEEN}")
    else:
        click.echo(f"productKey     {found.key}\nproductSecret  {found.secret or UNSEEN}\nname           {found.name}")
