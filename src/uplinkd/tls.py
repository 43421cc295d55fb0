"""Certificates and the TLS context: made on first start or the owner's, renewed without a restart."""

from __future__ import annotations

import datetime as dt
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from uplinkd.core.errors import Rejected
from uplinkd.settings import Settings, address

__all__ = ["CIPHERS", "CertificateFiles", "Renewal", "ensure_material", "server_context"]

log = logging.getLogger("uplinkd.tls")

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:AES256-SHA256:AES128-SHA256:AES256-SHA:AES128-SHA"
"""For TLS 1.2; the static-RSA suites are the only ones that iotkit-embedded and Link SDK C offer. TLS 1.3 brings its own."""

_AUTHORITY_DAYS = 3650
# Apple's clients refuse server certificates of more than 825 days, whoever issued them.
_SERVER_DAYS = 820
_RENEW_DAYS = 30

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
        if "RSA" not in kinds:
            log.warning("none of the certificates has an RSA key: devices with Alibaba's C SDKs will not connect")
        return files
    folder = settings.data / "tls"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _own(folder, _wanted_names(settings))
    except OSError as error:
        raise Rejected(f"certificates cannot be kept in {folder}: {error.strerror}") from error


def server_context(files: Sequence[CertificateFiles]) -> ssl.SSLContext:
    """The context of every TLS door. One RSA and one ECDSA chain stand side by side: new clients take the cheaper ECDSA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    for pair in files:
        context.load_cert_chain(pair.certificate, pair.key, password=_no_password)
    return context


class Renewal:
    """Loads changed certificate files into a live context; a pair that does not fit is left alone until it does."""

    def __init__(self, context: ssl.SSLContext, files: Sequence[CertificateFiles]) -> None:
        self._context = context
        self._files = list(files)
        self._state = [_state(pair) for pair in self._files]
        self._warned: set[int] = set()

    def check(self) -> int:
        """Load what has changed since the last call; return how many pairs these were."""
        renewed = 0
        for index, pair in enumerate(self._files):
            state = _state(pair)
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
            self._state[index] = state
            self._warned.discard(index)
            renewed += 1
            log.info("the certificate %s has been renewed", pair.certificate)
        return renewed


def _no_password() -> str:
    """Called for an encrypted key, where OpenSSL would ask at the terminal."""
    raise Rejected("the private key is encrypted; give one without a passphrase, readable by uplinkd alone")


def _state(pair: CertificateFiles) -> tuple[tuple[int, int, int], ...]:
    states = []
    for path in (pair.certificate, pair.key):
        try:
            found = path.stat()
            states.append((found.st_mtime_ns, found.st_size, found.st_ino))
        except OSError:
            states.append((0, 0, 0))
    return tuple(states)


def _check(pair: CertificateFiles) -> str:
    """The kind of key, `RSA` or `EC`, of a pair that can be used now; raise Rejected naming the file."""
    for path in (pair.certificate, pair.key):
        try:
            path.read_bytes()
        except OSError as error:
            raise Rejected(f"{path} cannot be read: {error.strerror}") from error
    try:
        certificate = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
    except ValueError as error:
        raise Rejected(f"{pair.certificate} holds no certificate in PEM") from error
    if certificate.not_valid_after_utc < dt.datetime.now(dt.UTC):
        raise Rejected(f"{pair.certificate} expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(pair.certificate, pair.key, password=_no_password)
    except ssl.SSLError as error:
        raise Rejected(f"{pair.key} is not the private key of {pair.certificate}: {error.reason}") from error
    return "RSA" if isinstance(certificate.public_key(), rsa.RSAPublicKey) else "EC"


def _wanted_names(settings: Settings) -> list[str]:
    host, _ = address(settings.listen)
    wildcard = host in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
    names = ["localhost", "127.0.0.1", "::1", socket.gethostname(), *([] if wildcard else [host]), *settings.tls_name]
    return list(dict.fromkeys(name for name in names if name))


def _own(folder: Path, names: list[str]) -> list[CertificateFiles]:
    """A CA and two server certificates of it; what is there and still good is kept."""
    authority_files = CertificateFiles(folder / "ca.pem", folder / "ca.key")
    if not (authority_files.certificate.exists() and authority_files.key.exists()):
        _make_authority(authority_files)
    authority, authority_key = _load(authority_files)
    files = []
    for kind in ("rsa", "ecdsa"):
        pair = CertificateFiles(folder / f"server-{kind}.pem", folder / f"server-{kind}.key")
        if not _still_good(pair, names, authority):
            key: _Key = _rsa_key() if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())
            _write(pair.key, _key_pem(key))
            _write(pair.certificate, _issue(key, names, authority, authority_key) + _pem(authority))
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
    _write(files.certificate, _pem(certificate), mode=0o644)


def _issue(key: _Key, names: list[str], authority: x509.Certificate, authority_key: _Key) -> bytes:
    # iotkit-embedded 3.0.1 compares an IP host with the common name and with DNS entries alone. So the address stands in the
    # common name too, and, against RFC 5280's intent but read by that SDK, among the DNS names.
    common = next((name for name in names if not _is_address(name) and name != "localhost"), "localhost")
    alternatives: list[x509.GeneralName] = []
    for name in names:
        if _is_address(name):
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
    return has >= set(names) and certificate.not_valid_after_utc > soon


def _load(files: CertificateFiles) -> tuple[x509.Certificate, _Key]:
    try:
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise Rejected(f"the CA in {files.certificate.parent} cannot be read: {error}; put its files back") from error
    assert isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
    return certificate, key


def _rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _key_pem(key: _Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replace the file as a whole."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    fresh.replace(path)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
