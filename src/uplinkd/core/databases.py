"""Where a PostgreSQL database is and how it is reached: `postgresql://user:password@host:5432/name?sslmode=…`, as libpq has it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

__all__ = ["SCHEMES", "Place", "place_of", "without_password"]

SCHEMES = ("postgresql://", "postgres://")
_MODES = ("disable", "prefer", "require", "verify-ca", "verify-full")
_KNOWN = ("host", "sslmode", "sslrootcert", "sslcert", "sslkey")
_PORT = 5432
_FORM = "a PostgreSQL URL looks like postgresql://user:password@host:5432/name?sslmode=verify-full"


@dataclass(frozen=True, slots=True)
class Place:
    """`hosts` are tried in their order; one that begins with / is a folder with a server's Unix socket. Of `sslmode`, `prefer`
    takes TLS where the server has it; `verify-ca` and `verify-full` check the server's certificate, by `root` or what the system
    trusts."""

    hosts: tuple[tuple[str, int], ...]
    name: str
    user: str
    password: str = field(repr=False)
    sslmode: str = "prefer"
    root: str = ""
    certificate: str = ""
    key: str = ""

    def __str__(self) -> str:
        """For people, without user and password."""
        return f"postgresql://{','.join(_shown(*each) for each in self.hosts)}/{self.name}"


def place_of(url: str) -> Place:
    """The place that `url` names; ValueError with the rule, never with the password."""
    scheme, mark, rest = url.partition("://")
    if f"{scheme}{mark}" not in SCHEMES:
        raise ValueError(_FORM)
    whole, _, query = rest.partition("?")
    credentials, _, where = whole.rpartition("@")
    hosts, _, name = where.partition("/")
    user, _, password = credentials.partition(":")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if not user or not name or "/" in name:
        raise ValueError(f"{_FORM}: it names a user and a database, and in a password @ / ? are written %40 %2F %3F")
    for option in options:
        if option not in _KNOWN:
            raise ValueError(f"{_FORM}; of what may follow the ? uplinkd knows {', '.join(_KNOWN)}")
    mode = options.get("sslmode", "prefer")
    if mode not in _MODES:
        raise ValueError(f"sslmode is one of {', '.join(_MODES)}")
    if bool(options.get("sslcert")) != bool(options.get("sslkey")):
        raise ValueError("sslcert and sslkey go together: a client's certificate and its key")
    root = options.get("sslrootcert", "")
    return Place(
        hosts=tuple(_host(each) for each in (hosts or options.get("host", "")).split(",")),
        name=unquote(name),
        user=unquote(user),
        password=unquote(password),
        sslmode="verify-ca" if mode == "require" and root else mode,  # as libpq does
        root="" if root == "system" else root,
        certificate=options.get("sslcert", ""),
        key=options.get("sslkey", ""),
    )


def without_password(url: str) -> str:
    """A URL of a database as it may be shown, whether or not it is a right one."""
    scheme, mark, rest = url.partition("://")
    rest = re.sub(r"^([^:/@]*):.*@", r"\1:***@", rest, flags=re.DOTALL)
    shown = f"{scheme}{mark}{rest}" if mark else re.sub(r".*@", "***@", url, flags=re.DOTALL)
    return re.sub(r"(password=)[^&\s]*", r"\1***", shown)


def _host(text: str) -> tuple[str, int]:
    text = unquote(text)
    if text.startswith("/"):
        return text, _PORT
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port or _PORT
    except ValueError:
        host, port = None, 0
    if not host:
        raise ValueError(
            f"{_FORM}: it names a host, a port is 1 to 65535, and in a password @ / ? are written %40 %2F %3F"
        )
    return host, port


def _shown(host: str, port: int) -> str:
    return host if host.startswith("/") else f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
