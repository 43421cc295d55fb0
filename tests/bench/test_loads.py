"""The benchmark's own programs do what its figures say: the load in C, and the servers that stand beside uplinkd. Nothing is measured
here."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from bench.on_granian import Application

from bench import peers, visits
from uplinkd.client import login_body
from uplinkd.engine.embedded import EmbeddedServer
from uplinkd.settings import Settings

pytestmark = pytest.mark.slow

DEVICE = "device0000"
TOPIC = f"/topic/{peers.PRODUCT}/{DEVICE}/user/update"
LOGIN = login_body(peers.PRODUCT, DEVICE, peers.SECRET, method="hmacsha1")
OCTETS, JSON = {"Content-Type": "application/octet-stream"}, {"Content-Type": "application/json"}


def test_visits_sign_in_report_and_leave_and_others_rest(tmp_path: Path) -> None:
    """Each visit is a message that is stored; a right answer is told from a wrong one; as many rest as are asked for."""
    binary, fault = visits.build(tmp_path)
    assert binary, fault
    with peers.uplinkd(tmp_path / "one", 4) as peer:
        found = visits.visit_load(binary, peer, tmp_path, connections=4, seconds=1)
        assert found.good > 0
        assert (found.bad, found.errors) == (0, 0), found.sample
        assert 0 < found.p50 <= found.p99
        unknown = visits.visit_load(binary, peer, tmp_path, connections=6, seconds=1)
        assert unknown.bad > 0
        assert "20000" in unknown.sample or "20003" in unknown.sample
        with visits.holding(binary, peer, tmp_path, 50) as others:
            others()


@pytest.mark.parametrize("start", [peers.fastapi, peers.aiohttp])
def test_the_baseline_is_the_same_in_each_shell(
    tmp_path: Path, start: Callable[[Path, Path, int], AbstractContextManager[peers.Peer]]
) -> None:
    """It signs in, stores, and refuses what uplinkd refuses."""
    with peers.uplinkd(tmp_path / "one", 1):
        tls = tmp_path / "one" / "data" / "tls"
        with start(tmp_path, tls, 1) as peer:
            token = peers.login(peer, DEVICE)
            door = http.client.HTTPSConnection("localhost", peer.port, timeout=10, context=peers.context(peer.ca))
            answers = []
            for headers in ({"password": token}, {}, {"password": token[:-8] + "AAAAAAA="}):
                door.request("POST", TOPIC, b"hello", {**OCTETS, **headers})
                answers.append(json.loads(door.getresponse().read()))
            door.close()
    assert [answer["code"] for answer in answers] == [0, 20002, 20003]
    assert answers[0]["info"]["messageId"] == 1


@dataclass
class Scope:
    """A request, as RSGI tells of it."""

    path: str
    headers: dict[str, str]
    query_string: str = ""
    client: str = "192.0.2.7:4711"


class Exchange:
    """Its body, and what is answered."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.answer = b""

    async def __call__(self) -> bytes:
        return self._body

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        assert status == 200
        self.answer = body


def test_what_granian_runs_is_uplinkds_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It signs in, stores, and refuses with the same words; a device that is not in memory is looked up."""
    peers.import_devices(tmp_path / "fleet.csv", tmp_path / "data", 1)
    engine = EmbeddedServer.start(Settings(data=tmp_path / "data", nats_listen=""))
    monkeypatch.setenv("BENCH_DATA", str(tmp_path / "data"))
    application = Application()
    with asyncio.Runner() as runner:
        application.__rsgi_init__(runner.get_loop())

        def ask(path: str, headers: dict[str, str], body: bytes) -> dict[str, object]:
            exchange = Exchange(body)
            runner.run(
                application.__rsgi__(Scope(path, {key.lower(): value for key, value in headers.items()}), exchange)
            )
            found: dict[str, object] = json.loads(exchange.answer)
            return found

        try:
            runner.run(asyncio.sleep(1))
            signed_in = ask("/auth", JSON, LOGIN.encode())
            assert signed_in["code"] == 0
            info = signed_in["info"]
            assert isinstance(info, dict)
            stored = ask(TOPIC, {**OCTETS, "password": info["token"]}, b"hello")
            assert stored["code"] == 0
            assert ask(TOPIC, OCTETS, b"hello")["code"] == 20002
        finally:
            engine.stop()
