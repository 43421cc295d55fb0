"""Writes the tables of codes and settings into the documents, from the program's own: `make docs`.

A table stands between `<!-- codes -->` and `<!-- /codes -->` (or settings). tests/core/test_docs.py fails when one is stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from docs import licences

from uplinkd.admin.words import translated
from uplinkd.core.errors import EXPLANATIONS, MESSAGES, Code
from uplinkd.settings import Settings, shown

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    "en": [ROOT / "README.md", ROOT / "docs/en/protocol.md"],
    "zh": [ROOT / "README.zh-CN.md", ROOT / "docs/zh/protocol.md"],
}


def codes(language: str) -> str:
    """The table of business codes."""
    headings = {"en": ("code", "message", "what it means", "what to do"), "zh": ("code", "message", "含义", "处理办法")}
    rows = []
    for code in Code:
        words = EXPLANATIONS[code]
        means, do = (words.means, words.do) if language == "en" else (words.means_zh, words.do_zh)
        rows.append((str(int(code)), MESSAGES[code], means, do))
    return _table(headings[language], rows)


def settings(language: str) -> str:
    """The table of settings with their defaults."""
    headings = {"en": ("setting", "default", "what it is"), "zh": ("设置", "默认值", "说明")}
    defaults = Settings()
    rows = []
    for name, info in Settings.model_fields.items():
        what = translated(language, info.description or "")
        value = shown(defaults, name)
        rows.append((f"`{name}`", f"`{value}`" if value else "", what))
    return _table(headings[language], rows)


def render(text: str, language: str) -> str:
    """`text` with its tables as they should be."""
    for name, table in (("codes", codes), ("settings", settings)):
        block = f"<!-- {name} -->\n{table(language)}\n<!-- /{name} -->"
        before, mark, rest = text.partition(f"<!-- {name} -->")
        if mark:
            after = rest.partition(f"<!-- /{name} -->")[2] if f"<!-- /{name} -->" in rest else rest
            text = before + block + after
    return text


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    licences.main()
    for language, documents in DOCUMENTS.items():
        for document in documents:
            document.write_text(render(document.read_text(), language))


if __name__ == "__main__":
    main()
