"""The console's two languages: which one a request wants, its texts, and how numbers and times are written.

Texts are English in the templates and in Python; locale/zh.po has the Chinese, read as it is (no build step).
"""

from __future__ import annotations

import functools
import re
import time
from datetime import UTC, datetime
from pathlib import Path

from babel.messages.pofile import read_po
from fastapi import Request

__all__ = ["LANGUAGES", "age", "catalogue", "language_of", "moment", "size", "told", "translated"]

LANGUAGES = {"en": "English", "zh": "中文"}
LOCALE = Path(__file__).parent / "locale"
_CAUSE = re.escape(": ") + "(.*)"


def language_of(request: Request) -> str:
    """What was chosen in this browser, else the first that it prefers of those that we have, else English."""
    chosen = request.cookies.get("language")
    if chosen in LANGUAGES:
        return chosen
    wishes = []
    for place, part in enumerate(request.headers.get("Accept-Language", "").split(",")):
        tag, _, parameter = part.partition(";")
        try:
            weight = float(parameter.strip().removeprefix("q=") or 1)
        except ValueError:
            weight = 0.0
        wishes.append((-weight, place, tag.strip().lower()[:2]))
    return next((tag for weight, _, tag in sorted(wishes) if tag in LANGUAGES and weight), "en")


@functools.cache
def catalogue(language: str) -> dict[str, str]:
    """English text → text in `language`; empty for English."""
    path = LOCALE / f"{language}.po"
    if not path.exists():
        return {}
    with path.open("rb") as file:
        found = read_po(file, locale=language)
    return {str(message.id): str(message.string) for message in found if message.id}


def translated(language: str, text: str) -> str:
    return catalogue(language).get(text, text)


@functools.cache
def _patterns(language: str) -> list[tuple[re.Pattern[str], str]]:
    """The texts with values in them, `{}` for each, the most telling first."""
    texts = sorted((text for text in catalogue(language) if "{}" in text), key=len, reverse=True)
    return [
        (re.compile("(.*)".join(map(re.escape, text.split("{}"))), re.DOTALL), catalogue(language)[text])
        for text in texts
    ]


def told(language: str, fault: str) -> str:
    """What went wrong, in `language`: such texts are made with their values far from here, in English, and known by their form.
    What a text ends with behind a colon is a fault of its own, or stays as it is."""
    if fault in catalogue(language):
        return catalogue(language)[fault]
    for pattern, translation in _patterns(language):
        if found := pattern.fullmatch(fault):
            values = list(found.groups())
            if pattern.pattern.endswith(_CAUSE):
                values[-1] = told(language, values[-1])
            return translation.format(*values)
    return fault


def size(count: int | None) -> str:
    """Bytes as people write them."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def moment(milliseconds: int) -> str:
    """UTC to the second; the browser writes it anew in local time."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def age(milliseconds: int | None) -> str:
    """How long ago that was, in the largest unit of which there are two."""
    if milliseconds is None:
        return "–"
    seconds = max(0, round(time.time() - milliseconds / 1000))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
