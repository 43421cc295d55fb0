"""The documents say what the program says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from docs.generate import DOCUMENTS, ROOT, render

EVERY = [(language, document) for language, documents in DOCUMENTS.items() for document in documents]


@pytest.mark.parametrize(("language", "document"), EVERY, ids=lambda part: getattr(part, "name", part))
def test_the_tables_are_the_programs_own(language: str, document: Path) -> None:
    """A code or setting that changes changes its documents; `make docs` does it."""
    assert render(document.read_text(), language) == document.read_text(), "run `make docs`"


@pytest.mark.parametrize(
    "document", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*/*.md")), ids=lambda path: path.name
)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    """No link to a page that is not there."""
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_both_languages_have_the_same_pages() -> None:
    """What is documented in one is documented in the other."""
    pages = [{page.name for page in (ROOT / "docs" / language).glob("*.md")} for language in ("en", "zh")]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_sample_takes_a_message_that_comes_twice_once(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the page on consumer groups promises, also when the program was started anew in between."""
    sample = re.search(r"```python\n(.*?)```", (ROOT / "docs" / language / "groups.md").read_text(), re.DOTALL)
    assert sample
    monkeypatch.chdir(tmp_path)
    answers = []
    for _ in range(2):
        names: dict[str, Any] = {}
        exec(sample[1], names)
        answers += [names["take"](2**62 + number, "/a/b/user/update", b"on") for number in (1, 1, 2)]
        names["database"].close()
    assert answers == [True, False, True, False, False, False]
