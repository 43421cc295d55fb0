"""HMAC by hashlib's parts, against the standard library's own."""

from __future__ import annotations

import hmac

from hypothesis import given
from hypothesis import strategies as st

from uplinkd.core import mac

keys = st.binary(max_size=200) | st.sampled_from([b"k" * 63, b"k" * 64, b"k" * 65])


@given(keys, st.binary(max_size=300), st.sampled_from(["md5", "sha1", "sha256"]))
def test_it_is_hmac(key: bytes, message: bytes, name: str) -> None:
    """Whatever the length of key and message."""
    assert mac.digest(key, message, name) == hmac.digest(key, message, name)


@given(keys, st.lists(st.binary(max_size=300), min_size=2, max_size=4))
def test_a_key_serves_for_many_messages(key: bytes, messages: list[bytes]) -> None:
    """One message leaves no trace in the next one's."""
    prepared = mac.Key(key)
    assert [prepared.digest(each) for each in messages] == [hmac.digest(key, each, "sha256") for each in messages]
