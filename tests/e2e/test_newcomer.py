"""The newcomer's story on the real program: start it, paste what the banner says, look at what arrived."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import UPLINKD, Device, Server, alive, cli, cli_json, environment, login_body, serving, stored
from tests.ports import free_port

pytestmark = pytest.mark.xdist_group("e2e")


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        tmp_path_factory.mktemp("house") / "data",
        "--demo",
        "--workers",
        "2",
        "--device-rate",
        "1000",
        "--auth-rate",
        "0",
    ) as started:
        yield started


@pytest.fixture(scope="module")
def demo(server: Server) -> Device:
    product = cli_json("product", "list", data=server.data)[0]["productKey"]
    device = cli_json("device", "show", product, "demo-device", data=server.data)
    return Device(server, product, "demo-device", device["deviceSecret"])


def shell(line: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=30, cwd=folder, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_banner_says_what_listens_and_where_the_ca_is(server: Server) -> None:
    """Address, CA file and state folder, all true."""
    assert server.url in server.banner
    assert str(server.ca) in server.banner
    assert server.ca.exists()


@needs("curl")
def test_the_banners_lines_work_when_pasted(server: Server, tmp_path: Path) -> None:
    """From any folder, as they stand, without a secret in them; the messages are there afterwards."""
    secret = cli_json("device", "show", *_demo_names(server), data=server.data)["deviceSecret"]
    assert secret not in server.banner
    (publish,) = re.findall(r"^  (.* publish .*)$", server.banner, re.MULTILINE)
    (curl,) = re.findall(r"^  (curl .*)$", server.banner, re.MULTILINE)
    assert "messageId" in shell(publish, tmp_path)
    assert json.loads(shell(curl, tmp_path))["code"] == 0
    (listing,) = re.findall(r"^  (.* messages list .*)$", server.banner, re.MULTILINE)
    text = shell(listing, tmp_path)
    assert "hello from uplinkd" in text
    assert "hello from curl" in text


def _demo_names(server: Server) -> tuple[str, str]:
    return cli_json("product", "list", data=server.data)[0]["productKey"], "demo-device"


@needs("curl")
def test_curl_signs_in_and_reports(server: Server, demo: Device, tmp_path: Path) -> None:
    """With its own TLS, its own headers, and a body large enough for Expect: 100-continue."""
    body = tmp_path / "login.json"
    body.write_bytes(login_body(demo.product, demo.name, demo.secret))
    base = f"curl -sS --cacert {server.ca} {server.url}"
    token = json.loads(shell(f"{base}/auth -H 'Content-Type: application/json' -d @{body}", tmp_path))["info"]["token"]
    payload = tmp_path / "payload"
    payload.write_bytes(os.urandom(131_072))
    topic = f"/topic/{demo.product}/{demo.name}/user/update"
    post = f"{base}{topic} -H 'password: {token}' -H 'Content-Type: application/octet-stream' --data-binary @{payload}"
    assert json.loads(shell(post + " -H 'Expect: 100-continue'", tmp_path))["message"] == "success"
    with payload.open("ab") as file:
        file.write(b"!")
    assert json.loads(shell(post, tmp_path)) | {"info": None} == {"code": 10001, "message": "param error", "info": None}
    assert shell(f"{base}/auth -o /dev/null -w '%{{http_code}}'", tmp_path) == "405"


@needs("openssl")
@pytest.mark.parametrize("cipher", ["AES128-SHA", "AES256-SHA", "AES128-SHA256", "AES256-SHA256"])
def test_old_sdks_ciphers_do_the_whole_job(server: Server, demo: Device, cipher: str) -> None:
    """TLS 1.2 with static RSA and CBC, no SNI, head and body in two records, as iotkit-embedded sends them."""
    body = login_body(demo.product, demo.name, demo.secret)
    head = f"POST /auth HTTP/1.1\r\nHost: h\r\nConnection: Keep-Alive\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    answer = _s_client(server, cipher, head.encode(), body)
    token = json.loads(answer.partition(b"\r\n\r\n")[2])["info"]["token"]
    topic = f"/topic/{demo.product}/{demo.name}/user/update"
    head = f"POST {topic} HTTP/1.1\r\nHost: h\r\npassword:{token}\r\nContent-Length: 4\r\n"
    head += "Content-Type: application/octet-stream\r\n\r\n"
    answer = _s_client(server, cipher, head.encode(), b"hi!\x00")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == 0


def _s_client(server: Server, cipher: str, *records: bytes) -> bytes:
    arguments = ["openssl", "s_client", "-quiet", "-no_ign_eof", "-noservername", "-tls1_2", "-cipher", cipher]
    arguments += ["-CAfile", str(server.ca), "-verify_return_error", "-connect", f"127.0.0.1:{server.port}"]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin
        assert process.stdout
        for record in records:
            process.stdin.write(record)
            process.stdin.flush()
            time.sleep(0.05)
        os.set_blocking(process.stdout.fileno(), False)
        answer, end = b"", time.monotonic() + 5
        while time.monotonic() < end and not re.search(rb"\r\n\r\n.+\}$", answer, re.DOTALL):
            answer += process.stdout.read() or b""
            time.sleep(0.01)
        process.terminate()
    return answer


def test_modern_clients_take_tls_1_3_with_ecdsa(server: Server) -> None:
    """The cheaper chain goes to who can use it."""
    context = server.context()
    with (
        socket.create_connection(("127.0.0.1", server.port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as tls,
    ):
        assert tls.version() == "TLSv1.3"


def test_tls_1_1_and_wrong_names_are_refused(server: Server) -> None:
    """Old protocol versions do not connect; the certificate names what it serves and nothing else."""
    with socket.create_connection(("127.0.0.1", server.port)) as raw, pytest.raises(ssl.SSLCertVerificationError):
        server.context().wrap_socket(raw, server_hostname="example.com")


async def test_a_running_server_sees_changes_within_a_second(server: Server, demo: Device) -> None:
    """A device made, disabled, enabled and deleted by the command line while the server runs, in every worker."""
    made = cli_json("device", "create", demo.product, "passing1", data=server.data)
    devices = [Device(server, demo.product, "passing1", made["deviceSecret"]) for _ in range(6)]
    for device in devices:
        assert await device.login() == 0
        assert (await device.publish(b"x"))[0] == 0
    for change, wanted in (("disable", 20001), ("enable", 20001), ("delete", 20001)):
        cli("device", change, demo.product, "passing1", data=server.data)
        await asyncio.sleep(1)
        assert [(await device.publish(b"x"))[0] for device in devices] == [wanted] * 6
    assert await devices[0].login() == 20000
    for device in devices:
        await device.close()


async def test_refusals_are_found_by_their_request_id(server: Server, demo: Device) -> None:
    """What the device was told leads to the reason, from the command line, within a second."""
    wrong = Device(server, demo.product, demo.name, "not the secret")
    _, answer = await wrong.post(
        "/auth", login_body(wrong.product, wrong.name, wrong.secret), "Content-Type: application/json"
    )
    assert answer["code"] == 20000
    await asyncio.sleep(1)
    request_id = answer["info"]["requestId"]
    (found,) = [
        each for each in cli_json("logs", "--device", demo.name, data=server.data) if each["requestId"] == request_id
    ]
    assert f"clientId{demo.product}.{demo.name}" in found["reason"]
    assert found["code"] == 20000
    assert demo.secret not in json.dumps(found)
    await wrong.close()


async def test_last_seen_and_state_are_told(server: Server, demo: Device) -> None:
    """Inactive, online, disabled; lastSeen within seconds."""
    made = cli_json("device", "create", demo.product, "watched1", data=server.data)
    assert (made["state"], made["lastSeen"]) == ("inactive", None)
    device = Device(server, demo.product, "watched1", made["deviceSecret"])
    assert await device.login() == 0
    await device.close()
    await asyncio.sleep(1.5)
    shown = cli_json("device", "show", demo.product, "watched1", data=server.data)
    assert shown["state"] == "online"
    assert abs(shown["lastSeen"] / 1000 - time.time()) < 20
    cli("device", "disable", demo.product, "watched1", data=server.data)
    assert cli_json("device", "show", demo.product, "watched1", data=server.data)["state"] == "disabled"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_drains_within_five_seconds(tmp_path: Path, number: int) -> None:
    """Requests under way are answered, an idle connection is closed, nothing is left running, and it ends with 0."""
    with serving(tmp_path / "data", "--demo", "--workers", "2") as server:
        product = cli_json("product", "list", data=server.data)[0]["productKey"]
        secret = cli_json("device", "show", product, "demo-device", data=server.data)["deviceSecret"]
        idle, slow = (Device(server, product, "demo-device", secret) for _ in range(2))
        assert await idle.login() == 0
        assert await slow.login() == 0
        assert slow._streams
        reader, writer = slow._streams
        head = f"POST /topic/{product}/demo-device/user/update HTTP/1.1\r\nHost: h\r\npassword: {slow.token}\r\n"
        writer.write(head.encode() + b"Content-Type: application/octet-stream\r\nContent-Length: 4\r\n\r\nha")
        await writer.drain()
        await asyncio.sleep(0.2)
        children = server.children("")
        assert len(children) == 4  # the engine, two workers, the delivery
        started = time.monotonic()
        assert server.process
        server.process.send_signal(number)
        await asyncio.sleep(0.6)
        assert idle._streams
        assert await idle._streams[0].read() == b""
        writer.write(b"lf")
        answer = await reader.read()
        assert b"Connection: close" in answer
        assert b'"code":0' in answer
        assert server.process.wait(6) == 0
        assert time.monotonic() - started < 5
        assert not [pid for pid in children if alive(pid)]
        await slow.close()
        await idle.close()
        assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
async def test_tokens_and_ids_survive_a_restart(tmp_path: Path) -> None:
    """The same token publishes after a stop and a start; ids go on rising; all messages are there."""
    with serving(tmp_path / "data", "--demo", "--workers", "1") as server:
        product = cli_json("product", "list", data=server.data)[0]["productKey"]
        secret = cli_json("device", "show", product, "demo-device", data=server.data)["deviceSecret"]
        device = Device(server, product, "demo-device", secret)
        assert await device.login() == 0
        code, first = await device.publish(b"before")
        assert code == 0
        await device.close()
        assert server.stop() == 0
        assert list(stored(server.data, product)) == [first]
        server.start()
        code, second = await device.publish(b"after")
        assert code == 0
        assert second > first
        await device.close()
        assert list(stored(server.data, product)) == [first, second]
        assert server.stop() == 0


def fails(*arguments: str, folder: Path, **variables: str) -> tuple[int, list[str]]:
    """(exit code, lines on standard error) of a command that must fail quickly and without a traceback."""
    done = subprocess.run(
        [*UPLINKD, *arguments], capture_output=True, text=True, timeout=20, cwd=folder, env=environment(**variables)
    )
    assert "Traceback" not in done.stderr + done.stdout
    return done.returncode, done.stderr.splitlines()


@pytest.mark.slow
def test_what_keeps_it_from_starting_is_said_in_one_line(tmp_path: Path) -> None:
    """A port in use, an unwritable data folder, a missing nats-server, a bad setting: the value and what to do."""
    (tmp_path / "file").write_text("not a folder")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, lines = fails("serve", "--data", "data", "--listen", f"127.0.0.1:{port}", folder=tmp_path)
        assert (code, len(lines)) == (1, 1)
        assert f"127.0.0.1:{port} is in use" in lines[0]
    for arguments, words in (
        (("--data", "file"), "data folder file cannot be written"),
        (
            ("--data", "data", "--listen", "127.0.0.1:0", "--nats-server", "/nonexistent/nats-server"),
            "/nonexistent/nats-server",
        ),
        (("--data", "data", "--listen", "192.0.2.1:1"), "is not an address of this machine"),
        (("--workers", "many"), "workers = 'many'"),
        (("--tls-cert", "absent.pem", "--tls-key", "absent.key", "--data", "data"), "absent.pem"),
    ):
        code, lines = fails("serve", *arguments, folder=tmp_path)
        assert code in (1, 2)
        assert len(lines) == 1
        assert words in lines[0]
    code, lines = fails("settings", folder=tmp_path, UPLINKD_LISTN="x")
    assert code in (1, 2)
    assert "did you mean 'listen'" in lines[0]
    code, lines = fails("serve", "--unknown", folder=tmp_path)
    assert code == 2


@pytest.mark.slow
def test_two_servers_do_not_share_a_data_folder(server: Server, tmp_path: Path) -> None:
    """The second one says who is in its way."""
    code, lines = fails("serve", "--data", str(server.data), "--listen", "127.0.0.1:0", folder=tmp_path)
    assert (code, len(lines)) == (1, 1)
    assert "another uplinkd" in lines[0]


def test_the_plain_port_is_for_a_proxy_alone(tmp_path: Path) -> None:
    """Behind its switch it answers plain HTTP; a public address is refused."""
    port = free_port()
    with (
        serving(tmp_path / "data", "--workers", "1", "--plain-listen", f"127.0.0.1:{port}"),
        socket.create_connection(("127.0.0.1", port)) as raw,
    ):
        raw.sendall(b"POST /auth HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}")
        raw.shutdown(socket.SHUT_WR)
        assert b'"code":10001' in raw.recv(4096)
