"""`uplinkd device`: single devices, and whole fleets as CSV."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import BinaryIO

import click

from uplinkd.cli.common import (
    KEY_FLAGS,
    json_option,
    local_time,
    print_json,
    print_table,
    progress_line,
    settings_options,
    warn,
)
from uplinkd.cli.products import UNSEEN, opened
from uplinkd.client import split_url
from uplinkd.core import snippets
from uplinkd.core.errors import Rejected
from uplinkd.core.model import Device
from uplinkd.files import written_whole
from uplinkd.registry import ImportProgress, ImportReport, Management
from uplinkd.settings import Settings, address, reachable

__all__ = ["device"]

_options = settings_options("database_url", "secret_key", "online_timeout", remote=KEY_FLAGS)
_BAD_ROWS_SHOWN = 20


@click.group()
def device() -> None:
    """Make, list, show, enable, disable, re-key and delete devices; import and export fleets."""


@device.command()
@click.argument("pk")
@click.argument("name", required=False)
@click.option("--secret", metavar="S", help="DeviceSecret to bring along; made when left out.")
@json_option
@_options
def create(settings: Settings, pk: str, name: str | None, secret: str | None, as_json: bool) -> None:
    """Make a device of the product PK; its NAME is made when left out."""
    with opened(settings) as registry:
        _show(settings, registry.create_device(pk, name, secret=secret), as_json)


@device.command("list")
@click.argument("pk")
@click.option("--prefix", default="", metavar="P", help="Only names that begin so.")
@click.option("--limit", type=click.IntRange(1, sys.maxsize), metavar="N", help="At most this many.")
@json_option
@_options
def list_devices(settings: Settings, pk: str, prefix: str, limit: int | None, as_json: bool) -> None:
    """The devices of the product PK by name, without their secrets."""
    with opened(settings) as registry:
        found = list(itertools.islice(registry.devices(pk, prefix=prefix), limit))
    if as_json:
        print_json([_document(settings, each, secret=False) for each in found])
    else:
        rows = [
            (each.name, _state(settings, each), _connection(settings, each), local_time(each.last_seen), each.address)
            for each in found
        ]
        print_table(("DEVICE NAME", "STATE", "BY", "LAST SEEN", "FROM"), rows)


@device.command()
@click.argument("pk")
@click.argument("name")
@json_option
@_options
def show(settings: Settings, pk: str, name: str, as_json: bool) -> None:
    """One device with its secret and state."""
    with opened(settings) as registry:
        _show(settings, registry.device(pk, name), as_json)


@device.command()
@click.argument("pk")
@click.argument("name")
@json_option
@_options
def enable(settings: Settings, pk: str, name: str, as_json: bool) -> None:
    """Let a disabled device in again; it has to sign in anew."""
    with opened(settings) as registry:
        _done(settings, registry.set_enabled(pk, name, True), "is enabled", as_json)


@device.command()
@click.argument("pk")
@click.argument("name")
@json_option
@_options
def disable(settings: Settings, pk: str, name: str, as_json: bool) -> None:
    """Shut a device out; its tokens and its MQTT session end within a second."""
    with opened(settings) as registry:
        _done(settings, registry.set_enabled(pk, name, False), "is disabled", as_json)


@device.command("reset-secret")
@click.argument("pk")
@click.argument("name")
@json_option
@_options
def reset_secret(settings: Settings, pk: str, name: str, as_json: bool) -> None:
    """Give a device a new secret; its tokens and its MQTT session end within a second."""
    with opened(settings) as registry:
        _show(settings, registry.reset_secret(pk, name), as_json)


@device.command()
@click.argument("pk")
@click.argument("name")
@json_option
@_options
def delete(settings: Settings, pk: str, name: str, as_json: bool) -> None:
    """Delete a device; its tokens and its MQTT session end within a second, its messages stay."""
    with opened(settings) as registry:
        registry.delete_device(pk, name)
    if as_json:
        print_json({"productKey": pk, "deviceName": name, "deleted": True})
    else:
        click.echo(f"device {name} of {pk} is deleted")


@device.command()
@click.argument("pk")
@click.argument("name")
@click.option("--language", type=click.Choice(list(snippets.LANGUAGES)), required=True, help="Of the program.")
@click.option("--url", help="The server, as the device reaches it  [default: where the settings say that it listens].")
@click.option("--topic", help="Topic to report to  [default: the first that the device may publish to].")
@settings_options("listen", "mqtt_listen", "tls_cert", "database_url", "secret_key")
def snippet(settings: Settings, pk: str, name: str, language: str, url: str | None, topic: str | None) -> None:
    """Print a program that acts as the device: it signs in and reports. It holds the device's secret."""
    with opened(settings) as registry:
        found = registry.device(pk, name)
        classes = registry.topic_classes(pk)
    levels = next((each.levels for each in classes if each.right.publishes), "user/update")
    topic = topic or f"/{found.product_key}/{found.name}/{levels}"
    if not topic.startswith("/"):
        raise Rejected(f"topic {topic!r}: it begins with a slash, such as /{pk}/{name}/user/update")
    write = snippets.LANGUAGES[language]
    now = round(time.time() * 1000)
    text = write(found.product_key, found.name, found.secret, _place(settings, url), topic=topic, now=now)
    click.echo(text, nl=False)


def _place(settings: Settings, url: str | None) -> snippets.Place:
    """Where a device of this installation finds its server."""
    host, port = address(settings.listen)
    url = url or f"https://{reachable(host)}:{port}"
    parts = split_url(url)
    authority = settings.data / "tls" / "ca.pem"
    own = parts.scheme == "https" and not settings.tls_cert and authority.exists()
    mqtt_port = address(settings.mqtt_listen)[1] if settings.mqtt_listen else 0
    return snippets.Place(url, str(parts.hostname), mqtt_port, str(authority.resolve()) if own else "")


@device.command("import")
@click.argument("file", type=click.File("rb"))
@click.option("--skip-bad", is_flag=True, help="Let the good rows in; without it one bad row keeps all out.")
@json_option
@_options
def import_fleet(settings: Settings, file: BinaryIO, skip_bad: bool, as_json: bool) -> None:
    """Import devices from a CSV FILE (- for standard input) with the columns ProductKey, DeviceName, DeviceSecret.

    Products are made where needed, an empty DeviceSecret is made, devices that are there with the same secret are left as
    they are. Bad rows are listed with their lines.
    """
    with opened(settings) as registry:
        report = _import(registry, file, skip_bad=skip_bad)
    if as_json:
        print_json(report.document())
    else:
        _tell(report)
    if not report.stored:
        sys.exit(1)


@device.command()
@click.argument("pk")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="File to write, readable by you alone; else standard output.",
)
@_options
def export(settings: Settings, pk: str, output: Path | None) -> None:
    """Write the devices of the product PK as CSV, with their secrets."""
    with opened(settings) as registry:
        parts = registry.export_fleet(pk)
        if output is None:
            for part in parts:
                click.echo(part, nl=False)
            return
        lines = 0
        with written_whole(output) as stream:
            for part in parts:
                lines += part.count("\n")
                stream.write(part)
    warn(f"{lines - 1} devices written to {output}")  # the first line names the columns


def _import(registry: Management, file: BinaryIO, *, skip_bad: bool) -> ImportReport:
    with progress_line("importing", "rows") as tell:
        report = registry.import_fleet(file, skip_bad=skip_bad, progress=_teller(tell) if tell else None)
        if tell:
            tell("importing", 1.0, report.read)
    return report


def _teller(tell: ImportProgress) -> ImportProgress:
    """Tells at most ten times a second, and always the first."""
    due = 0.0

    def maybe(doing: str, share: float | None, rows: int | None) -> None:
        nonlocal due
        if (now := time.monotonic()) >= due:
            due = now + 0.1
            tell(doing, share, rows)

    return maybe


def _tell(report: ImportReport) -> None:
    for line, reason in report.bad[:_BAD_ROWS_SHOWN]:
        warn(f"line {line}: {reason}")
    bad = len(report.bad) + report.more_bad
    if bad > _BAD_ROWS_SHOWN:
        listed = f"the first {len(report.bad)}" if report.more_bad else "all"
        warn(f"… and {bad - min(len(report.bad), _BAD_ROWS_SHOWN)} more bad rows; --json lists {listed}")
    if not report.stored:
        warn(
            f"{bad} of {report.read} rows are bad, so none was imported; correct them, or leave them out with --skip-bad"
        )
        return
    parts = [f"{report.created} devices imported"]
    if report.unchanged:
        parts.append(f"{report.unchanged} were there already")
    if report.secrets_made:
        parts.append(f"{report.secrets_made} got a new secret")
    if report.products_created:
        parts.append(f"products made: {', '.join(report.products_created)}")
    if bad:
        parts.append(f"{bad} bad rows left out")
    click.echo("; ".join(parts))


def _document(settings: Settings, found: Device, *, secret: bool = True) -> dict[str, object]:
    return {
        "productKey": found.product_key,
        "deviceName": found.name,
        **({"deviceSecret": found.secret} if secret and found.secret else {}),
        "state": _state(settings, found),
        "connection": _connection(settings, found),
        "lastSeen": found.last_seen,
        "clientIp": found.address,
        "createTime": found.created,
        "activeTime": found.activated,
    }


def _show(settings: Settings, found: Device, as_json: bool) -> None:
    if as_json:
        print_json(_document(settings, found))
        if not found.secret:
            warn(f"deviceSecret is {UNSEEN}")
        return
    click.echo(
        f"productKey    {found.product_key}\n"
        f"deviceName    {found.name}\n"
        f"deviceSecret  {found.secret or UNSEEN}\n"
        f"state         {_state(settings, found)}{f', by {by}' if (by := _connection(settings, found)) else ''}\n"
        f"last seen     {local_time(found.last_seen)}{f', from {found.address}' if found.address else ''}"
    )


def _done(settings: Settings, found: Device, what: str, as_json: bool) -> None:
    if as_json:
        print_json(_document(settings, found, secret=False))
    else:
        click.echo(f"device {found.name} of {found.product_key} {what}")


def _state(settings: Settings, found: Device) -> str:
    return found.state(now=round(time.time() * 1000), online_timeout=round(settings.online_timeout * 1000)).value


def _connection(settings: Settings, found: Device) -> str:
    return found.connection(now=round(time.time() * 1000), online_timeout=round(settings.online_timeout * 1000))
