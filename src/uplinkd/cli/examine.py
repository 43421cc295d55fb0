"""`uplinkd examine`: what is wrong with what a device sends to sign in."""

from __future__ import annotations

import sys
import time
from typing import BinaryIO

import click

from uplinkd.cli.common import json_option, print_json, printable, settings_options
from uplinkd.cli.products import opened
from uplinkd.core import workbench
from uplinkd.core.errors import NotFound
from uplinkd.settings import Settings

__all__ = ["examine"]

_AT_MOST = 4 * workbench.MAX_TEXT


@click.command()
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--product", metavar="PK", help="ProductKey  [default: the one in the text].")
@click.option("--device", metavar="DN", help="DeviceName  [default: the one in the text].")
@click.option("--secret", metavar="S", help="DeviceSecret; without it the local registry is asked.")
@json_option
@settings_options("database_url", "secret_key", "timestamp_window")
def examine(
    settings: Settings, file: BinaryIO, product: str | None, device: str | None, secret: str | None, as_json: bool
) -> None:
    """Say why a sign is wrong. FILE, or what is pasted to standard input and ended with Ctrl-D, is the JSON of POST /auth, a curl
    command or an HTTP request with it, the clientId, user name and password of an MQTT CONNECT, or the content that was signed
    and below it its sign.

    Exit code 1: the server would not let the device in with it, or that cannot be told.
    """
    if secret is not None and (product or device):
        raise click.UsageError("--secret needs no --product and --device, which look the secret up")
    text = file.read(_AT_MOST).decode("utf-8-sig", errors="replace")
    found_product, found_device = workbench.names_in(text)
    known = secret or _known_secret(settings, product or found_product, device or found_device)
    window = round(settings.timestamp_window * 1000)
    found = workbench.examine(text, secret=known, now=round(time.time() * 1000), window=window)
    if as_json:
        print_json(_document(found))
    else:
        _tell(found)
    if not found.matches or not all(each.good for each in found.findings):
        sys.exit(1)


def _known_secret(settings: Settings, product: str, device: str) -> str | None:
    if not product or not device:
        return None
    with opened(settings) as registry:
        try:
            return registry.device(product, device).secret
        except NotFound:
            return None


def _document(found: workbench.Examined) -> dict[str, object]:
    return {
        "source": found.source,
        "productKey": found.product_key,
        "deviceName": found.device_name,
        "clientId": found.client_id,
        "signmethod": found.method,
        "content": found.content,
        "members": [{"name": name, "value": value} for name, value in found.members],
        "given": found.given,
        "expected": found.expected,
        "matches": found.matches,
        "firstDifference": found.first_difference,
        "skewMs": found.skew_ms,
        "findings": [
            {"kind": each.kind, "good": each.good, "text": each.text, "textZh": each.text_zh} for each in found.findings
        ],
    }


def _tell(found: workbench.Examined) -> None:
    for each in found.findings:
        click.echo(f"{'ok ' if each.good else '!! '} {printable(each.text)}")
    shown = (
        ("content", found.content),
        ("signmethod", found.method),
        ("sign given", found.given),
        ("expected", found.expected),
    )
    if any(value for _, value in shown):
        click.echo("")
    for name, value in shown:
        if value:
            click.echo(f"{name:11} {printable(value)}")
