"""Users, sessions, API keys, the audit and repeated creations, in whatever database the registry is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.databases import content
from uplinkd.core.errors import Conflict, NotFound, Rejected, Stale
from uplinkd.core.model import Census, Right, State
from uplinkd.core.operators import Actor, Role, Scope, acting
from uplinkd.registry import Answer, ImportRow, Registry, Sighting, audit, open_registry
from uplinkd.registry.passwords import hash_password
from uplinkd.settings import Settings


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", database_url=database_url)


@pytest.fixture
def registry(settings: Settings) -> Iterator[Registry]:
    registry = open_registry(settings)
    yield registry
    registry.close()


def test_a_password_is_kept_as_argon2id_of_64_mib() -> None:
    """RFC 9106's second recommendation; another each time."""
    assert hash_password("correct horse").startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    assert hash_password("correct horse") != hash_password("correct horse")


def test_users_have_a_role_a_password_and_sessions(registry: Registry) -> None:
    """A new password ends the sessions; so do time and deletion."""
    operators = registry.operators
    user = operators.create_user("alice", Role.ADMIN, "hash", one_time=True)
    assert (user.role.scope, user.one_time, user.last_sign_in) == (Scope.ADMIN, True, None)
    with pytest.raises(Conflict, match="alice"):
        operators.create_user("alice", Role.VIEWER, "hash", one_time=False)
    with pytest.raises(Rejected, match="letters, digits"):
        operators.create_user("a b", Role.VIEWER, "hash", one_time=False)

    operators.open_session(user, "token")
    found = operators.session("token", idle=1000, longest=1000)
    assert found
    assert found.last_sign_in is not None
    time.sleep(0.02)
    assert operators.session("token", idle=5, longest=10_000) is None
    assert operators.session("token", idle=10_000, longest=5) is None
    assert operators.session("guess", idle=10_000, longest=10_000) is None
    renewed = operators.set_password("alice", "other", one_time=False)
    assert operators.session("token", idle=10_000, longest=10_000) is None
    assert not operators.open_session(user, "late")
    assert operators.session("late", idle=10_000, longest=10_000) is None
    assert operators.open_session(renewed, "second")
    operators.close_session("second")
    assert operators.session("second", idle=10_000, longest=10_000) is None


def test_an_admin_stays(registry: Registry) -> None:
    """Neither by a new role nor by deletion is the last one lost."""
    operators = registry.operators
    operators.create_user("alice", Role.ADMIN, "hash", one_time=False)
    for act in (lambda: operators.delete_user("alice"), lambda: operators.set_role("alice", Role.OPERATOR)):
        with pytest.raises(Conflict, match="nobody would be left"):
            act()
    operators.create_user("bob", Role.ADMIN, "hash", one_time=False)
    assert operators.set_role("alice", Role.VIEWER).role is Role.VIEWER
    operators.delete_user("alice")
    assert [user.name for user in operators.users()] == ["bob"]
    with pytest.raises(NotFound):
        operators.delete_user("alice")


def test_of_tokens_and_keys_only_hashes_are_kept(registry: Registry, settings: Settings) -> None:
    """Whoever reads the database signs in nowhere."""
    made, key = registry.operators.create_key("ci", Scope.OPERATE)
    user = registry.operators.create_user("alice", Role.ADMIN, "hash", one_time=False)
    registry.operators.open_session(user, "a session's token")
    registry.operators.begin_answer("order 7", "request")
    registry.operators.keep_answer("order 7", b'{"deviceSecret": "s3cret"}')
    assert key.startswith(made.hint)
    assert len(key) == 48
    everything = content(settings)
    assert b"alice" in everything
    for secret in (key, "a session's token", "s3cret", "order 7"):
        assert secret.encode() not in everything
    found = registry.operators.find_key(key)
    assert found
    assert (found.name, found.scope) == ("ci", Scope.OPERATE)
    assert registry.operators.find_key(key[:-1]) is None
    assert found.last_used is None
    registry.operators.key_used(found.id)
    assert registry.operators.api_keys()[0].last_used is not None
    registry.operators.delete_key("ci")
    assert registry.operators.find_key(key) is None


def test_every_change_is_in_the_audit_with_who_made_it(registry: Registry) -> None:
    """In the same transaction, newest first; what did not happen is not there."""
    acting.set(Actor("alice", "console", "192.0.2.1"))
    product = registry.create_product("my lamps")
    device = registry.create_device(product.key, "lamp-0001")
    registry.set_enabled(product.key, device.name, False)
    registry.set_enabled(product.key, device.name, False)
    registry.add_topic_class(product.key, "user/report", Right.PUBLISH)
    with pytest.raises(Rejected):
        registry.create_device(product.key, "x y")
    with pytest.raises(Conflict):
        registry.delete_product(product.key)
    bad = registry.import_devices([ImportRow(2, product.key, "bad name", "")])
    assert not bad.stored
    found = registry.operators.audit(limit=100)
    assert [(entry.action, entry.target) for entry in found] == [
        ("topic.add", f"{product.key}/user/report"),
        ("device.disable", f"{product.key}/lamp-0001"),
        ("device.create", f"{product.key}/lamp-0001"),
        ("product.create", product.key),
    ]
    assert {entry.actor for entry in found} == {Actor("alice", "console", "192.0.2.1")}
    assert [entry.action for entry in registry.operators.audit(action="device.", limit=100)] == [
        "device.disable",
        "device.create",
    ]
    assert registry.operators.audit(actor="bob", limit=100) == []
    assert registry.operators.audit(target="a%", limit=100) == []
    (first,) = registry.operators.audit(before=found[-2].id, limit=1)
    assert first.action == "product.create"


def test_the_audit_is_bounded(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest entries go first."""
    monkeypatch.setattr(audit, "KEPT_ENTRIES", 10)
    for number in range(30):
        registry.operators.note("test", str(number))
    assert [entry.target for entry in registry.operators.audit(limit=100)] == [
        str(number) for number in range(29, 19, -1)
    ]


def test_a_repeated_creation_is_known_by_its_key(registry: Registry) -> None:
    """Under way, answered, forgotten; with another request it is a conflict."""
    operators = registry.operators
    assert operators.begin_answer("key", "request") is None
    assert operators.begin_answer("key", "request") == Answer(None)
    with pytest.raises(Conflict, match="another request"):
        operators.begin_answer("key", "other request")
    operators.keep_answer("key", b"answer")
    assert operators.begin_answer("key", "request") == Answer(b"answer")
    operators.forget_answer("key")
    assert operators.begin_answer("key", "request") is None


def test_versions_keep_one_change_from_undoing_another(registry: Registry) -> None:
    """Of a product's name, a device's state and secret, an application's products."""
    product = registry.create_product("my lamps")
    device = registry.create_device(product.key, "lamp-0001")
    app, _ = registry.create_app("billing")
    registry.sighted([Sighting(device.id, 1, "")], now=2, timeout=10)
    assert registry.device(product.key, device.name).version == device.version, "a sign of life is no change"
    registry.rename_product(product.key, "our lamps", version=product.version)
    registry.reset_secret(product.key, device.name, version=device.version)
    registry.set_app("billing", [product.key], version=app.version)
    for act in (
        lambda: registry.rename_product(product.key, "their lamps", version=product.version),
        lambda: registry.delete_product(product.key, version=product.version),
        lambda: registry.set_enabled(product.key, device.name, False, version=device.version),
        lambda: registry.reset_secret(product.key, device.name, version=device.version),
        lambda: registry.delete_device(product.key, device.name, version=device.version),
        lambda: registry.set_app("billing", [], version=app.version),
    ):
        with pytest.raises(Stale, match="changed meanwhile"):
            act()
    assert registry.product(product.key).name == "our lamps"
    assert registry.app("billing").products == (product.key,)


def test_pages_and_the_census_tell_states_as_devices_do(registry: Registry) -> None:
    """Online by a session or a late request, offline, never activated, disabled."""
    product = registry.create_product("my lamps")
    now = round(time.time() * 1000)
    made = {
        name: registry.create_device(product.key, name) for name in ("mqtt", "http", "gone", "new1", "off1", "off2")
    }
    sightings = [
        Sighting(made["mqtt"].id, now, "", "0", 1),
        Sighting(made["http"].id, now - 1000, ""),
        Sighting(made["gone"].id, now - 100_000, ""),
        Sighting(made["off1"].id, now, "", "0", 1),
    ]
    registry.sighted(sightings, now=now, timeout=10_000)
    for name in ("off1", "off2"):
        registry.set_enabled(product.key, name, False)

    def names(state: State | None, **options: str) -> list[str]:
        return [each.name for each in registry.page(product.key, state=state, limit=10, timeout=10_000, **options)]

    assert names(State.ONLINE) == ["http", "mqtt"]
    assert names(State.OFFLINE) == ["gone"]
    assert names(State.INACTIVE) == ["new1"]
    assert names(State.DISABLED) == ["off1", "off2"]
    assert names(None, prefix="off", after="off1") == ["off2"]
    for name, device in made.items():
        state = registry.find_device_by_id(device.id)
        assert state
        assert name in names(state.state(now=now, online_timeout=10_000))
    assert registry.census(product.key, timeout=10_000) == Census(6, 2, 1, 1, 2)
    assert registry.census(timeout=10_000) == Census(6, 2, 1, 1, 2)
    other = registry.create_product("no lamps")
    assert registry.census(other.key, timeout=10_000) == Census()


def test_devices_are_deleted_in_parts(registry: Registry) -> None:
    """So that a large product does not hold the database; who was online is told to be offline."""
    product = registry.create_product("my lamps")
    registry.import_devices(ImportRow(number, product.key, f"lamp-{number:04}", "") for number in range(25))
    device = registry.device(product.key, "lamp-0000")
    now = round(time.time() * 1000)
    registry.told([change.id for change in registry.sighted([Sighting(device.id, now, "")], now=now, timeout=10_000)])
    assert [registry.delete_devices(product.key, 10) for _ in range(4)] == [10, 10, 5, 0]
    assert [(change.device_name, change.online) for change in registry.untold(10)] == [("lamp-0000", False)]


def test_an_import_ends_where_its_progress_says_so(registry: Registry) -> None:
    """Nothing is stored, even when that comes while it is being written."""
    for raised_at in (1, 2, 3):
        calls = 0

        def progress(_rows: int, at: int = raised_at) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            registry.import_devices((ImportRow(n, "pk", f"lamp-{n:05}", "") for n in range(1500)), progress=progress)
        assert registry.products() == []
