"""Every setting: one frozen Settings, read from uplinkd.toml, UPLINKD_* and flags under the same names.

A later source wins: default, file, environment, flag. A name that is not here is refused, and so is a value that breaks
its rule; the text names the source, the value and the rule.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from uplinkd.core.databases import SCHEMES, place_of, without_password
from uplinkd.core.errors import Rejected

__all__ = [
    "Origins",
    "Settings",
    "address",
    "is_address",
    "is_list",
    "is_loopback",
    "load",
    "reachable",
    "seconds",
    "shown",
]

ENVIRONMENT_PREFIX = "UPLINKD_"
DEFAULT_FILE = Path("uplinkd.toml")
# The file of settings, and the server elsewhere to which the command line goes.
_NO_SETTINGS = frozenset({"UPLINKD_CONFIG", "UPLINKD_URL", "UPLINKD_KEY", "UPLINKD_CA"})

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LEAST_MEMORY = 128 * 1024**2
_SIZES = {"": 1, "B": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def seconds(value: object) -> object:
    """Seconds from a number, or from text such as `90`, `15m`, `7d`."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?", value.strip())
    if not match:
        raise ValueError("a duration is a number of seconds, or a number with ms, s, m, h or d, such as 15m")
    return float(match[1]) * _UNITS[match[2] or "s"]


def _bytes(value: object) -> object:
    """Bytes from a number, or from text such as `1048576`, `1MiB`, `10GiB`."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:(B)|([KMGT])(?:i?B)?)?", value.strip(), re.IGNORECASE)
    if not match:
        raise ValueError("a size is a number of bytes, or a number with KiB, MiB, GiB or TiB, such as 10GiB")
    return int(float(match[1]) * _SIZES[(match[3] or "").upper()])


def _memory(size: int) -> int:
    if 0 < size < _LEAST_MEMORY:
        raise ValueError("a process needs 128MiB or more; 0 is no limit")
    return size


def _number(value: object) -> object:
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def _list(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _flag(value: object) -> object:
    if isinstance(value, str):
        known = {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }
        if value.strip().lower() not in known:
            raise ValueError("a switch is true or false")
        return known[value.strip().lower()]
    return value


def address(text: str) -> tuple[str, int]:
    """(host, port) of `host:port` or `[v6]:port`; ValueError with the rule otherwise."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not is_host(host) or not port.isdecimal() or int(port) > 65535:
        raise ValueError("an address is host:port with a port from 0 to 65535, such as 127.0.0.1:8443 or [::1]:8443")
    return host, int(port)


def reachable(host: str) -> str:
    """`host` of a listener as it stands in a URL: what one can connect to, an IPv6 address in brackets."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - turns it into what one can connect to
    return f"[{host}]" if ":" in host else host


def is_host(text: str) -> bool:
    """Whether it is an address, or what a name server can be asked for."""
    try:
        return bool(text.encode("idna")) and text.isprintable() and not re.search(r"[\s\[\]]", text)
    except UnicodeError:
        return False


def is_address(name: str) -> bool:
    """Whether it is an IP address, and no name that is looked up."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether an IP address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _address(text: str) -> str:
    address(text)
    return text


def _optional_address(text: str) -> str:
    return _address(text) if text else text


def _trusted_address(text: str) -> str:
    if not text:
        return text
    host, _ = address(text)
    try:
        ip = ipaddress.ip_address(host)
    except ValueError as error:
        raise ValueError("the plain-text port needs an IP address, not a name") from error
    if ip.is_unspecified or not ip.is_private:
        raise ValueError(
            "the plain-text port is for a TLS-terminating proxy: it listens on a loopback or private address alone, "
            "such as 127.0.0.1:8081"
        )
    return text


def _nats_url(text: str) -> str:
    urls = [url.strip() for url in text.split(",") if url.strip()]
    scheme = urls[0].partition("://")[0] if urls else ""
    urls = [url if "://" in url else f"{scheme}://{url}" for url in urls]
    for url in urls:
        if not re.fullmatch(r"(nats|tls)://[^\s/]+", url.strip()) or not _is_split(url):
            raise ValueError(
                "a NATS URL looks like nats://host:4222 or tls://user:password@host:4222; several by comma"
            )
    return ",".join(urls)


def _is_split(url: str) -> bool:
    """Whether it has a host, and no port that is none."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _gateway(text: str) -> str:
    if text and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", text):
        raise ValueError("a gateway's name has up to 40 letters, digits, - and _, and begins with a letter or a digit")
    return text


def _networks(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        try:
            ipaddress.ip_network(text)
        except ValueError as error:
            raise ValueError(f"a network is such as 10.0.0.0/8 or fd00::/8; {error}") from error
    return texts


def _proxies(texts: tuple[str, ...]) -> tuple[str, ...]:
    if any(not ipaddress.ip_network(text).prefixlen for text in texts):
        raise ValueError("whoever is named here may say that it is anybody: name the proxies, such as 10.0.0.10")
    return texts


def _database_url(text: str) -> str:
    if text.startswith(SCHEMES):
        place_of(text)
    elif text and not text.startswith("sqlite:///"):
        raise ValueError(
            "the registry is in SQLite, sqlite:///path/to/registry.sqlite, or in PostgreSQL, "
            "postgresql://user:password@host:5432/name?sslmode=verify-full"
        )
    return text


def _secret_key(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if text:
        try:
            key = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError("the key is 32 bytes in base64; make one with: openssl rand -base64 32") from error
        if len(key) != 32:
            raise ValueError(
                f"the key is 32 bytes in base64, this is {len(key)}; make one with: openssl rand -base64 32"
            )
    return value


Seconds = Annotated[float, BeforeValidator(seconds)]
Bytes = Annotated[int, BeforeValidator(_bytes)]
Switch = Annotated[bool, BeforeValidator(_flag)]
Names = Annotated[tuple[str, ...], BeforeValidator(_list)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_list)]


class Settings(BaseModel):
    """All settings with their defaults; the description of each is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

    data: Path = Field(Path("data"), description="folder that holds all state")
    listen: Annotated[str, AfterValidator(_address)] = Field("127.0.0.1:8443", description="address of the HTTPS door")
    plain_listen: Annotated[str, AfterValidator(_trusted_address)] = Field(
        "", description="address of a plain-text port for a TLS-terminating proxy; empty: none"
    )
    forwarded_for: Switch = Field(
        False,
        description="the proxy at plain_listen adds the device's address to X-Forwarded-For; if not, addresses are not limited there",
    )
    mqtt_listen: Annotated[str, AfterValidator(_optional_address)] = Field(
        "127.0.0.1:8883", description="address of the MQTT door (TLS); empty: none"
    )
    mqtt_plain_listen: Annotated[str, AfterValidator(_optional_address)] = Field(
        "", description="address of MQTT without TLS, for devices that cannot do better, usually port 1884; empty: none"
    )
    proxy_protocol: Annotated[
        tuple[str, ...], BeforeValidator(_list), AfterValidator(_networks), AfterValidator(_proxies)
    ] = Field(
        (),
        description="proxies whose connections over HTTPS and MQTT begin with a PROXY protocol header (v1 or v2) with the device's "
        "address, such as 10.0.0.10 or 10.0.1.0/24; a header of anybody else is not believed; empty: none",
    )
    console_listen: Annotated[str, AfterValidator(_optional_address)] = Field(
        "127.0.0.1:8080", description="address of the console, the management API and /metrics; empty: none"
    )
    console_tls: Switch = Field(
        False, description="serve the console over HTTPS, with the certificate of the HTTPS door"
    )
    amqp_listen: Annotated[str, AfterValidator(_optional_address)] = Field(
        "",
        description="address of the AMQP 1.0 door (TLS) for consumer groups, usually port 5671; needs uplinkd[amqp]; empty: none",
    )
    webhook_networks: Annotated[tuple[str, ...], BeforeValidator(_list), AfterValidator(_networks)] = Field(
        (),
        description="private networks that webhooks may reach beside the internet, such as 10.0.0.0/8 or 127.0.0.0/8",
    )
    workers: int = Field(0, ge=0, le=256, description="worker processes; 0: one for each core")
    worker_memory: Annotated[Bytes, AfterValidator(_memory)] = Field(
        2 * 1024**3,
        description="memory of one process (worker, console, delivery) beyond which it drains and is started anew; 0: no limit",
    )
    database_url: Annotated[str, AfterValidator(_database_url)] = Field(
        "",
        repr=False,
        description="registry database, SQLite or PostgreSQL (postgresql://user:password@host:5432/name?sslmode=verify-full); "
        "empty: SQLite in the data folder",
    )
    nats_url: Annotated[str, AfterValidator(_nats_url)] = Field(
        "", description="your own NATS servers, separated by commas; empty: one is started and looked after"
    )
    nats_creds: str = Field(
        "",
        description="credentials file (.creds) with which to sign in to your NATS servers, in place of a password in nats_url",
    )
    nats_ca: str = Field(
        "",
        description="certificates of the authorities that your NATS servers' certificates are by, PEM; empty: the system's",
    )
    nats_cert: str = Field("", description="client certificate to show to your NATS servers, PEM")
    nats_key: str = Field("", description="private key of nats_cert, PEM")
    replicas: Annotated[Literal[1, 3, 5], BeforeValidator(_number)] = Field(
        1,
        description="on how many of your NATS servers each message is kept; it is acknowledged once most of them have it",
    )
    placement: Names = Field(
        (), description="tags of the NATS servers on which messages are stored; empty: on any of them"
    )
    partitions: int = Field(
        1,
        ge=1,
        le=64,
        description="over how many streams messages are spread, where one that leads them all is the limit; each device has one of "
        "them. Their number is fixed when they are made, at the first start",
    )
    gateway: Annotated[str, AfterValidator(_gateway)] = Field(
        "",
        description="name of this gateway, unlike any other's on the same NATS servers; empty: made of the host's name once",
    )
    nats_server: str = Field(
        "", description="nats-server binary to start; empty: the one that was installed with uplinkd"
    )
    sync_interval: Literal["100ms", "always"] = Field(
        "100ms",
        description="how often nats-server has messages written to the disk itself (fsync); always: before each is acknowledged",
    )
    nats_listen: Annotated[str, AfterValidator(_optional_address)] = Field(
        "127.0.0.1:4223",
        description="address at which applications reach the nats-server that uplinkd looks after; empty: no application does",
    )
    secret_key: Annotated[SecretStr, AfterValidator(_secret_key)] = Field(
        SecretStr(""),
        description="key that encrypts secrets at rest, 32 bytes in base64; empty: a file in the data folder",
    )
    tls_cert: Paths = Field(
        (), description="server certificate chain, PEM; one RSA and one ECDSA may stand side by side"
    )
    tls_key: Paths = Field((), description="private key of each tls_cert, in the same order")
    tls_name: Names = Field((), description="further names and addresses in the certificate that uplinkd makes itself")

    tls_legacy: Switch = Field(
        True, description="offer devices the TLS 1.2 suites without forward secrecy, which old SDKs need (static RSA)"
    )
    token_ttl: Seconds = Field(7 * 86400.0, ge=1, le=10 * 365 * 86400, description="life of a token")
    timestamp_window: Seconds = Field(
        900.0, ge=0, description="how far the timestamp of /auth may lie from the server's clock; 0: not checked"
    )
    device_rate: float = Field(30.0, ge=0, description="messages a second of one device, and its burst; 0: no limit")
    device_bytes: Bytes = Field(
        1024**2, ge=0, description="payload bytes a second of one device, and its burst; 0: no limit"
    )
    product_rate: float = Field(
        0.0, ge=0, description="messages a second of all devices of one product together, and their burst; 0: no limit"
    )
    product_bytes: Bytes = Field(
        0,
        ge=0,
        description="payload bytes a second of all devices of one product together, and their burst; 0: no limit",
    )
    address_rate: float = Field(
        0.0,
        ge=0,
        description="requests a second from one address (IPv6: from one /64) over HTTPS and MQTT, and their burst; 0: no limit",
    )
    auth_rate: float = Field(
        30.0, ge=0, description="logins a minute of one device, over HTTPS and MQTT, and its burst; 0: no limit"
    )
    address_auth_rate: float = Field(
        600.0, ge=0, description="refused logins a minute from one address, and its burst; 0: no limit"
    )
    online_timeout: Seconds = Field(
        600.0, ge=1, description="a device that reports over HTTPS counts as online this long after its last request"
    )
    seen_interval: Seconds = Field(
        5.0,
        ge=1,
        description="when a device was last seen over HTTPS is written to the registry this often, or four times in online_timeout; "
        "longer spares the registry of a large fleet",
    )

    keep_age: Seconds = Field(7 * 86400.0, ge=0, description="messages are kept this long; 0: no limit by age")
    keep_bytes: Bytes = Field(
        10 * 1024**3, ge=1024**2, description="messages are kept up to this size, the oldest go first"
    )
    down_age: Seconds = Field(
        7 * 86400.0,
        ge=1,
        description="messages sent down wait this long for their device, and persistent MQTT sessions for its return",
    )
    down_limit: int = Field(
        100, ge=1, le=10_000, description="messages that may wait for one device; the oldest is dropped for one more"
    )
    publish_timeout: Seconds = Field(
        1.5, gt=0, le=2, description="longest wait for the engine before a publish is refused"
    )
    log_age: Seconds = Field(7 * 86400.0, ge=1, description="refusals are kept this long")
    log_entries: int = Field(100_000, ge=100, description="refusals are kept up to this number, the oldest go first")

    head_timeout: Seconds = Field(10.0, gt=0, description="longest time for a request's head to arrive")
    body_timeout: Seconds = Field(30.0, gt=0, description="longest time for a request's body to arrive")
    idle_timeout: Seconds = Field(600.0, gt=0, description="an idle connection is closed after this time")
    max_connections: int = Field(
        20_000,
        ge=1,
        description="connections of one worker; when all are there, the network with most of them yields to a newcomer",
    )
    max_handshakes: int = Field(
        256, ge=1, description="TLS handshakes of one worker at a time; others wait, those of known networks the least"
    )
    core_dumps: Switch = Field(
        False, description="let core dumps be written and debuggers attach; both show keys and secrets"
    )
    access_log: Switch = Field(False, description="log successes too, one line a request")
    log_format: Literal["text", "json"] = Field(
        "text", description="how the log on standard error is written: text, or json with one object a line"
    )

    @property
    def database(self) -> str:
        """URL of the registry's database: one of SQLite as SQLAlchemy has it, or one of PostgreSQL as libpq does."""
        return self.database_url or f"sqlite:///{self.data / 'registry.sqlite'}"


Origins = dict[str, str]
"""Where each setting's value came from: `default`, a file, `UPLINKD_…`, a flag."""


def is_list(info: FieldInfo) -> bool:
    """Whether the setting takes several values (a flag that may be repeated)."""
    return get_origin(info.annotation) is tuple and bool(get_args(info.annotation))


def shown(settings: Settings, name: str) -> str:
    """The value as people write it; a secret only as `(set)` or empty, a URL without its password."""
    value = getattr(settings, name)
    if isinstance(value, SecretStr):
        return "(set)" if value.get_secret_value() else ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}" if value < 1e6 else f"{value:.0f}"
    return _without_password(name, str(value))


def _without_password(name: str, text: str) -> str:
    return without_password(text) if name == "database_url" else re.sub(r"(://)[^@/\s,]+@", r"\1***@", text)


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> tuple[Settings, Origins]:
    """Settings from all sources, with the origin of each; raise Rejected with every fault named.

    `flags` are those that were given (None values are left out); `file` must exist when it is named, else
    `UPLINKD_CONFIG` or ./uplinkd.toml is read where it is there.
    """
    environment = os.environ if environment is None else environment
    known = Settings.model_fields
    values: dict[str, Any] = {}
    origins: Origins = dict.fromkeys(known, "default")
    faults: list[str] = []

    def take(name: str, value: Any, origin: str) -> None:
        if name in known:
            values[name], origins[name] = value, origin
        else:
            faults.append(f"{origin}: there is no setting {name!r}{_nearest(name)}")

    named = file or (Path(environment["UPLINKD_CONFIG"]) if environment.get("UPLINKD_CONFIG") else None)
    path = named or DEFAULT_FILE
    if named or path.exists():
        for name, value in _read(path).items():
            take(name, value, str(path))
    for variable, text in environment.items():
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in _NO_SETTINGS:
            take(variable.removeprefix(ENVIRONMENT_PREFIX).lower(), text, variable)
    for name, value in (flags or {}).items():
        if value is not None and value != ():
            take(name, value, "--" + name.replace("_", "-"))

    settings = None
    try:
        settings = Settings(**values)
    except ValidationError as error:
        for fault in error.errors():
            name = str(fault["loc"][0])
            value = "…" if name == "secret_key" else repr(values.get(name))
            value = _without_password(name, value) if name.endswith("_url") else value
            faults.append(f"{origins.get(name, name)}: {name} = {value}: {_rule(fault['msg'])}")
    if settings and len(settings.tls_cert) != len(settings.tls_key):
        faults.append(
            f"tls_cert names {len(settings.tls_cert)} files and tls_key {len(settings.tls_key)}: each certificate needs its key"
        )
    if settings and settings.console_listen and not settings.console_tls:
        host, _ = address(settings.console_listen)
        if not is_loopback({"localhost": "127.0.0.1"}.get(host, host)):
            faults.append(
                f"{origins['console_listen']}: console_listen = {settings.console_listen!r} is not of this machine alone, and "
                "passwords would cross the network in clear: add --console-tls true"
            )
    if settings:
        faults += _nats_faults(settings, origins)
    if faults or settings is None:
        raise Rejected("\n".join(faults))
    return settings, origins


def _nats_faults(settings: Settings, origins: Origins) -> list[str]:
    faults = []
    for name in ("nats_creds", "nats_ca", "nats_cert", "nats_key", "replicas", "placement"):
        value = getattr(settings, name)
        if not settings.nats_url and value != Settings.model_fields[name].default:
            faults.append(
                f"{origins[name]}: {name} = {shown(settings, name)} is for NATS servers of your own: name them with nats_url"
            )
        elif name.startswith("nats_") and value and not os.access(value, os.R_OK):
            faults.append(f"{origins[name]}: {name} = {value!r}: there is no file that can be read")
    if bool(settings.nats_cert) != bool(settings.nats_key):
        faults.append("nats_cert and nats_key belong together: one of them is not set")
    return faults


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise Rejected(f"the settings file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Rejected(f"the settings file {path} is not valid TOML: {error}") from error


def _rule(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "it should be")


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, Settings.model_fields, n=1)
    return f"; did you mean {near[0]!r}?" if near else "; `uplinkd settings` lists them"
