"""No request hides in another: not at the door itself, and not behind a proxy."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.abuse.conftest import House
from tests.abuse.corpus import CORPUS, request
from tests.house import Device, Server, make_devices, serving, stored
from tests.http.conftest import replies
from tests.ports import free_port
from tests.room import DEVICE, PRODUCT
from uplinkd.engine import Query

ROOT = Path(__file__).parents[2]
PATH = os.environ["PATH"] + ":/usr/sbin"
TOPIC = f"/topic/{PRODUCT}/{DEVICE}/user/update".encode()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "byte by byte"])
async def test_the_door_itself_reads_strictly(house: House, whole: bool) -> None:
    """What is ambiguous gets one answer and ends the connection; nothing of it, and nothing behind it, becomes a message."""
    house.flow._message_cost = house.flow._byte_cost = 0.0
    token = (await house.token()).encode()
    for number, case in enumerate(CORPUS):
        hidden, behind = b"hidden %d" % number, b"behind %d" % number
        peer = house.connect()
        raw = case.raw(TOPIC, token, hidden) + request(TOPIC, token, behind)
        for piece in [raw] if whole else [bytes([byte]) for byte in raw]:
            peer.send(piece)
        answers = await peer.replies()
        house.later(2)
        payloads = {message.payload for message in await house.engine.latest(Query(), 10)}
        if case.clear:
            assert [answer.status for answer in answers][1:] == [200, 200], case.name
            assert payloads >= {hidden, behind}, case.name
            assert not peer.transport.closed, case.name
        else:
            assert len(answers) == 1, case.name
            assert answers[0].headers["Connection"] == "close", case.name
            assert peer.transport.closed, case.name
            assert not payloads & {hidden, behind}, case.name


def nginx(folder: Path, port: int, backend: int) -> list[str]:
    """The command that runs it with deploy/proxy's configuration, without TLS and with one connection to the backend."""
    text = (ROOT / "deploy/proxy/nginx.conf").read_text()
    text = re.sub(r"\n *(ssl_[^;]*|server_name [^;]*);", "", text)
    text = text.replace("127.0.0.1:8081;", f"127.0.0.1:{backend};").replace(
        "listen 443 ssl", f"listen 127.0.0.1:{port}"
    )
    text = text.replace("keepalive 64", "keepalive 1")
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    file = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    file.write_text(
        f"{user} daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;\n"
        f"events {{ }}\nhttp {{ access_log off; {places}\n{text}\n}}\n"
    )
    return ["nginx", "-e", str(folder / "nginx.log"), "-c", str(file)]


def haproxy(folder: Path, port: int, backend: int) -> list[str]:
    """The same for HAProxy, which is to share connections to the backend whenever it can."""
    text = (ROOT / "deploy/proxy/haproxy.cfg").read_text().partition("frontend mqtts")[0]
    text = re.sub(r"\n *(ssl-default|option httpchk)[^\n]*", "", text)
    text = text.replace("maxconn 40000", "maxconn 500")
    text = re.sub(r"bind :443 [^\n]*", f"bind 127.0.0.1:{port}", text)
    text = text.replace("127.0.0.1:8081 check port 8080", f"127.0.0.1:{backend}").replace(
        "retries 0", "http-reuse always"
    )
    file = folder / "haproxy.cfg"
    file.write_text(text)
    return ["haproxy", "-db", "-q", "-f", str(file)]


@contextlib.contextmanager
def proxied(name: str, folder: Path, backend: int) -> Iterator[int]:
    """The port of a proxy before the plain-text door at `backend`."""
    if not shutil.which(name, path=PATH):
        pytest.skip(f"{name} is not installed")
    port = free_port()
    command = {"nginx": nginx, "haproxy": haproxy}[name](folder, port, backend)
    process = subprocess.Popen(command, env={**os.environ, "PATH": PATH}, cwd=folder)
    try:
        end = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, f"{name} ended"
            assert time.monotonic() < end
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def exchange(port: int, raw: bytes, *, silence: float, answers: int = 100) -> bytes:
    """What comes back until the peer closes, all `answers` are there, or nothing comes for `silence`."""
    said = b""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.settimeout(silence)
        with contextlib.suppress(OSError):
            sock.sendall(raw)
        with contextlib.suppress(OSError):
            while said.count(b"HTTP/1.1 ") < answers or not said.endswith(b"}"):
                piece = sock.recv(65536)
                if not piece:
                    break
                said += piece
    return said


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[tuple[Server, Device, int]]:
    """A server with a plain-text door, a device of it, and the port of that door."""
    port = free_port()
    options = ["--workers", "1", "--plain-listen", f"127.0.0.1:{port}", "--device-rate", "0", "--auth-rate", "0"]
    with serving(tmp_path / "data", *options, "--proxy-protocol", "127.0.0.2") as server:
        yield server, make_devices(server, 1)[0], port


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nginx", "haproxy"])
async def test_nobody_hears_the_answers_of_others_behind_a_proxy(
    plain: tuple[Server, Device, int], tmp_path: Path, name: str
) -> None:
    """After each case the next client, over the same connection to the door, gets the one answer to its own report. A proxy may take
    what is hidden for a request of its own and say so to its client; what became a message without that was smuggled."""
    server, device, backend = plain
    assert await device.login() == 0
    await device.close()
    path, token = f"/topic/{device.product}/{device.name}/user/update".encode(), device.token.encode()
    mine: dict[int, bytes] = {}
    told: set[int] = set()
    with proxied(name, tmp_path, backend) as port:
        for number, case in enumerate(CORPUS):
            raw = case.raw(path, token, b"hidden %d" % number)
            said = exchange(port, raw, silence=1, answers=2)
            told.update(int(each) for each in re.findall(rb'"messageId":(\d+)', said))
            payload = b"mine %d" % number
            said = exchange(port, request(path, token, payload), silence=3, answers=1)
            said = re.sub(rb"content-length", b"Content-Length", said)
            (answer,) = replies(said)
            assert answer.status == 200, case.name
            mine[int(json.loads(answer.body)["info"]["messageId"])] = payload
    found = stored(server.data, device.product)
    assert {key: found[key] for key in mine} == mine
    hidden = {key: payload for key, payload in found.items() if payload.startswith(b"hidden")}
    assert hidden.keys() <= told, [CORPUS[int(hidden[key].split()[1])].name for key in hidden.keys() - told]
    assert hidden, "even what is clear did not arrive"
