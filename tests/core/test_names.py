"""Names: which are taken, which are made."""

from __future__ import annotations

import re

import pytest

from uplinkd.core import names
from uplinkd.core.errors import Rejected
from uplinkd.core.model import Right


def test_names_that_are_made_keep_the_rules() -> None:
    """ProductKey: 11 characters beginning with a1; secrets of 16 and 32; all accepted by the checks."""
    assert re.fullmatch(r"a1[A-Za-z0-9]{9}", names.check_product_key(names.make_product_key()))
    assert re.fullmatch(r"[A-Za-z0-9]{16}", names.make_product_secret())
    assert re.fullmatch(r"[A-Za-z0-9]{32}", names.check_device_secret(names.make_device_secret()))
    assert names.check_device_name(names.make_device_name())
    assert names.make_device_secret() != names.make_device_secret()


@pytest.mark.parametrize("key", ["", "a" * 31, "a-1", "sys", "OTA", "钥匙"])
def test_a_bad_product_key_is_refused(key: str) -> None:
    """1 to 30 letters and digits, and none that begins system topics."""
    with pytest.raises(Rejected, match="ProductKey"):
        names.check_product_key(key)


@pytest.mark.parametrize("name", ["abc", "a" * 33, "a b c d", "name/1", "名字名字", ""])
def test_a_bad_device_name_is_refused(name: str) -> None:
    """4 to 32 letters, digits and - _ @ . :"""
    with pytest.raises(Rejected, match="DeviceName"):
        names.check_device_name(name)


def test_an_imported_device_name_may_be_1_to_64_long() -> None:
    """A fleet keeps its identities."""
    assert names.check_device_name("a", imported=True)
    assert names.check_device_name("a" * 64, imported=True)
    with pytest.raises(Rejected, match="1 to 64"):
        names.check_device_name("a" * 65, imported=True)


@pytest.mark.parametrize(
    ("levels", "right", "rule"),
    [
        ("", Right.PUBLISH, "empty level"),
        ("a//b", Right.PUBLISH, "empty level"),
        ("a/", Right.PUBLISH, "empty level"),
        ("a-b", Right.PUBLISH, "letters, digits and underscores"),
        ("a/+", Right.PUBLISH, "subscribe alone"),
        ("a/#", Right.BOTH, "subscribe alone"),
        ("#/a", Right.SUBSCRIBE, "last level"),
        ("a/b/c/d/e/f", Right.PUBLISH, "8 slashes"),
        ("x" * 130, Right.PUBLISH, "128 bytes"),
    ],
)
def test_bad_levels_are_refused_with_the_rule(levels: str, right: Right, rule: str) -> None:
    """Every refusal says which rule."""
    with pytest.raises(Rejected) as caught:
        names.check_levels(levels, right, product_key="a1")
    assert rule in str(caught.value)


def test_good_levels_pass_with_or_without_a_leading_slash() -> None:
    """Both spellings name the same class."""
    assert names.check_levels("/user/update_1", Right.PUBLISH, product_key="a1") == "user/update_1"
    assert names.check_levels("down/+/x", Right.SUBSCRIBE, product_key="a1") == "down/+/x"
    assert names.check_levels("down/#", Right.SUBSCRIBE, product_key="a1") == "down/#"
