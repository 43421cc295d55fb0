"""What every command shares: settings flags, output as a table or as JSON, and words for failures."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from rich.cells import cell_len

from uplinkd.settings import Settings, is_list, load

if TYPE_CHECKING:
    from uplinkd.registry import ImportProgress
    from uplinkd.remote import Remote

__all__ = [
    "KEY_FLAGS",
    "duration",
    "json_option",
    "local_time",
    "print_json",
    "print_table",
    "printable",
    "progress_line",
    "server_elsewhere",
    "settings_options",
    "warn",
]

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for programs instead of text for people."
)

KEY_FLAGS = ("--key", "--api-key")
_REMOTE = "uplinkd.remote"


def settings_options(*names: str, remote: Sequence[str] = ()) -> Callable[[F], F]:
    """Flags for the settings `names` (`data` always, and `--config FILE`); the command gets `settings`.

    With the name `*` all settings become flags. A bad setting ends the command with exit code 2.

    With `remote`, the flags by which an API key is given (KEY_FLAGS), the command works on a server elsewhere too: --url, --ca. Then
    no setting is read, and `server_elsewhere` says which one it is.
    """
    chosen = list(Settings.model_fields) if "*" in names else ["data", *(name for name in names if name != "data")]

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def with_settings(*args: Any, config: Path | None, **options: Any) -> Any:
            flags = {name: options.pop(f"setting_{name}") for name in chosen}
            if remote and (
                server := _server(options.pop("url"), options.pop("api_key"), options.pop("ca"), config, flags)
            ):
                context = click.get_current_context()
                context.meta[_REMOTE] = server
                context.call_on_close(server.close)
                return command(*args, settings=Settings(), **options)
            settings, origins = load(flags, file=config)
            click.get_current_context().meta["uplinkd.origins"] = origins
            return command(*args, settings=settings, **options)

        wrapped: Any = with_settings
        if remote:
            wrapped = _remote_options(remote)(wrapped)
        for name in reversed(chosen):
            info = Settings.model_fields[name]
            wrapped = click.option(
                "--" + name.replace("_", "-"),
                f"setting_{name}",
                multiple=is_list(info),
                metavar=name.rsplit("_", 1)[-1].upper(),
                help=info.description,
            )(wrapped)
        config = click.option("--config", type=click.Path(path_type=Path), help="settings file [./uplinkd.toml]")
        return config(wrapped)  # type: ignore[no-any-return]  # click's decorators lose the type

    return decorate


def _remote_options(key_flags: Sequence[str]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in (
            click.option(
                "--ca", type=click.Path(path_type=Path), envvar="UPLINKD_CA", metavar="FILE",
                help="CA to trust at --url, such as a copy of its tls/ca.pem. Also: UPLINKD_CA.",
            ),
            click.option(
                *key_flags, "api_key", envvar="UPLINKD_KEY", metavar="KEY",
                help="API key for --url; - reads it from standard input. Better in UPLINKD_KEY: whoever lists processes sees flags.",
            ),
            click.option(
                "--url", envvar="UPLINKD_URL", metavar="URL",
                help="Work on the server whose console is there, such as https://iot.example.com:8080. Also: UPLINKD_URL.",
            ),
        ):  # fmt: skip
            command = option(command)
        return command

    return decorate


def _server(
    url: str | None, key: str | None, ca: Path | None, config: Path | None, flags: dict[str, Any]
) -> Remote | None:
    """The server elsewhere that is asked for; raise UsageError for what does not go together."""
    given = click.get_current_context().get_parameter_source
    local = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value not in (None, ())]
    local += ["--config"] if config else []
    if url is None:
        if (key is not None and _typed(given("api_key"))) or (ca is not None and _typed(given("ca"))):
            raise click.UsageError("--key and --ca go with --url, the server to work on")
        return None
    if local:
        if _typed(given("url")):
            raise click.UsageError(f"--url is a server elsewhere, {local[0]} this machine: one of them is wanted")
        return None  # a flag wins over the environment
    if key == "-":
        key = _read_key()
    if not key:
        raise click.UsageError(
            "--url needs an API key: set UPLINKD_KEY; `uplinkd apikey create NAME --scope admin` on the server makes one"
        )
    from uplinkd.remote import Remote

    return Remote(url, key, ca, tell=warn)


def _typed(source: ParameterSource | None) -> bool:
    return source is ParameterSource.COMMANDLINE


def _read_key() -> str:
    """One line of standard input, typed blind where a person types; what follows is left for the command."""
    if sys.stdin.isatty():
        return str(click.prompt("API key", hide_input=True, err=True)).strip()
    return sys.stdin.buffer.readline().decode(errors="replace").strip()


def server_elsewhere() -> Remote | None:
    """The server that the command works on, None for the data folder of this machine."""
    context = click.get_current_context(silent=True)
    return context.meta.get(_REMOTE) if context else None


def print_json(document: Any, *, one_line: bool = False) -> None:
    """One JSON document; on one line for commands that follow."""
    click.echo(json.dumps(document, ensure_ascii=False, indent=None if one_line else 2))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as their widest cell, never cut: what is shown can be copied."""
    cells = [list(headings), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(cell_len(line[column]) for line in cells) for column in range(len(headings))]
    for line in cells:
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def printable(text: str) -> str:
    """`text` with control characters as escapes: what a device sends must not steer a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def local_time(milliseconds: int | None) -> str:
    """Local time to the millisecond, for people; `never` for None."""
    if milliseconds is None:
        return "never"
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M:%S.") + f"{milliseconds % 1000:03d}"


def duration(text: str) -> float:
    """Seconds of `90`, `10m`, `7d`, for options such as --since."""
    from uplinkd.settings import seconds

    try:
        value = seconds(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: {error}") from error
    assert isinstance(value, float)
    return value


def warn(text: str) -> None:
    click.echo(text, err=True)


def interactive() -> bool:
    """Whether a person watches standard error, so that progress may be drawn there."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def progress_line(doing: str, unit: str) -> Iterator[ImportProgress | None]:
    """A line on standard error that tells how far long work is, where a person watches; else None."""
    if not interactive():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(doing, total=None, rows="")

        def draw(doing: str, share: float | None, rows: int | None) -> None:
            progress.update(
                bar,
                description=doing,
                total=None if share is None else 1,
                completed=share or 0,
                rows="" if rows is None else f"{rows} {unit}",
            )

        yield draw
