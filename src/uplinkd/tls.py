"""Certificates and the TLS context: made on first start or the owner's, renewed without a restart."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import logging
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from uplinkd.core.errors import Rejected
from uplinkd.files import FileState, file_state
from uplinkd.metrics import Meter
from uplinkd.settings import Settings, address, is_address

__all__ = [
    "CIPHERS",
    "LEGACY_CIPHERS",
    "CertificateFiles",
    "LegacyDevices",
    "Renewal",
    "count_handshake",
    "ensure_material",
    "operator_context",
    "reissue",
    "renew",
    "server_context",
]

log = logging.getLogger("uplinkd.tls")

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2; TLS 1.3 brings its own."""

LEGACY_CIPHERS = "AES256-SHA256:AES128-SHA256:AES256-SHA:AES128-SHA"
"""For TLS 1.2, behind CIPHERS: the static-RSA suites are the only ones that iotkit-embedded and Link SDK C offer. Who has recorded
a connection and comes by the server's RSA key later can read it."""

_AUTHORITY_DAYS = 3650
# Apple's clients refuse server certificates of more than 825 days, whoever issued them.
_SERVER_DAYS = 820
_RENEW_DAYS = 30
_WARN_DAYS = 14
_RENEWAL_SECONDS = 2.0
_NOTE_SECONDS = 86_400.0
_REMEMBERED = 100_000
_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")

_Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """One certificate chain and its private key, PEM."""

    certificate: Path
    key: Path


def ensure_material(settings: Settings) -> list[CertificateFiles]:
    """The owner's certificates, checked; or our own, made or issued anew where needed. Raise Rejected in one line."""
    if settings.tls_cert:
        files = [CertificateFiles(*pair) for pair in zip(settings.tls_cert, settings.tls_key, strict=True)]
        kinds = [_check(pair) for pair in files]
        if len(set(kinds)) < len(kinds):
            # OpenSSL keeps one certificate of each kind: the other would silently not be served.
            raise Rejected(
                f"tls_cert names two {'RSA' if kinds.count('RSA') > 1 else 'ECDSA'} certificates; one of each can stand"
            )
        if "RSA" not in kinds:
            log.warning("none of the certificates has an RSA key: devices with Alibaba's C SDKs will not connect")
        for pair in files:
            end = _certificate(pair).not_valid_after_utc
            if end < dt.datetime.now(dt.UTC) + dt.timedelta(days=_WARN_DAYS):
                log.warning(
                    "%s expires on %s: replace it and its key (no restart is needed); devices that check it cannot connect then",
                    pair.certificate,
                    f"{end:%Y-%m-%d %H:%M} UTC",
                )
        return files
    folder = settings.data / "tls"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _own(folder, _wanted_names(settings))
    except OSError as error:
        raise Rejected(f"certificates cannot be kept in {folder}: {error.strerror}") from error


def reissue(settings: Settings) -> None:
    """`ensure_material` for a server that runs: what is due is issued for Renewal to find; a fault is a warning."""
    try:
        ensure_material(settings)
    except Rejected as fault:
        log.warning("the door goes on with the certificates that it has: %s", fault)


def server_context(files: Sequence[CertificateFiles], *, legacy: bool = True) -> ssl.SSLContext:
    """The context of every TLS door of devices, with LEGACY_CIPHERS where `legacy`. One RSA and one ECDSA chain stand side by side:
    new clients take the cheaper ECDSA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(f"{CIPHERS}:{LEGACY_CIPHERS}" if legacy else CIPHERS)
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    # One is enough for a device, which gets a new one each time that it resumes; each costs a handshake some twentieth of its time.
    context.num_tickets = 1
    for pair in files:
        context.load_cert_chain(pair.certificate, pair.key, password=_no_password)
    return context


def operator_context(files: Sequence[CertificateFiles]) -> ssl.SSLContext:
    """TLS for people and programs of today: OpenSSL's defaults, without what old devices need."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    for pair in files:
        context.load_cert_chain(pair.certificate, pair.key, _no_password)
    return context


def count_handshake(meter: Meter, transport: asyncio.BaseTransport) -> None:
    """Have `meter` count one that was done on `transport`, a Secured."""
    kind = "rsa" if _is_legacy(transport.get_extra_info("cipher")) else "ecdhe"
    meter.shook_hands(transport.get_extra_info("tls_version", ""), kind)


def _is_legacy(cipher: tuple[str, str, int] | None) -> bool:
    """Whether it is one of LEGACY_CIPHERS, of (name, version, bits) as OpenSSL tells it. The suites of TLS 1.3 are all called
    TLS_…; they are no legacy."""
    return cipher is not None and not cipher[0].startswith(("ECDHE", "TLS_"))


class LegacyDevices:
    """Tells `note` which device signs in over which legacy suite, each device once a day: (product key, device name, address, door,
    suite). What it remembers is bounded; a device that it forgets is told of again."""

    def __init__(
        self, note: Callable[[str, str, str, str, str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._note = note
        self._clock = clock
        self._due: dict[tuple[str, str], float] = {}

    def signed_in(
        self, transport: asyncio.BaseTransport, product_key: str, device_name: str, address: str, door: str
    ) -> bool:
        """Look at the suite of a connection whose device was recognised, or whose session still stands; whether it is a legacy
        one."""
        cipher = transport.get_extra_info("cipher")
        if not _is_legacy(cipher):
            return False
        now, who = self._clock(), (product_key, device_name)
        if now >= self._due.get(who, 0.0):
            if len(self._due) >= _REMEMBERED:
                self._due.clear()
            self._due[who] = now + _NOTE_SECONDS
            self._note(product_key, device_name, address, door, cipher[0])
        return True


# OpenSSL's words for what goes wrong while a device says hello; a peer's alert tells what it did not like about us.
_FAILURES = {
    "NO_SHARED_CIPHER": "no_shared_cipher",
    "UNSUPPORTED_PROTOCOL": "unsupported_version",
    "TLSV1_ALERT_PROTOCOL_VERSION": "unsupported_version",
    "TLSV1_ALERT_UNKNOWN_CA": "unknown_ca",
    "SSLV3_ALERT_BAD_CERTIFICATE": "bad_certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "bad_certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "bad_certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "bad_certificate",
    "HTTP_REQUEST": "http_request",
    "HTTPS_PROXY_REQUEST": "http_request",
    "WRONG_VERSION_NUMBER": "not_tls",
    "UNKNOWN_PROTOCOL": "not_tls",
    "PACKET_LENGTH_TOO_LONG": "not_tls",
    "UNEXPECTED_MESSAGE": "not_tls",
    "BAD_RECORD_TYPE": "not_tls",
}


def why_failed(error: OSError) -> str:
    """What a handshake ended by, one of metrics.HANDSHAKE_FAILURES."""
    if not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "timeout_or_closed"
    reason = error.reason or ""
    return _FAILURES.get(reason) or ("alert" if "_ALERT_" in reason else "other")


class Renewal:
    """Loads changed certificate files into a live context; a pair that does not fit is left alone until it does.

    What it finds at first is loaded as well: a worker that starts late inherits a context from before a renewal.
    """

    def __init__(self, context: ssl.SSLContext, files: Sequence[CertificateFiles]) -> None:
        self._context = context
        self._files = list(files)
        self._state: list[tuple[FileState, FileState] | None] = [None] * len(self._files)
        self._warned: set[int] = set()
        self.check()

    def check(self) -> int:
        """Load what has changed since the last call; return how many pairs these were."""
        renewed = 0
        for index, pair in enumerate(self._files):
            state = file_state(pair.certificate), file_state(pair.key)
            if state == self._state[index]:
                continue
            try:
                _check(pair)
                self._context.load_cert_chain(pair.certificate, pair.key, password=_no_password)
            except (Rejected, OSError, ssl.SSLError) as fault:
                # Two files are never replaced at one instant: say it once, try again at the next call.
                if index not in self._warned:
                    self._warned.add(index)
                    log.warning("the changed certificate is not used yet: %s", fault)
                continue
            if self._state[index]:
                renewed += 1
                log.info("the certificate %s has been renewed", pair.certificate)
            self._state[index] = state
            self._warned.discard(index)
        return renewed


async def renew(context: ssl.SSLContext, files: Sequence[CertificateFiles]) -> None:
    """Keep the certificates of a live context as new as their files, until cancelled."""
    renewal = Renewal(context, files)
    while True:
        await asyncio.sleep(_RENEWAL_SECONDS)
        renewal.check()


def _no_password() -> str:
    """Called for an encrypted key, where OpenSSL would ask at the terminal."""
    raise Rejected("the private key is encrypted; give one without a passphrase, readable by uplinkd alone")


def _check(pair: CertificateFiles) -> str:
    """The kind of key, `RSA` or `EC`, of a pair that can be used now; raise Rejected naming the file."""
    for path in (pair.certificate, pair.key):
        try:
            path.read_bytes()
        except OSError as error:
            raise Rejected(f"{path} cannot be read: {error.strerror}") from error
    certificate = _certificate(pair)
    if certificate.not_valid_after_utc < dt.datetime.now(dt.UTC):
        raise Rejected(f"{pair.certificate} expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
    if certificate.not_valid_before_utc > dt.datetime.now(dt.UTC):
        raise Rejected(f"{pair.certificate} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(pair.certificate, pair.key, password=_no_password)
    except ssl.SSLError as error:
        raise Rejected(f"{pair.key} is not the private key of {pair.certificate}: {error.reason}") from error
    return "RSA" if isinstance(certificate.public_key(), rsa.RSAPublicKey) else "EC"


def _certificate(pair: CertificateFiles) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pair.certificate.read_bytes())
    except ValueError as error:
        raise Rejected(f"{pair.certificate} holds no certificate in PEM") from error


def _wanted_names(settings: Settings) -> list[str]:
    host, _ = address(settings.listen)
    wildcard = host in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
    names = ["localhost", "127.0.0.1", "::1"]
    for name in (socket.gethostname(), *([] if wildcard else [host])):
        with contextlib.suppress(UnicodeError):  # a machine may be called what no certificate can say
            names.append(_ascii(name))
    for name in settings.tls_name:
        try:
            names.append(_ascii(name))
        except UnicodeError as error:
            raise Rejected(f"tls_name {name!r} is neither a host name nor an address") from error
    return list(dict.fromkeys(name for name in names if name))


def _ascii(name: str) -> str:
    """`name` as certificates have it; UnicodeError for what cannot be a name."""
    if is_address(name):
        return str(ipaddress.ip_address(name))
    text = name.encode("idna").decode().lower()
    if not _NAME.fullmatch(text):
        raise UnicodeError(name)
    return text


def _own(folder: Path, names: list[str]) -> list[CertificateFiles]:
    """A CA and two server certificates of it; what is there and still good is kept."""
    authority_files = CertificateFiles(folder / "ca.pem", folder / "ca.key")
    # Never a new one in place of one that devices may trust, whose key was moved away.
    if not authority_files.certificate.exists():
        _make_authority(authority_files)
    authority = _load_authority(authority_files)
    files = []
    for kind in ("rsa", "ecdsa"):
        pair = CertificateFiles(folder / f"server-{kind}.pem", folder / f"server-{kind}.key")
        if not _still_good(pair, names, authority):
            authority_key = _authority_key(authority_files, authority)
            key: _Key = _rsa_key() if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())
            _write(pair.key, _key_pem(key))
            _write(pair.certificate, _issue(key, names, authority, authority_key))
        files.append(pair)
    return files


def _make_authority(files: CertificateFiles) -> None:
    key = _rsa_key()
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "uplinkd"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"uplinkd CA of {socket.gethostname()}"[:64]),
        ]
    )
    certificate = (
        _builder(name, name, key.public_key(), _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(files.key, _key_pem(key))
    _write(files.certificate, _pem(certificate))


def _issue(key: _Key, names: list[str], authority: x509.Certificate, authority_key: _Key) -> bytes:
    # The mbedTLS of iotkit-embedded 3.0.1 compares an IP host, as text, with the DNS entries alone; so addresses stand among
    # these as well. A common name cannot help it: mbedTLS does not look at it where there are alternative names. It is for
    # clients that look nowhere else.
    common = next((name for name in names if not is_address(name) and name != "localhost"), "localhost")
    alternatives: list[x509.GeneralName] = []
    for name in names:
        if is_address(name):
            alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
        if ":" not in name:
            alternatives.append(x509.DNSName(name))
    certificate = (
        _builder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])]),
            authority.subject,
            key.public_key(),
            _SERVER_DAYS,
        )
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(encipher_keys=isinstance(key, rsa.RSAPrivateKey)), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_issued_by(authority), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return _pem(certificate)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    # Devices' clocks are late more often than not.
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=days))
    )


def _usage(*, sign_certificates: bool = False, encipher_keys: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_encipherment=encipher_keys,  # the static-RSA suites need it
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issued_by(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _still_good(pair: CertificateFiles, names: list[str], authority: x509.Certificate) -> bool:
    """Whether the pair is there, of this authority, for all these names, and not about to expire."""
    try:
        _check(pair)
        certificate = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
        certificate.verify_directly_issued_by(authority)
    except (Rejected, ValueError, TypeError, x509.InvalidVersion):
        return False
    except Exception as error:
        log.debug("%s is issued anew: %s", pair.certificate, type(error).__name__)
        return False
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    has = {*alternatives.get_values_for_type(x509.DNSName), *map(str, alternatives.get_values_for_type(x509.IPAddress))}
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=_RENEW_DAYS)
    return has == set(names) and certificate.not_valid_after_utc > soon


def _load_authority(files: CertificateFiles) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    except ValueError as error:
        raise Rejected(f"the CA {files.certificate} holds no certificate in PEM; put it back") from error
    if certificate.not_valid_after_utc < dt.datetime.now(dt.UTC):
        raise Rejected(
            f"the CA {files.certificate} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; remove {files.certificate.parent} "
            "and a new one is made, which every device must then be given"
        )
    return certificate


def _authority_key(files: CertificateFiles, authority: x509.Certificate) -> _Key:
    """Read only when something is issued: in between the owner may keep it elsewhere."""
    try:
        key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise Rejected(
            f"a server certificate is due and the CA's key {files.key} cannot be read: put it back, or remove "
            f"{files.certificate} for a new CA, which every device must then be given"
        ) from error
    if not isinstance(key, rsa.RSAPrivateKey) or key.public_key() != authority.public_key():
        raise Rejected(f"{files.key} is not the key of the CA {files.certificate}; put the right one back")
    return key


def _rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _key_pem(key: _Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write(path: Path, content: bytes) -> None:
    """Replace the file as a whole."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
