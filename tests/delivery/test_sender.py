"""What a request reaches, and what it does not: addresses, redirects, certificates, answers without an end."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.delivery.receiver import HERE, Got, Receiver, answer, receiving
from uplinkd.delivery.sender import Answer, Sender
from uplinkd.settings import Settings

NAME = "hooks.example.com"
NOWHERE = Settings()


def names(**known: list[str]) -> Callable[[str, int], asyncio.Future[list[str]]]:
    """Looks names up in a table, each time the next of its addresses, the last one for good."""

    def lookup(host: str, port: int) -> asyncio.Future[list[str]]:
        found: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        addresses = known["host"]
        found.set_result([addresses.pop(0) if len(addresses) > 1 else addresses[0]])
        return found

    return lookup


async def posted(sender: Sender, url: str, timeout: float = 5.0) -> Answer:  # noqa: ASYNC109
    try:
        return await sender.post(url, {"Content-Type": "text/plain"}, b"secret report", timeout=timeout)
    finally:
        await sender.close()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "0x7f.1",
        "0x7f000001",
        "2130706433",
        "017700000001",
        "0.0.0.0",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "127.0.0.1.",
        "127%2e0.0.1",
        "%31%32%37.0.0.1",
    ],
)
@pytest.mark.parametrize("scheme", ["https", "http"])
async def test_no_spelling_reaches_this_machine(scheme: str, host: str) -> None:
    """Without an operator's word for it: no connection is made."""
    async with receiving() as receiver:
        tried = await posted(Sender(NOWHERE), f"{scheme}://{host}:{receiver.port}/")
        assert tried.status == 0
        assert tried.fault
        await asyncio.sleep(0)
        assert not receiver.connections


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "0.0.0.0"])
async def test_a_name_with_a_private_address_is_not_reached(address: str) -> None:
    """What it is, and why not, is said."""
    async with receiving() as receiver:
        tried = await posted(Sender(NOWHERE, lookup=names(host=[address])), f"https://{NAME}:{receiver.port}/")
        assert tried.fault == f"{NAME} is {address}, which is no address of the internet and not in webhook_networks"
        assert not receiver.connections


async def test_a_name_that_becomes_a_private_address_is_not_reached() -> None:
    """It was permitted when it was looked up first; the connection goes to what was looked at, and to nothing else."""
    async with receiving() as receiver:
        sender = Sender(Settings(webhook_networks=("127.0.0.1/32",)), lookup=names(host=["127.0.0.1", "127.0.0.2"]))
        url = f"http://{NAME}:{receiver.port}/"
        assert (await sender.post(url, {}, b"", timeout=5)).status == 200
        for session in sender._sessions.values():
            session.connector.clear_dns_cache()  # type: ignore[union-attr]
            session.connector._close()  # type: ignore[union-attr]
            session.connector._closed = False  # type: ignore[union-attr]
        tried = await posted(sender, url)
        assert (
            tried.fault == f"{NAME} is 127.0.0.2, which is not in webhook_networks: anywhere else it is https:// alone"
        )
        assert receiver.connections == 1


async def test_the_socket_is_guarded_whatever_was_looked_up() -> None:
    """Also where a resolver's answer were to go another way round it: the address of the connection itself is looked at."""
    async with receiving() as receiver:
        sender = Sender(NOWHERE)
        session = sender._session("https")

        async def resolve(*_: object, **__: object) -> list[dict[str, object]]:
            return [{"hostname": NAME, "host": "127.0.0.1", "port": receiver.port, "family": 2, "proto": 6, "flags": 0}]

        session.connector._resolver.resolve = resolve  # type: ignore[union-attr]
        tried = await posted(sender, f"https://{NAME}:{receiver.port}/")
        assert tried.fault == "it is 127.0.0.1, which is no address of the internet and not in webhook_networks"
        assert not receiver.connections


async def test_plain_text_goes_to_named_networks_alone() -> None:
    """To the internet it is HTTPS or nothing."""
    tried = await posted(Sender(HERE, lookup=names(host=["1.1.1.1"])), f"http://{NAME}/")
    assert tried.fault == f"{NAME} is 1.1.1.1, which is not in webhook_networks: anywhere else it is https:// alone"


async def test_a_redirect_is_not_followed() -> None:
    """Not to another machine, not to this one, not to a file."""
    async with receiving() as inner:
        async with receiving(lambda got: answer(307, "", f"Location: {inner.url}")) as outer:
            tried = await posted(Sender(HERE), outer.url)
        assert (tried.status, tried.fault) == (307, "it answered 307, a redirect, which webhooks do not follow")
        assert not inner.connections


async def test_the_environment_and_cookies_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would be reached in place of what was looked at."""
    async with receiving(lambda got: answer(200, "", "Set-Cookie: a=b")) as receiver, receiving() as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        sender = Sender(HERE)
        await sender.post(receiver.url, {}, b"", timeout=5)
        await posted(sender, receiver.url)
    assert not proxy.connections
    assert receiver.connections == 1
    assert ["cookie" in got.headers for got in receiver.got] == [False, False]


async def test_an_answer_is_read_up_to_a_bound() -> None:
    """What follows is not waited for; the next request has another connection."""

    async def flood(got: Got) -> bytes:
        return b"HTTP/1.1 400 X\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 200_000

    async with receiving(flood) as receiver:
        sender = Sender(HERE)
        assert len((await sender.post(receiver.url, {}, b"", timeout=5)).text) == 201
        assert (await posted(sender, receiver.url)).status == 400
        assert receiver.connections == 2


async def test_an_attempt_takes_no_longer_than_its_time() -> None:
    """Whichever part of the answer does not come."""
    for part in (b"HTTP/1.1 200 OK\r\nContent-", b"HTTP/1.1 500 X\r\nContent-Length: 5\r\n\r\nab"):
        async with receiving(lambda got, part=part: part) as receiver:  # type: ignore[misc]
            assert (await posted(Sender(HERE), receiver.url, timeout=0.1)).fault == "it did not answer within 0.1 s"


async def test_an_acceptance_is_one_whatever_follows() -> None:
    """The status says it; a rest that breaks off, or does not come, makes no repetition."""
    said = iter([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", answer(202, "x" * 200_000), answer(204)])
    async with receiving(lambda got: next(said)) as receiver:
        sender = Sender(HERE)
        assert [(await sender.post(receiver.url, {}, b"", timeout=0.2)).status for _ in range(3)] == [200, 202, 204]
        await sender.close()
        assert receiver.connections == 3


async def test_an_answer_that_nobody_has_asked_for_accepts_nothing() -> None:
    """From a target that answers twice, the second time on an idle connection: the next message would count as accepted."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(EOFError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                requests.append(await reader.readexactly(1))
                writer.write(answer(204 if requests == [b"1"] else 500))
                await asyncio.sleep(0.02)
                writer.write(answer(200))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
    sender = Sender(HERE)
    said = []
    for body in (b"1", b"2", b"3"):
        said.append((await sender.post(url, {}, body, timeout=2)).status)
        await asyncio.sleep(0.05)
    await sender.close()
    server.close()
    assert (said, requests) == ([204, 500, 500], [b"1", b"2", b"3"])


async def test_a_connection_that_was_closed_meanwhile_costs_no_failure() -> None:
    """A server closes an idle connection at the moment in which it is used: the request is sent once more."""
    said: list[bytes | int] = [200, b"", 200]
    async with receiving(lambda got: said.pop(0)) as receiver:
        sender = Sender(HERE)
        assert (await sender.post(receiver.url, {}, b"", timeout=5)).status == 200
        assert (await posted(sender, receiver.url)).status == 200
        assert len(receiver.got) == 3


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (b"", "it closed the connection without an answer"),
        (b"HTTP/1.1 400 X\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "its answer "),
        (b"no HTTP\r\n\r\n", "its answer is not HTTP: Bad status line"),
        (599, "it answered 599"),
    ],
)
async def test_a_fault_is_a_sentence(said: bytes | int, fault: str) -> None:
    """For people who do not know what happened."""
    async with receiving(lambda got: said) as receiver:
        tried = await posted(Sender(HERE), receiver.url + "?token")
        assert tried.fault.startswith(fault)
        assert "token" not in tried.fault


async def test_an_unknown_name_is_said_to_be_one() -> None:
    """In the system's words."""

    async def lookup(host: str, port: int) -> list[str]:
        raise OSError(-2, "Name or service not known")

    tried = await posted(Sender(NOWHERE, lookup=lookup), f"https://{NAME}/")
    assert tried.fault == "its name is not found: Name or service not known"


# TLS.


def certified(
    folder: Path,
    *names: str,
    days: int = 1,
    signed_by: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None,
) -> tuple[ssl.SSLContext, x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A server's context with a certificate for `names`, its own authority unless another one has signed it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test's" if signed_by else "a test's CA")])
    now = dt.datetime.now(dt.UTC)
    alternatives = [
        x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name) for name in names
    ]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by[0].subject if signed_by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=10))
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=signed_by is None, path_length=None), critical=True)
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    certificate = builder.sign(signed_by[1] if signed_by else key, hashes.SHA256())
    pem = folder / f"{certificate.serial_number}.pem"
    pem.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context, certificate, key


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """One that this process trusts, by OpenSSL's own variable."""
    _, certificate, key = certified(tmp_path)
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    return certificate, key


Authority = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


async def over_tls(context: ssl.SSLContext, host: str) -> tuple[Answer, Receiver]:
    async with receiving(tls=context) as receiver:
        return await posted(
            Sender(HERE, lookup=names(host=["127.0.0.1"])), f"https://{host}:{receiver.port}/"
        ), receiver


@pytest.mark.parametrize("host", [NAME, "127.0.0.1"])
async def test_a_trusted_certificate_is_accepted(authority: Authority, tmp_path: Path, host: str) -> None:
    """For the name in the URL, though the connection goes to an address; for an address where the URL has one."""
    context, *_ = certified(tmp_path, host, signed_by=authority)
    tried, receiver = await over_tls(context, host)
    assert (tried.status, tried.fault, len(receiver.got)) == (200, "", 1)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("self-signed", "self-signed certificate"),
        ("expired", "certificate has expired"),
        ("host", f"Hostname mismatch, certificate is not valid for '{NAME}'"),
        ("address", f"Hostname mismatch, certificate is not valid for '{NAME}'"),
    ],
)
async def test_another_certificate_is_refused(authority: Authority, tmp_path: Path, fault: str, why: str) -> None:
    """And nothing of the message is told."""
    context, *_ = certified(
        tmp_path,
        {"host": "other.example.com", "address": "127.0.0.1"}.get(fault, NAME),
        days=-1 if fault == "expired" else 1,
        signed_by=None if fault == "self-signed" else authority,
    )
    tried, receiver = await over_tls(context, NAME)
    assert tried.fault.startswith(f"its certificate is not accepted: {why}")
    assert not receiver.got


async def test_a_server_without_tls_is_none_for_https(authority: Authority) -> None:
    """It is not reached in clear instead."""
    heard = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard = await reader.read(1000)
        writer.write(answer(400))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        tried = await posted(Sender(HERE), f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    assert tried.fault.startswith("no TLS with it: ")
    assert heard
    assert b"secret report" not in heard
