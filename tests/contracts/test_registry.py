"""What every registry promises, whichever database keeps it; and what the one in SQLite promises of its files."""

from __future__ import annotations

import base64
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import SecretStr

from tests.databases import alter, content, execute, locked
from uplinkd.core import names
from uplinkd.core.errors import Conflict, NotFound, Rejected, Unavailable
from uplinkd.core.model import ProductKey, Right, TopicClass
from uplinkd.registry import Change, ImportRow, Registry, Sighting, open_registry
from uplinkd.registry.schema import REVISIONS, metadata
from uplinkd.registry.sql import SqlRegistry
from uplinkd.registry.vault import Vault, fingerprint
from uplinkd.settings import Settings

PRODUCT = "a1Contracts"
EVERYTHING = Change(ProductKey(""), None)

OPEN = """
import sys, time
from pathlib import Path
from uplinkd.registry import open_registry
from uplinkd.settings import Settings

while time.time() < float(sys.argv[2]):
    pass
registry = open_registry(Settings(data=Path(sys.argv[1]), database_url=sys.argv[3]))
print(registry.signing_keys()[0].key.hex())
registry.close()
"""


@pytest.fixture(scope="module", autouse=True)
def migrations() -> None:
    """The real ones."""


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", database_url=database_url)


@pytest.fixture
def registry(settings: Settings) -> Iterator[Registry]:
    registry = open_registry(settings)
    registry.create_product("contracts", key=PRODUCT)
    yield registry
    registry.close()


def rows(*facts: tuple[str, str, str]) -> Iterator[ImportRow]:
    """Import rows as they stand in a file: the first is on line 2, below the names of the columns."""
    return (ImportRow(line, *fact) for line, fact in enumerate(facts, 2))


def changed(registry: Registry, after: int) -> list[Change]:
    return registry.changes(after)[1]


# products


def test_a_new_product_has_a_key_a_secret_and_the_default_topic_classes(registry: Registry) -> None:
    """What is made is what the platform makes: a1 and 9 more characters, a secret of 16, six topic classes."""
    product = registry.create_product("sensors")
    assert product.key.startswith("a1")
    assert len(product.key) == 11
    assert len(product.secret) == 16
    assert registry.product(product.key) == product
    assert registry.topic_classes(product.key) == [TopicClass(*default) for default in names.DEFAULT_CLASSES]


@pytest.mark.parametrize("name", ["abc", "x" * 31, " sensors", "sen\nsors", ""])
def test_a_product_name_that_breaks_the_rule_is_refused_with_it(registry: Registry, name: str) -> None:
    """The refusal shows the name and says what a name has."""
    with pytest.raises(Rejected, match="4 to 30 printable characters") as refusal:
        registry.create_product(name)
    assert repr(name) in str(refusal.value)


def test_product_names_and_keys_are_unique(registry: Registry) -> None:
    """A second product of the same name or key is a Conflict that names it, and is not made."""
    with pytest.raises(Conflict, match="contracts"):
        registry.create_product("contracts")
    with pytest.raises(Conflict, match=PRODUCT):
        registry.create_product("another", key=PRODUCT)
    assert [product.name for product in registry.products()] == ["contracts"]


def test_a_product_with_devices_goes_only_with_them(registry: Registry) -> None:
    """The Conflict says how many devices there are and names the flag; with them all is gone, and the name is free."""
    ids = [registry.create_device(PRODUCT).id for _ in range(3)]
    with pytest.raises(Conflict, match=r"3 devices.*--with-devices"):
        registry.delete_product(PRODUCT)
    assert registry.delete_product(PRODUCT, with_devices=True) == 3
    assert [registry.find_device_by_id(device_id) for device_id in ids] == [None, None, None]
    with pytest.raises(NotFound, match=PRODUCT):
        registry.product(PRODUCT)
    registry.create_product("contracts", key=PRODUCT)
    assert list(registry.devices(PRODUCT)) == []


# devices


def test_a_device_is_found_by_name_and_by_id(registry: Registry) -> None:
    """Both look-ups answer the device that was made, with its secret; another name or id answers None."""
    device = registry.create_device(PRODUCT, "lamp-1", secret="known secret")
    assert device.secret == "known secret"
    assert (device.enabled, device.activated, device.last_seen) == (True, None, None)
    assert registry.find_device(PRODUCT, "lamp-1") == registry.find_device_by_id(device.id) == device
    assert registry.device(PRODUCT, "lamp-1") == device
    assert registry.find_device(PRODUCT, "LAMP-1") is None
    assert registry.find_device("nowhere", "lamp-1") is None
    assert registry.find_device_by_id(device.id + 1) is None


def test_a_device_without_name_and_secret_gets_both(registry: Registry) -> None:
    """What is made keeps the rules for what is given, and is never made twice."""
    made = [registry.create_device(PRODUCT) for _ in range(20)]
    for device in made:
        assert names.check_device_name(device.name) == device.name
        assert len(device.secret) == 32
    assert len({device.name for device in made}) == len({device.secret for device in made}) == 20


@pytest.mark.parametrize("name", ["abc", "x" * 33, "lamp/1", "lamp 1", "", "灯泡一号"])
def test_a_device_name_that_breaks_the_rule_is_refused_with_it(registry: Registry, name: str) -> None:
    """The refusal shows the name and says which characters it may have."""
    with pytest.raises(Rejected, match=r"4 to 32 characters: letters, digits and - _ @ \. :") as refusal:
        registry.create_device(PRODUCT, name)
    assert repr(name) in str(refusal.value)


def test_a_refused_secret_is_not_shown(registry: Registry) -> None:
    """The refusal says how long the secret is, never what it is."""
    with pytest.raises(Rejected, match="this one has 72") as refusal:
        registry.create_device(PRODUCT, "lamp-1", secret="hush-now" * 9)
    assert "hush" not in str(refusal.value)


def test_what_is_not_there_is_named(registry: Registry) -> None:
    """NotFound names the product where that is missing, else the device."""
    for act in (registry.device, registry.reset_secret, registry.delete_device):
        with pytest.raises(NotFound, match="no product 'a1Nowhere'"):
            act("a1Nowhere", "lamp-1")
        with pytest.raises(NotFound, match="no device 'lamp-1'"):
            act(PRODUCT, "lamp-1")
    with pytest.raises(NotFound, match="no product 'a1Nowhere'"):
        registry.create_device("a1Nowhere")
    with pytest.raises(NotFound, match="no product 'a1Nowhere'"):
        list(registry.devices("a1Nowhere"))


def test_a_device_name_is_unique_in_its_product(registry: Registry) -> None:
    """The same name twice is a Conflict; in another product it is another device."""
    registry.create_device(PRODUCT, "lamp-1")
    with pytest.raises(Conflict, match="lamp-1"):
        registry.create_device(PRODUCT, "lamp-1")
    other = registry.create_product("others")
    assert registry.create_device(other.key, "lamp-1").product_key == other.key


def test_an_id_is_never_given_twice(registry: Registry) -> None:
    """A device that is made after the newest was deleted has another id: tokens of the old one do not fit it."""
    first = registry.create_device(PRODUCT, "lamp-1")
    registry.delete_device(PRODUCT, "lamp-1")
    assert registry.create_device(PRODUCT, "lamp-1").id > first.id


def test_disabling_kills_the_tokens_for_good(registry: Registry) -> None:
    """The generation rises with the disabling and stays when the device is enabled: its old tokens remain dead."""
    before = registry.create_device(PRODUCT, "lamp-1")
    disabled = registry.set_enabled(PRODUCT, "lamp-1", False)
    assert not disabled.enabled
    assert disabled.generation == before.generation + 1
    enabled = registry.set_enabled(PRODUCT, "lamp-1", True)
    assert enabled.enabled
    assert enabled.generation == disabled.generation


def test_enabling_an_enabled_device_changes_nothing(registry: Registry) -> None:
    """Nor does disabling a disabled one: neither kills tokens or wakes the gateways."""
    device = registry.create_device(PRODUCT, "lamp-1")
    cursor = registry.changes_cursor()
    assert registry.set_enabled(PRODUCT, "lamp-1", True) == device
    assert registry.changes_cursor() == cursor
    disabled = registry.set_enabled(PRODUCT, "lamp-1", False)
    assert registry.set_enabled(PRODUCT, "lamp-1", False) == disabled


def test_a_reset_secret_is_another_and_kills_the_tokens(registry: Registry) -> None:
    """Secret and generation change; all else stays."""
    before = registry.create_device(PRODUCT, "lamp-1")
    after = registry.reset_secret(PRODUCT, "lamp-1")
    assert after.secret != before.secret
    assert after.generation == before.generation + 1
    assert (after.id, after.enabled, after.created) == (before.id, True, before.created)
    assert registry.device(PRODUCT, "lamp-1") == after


def test_a_fleet_is_listed_by_name_across_batches(registry: Registry) -> None:
    """More devices than one batch holds come once each, in order; a prefix chooses among them, its wildcards are letters."""
    wanted = sorted(f"lamp_{number:04}" for number in range(2001))
    registry.import_devices(rows(*((PRODUCT, name, "s") for name in [*wanted, "lampX0001"])))
    assert [device.name for device in registry.devices(PRODUCT)] == ["lampX0001", *wanted]
    assert [device.name for device in registry.devices(PRODUCT, prefix="lamp_")] == wanted
    assert [device.name for device in registry.devices(PRODUCT, prefix="lamp_200")] == ["lamp_2000"]


def test_the_first_login_stays_and_the_latest_request_rises(registry: Registry) -> None:
    """activated is written once; last_seen never goes back, and a deleted device is passed over."""
    device = registry.create_device(PRODUCT, "lamp-1")
    registry.activate([(device.id, 1000)])
    registry.activate([(device.id, 2000)])
    registry.sighted([Sighting(device.id, 5000, ""), Sighting(device.id + 1, 5000, "")], now=5000, timeout=600)
    registry.sighted([Sighting(device.id, 3000, "")], now=5000, timeout=600)
    found = registry.device(PRODUCT, "lamp-1")
    assert (found.activated, found.last_seen) == (1000, 5000)


# topic classes


def test_a_topic_class_is_added_once_and_removed(registry: Registry) -> None:
    """A leading slash is dropped, the same levels again are a Conflict, what is gone is NotFound."""
    assert registry.add_topic_class(PRODUCT, "/pub", Right.PUBLISH) == TopicClass("pub", Right.PUBLISH)
    with pytest.raises(Conflict, match="pub"):
        registry.add_topic_class(PRODUCT, "pub", Right.BOTH)
    assert registry.topic_classes(PRODUCT)[-1] == TopicClass("pub", Right.PUBLISH)
    registry.remove_topic_class(PRODUCT, "/pub")
    with pytest.raises(NotFound, match="pub"):
        registry.remove_topic_class(PRODUCT, "pub")


def test_wildcards_are_for_subscribing_alone(registry: Registry) -> None:
    """With the right to publish they are refused by name."""
    for right in (Right.PUBLISH, Right.BOTH):
        with pytest.raises(Rejected, match=r"wildcard \+"):
            registry.add_topic_class(PRODUCT, "user/+", right)
    assert registry.add_topic_class(PRODUCT, "user/#", Right.SUBSCRIBE) == TopicClass("user/#", Right.SUBSCRIBE)


def test_a_product_has_at_most_50_custom_classes(registry: Registry) -> None:
    """The defaults do not count; the 51st is refused with the number, and there is room again after a removal."""
    for number in range(50):
        registry.add_topic_class(PRODUCT, f"custom/{number}", Right.BOTH)
    with pytest.raises(Rejected, match="50"):
        registry.add_topic_class(PRODUCT, "custom/50", Right.BOTH)
    registry.remove_topic_class(PRODUCT, "custom/7")
    registry.add_topic_class(PRODUCT, "custom/50", Right.BOTH)
    assert len(registry.topic_classes(PRODUCT)) == 50 + len(names.DEFAULT_CLASSES)


# changes


def test_whatever_a_gateway_may_hold_is_announced(registry: Registry) -> None:
    """Each act on a device names it, each on a product or its classes names the product; a new device is no change."""
    cursor = registry.changes_cursor()
    device = registry.create_device(PRODUCT, "lamp-1")
    assert registry.changes(cursor) == (cursor, [])
    for act in (
        lambda: registry.set_enabled(PRODUCT, "lamp-1", False),
        lambda: registry.set_enabled(PRODUCT, "lamp-1", True),
        lambda: registry.reset_secret(PRODUCT, "lamp-1"),
        lambda: registry.delete_device(PRODUCT, "lamp-1"),
    ):
        act()
        cursor, changes = registry.changes(cursor)
        assert changes == [Change(device.product_key, device.id)]
    for act_on_product in (
        lambda: registry.add_topic_class(PRODUCT, "pub", Right.PUBLISH),
        lambda: registry.remove_topic_class(PRODUCT, "pub"),
        lambda: registry.delete_product(PRODUCT),
    ):
        act_on_product()
        cursor, changes = registry.changes(cursor)
        assert changes == [Change(device.product_key, None)]
    assert registry.changes(cursor) == (cursor, [])


def test_what_failed_is_not_announced(registry: Registry) -> None:
    """A refused act leaves no change behind."""
    cursor = registry.changes_cursor()
    with pytest.raises(NotFound):
        registry.reset_secret(PRODUCT, "nobody")
    with pytest.raises(Rejected):
        registry.add_topic_class(PRODUCT, "a//b", Right.PUBLISH)
    assert registry.changes_cursor() == cursor


def test_a_cursor_from_another_life_of_the_database_means_forget_everything(registry: Registry) -> None:
    """A gateway that was ahead of a restored backup is told so once, and goes on from where the backup stands."""
    cursor, changes = registry.changes(registry.changes_cursor() + 1000)
    assert changes == [EVERYTHING]
    assert registry.changes(cursor) == (cursor, [])


def test_old_changes_go_and_who_missed_them_forgets_everything(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table keeps a bounded number of rows; a cursor that is older than the oldest of them gets the one change for all."""
    module = sys.modules[type(registry).__module__]
    monkeypatch.setattr(module, "KEPT_CHANGES", 10)
    registry.create_device(PRODUCT, "lamp-1")
    cursor = registry.changes_cursor()
    for _ in range(6):
        registry.reset_secret(PRODUCT, "lamp-1")
    assert changed(registry, cursor) != [EVERYTHING]
    for _ in range(6):
        registry.reset_secret(PRODUCT, "lamp-1")
    assert changed(registry, cursor) == [EVERYTHING]
    assert changed(registry, registry.changes_cursor() - 10) != [EVERYTHING]
    assert changed(registry, registry.changes_cursor() - 11) == [EVERYTHING]


# a fleet


def test_a_fleet_keeps_its_identities(registry: Registry) -> None:
    """Secrets come as they are, missing ones are made, unknown ProductKeys become products named after them."""
    report = registry.import_devices(
        rows((PRODUCT, "a", "secret-a"), ("pk9", "lamp@home:1.0", "secret-b"), ("Longer", "x" * 64, ""))
    )
    assert (report.read, report.created, report.secrets_made, report.bad) == (3, 3, 1, [])
    assert report.stored
    assert report.products_created == ["pk9", "Longer"]
    assert registry.device(PRODUCT, "a").secret == "secret-a"
    assert registry.device("pk9", "lamp@home:1.0").secret == "secret-b"
    assert len(registry.device("Longer", "x" * 64).secret) == 32
    assert [product.name for product in registry.products()] == ["contracts", "imported-pk9", "Longer"]
    assert len(registry.topic_classes("pk9")) == len(names.DEFAULT_CLASSES)


BAD_ROWS = (
    (PRODUCT, "good", "s"),
    (PRODUCT, "bad name", "s"),
    ("bad-key", "lamp", "s"),
    (PRODUCT, "lamp", "hush-now" * 9),
    (PRODUCT, "there", "another hush"),
    (PRODUCT, "good", "other hush"),
    (PRODUCT, "good", "s"),
    (PRODUCT, "known", "same"),
    ("sys", "lamp", "s"),
    ("a1Fresh", "lamp", "s"),
)


def test_a_bad_row_keeps_all_out(registry: Registry) -> None:
    """Each bad row is told with its line, the value and the rule, never the secret; nothing at all is stored."""
    for name in ("there", "known"):
        registry.create_device(PRODUCT, name, secret="same")
    report = registry.import_devices(rows(*BAD_ROWS))
    reasons = dict(report.bad)
    assert not report.stored
    assert sorted(reasons) == [3, 4, 5, 6, 7, 10]
    assert "'bad name'" in reasons[3]
    assert "'bad-key'" in reasons[4]
    assert "this one has 72" in reasons[5]
    assert "exists with another DeviceSecret" in reasons[6]
    assert "line 2" in reasons[7]
    assert "'sys'" in reasons[10]
    assert "hush" not in str(report.bad)
    assert [device.name for device in registry.devices(PRODUCT)] == ["known", "there"]
    assert [product.key for product in registry.products()] == [PRODUCT]


def test_the_good_rows_go_in_when_asked(registry: Registry) -> None:
    """With skip_bad the same file leaves its bad rows out; repeated identical rows count as unchanged."""
    for name in ("there", "known"):
        registry.create_device(PRODUCT, name, secret="same")
    report = registry.import_devices(rows(*BAD_ROWS), skip_bad=True)
    assert report.stored
    assert (report.read, report.created, report.unchanged, len(report.bad)) == (10, 2, 2, 6)
    assert [device.name for device in registry.devices(PRODUCT)] == ["good", "known", "there"]
    assert registry.device(PRODUCT, "good").secret == "s"
    assert registry.device(PRODUCT, "there").secret == "same"
    assert registry.device("a1Fresh", "lamp").secret == "s"


def test_a_fleet_that_is_imported_twice_is_unchanged(registry: Registry) -> None:
    """The second time nothing is made, no token dies, and an empty secret leaves the one that is there."""
    fleet = [(PRODUCT, f"lamp-{number}", "" if number % 2 else "s") for number in range(100)]
    registry.import_devices(rows(*fleet))
    before, cursor = list(registry.devices(PRODUCT)), registry.changes_cursor()
    report = registry.import_devices(rows(*fleet))
    assert (report.created, report.unchanged, report.secrets_made, report.stored) == (0, 100, 0, True)
    assert list(registry.devices(PRODUCT)) == before
    assert registry.changes_cursor() == cursor


def test_a_row_that_could_not_be_read_is_bad_with_its_fault(registry: Registry) -> None:
    """Whatever else it holds."""
    report = registry.import_devices([ImportRow(9, PRODUCT, "lamp-1", "s", "it has 1 cell")], skip_bad=True)
    assert report.bad == [(9, "it has 1 cell")]
    assert registry.find_device(PRODUCT, "lamp-1") is None


@pytest.mark.slow
def test_100_000_devices_are_imported_in_well_under_a_minute(registry: Registry) -> None:
    """All of them are there afterwards, and progress was told on the way."""
    told: list[int] = []
    started = time.monotonic()
    report = registry.import_devices(
        (ImportRow(line, PRODUCT, f"device-{line:06}", "s" * 32) for line in range(2, 100_002)), progress=told.append
    )
    taken = time.monotonic() - started
    assert report.stored
    assert report.created == sum(1 for _ in registry.devices(PRODUCT)) == 100_000
    assert told == sorted(told)
    assert told[-1] == 100_000
    assert taken < 30


# secrets at rest


def test_no_secret_lies_open_on_the_disk(registry: Registry, settings: Settings) -> None:
    """Neither database nor log of changes holds a DeviceSecret, a ProductSecret or a signing key."""
    registry.create_product("others", secret="ProductSecret-in-plain")
    registry.create_device(PRODUCT, "lamp-1", secret="DeviceSecret-in-plain")
    registry.import_devices(rows((PRODUCT, "lamp-2", "ImportedSecret-in-plain")))
    key = registry.signing_keys()[0].key
    stored = content(settings)
    assert b"lamp-1" in stored
    assert b"in-plain" not in stored
    assert key not in stored


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    """Folders 0700; database, its companions and the key 0600."""
    settings = Settings(data=tmp_path / "data")
    registry = open_registry(settings)
    path = settings.data / "registry.sqlite"
    for folder in (settings.data, settings.data / "keys"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in (*path.parent.glob(path.name + "*"), settings.data / "keys" / "secret.key"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    registry.close()


def test_everything_is_there_again_after_a_restart(settings: Settings) -> None:
    """Products, devices, classes and signing keys are what they were."""
    first = open_registry(settings)
    product = first.create_product("contracts")
    device = first.create_device(product.key)
    keys = first.signing_keys()
    first.close()
    second = open_registry(settings)
    assert second.products() == [product]
    assert list(second.devices(product.key)) == [device]
    assert [(key.id, key.key, key.retired) for key in keys] == [(1, second.signing_keys()[0].key, None)]
    assert len(keys[0].key) == 32
    second.close()


def test_a_registry_is_not_opened_with_another_key(settings: Settings) -> None:
    """Neither with a wrong setting nor with a wrong file; the line says which key is wanted, and nothing is changed."""
    open_registry(settings).close()
    other = base64.b64encode(bytes(range(32))).decode()
    with pytest.raises(Rejected, match=f"holds another, {fingerprint(bytes(range(32))).hex()}"):
        open_registry(settings.model_copy(update={"secret_key": SecretStr(other)}))
    file = settings.data / "keys" / "secret.key"
    right = file.read_text()
    file.write_text(other)
    with pytest.raises(Rejected, match=r"secret\.key holds another"):
        open_registry(settings)
    file.write_text("not a key")
    with pytest.raises(Rejected, match="32 bytes in base64"):
        open_registry(settings)
    file.write_text(right)
    open_registry(settings).close()


def test_a_lost_key_is_not_replaced(settings: Settings) -> None:
    """Where sealed values exist, a missing key file is refused with what to do; the key as a setting opens them again."""
    open_registry(settings).close()
    file = settings.data / "keys" / "secret.key"
    key = file.read_text().strip()
    file.unlink()
    with pytest.raises(Rejected, match="put the file back"):
        open_registry(settings)
    assert not file.exists()
    open_registry(settings.model_copy(update={"secret_key": SecretStr(key)})).close()


@given(value=st.binary(max_size=64), owner=st.text(max_size=20), other=st.text(max_size=20), place=st.integers(0, 200))
def test_a_sealed_value_opens_for_its_owner_alone(value: bytes, owner: str, other: str, place: int) -> None:
    """What was sealed opens to itself; moved to another owner, changed in any byte or under another key it does not."""
    vault = Vault(b"k" * 32)
    sealed = vault.seal(value, owner=owner)
    assert vault.open(sealed, owner=owner) == value
    assert vault.seal(value, owner=owner) != sealed
    place %= len(sealed)
    altered = sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]
    attempts = [(vault, altered, owner), (Vault(b"K" * 32), sealed, owner)]
    if other != owner:
        attempts.append((vault, sealed, other))
    for keeper, box, claimed in attempts:
        with pytest.raises(Unavailable, match="does not open"):
            keeper.open(box, owner=claimed)


secrets_of_devices = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=64)
names_of_devices = st.from_regex(r"[A-Za-z0-9_@.:-]{4,32}", fullmatch=True)


@hypothesis_settings(max_examples=10, deadline=None)
@given(fleet=st.dictionaries(names_of_devices, secrets_of_devices, max_size=8))
def test_made_one_by_one_or_imported_a_fleet_is_the_same(fleet: dict[str, str]) -> None:
    """Every name and secret that the rules allow comes back as it went in, by either way."""
    with tempfile.TemporaryDirectory() as folder:
        registry = open_registry(Settings(data=Path(folder) / "data"))
        try:
            registry.create_product("one by one", key="single")
            for name, secret in fleet.items():
                registry.create_device("single", name, secret=secret)
            registry.import_devices(rows(*(("imported", name, secret) for name, secret in fleet.items())))
            for key in ("single", "imported") if fleet else ():
                assert {device.name: device.secret for device in registry.devices(key)} == fleet
        finally:
            registry.close()


# opening, and outages


@pytest.mark.slow
def test_processes_that_open_a_new_registry_at_once_agree(tmp_path: Path, database_url: str) -> None:
    """All succeed, and all have the same signing key: one made the tables and the keys, the others waited."""
    if database_url:
        execute(database_url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    moment = time.time() + 1.5
    command = [sys.executable, "-c", OPEN, str(tmp_path / "data"), str(moment), database_url]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [fault for _, fault in answers] == [""] * 4
    assert len({key for key, _ in answers}) == 1


def test_an_up_to_date_registry_opens_without_alembic(tmp_path: Path) -> None:
    """Every command opens the registry: it must not pay for migrations that are not due."""
    settings = Settings(data=tmp_path / "data")
    open_registry(settings).close()
    command = [sys.executable, "-c", OPEN + "print('alembic' in sys.modules)", str(settings.data), "0", ""]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.splitlines()[-1] == "False"


def test_the_migrations_lead_to_the_schema(registry: Registry) -> None:
    """Tables that Alembic made are those that the code expects, and every revision is known to it."""
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "uplinkd.registry:migrations")
    scripts = ScriptDirectory.from_config(config)
    assert tuple(reversed([script.revision for script in scripts.walk_revisions()])) == REVISIONS
    assert isinstance(registry, SqlRegistry)
    with registry.database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_database_of_a_newer_uplinkd_is_refused(settings: Settings) -> None:
    """The line says so and names both schemas; the database is left as it is."""
    open_registry(settings).close()
    alter(settings, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(Rejected, match=r"newer uplinkd.*9999.*0005"):
        open_registry(settings)


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    """A file that stands where the data folder should be: one line with the place and the cause."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Rejected, match=r"file/data.*cannot be written"):
        open_registry(Settings(data=tmp_path / "file" / "data"))


def test_a_file_that_is_no_database_is_unavailable_in_one_line(tmp_path: Path) -> None:
    """And it is not written over."""
    settings = Settings(data=tmp_path)
    file = tmp_path / "registry.sqlite"
    file.write_bytes(b"my holiday photos" * 1000)
    with pytest.raises(Unavailable, match="is damaged") as outage:
        open_registry(settings)
    assert "\n" not in str(outage.value)
    assert file.read_bytes() == b"my holiday photos" * 1000


@pytest.mark.slow
def test_a_lock_that_another_holds_is_an_outage_for_writers_alone(registry: Registry, settings: Settings) -> None:
    """After four or five seconds the writer is told in one line; readers, and so devices, go on meanwhile."""
    registry.create_device(PRODUCT, "lamp-1")
    with locked(settings):
        refused: list[str] = []

        def write() -> None:
            try:
                registry.reset_secret(PRODUCT, "lamp-1")
            except Unavailable as outage:
                refused.append(str(outage))

        writer = threading.Thread(target=write)
        started = time.monotonic()
        writer.start()
        assert registry.find_device(PRODUCT, "lamp-1")
        assert time.monotonic() - started < 2
        writer.join(timeout=20)
        assert 3 < time.monotonic() - started < 15
        assert len(refused) == 1
        assert "lock" in refused[0]
        assert "\n" not in refused[0]
    registry.reset_secret(PRODUCT, "lamp-1")


def test_threads_share_one_registry(registry: Registry) -> None:
    """Writers and readers in several threads at once: all is stored, nothing fails."""
    faults: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(15):
                registry.create_device(PRODUCT, f"lamp-{number}-{step}")
                assert registry.find_device(PRODUCT, f"lamp-{number}-{step}")
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert faults == []
    assert sum(1 for _ in registry.devices(PRODUCT)) == 8 * 15


def test_secrets_stay_out_of_what_is_printed(registry: Registry) -> None:
    """repr() of a product, a device and a signing key shows no secret: they may stand in a log or a traceback."""
    device = registry.create_device(PRODUCT, "lamp-1", secret="hush-hush")
    shown = repr([registry.products(), device, registry.signing_keys(), ImportRow(2, PRODUCT, "a", "hush-hush")])
    assert "hush" not in shown
    assert registry.products()[0].secret not in shown
    assert repr(registry.signing_keys()[0].key) not in shown


def test_a_registry_keeps_no_file_open_after_close(tmp_path: Path) -> None:
    """A command that ends, or a worker that drains, leaves nothing behind."""
    settings = Settings(data=tmp_path / "data")
    registry = open_registry(settings)
    registry.create_product("contracts")
    registry.close()
    opened = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    assert not [path for path in opened if path.startswith(str(tmp_path / "data"))]
