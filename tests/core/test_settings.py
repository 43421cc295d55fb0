"""Settings: three sources under the same names, and refusals that name value and rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from uplinkd.core.errors import Rejected
from uplinkd.settings import Settings, load, shown


def test_a_later_source_wins_and_its_origin_is_told(tmp_path: Path) -> None:
    """default < file < environment < flag."""
    file = tmp_path / "uplinkd.toml"
    file.write_text('workers = 2\nlisten = "127.0.0.1:1000"\ntoken_ttl = "1h"\ntls_name = ["a.example", "b.example"]\n')
    settings, origins = load(
        {"listen": "127.0.0.1:3000", "data": None},
        environment={"UPLINKD_LISTEN": "127.0.0.1:2000", "UPLINKD_WORKERS": "3", "PATH": "/bin"},
        file=file,
    )
    assert (settings.workers, settings.listen, settings.token_ttl) == (3, "127.0.0.1:3000", 3600)
    assert settings.tls_name == ("a.example", "b.example")
    assert origins["workers"] == "UPLINKD_WORKERS"
    assert origins["listen"] == "--listen"
    assert origins["token_ttl"] == str(file)
    assert origins["data"] == "default"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("TOKEN_TTL", "7d", 7 * 86400),
        ("TOKEN_TTL", "90", 90),
        ("HEAD_TIMEOUT", "250ms", 0.25),
        ("DEVICE_BYTES", "1MiB", 1024**2),
        ("KEEP_BYTES", "10 GiB", 10 * 1024**3),
        ("DEVICE_RATE", "0.5", 0.5),
        ("ACCESS_LOG", "yes", True),
        ("TLS_NAME", "a, b", ("a", "b")),
    ],
)
def test_values_are_written_as_people_write_them(name: str, text: str, value: object) -> None:
    """Durations with units, sizes with units, switches in words, lists by comma."""
    settings, _ = load(environment={f"UPLINKD_{name}": text})
    assert getattr(settings, name.lower()) == value


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("UPLINKD_LISTN", "x", "did you mean 'listen'"),
        ("UPLINKD_LISTEN", "8443", "host:port"),
        ("UPLINKD_LISTEN", "localhost:99999", "host:port"),
        ("UPLINKD_LISTEN", "a b:8443", "host:port"),
        ("UPLINKD_LISTEN", "[::1:8443:", "host:port"),
        ("UPLINKD_LISTEN", "灯..x:8443", "host:port"),
        ("UPLINKD_CONSOLE_LISTEN", f"{'x' * 64}:8080", "host:port"),
        ("UPLINKD_WORKERS", "many", "workers = 'many'"),
        ("UPLINKD_WORKERS", "-1", "greater than or equal to 0"),
        ("UPLINKD_TOKEN_TTL", "soon", "duration"),
        ("UPLINKD_KEEP_BYTES", "lots", "size"),
        ("UPLINKD_ACCESS_LOG", "perhaps", "true or false"),
        ("UPLINKD_PROXY_PROTOCOL", "10.0.0.300", "a network is such as"),
        ("UPLINKD_PROXY_PROTOCOL", "10.0.0.1,0.0.0.0/0", "name the proxies"),
        ("UPLINKD_PROXY_PROTOCOL", "::/0", "name the proxies"),
        ("UPLINKD_PLAIN_LISTEN", "0.0.0.0:8080", "loopback or private"),
        ("UPLINKD_PLAIN_LISTEN", "8.8.8.8:8080", "loopback or private"),
        ("UPLINKD_NATS_URL", "http://x", "nats://"),
        ("UPLINKD_NATS_URL", "nats://[::1", "nats://"),
        ("UPLINKD_NATS_URL", "nats://a,nats://b:port", "nats://"),
        ("UPLINKD_DATABASE_URL", "mysql://x", "sqlite:///"),
        ("UPLINKD_TLS_CERT", "a.pem", "each certificate needs its key"),
    ],
)
def test_a_bad_setting_is_refused_with_source_value_and_rule(variable: str, text: str, words: str) -> None:
    """The line names where it came from and what would be right."""
    with pytest.raises(Rejected) as caught:
        load(environment={variable: text})
    assert words in str(caught.value)


def test_all_faults_are_told_at_once() -> None:
    """Nobody corrects settings one start at a time."""
    with pytest.raises(Rejected) as caught:
        load(environment={"UPLINKD_WORKERS": "x", "UPLINKD_NOPE": "1"})
    assert len(str(caught.value).splitlines()) == 2


def test_a_secret_is_never_shown() -> None:
    """Neither good nor bad keys appear in words for people, nor does a URL's password."""
    key = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlYw=="
    with pytest.raises(Rejected) as caught:
        load(environment={"UPLINKD_SECRET_KEY": key})
    assert key not in str(caught.value)
    settings, _ = load(environment={"UPLINKD_NATS_URL": "nats://u:hunter2@h:4222"})
    assert shown(settings, "nats_url") == "nats://***@h:4222"
    assert "hunter2" not in shown(settings, "nats_url")


@pytest.mark.parametrize(
    ("text", "words"), [(None, "cannot be read"), ("workers = = 2", "not valid TOML"), ("listn = 1", "listn")]
)
def test_a_bad_settings_file_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    """Missing, malformed or with an unknown name."""
    file = tmp_path / "uplinkd.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(Rejected) as caught:
        load(environment={}, file=file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_each_setting_says_what_it_is() -> None:
    """The description is the documentation."""
    assert all(info.description for info in Settings.model_fields.values())
