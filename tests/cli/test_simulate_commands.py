"""`uplinkd publish` and `uplinkd sign`, against a small server with our TLS that answers as it is told."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.ports import free_port
from uplinkd.cli import uplinkd
from uplinkd.core import signature
from uplinkd.core.errors import EXPLANATIONS, Code, Rejected, Unavailable
from uplinkd.registry import open_registry
from uplinkd.settings import Settings
from uplinkd.tls import ensure_material, server_context

PRODUCT, DEVICE, SECRET = "a1GFjLP3xxC", "device123", "the secret of device123"
TOPIC = f"/{PRODUCT}/{DEVICE}/user/update"
WHO = ("--product", PRODUCT, "--device", DEVICE)


@dataclass
class Endpoint:
    """What it answers to /auth and to /topic, and what it was asked: (path, headers, body)."""

    url: str = ""
    auth: Any = field(default_factory=lambda: {"code": 0, "message": "success", "info": {"token": "T0"}})
    topic: Any = field(
        default_factory=lambda: {"code": 0, "message": "success", "info": {"messageId": 892687627916247040}}
    )
    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.chdir(tmp_path)
    told = Endpoint()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.asked.append((self.path, dict(self.headers), body))
            answer = told.auth if self.path == "/auth" else told.topic
            text = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            """Standard error is the command's."""

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """A client that does not trust us hangs up."""

    server = Server(("0.0.0.0", 0), Handler)  # also reached by an address that the certificate has not
    context = server_context(ensure_material(Settings(data=tmp_path / "data")))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    told.url = f"https://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


def run(*arguments: str | bytes, stdin: bytes = b"") -> Result:
    """The command's result; what it raised is re-raised."""
    result = CliRunner().invoke(uplinkd, [str(each) for each in arguments], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def publish(endpoint: Endpoint, *arguments: str, stdin: bytes = b"") -> Result:
    return run("publish", TOPIC, *arguments, *WHO, "--secret", SECRET, "--url", endpoint.url, stdin=stdin)


def test_publish_goes_the_whole_way(endpoint: Endpoint) -> None:
    """A right sign at /auth, then the token and the payload; the CA in the data folder is trusted by itself."""
    result = publish(endpoint, "hello")
    assert result.exit_code == 0
    assert "messageId 892687627916247040" in result.stdout
    (auth, headers, body), (topic, report, payload) = endpoint.asked
    login = json.loads(body)
    assert auth == "/auth"
    assert headers["Content-Type"] == "application/json"
    assert signature.matches(SECRET, signature.content_of(login), login["signmethod"], login["sign"])
    assert topic == f"/topic{TOPIC}"
    assert (report["password"], report["Content-Type"]) == ("T0", "application/octet-stream")
    assert payload == b"hello"


def test_publish_tells_what_rides_home(endpoint: Endpoint) -> None:
    """The message that waited for the device, with its topic; control characters as escapes."""
    endpoint.topic["info"] |= {"topic": f"/{PRODUCT}/{DEVICE}/user/get", "data": "on\n"}
    assert f"on /{PRODUCT}/{DEVICE}/user/get: on\\n" in publish(endpoint, "hello").stdout
    document = json.loads(publish(endpoint, "hello", "--json").stdout)
    assert document["down"] == {"topic": f"/{PRODUCT}/{DEVICE}/user/get", "data": "on\n"}


def test_publish_reads_octets_from_standard_input(endpoint: Endpoint) -> None:
    """Whatever they are."""
    publish(endpoint, "-", stdin=b"\x00\xff\r\n")
    assert endpoint.asked[-1][2] == b"\x00\xff\r\n"


def test_publish_json_is_what_the_device_was_answered(endpoint: Endpoint) -> None:
    """One document, with the topic."""
    assert json.loads(publish(endpoint, "x", "--json").stdout) == {
        "code": 0,
        "message": "success",
        "messageId": 892687627916247040,
        "topic": TOPIC,
    }


def test_a_refusal_says_what_it_means_and_what_to_do(endpoint: Endpoint) -> None:
    """Code, message, requestId and the table's explanation; exit code 1, in JSON as well."""
    endpoint.topic = {"code": 30001, "message": "publish message error", "info": {"requestId": "5f0c"}}
    result = publish(endpoint, "x")
    assert result.exit_code == 1
    known = EXPLANATIONS[Code.PUBLISH_MESSAGE_ERROR]
    for part in ("30001 publish message error", "uplinkd logs 5f0c", known.means, known.do):
        assert part in result.stderr
    result = publish(endpoint, "x", "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert (answer["code"], answer["message"], answer["requestId"]) == (30001, "publish message error", "5f0c")


@pytest.mark.parametrize(
    "answer",
    [
        "<html>",
        "[]",
        {"code": "x", "message": ""},
        {"code": 0, "message": "success"},
        {"code": 0, "message": "", "info": {}},
    ],
)
def test_another_kind_of_server_is_told_apart(endpoint: Endpoint, answer: Any) -> None:
    """In words, not as a traceback."""
    endpoint.auth = answer
    with pytest.raises(Unavailable, match="answered"):
        publish(endpoint, "x")


def test_the_secret_can_stay_in_the_registry(endpoint: Endpoint, tmp_path: Path) -> None:
    """Without --secret the local registry is asked; a device that it does not know is named."""
    registry = open_registry(Settings(data=tmp_path / "data"))
    registry.create_product("lamps", key=PRODUCT)
    registry.create_device(PRODUCT, DEVICE, secret=SECRET)
    registry.close()
    assert run("publish", TOPIC, "x", *WHO, "--url", endpoint.url).exit_code == 0
    login = json.loads(endpoint.asked[0][2])
    assert signature.matches(SECRET, signature.content_of(login), login["signmethod"], login["sign"])
    with pytest.raises(Rejected, match="nobody"):
        run("publish", TOPIC, "x", "--product", PRODUCT, "--device", "nobody", "--url", endpoint.url)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1",
        "https://",
        "https://[::1",
        "https://127.0.0.1:port",
        "http://127.0.0.1:99999",
        "http://a b/",
        "http://灯..x",
    ],
)
def test_what_is_no_url_is_refused_in_a_line(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's program for it could not be made either."""
    monkeypatch.chdir(tmp_path)
    for command in (
        ("publish", *WHO, "--secret", SECRET, TOPIC),
        ("device", "snippet", PRODUCT, DEVICE, "--language", "c"),
    ):
        if command[0] == "device":
            registry = open_registry(Settings(data=tmp_path))
            registry.create_product("snippets", key=PRODUCT)
            registry.create_device(PRODUCT, DEVICE)
            registry.close()
        result = CliRunner().invoke(uplinkd, [*command, "--url", url, "--data", str(tmp_path)])
        assert isinstance(result.exception, Rejected)
        assert "is not a URL" in str(result.exception)


def test_a_server_that_cannot_be_talked_to_is_explained(endpoint: Endpoint, tmp_path: Path) -> None:
    """Nothing listening, another CA, a name that the certificate has not, a name that does not exist, a wrong CA file."""
    with pytest.raises(Unavailable, match="is `uplinkd serve` running"):
        run("publish", TOPIC, "x", *WHO, "--secret", "s", "--url", f"https://127.0.0.1:{free_port()}")
    ensure_material(Settings(data=tmp_path / "other"))
    with pytest.raises(Unavailable, match=r"not trusted.*--ca"):
        publish(endpoint, "x", "--ca", str(tmp_path / "other" / "tls" / "ca.pem"))
    with pytest.raises(Unavailable, match="--tls-name"):
        run("publish", TOPIC, "x", *WHO, "--secret", "s", "--url", endpoint.url.replace("127.0.0.1", "127.0.0.2"))
    with pytest.raises(Unavailable, match=r"name nowhere\.invalid cannot be found"):
        run("publish", TOPIC, "x", *WHO, "--secret", "s", "--url", "https://nowhere.invalid:1")
    with pytest.raises(Rejected, match=r"nothing\.pem"):
        publish(endpoint, "x", "--ca", str(tmp_path / "nothing.pem"))
    with pytest.raises(Rejected, match="ftp"):
        run("publish", TOPIC, "x", *WHO, "--secret", "s", "--url", "ftp://127.0.0.1")


@pytest.mark.parametrize("method", ["hmacmd5", "hmacsha1", "HmacSHA256"])
def test_sign_shows_content_and_sign(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published vectors, for methods in any letter case; body is what /auth takes."""
    monkeypatch.chdir(tmp_path)
    vectors = json.loads((Path(__file__).parent.parent / "vectors" / "signatures.json").read_text())["vectors"]
    who = ("--product", "pk", "--device", "device", "--secret", "secret", "--client-id", "12345", "--timestamp", "789")
    expected = vectors[0]["signs"][method.lower()].lower()
    result = run("sign", *who, "--method", method)
    assert vectors[0]["content"] in result.stdout
    assert expected in result.stdout
    document = json.loads(run("sign", *who, "--method", method, "--json").stdout)
    assert (document["content"], document["sign"]) == (vectors[0]["content"], expected)
    assert document["signmethod"] == method.lower()
    line = run("sign", *who, "--method", method, "--body").stdout
    assert line.count("\n") == 1
    assert json.loads(line) == document["body"]
    assert document["body"] == {
        **vectors[0]["members"],
        "version": "default",
        "signmethod": method.lower(),
        "sign": expected,
    }


def test_sign_shows_what_a_connect_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same content and sign, as clientId, user name and password of MQTT."""
    monkeypatch.chdir(tmp_path)
    who = ("--product", "pk", "--device", "device", "--secret", "secret", "--client-id", "12345", "--timestamp", "789")
    document = json.loads(run("sign", *who, "--mqtt", "--json").stdout)
    assert document == {
        "content": "clientId12345deviceNamedeviceproductKeypktimestamp789",
        "clientId": "12345|securemode=2,signmethod=hmacsha1,timestamp=789|",
        "username": "device&pk",
        "password": "fafd82a3d602b37fb0fa8b7892f24a477f851a14",
    }
    shown = run("sign", *who, "--mqtt").stdout
    assert all(value in shown for value in document.values())
    assert run("sign", *who, "--mqtt", "--body").exit_code == 2


def test_sign_uses_the_sdks_client_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`PK.DN` unless given, and no timestamp."""
    monkeypatch.chdir(tmp_path)
    document = json.loads(run("sign", *WHO, "--secret", "s", "--json").stdout)
    assert document["body"]["clientId"] == f"{PRODUCT}.{DEVICE}"
    assert "timestamp" not in document["body"]


@pytest.mark.parametrize("arguments", [("--method", "md5"), ("--client-id", "\udcff")])
def test_a_wrong_argument_is_named(arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2; an unknown method is told the known ones."""
    monkeypatch.chdir(tmp_path)
    result = run("sign", *WHO, "--secret", "s", *arguments)
    assert result.exit_code == 2
    assert "hmacsha256" in result.stderr or "not UTF-8" in result.stderr
