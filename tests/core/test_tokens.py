"""Tokens: small, unforgeable, dead with their device."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uplinkd.core import tokens
from uplinkd.core.errors import Code, Refused
from uplinkd.core.model import Device, DeviceName, ProductKey, SigningKey

KEY = SigningKey(1, b"k" * 32)
KEYS = {1: KEY}
DEVICE = Device(7, ProductKey("a1"), DeviceName("lamp"), "s3cret", True, 3, 0, 1, 1)


def code_of(text: str, device: Device | None = DEVICE, keys: dict[int, SigningKey] = KEYS, now: int = 999) -> Code:
    try:
        tokens.check(tokens.read(text, keys), device, keys, now=now)
    except Refused as refused:
        return refused.code
    return Code.SUCCESS


@given(
    device_id=st.integers(1, 2**63 - 1),
    generation=st.integers(0, 2**32 - 1),
    expires=st.integers(0, 2**62),
    key_id=st.integers(0, 2**16 - 1),
)
def test_what_was_issued_is_read_back(device_id: int, generation: int, expires: int, key_id: int) -> None:
    """issue → read gives the same facts, in at most 192 characters that JSON never escapes."""
    key = replace(KEY, id=key_id)
    text = tokens.issue(key, replace(DEVICE, id=device_id, generation=generation), expires=expires)
    assert tokens.read(text, {key_id: key}) == tokens.Token(key_id, device_id, generation, expires)
    assert len(text) <= 192
    assert re.fullmatch(r"[A-Za-z0-9_-]+", text)


@given(st.integers(0, 51), st.sampled_from("ABCxyz0189-_"))
def test_a_token_altered_anywhere_is_not_ours(position: int, char: str) -> None:
    """No character can be exchanged without the signature noticing."""
    text = tokens.issue(KEY, DEVICE, expires=1000)
    altered = text[:position] + char + text[position + 1 :]
    assert code_of(altered) is (Code.SUCCESS if altered == text else Code.CHECK_TOKEN_ERROR)


@given(st.text(max_size=80) | st.text("ABCabc012-_", min_size=52, max_size=52))
def test_any_other_text_is_not_ours(text: str) -> None:
    """What we never issued is 20003, whatever its characters and length."""
    assert code_of(text) is Code.CHECK_TOKEN_ERROR


def test_a_token_of_another_installation_is_not_ours() -> None:
    """The same key id under another key does not pass."""
    assert code_of(tokens.issue(replace(KEY, key=b"x" * 32), DEVICE, expires=1000)) is Code.CHECK_TOKEN_ERROR
    assert code_of(tokens.issue(replace(KEY, id=2), DEVICE, expires=1000)) is Code.CHECK_TOKEN_ERROR


@pytest.mark.parametrize(
    ("device", "now", "code"),
    [
        (DEVICE, 999, Code.SUCCESS),
        (DEVICE, 1000, Code.TOKEN_IS_EXPIRED),
        (None, 999, Code.TOKEN_IS_EXPIRED),
        (replace(DEVICE, enabled=False), 999, Code.TOKEN_IS_EXPIRED),
        (replace(DEVICE, generation=4), 999, Code.TOKEN_IS_EXPIRED),
    ],
)
def test_a_token_stands_as_long_as_its_device_does(device: Device | None, now: int, code: Code) -> None:
    """Expired, deleted, disabled and re-keyed all answer 20001, on which old SDKs authenticate anew."""
    assert code_of(tokens.issue(KEY, DEVICE, expires=1000), device, now=now) is code


def test_a_retired_key_knows_its_tokens_and_refuses_them() -> None:
    """After a rotation an old token is 20001, not 20003: the device can help itself."""
    text = tokens.issue(KEY, DEVICE, expires=1000)
    assert code_of(text, keys={1: replace(KEY, retired=999)}) is Code.TOKEN_IS_EXPIRED


def test_neither_device_nor_key_shows_its_secret() -> None:
    """repr() ends up in logs."""
    assert "s3cret" not in repr(DEVICE)
    assert "kkkk" not in repr(KEY)
