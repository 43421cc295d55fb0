"""`uplinkd backup` and `uplinkd restore`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from uplinkd.cli.common import interactive, json_option, local_time, print_json, settings_options
from uplinkd.cli.products import act_as_me
from uplinkd.engine.stream import STREAM
from uplinkd.settings import Settings

if TYPE_CHECKING:
    from uplinkd.backup import Manifest, Progress

__all__ = ["backup", "restore"]

_file = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
_DRAW_SECONDS = 0.1


@click.command()
@_file
@click.option(
    "--without-registry", is_flag=True, help="Leave out the registry: it is in PostgreSQL, which backs it up."
)
@click.option(
    "--without-messages", is_flag=True, help="Leave out messages and whatever else waits in streams: a small file."
)
@click.option("--without-keys", is_flag=True, help="Leave out keys and TLS material; you keep those elsewhere.")
@click.option("--without-journal", is_flag=True, help="Leave out the record of refusals.")
@click.option("--overwrite", is_flag=True, help="Replace FILE, in one step when the new backup is whole.")
@json_option
@settings_options("database_url", "secret_key", "nats_url", "nats_server")
def backup(
    settings: Settings,
    file: Path,
    without_registry: bool,
    without_messages: bool,
    without_keys: bool,
    without_journal: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Back up the data folder to FILE, with or without a running server. The file holds keys: keep it as you keep those."""
    from uplinkd.backup import back_up

    act_as_me()
    manifest = back_up(
        settings,
        file,
        registry=not without_registry,
        messages=not without_messages,
        keys=not without_keys,
        journal=not without_journal,
        overwrite=overwrite,
        progress=_progress(),
    )
    _tell(manifest, f"{file} holds", file.stat().st_size, as_json)


@click.command()
@_file
@json_option
@settings_options("secret_key", "nats_server")
def restore(settings: Settings, file: Path, as_json: bool) -> None:
    """Make a new data folder (--data, empty or not there) of the backup in FILE."""
    from uplinkd.backup import restore as bring_back

    act_as_me()
    manifest = bring_back(settings, file, progress=_progress())
    _tell(manifest, f"{settings.data} holds what {file} did,", file.stat().st_size, as_json)


def _tell(manifest: Manifest, what: str, size: int, as_json: bool) -> None:
    if interactive():
        click.echo("\r\x1b[K", err=True, nl=False)
    counts = manifest.counts
    if as_json:
        print_json(
            {
                "uplinkd": manifest.uplinkd,
                "schema": manifest.schema,
                "begun": manifest.begun,
                "ended": manifest.ended,
                "bytes": size,
                "counts": counts,
                "without": manifest.without,
            }
        )
        return
    parts = [f"{counts[name]} {name}" for name in ("products", "devices") if name in counts]
    if "messages" not in manifest.without:
        messages = sum(count for name, count in counts.items() if name == STREAM or name.startswith(f"{STREAM}_P"))
        parts.append(f"{messages} messages")
    left = f", without {' and '.join(manifest.without)}" if manifest.without else ""
    click.echo(f"{what} {', '.join(parts)} as of {local_time(manifest.begun)}{left} ({size / 1024**2:.1f} MiB)")
    if "registry" in manifest.without:
        click.echo("the registry is not in it: that is in PostgreSQL, and backed up and restored there")
    if "keys" not in manifest.without:
        click.echo("the file holds keys: whoever reads it can act as every device and read every secret")


def _progress() -> Progress:
    if not interactive():
        return lambda doing, share: None
    due = 0.0

    def draw(doing: str, share: float | None) -> None:
        nonlocal due
        if time.monotonic() >= due or share is None:
            due = time.monotonic() + _DRAW_SECONDS
            click.echo(f"\r\x1b[K{doing}{'' if share is None else f' {share:.0%}'}", err=True, nl=False)

    return draw
