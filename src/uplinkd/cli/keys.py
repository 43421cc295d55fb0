"""`uplinkd keys`: what secrets are sealed with, and what signs tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click

from uplinkd.cli.common import interactive, json_option, local_time, print_json, print_table, settings_options
from uplinkd.cli.products import act_as_me
from uplinkd.registry.keys import SigningKeyFacts
from uplinkd.settings import Settings

__all__ = ["keys"]

_options = settings_options("database_url", "secret_key", "token_ttl")


@click.group()
def keys() -> None:
    """Show and rotate the keys of this machine's data folder."""


@keys.command("list")
@json_option
@_options
def list_keys(settings: Settings, as_json: bool) -> None:
    """The keys that secrets are sealed with and those that sign tokens, by name; no key is shown."""
    from uplinkd import rotation

    with rotation.opened(settings) as registry:
        sealed, signing = registry.keys.sealed(), registry.keys.signing()
    here, now = rotation.in_folder(settings), round(time.time() * 1000)
    if as_json:
        print_json(
            {
                "secretKeys": [
                    {
                        "fingerprint": each.fingerprint,
                        "inUse": each.current,
                        "values": each.values,
                        "from": "folder" if each.fingerprint in here else "setting",
                    }
                    for each in sealed
                ],
                "signingKeys": [_document(each, signing, now) for each in signing],
            }
        )
        return
    print_table(
        ("SECRET KEY", "STATE", "SECRETS", "WHERE"),
        [
            (
                each.fingerprint,
                "in use" if each.current else "gives way",
                each.values,
                settings.data / "keys" if each.fingerprint in here else "secret_key",
            )
            for each in sealed
        ],
    )
    click.echo()
    print_table(
        ("SIGNING KEY", "STATE", "MADE", "VERIFIES UNTIL"),
        [(each.id, _state(each, signing, now), local_time(each.created), _until(each)) for each in signing],
    )


@keys.command("rotate")
@click.option(
    "--signing", is_flag=True, help="The key that signs tokens, instead of the one that secrets are sealed with."
)
@click.option(
    "--now", "at_once", is_flag=True, help="With --signing: tokens of the old keys end now, and devices log in again."
)
@click.option(
    "--to",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Take the key in this file (32 bytes in base64), no server running; for a key that the setting secret_key gives.",
)
@json_option
@_options
def rotate_keys(settings: Settings, signing: bool, at_once: bool, file: Path | None, as_json: bool) -> None:
    """Put a new key in the place of the one in use. A server goes on serving; every secret and token stands."""
    from uplinkd import rotation

    if at_once and not signing:
        raise click.UsageError("--now goes with --signing")
    if file and signing:
        raise click.UsageError("--to is a key that seals secrets, and --signing makes its key itself")
    act_as_me()
    if signing:
        made = rotation.rotate_signing(settings, at_once=at_once)
        if as_json:
            print_json({"id": made.id, "signsFrom": made.begins, "oldVerify": not at_once})
        elif at_once:
            click.echo(
                f"signing key {made.id} signs now; tokens of the keys before it have ended, devices log in again"
            )
        else:
            click.echo(f"signing key {made.id} signs from now on; tokens of the keys before it stand until they expire")
        return
    progress = _progress()
    if file:
        name, count = rotation.rotate_to(settings, file, progress)
    else:
        name, count = rotation.rotate(settings, progress)
    if interactive():
        click.echo(err=True)
    if as_json:
        print_json({"fingerprint": name, "sealedAnew": count})
    elif file:
        click.echo(
            f"{count} secrets are sealed with key {name} now; start the server with it as the setting secret_key"
        )
    else:
        click.echo(
            f"{count} secrets are sealed with key {name} now, and the old key is gone; old backups need it still"
        )


def _progress() -> Callable[[int], None]:
    if not interactive():
        return lambda count: None
    return lambda count: click.echo(f"\rsealed anew: {count}", err=True, nl=False)


def _document(key: SigningKeyFacts, every: list[SigningKeyFacts], now: int) -> dict[str, object]:
    state = _state(key, every, now)
    return {"id": key.id, "state": state, "created": key.created, "signsFrom": key.begins, "verifiesUntil": key.retired}


def _state(key: SigningKeyFacts, every: list[SigningKeyFacts], now: int) -> str:
    return key.state(now, every[-1].id)


def _until(key: SigningKeyFacts) -> str:
    return "" if key.retired is None else local_time(key.retired)
