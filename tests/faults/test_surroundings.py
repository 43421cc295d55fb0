"""What a server stands on, harmed: its disk, its registry, its clock, its certificates."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from tests.faults.load import LIMITS, Load, start_load
from tests.faults.table import Tell
from tests.house import UPLINKD, Server, cli, cli_json, environment, make_devices, serving

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.xdist_group("faults")]

# The disk

_SYSCALLS = "fsync,fdatasync,pwrite64"
_DELAY_MICROSECONDS = 200_000


async def test_a_server_whose_folder_is_removed_or_replaced_ends_at_once(tmp_path: Path) -> None:
    """It would acknowledge what is kept nowhere, and write into the files of a server that has taken its place."""
    with serving(tmp_path / "data", *LIMITS) as former:
        load = start_load(former)
        tasks = asyncio.create_task(load.run(8, lambda: shutil.rmtree(former.data), after=1))
        assert former.process
        assert await asyncio.to_thread(former.process.wait, 5) == 1
        last = load.last_success
        with serving(tmp_path / "data", *LIMITS) as successor:
            later = start_load(successor)
            await later.run(2, lambda: None, after=1)
            later.all_found(successor.data)
        await tasks
        assert load.last_success - last < 0.5
        (line,) = [each for each in former.log.read_text().splitlines() if "was removed or replaced" in each]
        assert "Traceback" not in line


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("sync", ["100ms", "always"])
async def test_a_slow_disk_is_slow_answers_or_30001(tmp_path: Path, tell: Tell, sync: str) -> None:
    """Each write and fsync of nats-server takes 0.2 s longer, as its system calls are held up by strace."""
    with serving(tmp_path / "data", *LIMITS, "--sync-interval", sync) as server:
        load = start_load(server)
        (engine,) = server.children("nats-server")

        def fault() -> None:
            inject = f"inject={_SYSCALLS}:delay_enter={_DELAY_MICROSECONDS}"
            words = [
                "strace",
                "-f",
                "-qq",
                "-o",
                "/dev/null",
                "-e",
                f"trace={_SYSCALLS}",
                "-e",
                inject,
                "-p",
                str(engine),
            ]
            with subprocess.Popen(words, stderr=subprocess.PIPE, start_new_session=True) as strace:
                try:
                    time.sleep(5)
                    assert strace.poll() is None, f"this machine lets nobody trace: {strace.communicate()[1].decode()}"
                finally:
                    strace.send_signal(signal.SIGINT)

        await load.run(8, fault, after=1.5)
        assert {code for code, _ in load.refused} <= {30001}
        assert load.slowest > _DELAY_MICROSECONDS / 1e6
        assert not load.broken
        tell(load.row(f"disk slow, sync_interval {sync}", server.data))


# The registry


async def test_a_locked_registry_stops_first_logins_alone(tmp_path: Path, tell: Tell) -> None:
    """Another process holds SQLite's lock. Who is known goes on; a first login, which is recorded, is answered 20004 in time."""
    with serving(tmp_path / "data", *LIMITS) as server:
        devices = make_devices(server, 8)
        known, newcomers = Load(devices[:4]), Load(devices[4:])
        registry = sqlite3.connect(server.data / "registry.sqlite", isolation_level=None, check_same_thread=False)

        def let_go() -> None:
            time.sleep(6)
            registry.execute("ROLLBACK")

        with contextlib.closing(registry):
            async with known.under_way():
                await asyncio.sleep(1)
                registry.execute("BEGIN EXCLUSIVE")
                known.harmed = time.monotonic()
                await newcomers.run(10, let_go, after=0)
        assert not known.refused
        assert not known.broken
        assert {code for code, _ in newcomers.refused} == {20004}
        tell(known.row("registry locked: known devices", server.data))
        tell(newcomers.row("registry locked: first logins", server.data))


async def test_a_damaged_registry_serves_known_devices_and_comes_back_from_a_backup(tmp_path: Path, tell: Tell) -> None:
    """Its pages are overwritten while it serves. New devices are answered 20004, the log says what to do, a start is refused in one
    line; the registry of the backup in the place of the damaged one, everybody is back and no message is lost."""
    with serving(tmp_path / "data", *LIMITS) as server:
        devices = make_devices(server, 8)
        known, newcomers = Load(devices[:4]), Load(devices[4:])
        backup = tmp_path / "backup"
        registry = server.data / "registry.sqlite"
        async with known.under_way():
            await asyncio.sleep(1)
            await asyncio.to_thread(cli, "backup", str(backup), data=server.data)
            _overwrite(registry)
            known.harmed = time.monotonic()

            def bring_back() -> None:
                time.sleep(2)
                assert server.stop() == 0
                refused = _refused_start(server)
                assert "registry.sqlite is damaged" in refused
                assert "uplinkd restore" in refused
                cli("restore", str(backup), data=tmp_path / "restored")
                for name in ("registry.sqlite-wal", "registry.sqlite-shm"):
                    (server.data / name).unlink(missing_ok=True)
                (tmp_path / "restored" / "registry.sqlite").replace(registry)
                server.start()

            await newcomers.run(9, bring_back, after=0)
        log = server.log.read_text()
        assert "is damaged: stop the server" in log
        assert "Traceback" not in log
        assert not known.refused
        assert {code for code, _ in newcomers.refused} == {20004}
        tell(known.row("registry damaged, restored: known devices", server.data))
        tell(newcomers.row("registry damaged, restored: new devices", server.data))


def _overwrite(registry: Path) -> None:
    """All pages but the first, and those that still stand in the log beside the file."""
    with contextlib.closing(sqlite3.connect(registry)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with registry.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (registry.stat().st_size - 4096))


def _refused_start(server: Server, *options: str) -> str:
    """What a start says that ends at once: one line."""
    words = [*UPLINKD, "serve", "--data", str(server.data), "--listen", "127.0.0.1:0", "--console-listen", "", *options]
    done = subprocess.run(
        words, capture_output=True, timeout=20, check=False, env=environment(), cwd=server.data.parent
    )
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert line.startswith("uplinkd: ")
    return line


# The clock

_DAY = 86_400


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
@pytest.mark.parametrize("days", [10, -10])
async def test_a_clock_that_jumps_loses_nothing_and_recovers(tmp_path: Path, tell: Tell, days: int) -> None:
    """The wall clock of uplinkd's processes is set while they serve, and set right again. Beyond the life of their tokens devices are
    answered 20001 once and sign in anew; a clock that is set back refuses nobody. Ids stay unique."""
    library, clock = tmp_path / "clock.so", tmp_path / "ahead"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(library), str(source)], check=True)
    _set_clock(clock, 0)
    server = Server(tmp_path / "data", LIMITS)
    server.variables = {"LD_PRELOAD": str(library), "CLOCK_AHEAD": str(clock)}
    server.start()
    try:
        load = start_load(server)

        def fault() -> None:
            _set_clock(clock, days)
            time.sleep(3)
            _set_clock(clock, 0)

        await load.run(7, fault, after=1.5)
        assert [code for code, _ in load.refused] == ([20001] * len(load.devices) if days > 0 else [])
        assert not load.broken
        assert re.search(
            rf"the clock was set by {'[+]' if days > 0 else '-'}8(64000|6399[89]|64001) s", server.log.read_text()
        )
        shown = cli_json("device", "list", load.devices[0].product, data=server.data)
        assert {each["state"] for each in shown} == {"online"}
        tell(load.row(f"clock set {abs(days)} days {'forward' if days > 0 else 'back'}, and right again", server.data))
    finally:
        server.kill()


def _set_clock(file: Path, days: int) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)  # never truncated: processes have mapped it
    os.pwrite(descriptor, struct.pack("=q", days * _DAY), 0)
    os.close(descriptor)


# Certificates


async def test_a_replaced_certificate_is_served_without_a_restart(tmp_path: Path, tell: Tell) -> None:
    """Connections that stand go on; new ones see the new certificate within 5 s."""
    with serving(tmp_path / "data", *LIMITS) as server:
        load = start_load(server)
        before = _shown(server)

        def fault() -> None:
            _issue(server, days=90)
            _wait(lambda: _shown(server) != before)

        await load.run(6, fault, after=1)
        assert not load.refused
        assert not load.broken
        tell(load.row("certificate replaced", server.data))


async def test_an_expired_certificate_stops_new_connections_until_it_is_replaced(tmp_path: Path, tell: Tell) -> None:
    """Devices that check it fail in the handshake, whose count grows; those that are connected go on. No restart is needed."""
    with serving(tmp_path / "data", *LIMITS) as server:
        devices = make_devices(server, 8)
        connected, newcomers = Load(devices[:4]), Load(devices[4:])
        _issue(server, days=5 / _DAY)
        expires = time.monotonic() + 5
        async with connected.under_way():
            await asyncio.sleep(expires + 1 - time.monotonic())
            connected.harmed = time.monotonic()
            with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
                await asyncio.to_thread(_shown, server)

            def replace() -> None:
                time.sleep(2)
                _issue(server, days=90)

            await newcomers.run(7, replace, after=0)
        assert not connected.refused
        assert not connected.broken
        assert newcomers.broken
        tell(connected.row("certificate expired: connected devices", server.data))
        tell(newcomers.row("certificate expired, then replaced: new connections", server.data))


async def test_a_key_that_does_not_fit_leaves_the_former_certificate_in_service(tmp_path: Path, tell: Tell) -> None:
    """One line says which file is wrong. A start with such a pair, of the owner's, is refused in one line."""
    with serving(tmp_path / "data", *LIMITS) as server:
        load = start_load(server)
        before = _shown(server)
        folder = server.data / "tls"

        def fault() -> None:
            for kind in ("rsa", "ecdsa"):
                shutil.copy(folder / "ca.key", folder / f"server-{kind}.key")
            time.sleep(3)

        await load.run(6, fault, after=1)
        assert _shown(server) == before
        assert not load.refused
        assert not load.broken
        said = server.log.read_text()
        assert said.count("the changed certificate is not used yet") <= 2 * 2  # pairs and workers
        assert "server-rsa.key is not the private key of" in said
        tell(load.row("key does not fit the certificate", server.data))
        pair = "--tls-cert", str(folder / "server-rsa.pem"), "--tls-key", str(folder / "server-rsa.key")
        assert server.stop() == 0
        assert "server-rsa.key is not the private key of" in _refused_start(server, *pair)


def _wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def _shown(server: Server) -> bytes:
    """The certificate that a new connection is shown, verified as devices do."""
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock,
        server.context().wrap_socket(sock, server_hostname="localhost") as tls,
    ):
        return tls.getpeercert(binary_form=True) or b""


def _issue(server: Server, *, days: float) -> None:
    """New certificates of the server's own authority in place of its two."""
    folder = server.data / "tls"
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(signer, rsa.RSAPrivateKey)
    now = dt.datetime.now(dt.UTC)
    keys: dict[str, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey] = {
        "rsa": rsa.generate_private_key(65537, 2048),
        "ecdsa": ec.generate_private_key(ec.SECP256R1()),
    }
    for kind, key in keys.items():
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]))
            .issuer_name(authority.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=days))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(signer, hashes.SHA256())
        )
        (folder / f"server-{kind}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        (folder / f"server-{kind}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
