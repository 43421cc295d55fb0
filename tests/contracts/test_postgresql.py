"""What the registry promises where it is in PostgreSQL: who may reach it and how, outages and their end, several gateways, copying."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import event

from tests.contracts.test_presence import PRODUCT
from tests.databases import SERVER, Wire, connected, end_connections, execute, locked, made_database
from tests.house import cli, until
from uplinkd.cli.serve import _told_to_everybody
from uplinkd.core.databases import place_of, without_password
from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.core.model import Right
from uplinkd.core.operators import Scope
from uplinkd.registry import ImportRow, Registry, Sighting, open_registry
from uplinkd.registry import postgresql as postgresql_module
from uplinkd.registry.cache import DeviceCache
from uplinkd.registry.copy import copy_registry
from uplinkd.registry.sql import SqlRegistry
from uplinkd.settings import Settings, load, shown

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600_000
NAMES = ("Lamp_1", "lamp-1", "lamp.1", "lamp:1", "lamp@1", "lamp1", "lampZ", "lamp_", "zzzz", "AAAA")


@pytest.fixture
def settings(postgresql: str, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", database_url=postgresql)


@pytest.fixture
def registry(settings: Settings) -> Iterator[SqlRegistry]:
    registry = SqlRegistry.open(settings)
    registry.create_product("lamps", key=PRODUCT)
    yield registry
    registry.close()


# -- the URL


def test_a_url_is_taken_as_libpq_writes_it() -> None:
    place = place_of(
        "postgresql://me:p%40ss%2F@one:6000,[::1],two.example/regis?sslmode=verify-full&sslrootcert=/ca.pem"
    )
    assert place.hosts == (("one", 6000), ("::1", 5432), ("two.example", 5432))
    assert (place.user, place.password, place.name) == ("me", "p@ss/", "regis")
    assert (place.sslmode, place.root) == ("verify-full", "/ca.pem")
    assert place_of("postgres://me@h/n").sslmode == "prefer"
    assert place_of("postgresql://me@h/n?sslmode=require&sslrootcert=x").sslmode == "verify-ca"
    assert place_of("postgresql://me@/n?host=/run/postgresql").hosts == (("/run/postgresql", 5432),)
    assert str(place) == "postgresql://one:6000,[::1]:5432,two.example:5432/regis"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:hush@host", "names a user and a database"),
        ("postgresql://host/name", "names a user and a database"),
        ("postgresql://me:hush?@host/name", "%40 %2F"),
        ("postgresql://me:hush@host:port/name", "a port is 1 to 65535"),
        ("postgresql://me:hush@host:99999/name", "a port is 1 to 65535"),
        ("postgresql://me:hush@/name", "it names a host"),
        ("postgresql://me:hush@host/name?sslmode=maybe", "sslmode is one of disable, prefer"),
        ("postgresql://me:hush@host/name?sslcert=a", "go together"),
        ("postgresql://me@host/name?password=hush", "may follow the ?"),
        ("mysql://me:hush@host/name", "postgresql://"),
        ("me:hush@host/name", "postgresql://"),
    ],
)
def test_a_wrong_url_is_refused_with_the_rule_and_without_the_password(url: str, words: str) -> None:
    with pytest.raises(Rejected) as refusal:
        load(environment={"UPLINKD_DATABASE_URL": url})
    assert words in str(refusal.value)
    assert "hush" not in str(refusal.value)


def test_a_password_is_shown_nowhere() -> None:
    settings, _ = load(environment={"UPLINKD_DATABASE_URL": "postgresql://me:hu@sh,hush@host/name"})
    assert shown(settings, "database_url") == "postgresql://me:***@host/name"
    assert "hush" not in repr(settings)
    assert "hush" not in repr(place_of(settings.database_url))
    assert without_password("postgresql://me@host/name") == "postgresql://me@host/name"
    by_flag = load({"database_url": "postgresql://me:hush@host/name"})
    (warning,) = _told_to_everybody(*by_flag)
    assert warning.startswith("--database-url has a secret, and each user of this machine sees the command line")
    assert not list(_told_to_everybody(settings, {**by_flag[1], "database_url": "UPLINKD_DATABASE_URL"}))


# -- who cannot be served


def refused(settings: Settings, url: str) -> str:
    begun = time.monotonic()
    with pytest.raises((Unavailable, Rejected)) as refusal:
        open_registry(settings.model_copy(update={"database_url": url}))
    assert time.monotonic() - begun < 5
    assert "\n" not in str(refusal.value)
    assert "hush" not in str(refusal.value)
    return str(refusal.value)


def test_a_server_that_is_not_there_is_named_with_the_reason(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:  # accepts and says nothing
        port = taken.getsockname()[1]
        said = refused(settings, f"postgresql://me:hush@127.0.0.1:{port}/name")
        assert "does not answer in time" in said
    said = refused(settings, f"postgresql://me:hush@127.0.0.1:{port}/name")
    assert f"postgresql://127.0.0.1:{port}/name is away: Connection refused" in said


def test_what_the_server_refuses_is_told_with_what_to_do(
    settings: Settings, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is not there, a user who may not make tables, a server that is too old, one that only reads, an encoding."""
    assert "make it: CREATE DATABASE" in refused(settings, SERVER + "uplinkd_is_not_here")
    role = "uplinkd_test_nobody_" + postgresql.rpartition("_")[2]
    execute(
        postgresql, f"CREATE ROLE {role} LOGIN PASSWORD 'hush'", "DROP SCHEMA public CASCADE", "CREATE SCHEMA public"
    )
    try:
        execute(postgresql, f"GRANT USAGE ON SCHEMA public TO {role}")
        place = place_of(postgresql)
        host, port = place.hosts[0]
        theirs = f"postgresql://{role}:hush@{host}:{port}/{place.name}"
        assert "GRANT CREATE ON SCHEMA public" in refused(settings, theirs)
        execute(postgresql, f"ALTER ROLE {role} SET default_transaction_read_only = on")
        assert "the server only reads, as a standby does" in refused(settings, theirs)
    finally:
        execute(postgresql, f"DROP OWNED BY {role}", f"DROP ROLE {role}")
    monkeypatch.setattr(postgresql_module, "OLDEST", 99)
    assert "uplinkd needs 99 or newer" in refused(settings, postgresql)
    monkeypatch.undo()
    with made_database("_latin", "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0") as latin:
        assert "ENCODING 'UTF8'" in refused(settings, latin)


def test_another_programs_database_is_refused(settings: Settings, postgresql: str) -> None:
    """No table is made beside those of somebody else."""
    execute(postgresql, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public", "CREATE TABLE songs (title text)")
    assert "'songs'" in refused(settings, postgresql)


def test_another_host_is_tried_where_the_first_is_away(settings: Settings, postgresql: str) -> None:
    """As after a fail-over; one that refuses connections costs no time."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = postgresql.replace("@", f"@127.0.0.1:{port},")
    open_registry(settings.model_copy(update={"database_url": url})).close()


# -- TLS and passwords, on a server of the test's own


def test_a_server_that_was_replaced_is_not_gone_back_to(settings: Settings, postgresql: str) -> None:
    """It has an older timeline than one that was seen: its connections in the pool are given up, and new ones refused, with the
    reason. With one host there is nothing to compare."""
    place = place_of(postgresql).hosts[0]
    two = postgresql.replace("@", f"@{place[0]}:{place[1]},")
    for url, replaced in ((two, True), (postgresql, False)):
        registry = SqlRegistry.open(settings.model_copy(update={"database_url": url}))
        assert isinstance(registry.database, postgresql_module.Postgresql)
        assert registry.products() == []
        assert bool(registry.database._timeline) == replaced
        if replaced:
            registry.database._timeline += 1
            for _ in range(2):
                with pytest.raises(
                    Unavailable, match=r"the server was replaced by another .* must come back as a standby"
                ):
                    registry.products()
        registry.close()


@pytest.fixture(scope="module")
def private() -> Iterator[tuple[int, Path]]:
    """The port of a PostgreSQL of the tests' own that takes TLS and passwords alone, and the CA of its certificate."""
    bin_folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    initdb = shutil.which("initdb") or next((str(each / "initdb") for each in reversed(bin_folders)), "")
    if not initdb or not shutil.which("openssl"):
        pytest.skip("initdb or openssl is not installed: PostgreSQL's server programs are needed")
    with tempfile.TemporaryDirectory(prefix="uplinkd-test-") as name:  # where another user may look, as pytest's is not
        Path(name).chmod(0o755)
        with private_server(Path(name), initdb) as port:
            yield port, Path(name) / "ca.pem"


@contextlib.contextmanager
def private_server(folder: Path, initdb: str) -> Iterator[int]:
    home = folder / "pg"
    home.mkdir()
    key, certificate = home / "server.key", folder / "ca.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        [*make.split(), "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (home / "pw").write_text("s3cret/hush\n")
    owner: dict[str, Any] = {}
    if shutil.which("setpriv") and Path("/proc/self").stat().st_uid == 0:  # a server does not run as root
        for path in (home, *home.iterdir()):
            shutil.chown(path, "postgres", "postgres")
        owner = {"user": "postgres", "group": "postgres", "extra_groups": []}
    run = Path(initdb).parent
    data = home / "data"
    made = subprocess.run(
        [initdb, "-D", str(data), "-U", "owner", "--pwfile", str(home / "pw"), "-A", "scram-sha-256", "-N", "-E", "UTF8"],
        capture_output=True, text=True, check=False, cwd=home, **owner,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    hba = "hostssl all all 127.0.0.1/32 scram-sha-256\n"
    (data / "pg_hba.conf").write_text(hba)
    key.chmod(0o600)
    flags = {
        "port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "ssl": "on", "fsync": "off",
        "ssl_cert_file": certificate, "ssl_key_file": key, "max_connections": 20,
    }  # fmt: skip
    options = [part for name, value in flags.items() for part in ("-c", f"{name}={value}")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([run / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd=home, **owner)
    try:
        end = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait(20)


def test_tls_is_what_sslmode_asks_for(private: tuple[int, Path], tmp_path: Path) -> None:
    """Without, with, with a certificate that is checked by a CA and by name; and what goes wrong is told."""
    port, authority = private
    settings = Settings(data=tmp_path / "data")

    def url(host: str, options: str) -> str:
        return f"postgresql://owner:s3cret%2Fhush@{host}:{port}/postgres?{options}"

    for options in ("sslmode=require", "", f"sslmode=verify-full&sslrootcert={authority}"):
        open_registry(settings.model_copy(update={"database_url": url("localhost", options)})).close()
    by_number = f"sslmode=verify-ca&sslrootcert={authority}"
    open_registry(settings.model_copy(update={"database_url": url("127.0.0.1", by_number)})).close()
    assert "pg_hba.conf" in refused(settings, url("localhost", "sslmode=disable"))
    assert "certificate is not trusted" in refused(settings, url("localhost", "sslmode=verify-full"))
    by_name = url("127.0.0.1", f"sslmode=verify-full&sslrootcert={authority}")
    assert "certificate is not trusted" in refused(settings, by_name)
    missing = url("localhost", "sslmode=verify-full&sslrootcert=/nowhere/ca.pem")
    assert "/nowhere/ca.pem of database_url cannot be used" in refused(settings, missing)
    wrong = f"postgresql://owner:hush@localhost:{port}/postgres"
    assert "check user and password" in refused(settings, wrong)


def test_a_server_without_tls_is_refused_where_tls_is_asked_for(settings: Settings, postgresql: str) -> None:
    (row,) = execute(postgresql, "SHOW ssl")
    if row[0] != "off":
        pytest.skip("this PostgreSQL offers TLS")
    assert "does not offer TLS" in refused(settings, postgresql + "?sslmode=require")


# -- outages


def test_ended_connections_are_noticed_before_they_are_used(registry: SqlRegistry, postgresql: str) -> None:
    """After a restart of the server nobody is told of an outage."""
    device = registry.create_device(PRODUCT, "lamp-1")
    for _ in range(3):
        assert end_connections(postgresql) > 0
        time.sleep(0.05)
        found = registry.find_device(PRODUCT, "lamp-1")
        assert found
        assert found.id == device.id
        assert end_connections(postgresql) > 0
        time.sleep(0.05)
        registry.activate([(device.id, 1000)])


def test_a_connection_that_ends_half_way_is_an_outage_and_no_half_act(registry: SqlRegistry, postgresql: str) -> None:
    def cut(_c: Any, _k: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT INTO audit"):
            end_connections(postgresql)
            time.sleep(0.05)

    event.listen(registry.database.writer, "before_cursor_execute", cut)
    with pytest.raises(Unavailable, match="is away"):
        registry.create_device(PRODUCT, "lamp-1")
    event.remove(registry.database.writer, "before_cursor_execute", cut)
    assert registry.find_device(PRODUCT, "lamp-1") is None
    registry.create_device(PRODUCT, "lamp-1")


def test_a_server_that_falls_silent_is_an_outage_within_five_seconds(settings: Settings, postgresql: str) -> None:
    """No answer, and no end of the connection either, as when a machine or a network is gone. It recovers by itself."""
    wire = Wire(postgresql)
    registry = open_registry(settings.model_copy(update={"database_url": wire.url}))
    try:
        registry.create_product("lamps", key=PRODUCT)
        device = registry.create_device(PRODUCT, "lamp-1")
        wire.stalled.set()
        acts: tuple[Callable[[], object], ...] = (
            lambda: registry.find_device(PRODUCT, "lamp-1"),
            lambda: registry.activate([(device.id, 1000)]),
        )
        for act in acts:
            begun = time.monotonic()
            with pytest.raises(Unavailable, match="does not answer in time"):
                act()
            assert time.monotonic() - begun < 6
        begun = time.monotonic()
        for _ in range(50):  # as many devices that ask meanwhile
            with pytest.raises(Unavailable):
                registry.find_device(PRODUCT, "lamp-1")
        assert time.monotonic() - begun < 6
        wire.stalled.clear()
        end = time.monotonic() + 5
        while True:
            with contextlib.suppress(Unavailable):
                assert registry.find_device(PRODUCT, "lamp-1")
                break
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        registry.close()
        wire.close()


def test_a_statement_that_takes_too_long_is_cancelled(registry: SqlRegistry, postgresql: str) -> None:
    """The caller is told within five seconds, and the server does not go on with it."""
    begun = time.monotonic()
    with (
        pytest.raises(Unavailable, match="a statement took longer than 4 s"),
        registry.database.engine.connect() as connection,
    ):
        connection.exec_driver_sql("SELECT pg_sleep(30)")
    assert time.monotonic() - begun < 6
    assert execute(
        postgresql, "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(30)' AND state = 'active'"
    ) == [[0]]


def test_busy_connections_are_bounded(registry: SqlRegistry, settings: Settings, postgresql: str) -> None:
    """However many threads ask at once; and a pool that waits says so."""
    with locked(settings):
        writers = [
            threading.Thread(target=lambda: _quietly(lambda: registry.create_device(PRODUCT))) for _ in range(20)
        ]
        for each in writers:
            each.start()
        time.sleep(0.5)
        (row,) = execute(
            postgresql,
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'uplinkd' AND datname = current_database()",
        )
        assert 1 < row[0] <= 8
        with pytest.raises(Unavailable, match="connections are all busy"):
            registry.find_device(PRODUCT, "x")
        for each in writers:
            each.join(20)


def _quietly(act: Callable[[], object]) -> None:
    with contextlib.suppress(Unavailable):
        act()


def test_a_nul_finds_nothing(registry: Registry) -> None:
    """PostgreSQL has none in a text; a device that sends one is unknown, and no outage."""
    registry.create_device(PRODUCT, "lamp-1")
    assert registry.find_device(PRODUCT, "lamp\0") is None
    assert registry.operators.find_user("\0") is None
    assert list(registry.devices(PRODUCT, prefix="\0")) == []


# -- several gateways


async def test_a_revocation_is_heard_by_another_gateway_within_a_second(
    registry: SqlRegistry, settings: Settings, tmp_path: Path
) -> None:
    """Gateways share the database and the key, and no folder."""
    elsewhere = settings.model_copy(
        update={
            "data": tmp_path / "elsewhere",
            "secret_key": SecretStr((settings.data / "keys/secret.key").read_text().strip()),
        }
    )
    other = open_registry(elsewhere)
    cache = DeviceCache(other)
    following = asyncio.create_task(cache.run())
    try:
        for number in range(5):
            device = registry.create_device(PRODUCT, f"lamp-{number}")
            assert await cache.load(device.id)
            begun = time.monotonic()
            await asyncio.to_thread(registry.set_enabled, PRODUCT, device.name, False)
            await until(lambda d=device: cache.get(d.id) is None, 5)  # type: ignore[misc]
            assert time.monotonic() - begun < 1
        assert other.signing_keys() == registry.signing_keys()
    finally:
        following.cancel()
        await cache.close()
        other.close()


def test_a_gateway_without_the_key_is_refused_at_its_start(
    registry: SqlRegistry, settings: Settings, tmp_path: Path
) -> None:
    """It is told which key is wanted and where to put it; with a copy of the file it serves."""
    elsewhere = settings.model_copy(update={"data": tmp_path / "elsewhere"})
    with pytest.raises(Rejected, match=r"sealed with key [0-9a-f]{8}, and .*elsewhere/keys/secret.key is not there"):
        open_registry(elsewhere)
    (tmp_path / "elsewhere" / "keys").mkdir(parents=True)
    shutil.copy(settings.data / "keys" / "secret.key", tmp_path / "elsewhere" / "keys")
    other = open_registry(elsewhere)
    assert other.products() == registry.products()
    other.close()


def test_no_change_is_passed_over_however_many_write(registry: SqlRegistry, settings: Settings) -> None:
    """Numbers of changes rise in the order of their commits: a poll that has seen one has seen those before it."""
    names = [registry.create_device(PRODUCT, f"lamp-{number}").name for number in range(4)]
    others = [SqlRegistry.open(settings) for _ in names]
    seen: list[int | None] = []
    stop = threading.Event()

    def poll() -> None:
        cursor = start
        while True:
            last = stop.is_set()
            cursor, changed = registry.changes(cursor)
            seen.extend(each.device_id for each in changed)
            if last:
                return

    start = registry.changes_cursor()
    poller = threading.Thread(target=poll)
    poller.start()
    made: list[int] = []

    def work(other: SqlRegistry, name: str) -> None:
        for number in range(12):
            made.append(other.create_device(PRODUCT, f"{name}-{number}").id)
            other.reset_secret(PRODUCT, f"{name}-{number}")

    writers = [threading.Thread(target=work, args=each) for each in zip(others, names, strict=True)]
    for each in writers:
        each.start()
    for each in writers:
        each.join(60)
    stop.set()
    poller.join(10)
    for other in others:
        other.close()
    assert len(made) == 48
    assert sorted(seen) == sorted(made)  # type: ignore[type-var]


def test_the_folders_key_is_not_rotated_behind_other_gateways(registry: SqlRegistry, settings: Settings) -> None:
    done = cli("keys", "rotate", "--database-url", settings.database_url, data=settings.data, check=False)
    assert b"gateways on other machines" in done.stderr


# -- a large fleet


def test_names_stand_in_the_order_of_their_bytes_in_any_database(tmp_path: Path) -> None:
    """Where the database's own order is another one: so that lists, pages and prefixes are those of SQLite."""
    with made_database("_sorted", "TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C.UTF-8'") as url:
        found = []
        for database_url in ("", url):
            registry = open_registry(
                Settings(data=tmp_path / ("p" if database_url else "s"), database_url=database_url)
            )
            registry.create_product("lamps", key=PRODUCT)
            registry.import_devices(ImportRow(line, PRODUCT, name, "s") for line, name in enumerate(NAMES))
            found.append(
                [
                    [device.name for device in registry.devices(PRODUCT)],
                    [device.name for device in registry.devices(PRODUCT, prefix="lamp")],
                    [device.name for device in registry.page(PRODUCT, after="lamp1", limit=3, timeout=TIMEOUT)],
                    [product.key for product in registry.product_page(text="A1PRES", limit=3)],
                    [entry.target for entry in registry.operators.audit(target="a1p", limit=9)],
                    [entry.target for entry in registry.operators.audit(target="A1P", limit=9)],
                ]
            )
            registry.close()
        assert found[0] == found[1]
        assert found[0][0] == sorted(NAMES)


def test_20_000_devices_are_looked_up_by_indexes(registry: SqlRegistry, postgresql: str) -> None:
    """By key, by number, by prefix, a deep page, and whose silence is too long: none reads the whole fleet."""
    registry.import_devices(ImportRow(line, PRODUCT, f"lamp-{line:05}", "s") for line in range(20_000))
    now = round(time.time() * 1000)
    first = registry.device(PRODUCT, "lamp-00000").id
    registry.sighted([Sighting(first + number, now, "::1") for number in range(100)], now=now, timeout=TIMEOUT)
    registry.sighted([Sighting(first, now, "::1", "gate-1.0", 7)], now=now, timeout=TIMEOUT)
    execute(postgresql, "ANALYZE")
    statements: list[tuple[str, Any]] = []

    def note(_c: Any, _k: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(registry.database.engine, "before_cursor_execute", note)
    registry.find_device(PRODUCT, "lamp-01000")
    registry.find_device_by_id(first)
    assert len(registry.page(PRODUCT, prefix="lamp-019", limit=30, timeout=TIMEOUT)) == 30
    assert registry.page(PRODUCT, after="lamp-18999", limit=30, timeout=TIMEOUT)[0].name == "lamp-19000"
    registry.expired(now=now, timeout=TIMEOUT, limit=100)
    registry.changes(registry.changes_cursor())
    assert registry.session_holders() == {"gate-1.0"}
    assert registry.last_session() == 7
    event.remove(registry.database.engine, "before_cursor_execute", note)
    with registry.database.engine.connect() as connection:
        for statement, parameters in statements:
            plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars())
            assert "Seq Scan on devices" not in plan, f"{statement}\n{plan}"
            assert "Sort" not in plan or "devices" not in plan, f"{statement}\n{plan}"
    assert len(statements) > 6


# -- copying


def furnished(settings: Settings) -> SqlRegistry:
    """A registry with something in each table that operators and devices fill."""
    registry = SqlRegistry.open(settings)
    registry.create_product("lamps", key=PRODUCT)
    registry.import_devices(ImportRow(line, PRODUCT, f"lamp-{line:05}", "s") for line in range(6000))
    now = round(time.time() * 1000)
    device = registry.device(PRODUCT, "lamp-00007")
    registry.activate([(device.id, now)])
    registry.sighted([Sighting(device.id, now, "::1", "w", 7)], now=now, timeout=TIMEOUT)
    registry.reset_secret(PRODUCT, "lamp-00008")
    registry.add_topic_class(PRODUCT, "a/+/b", Right.SUBSCRIBE)
    registry.create_app("billing", products=[PRODUCT])
    registry.operators.create_key("ci", Scope.READ)
    registry.operators.note("note", 'tab\there "quoted" 灯\\N\n', "x")
    registry.operators.begin_answer("a", "b")
    registry.create_device(PRODUCT, "gone")
    registry.delete_device(PRODUCT, "gone")
    return registry


def test_a_registry_moves_to_postgresql_and_back(tmp_path: Path, postgresql: str) -> None:
    """Everything is there as it was, tables are told with counts and checksums, and numbers go on after the last that was given."""
    here = Settings(data=tmp_path / "data")
    registry = furnished(here)
    devices, keys, apps = list(registry.devices(PRODUCT)), registry.signing_keys(), registry.apps()
    gone = registry.create_device(PRODUCT, "gone").id
    registry.delete_device(PRODUCT, "gone")
    registry.close()
    told = cli("registry", "copy", "--to", "-", "--json", data=here.data, stdin=f"{postgresql}\n".encode())
    assert b'"devices",\n      "rows": 6000' in told.stdout
    there = here.model_copy(update={"database_url": postgresql})
    moved = SqlRegistry.open(there)
    assert (list(moved.devices(PRODUCT)), moved.signing_keys(), moved.apps()) == (devices, keys, apps)
    assert moved.create_device(PRODUCT, "newer").id > gone
    moved.close()
    back = Settings(data=here.data, database_url=f"sqlite:///{tmp_path / 'back.sqlite'}")
    copied = {each.table: each.rows for each in copy_registry(there, back, lambda *_: None)}
    assert copied["devices"] == 6001
    again = SqlRegistry.open(back)
    assert len(list(again.devices(PRODUCT))) == 6001
    assert again.create_device(PRODUCT, "newest").id > gone + 1
    again.close()


def test_a_copy_is_refused_where_it_would_mix_or_miss_something(tmp_path: Path, postgresql: str) -> None:
    """Into a registry that is in use, into itself, beside a running server; and a password on the command line is warned of."""
    here = Settings(data=tmp_path / "data")
    open_registry(here).close()
    open_registry(here.model_copy(update={"database_url": postgresql})).close()
    done = cli("registry", "copy", "--to", postgresql, data=here.data, check=False)
    assert done.returncode == 1
    assert b"is not empty, there are signing keys in it" in done.stderr
    itself = f"sqlite:///{here.data / 'registry.sqlite'}"
    assert b"already" in cli("registry", "copy", "--to", itself, data=here.data, check=False).stderr
    wrong = cli("registry", "copy", "--to", "postgresql://me:hush@127.0.0.1:1/x", data=here.data, check=False)
    assert b"Connection refused" in wrong.stderr
    assert b"standard input" in wrong.stderr
    assert b"hush" not in wrong.stderr


def test_a_copy_that_differs_is_undone(tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that does not arrive as it was is found by the checksum, and the database is left empty."""
    here = Settings(data=tmp_path / "data")
    furnished(here).close()
    execute(postgresql, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    monkeypatch.setattr(postgresql_module, "_storable", lambda value: value.replace("lamp-00100", "lamp-x0100"))
    with pytest.raises(Unavailable, match=r"lifecycle_changes has .* rows .* with the checksum .*: nothing was copied"):
        copy_registry(here, here.model_copy(update={"database_url": postgresql}), lambda *_: None)
    with connected(postgresql) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        assert cursor.fetchone()[0] == 0


# -- backups


def test_a_backup_leaves_the_registry_to_postgresql(registry: SqlRegistry, settings: Settings, tmp_path: Path) -> None:
    """It says so, and how the rest is backed up; restored, the folder serves the registry that PostgreSQL has."""
    file = tmp_path / "backup.tar"
    options = ("--database-url", settings.database_url)
    done = cli("backup", str(file), *options, data=settings.data, check=False)
    assert b"pg_dump" in done.stderr
    assert b"--without-registry" in done.stderr
    told = cli("backup", str(file), "--without-registry", *options, data=settings.data)
    assert b"the registry is not in it" in told.stdout
    cli("restore", str(file), data=tmp_path / "restored")
    restored = SqlRegistry.open(settings.model_copy(update={"data": tmp_path / "restored"}))
    assert restored.products() == registry.products()
    last = restored.create_device(PRODUCT, "before").id
    advised = re.search(r"SELECT setval.*?;", (ROOT / "docs/en/postgresql.md").read_text(), re.DOTALL)
    assert advised
    execute(settings.database_url, advised[0])
    assert restored.create_device(PRODUCT, "after").id > last + 1_000_000
    restored.close()


def test_nothing_secret_is_logged(registry: SqlRegistry, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        registry.create_device(PRODUCT, "lamp-1", secret="hush-hush")
    assert "hush" not in caplog.text
