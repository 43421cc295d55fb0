"""What the operator's door keeps from strangers, from those who were let in before, and from those who may only look."""

from __future__ import annotations

import asyncio
import logging
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.admin.conftest import PASSWORD, URL, House
from uplinkd.admin import access, door, doorkeeper, guard
from uplinkd.admin.access import Attempts, Denied, TooOften, change_password, check_password, hash_password, sign_in
from uplinkd.admin.documents import JobDocument
from uplinkd.admin.jobs import Job, Jobs, JobState
from uplinkd.admin.server import _server, application
from uplinkd.core.errors import NotFound, Stale, Unavailable
from uplinkd.core.operators import Role, Scope, User
from uplinkd.engine import StreamState

V1 = "/api/v1"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("LOCALHOST.", 200),
        ("my.localhost", 200),
        ("console.example.com", 200),
        ("evil.example:8080", 421),
        ("127.0.0.1.evil.example", 421),
        ("[", 200),
    ],
)
async def test_a_name_that_somebody_points_here_gets_nothing(house: House, host: str, status: int) -> None:
    """DNS rebinding: a page of evil.example, which resolves to 127.0.0.1 by now, reads nothing, and guesses no password."""
    house.office.settings = house.office.settings.model_copy(update={"tls_name": ("console.example.com",)})
    transport = httpx.ASGITransport(application(house.office), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=URL, headers={"Host": host}) as client:
        for path in ("/metrics", "/sign-in", *([f"{V1}/openapi.json"] if status == 421 else [])):
            answer = await client.get(path)
            assert answer.status_code == status, path
        if status == 421:
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert "tls_name" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "same-origin", "Origin": "null"}, 401),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://localhost"}, 401),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({}, 401),
    ],
)
async def test_a_page_of_another_site_signs_nobody_in(house: House, headers: dict[str, str], status: int) -> None:
    """Nor does one in a browser that sends no Sec-Fetch-Site."""
    async with house.client(**headers) as client:
        assert (await client.post("/sign-in", data={"name": "x", "password": "y"})).status_code == status
        answer = await client.post(f"{V1}/products", json={"name": "my lamps"})
        assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (f"{V1}/imports", "text/csv"),
        (f"{V1}/products", "application/json"),
        ("/import", "multipart/form-data; boundary=part"),
    ],
)
async def test_nothing_is_read_of_what_a_stranger_sends(house: House, path: str, kind: str) -> None:
    """Not 256 MiB for a start: who it is comes first."""
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        head = b'--part\r\nContent-Disposition: form-data; name="file"; filename="fleet.csv"\r\n\r\n'
        for part in [head, *[b"x" * 65536] * 20, b"\r\n--part--\r\n"]:
            read += 1
            yield part

    async with house.client(**{"Content-Type": kind}) as stranger:
        answer = await stranger.post(path, content=body())
    assert answer.status_code == 401
    assert read <= 1


async def test_a_malformed_body_does_not_come_before_the_key(house: House) -> None:
    """401, and nothing about what the body should have been."""
    async with house.client(**{"Content-Type": "application/json"}) as stranger:
        assert (await stranger.post(f"{V1}/keys", content=b"{")).status_code == 401


async def test_who_is_let_in_no_longer_watches_no_longer(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that was begun ends with its key."""
    monkeypatch.setattr(doorkeeper, "_LOOK_SECONDS", 0.0)
    made, key = house.registry.operators.create_key("wall", Scope.READ)
    async with house.client(Authorization=f"Bearer {key}") as wall:
        stream = asyncio.create_task(wall.get(f"{V1}/stats/stream"))
        for _ in range(3):
            await asyncio.sleep(0.05)
            house.office.figures.look()
        assert not stream.done()
        house.registry.operators.delete_key(made.name)
        for _ in range(20):
            await asyncio.sleep(0.05)
            house.office.figures.look()
        assert stream.done()
        assert house.office.watching == 0


async def test_another_key_of_the_same_name_gets_no_answer_of_the_first(house: House) -> None:
    """What was made for ci is not shown to the ci of today."""
    operators = house.registry.operators
    answers = []
    for scope in (Scope.OPERATE, Scope.READ):
        _, key = operators.create_key("ci", scope)
        async with house.client(Authorization=f"Bearer {key}", **{"Idempotency-Key": "1"}) as ci:
            answers.append(await ci.post(f"{V1}/products", json={"name": "my lamps"}))
        operators.delete_key("ci")
    assert [answer.status_code for answer in answers] == [201, 403]


async def test_a_password_in_the_wrong_field_is_in_no_audit(house: House) -> None:
    """Of names that are nobody's nothing is kept."""
    async with house.client() as client:
        assert (await client.post("/sign-in", data={"name": PASSWORD, "password": ""})).status_code in (401, 422)
        assert (await client.post("/sign-in", data={"name": PASSWORD, "password": "x"})).status_code == 401
    (entry,) = house.registry.operators.audit(action="session.refused", limit=10)[:1]
    assert (entry.actor.name, entry.target, entry.detail) == ("(unknown)", "", "there is no such user")
    assert PASSWORD not in str(house.registry.operators.audit(limit=100))


async def test_a_session_that_was_found_guesses_no_password(house: House) -> None:
    """Changing it is counted as signing in is."""
    async with house.signed_in() as browser:
        for number in range(10):
            answer = await browser.post(
                "/password", old=f"wrong {number}", new="another long one", again="another long one"
            )
            assert answer.status_code == 400
        answer = await browser.post("/password", old=PASSWORD, new="another long one", again="another long one")
        assert answer.status_code == 429
        assert "too many attempts" in answer.text
    assert len(house.registry.operators.audit(action="password.refused", limit=100)) == 10


def test_attempts_are_counted_by_what_nobody_has_without_end(house: House) -> None:
    """A name is cut, and of IPv6 a /64 is one address: neither memory nor guesses grow with what somebody makes up."""
    attempts = Attempts()
    for number in range(10):
        attempts.failed("x" * 64 + "y" * number, f"2001:db8::{number:x}")
    with pytest.raises(TooOften):
        attempts.check("x" * 64, "2001:db8::ffff")
    attempts.check("x" * 64, "2001:db8:0:1::1")
    for _ in range(10):
        attempts.failed("alice", "::ffff:192.0.2.1")
    with pytest.raises(TooOften):
        attempts.check("alice", "192.0.2.1")
    with pytest.raises(TooOften):
        sign_in(house.registry.operators, attempts, "alice", PASSWORD, "::ffff:192.0.2.1")


def test_a_password_that_is_replaced_while_it_is_checked_opens_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check takes its time, and all sessions have ended by then."""
    operators = house.registry.operators
    operators.create_user("alice", Role.VIEWER, hash_password(PASSWORD), one_time=False)

    def meanwhile(user: User | None, password: str) -> bool:
        operators.renew_password("alice")
        return check_password(user, password)

    monkeypatch.setattr(access, "check_password", meanwhile)
    with pytest.raises(Denied):
        sign_in(operators, Attempts(), "alice", PASSWORD, "192.0.2.1")


def test_a_password_that_is_replaced_while_another_is_chosen_stays(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An admin has given a new one, perhaps since a stranger knows the old one."""
    operators = house.registry.operators
    user = operators.create_user("alice", Role.VIEWER, hash_password(PASSWORD), one_time=False)
    given: list[str] = []

    def meanwhile(user: User | None, password: str) -> bool:
        given.append(operators.renew_password("alice")[1])
        return check_password(user, password)

    monkeypatch.setattr(access, "check_password", meanwhile)
    with pytest.raises(Stale, match="changed meanwhile"):
        change_password(operators, Attempts(), user, PASSWORD, "another long one", "192.0.2.1")
    assert check_password(operators.find_user("alice"), given[0])


async def test_looking_does_not_wait_for_an_import(house: House) -> None:
    """The registry has one write lock, and that a key or a session was used is written down beside the request."""
    async with house.key(Scope.READ) as api, house.signed_in() as browser:
        house.office._noted.clear()
        lock = sqlite3.connect(house.office.settings.data / "registry.sqlite", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        begun = time.monotonic()
        assert (await api.get(f"{V1}/products")).status_code == 200
        assert (await browser.get("/products")).status_code == 200
        assert time.monotonic() - begun < 2
        lock.execute("ROLLBACK")
        lock.close()
        await asyncio.wait(set(house.office._noting), timeout=5)
    keys = house.registry.operators.api_keys()
    assert all(key.last_used for key in keys)


async def test_nothing_is_sent_that_the_audit_cannot_have(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of 503 after the message has gone would have it sent twice."""
    product = house.registry.create_product("my lamps")
    house.registry.create_device(product.key, "lamp-0001")

    def away(*facts: str) -> None:
        raise Unavailable("the registry is locked")

    monkeypatch.setattr(house.registry.operators, "note", away)
    topic = f"/{product.key}/lamp-0001/user/get"
    async with house.key() as api:
        answer = await api.post(
            f"{V1}/products/{product.key}/devices/lamp-0001/messages", json={"topic": topic, "text": "x"}
        )
    assert answer.status_code == 503
    assert house.sent == []


async def test_the_audit_tells_of_a_message_that_did_not_go(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was in it before it was sent."""
    product = house.registry.create_product("my lamps")

    async def away(*_: object) -> None:
        raise Unavailable("the engine is away")

    monkeypatch.setattr("uplinkd.admin.api.send_down", away)
    async with house.key() as api:
        topic = f"/broadcast/{product.key}/all"
        answer = await api.post(f"{V1}/products/{product.key}/broadcasts", json={"topic": topic, "text": "x"})
    assert answer.status_code == 503
    entries = house.registry.operators.audit(action="message", limit=10)
    assert [entry.action for entry in entries] == ["message.failed", "message.send"]


async def test_an_engine_that_stands_still_is_said_at_once(house: House) -> None:
    """Within two seconds, not after the engine's own patience."""

    class Frozen:
        async def state(self) -> StreamState:
            await asyncio.sleep(60)
            raise AssertionError

        latest = by_id = close = state

    house.office._reader = Frozen()  # type: ignore[assignment]
    async with house.key(Scope.READ) as api:
        begun = time.monotonic()
        answers = await asyncio.gather(*[api.get(V1 + path) for path in ("/messages", "/messages/5")])
        assert time.monotonic() - begun < 3
    assert [answer.status_code for answer in answers] == [503, 503]
    house.office._reader = None


def test_who_may_only_look_does_not_see_bad_rows() -> None:
    """A file with its columns swapped has secrets where names should be."""
    reason = "DeviceName 's3cret!': it has 1 to 64 characters"
    job = Job("1", "import", "", "alice", 0, "bytes", result={"badRows": 1, "bad": [{"line": 2, "reason": reason}]})
    assert JobDocument.of(job, Scope.READ).result == {"badRows": 1}
    assert "s3cret" in str(JobDocument.of(job, Scope.OPERATE).result)


async def test_a_job_under_way_is_not_forgotten() -> None:
    """However many have ended since; and of too many at once the last is told to come again."""
    jobs = Jobs()
    going = asyncio.Event()
    loop = asyncio.get_running_loop()

    def long(_: object) -> dict[str, object]:
        asyncio.run_coroutine_threadsafe(going.wait(), loop).result(20)
        return {}

    first = jobs.start("import", "", "bytes", long)
    last = first
    for _ in range(60):
        last = jobs.start("import", "", "bytes", lambda _: {})
        while last.state is JobState.RUNNING:
            await asyncio.sleep(0.001)
    assert jobs.get(first.id) is first
    assert len(jobs.all()) == 50
    more = [jobs.start("import", "", "bytes", long) for _ in range(2)]
    with pytest.raises(TooOften, match="wait for one to end"):
        jobs.start("import", "", "bytes", long)
    going.set()
    while any(job.state is JobState.RUNNING for job in [first, *more]):
        await asyncio.sleep(0.001)
    with pytest.raises(NotFound):
        jobs.get("nothing")


async def test_whoever_breaks_off_an_upload_is_no_fault_of_ours(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is stored, nothing is in the log."""
    _, key = house.registry.operators.create_key("ci", Scope.OPERATE)
    parts: Iterator[dict[str, object]] = iter(
        [
            {"type": "http.request", "body": b"ProductKey,DeviceName,DeviceSecret\n", "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> dict[str, object]:
        return next(parts)

    async def send(message: object) -> None:
        pass

    headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"text/csv")]
    scope = {
        **{"type": "http", "method": "POST", "path": f"{V1}/imports", "raw_path": b"", "query_string": b""},
        **{"headers": headers, "scheme": "http", "server": ("localhost", 80), "client": ("192.0.2.9", 1)},
    }
    with caplog.at_level(logging.INFO, "uplinkd.admin"):
        await house.transport.app(scope, receive, send)
    assert caplog.records == []
    assert house.office.jobs.all() == []


async def test_nobody_is_sent_to_the_name_in_the_host_header(house: House) -> None:
    """A path with a slash too many is a path that is not there."""
    async with house.key() as api:
        for path in ("/products/", f"{V1}/products/"):
            answer = await api.get(path)
            assert (answer.status_code, answer.headers.get("Location")) == (404, None)


async def test_health_may_be_asked_for_by_its_head(house: House) -> None:
    """Some balancers do."""
    async with house.client() as anyone:
        assert (await anyone.head("/healthz")).status_code == 200
        assert (await anyone.head("/metrics")).status_code == 200


@asynccontextmanager
async def served(house: House) -> AsyncIterator[tuple[str, int]]:
    """The same over a real socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _server(application(house.office), None)
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            await serving


async def told(place: tuple[str, int], *parts: bytes, pause: float = 0.0, within: float = 5.0) -> bytes:
    """All that is answered until the connection is closed."""
    reader, writer = await asyncio.open_connection(*place)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
    except ConnectionError:
        pass
    try:
        return await asyncio.wait_for(reader.read(), within)
    except ConnectionError:
        return b"reset"
    finally:
        writer.close()


HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


async def test_a_head_without_end_is_cut_off(house: House) -> None:
    """In one header or in many, and after a body in parts: memory is not what a stranger sends."""
    chunked = HEAD.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
    async with served(house) as place:
        for head, part in ((HEAD, b"X: " + b"a" * 8192), (HEAD, b"X: a\r\n" * 2000), (chunked, b"X: a\r\n" * 2000)):
            answer = await told(place, head, *[part] * 200, pause=0.001)
            assert b"HTTP/1.1 431 " in answer or answer == b"reset"
        small = await told(place, HEAD + b"X: " + b"a" * 8192 + b"\r\nConnection: close\r\n\r\n")
        assert small.startswith(b"HTTP/1.1 200 ")


async def test_a_head_that_does_not_come_is_not_waited_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the first one of a connection nor a later one, however often a byte of it comes."""
    monkeypatch.setattr(door, "HEAD_SECONDS", 0.3)
    async with served(house) as place:
        assert await told(place) == b""
        assert await told(place, *[b"G", b"E", b"T", b" ", b"/"] * 2, pause=0.1) in (b"", b"reset")
        twice = await told(place, HEAD + b"\r\n", HEAD)
        assert twice.count(b"HTTP/1.1 200 ") == 1


async def test_a_body_that_does_not_come_is_not_waited_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """408 and the connection's end; a fleet may take its time, as long as it comes."""
    monkeypatch.setattr(guard, "_BODY_SECONDS", 0.3)
    _, key = house.registry.operators.create_key("ci", Scope.OPERATE)
    let_in = b"Host: localhost\r\nAuthorization: Bearer " + key.encode() + b"\r\nContent-Length: 50\r\n"
    async with served(house) as place:
        post = b"POST /api/v1/products HTTP/1.1\r\nContent-Type: application/json\r\n" + let_in + b"\r\n{"
        answer = await told(place, post)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"application/problem+json" in answer
        fleet = b"POST /api/v1/imports HTTP/1.1\r\nContent-Type: text/csv\r\nConnection: close\r\n" + let_in + b"\r\n"
        rows = b"ProductKey,DeviceName,DeviceSecret\npk1,lamp-0001,\n"
        parts = [rows[start : start + 10] for start in range(0, 50, 10)]
        assert (await told(place, fleet, *parts, pause=0.15)).startswith(b"HTTP/1.1 202 ")
        assert (await told(place, fleet, rows[:20])).startswith(b"HTTP/1.1 408 ")


async def test_websockets_are_not_spoken(house: House) -> None:
    """An upgrade is passed over: there is nothing behind it."""
    upgrade = b"Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    async with served(house) as place:
        answer = await told(place, HEAD + b"Connection: upgrade, close\r\n" + upgrade + b"\r\n")
    assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))
