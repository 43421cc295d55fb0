"""Flow control of the whole program: exact over all workers, and a refusal cheaper than an answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.house import Server, cli_json, login_body, serving

RATE = 40
WORKERS = 3


@dataclass
class Blast:
    """What so many connections were answered, and when."""

    codes: list[int] = field(default_factory=list)
    ids: set[int] = field(default_factory=set)
    began: float = 0.0
    ended: float = 0.0
    first: float = 0.0
    last: float = 0.0

    @property
    def accepted(self) -> int:
        return self.codes.count(0)


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: bytes, *headers: str
) -> dict[str, object]:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(next(line for line in head.split(b"\r\n") if line.startswith(b"Content-Length")).split()[1])
    document: dict[str, object] = json.loads(await reader.readexactly(size))
    return document


async def blast(server: Server, devices: list[tuple[str, str, str]], connections: int, seconds: float) -> Blast:
    """As many reports as `connections` can send in the time, each for one of the devices (product, name, secret)."""
    found = Blast()
    context = server.context()
    opened = []
    for number in range(connections):
        product, name, secret = devices[number % len(devices)]
        streams = await asyncio.open_connection("localhost", server.port, ssl=context)
        answer = await ask(*streams, "/auth", login_body(product, name, secret), "Content-Type: application/json")
        info = answer["info"]
        assert isinstance(info, dict)
        opened.append((streams, f"/topic/{product}/{name}/user/update", f"password: {info['token']}"))
    found.began = time.monotonic()

    async def report(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], path: str, password: str) -> None:
        sent = found.began
        while sent < found.began + seconds:
            sent = time.monotonic()
            answer = await ask(*streams, path, b"x", password, "Content-Type: application/octet-stream")
            found.codes.append(int(str(answer["code"])))
            found.first = found.first or time.monotonic()
            found.last = max(found.last, sent)
            if not found.codes[-1]:
                info = answer["info"]
                assert isinstance(info, dict)
                found.ids.add(info["messageId"])

    await asyncio.gather(*(report(*each) for each in opened))
    found.ended = time.monotonic()
    for (_, writer), _, _ in opened:
        writer.close()
    return found


def fleet(data: Path, count: int) -> list[tuple[str, str, str]]:
    product = cli_json("product", "create", "lamps", data=data)["productKey"]
    devices = [cli_json("device", "create", product, f"lamp{number}", data=data) for number in range(count)]
    return [(product, str(each["deviceName"]), str(each["deviceSecret"])) for each in devices]


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["device_rate", "product_rate", "address_rate"])
def test_the_limit_is_exact_over_all_workers(tmp_path: Path, limit: str) -> None:
    """Connections that the kernel spreads over three workers, all at once: what is accepted is the burst and what the time
    has brought since, and exactly that is stored."""
    data = tmp_path / "data"
    devices = fleet(data, 1 if limit == "device_rate" else 4)
    rates = {"device_rate": "0", limit: str(RATE)}
    options = [part for name, rate in rates.items() for part in (f"--{name.replace('_', '-')}", rate)]
    with serving(data, "--workers", str(WORKERS), "--auth-rate", "0", *options) as server:
        assert len(server.children("uplinkd-worker")) == WORKERS
        found = asyncio.run(blast(server, devices, 12, 1.5))
        assert set(found.codes) == {0, 40000}
        stored = cli_json("messages", "list", "--limit", "1000", data=data)
        assert {int(each["messageId"]) for each in stored if "/user/update" in each["topic"]} == found.ids
    assert len(found.ids) == found.accepted
    # Logins of the address have used up some of its burst; the clock here and there is the same.
    least = RATE * (found.last - found.first) + (0 if limit == "address_rate" else RATE)
    most = RATE * (found.ended - found.began) + RATE
    assert least - 1 <= found.accepted <= most + 1
    assert most - found.accepted <= (RATE if limit == "address_rate" else 0) + RATE * 0.5 + 2


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[tuple[Server, list[tuple[str, str, str]]]]:
    data = tmp_path / "data"
    devices = fleet(data, 41)
    with serving(data, "--workers", "1", "--device-rate", "100", "--auth-rate", "0") as server:
        yield server, devices


def cpu_nanoseconds(server: Server) -> int:
    """What its workers and its engine have used so far."""
    pids = [*server.children("uplinkd-worker"), *server.children("nats-server")]
    threads = [thread for pid in pids for thread in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads)


@pytest.mark.slow
def test_a_refused_report_costs_less_than_a_served_one(limited: tuple[Server, list[tuple[str, str, str]]]) -> None:
    """Server CPU, the engine's and the record's included, in one run: forty devices within their burst, then one far beyond."""
    server, devices = limited

    async def cost(devices: list[tuple[str, str, str]], times: int, wanted: int) -> float:
        context = server.context()
        opened = []
        for product, name, secret in devices:
            streams = await asyncio.open_connection("localhost", server.port, ssl=context)
            answer = await ask(*streams, "/auth", login_body(product, name, secret), "Content-Type: application/json")
            info = answer["info"]
            assert isinstance(info, dict)
            opened.append((streams, f"/topic/{product}/{name}/user/update", f"password: {info['token']}"))
        await asyncio.sleep(1)  # what a login leaves to be written
        before, codes = cpu_nanoseconds(server), []
        for _ in range(times):
            answers = await asyncio.gather(
                *(
                    ask(*streams, path, b"x" * 200, word, "Content-Type: application/octet-stream")
                    for streams, path, word in opened
                )
            )
            codes += [int(str(answer["code"])) for answer in answers]
        used = cpu_nanoseconds(server) - before
        for (_, writer), _, _ in opened:
            writer.close()
        assert codes.count(wanted) > 0.9 * len(codes)
        return used / len(codes)

    async def both() -> tuple[float, float]:
        served = await cost(devices[:40], 95, 0)
        await cost(devices[40:] * 40, 2, 0)  # most of its burst
        return served, await cost(devices[40:] * 40, 95, 40000)

    served, refused = asyncio.run(both())
    assert refused < served, (refused, served)
