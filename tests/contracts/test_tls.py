"""TLS as devices meet it: real handshakes by OpenSSL's own client against a small server with our context."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from uplinkd import tls
from uplinkd.core.errors import Rejected
from uplinkd.settings import Settings
from uplinkd.tls import CertificateFiles, LegacyDevices, Renewal, ensure_material, reissue, server_context

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")

DAY = dt.timedelta(days=1)


@contextlib.asynccontextmanager
async def serving(context: ssl.SSLContext) -> AsyncIterator[int]:
    """The port of a server that greets and closes."""

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            writer.write(b"hello")
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context, ssl_shutdown_timeout=1)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await server.wait_closed()


async def s_client(port: int, *options: str) -> str:
    """What `openssl s_client -brief` says about a handshake."""
    process = await asyncio.create_subprocess_exec(
        "openssl", "s_client", "-brief", "-connect", f"127.0.0.1:{port}", *options,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(b""), 10)
    return output.decode()


def make_pair(
    folder: Path,
    name: str = "own",
    *,
    ecdsa: bool = False,
    begins: dt.timedelta = -DAY,
    ends: dt.timedelta = 90 * DAY,
    password: bytes = b"",
) -> CertificateFiles:
    """A self-signed certificate such as an owner may bring."""
    key = ec.generate_private_key(ec.SECP256R1()) if ecdsa else rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .sign(key, hashes.SHA256())
    )
    files = CertificateFiles(folder / f"{name}.pem", folder / f"{name}.key")
    files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption(),
        )
    )
    return files


def owned(folder: Path, *pairs: CertificateFiles) -> Settings:
    return Settings(
        data=folder, tls_cert=tuple(each.certificate for each in pairs), tls_key=tuple(each.key for each in pairs)
    )


def served(context: ssl.SSLContext) -> bytes:
    """The certificate that a new connection is shown, by a handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    wanted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    wanted.check_hostname, wanted.verify_mode = False, ssl.CERT_NONE
    client = wanted.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return client.getpeercert(binary_form=True) or b""


def leaf(files: CertificateFiles) -> x509.Certificate:
    return x509.load_pem_x509_certificate(files.certificate.read_bytes())


@needs_openssl
@pytest.mark.parametrize("cipher", ["AES256-SHA256", "AES256-SHA", "AES128-SHA256", "AES128-SHA"])
async def test_old_sdks_suites_connect_and_are_shown_rsa(tmp_path: Path, cipher: str) -> None:
    """TLS 1.2, static RSA, CBC, no SNI: all that iotkit-embedded and Link SDK C can do."""
    async with serving(server_context(ensure_material(Settings(data=tmp_path)))) as port:
        said = await s_client(
            port, "-tls1_2", "-cipher", cipher, "-noservername",
            "-CAfile", str(tmp_path / "tls" / "ca.pem"), "-verify_return_error",
        )  # fmt: skip
    assert f"Ciphersuite: {cipher}" in said
    assert "Verification: OK" in said


@needs_openssl
async def test_without_legacy_suites_only_forward_secrecy_is_left(tmp_path: Path) -> None:
    """RSA certificates are served as before, for their signature alone."""
    async with serving(server_context(ensure_material(Settings(data=tmp_path)), legacy=False)) as port:
        for cipher in ("AES256-SHA256", "AES256-SHA", "AES128-SHA256", "AES128-SHA"):
            assert "Ciphersuite" not in await s_client(port, "-tls1_2", "-cipher", cipher)
        said = await s_client(port, "-tls1_2", "-sigalgs", "RSA+SHA256")
        assert "Ciphersuite: ECDHE-RSA" in said
        assert "Protocol version: TLSv1.3" in await s_client(port)


@pytest.mark.parametrize(
    ("cipher", "legacy"),
    [
        (("AES128-SHA", "TLSv1.0", 128), True),
        (("AES256-SHA256", "TLSv1.2", 256), True),
        (("ECDHE-RSA-AES128-GCM-SHA256", "TLSv1.2", 128), False),
        (("TLS_AES_128_GCM_SHA256", "TLSv1.3", 128), False),
        (None, False),
    ],
)
def test_a_device_with_a_legacy_suite_is_told_of_once_a_day(cipher: object, legacy: bool) -> None:
    """However often it signs in; what came in plain text through a proxy has no suite."""

    class Transport(asyncio.Transport):
        def get_extra_info(self, name: str, default: object = None) -> object:
            return cipher if name == "cipher" else default

    told: list[tuple[str, ...]] = []
    now = [1000.0]
    devices = LegacyDevices(lambda *what: told.append(what), lambda: now[0])
    for seconds in (0, 1, 3600, 86_400, 1):
        now[0] += seconds
        assert devices.signed_in(Transport(), "pk", "lamp", "192.0.2.7", "https") is legacy
    expected = [("pk", "lamp", "192.0.2.7", "https", cipher[0])] * 2 if isinstance(cipher, tuple) and legacy else []
    assert told == expected


@needs_openssl
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_modern_clients_are_shown_ecdsa(tmp_path: Path, version: str) -> None:
    """Who can do both takes the chain that costs the server less."""
    async with serving(server_context(ensure_material(Settings(data=tmp_path)))) as port:
        said = await s_client(port, version)
        rsa_alone = await s_client(port, version, "-sigalgs", "RSA-PSS+SHA256:RSA+SHA256")
    assert "Signature type: ECDSA" in said
    assert "Signature type: RSA" in rsa_alone


@needs_openssl
async def test_an_ip_address_is_found_as_address_and_as_text(tmp_path: Path) -> None:
    """Modern clients look at the address entry, the mbedTLS of v3 SDKs compares text with the DNS entries alone."""
    settings = Settings(data=tmp_path, listen="0.0.0.0:8443", tls_name=("192.0.2.7", "Things.example", "设备.example"))
    async with serving(server_context(ensure_material(settings))) as port:
        trust = ("-CAfile", str(tmp_path / "tls" / "ca.pem"), "-verify_return_error", "-x509_strict")
        for name in ("-verify_ip=192.0.2.7", "-verify_hostname=192.0.2.7", "-verify_hostname=things.example",
                     "-verify_hostname=localhost", "-verify_ip=::1", "-verify_hostname=xn--srs139i.example"):  # fmt: skip
            said = await s_client(port, *trust, *name.split("="))
            assert "Verification: OK" in said, name
        assert "Verification: OK" not in await s_client(port, *trust, "-verify_ip", "192.0.2.8")


@needs_openssl
async def test_old_versions_are_refused(tmp_path: Path) -> None:
    """No TLS 1.1 even where the client insists; no renegotiation, which makes the server sign again and again."""
    context = server_context(ensure_material(Settings(data=tmp_path)))
    async with serving(context) as port:
        assert "Protocol version" not in await s_client(port, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0")
        assert "Protocol version: TLSv1.2" in await s_client(port, "-tls1_2")
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_NO_COMPRESSION


async def test_a_client_with_other_protocols_alone_is_served(tmp_path: Path) -> None:
    """ALPN is an offer: h2 alone does not fail, http/1.1 is agreed on."""
    async with serving(server_context(ensure_material(Settings(data=tmp_path)))) as port:
        for offered, agreed in ((["h2"], None), (["h2", "http/1.1"], "http/1.1")):
            context = ssl.create_default_context(cafile=str(tmp_path / "tls" / "ca.pem"))
            context.set_alpn_protocols(offered)
            reader, writer = await asyncio.open_connection("localhost", port, ssl=context, family=2)
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == agreed
            assert await reader.read() == b"hello"
            writer.close()
            await writer.wait_closed()


def test_what_is_made_is_private_and_stays(tmp_path: Path) -> None:
    """Folder 0700, keys 0600; a second start makes nothing anew."""
    files = ensure_material(Settings(data=tmp_path))
    folder = tmp_path / "tls"
    assert folder.stat().st_mode & 0o777 == 0o700
    for key in [folder / "ca.key", *(each.key for each in files)]:
        assert key.stat().st_mode & 0o777 == 0o600
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert ensure_material(Settings(data=tmp_path)) == files
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_old_sdks_can_verify_what_is_made(tmp_path: Path) -> None:
    """RSA-2048 with sha256WithRSA and keyEncipherment; no certificate lives longer than 825 days."""
    first, second = (leaf(each) for each in ensure_material(Settings(data=tmp_path)))
    assert isinstance(first.public_key(), rsa.RSAPublicKey)
    assert isinstance(second.public_key(), ec.EllipticCurvePublicKey)
    assert first.extensions.get_extension_for_class(x509.KeyUsage).value.key_encipherment
    for each in (first, second):
        assert each.signature_algorithm_oid == x509.SignatureAlgorithmOID.RSA_WITH_SHA256
        assert each.not_valid_after_utc - each.not_valid_before_utc <= 825 * DAY


@pytest.mark.parametrize("names", [("things.example",), ()])
def test_other_names_mean_a_new_certificate_of_the_same_ca(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Names that come and names that go; devices keep the CA that they have."""
    before = leaf(ensure_material(Settings(data=tmp_path, tls_name=("old.example",)))[0])
    authority = (tmp_path / "tls" / "ca.pem").read_bytes()
    after = leaf(ensure_material(Settings(data=tmp_path, tls_name=names))[0])
    assert after.serial_number != before.serial_number
    assert (tmp_path / "tls" / "ca.pem").read_bytes() == authority
    after.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))


def test_certificates_are_reissued_before_they_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 30 days of the end, and not earlier."""
    before = leaf(ensure_material(Settings(data=tmp_path))[0])
    left = (before.not_valid_after_utc - dt.datetime.now(dt.UTC)).days
    monkeypatch.setattr(tls, "_RENEW_DAYS", left - 1)
    assert leaf(ensure_material(Settings(data=tmp_path))[0]) == before
    monkeypatch.setattr(tls, "_RENEW_DAYS", left + 1)
    reissue(Settings(data=tmp_path))
    assert leaf(ensure_material(Settings(data=tmp_path))[0]).serial_number != before.serial_number


def test_a_ca_whose_key_was_moved_away_is_never_replaced(tmp_path: Path) -> None:
    """It serves on while nothing is due; when something is, one line says what to put back."""
    ensure_material(Settings(data=tmp_path))
    authority = (tmp_path / "tls" / "ca.pem").read_bytes()
    (tmp_path / "tls" / "ca.key").unlink()
    ensure_material(Settings(data=tmp_path))
    with pytest.raises(Rejected, match=r"ca\.key"):
        ensure_material(Settings(data=tmp_path, tls_name=("new.example",)))
    assert (tmp_path / "tls" / "ca.pem").read_bytes() == authority


def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    """By the setting's name, with the value."""
    ensure_material(Settings(data=tmp_path, listen="灯.example:8443"))
    with pytest.raises(Rejected, match="tls_name 'a b'"):
        ensure_material(Settings(data=tmp_path, tls_name=("a b",)))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", r"own\.pem cannot be read"),
        ("no key", r"own\.key cannot be read"),
        ("not pem", r"own\.pem holds no certificate"),
        ("other key", r"own\.key is not the private key of .*own\.pem"),
        ("encrypted", "encrypted"),
        ("expired", r"own\.pem expired on"),
        ("future", r"own\.pem is not valid before"),
        ("two", "two RSA certificates"),
    ],
)
def test_an_owners_file_that_cannot_serve_is_named(tmp_path: Path, fault: str, words: str) -> None:
    """One line with the file and what is wrong with it; a start with it is refused."""
    pair = make_pair(
        tmp_path,
        begins=DAY if fault == "future" else -3 * DAY,
        ends=-DAY if fault == "expired" else 90 * DAY,
        password=b"open sesame" if fault == "encrypted" else b"",
    )
    pairs = [pair]
    match fault:
        case "missing":
            pair.certificate.unlink()
        case "no key":
            pair.key.unlink()
        case "not pem":
            pair.certificate.write_bytes(b"\x30\x82")
        case "other key":
            pair.key.write_bytes(make_pair(tmp_path, "other").key.read_bytes())
        case "two":
            pairs.append(make_pair(tmp_path, "second"))
    with pytest.raises(Rejected, match=words) as caught:
        ensure_material(owned(tmp_path, *pairs))
    assert len(str(caught.value).splitlines()) == 1


def test_owners_certificates_without_rsa_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They serve; old devices cannot connect, and the log says so. With RSA beside there is nothing to say."""
    first, second = make_pair(tmp_path, "e", ecdsa=True), make_pair(tmp_path, "r")
    assert ensure_material(owned(tmp_path, first, second)) == [first, second]
    assert not caplog.records
    assert ensure_material(owned(tmp_path, first)) == [first]
    assert "RSA" in caplog.text


def test_a_running_server_only_warns_of_what_it_cannot_reissue(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The owner's certificate expires while it is served: the door stays open."""
    reissue(owned(tmp_path, make_pair(tmp_path, ends=-dt.timedelta(hours=1))))
    assert "expired" in caplog.text


def test_an_end_that_is_near_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the start and twice a day, while there is time to replace it."""
    settings = owned(tmp_path, make_pair(tmp_path, ends=15 * DAY))
    ensure_material(settings)
    assert not caplog.records
    make_pair(tmp_path, ends=13 * DAY)
    reissue(settings)
    assert "own.pem expires on" in caplog.text


def test_a_renewed_pair_is_served_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """New connections see it at the next check, and only a change is loaded."""
    caplog.set_level(logging.INFO)
    pair = make_pair(tmp_path)
    context = server_context([pair])
    renewal = Renewal(context, [pair])
    assert renewal.check() == 0
    before = served(context)
    fresh = make_pair(tmp_path)
    assert renewal.check() == 1
    assert served(context) == leaf(fresh).public_bytes(serialization.Encoding.DER) != before
    assert renewal.check() == 0
    assert len(caplog.records) == 1


def test_a_worker_that_starts_late_serves_the_renewed_pair(tmp_path: Path) -> None:
    """Its context comes from before the renewal; the first thing it does is to look at the files."""
    pair = make_pair(tmp_path)
    inherited = server_context([pair])
    fresh = make_pair(tmp_path)
    Renewal(inherited, [pair])
    assert served(inherited) == leaf(fresh).public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize("fault", ["mismatch", "half", "gone", "expired"])
def test_a_half_written_pair_is_left_alone_until_it_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """The former pair serves on, one warning is given however long it lasts, and what then fits is taken."""
    pair = make_pair(tmp_path)
    context = server_context([pair])
    renewal = Renewal(context, [pair])
    before = served(context)
    aside = tmp_path / "aside"
    aside.mkdir()
    fresh = make_pair(aside)
    match fault:
        case "mismatch":
            shutil.copy(fresh.certificate, pair.certificate)
        case "half":
            pair.certificate.write_bytes(fresh.certificate.read_bytes()[:200])
        case "gone":
            pair.certificate.unlink()
        case "expired":
            make_pair(tmp_path, begins=-3 * DAY, ends=-DAY)
    for _ in range(3):
        assert renewal.check() == 0
    assert served(context) == before
    assert len(caplog.records) == 1
    for source, target in ((fresh.key, pair.key), (fresh.certificate, pair.certificate)):
        shutil.copy(source, target)
    os.utime(pair.certificate, (1, 1))
    assert renewal.check() == 1
    assert served(context) != before
