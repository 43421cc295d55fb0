"""`uplinkd group`: what people and programs see of consumer groups and their dead letters."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.house import Server, cli
from uplinkd.asking import HookState
from uplinkd.cli import uplinkd
from uplinkd.cli.group_words import hook_state_words, standing_lines
from uplinkd.core.errors import Conflict, NotFound, Rejected
from uplinkd.core.groups import Group, Plan
from uplinkd.core.model import DeviceName, Message, ProductKey
from uplinkd.engine import GroupState
from uplinkd.engine.embedded import announced
from uplinkd.engine.groups import bury, open_desk
from uplinkd.engine.standing import Standing
from uplinkd.registry import open_registry
from uplinkd.settings import Settings

LAMPS, DOORS = "a1Lamps", "a1Doors"
URL = "https://backend.example.com/uplinkd?key=0penSesame"


class Shell:
    def __init__(self, data: Path) -> None:
        self.data = data

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(uplinkd, [*arguments, "--data", str(self.data)])

    def json(self, *arguments: str) -> Any:
        result = self(*arguments, "--json")
        assert result.exit_code == 0, (result.output, result.exception)
        return json.loads(result.stdout)

    def text(self, *arguments: str) -> str:
        result = self(*arguments)
        assert result.exit_code == 0, (result.output, result.exception)
        return result.stdout

    def refusal(self, *arguments: str) -> Rejected:
        result = self(*arguments)
        assert isinstance(result.exception, Rejected), result.output
        return result.exception

    def misuse(self, *arguments: str) -> str:
        result = self(*arguments)
        assert result.exit_code == 2, (result.output, result.exception)
        return " ".join(result.stderr.split())


def furnished(data: Path) -> Shell:
    shell = Shell(data)
    for key in (LAMPS, DOORS):
        assert shell("product", "create", f"product {key}", "--key", key).exit_code == 0
    assert shell("app", "create", "billing", "--product", LAMPS).exit_code == 0
    return shell


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """On a data folder with two products and an application, where no server ever ran."""
    monkeypatch.chdir(tmp_path)
    return furnished(tmp_path / "data")


def test_the_life_of_a_group(shell: Shell) -> None:
    """create, show, change, reset and delete, each with the documented keys."""
    made = shell.json(
        *("group", "create", "reports", "--product", LAMPS, "--kind", "uplink", "--kind", "status"),
        *("--topic", f"/{LAMPS}/+/user/#", "--app", "billing", "--ack-wait", "1m", "--tries", "3"),
    )
    key = shell.json("app", "show", "billing")["key"]
    assert made == {
        "name": "reports",
        "allProducts": False,
        "products": [LAMPS],
        "topic": f"/{LAMPS}/+/user/#",
        "kinds": ["uplink", "status"],
        "start": made["start"],
        "ackWait": 60.0,
        "tries": 3,
        "apps": ["billing"],
        "webhook": None,
        "paused": False,
        "createTime": made["createTime"],
        "amqp": {
            "url": "",
            "userNames": {
                "billing": f"CLIENT_ID|authMode=aksign,signMethod=hmacsha1,timestamp=MILLISECONDS,authId={key},consumerGroupId=reports|"
            },
        },
    }
    assert abs(made["start"] - time.time() * 1000) < 10_000
    listed = shell.json("group", "list")
    assert [(each["name"], each["state"]) for each in listed] == [("reports", None)]
    assert shell.json("group", "show", "reports") == {**made, "state": None}

    changed = shell.json("group", "change", "reports", "--all-products", "--topic", "", "--pause")
    assert changed == {**made, "allProducts": True, "products": [], "topic": "", "paused": True}
    assert "reports (paused)" in shell.text("group", "list")
    assert shell.json("group", "change", "reports", "--resume")["paused"] is False
    assert shell.json("group", "reset", "reports", "--to", "1970-01-01T00:00:05+00:00")["start"] == 5000
    assert shell.json("group", "delete", "reports") == {"name": "reports", "deleted": True}
    assert shell.json("group", "list") == []


def test_a_webhooks_secret_is_shown_once(shell: Shell) -> None:
    """When it is made: with the group, with its first webhook, or anew. The query of its URL is in no list."""
    made = shell.json(
        *("group", "create", "hook", "--all-products", "--webhook", URL, "--form", "batch", "--batch", "50"),
        *("--linger", "500ms", "--lanes", "8", "--timeout", "5"),
    )
    assert made["webhook"] == {"url": URL, "form": "batch", "batch": 50, "linger": 0.5, "lanes": 8, "timeout": 5.0}
    secret = made["secret"]
    assert secret.startswith("whsec_")
    for arguments in (("show", "hook"), ("list",), ("change", "hook", "--lanes", "2")):
        assert secret not in shell.text("group", *arguments)
    assert "secret" not in shell.json("group", "show", "hook")
    assert "0penSesame" not in shell.text("group", "list") + json.dumps(shell.json("group", "list"))
    renewed = shell.json("group", "renew-secret", "hook")["secret"]
    assert renewed != secret
    assert "secret" not in shell.json("group", "change", "hook", "--no-webhook", "--app", "billing")
    assert "no webhook" in str(shell.refusal("group", "renew-secret", "hook"))
    again = shell.text("group", "change", "hook", "--no-apps", "--webhook", URL)
    assert "shown this once" in again
    assert renewed not in again


@pytest.mark.parametrize(
    ("when", "milliseconds"),
    [
        ("2026-11-27T08:00:00Z", round(datetime(2026, 11, 27, 8, tzinfo=UTC).timestamp() * 1000)),
        ("2026-11-27T08:00:00+08:00", round(datetime(2026, 11, 27, tzinfo=UTC).timestamp() * 1000)),
        ("2026-11-27", round(datetime(2026, 11, 27).timestamp() * 1000)),  # noqa: DTZ001 - local time, as typed
        ("now", None),
        ("2h", 7_200_000),
    ],
)
def test_when_a_group_begins(shell: Shell, when: str, milliseconds: int | None) -> None:
    """Now, an age, or a time, which is local without a zone."""
    start = shell.json("group", "create", "reports", "--all-products", "--from", when)["start"]
    if when in ("now", "2h"):
        assert abs(time.time() * 1000 - (milliseconds or 0) - start) < 10_000
    else:
        assert start == milliseconds


def test_what_does_not_go_together_is_a_usage_error(shell: Shell) -> None:
    """It says what is wanted, and nothing is made."""
    assert "--product PK (repeatable), or take --all-products" in shell.misuse("group", "create", "g")
    assert "one of them is wanted" in shell.misuse("group", "create", "g", "--all-products", "--product", LAMPS)
    assert "give its URL with --webhook" in shell.misuse("group", "create", "g", "--all-products", "--lanes", "2")
    assert "such as 90s, 2h or 7d" in shell.misuse("group", "create", "g", "--all-products", "--from", "yesterday")
    assert "one of them is wanted" in shell.misuse("group", "change", "g", "--app", "billing", "--no-apps")
    assert "--all" in shell.misuse("group", "dead", "retry", "g")
    assert "--all" in shell.misuse("group", "dead", "purge", "g", "1", "--all")
    assert shell.json("group", "list") == []


def test_what_is_refused_is_said_in_one_line(shell: Shell) -> None:
    shell.json("group", "create", "reports", "--all-products")
    assert isinstance(shell.refusal("group", "create", "reports", "--all-products"), Conflict)
    assert isinstance(shell.refusal("group", "show", "nobody"), NotFound)
    assert isinstance(shell.refusal("group", "create", "x", "--product", "a1Nowhere"), NotFound)
    assert "tries = 0" in str(shell.refusal("group", "create", "x", "--all-products", "--tries", "0"))
    assert "is like that already" in str(shell.refusal("group", "change", "reports", "--resume"))
    assert isinstance(shell.refusal("group", "dead", "show", "reports", "7"), NotFound)
    assert "say so with --yes" in shell.misuse("group", "dead", "purge", "reports", "--all")


def test_people_are_told_how_to_go_on(shell: Shell) -> None:
    """A group that nobody consumes names the ways; one for an application says how it signs in."""
    assert "uplinkd group change new --app NAME" in shell.text("group", "create", "new", "--all-products")
    text = shell.text(
        "group", "create", "mine", "--all-products", "--app", "billing", "--amqp-listen", "127.0.0.1:5671"
    )
    assert "amqps://127.0.0.1:5671" in text
    assert "consumerGroupId=mine|" in text
    assert "--amqp-listen" in shell.text("group", "show", "mine")


def test_how_far_a_group_is_in_words() -> None:
    """With how old the oldest message is, and whether its webhook counts as dead."""
    lines = standing_lines(
        Group(1, "g", Plan(), 0, 1, 0), Standing(GroupState(12, 3, round(time.time() * 1000) - 150_000, 5, 1, 2), 4.25)
    )
    assert [text for _, text in lines[:2]] == ["12 messages (3 held, 2 offered again)", "4.2 a second"]
    assert lines[2][1].startswith("2 min, stored ")
    assert lines[3][1] == "1 dead letter; uplinkd group dead list g"
    words = hook_state_words(HookState("g", True, 5, 1, 0, 1_000, "HTTP 500", 2_000))
    assert words.startswith("counts as dead, next try 19")
    assert "1 attempt failed" in words
    assert words.endswith(": HTTP 500")


# -- with messages


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A server that runs, with three messages and a dead letter."""
    data = tmp_path_factory.mktemp("groups") / "data"
    server = Server(data).start()
    try:
        shell = furnished(data)
        for name in ("lamp-1", "lamp-2"):
            shell.json("device", "create", LAMPS, name)
        who = ("--product", LAMPS, "--device", "lamp-1", "--url", server.url)
        for text in ("one", "two"):
            cli("publish", f"/{LAMPS}/lamp-1/user/update", text, *who, "--json", data=data)
        yield shell
    finally:
        server.kill()


def buried(data: Path, name: str, *payloads: bytes, first: int = 1) -> None:
    """As a consumer that gives up."""
    settings = Settings(data=data)
    registry = open_registry(settings)
    found = registry.groups.get(name)
    registry.close()

    async def act() -> None:
        desk = await open_desk(announced(settings))
        for number, payload in enumerate(payloads, first):
            topic = f"/{LAMPS}/lamp-1/user/update"
            message = Message(number, topic, ProductKey(LAMPS), DeviceName("lamp-1"), 1000 * number, payload)
            await bury(desk.bus, found, message, 16, "HTTP 500: \x1b[31mno")
        await desk.close()

    asyncio.run(act())


@pytest.mark.slow
def test_how_far_a_group_is(served: Shell) -> None:
    """Lag, rate and age of the oldest message, for people and for programs; without a consumer the lag is all that there is."""
    end = time.monotonic() + 10
    while sum(each["origin"] == "lifecycle" for each in served.json("messages", "list")) < 2:
        assert time.monotonic() < end, "it is not told that the devices were made"
    served.json("group", "create", "all", "--product", LAMPS, "--from", "1h", "--kind", "uplink", "--kind", "lifecycle")
    (listed,) = [each for each in served.json("group", "list") if each["name"] == "all"]
    state = listed["state"]
    assert (state["lag"], state["held"], state["dead"], state["retrying"], state["rate"]) == (4, 0, 0, 0, 0.0)
    assert abs(state["oldest"] - time.time() * 1000) < 60_000
    shown = served.json("group", "show", "all")["state"]
    assert {name: shown[name] for name in state} == state
    assert shown["consumers"] == []
    text = served.text("group", "show", "all")
    assert "lag       4 messages (0 held)" in text
    assert "rate      0.0 a second" in text
    served.json("group", "reset", "all", "--to", "now")
    assert served.json("group", "show", "all")["state"]["lag"] == 0
    served.json("group", "delete", "all")


@pytest.mark.slow
def test_dead_letters_are_looked_at_offered_again_and_thrown_away(served: Shell) -> None:
    """By number, or all; what is in them cannot steer a terminal, and the audit knows of it."""
    served.json("group", "create", "sad", "--product", LAMPS)
    buried(served.data, "sad", b"one", b"\x00\xff", b"three", b"four")
    letters = served.json("group", "dead", "list", "sad")
    assert [each["message"]["messageId"] for each in letters] == [1, 2, 3, 4]
    assert (letters[0]["tries"], letters[0]["reason"]) == (16, "HTTP 500: \x1b[31mno")
    first, second, third = (str(each["number"]) for each in letters[:3])
    text = served.text("group", "dead", "list", "sad", "--limit", "2")
    assert "one" in text
    assert "00ff" in text
    assert "\x1b" not in text
    assert served.json("group", "dead", "list", "sad", "--after", second)[0]["number"] == int(third)
    assert served.json("group", "dead", "show", "sad", first) == letters[0]
    shown = served.text("group", "dead", "show", "sad", first)
    assert "after 16 tries" in shown
    assert "\x1b" not in shown

    assert served.json("group", "dead", "retry", "sad", first, "99999999") == {"name": "sad", "count": 1}
    assert served.json("group", "show", "sad")["state"]["retrying"] == 1
    assert "no dead letter 99999999;" in str(served.refusal("group", "dead", "retry", "sad", "99999999"))
    assert "no dead letter 99999999;" in str(served.refusal("group", "dead", "purge", "sad", "99999999"))
    assert "1 dead letter of sad is gone" in served.text("group", "dead", "purge", "sad", second)
    assert "2 dead letters of sad are offered again" in served.text("group", "dead", "retry", "sad", "--all")
    buried(served.data, "sad", b"five", first=5)
    assert served.json("group", "dead", "purge", "sad", "--all", "--yes")["count"] == 1
    assert served.json("group", "dead", "list", "sad") == []
    registry = open_registry(Settings(data=served.data))
    noted = [(each.action, each.detail) for each in registry.operators.audit(target="sad", limit=10)]
    registry.close()
    assert ("group.retry", f"dead letters {first} 99999999") in noted
    assert ("group.retry", "all") in noted
    assert ("group.purge", f"dead letters {second}") in noted
    assert ("group.purge", "all") in noted
    served.json("group", "delete", "sad")


@pytest.mark.slow
def test_an_application_gets_a_new_secret(served: Shell) -> None:
    """Shown once, as the first one was."""
    renewed = served.json("app", "renew-secret", "billing")
    assert len(renewed["secret"]) >= 32
    assert "secret" not in served.json("app", "show", "billing")
    assert isinstance(served.refusal("app", "renew-secret", "nobody"), NotFound)
