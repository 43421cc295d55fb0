"""One server for all tests of real clients; sessions end with their test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.fleet import Fleet, Login, Thing, make_fleet
from tests.clients.session import Session
from tests.house import serving

LIMITS = ("--workers", "2", "--device-rate", "1000", "--auth-rate", "0", "--address-auth-rate", "0")

MakeSession = Callable[..., Session]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All on one xdist worker, for its server takes seconds to start."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("clients"))


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with serving(tmp_path_factory.mktemp("house") / "data", *LIMITS) as server:
        yield make_fleet(server, 400)


@pytest.fixture
def thing(fleet: Fleet) -> Thing:
    """A device of this test alone."""
    return fleet.take()


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, fleet: Fleet) -> Iterator[MakeSession]:
    """Makes a session of a device (or with a login); it is not open yet, and closed when the test ends."""
    monkeypatch.chdir(fleet.server.data.parent)
    with contextlib.ExitStack() as stack:

        def make(who: Thing | Login, *arguments: object, **options: object) -> Session:
            login = who.login() if isinstance(who, Thing) else who
            made = Session(fleet.server, login, *arguments, **options)  # type: ignore[arg-type]  # as Session checks them
            stack.callback(made.close)
            return made

        yield make
