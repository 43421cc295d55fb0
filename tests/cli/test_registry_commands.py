"""`uplinkd product`, `device` and `topic`: what people and programs see, each line with the rule that was broken."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from uplinkd.cli import uplinkd
from uplinkd.core.errors import Conflict, NotFound, Rejected, Unavailable
from uplinkd.registry.sql import SqlRegistry

PRODUCT = "a1Commands"

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command on a data folder of its own, as in a shell; a refusal is left to the test."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(uplinkd, [*arguments, "--data", str(tmp_path / "data")], input=stdin)

    return run


@pytest.fixture
def shop(run: Run) -> Run:
    """The same, with a product."""
    assert run("product", "create", "commands", "--key", PRODUCT).exit_code == 0
    return run


def document(result: Result) -> Any:
    """The one JSON document on standard output of a command that went well."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(result: Result, kind: type[Rejected] = Rejected) -> str:
    assert isinstance(result.exception, kind), result.output
    return str(result.exception)


def test_a_product_is_made_shown_listed_and_deleted(run: Run) -> None:
    """Its document has productKey, productSecret and name; the list has no secrets."""
    made = document(run("product", "create", "lamps", "--json"))
    assert made.keys() >= {"productKey", "productSecret", "name"}
    assert made["name"] == "lamps"
    assert document(run("product", "show", made["productKey"], "--json")) == made
    listed = document(run("product", "list", "--json"))
    assert [(each["productKey"], each["name"]) for each in listed] == [(made["productKey"], "lamps")]
    assert made["productSecret"] not in json.dumps(listed)
    document(run("product", "delete", made["productKey"], "--json"))
    assert document(run("product", "list", "--json")) == []


def test_people_see_the_same_as_programs(shop: Run) -> None:
    """Without --json the key, the name and the secret stand in plain text."""
    secret = document(shop("product", "show", PRODUCT, "--json"))["productSecret"]
    shown = shop("product", "show", PRODUCT).stdout
    assert PRODUCT in shown
    assert secret in shown
    assert "commands" in shop("product", "list").stdout
    made = shop("device", "create", PRODUCT, "lamp-1", "--secret", "known-secret").stdout
    assert "known-secret" in made
    listed = shop("device", "list", PRODUCT).stdout
    assert "lamp-1" in listed
    assert "inactive" in listed
    assert "known-secret" not in listed


def test_a_product_with_devices_names_the_flag(shop: Run) -> None:
    """The refusal says how many there are and how to delete them too."""
    shop("device", "create", PRODUCT)
    shop("device", "create", PRODUCT)
    assert "2 devices" in refusal(shop("product", "delete", PRODUCT), Conflict)
    assert "--with-devices" in refusal(shop("product", "delete", PRODUCT), Conflict)
    assert shop("product", "delete", PRODUCT, "--with-devices").exit_code == 0


def test_the_life_of_a_device(shop: Run) -> None:
    """create, show, disable, enable, reset-secret and delete, each with the documented keys."""
    made = document(shop("device", "create", PRODUCT, "lamp-1", "--secret", "known-secret", "--json"))
    assert (made["productKey"], made["deviceName"], made["deviceSecret"]) == (PRODUCT, "lamp-1", "known-secret")
    assert (made["state"], made["lastSeen"]) == ("inactive", None)
    assert document(shop("device", "show", PRODUCT, "lamp-1", "--json")) == made
    assert document(shop("device", "disable", PRODUCT, "lamp-1", "--json"))["state"] == "disabled"
    assert document(shop("device", "enable", PRODUCT, "lamp-1", "--json"))["state"] == "inactive"
    reset = document(shop("device", "reset-secret", PRODUCT, "lamp-1", "--json"))
    assert len(reset["deviceSecret"]) == 32
    document(shop("device", "delete", PRODUCT, "lamp-1", "--json"))
    assert "lamp-1" in refusal(shop("device", "show", PRODUCT, "lamp-1"), NotFound)


def test_a_list_of_devices_can_be_narrowed(shop: Run) -> None:
    """--prefix and --limit choose; the order is by name, and no secret is in it."""
    for name in ("lamp-2", "lamp-1", "door-1"):
        shop("device", "create", PRODUCT, name, "--secret", "known-secret")
    listed = shop("device", "list", PRODUCT, "--json")
    assert [each["deviceName"] for each in document(listed)] == ["door-1", "lamp-1", "lamp-2"]
    assert "known-secret" not in listed.stdout
    narrowed = document(shop("device", "list", PRODUCT, "--prefix", "lamp", "--limit", "1", "--json"))
    assert [each["deviceName"] for each in narrowed] == ["lamp-1"]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("product", "create", "abc"), "4 to 30 printable characters"),
        (("product", "create", "lamps", "--key", "a-b"), "1 to 30 letters and digits"),
        (("product", "show", "a1Nowhere"), "no product 'a1Nowhere'"),
        (("device", "create", "a1Nowhere"), "no product 'a1Nowhere'"),
        (("device", "create", PRODUCT, "a b c d"), "'a b c d'"),
        (("device", "create", PRODUCT, "lamp-1", "--secret", "x" * 65), "1 to 64 printable characters"),
        (("topic", "add", PRODUCT, "a-b", "--right", "publish"), "letters, digits and underscores"),
        (("topic", "add", PRODUCT, "user/+", "--right", "both"), "wildcard +"),
        (("topic", "remove", PRODUCT, "nothing"), "no topic class"),
    ],
)
def test_a_refusal_names_the_value_and_the_rule(shop: Run, arguments: tuple[str, ...], rule: str) -> None:
    """Whatever was wrong, the line ends the search."""
    assert rule in refusal(shop(*arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ("topic", "add", PRODUCT, "pub", "--right", "read"),
        ("topic", "add", PRODUCT, "pub"),
        ("device", "list", PRODUCT, "--limit", "0"),
        ("device", "import", "missing.csv"),
        ("product", "create"),
    ],
)
def test_a_wrong_argument_ends_with_exit_code_2(shop: Run, arguments: tuple[str, ...]) -> None:
    """As every command of click does, with its usage."""
    assert shop(*arguments).exit_code == 2


def test_the_command_ends_with_one_line_and_exit_code_1_when_refused(tmp_path: Path) -> None:
    """The whole program: no traceback, nothing on standard output."""
    command = [sys.executable, "-m", "uplinkd", "product", "show", "a1Nowhere", "--data", str(tmp_path / "data")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert "no product 'a1Nowhere'" in ended.stderr


def test_topic_classes_are_listed_added_and_removed(shop: Run) -> None:
    """The document has the class as the platform writes it, its levels and its right."""
    added = document(shop("topic", "add", PRODUCT, "pub", "--right", "publish", "--json"))
    assert added == {"topicClass": f"/{PRODUCT}/${{deviceName}}/pub", "levels": "pub", "right": "publish"}
    listed = document(shop("topic", "list", PRODUCT, "--json"))
    assert added in listed
    assert {"topicClass": f"/{PRODUCT}/${{deviceName}}/user/get", "levels": "user/get", "right": "subscribe"} in listed
    document(shop("topic", "remove", PRODUCT, "pub", "--json"))
    assert added not in document(shop("topic", "list", PRODUCT, "--json"))


def test_a_fleet_comes_in_as_a_spreadsheet_wrote_it(shop: Run, tmp_path: Path) -> None:
    """BOM, CRLF, quoted cells, columns in another order and of other kinds, headings in other cases."""
    file = tmp_path / "fleet.csv"
    file.write_bytes(
        b"\xef\xbb\xbfdevice secret,Nick Name,DEVICENAME,productkey\r\n"
        + f'secret-1,"a, quoted ""name""",lamp-1,{PRODUCT}\r\n,,lamp-2,{PRODUCT}\r\n\r\n'.encode()
    )
    report = document(shop("device", "import", str(file), "--json"))
    assert (report["stored"], report["created"], report["secretsMade"], report["bad"]) == (True, 2, 1, [])
    shown = document(shop("device", "show", PRODUCT, "lamp-1", "--json"))
    assert shown["deviceSecret"] == "secret-1"


BROKEN = f"ProductKey,DeviceName,DeviceSecret\n{PRODUCT},lamp-1,s\n{PRODUCT}\n{PRODUCT},bad name,hush\n"


def test_a_broken_row_keeps_the_fleet_out(shop: Run) -> None:
    """Exit code 1; each bad row with its line and what is wrong, and no secret."""
    result = shop("device", "import", "-", stdin=BROKEN)
    assert result.exit_code == 1
    assert "line 3" in result.stderr
    assert "line 4: DeviceName 'bad name'" in result.stderr
    assert "hush" not in result.output
    assert document(shop("device", "list", PRODUCT, "--json")) == []


def test_the_good_rows_of_a_broken_file_go_in_when_asked(shop: Run) -> None:
    """With --skip-bad the exit code is 0; the document still lists what was left out."""
    report = document(shop("device", "import", "-", "--skip-bad", "--json", stdin=BROKEN))
    assert (report["stored"], report["created"]) == (True, 1)
    assert [row["line"] for row in report["bad"]] == [3, 4]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "empty"),
        (b"DeviceName,DeviceSecret\nlamp-1,s\n", "column ProductKey is missing"),
        (b"ProductKey,Name\na1b,lamp-1\n", "column DeviceName is missing"),
        ("ProductKey,DeviceName,DeviceSecret\na1b,lamp-1,s\na1b,灯泡,s\n".encode("gbk"), "line 3 is not UTF-8"),
        ("ProductKey,DeviceName,DeviceSecret\n".encode("utf-16"), "line 1 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_fleet_is_refused_as_a_whole(shop: Run, content: bytes, rule: str) -> None:
    """The line says what is missing, or where the wrong encoding begins."""
    assert rule in refusal(shop("device", "import", "-", stdin=content))


def test_what_is_exported_can_be_imported(shop: Run, tmp_path: Path) -> None:
    """The three columns, secrets included, in a file for its owner alone; the other registry then knows the same devices."""
    for name in ("lamp-1", "lamp-2"):
        shop("device", "create", PRODUCT, name)
    file = tmp_path / "out.csv"
    assert shop("device", "export", PRODUCT, "--output", str(file)).exit_code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    printed = csv.reader(io.StringIO(shop("device", "export", PRODUCT).stdout))
    assert next(printed) == ["ProductKey", "DeviceName", "DeviceSecret"]
    other = ("--data", str(tmp_path / "other"))
    assert CliRunner().invoke(uplinkd, ["device", "import", str(file), *other]).exit_code == 0
    moved = CliRunner().invoke(uplinkd, ["device", "show", PRODUCT, "lamp-1", "--json", *other])
    assert (
        document(moved)["deviceSecret"] == document(shop("device", "show", PRODUCT, "lamp-1", "--json"))["deviceSecret"]
    )


def test_an_export_that_breaks_off_leaves_the_one_before(
    shop: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody takes a part of a fleet for all of it, whether it ends by an outage or a full disk."""
    shop("device", "create", PRODUCT, "lamp-1")
    (tmp_path / "backups").mkdir()
    file = tmp_path / "backups" / "out.csv"
    (tmp_path / "out").symlink_to(file)
    assert shop("device", "export", PRODUCT, "-o", "out").exit_code == 0
    whole = file.read_text()

    def breaks_off(_: object, product_key: str) -> Iterator[str]:
        yield f"ProductKey,DeviceName,DeviceSecret\n{product_key},"
        raise Unavailable("the registry is away")

    monkeypatch.setattr(SqlRegistry, "export_fleet", breaks_off)
    assert isinstance(shop("device", "export", PRODUCT, "-o", "out").exception, Unavailable)
    assert (file.read_text(), os.listdir(file.parent)) == (whole, ["out.csv"])
    monkeypatch.undo()
    assert "No space left" in refusal(shop("device", "export", PRODUCT, "-o", "/dev/full"))
    assert "too long" in refusal(shop("device", "export", PRODUCT, "-o", "x" * 300))


def test_a_limit_beyond_all_numbers_is_a_wrong_argument(shop: Run) -> None:
    """It is refused as any other, with the exit code 2."""
    assert shop("device", "list", PRODUCT, "--limit", str(2**64)).exit_code == 2


def test_every_command_says_what_it_does(run: Run) -> None:
    """--help of each group and command has a sentence of its own."""
    for group in ("product", "device", "topic"):
        listing = CliRunner().invoke(uplinkd, [group, "--help"])
        assert listing.exit_code == 0
        command = uplinkd.get_command(None, group)  # type: ignore[arg-type]  # the context is not looked at
        for name, each in command.commands.items():  # type: ignore[union-attr]  # these three are groups
            assert each.help, f"{group} {name}"
