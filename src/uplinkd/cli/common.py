"""What every command shares: settings flags, output as a table or as JSON, and words for failures."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.cells import cell_len

from uplinkd.settings import Settings, is_list, load

__all__ = [
    "duration",
    "json_option",
    "local_time",
    "print_json",
    "print_table",
    "printable",
    "settings_options",
    "warn",
]

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for programs instead of text for people."
)


def settings_options(*names: str) -> Callable[[F], F]:
    """Flags for the settings `names` (`data` always, and `--config FILE`); the command gets `settings`.

    With the name `*` all settings become flags. A bad setting ends the command with exit code 2.
    """
    chosen = list(Settings.model_fields) if "*" in names else ["data", *(name for name in names if name != "data")]

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def with_settings(*args: Any, config: Path | None, **options: Any) -> Any:
            flags = {name: options.pop(f"setting_{name}") for name in chosen}
            settings, origins = load(flags, file=config)
            click.get_current_context().meta["uplinkd.origins"] = origins
            return command(*args, settings=settings, **options)

        wrapped: Any = with_settings
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
