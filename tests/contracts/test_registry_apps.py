"""What every registry promises of applications: their rights, their secrets, and that gateways hear of each change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from uplinkd.core.apps import check_app_secret
from uplinkd.core.errors import Conflict, NotFound, Rejected
from uplinkd.core.model import ProductKey
from uplinkd.registry import Change, Registry, open_registry
from uplinkd.registry.cache import DeviceCache
from uplinkd.settings import Settings

LAMPS, DOORS = "a1Lamps", "a1Doors"


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", database_url=database_url)


@pytest.fixture
def registry(settings: Settings) -> Iterator[Registry]:
    registry = open_registry(settings)
    registry.create_product("lamps", key=LAMPS)
    registry.create_product("doors", key=DOORS)
    yield registry
    registry.close()


def announced(registry: Registry, after: int) -> list[Change]:
    return registry.changes(after)[1]


def of_app(app_id: int) -> Change:
    return Change(ProductKey(""), None, app_id)


def test_a_new_application_has_a_key_and_a_secret_and_what_it_was_given(registry: Registry) -> None:
    """The key names it in subjects and topics; the secret is given once."""
    app, secret = registry.create_app("billing", products=[LAMPS])
    assert re.fullmatch(r"app-[a-z0-9]{12}", app.key)
    assert len(secret) >= 32
    assert (app.name, app.products, app.sends) == ("billing", (LAMPS,), True)
    for found in (
        registry.app("billing"),
        registry.find_app(app.key),
        registry.find_app_by_id(app.id),
        *registry.apps(),
    ):
        assert found == app


def test_by_default_an_application_reaches_nothing(registry: Registry) -> None:
    """Which product it reads is always named."""
    app, _ = registry.create_app("billing", sends=False)
    assert (app.products, app.sends) == ((), False)
    assert registry.find_app(app.key) == app


def test_the_secret_is_kept_nowhere(settings: Settings, registry: Registry) -> None:
    """Neither in the database nor in what is shown of an application."""
    app, secret = registry.create_app("billing")
    registry.close()
    for file in filter(Path.is_file, settings.data.rglob("*")):
        assert secret.encode() not in file.read_bytes()
    assert app.secret_hash.hex() not in repr(app)
    assert repr(app.secret_hash) not in repr(app)


def test_only_the_secret_lets_in(registry: Registry) -> None:
    """An unknown application has none."""
    app, secret = registry.create_app("billing")
    other, other_secret = registry.create_app("other")
    assert check_app_secret(app, secret)
    assert check_app_secret(other, other_secret)
    for wrong in (other_secret, "", secret[:-1], secret + "x", "é" * 43, "\udc80"):
        assert not check_app_secret(app, wrong)
    assert not check_app_secret(None, secret)
    assert not check_app_secret(None, "")


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "ä", "a\n"])
def test_an_application_name_that_breaks_the_rule_is_refused_with_it(registry: Registry, name: str) -> None:
    """The refusal shows the name and says what a name has."""
    with pytest.raises(Rejected, match="1 to 64 letters, digits and - _") as refusal:
        registry.create_app(name)
    assert repr(name) in str(refusal.value)


def test_application_names_are_unique(registry: Registry) -> None:
    """A second one is a Conflict that names it, and is not made."""
    registry.create_app("billing")
    with pytest.raises(Conflict, match="billing"):
        registry.create_app("billing")
    assert [app.name for app in registry.apps()] == ["billing"]


def test_what_is_not_there_is_named(registry: Registry) -> None:
    """With the command that shows what there is; and nothing is done by halves."""
    registry.create_app("billing", products=[LAMPS])
    for act in (
        lambda: registry.app("nobody"),
        lambda: registry.delete_app("nobody"),
        lambda: registry.grant_app("nobody", [LAMPS]),
        lambda: registry.withdraw_app("nobody", [LAMPS]),
    ):
        with pytest.raises(NotFound, match=r"no application 'nobody'.*uplinkd app list"):
            act()
    with pytest.raises(NotFound, match="no product 'a1Nowhere'"):
        registry.create_app("other", products=[LAMPS, "a1Nowhere"])
    with pytest.raises(NotFound, match="no product 'a1Nowhere'"):
        registry.grant_app("billing", [DOORS, "a1Nowhere"])
    with pytest.raises(NotFound, match=r"does not have the product 'a1Doors'.*uplinkd app show billing"):
        registry.withdraw_app("billing", [LAMPS, DOORS])
    assert [(app.name, app.products) for app in registry.apps()] == [("billing", (LAMPS,))]
    assert registry.find_app("app-nobody") is None
    assert registry.find_app_by_id(99) is None


def test_products_are_granted_and_withdrawn(registry: Registry) -> None:
    """Twice is as good as once, and they stand in the order in which they were made."""
    registry.create_app("billing", products=[DOORS, DOORS])
    assert registry.grant_app("billing", [LAMPS, DOORS]).products == (LAMPS, DOORS)
    assert registry.withdraw_app("billing", [DOORS, DOORS]).products == (LAMPS,)
    assert registry.withdraw_app("billing", [LAMPS]).products == ()


def test_a_deleted_application_is_gone_and_its_id_is_not_given_again(registry: Registry) -> None:
    """Its name may be used anew; the new one has another key."""
    first, _ = registry.create_app("billing", products=[LAMPS])
    registry.delete_app("billing")
    assert registry.apps() == []
    assert registry.find_app(first.key) is None
    second, _ = registry.create_app("billing")
    assert (second.id > first.id, second.key != first.key, second.products) == (True, True, ())


def test_every_change_of_an_application_is_announced(registry: Registry) -> None:
    """So that it takes effect at once, wherever the application is connected."""
    cursor = registry.changes_cursor()
    app, _ = registry.create_app("billing")
    for act in (
        lambda: registry.grant_app("billing", [LAMPS]),
        lambda: registry.withdraw_app("billing", [LAMPS]),
        lambda: registry.delete_app("billing"),
    ):
        assert announced(registry, cursor) == [of_app(app.id)]
        cursor = registry.changes_cursor()
        act()
    assert announced(registry, cursor) == [of_app(app.id)]


def test_a_deleted_product_is_withdrawn_from_those_that_had_it(registry: Registry) -> None:
    """They are announced with it; others are not."""
    mine, _ = registry.create_app("billing", products=[LAMPS, DOORS])
    registry.create_app("other", products=[DOORS])
    cursor = registry.changes_cursor()
    registry.delete_product(LAMPS)
    assert registry.app("billing").products == (DOORS,)
    assert set(announced(registry, cursor)) == {of_app(mine.id), Change(ProductKey(LAMPS), None)}


async def test_a_gateway_hears_of_changed_applications_and_keeps_its_devices(registry: Registry) -> None:
    """An application's change is no reason to read every device anew."""
    device = registry.create_device(LAMPS)
    cache = DeviceCache(registry)
    heard: list[Change] = []
    cache.on_change(heard.append)
    entry = await cache.load(device.id)
    app, _ = registry.create_app("billing")
    await cache.follow()
    assert heard == [of_app(app.id)]
    assert cache.get(device.id) is entry
    await cache.close()
