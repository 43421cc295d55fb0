"""The command line on a server elsewhere: the same answers as on the data folder, and plain words where there are none."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import re
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.cli.test_group_command import buried
from tests.house import UPLINKD, Server, environment, until
from uplinkd.cli import uplinkd
from uplinkd.core.errors import Conflict, NotFound, Rejected, Unavailable
from uplinkd.engine import Query
from uplinkd.journal import Wanted
from uplinkd.remote import Remote, RemoteJournal, RemoteReader, RemoteRegistry

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("remote")]

PRODUCT = "a1Remote"
HEADING = "ProductKey,DeviceName,DeviceSecret\n"


@dataclass
class There:
    """A server with a product, three devices, some messages and a refusal, and API keys of each scope."""

    server: Server
    keys: dict[str, str] = field(default_factory=dict)
    message_id: int = 0
    letter: int = 0
    request_id: str = ""

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server.console_port}"

    @property
    def data(self) -> str:
        return str(self.server.data)

    def variables(self, scope: str = "admin", **more: str) -> dict[str, str]:
        return {"UPLINKD_URL": self.url, "UPLINKD_KEY": self.keys[scope], "UPLINKD_CA": str(self.server.ca), **more}

    def here(self, *arguments: str, stdin: str = "") -> Result:
        """On the data folder."""
        return CliRunner().invoke(uplinkd, [*arguments, "--data", self.data], input=stdin)

    def away(self, *arguments: str, stdin: str | bytes = "", scope: str = "admin") -> Result:
        """From another machine, which has a folder of its own."""
        return CliRunner().invoke(uplinkd, [*arguments], input=stdin, env=self.variables(scope))

    def remote(self, scope: str = "admin", **more: Any) -> Remote:
        return Remote(self.url, self.keys[scope], self.server.ca, **more)


def document(result: Result) -> Any:
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def refusal(result: Result, kind: type[Exception] = Rejected) -> str:
    assert isinstance(result.exception, kind), (result.output, result.exception)
    return str(result.exception)


@pytest.mark.parametrize(
    ("url", "proxy", "rule"),
    [
        ("https://灯..x", "", "is not a URL that can be used"),
        ("https://x.invalid", "foo://me:word@proxy", "the proxy that the environment names"),
        ("https://x.invalid", "socks5://proxy", "the proxy that the environment names"),
    ],
)
def test_what_no_connection_can_be_made_with_is_refused_in_a_line(url: str, proxy: str, rule: str) -> None:
    """Without the proxy's password, by what asks once and by what follows."""
    variables = {"UPLINKD_URL": url, "UPLINKD_KEY": "k", "HTTPS_PROXY": proxy}
    for arguments in (("product", "list"), ("messages", "tail")):
        said = refusal(CliRunner().invoke(uplinkd, arguments, env=variables))
        assert rule in said
        assert "word" not in said


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[There]:
    server = Server(tmp_path_factory.mktemp("remote") / "data", ("--console-tls", "true"), console_port=0).start()
    there = There(server)
    try:
        for scope in ("read", "operate", "admin"):
            made = there.here("apikey", "create", f"key-{scope}", "--scope", scope, "--json")
            there.keys[scope] = document(made)["key"]
        there.here("product", "create", "remote", "--key", PRODUCT)
        for name in ("lamp-1", "lamp-2", "door-1"):
            document(there.here("device", "create", PRODUCT, name, "--secret", f"secret-{name}", "--json"))
        document(there.here("app", "create", "reports", "--product", PRODUCT, "--json"))
        who = ("--product", PRODUCT, "--device", "lamp-1", "--url", server.url)
        for text in ("one", "two", "three"):
            sent = there.here("publish", f"/{PRODUCT}/lamp-1/user/update", text, *who, "--json")
            there.message_id = document(sent)["messageId"]
        bad = there.here("publish", f"/{PRODUCT}/lamp-1/user/update", "x", *who, "--secret", "wrong", "--json")
        there.request_id = json.loads(bad.stdout)["requestId"]
        end = time.monotonic() + 5
        while time.monotonic() < end and not (
            document(there.here("logs", "--json"))
            and document(there.here("device", "show", PRODUCT, "lamp-1", "--json"))["lastSeen"]
        ):  # both are recorded within a second
            time.sleep(0.05)
        document(
            there.here("group", "create", "tellers", "--product", PRODUCT, "--app", "reports", "--from", "1h", "--json")
        )
        buried(there.server.data, "tellers", b"one", b"\x00\xff")
        there.letter = document(there.here("group", "dead", "list", "tellers", "--json"))[0]["number"]
        yield there
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of whoever types; nothing may be made in it."""
    for name in [name for name in os.environ if name.startswith("UPLINKD_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert [each for each in folder.iterdir() if each.suffix != ".csv"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("product", "list"),
        ("product", "show", PRODUCT),
        ("device", "list", PRODUCT),
        ("device", "list", PRODUCT, "--prefix", "lamp", "--limit", "1"),
        ("device", "show", PRODUCT, "lamp-1"),
        ("topic", "list", PRODUCT),
        ("app", "list", "--mqtt-listen", "MQTT"),
        ("app", "show", "reports", "--mqtt-listen", "MQTT"),
        ("group", "list"),
        ("group", "show", "tellers"),
        ("group", "dead", "list", "tellers"),
        ("group", "dead", "list", "tellers", "--limit", "1"),
        ("group", "dead", "show", "tellers", "LETTER"),
        ("apikey", "list"),
        ("user", "list"),
        ("messages", "list"),
        ("messages", "list", "--limit", "2", "--product", PRODUCT, "--device", "lamp-1", "--since", "1h"),
        ("messages", "list", "--topic", "/nothing/here/user/update"),
        ("messages", "show", "MESSAGE"),
        ("logs",),
        ("logs", "REQUEST"),
        ("logs", "--device", "lamp-1", "--code", "20000", "--since", "1h", "--limit", "1"),
        ("logs", "--code", "40000"),
    ],
)
def test_what_is_shown_is_the_same(there: There, arguments: tuple[str, ...]) -> None:
    """As JSON and as text; an address that the local command is given stands in the server's settings."""
    mqtt = f"127.0.0.1:{there.server.mqtt_port}"
    names = {"MESSAGE": str(there.message_id), "REQUEST": there.request_id, "LETTER": str(there.letter), "MQTT": mqtt}
    named = [names.get(each, each) for each in arguments]
    asked = [each for each in named if each not in ("--mqtt-listen", mqtt)]
    for form in (["--json"], []):
        for _ in range(3):  # a device's last sign of life may be recorded just now
            away, here = there.away(*asked, *form), there.here(*named, *form)
            if AGE.sub("…", away.stdout) == AGE.sub("…", here.stdout):
                break
        assert away.exit_code == 0
        assert AGE.sub("…", away.stdout) == AGE.sub("…", here.stdout)
        assert away.stderr == here.stderr


AGE = re.compile(r"\b\d+ (s|min)\b")  # of a group's oldest message, which grows

RANDOM = re.compile(
    r'("(?:productKey|productSecret|deviceSecret|secret|key|password|user|username|consumer|inboxPrefix|url|hint)": )"[^"]*"'
    r'|("(?:createTime|messageId|lastUsed|generateTime|start)": )\d+'
)

LIVES = [
    [("product", "create", "NAME-x", "--key", "a1xNAME"), ("product", "show", "a1xNAME"),
     ("product", "delete", "a1xNAME")],
    [("product", "create", "NAME-y")],
    [("product", "create", "NAME-z", "--key", "a1yNAME"), ("device", "create", "a1yNAME", "NAME-1"),
     ("device", "create", "a1yNAME", "NAME-2"), ("product", "delete", "a1yNAME", "--with-devices")],
    [("device", "create", PRODUCT, "NAME-1", "--secret", "known"), ("device", "show", PRODUCT, "NAME-1"),
     ("device", "disable", PRODUCT, "NAME-1"), ("device", "enable", PRODUCT, "NAME-1"),
     ("device", "reset-secret", PRODUCT, "NAME-1"), ("device", "delete", PRODUCT, "NAME-1")],
    [("topic", "add", PRODUCT, "/NAME/a/#", "--right", "subscribe"), ("topic", "remove", PRODUCT, "/NAME/a/#")],
    [("app", "create", "NAME", "--read-only"), ("app", "grant", "NAME", PRODUCT), ("app", "withdraw", "NAME", PRODUCT),
     ("app", "delete", "NAME")],
    [("app", "create", "NAME"), ("app", "renew-secret", "NAME"), ("app", "delete", "NAME")],
    [("group", "create", "NAME", "--product", PRODUCT, "--kind", "status", "--app", "reports", "--from", "2026-11-27T08:00Z"),
     ("group", "change", "NAME", "--all-products", "--topic", "/+/+/user/#", "--tries", "3", "--pause"),
     ("group", "change", "NAME", "--product", PRODUCT, "--no-apps", "--webhook", "https://NAME.example.com/?key=1"),
     ("group", "change", "NAME", "--lanes", "2", "--resume"), ("group", "renew-secret", "NAME"),
     ("group", "change", "NAME", "--no-webhook"), ("group", "reset", "NAME", "--to", "2026-11-27T08:00Z"),
     ("group", "dead", "retry", "NAME", "--all"),
     ("group", "dead", "purge", "NAME", "--all", "--yes"),
     ("group", "delete", "NAME")],
    [("apikey", "create", "NAME", "--scope", "read"), ("apikey", "delete", "NAME")],
    [("user", "create", "NAME", "--role", "viewer"), ("user", "password", "NAME"), ("user", "role", "NAME", "operator"),
     ("user", "delete", "NAME")],
    [("send", PRODUCT, "door-1", f"/{PRODUCT}/door-1/user/get", '{"to":"NAME"}')],
    [("send", PRODUCT, "--all", f"/broadcast/{PRODUCT}/NAME", "-")],
    [("device", "import", "-")],
]  # fmt: skip


@pytest.mark.parametrize("life", LIVES, ids=lambda life: " ".join(life[0][:2]))
def test_what_is_done_is_the_same(there: There, life: list[tuple[str, ...]]) -> None:
    """Each step answers the same here and there, but for what is made at random."""
    for step in life:
        answers = []
        for run, name in ((there.here, "here"), (there.away, "away")):
            words = [each.replace("NAME", name) for each in step]
            stdin = f"{HEADING}{PRODUCT},{name}-7,s7\n" if "import" in step else "payload"
            told = run(*words, "--json", stdin=stdin)
            document(told)
            answers.append(RANDOM.sub(lambda found: f"{found[1] or found[2]}…", told.stdout).replace(name, "NAME"))
        assert answers[0] == answers[1], step


def test_people_see_the_one_time_password(there: There) -> None:
    """The one that the server has made, in the line that says it is shown once."""
    made = there.away("user", "create", "people", "--role", "viewer").stdout
    renewed = there.away("user", "password", "people").stdout
    passwords = [re.search(r"^password  (\S+) .*one-time", text, re.MULTILINE) for text in (made, renewed)]
    assert passwords[0]
    assert passwords[1]
    assert passwords[0][1] != passwords[1][1]
    there.away("user", "delete", "people")


def test_a_fleet_goes_up_and_comes_down(there: There, elsewhere: Path) -> None:
    """5,000 rows with a bad one: none is stored, then all but that; the export has them, readable by its owner alone."""
    rows = "".join(f"a1Fleet,device{number:04},secret{number}\n" for number in range(4_999))
    (elsewhere / "fleet.csv").write_text(f"{HEADING}{rows}a1Fleet,bad name,hush\n")
    refused = there.away("device", "import", "fleet.csv")
    assert refused.exit_code == 1
    assert "line 5001: DeviceName 'bad name'" in refused.stderr
    assert "hush" not in refused.output
    report = document(there.away("device", "import", "fleet.csv", "--skip-bad", "--json"))
    assert (report["stored"], report["read"], report["created"], report["badRows"]) == (True, 5_000, 4_999, 1)
    assert report["productsCreated"] == ["a1Fleet"]
    assert there.away("device", "export", "a1Fleet", "-o", "out.csv").exit_code == 0
    out = elsewhere / "out.csv"
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert out.read_bytes().decode().replace("\r\n", "\n") == HEADING + rows
    assert there.away("device", "export", "a1Fleet").stdout == there.here("device", "export", "a1Fleet").stdout
    listed = document(there.away("device", "list", "a1Fleet", "--json"))
    assert [each["deviceName"] for each in listed] == [f"device{number:04}" for number in range(4_999)]
    assert document(there.away("product", "delete", "a1Fleet", "--with-devices", "--json"))["devices"] == 4_999


def test_of_very_many_bad_rows_the_first_are_told(there: There) -> None:
    """And how many there are in all."""
    fleet = HEADING + f"{PRODUCT},no name,x\n" * 150
    report = json.loads(there.away("device", "import", "-", "--json", stdin=fleet).stdout)
    assert (report["stored"], report["badRows"], len(report["bad"])) == (False, 150, 100)
    assert "150 of 150 rows are bad" in there.away("device", "import", "-", stdin=fleet).stderr


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("product", "show", "a1Nowhere"), NotFound, "no product 'a1Nowhere'"),
        (("device", "list", "a1Nowhere"), NotFound, "no product 'a1Nowhere'"),
        (("device", "export", "a1Nowhere", "-o", "never.txt"), NotFound, "no product 'a1Nowhere'"),
        (("product", "delete", f"{PRODUCT}/devices/lamp-1"), NotFound, "names have no slash"),
        (("product", "show", ".."), NotFound, "'..'"),
        (("product", "show", ""), NotFound, "''"),
        (("product", "show", "\udcff"), NotFound, "not UTF-8"),
        (("product", "delete", PRODUCT), Conflict, "--with-devices"),
        (("product", "create", "abc"), Rejected, "4 to 30 printable characters"),
        (("device", "create", PRODUCT, "lamp-1"), Conflict, "'lamp-1'"),
        (("device", "import", "-"), Rejected, "the file is empty"),
        (("app", "withdraw", "reports", "a1Nowhere"), NotFound, "does not have the product 'a1Nowhere'"),
        (("group", "show", "nobody"), NotFound, "no consumer group 'nobody'"),
        (("group", "create", "tellers", "--all-products"), Conflict, "'tellers' already"),
        (("group", "create", "new", "--product", "a1Nowhere"), NotFound, "no product 'a1Nowhere'"),
        (("group", "change", "tellers", "--tries", "0"), Rejected, "tries = 0"),
        (("group", "dead", "show", "tellers", "99999"), NotFound, "has no dead letter 99999"),
        (("group", "dead", "retry", "tellers", "99998", "99999"), NotFound, "has no dead letter 99998, 99999"),
        (("group", "dead", "purge", "tellers", "99999"), NotFound, "has no dead letter 99999"),
        (("group", "dead", "list", "nobody"), NotFound, "no consumer group 'nobody'"),
        (("topic", "add", PRODUCT, "user/+", "--right", "both"), Rejected, "wildcard +"),
        (("topic", "remove", PRODUCT, "nothing"), Rejected, "no topic class"),
        (("messages", "show", "1"), NotFound, "no message 1 is stored"),
        (("messages", "list", "--product", "*"), Rejected, "'*'"),
        (("send", PRODUCT, "nobody", f"/{PRODUCT}/nobody/user/get", "x"), NotFound, "nobody"),
        (("user", "role", "admin", "viewer"), Conflict, "admin"),
    ],
)
def test_a_refusal_is_the_servers(there: There, arguments: tuple[str, ...], kind: type[Rejected], words: str) -> None:
    """The kind that the local command raises, with the value and the rule."""
    assert words in refusal(there.away(*arguments), kind)


def test_a_key_of_scope_read_sees_no_secrets(there: There) -> None:
    """Devices and products are shown without them, with a note; what needs more says so."""
    shown = there.away("device", "show", PRODUCT, "lamp-1", "--json", scope="read")
    found = document(shown)
    assert "deviceSecret" not in found
    assert found["state"] == "online"
    assert "deviceSecret is left out" in shown.stderr
    assert "left out" in there.away("product", "show", PRODUCT, scope="read").stdout
    assert "secret-lamp-1" not in there.away("device", "show", PRODUCT, "lamp-1", scope="read").output
    for arguments in (("device", "disable", PRODUCT, "lamp-1"), ("device", "export", PRODUCT)):
        assert "this needs the scope operate" in refusal(there.away(*arguments, scope="read"))
    assert "this needs the scope admin" in refusal(there.away("user", "list", scope="operate"))


def test_a_wrong_key_is_never_repeated(there: There) -> None:
    """Neither by the server nor by us, be it one that cannot be sent."""
    for key in ("uplk_wrong", "uplk wrong", "uplk_wröng", "uplk\nwrong"):
        told = CliRunner().invoke(uplinkd, ["product", "list", "--key", key], env=there.variables())
        assert key not in refusal(told)
    assert "not known" in refusal(
        CliRunner().invoke(uplinkd, ["product", "list", "--api-key", "uplk_wrong"], env=there.variables())
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--url", "http://127.0.0.1:1"), "nothing listens at http://127.0.0.1:1"),
        (("--url", "https://nowhere.invalid"), "nowhere.invalid"),
        (("--url", "http://192.0.2.1:8080"), "cross the network in clear"),
        (("--url", "https://me:hush@127.0.0.1:1"), "user name or a password"),
        (("--url", "ftp://127.0.0.1"), "not a URL such as https://"),
        (("--url", "https://127.0.0.1:99999"), "not a URL"),
        (("--ca", "/nonexistent.pem"), "/nonexistent.pem"),
    ],
)
def test_what_cannot_be_reached_is_said_in_one_line(there: There, options: tuple[str, ...], words: str) -> None:
    """With what to do, and without the key."""
    told = CliRunner().invoke(uplinkd, ["product", "list", *options], env=there.variables())
    assert isinstance(told.exception, Rejected | Unavailable), told.output
    assert words in str(told.exception)
    assert "\n" not in str(told.exception)
    assert there.keys["admin"] not in f"{told.exception} {told.output}"
    assert "hush" not in str(told.exception)


def test_a_certificate_that_is_not_trusted_names_the_flag(there: There) -> None:
    """Both for one call and for what is followed."""
    variables = {**there.variables(), "UPLINKD_CA": ""}
    for command in (["product", "list"], ["messages", "tail"], ["logs", "--follow"]):
        told = refusal(CliRunner().invoke(uplinkd, command, env=variables), Unavailable)
        assert "is not trusted" in told, command
        assert "--ca" in told, command


def test_the_port_of_devices_is_not_the_consoles(there: There) -> None:
    """A hint says which port is meant."""
    command = ["product", "list", "--url", there.server.url]
    told = refusal(CliRunner().invoke(uplinkd, command, env=there.variables()), Unavailable)
    assert "is not of uplinkd's management API" in told
    assert "console_listen" in told


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (("product", "list", "--url", "https://a", "--data", "d"), {}, "--data"),
        (("product", "list", "--url", "https://a", "--database-url", "sqlite://"), {}, "--database-url"),
        (("product", "list", "--url", "https://a", "--config", "f.toml"), {}, "--config"),
        (("product", "list", "--url", "https://a"), {}, "UPLINKD_KEY"),
        (("product", "list", "--key", "uplk_x"), {}, "--url"),
        (("product", "list"), {"UPLINKD_URL": "https://a"}, "UPLINKD_KEY"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(
    arguments: tuple[str, ...], variables: dict[str, str], words: str
) -> None:
    """Exit code 2, before anything is asked."""
    told = CliRunner().invoke(uplinkd, arguments, env=variables)
    assert told.exit_code == 2, told.output
    assert words in told.stderr


def test_a_flag_for_this_machine_wins_over_the_environment(there: There) -> None:
    """Where UPLINKD_URL stands for every day, --data is still this machine; and settings pass over the three variables."""
    variables = there.variables(UPLINKD_URL="https://192.0.2.1")
    told = CliRunner().invoke(uplinkd, ["product", "list", "--json", "--data", there.data], env=variables)
    assert PRODUCT in [each["productKey"] for each in document(told)]
    assert CliRunner().invoke(uplinkd, ["settings"], env=variables).exit_code == 0


def test_the_key_may_come_on_standard_input(there: There) -> None:
    """One line; what follows is the command's."""
    variables = there.variables(UPLINKD_KEY="")
    stdin = f"{there.keys['operate']}\n{HEADING}{PRODUCT},lamp-9,s9\n"
    told = CliRunner().invoke(uplinkd, ["device", "import", "-", "--key", "-", "--json"], input=stdin, env=variables)
    assert document(told)["created"] == 1
    there.here("device", "delete", PRODUCT, "lamp-9")


@contextlib.contextmanager
def following(there: There, *arguments: str) -> Iterator[Callable[[], list[Any]]]:
    """A command that goes on; what it has said so far. It ends well by Ctrl-C."""
    process = subprocess.Popen(
        [*UPLINKD, *arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(**there.variables()),
    )  # fmt: skip
    said: list[Any] = []
    assert process.stdout
    reading = threading.Thread(target=lambda: said.extend(json.loads(line) for line in process.stdout or ()))
    reading.start()
    try:
        yield lambda: said
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 0
    finally:
        process.kill()
        _, complaints = process.wait(), process.stderr.read() if process.stderr else b""
        reading.join(5)
        process.stdout.close()
        if process.stderr:
            process.stderr.close()
        assert complaints == b"", complaints.decode()


async def test_messages_are_followed(there: There) -> None:
    """With --since first those since then, each once and in order; then those that arrive."""
    who = ("--product", PRODUCT, "--device", "lamp-2", "--url", there.server.url)
    topic = f"/{PRODUCT}/lamp-2/user/update"
    with following(there, "messages", "tail", "--since", "1h", "--topic", topic) as said:
        ids = [document(there.here("publish", topic, "a", *who, "--json"))["messageId"]]
        await until(lambda: len(said()) == 1)
        ids += [document(there.here("publish", topic, text, *who, "--json"))["messageId"] for text in ("b", "c")]
        await until(lambda: len(said()) == 3)
        assert [each["messageId"] for each in said()] == ids


async def test_refusals_are_followed(there: There) -> None:
    """Those since a time first; also of one request alone, by which the stream itself does not filter."""
    who = ("--product", PRODUCT, "--device", "door-1", "--url", there.server.url, "--secret", "wrong")
    with (
        following(there, "logs", "--follow", "--since", "1h", "--device", "door-1") as said,
        following(there, "logs", "--follow", "--since", "1h", there.request_id) as one,
    ):
        for count in (1, 2):
            there.here("publish", f"/{PRODUCT}/door-1/user/update", "x", *who)
            await until(lambda count=count: len(said()) == count)  # type: ignore[misc]  # bound here
        await until(lambda: len(one()) == 1)
        assert {each["deviceName"] for each in said()} == {"door-1"}
        assert one()[0]["requestId"] == there.request_id


# -- a server that fails as told


@dataclass
class Actor:
    """Answers requests as `acts` say, in turn: a status and a body, or None to break off. `heard` has (method, path, headers)."""

    acts: list[tuple[int, Any] | None]
    heard: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def remote(self, **more: Any) -> Remote:
        return Remote(self.url, "uplk_known", **more)


@pytest.fixture
def actor() -> Iterator[Actor]:
    acted = Actor([])

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            while "chunked" in self.headers.get("Transfer-Encoding", "") and (size := int(self.rfile.readline(), 16)):
                self.rfile.read(size + 2)
            acted.heard.append((self.command, self.path, dict(self.headers)))
            act = acted.acts.pop(0)
            self.close_connection = True
            if act is None:
                return
            status, body = act
            content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Connection", "close")
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:1/")
            if isinstance(body, str) and body.startswith((":", "event")):
                self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815 - the library's names

        def log_message(self, *_: Any) -> None:
            """Nothing: tests look at what was heard."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        acted.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield acted
        server.shutdown()
        thread.join()


MADE = {"productKey": "a1x", "name": "lamps", "createTime": 1, "productSecret": "s"}


def test_a_creation_whose_answer_was_lost_is_sent_again(actor: Actor) -> None:
    """Once, with the same Idempotency-Key; another creation has another one."""
    actor.acts = [None, (201, MADE), (201, MADE)]
    with contextlib.closing(RemoteRegistry(actor.remote())) as registry:
        assert registry.create_product("lamps").secret == "s"
        registry.create_product("lamps")
    first, again, other = (headers["Idempotency-Key"] for _, _, headers in actor.heard)
    assert first == again
    assert other != first


def test_a_connection_that_always_breaks_is_given_up(actor: Actor) -> None:
    """After the second time; the line says where."""
    actor.acts = [None, None]
    with contextlib.closing(RemoteRegistry(actor.remote())) as registry, pytest.raises(Unavailable) as told:
        registry.create_product("lamps")
    assert actor.url in str(told.value)
    assert "say https://" in str(told.value)  # what a port with TLS does when it is called without
    assert actor.acts == []


JOB = {"id": "j1", "state": "running", "done": 1, "total": 2, "result": {}, "fault": ""}


def test_a_job_that_fails_says_why(actor: Actor) -> None:
    """Work that is begun and then asked about; a moment without an answer does not end it."""
    actor.acts = [(202, JOB), (503, {"detail": "away"}), (200, JOB), (200, {**JOB, "state": "failed", "fault": "no"})]
    with contextlib.closing(RemoteRegistry(actor.remote())) as registry, pytest.raises(Rejected, match=r"^no$"):
        registry.delete_product("a1x", with_devices=True)
    assert {path for _, path, _ in actor.heard[1:]} == {"/api/v1/jobs/j1"}


@pytest.mark.parametrize(
    ("state", "words"),
    [("cancelled", "was cancelled"), ("done", "had done it all"), ("failed", "had failed"), ("", "may go on there")],
)
def test_an_interrupt_cancels_what_was_begun(
    actor: Actor, monkeypatch: pytest.MonkeyPatch, state: str, words: str
) -> None:
    """And tells what became of it, which may have been done by then."""
    told: list[str] = []

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("uplinkd.remote.time.sleep", interrupt)
    actor.acts = [(202, JOB), (202, JOB), (200, {**JOB, "state": state}) if state else (503, {"detail": "away"})]
    with (
        contextlib.closing(RemoteRegistry(actor.remote(tell=told.append))) as registry,
        pytest.raises(KeyboardInterrupt),
    ):
        registry.import_fleet(io.BytesIO(HEADING.encode()))
    assert [(method, path) for method, path, _ in actor.heard] == [
        ("POST", "/api/v1/imports?skipBad=false"),
        ("DELETE", "/api/v1/jobs/j1"),
        ("GET", "/api/v1/jobs/j1"),
    ]
    assert len(told) == 1
    assert words in told[0]


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (200, "<html>hello</html>", Unavailable, "not of uplinkd's management API"),
        (200, {"items": [{}]}, Unavailable, "another version"),
        (200, {"items": 7}, Unavailable, "another version"),
        (302, "", Unavailable, "the key does not follow"),
        (404, "nothing", Unavailable, "not of uplinkd's management API"),
        (502, "bad gateway", Unavailable, "reaches no server"),
        (422, {"detail": "path.name: too long"}, Rejected, "path.name: too long"),
        (429, {"detail": "too many"}, Rejected, "too many"),
        (500, {"detail": "a fault of uplinkd"}, Unavailable, "has failed: a fault of uplinkd"),
        (503, {"detail": "the registry is away"}, Unavailable, "the registry is away"),
    ],
)
def test_what_is_answered_decides_the_kind(
    actor: Actor, status: int, body: Any, kind: type[Exception], words: str
) -> None:
    """A problem document gives its detail, anything else that it is not ours; a redirect is not followed."""
    actor.acts = [(status, body)]
    with contextlib.closing(RemoteRegistry(actor.remote())) as registry, pytest.raises(kind, match=re.escape(words)):
        registry.products()
    assert len(actor.heard) == 1


def test_more_messages_than_a_page_are_read_in_pages(actor: Actor) -> None:
    """By the cursor that the page before gave, the last page as small as is left."""

    def page(first: int, count: int) -> Any:
        items = [
            {"messageId": str(number), "topic": "/a/b/c", "productKey": "a", "deviceName": "b", "generateTime": 1,
             "payload": "eA==", "origin": "https"}
            for number in range(first, first - count, -1)
        ]  # fmt: skip
        return 200, {"items": items, "next": str(first - count + 1)}

    actor.acts = [page(5000, 1000), page(4000, 200)]
    told = CliRunner().invoke(
        uplinkd, ["messages", "list", "--limit", "1200", "--json", "--url", actor.url, "--key", "uplk_known"]
    )
    assert [each["messageId"] for each in document(told)] == list(range(3801, 5001))
    assert "limit=1000" in actor.heard[0][1]
    assert "limit=200&cursor=4001" in actor.heard[1][1]


def test_devices_are_read_only_as_far_as_they_are_taken(actor: Actor) -> None:
    """A list that is cut short costs one request, of the fleet's size whatever that is."""
    device = {
        "productKey": "p", "deviceName": "lamp-1", "state": "disabled", "connection": "", "lastSeen": None, "clientIp": "",
        "createTime": 1, "activeTime": None,
    }  # fmt: skip
    actor.acts = [(200, {"items": [device], "next": "lamp-1"})]
    with contextlib.closing(RemoteRegistry(actor.remote())) as registry:
        assert next(registry.devices("p")).state(now=0, online_timeout=0) == "disabled"
    assert len(actor.heard) == 1


def listed(*numbers: int) -> tuple[int, Any]:
    items = [
        {"id": str(number), "requestId": f"r{number}", "time": number, "endpoint": "auth", "code": 20000, "status": 200,
         "productKey": "p", "deviceName": "d", "address": "", "topic": "", "reason": ""}
        for number in sorted(numbers, reverse=True)
    ]  # fmt: skip
    return 200, {"items": items, "next": None}


def streamed(*numbers: int) -> tuple[int, str]:
    return 200, f": here\n\nevent: refusals\ndata: {json.dumps({'items': listed(*numbers)[1]['items'][::-1]})}\n\n"


async def test_what_was_missed_while_the_stream_was_broken_is_fetched(
    actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is given once and in order, and people are told that it broke and that it is back."""
    monkeypatch.setattr("uplinkd.remote._RETRY_SECONDS", (0.01, 0.02))
    actor.acts = [
        listed(3),  # where it begins
        streamed(5), listed(3), listed(3, 4),  # the stream, the list before its first look, the list after
        None,  # it cannot be reached
        streamed(8), listed(5, 6), listed(6, 7),
    ]  # fmt: skip
    told: list[str] = []
    found = []
    async with contextlib.aclosing(RemoteJournal(actor.remote(tell=told.append)).follow(Wanted())) as refusals:
        async for each in refusals:
            found.append(each.id)
            if len(found) == 5:
                break
    assert found == [4, 5, 6, 7, 8]
    assert len(told) == 2
    assert "tried again" in told[0]
    assert "is there again" in told[1]


async def test_what_comes_late_from_another_gateway_is_given(actor: Actor) -> None:
    """Each gateway writes down its own in turn, so that one may come after a younger one of another."""
    actor.acts = [
        listed(3),
        (200, streamed(5, 9)[1] + streamed(7, 9)[1] + streamed(8)[1]), listed(3), listed(3, 5),
    ]  # fmt: skip
    found = []
    async with contextlib.aclosing(RemoteJournal(actor.remote()).follow(Wanted())) as refusals:
        async for each in refusals:
            found.append(each.id)
            if len(found) == 4:
                break
    assert found == [5, 9, 7, 8]


async def test_a_reader_of_a_server_elsewhere_is_a_reader(there: There) -> None:
    """What is stored, by id and in sum, as `engine.Reader` has it."""
    reader = RemoteReader(there.remote())
    message = await reader.by_id(there.message_id)
    assert message
    assert message.payload == b"three"
    assert await reader.by_id(1) is None
    assert (await reader.state()).messages >= 3
    older = await reader.latest(Query(topic=f"/{PRODUCT}/lamp-1/user/update", before=there.message_id), 1)
    assert [each.payload for each in older] == [b"two"]
    await reader.close()
