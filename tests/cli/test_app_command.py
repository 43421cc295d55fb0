"""`uplinkd app`: what people and programs see of applications' credentials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from uplinkd.cli import uplinkd
from uplinkd.core.errors import Conflict, NotFound, Rejected
from uplinkd.engine.doors import Doors, doors
from uplinkd.settings import Settings

LAMPS, DOORS = "a1Lamps", "a1Doors"


class Shell:
    def __init__(self, data: Path) -> None:
        self._data = data

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(uplinkd, [*arguments, "--data", str(self._data)])

    def json(self, *arguments: str) -> Any:
        result = self(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def refusal(self, *arguments: str) -> Rejected:
        result = self(*arguments)
        assert isinstance(result.exception, Rejected), result.output
        return result.exception


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """On a data folder with two products."""
    monkeypatch.chdir(tmp_path)
    shell = Shell(tmp_path / "data")
    for key in (LAMPS, DOORS):
        assert shell("product", "create", f"product {key}", "--key", key).exit_code == 0
    return shell


def test_the_life_of_an_application(shell: Shell) -> None:
    """create, show, grant, withdraw and delete, each with the documented keys."""
    made = shell.json("app", "create", "billing", "--product", LAMPS)
    secret = made.pop("secret")
    assert len(secret) >= 32
    key = made["key"]
    assert (made["name"], made["products"], made["sends"]) == ("billing", [LAMPS], True)
    assert made["nats"] == {
        "url": "nats://127.0.0.1:4223",
        "user": key,
        "stream": "UPLINKD",
        "consumer": key,
        "inboxPrefix": f"_INBOX.{key}",
    }
    assert made["mqtt"] == {"url": "mqtts://127.0.0.1:8883", "username": key}
    assert shell.json("app", "show", "billing") == made
    assert shell.json("app", "grant", "billing", DOORS, LAMPS)["products"] == [LAMPS, DOORS]
    assert shell.json("app", "withdraw", "billing", LAMPS)["products"] == [DOORS]
    assert shell.json("app", "delete", "billing") == {"name": "billing", "deleted": True}
    assert shell.json("app", "list") == []


def test_people_see_how_to_connect_and_the_secret_once(shell: Shell) -> None:
    """No other command shows it."""
    made = shell("app", "create", "billing", "--product", LAMPS).stdout
    (line,) = (line for line in made.splitlines() if line.startswith("secret"))
    secret = line.split()[1]
    for needed in (
        "nats://127.0.0.1:4223",
        "inbox prefix _INBOX.app-",
        "durable consumer app-",
        "stream UPLINKD",
        "mqtts://127.0.0.1:8883",
    ):
        assert needed in made
    for arguments in (("app", "list"), ("app", "show", "billing"), ("app", "list", "--json")):
        shown = shell(*arguments)
        assert "billing" in shown.output
        assert secret not in shown.output


def test_what_an_application_may_is_said(shell: Shell) -> None:
    """To read and send, to read only, or nothing yet, with the command that changes it."""
    assert f"read and send to {LAMPS}" in shell("app", "create", "one", "--product", LAMPS).output
    assert f"read only {DOORS}" in shell("app", "create", "two", "--product", DOORS, "--read-only").output
    nothing = shell("app", "create", "three")
    assert "do nothing until it has a product: uplinkd app grant three PK" in nothing.stderr
    listed = shell("app", "list").stdout
    for line in (f"read and send to {LAMPS}", f"read only {DOORS}", "do nothing"):
        assert line in listed
    assert f"may read only {DOORS}" in shell("app", "grant", "two", DOORS).stdout
    assert "may do nothing" in shell("app", "withdraw", "two", DOORS).stdout
    assert "is deleted" in shell("app", "delete", "two").stdout


def test_without_a_port_of_ours_it_is_said_where_these_credentials_hold(shell: Shell) -> None:
    """On the owner's servers the owner's accounts do."""
    shell("app", "create", "billing")
    assert shell.json("app", "show", "billing", "--nats-listen", "")["nats"] is None
    assert "nats_listen is empty" in shell("app", "show", "billing", "--nats-listen", "").stdout
    assert "your own accounts" in shell("app", "show", "billing", "--nats-url", "nats://host:4222").stdout
    elsewhere = shell("app", "show", "billing", "--nats-listen", "[::]:4333").stdout
    assert "nats://[::1]:4333" in elsewhere


def test_a_refusal_names_the_value_and_the_rule(shell: Shell) -> None:
    """Whatever was wrong, the line ends the search."""
    shell("app", "create", "billing")
    assert isinstance(shell.refusal("app", "create", "billing"), Conflict)
    assert "1 to 64 letters" in str(shell.refusal("app", "create", "my app"))
    assert "no product 'a1Nowhere'" in str(shell.refusal("app", "create", "other", "--product", "a1Nowhere"))
    assert "no product 'a1Nowhere'" in str(shell.refusal("app", "grant", "billing", "a1Nowhere"))
    assert "does not have the product" in str(shell.refusal("app", "withdraw", "billing", LAMPS))
    for arguments in (("show", "x"), ("delete", "x"), ("grant", "x", LAMPS), ("withdraw", "x", LAMPS)):
        assert isinstance(shell.refusal("app", *arguments), NotFound)
    assert [shell("app", act, "billing").exit_code for act in ("grant", "withdraw")] == [2, 2]


def test_a_door_that_is_open_at_all_addresses_is_told_by_the_askers_name(tmp_path: Path) -> None:
    """Who asks from elsewhere reaches this machine by a name that the settings do not have."""
    everywhere = Settings(data=tmp_path, nats_listen="0.0.0.0:4223", mqtt_listen="[::]:8883")
    assert doors(everywhere, host="iot.example.com") == Doors(
        "nats://iot.example.com:4223", "mqtts://iot.example.com:8883", own_nats=False
    )
    assert doors(everywhere, host="2001:db8::1").mqtt == "mqtts://[2001:db8::1]:8883"
    assert doors(everywhere).nats == "nats://127.0.0.1:4223"
    here = Settings(data=tmp_path, nats_listen="127.0.0.1:4223", mqtt_listen="")
    assert doors(here, host="iot.example.com") == Doors("nats://127.0.0.1:4223", "", own_nats=False)
    own = Settings(data=tmp_path, nats_url="nats://nats.example.com")
    assert doors(own) == Doors("", "mqtts://127.0.0.1:8883", own_nats=True)
