"""The real program in its own process, and devices that talk to it over real TLS."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from tests.ports import free_port
from uplinkd.cli import main
from uplinkd.core import signature
from uplinkd.settings import Settings
from uplinkd.tls import ensure_material

UPLINKD = [sys.executable, "-m", "uplinkd"]
# Beside the HTTPS door, whose port the banner tells: so that servers of tests that run at the same time do not collide.


def environment(**more: str) -> dict[str, str]:
    """This process's environment without settings that a developer may have."""
    return {name: value for name, value in os.environ.items() if not name.startswith("UPLINKD_")} | more


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for what must come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def freeze(pid: int) -> None:
    """SIGSTOP, and wait until it has come to each of its threads: on a busy machine one of them may answer meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + 5
    while not _stopped(pid):
        assert time.monotonic() < end, f"process {pid} does not stand still"
        time.sleep(0.001)


def _stopped(pid: int) -> bool:
    return all(
        file.read_text().rpartition(")")[2].split()[0] == "T" for file in Path(f"/proc/{pid}/task").glob("*/stat")
    )


def cli(*arguments: str, data: Path, check: bool = True, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run one command on the data folder, in this process: a process of its own would take half a second."""
    with ThreadPoolExecutor(1) as thread:  # the caller's may run an event loop, and commands run theirs
        done = thread.submit(_cli, [*arguments, "--data", str(data)], data.parent, stdin).result(60)
    assert not check or done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


def _cli(arguments: list[str], folder: Path, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    without: dict[str, str | None] = {name: None for name in os.environ if name.startswith("UPLINKD_")}
    with contextlib.chdir(folder), CliRunner().isolation(stdin, without) as (out, err, _):
        named, sys.argv = sys.argv, ["uplinkd", *arguments]
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv = named
        sys.stdout.flush()
        sys.stderr.flush()
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def command(*arguments: str, data: Path) -> subprocess.CompletedProcess[bytes]:
    """As `cli`, a process of its own: for threads, of which several give commands at once, and while the server is harmed."""
    done = subprocess.run(
        [*UPLINKD, *arguments, "--data", str(data)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
        env=environment(),
        cwd=data.parent,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


def cli_json(*arguments: str, data: Path) -> Any:
    return json.loads(cli(*arguments, "--json", data=data).stdout)


@dataclass
class Server:
    """`uplinkd serve` on ports of its own; ends with the test."""

    data: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    banner: str = ""
    port: int = 0
    mqtt_port: int = 0
    mqtt_plain_port: int = 0
    nats_port: int = 0
    amqp_port: int | None = None  # None: without that door
    console_port: int | None = None  # None: without a console, which takes a second to start
    variables: dict[str, str] = field(default_factory=dict)  # in its environment
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.data.parent / "uplinkd.log"

    def start(self, *, wait: float = 60) -> Server:
        self.launch()
        assert self.process
        assert self.process.stdout
        self.banner = ""
        end = time.monotonic() + wait
        while line := self.process.stdout.readline().decode():
            self.banner += line
            if " state " in line or time.monotonic() > end:
                break
        match = re.search(r"https://127\.0\.0\.1:(\d+)", self.banner)
        assert match, f"it did not start: {self.log.read_text()}"
        self.port = int(match[1])
        os.set_blocking(self.process.stdout.fileno(), False)
        time.sleep(0.05)
        self.banner += (self.process.stdout.read() or b"").decode()
        self.mqtt_port = self._told("mqtts")
        self.mqtt_plain_port = self._told("mqtt")
        self.nats_port = self._told("nats")
        if self.amqp_port is not None:
            self.amqp_port = self._told("amqps")
        if self.console_port is not None:
            self.console_port = self._told("https?", after="console ")
        return self

    def launch(self) -> None:
        """Start the process, and wait for nothing."""
        self.data.mkdir(parents=True, exist_ok=True)
        if "--demo" not in self.options and not (self.data / "tls").exists():
            ensure_material(Settings(data=self.data))  # with keys that lie ready, see conftest: it saves 0.2 s of CPU
        ports = {
            "--listen": self.port,
            "--mqtt-listen": self.mqtt_port,
            "--mqtt-plain-listen": self.mqtt_plain_port,
            "--nats-listen": self.nats_port,
        }
        if self.console_port is not None:
            ports["--console-listen"] = self.console_port
        if self.amqp_port is not None:
            ports["--amqp-listen"] = self.amqp_port
        listen = [part for flag, port in ports.items() for part in (flag, f"127.0.0.1:{port or free_port()}")]
        if self.console_port is None:
            listen += ["--console-listen", ""]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*UPLINKD, "serve", "--data", str(self.data), *listen, *self.options],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(**self.variables),
                cwd=self.data.parent,
            )

    def _told(self, scheme: str, *, after: str = "") -> int:
        """The port that the banner names with this scheme; 0 where it names none."""
        match = re.search(rf"{after}\s*\b{scheme}://127\.0\.0\.1:(\d+)", self.banner)
        return int(match[1]) if match else 0

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def ca(self) -> Path:
        return self.data / "tls" / "ca.pem"

    def children(self, name: str) -> list[int]:
        """Its child processes by name: `nats-server`, `uplinkd-worker`, `uplinkd-deliver`, `uplinkd-console`."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError):
                head, _, rest = stat.read_text().rpartition(")")
                if int(rest.split()[1]) == self.pid and name in head:
                    found.append(int(stat.parent.name))
        return sorted(found)

    def stop(self, number: int = signal.SIGTERM, *, within: float = 10) -> int:
        assert self.process
        self.process.send_signal(number)
        code = self.process.wait(within)
        self._close()
        return code

    def kill(self) -> None:
        """kill -9 of the supervisor, every worker and the engine at once."""
        for pid in (self.pid, *self.children("")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kill_supervisor()

    def kill_supervisor(self) -> None:
        """kill -9 of it alone."""
        assert self.process
        self.process.kill()
        self.process.wait(5)
        self._close()

    def _close(self) -> None:
        assert self.process
        if self.process.stdout:
            self.process.stdout.close()
        self.process = None

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca))


@contextlib.contextmanager
def serving(data: Path, *options: str, amqp: bool = False) -> Iterator[Server]:
    server = Server(data, options, amqp_port=0 if amqp else None).start()
    try:
        yield server
    finally:
        if server.process and server.process.poll() is None:
            server.kill()
        elif server.process:
            server._close()


def login_body(product: str, device: str, secret: str, method: str = "hmacsha1") -> bytes:
    members = {"productKey": product, "deviceName": device, "clientId": f"{product}.{device}"}
    sign = signature.sign(secret, signature.content_of(members), method)
    return json.dumps({**members, "version": "default", "signmethod": method, "sign": sign}).encode()


@dataclass
class Device:
    """A device on one kept-alive connection, which it makes anew when it breaks."""

    server: Server
    product: str
    name: str
    secret: str
    token: str = ""
    _streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes, *headers: str) -> tuple[int, Any]:
        """(HTTP status, JSON body); OSError or asyncio.IncompleteReadError when the connection breaks."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(
                "127.0.0.1", self.server.port, ssl=self.server.context(), server_hostname="localhost"
            )
        reader, writer = self._streams
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
        try:
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            head = await reader.readuntil(b"\r\n\r\n")
            size = re.search(rb"Content-Length: (\d+)\r\n", head)
            assert size, head
            answer = json.loads(await reader.readexactly(int(size[1])))
        except BaseException:
            await self.close()
            raise
        if b"Connection: close" in head:
            await self.close()
        return int(head.split()[1]), answer

    async def login(self) -> int:
        body = login_body(self.product, self.name, self.secret)
        _, answer = await self.post("/auth", body, "Content-Type: application/json")
        if answer["code"] == 0:
            self.token = answer["info"]["token"]
        return int(answer["code"])

    async def publish(self, payload: bytes, levels: str = "user/update") -> tuple[int, int]:
        """(code, messageId or 0)."""
        path = f"/topic/{self.product}/{self.name}/{levels}"
        _, answer = await self.post(path, payload, f"password: {self.token}", "Content-Type: application/octet-stream")
        return int(answer["code"]), int(answer.get("info", {}).get("messageId", 0))

    async def close(self) -> None:
        if self._streams:
            writer = self._streams[1]
            self._streams = None
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError, asyncio.TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 2)


def make_devices(server: Server, count: int, name: str = "load test") -> list[Device]:
    """A product and `count` devices of it, made by the command line."""
    product = cli_json("product", "create", name, data=server.data)["productKey"]
    rows = "".join(f"{product},device{number:04},secret{number}\n" for number in range(count))
    fleet = server.data.parent / "fleet.csv"
    fleet.write_text("ProductKey,DeviceName,DeviceSecret\n" + rows)
    cli("device", "import", str(fleet), data=server.data)
    return [Device(server, product, f"device{number:04}", f"secret{number}") for number in range(count)]


def stored(data: Path, product: str, *device: str, limit: int = 10_000) -> dict[int, bytes]:
    """messageId → payload of what devices, or one of them, have reported."""
    whose = ["--product", product, *(word for name in device for word in ("--device", name))]
    messages = cli_json("messages", "list", *whose, "--limit", str(limit), data=data)
    return {
        int(each["messageId"]): base64.b64decode(each["payload"])
        for each in messages
        if each["origin"] not in ("status", "lifecycle")
    }
