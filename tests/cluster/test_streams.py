"""On servers of the owner's: what is not as it should be is explained, with the command that changes it, and never altered."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import ipaddress
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from nats.js import JetStreamContext
from nats.js.api import StreamConfig

from tests.house import until
from tests.ports import free_port
from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.engine import open_publisher
from uplinkd.engine.api import connect
from uplinkd.engine.bus import NatsBus
from uplinkd.engine.down import CLAIMS, DOWN, JetStreamDownlink
from uplinkd.engine.embedded import Access, find_binary
from uplinkd.engine.nkeys import AccountKey, _encode
from uplinkd.engine.stream import STREAM
from uplinkd.engine.streams import check, told_why
from uplinkd.settings import Settings, load
from uplinkd.tasks import end_tasks

# nats-py leaves the socket of a connection that was refused to the garbage collector.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What a test leaves behind is told of in that test."""
    yield
    gc.collect()


@contextlib.contextmanager
def own_server(folder: Path, *lines: str, jetstream: bool = True) -> Iterator[str]:
    """A nats-server that the operator runs; its host and port."""
    where = f"127.0.0.1:{free_port()}"
    folder.mkdir(exist_ok=True)
    config = folder / "own.conf"
    store = [f"jetstream {{ store_dir: {str(folder)!r} }}"] if jetstream else []
    config.write_text("\n".join([f"listen: {where!r}", *store, *lines]))
    with (folder / "own.log").open("wb") as log:
        process = subprocess.Popen([find_binary(Settings()), "-c", config], stderr=log)
    host, port = where.split(":")
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
                break
            assert process.poll() is None, (folder / "own.log").read_text()
        yield where
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def operator(where: str, **more: Any) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(f"nats://{where}", **more)
    yield client.jetstream()
    await client.close()
    await asyncio.sleep(0)


async def served(settings: Settings) -> None:
    """Let a worker make the streams, and store a message."""
    access = Access.of(settings)
    publisher, bus = open_publisher(settings, access), NatsBus(access, "test")
    downlink = JetStreamDownlink(settings, bus)
    running = asyncio.create_task(bus.run())
    await publisher.start()
    await until(lambda: publisher.connected and bus.connected and bool(downlink._base))
    done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    publisher.publish(b"/.pk.dn.update", b"x", lambda _, fault: done.set_result(fault))
    assert await done == ""
    await publisher.stop()
    await end_tasks(running)


async def rejected(settings: Settings) -> str:
    with pytest.raises(Rejected) as found:
        await check(settings, Access.of(settings))
    return str(found.value)


async def test_streams_as_they_were_made_are_as_they_should_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And before there are any too."""
    with own_server(tmp_path / "own") as where:
        settings = Settings(data=tmp_path, nats_url=f"nats://{where}")
        await check(settings, Access.of(settings))
        await served(settings)
        await check(settings, Access.of(settings))
    assert caplog.messages == []


async def test_another_age_or_size_is_said_and_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Both values, and the command."""
    with own_server(tmp_path / "own") as where:
        settings = Settings(data=tmp_path, nats_url=f"nats://{where}", keep_age=3600.0, down_limit=100)
        await served(settings)
        other = settings.model_copy(update={"keep_age": 7200.0, "down_limit": 50})
        await check(other, Access.of(other))
        age, limit = caplog.messages
        assert age == (
            f"the NATS stream {STREAM} has max_age 3600000000000, by the settings 7200000000000; "
            f"it is left as it is, and changed by: nats stream edit {STREAM} --max-age=7200s"
        )
        assert limit.endswith(f"nats stream edit {DOWN} --max-msgs-per-subject=50")
        await served(other)
        async with operator(where) as jetstream:
            assert (await jetstream.stream_info(STREAM)).config.max_age == 3600


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"storage": "memory"}, "storage memory, by the settings file; NATS cannot change that"),
        ({"retention": "workqueue"}, "retention workqueue, by the settings limits; NATS cannot change that"),
        ({"subjects": ["/.>", "more"]}, "subjects /.>, more, by the settings /.>; it is left as it is, and changed by"),
    ],
)
async def test_nobody_serves_with_a_stream_that_does_not_keep_what_is_promised(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with own_server(tmp_path / "own") as where:
        async with operator(where) as jetstream:
            await jetstream.add_stream(StreamConfig(**{"name": STREAM, "subjects": ["/.>"], **change}))
        settings = Settings(data=tmp_path, nats_url=f"nats://{where}")
        assert said in await rejected(settings)
        async with operator(where) as jetstream:
            config = (await jetstream.stream_info(STREAM)).config
        assert [getattr(config, name) for name in change] == list(change.values())


async def test_fewer_replicas_than_set_are_refused(tmp_path: Path) -> None:
    """An acknowledgement would promise less than the settings say."""
    with own_server(tmp_path / "own") as where:
        await served(Settings(data=tmp_path, nats_url=f"nats://{where}"))
        text = await rejected(Settings(data=tmp_path, nats_url=f"nats://{where}", replicas=3))
    lines = text.splitlines()
    assert len(lines) == 4  # of what waits, sessions and claims too
    assert f"nats stream edit {STREAM} --replicas=3" in text
    assert f"nats stream edit {CLAIMS} --replicas=3" in text


async def test_replicas_without_a_cluster_are_explained(tmp_path: Path) -> None:
    with own_server(tmp_path / "own") as where:
        settings = Settings(data=tmp_path, nats_url=f"nats://{where}", replicas=3)
        publisher = open_publisher(settings, Access.of(settings))
        await publisher.start()
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        publisher.publish(b"/.pk.dn.update", b"x", lambda _, fault: done.set_result(fault))
        assert "replicas = 3 needs as many nats-servers in one cluster" in await done
        await publisher.stop()


async def test_a_server_without_jetstream_is_said(tmp_path: Path) -> None:
    with own_server(tmp_path / "own", jetstream=False) as where:
        text = await rejected(Settings(data=tmp_path, nats_url=f"nats://{where}"))
    assert "JetStream" in text
    assert "switch it on" in text
    assert "\n" not in text


async def test_a_user_without_the_right_is_said(tmp_path: Path) -> None:
    users = 'authorization { users: [ { user: u, password: p, permissions: { publish: "only.this" } } ] }'
    with own_server(tmp_path / "own", users) as where:
        text = await rejected(Settings(data=tmp_path, nats_url=f"nats://u:p@{where}"))
    assert "may not use JetStream" in text
    assert "$js.api.info" in text.lower()


async def test_a_wrong_password_is_refused_and_not_shown(tmp_path: Path) -> None:
    with own_server(tmp_path / "own", "authorization { user: u, password: right }") as where:
        text = await rejected(Settings(data=tmp_path, nats_url=f"nats://u:hidden@{where}"))
    assert "uthorization" in text
    assert "hidden" not in text


async def test_servers_that_do_not_answer_are_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A gateway may start before them."""
    settings = Settings(data=tmp_path, nats_url="nats://127.0.0.1:1")
    await check(settings, Access.of(settings))
    assert "starts all the same" in caplog.text


def test_what_belongs_to_own_servers_is_refused_without_them() -> None:
    with pytest.raises(Rejected, match="replicas = 3 is for NATS servers of your own"):
        load({"replicas": 3}, environment={})
    settings, _ = load({}, environment={"UPLINKD_REPLICAS": "3", "UPLINKD_NATS_URL": "tls://u:p@a, b:4333,c"})
    assert settings.nats_url == "tls://u:p@a,tls://b:4333,tls://c"
    assert Access.of(settings).urls == ("tls://a", "tls://b:4333", "tls://c")


def test_too_few_servers_are_told_with_their_tags() -> None:
    settings = Settings(nats_url="nats://a", replicas=3, placement=("ssd",))
    said = told_why({"err_code": 10005, "description": "no suitable peers for placement"}, settings)
    assert said.startswith("no suitable peers for placement: replicas = 3 needs as many nats-servers with the tags ssd")


async def test_a_dead_server_among_several_is_passed_over(tmp_path: Path) -> None:
    """The client tries all, and takes the dead one last from then on."""
    with own_server(tmp_path / "own") as where:
        settings = Settings(data=tmp_path, nats_url=f"nats://127.0.0.1:1,{where}")
        publisher = open_publisher(settings, Access.of(settings))
        await publisher.start()
        await until(lambda: publisher.connected)
        assert Access.of(settings).order == [f"nats://{where}", "nats://127.0.0.1:1"]
        await publisher.stop()


# -- credentials and TLS


def _certificates(folder: Path) -> tuple[Path, Path, Path]:
    """(authority, certificate, key) for 127.0.0.1, for a server as for a client."""
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("authority", "127.0.0.1")]

    def certificate(number: int) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[number])
            .issuer_name(names[0])
            .public_key(keys[number].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )
        if number:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        else:
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        return builder.sign(keys[0], hashes.SHA256())

    paths = folder / "ca.pem", folder / "own.pem", folder / "own.key"
    paths[0].write_bytes(certificate(0).public_bytes(Encoding.PEM))
    paths[1].write_bytes(certificate(1).public_bytes(Encoding.PEM))
    paths[2].write_bytes(keys[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


async def test_tls_with_a_client_certificate(tmp_path: Path) -> None:
    """Both kinds of connection show it, and believe nobody but the authority that is named."""
    ca, pem, key = _certificates(tmp_path)
    tls = f"tls {{ cert_file: {str(pem)!r}, key_file: {str(key)!r}, ca_file: {str(ca)!r}, verify: true }}"
    with own_server(tmp_path / "own", tls) as where:
        settings = Settings(
            data=tmp_path, nats_url=f"tls://{where}", nats_ca=str(ca), nats_cert=str(pem), nats_key=str(key)
        )
        await check(settings, Access.of(settings))
        await served(settings)
        stranger = settings.model_copy(update={"nats_ca": ""})
        assert "certificate" in (await rejected(stranger)).lower()


@pytest.mark.parametrize("secret", ["u:hidden@", "hidden@", "", "creds"])
@pytest.mark.parametrize("asks", [True, False])
async def test_nothing_is_told_to_a_server_without_tls_where_tls_is_asked_for(
    tmp_path: Path, secret: str, asks: bool
) -> None:
    """Somebody in the middle may say so of a server that has it. Neither connection goes on, and no password was sent."""
    heard = bytearray()
    doc = {"server_id": "x", "version": "2.12.0", "max_payload": 1 << 20, "headers": True, "jetstream": True}
    info = json.dumps({**doc, "proto": 1, "nonce": "abc", "auth_required": asks})

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"INFO {info}\r\n".encode())
        while line := await reader.readline():
            heard.extend(line)
            if line == b"PING\r\n":
                writer.write(b"PONG\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    where = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    settings = Settings(data=tmp_path, nats_url=f"tls://{'' if secret == 'creds' else secret}{where}")
    if secret == "creds":
        _, _, file = _credentials(tmp_path, AccountKey)
        settings = settings.model_copy(update={"nats_creds": str(file)})
    access = Access.of(settings)
    with pytest.raises(Unavailable, match="offers no TLS, and nats_url asks for it"):
        await connect(access, "test")
    publisher = open_publisher(settings, access)
    await publisher.start()
    await asyncio.sleep(0.1)
    assert not publisher.connected
    await publisher.stop()
    server.close()
    assert b"hidden" not in heard
    assert b"jwt" not in heard
    assert b"sig" not in heard
    assert b"SUB" not in heard


def _credentials(folder: Path, operator_of: Callable[[bytes], AccountKey]) -> tuple[str, str, Path]:
    """(operator's JWT, lines about accounts, the user's file), made as nsc does."""
    keys = {kind: Ed25519PrivateKey.generate() for kind in ("operator", "account", "system", "user")}
    prefixes = {"operator": 14 << 3, "account": 0, "system": 0, "user": 20 << 3}
    raw = {kind: key.private_bytes_raw() for kind, key in keys.items()}
    public = {
        kind: _encode(bytes([prefixes[kind]]), key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))
        for kind, key in keys.items()
    }

    def signed(by: str, claims: dict[str, Any]) -> str:
        key = operator_of(raw[by])
        key.public = public[by]
        return key.sign(claims, now=1)

    of_operator = signed(
        "operator", {"sub": public["operator"], "name": "o", "nats": {"type": "operator", "version": 2}}
    )
    limits = dict.fromkeys(
        ("subs", "conn", "leaf", "imports", "exports", "data", "payload", "mem_storage", "disk_storage"), -1
    )
    limits |= {"streams": -1, "consumer": -1, "wildcards": True}
    accounts = {
        public[kind]: signed(
            "operator",
            {"sub": public[kind], "name": kind, "nats": {"type": "account", "version": 2, "limits": of_kind}},
        )
        for kind, of_kind in (("account", limits), ("system", limits | {"mem_storage": 0, "disk_storage": 0}))
    }
    of_user = signed(
        "account",
        {
            "sub": public["user"],
            "name": "u",
            "nats": {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {}},
        },
    )
    prefix = prefixes["user"]
    seed = _encode(bytes([18 << 3 | prefix >> 5, (prefix & 31) << 3]), raw["user"])
    file = folder / "user.creds"
    file.write_text(
        f"-----BEGIN NATS USER JWT-----\n{of_user}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
    preload = "\n".join(f"{name}: {token}" for name, token in accounts.items())
    return of_operator, f"system_account: {public['system']}\nresolver_preload {{\n{preload}\n}}", file


async def test_credentials_of_a_file_sign_in(tmp_path: Path) -> None:
    """A user's JWT, and what proves that it is ours: both kinds of connection."""
    of_operator, accounts, file = _credentials(tmp_path, AccountKey)
    lines = f"operator: {of_operator}", "resolver: MEMORY", accounts
    with own_server(tmp_path / "own", *lines) as where:
        settings = Settings(data=tmp_path, nats_url=f"nats://{where}", nats_creds=str(file))
        await check(settings, Access.of(settings))
        await served(settings)
        _, _, strange = _credentials(tmp_path / "own", AccountKey)
        stranger = settings.model_copy(update={"nats_creds": str(strange)})
        assert str(strange) in await rejected(stranger)
        assert "SU" not in await rejected(stranger)
