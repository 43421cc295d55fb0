"""The `uplinkd` command. Each group lives in a module of its own, imported only when it is called."""

from __future__ import annotations

import contextlib
import errno
import importlib
import sys

import click

from uplinkd import __version__
from uplinkd.core.errors import Rejected, Unavailable

__all__ = ["main"]

COMMANDS = {
    "serve": ("uplinkd.cli.serve", "serve"),
    "settings": ("uplinkd.cli.serve", "show_settings"),
    "product": ("uplinkd.cli.products", "product"),
    "device": ("uplinkd.cli.devices", "device"),
    "topic": ("uplinkd.cli.topics", "topic"),
    "app": ("uplinkd.cli.apps", "app"),
    "group": ("uplinkd.cli.groups", "group"),
    "apikey": ("uplinkd.cli.access", "apikey"),
    "user": ("uplinkd.cli.access", "user"),
    "keys": ("uplinkd.cli.keys", "keys"),
    "registry": ("uplinkd.cli.registry", "registry"),
    "backup": ("uplinkd.cli.keep", "backup"),
    "restore": ("uplinkd.cli.keep", "restore"),
    "messages": ("uplinkd.cli.messages", "messages"),
    "send": ("uplinkd.cli.send", "send"),
    "gateways": ("uplinkd.cli.gateways", "gateways"),
    "logs": ("uplinkd.cli.logs", "logs"),
    "publish": ("uplinkd.cli.simulate", "publish"),
    "sign": ("uplinkd.cli.simulate", "sign"),
    "examine": ("uplinkd.cli.examine", "examine"),
}


# What is no fault of ours: files that are not there or not allowed, and disks and tables of the system that are full.
_SURROUNDINGS = frozenset(
    (
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EISDIR,
        errno.EMFILE,
        errno.ENAMETOOLONG,
        errno.ENFILE,
        errno.ENOENT,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    )
)


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="uplinkd")
def uplinkd() -> None:
    """An HTTPS and MQTT access server for IoT devices, wire-compatible with Alibaba Cloud IoT Platform."""


def main() -> None:
    """Run the command. Exit codes: 0 done, 1 refused or failed (one line says why), 2 a wrong argument or setting."""
    try:
        uplinkd(prog_name="uplinkd")
    except (Rejected, Unavailable) as fault:
        from uplinkd.cli.common import printable  # only when a command fails

        for line in str(fault).splitlines():
            click.echo(f"uplinkd: {printable(line)}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as fault:
        if fault.errno not in _SURROUNDINGS:
            raise
        from uplinkd.cli.common import printable  # only when a command fails

        where = f"{fault.filename}: " if fault.filename else ""
        click.echo(f"uplinkd: {printable(f'{where}{fault.strerror}')}", err=True)
        with contextlib.suppress(OSError):
            sys.stdout.close()  # Python would write at its exit what could not be written
        sys.exit(1)
