"""`uplinkd registry`: the database in which products, devices and all else are that operators make."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict

import click

from uplinkd.cli.common import json_option, print_json, print_table, progress_line, settings_options, warn
from uplinkd.cli.products import act_as_me
from uplinkd.core.databases import without_password
from uplinkd.settings import Settings, load

__all__ = ["registry"]


@click.group()
def registry() -> None:
    """Look after the registry's database."""


@registry.command("copy")
@click.option(
    "--to",
    "url",
    required=True,
    metavar="URL",
    help="The other database, such as postgresql://user:password@host/name; - reads it from standard input, since whoever lists "
    "processes sees flags.",
)
@json_option
@settings_options("database_url", "secret_key")
def copy(settings: Settings, url: str, as_json: bool) -> None:
    """Copy the registry into an empty database, PostgreSQL or SQLite, while no server runs. Devices, tokens and keys stay what they
    are; nothing is changed where it was."""
    from uplinkd.files import kept_still
    from uplinkd.registry.copy import copy_registry
    from uplinkd.serving import last_server, serving

    if url == "-":
        url = sys.stdin.readline().strip()
    elif without_password(url) != url:
        warn("--to shows its password to each user of this machine; --to - reads it from standard input")
    target, _ = load({"data": settings.data, "database_url": url}, environment={})
    act_as_me()
    ttl = last_server(settings.data).token_ttl
    with (
        serving(settings.data, token_ttl=ttl, now=round(time.time() * 1000)),
        kept_still(settings.data),
        progress_line("copying", "rows") as progress,
    ):
        copied = copy_registry(settings, target, progress or (lambda doing, share, rows: None))
    where = without_password(url)
    if as_json:
        print_json(
            {"from": without_password(settings.database), "to": where, "tables": [asdict(each) for each in copied]}
        )
        return
    print_table(
        ("TABLE", "ROWS", "SHA-256, THE SAME IN BOTH"), [(each.table, each.rows, each.digest) for each in copied]
    )
    click.echo(f"\nthe registry is in {where} too: name it by the setting database_url and start the server")
    click.echo(
        "its secrets need the same key as before, by the setting secret_key"
        if settings.secret_key.get_secret_value()
        else f"its secrets need the same key as before: {settings.data / 'keys' / 'secret.key'}, on each machine that serves it"
    )
