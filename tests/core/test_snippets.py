"""Programs for a device: what they hold of it is quoted for their language, whatever it is."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uplinkd.core import snippets
from uplinkd.core.errors import Rejected
from uplinkd.core.snippets import Place

PLACE = Place("https://iot.example.com:8443/", "iot.example.com", 8883, "/etc/uplinkd/the ca's.pem")
TOPIC = "/a1GFjLP3xxC/lamp-1_a@b.c:d/user/update"
secrets = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=64)


def made(language: str, secret: str = "secret", place: Place = PLACE) -> str:
    return snippets.LANGUAGES[language](
        "a1GFjLP3xxC", "lamp-1_a@b.c:d", secret, place, topic=TOPIC, now=1_501_668_289_957
    )


@given(secrets)
def test_python_holds_the_secret(secret: str) -> None:
    """As a literal that reads back as it was."""
    tree = ast.parse(made("python", secret))
    values = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SECRET"
    ]
    assert [ast.literal_eval(value) for value in values] == [secret]


@given(secrets)
def test_c_holds_the_secret(secret: str) -> None:
    """As a string of bytes, in characters that no compiler reads otherwise."""
    line = next(line for line in made("c", secret).splitlines() if line.startswith("#define SECRET "))
    literal = line.removeprefix("#define SECRET ")
    assert literal.isascii()
    assert "??" not in literal
    assert ast.literal_eval("b" + literal).decode() == secret


@settings(max_examples=20, deadline=None)
@given(secrets)
def test_bash_holds_the_secret(secret: str) -> None:
    """As a word without expansions; bash is asked."""
    line = next(line for line in made("curl", secret).splitlines() if line.startswith("secret="))
    told = subprocess.run(["bash", "-c", f"{line}\nprintf %s \"$secret\""], capture_output=True, check=True)  # fmt: skip
    assert told.stdout.decode() == secret


def test_mosquitto_has_no_secret() -> None:
    """A sign will do, which is worth as much over MQTT and nothing elsewhere."""
    text = made("mosquitto", "the secret's own words")
    assert "words" not in text
    words = shlex.split(text, comments=True)
    assert words[words.index("--cafile") + 1] == PLACE.ca
    assert words[words.index("-u") + 1] == "lamp-1_a@b.c:d&a1GFjLP3xxC"


def test_without_an_mqtt_door_there_is_no_line_for_mosquitto() -> None:
    """It says so."""
    with pytest.raises(Rejected, match="mqtt_listen"):
        made("mosquitto", place=Place(PLACE.url, "", 0, ""))


@pytest.mark.parametrize("language", snippets.LANGUAGES)
def test_a_certificate_that_is_publicly_trusted_needs_no_ca(language: str) -> None:
    """Nor is any verification switched off."""
    text = made(language, place=Place(PLACE.url, PLACE.mqtt_host, 8883, ""))
    assert not re.search(r"cacert|cafile|CAINFO|insecure| -k |VERIFY", text)
    assert "iot.example.com" in text
    assert "8443//" not in text
