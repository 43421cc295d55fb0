"""Signatures: the published vectors, and laws that hold for every login."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from uplinkd.core.signature import HEX_DIGITS, METHODS, content_of, matches, sign

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent.parent / "vectors" / "signatures.json").read_text())[
    "vectors"
]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
members = st.dictionaries(st.sampled_from(["clientId", "deviceName", "productKey", "timestamp", "x", "Z"]), texts)
methods = st.sampled_from(sorted(METHODS))


@pytest.mark.parametrize("vector", VECTORS)
def test_published_vectors_hold(vector: dict[str, Any]) -> None:
    """Content and signs are those that real devices send."""
    assert content_of(vector["members"]) == vector["content"]
    for method, expected in vector["signs"].items():
        assert sign(vector["secret"], vector["content"], method) == expected.lower()
        assert matches(vector["secret"], vector["content"], method, expected)


@given(members, texts, methods)
def test_what_is_signed_matches_in_any_letter_case(submitted: dict[str, str], secret: str, method: str) -> None:
    """Sign, then verify; v3 SDKs send lower case and v4 upper case."""
    made = sign(secret, content_of(submitted), method)
    assert len(made) == HEX_DIGITS[method]
    assert matches(secret, content_of(submitted), method, made)
    assert matches(secret, content_of(submitted), method, made.upper())


@given(members, texts, texts, methods)
def test_another_secret_does_not_match(submitted: dict[str, str], secret: str, other: str, method: str) -> None:
    """Only the holder of the secret can sign."""
    # HMAC fills keys up with zero bytes; the registry takes printable secrets alone.
    assume("\0" not in secret + other)
    content = content_of(submitted)
    assert matches(secret, content, method, sign(other, content, method)) == (secret == other)


@given(members, texts, methods)
def test_another_content_does_not_match(submitted: dict[str, str], other: str, method: str) -> None:
    """A sign stands for one content."""
    content = content_of(submitted)
    assert matches("secret", content, method, sign("secret", other, method)) == (content == other)


@given(members, st.randoms(use_true_random=False))
def test_the_order_of_submission_does_not_matter(submitted: dict[str, str], random: Any) -> None:
    """Members are sorted by name before they are signed."""
    shuffled = list(submitted.items())
    random.shuffle(shuffled)
    assert content_of(dict(shuffled)) == content_of(submitted)


@given(members, texts, texts, texts)
def test_version_sign_and_signmethod_are_not_signed(
    submitted: dict[str, str], version: str, given_sign: str, method: str
) -> None:
    """Whatever their values; every other member is, known or unknown."""
    unsigned = {"version": version, "sign": given_sign, "signmethod": method}
    assert content_of({**submitted, **unsigned}) == content_of(submitted)
    assert content_of({**submitted, "other": "1"}) != content_of(submitted)


@given(st.text(st.characters(categories=["Cs", "Nd"]), min_size=1))
def test_a_sign_that_is_no_text_is_a_wrong_sign(text: str) -> None:
    """JSON's \\ud800 is half a character; it is compared like any other."""
    assert not matches("secret", "content", "hmacsha1", text)


@given(texts)
def test_a_sign_that_is_not_ascii_is_a_wrong_sign(text: str) -> None:
    """A device may send any text as its sign; comparing it raises nothing."""
    assert not matches("secret", "content", "hmacsha1", text)
