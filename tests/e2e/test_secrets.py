"""Secrets are where they belong and nowhere else: a server with everything on, whose every secret is known, and looked for."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import os
import re
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import nats
import nats.errors
import pytest

from tests.clients.fleet import Login, Thing
from tests.clients.packets import Wire, connect
from tests.faults.backend import Target
from tests.house import Device, Server, cli, cli_json, login_body, until
from uplinkd.core import signature

pytestmark = pytest.mark.xdist_group("secrets")

KEY = base64.b64encode(bytes(range(32))).decode()
WRONG = "whoever-was-asked-for-it-typed-this"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("house") / "data"
    (data.parent / "uplinkd.toml").write_text(f'secret_key = "{KEY}"\n')  # for the command line
    server = Server(
        data,
        ("--workers", "1", "--webhook-networks", "127.0.0.0/8", "--access-log", "true"),
        console_port=0,
        variables={"UPLINKD_SECRET_KEY": KEY},
    )
    before = os.umask(0o022)  # the usual one, which lets everybody read
    try:
        server.start()
        yield server
    finally:
        os.umask(before)
        if server.process and server.process.poll() is None:
            server.kill()


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # nats-py leaves a refused connection unclosed
async def test_secrets_are_nowhere_to_be_read(server: Server) -> None:
    """Devices, applications, webhooks and operators, let in and refused: nothing in the log, the record of refusals, the metrics, the
    audit, the API's lists and errors, the registry, nats-server's log or on any command line."""
    target = Target(answer=lambda _: 500)
    await target.start()
    product = cli_json("product", "create", "lamps", data=server.data)["productKey"]
    device, other = (
        Device(server, product, name, cli_json("device", "create", product, name, data=server.data)["deviceSecret"])
        for name in ("lamp-1", "lamp-2")
    )
    app = cli_json("app", "create", "billing", "--product", device.product, data=server.data)
    group = cli_json(
        "group", "create", "erp", "--product", device.product, "--webhook", target.url, data=server.data
    )  # fmt: skip
    key = cli_json("apikey", "create", "laptop", "--scope", "admin", data=server.data)["key"]
    password = re.search(r"one-time password (\S+)", server.banner)
    product_secret = cli_json("product", "show", device.product, data=server.data)["productSecret"]
    engine = json.loads((server.data / "nats" / "access.json").read_text())
    assert password

    assert await device.login() == 0
    assert (await device.publish(b"hello"))[0] == 0
    assert (await device.publish(b"no", levels="user/nothing"))[0] == 30001
    body = login_body(device.product, device.name, other.secret)
    assert (await device.post("/auth", body, "Content-Type: application/json"))[1]["code"] == 20000
    stranger = Device(server, device.product, device.name, "", token=device.token[:-4] + "AAAA")
    assert (await stranger.publish(b"no"))[0] == 20003
    for secret, app_secret in ((device.secret, app["secret"]), (other.secret, WRONG)):
        login = Thing(server, device.product, device.name, secret).login()
        await asyncio.to_thread(_by_mqtt, server, login)
        await asyncio.to_thread(_by_mqtt, server, Login("billing", app["key"], app_secret))
        await _by_nats(server, app["key"], app_secret)
    await until(lambda: target.requests >= 2)
    cli("group", "test", "erp", data=server.data, check=False)

    base = f"http://127.0.0.1:{server.console_port}"
    async with httpx.AsyncClient(base_url=base, headers={"Authorization": f"Bearer {key}"}) as api:
        shown = [
            (await api.get(path)).text
            for path in (
                "/metrics",
                "/api/v1/audit",
                "/api/v1/logs",
                "/api/v1/apps",
                "/api/v1/groups",
                "/api/v1/keys",
                "/api/v1/users",
                "/api/v1/settings",
                "/api/v1/doors",
                f"/api/v1/products/{device.product}/devices",
                f"/api/v1/products/{device.product}",
            )
        ]
        for path, wrong in (("products", {"name": 1, "key": WRONG}), ("apps", {"name": "a/b", "secret": WRONG})):
            shown.append((await api.post(f"/api/v1/{path}", json=wrong)).text)
    async with httpx.AsyncClient(base_url=base) as nobody:
        shown.append((await nobody.get("/api/v1/products", headers={"Authorization": f"Bearer {key[:-1]}"})).text)
        shown.append((await nobody.post("/sign-in", data={"name": "admin", "password": WRONG})).text)
    shown.append(cli("settings", data=server.data).stdout.decode())
    shown.append(cli("logs", "--json", data=server.data).stdout.decode())
    assert '"code": 20000' in shown[-1]

    secrets = {
        "DeviceSecret": device.secret,
        "ProductSecret": product_secret,
        "token": device.token,
        "sign": _sign(device, device.secret),
        "AppSecret": app["secret"],
        "webhook": group["secret"],
        "API key": key,
        "password": password[1],
        "wrong password": WRONG,
        "nats-server's": engine["password"],
        "nats-server's system": engine["system"],
        "key of the registry": KEY,
    }
    # A password of nats-server's lasts until its next start and is where those that connect look.
    kept = {"access.json", "nats.conf"}
    files = [each for each in [server.log, *server.data.rglob("*")] if each.is_file() and each.name not in kept]
    processes = [Path(f"/proc/{pid}/cmdline") for pid in (server.pid, *server.children(""))]
    for name, secret in secrets.items():
        for text in shown:
            assert secret not in text, (name, text[:100])
        for file in [*files, *processes]:
            assert secret.encode() not in file.read_bytes(), (name, file)
    (nats_server,) = server.children("nats-server")
    assert b"UPLINKD_" not in Path(f"/proc/{nats_server}/environ").read_bytes()
    await device.close()
    await stranger.close()
    await target.stop()
    gc.collect()  # now, while what nats-py leaves behind is passed over


def test_all_files_are_the_servers_users_alone(server: Server) -> None:
    """Whatever the umask: what is in the data folder is for its owner, whoever made it, nats-server included."""
    found = list(server.data.rglob("*"))  # the folder itself was there before
    assert any(each.suffix == ".blk" for each in found), "nats-server has stored something"
    for each in found:
        with contextlib.suppress(FileNotFoundError):  # SQLite's come and go
            mode = stat.S_IMODE(each.stat().st_mode)
            assert mode == (0o700 if each.is_dir() else 0o600), (each, oct(mode))


def _limits(pid: int) -> str:
    return next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "core file" in line)


def test_no_process_writes_its_memory_down(server: Server) -> None:
    """No core dumps: a limit of 0 for all, nats-server too; those of uplinkd cannot be traced by their own user, either."""
    processes = [server.pid, *server.children("")]
    assert len(processes) == 5  # the supervisor, nats-server, a worker, delivery, console
    for pid in processes:
        assert _limits(pid).split()[4:6] == ["0", "0"], pid
    assert sorted(Path(f"/proc/{pid}/comm").read_text().strip() for pid in processes[1:]) == [
        "nats-server",
        "uplinkd-console",
        "uplinkd-deliver",
        "uplinkd-worker",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("value", "private"), [("false", True), ("true", False)])
def test_core_dumps_are_a_setting(tmp_path: Path, value: str, private: bool) -> None:
    """For whoever looks for a fault: core_dumps = true."""
    server = Server(tmp_path / "data", ("--workers", "1", "--core-dumps", value)).start()
    try:
        soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
        (worker,) = server.children("uplinkd-worker")
        usual = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
        assert _limits(worker).split()[4] == ("0" if private else usual)
    finally:
        server.stop()


@pytest.mark.slow
def test_a_secret_on_the_command_line_is_warned_of(tmp_path: Path) -> None:
    """It works, since it always did; and the log says who else sees it, without repeating it."""
    server = Server(tmp_path / "data", ("--workers", "1", "--secret-key", KEY)).start()
    try:
        assert (
            "--secret-key has a secret, and each user of this machine sees the command line" in server.log.read_text()
        )
        assert KEY not in server.log.read_text()
    finally:
        server.stop()


def _by_mqtt(server: Server, login: Login) -> None:
    with Wire(server, tls=True) as wire:
        wire.send(connect(login))
        wire.read()


async def _by_nats(server: Server, user: str, password: str) -> None:
    options = {"user": user, "password": password, "inbox_prefix": f"_INBOX.{user}", "allow_reconnect": False}
    with contextlib.suppress(nats.errors.Error):
        nc = await nats.connect(f"nats://127.0.0.1:{server.nats_port}", error_cb=_ignored, **options)
        await nc.close()


async def _ignored(_fault: Exception) -> None:
    pass


def _sign(device: Device, secret: str) -> str:
    members = {
        "productKey": device.product, "deviceName": device.name, "clientId": f"{device.product}.{device.name}",
    }  # fmt: skip
    return signature.sign(secret, signature.content_of(members), "hmacsha1")
