"""The console speaks both languages, wholly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from babel.messages.extract import extract_from_dir
from fastapi import Request

from uplinkd.admin.words import catalogue, language_of, size
from uplinkd.settings import Settings

TEMPLATES = Path(__file__).parent.parent.parent / "src/uplinkd/admin/templates"


def texts() -> set[str]:
    found = extract_from_dir(str(TEMPLATES), method_map=[("**.html", "jinja2")], keywords={"_": None})
    return {message for _, _, message, _, _ in found if isinstance(message, str)}


def test_every_text_is_translated_and_none_is_left_over() -> None:
    """The templates' texts and the descriptions of the settings."""
    wanted = texts() | {info.description or "" for info in Settings.model_fields.values()}
    assert len(wanted) > 300
    assert wanted - set(catalogue("zh")) == set()
    assert set(catalogue("zh")) - wanted == set()


def test_a_translation_keeps_the_places_for_values() -> None:
    """`%(name)s` and `{n}` stand in both."""
    for text, translation in catalogue("zh").items():
        places = re.compile(r"%\(\w+\)s|\{n\}")
        assert sorted(places.findall(text)) == sorted(places.findall(translation)), text


def test_no_english_is_left_in_a_template() -> None:
    """What people read between tags is marked for translation."""
    names = "uplinkd|ProductKey|DeviceName|DeviceSecret|ProductSecret|requestId|messageId|HTTPS|MQTT|curl|Bearer|Authorization"
    for template in TEMPLATES.glob("*.html"):
        bare = re.sub(r"\{%.*?%\}|\{\{.*?\}\}|<code.*?</code>|<[^>]*>", " ", template.read_text(), flags=re.DOTALL)
        left = [word for word in re.findall(r"[A-Za-z]{3,}", bare) if not re.fullmatch(names, word)]
        assert set(left) <= {"read", "operate", "admin", "true"}, (template.name, left)


@pytest.mark.parametrize(
    ("cookie", "header", "language"),
    [
        ("", "", "en"),
        ("", "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("", "de-DE,de;q=0.9,zh;q=0.5,en;q=0.3", "zh"),
        ("", "en;q=0.3,zh;q=0.9", "zh"),
        ("", "fr, ja;q=nonsense", "en"),
        ("language=en", "zh-CN", "en"),
        ("language=zh", "en", "zh"),
        ("language=xx", "zh", "zh"),
    ],
)
def test_the_browsers_language_holds_until_one_is_chosen(cookie: str, header: str, language: str) -> None:
    """Cookie, then Accept-Language by its weights, then English."""
    headers = [(b"cookie", cookie.encode()), (b"accept-language", header.encode())]
    assert language_of(Request({"type": "http", "headers": headers})) == language


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 * 2**20, "200 MiB"), (2**41, "2.0 TiB")],
)
def test_sizes_are_written_as_people_do(count: int | None, text: str) -> None:
    assert size(count) == text
