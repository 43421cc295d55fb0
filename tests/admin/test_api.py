"""The management API: what it gives, what it refuses, and what it leaves in the audit."""

from __future__ import annotations

import asyncio
import base64
import csv
import io
import re
import tempfile
import threading
from typing import Any, BinaryIO

import httpx
import pytest

from tests.admin.conftest import House
from tests.house import until
from uplinkd.admin.access import csrf_token
from uplinkd.admin.doorkeeper import COOKIE
from uplinkd.core.errors import Unavailable
from uplinkd.core.model import Device
from uplinkd.core.operators import Scope

V1 = "/api/v1"


async def test_a_product_and_a_device_are_made_shown_changed_and_deleted(house: House) -> None:
    """The usual life, with versions that another's change makes stale."""
    async with house.key() as api:
        made = await api.post(f"{V1}/products", json={"name": "my lamps"})
        assert made.status_code == 201
        product = made.json()
        key = product["productKey"]
        assert made.headers["Location"] == f"{V1}/products/{key}"
        assert len(product["productSecret"]) == 16

        device = await api.post(f"{V1}/products/{key}/devices", json={"deviceName": "lamp-0001"})
        assert device.status_code == 201
        assert len(device.json()["deviceSecret"]) == 32
        version = device.headers["ETag"]

        off = await api.patch(
            f"{V1}/products/{key}/devices/lamp-0001", json={"enabled": False}, headers={"If-Match": version}
        )
        assert (off.status_code, off.json()["state"]) == (200, "disabled")
        stale = await api.patch(
            f"{V1}/products/{key}/devices/lamp-0001", json={"enabled": True}, headers={"If-Match": version}
        )
        assert stale.status_code == 412
        assert "was changed meanwhile" in stale.json()["detail"]

        refused = await api.delete(f"{V1}/products/{key}")
        assert refused.status_code == 409
        assert (await api.delete(f"{V1}/products/{key}/devices/lamp-0001")).status_code == 204
        assert (await api.delete(f"{V1}/products/{key}")).status_code == 204
        assert (await api.get(f"{V1}/products/{key}")).status_code == 404


async def test_an_application_that_was_changed_meanwhile_is_neither_changed_nor_deleted(house: House) -> None:
    """By whoever has not seen the change."""
    lamps, pumps = house.registry.create_product("my lamps"), house.registry.create_product("my pumps")
    async with house.key() as api:
        url = f"{V1}/apps/billing"
        made = await api.post(f"{V1}/apps", json={"name": "billing", "products": [lamps.key]})
        seen = {"If-Match": made.headers["ETag"]}
        changed = await api.patch(url, json={"products": [lamps.key, pumps.key]}, headers=seen)
        assert changed.status_code == 200
        assert (await api.patch(url, json={"products": []}, headers=seen)).status_code == 412
        assert (await api.delete(url, headers=seen)).status_code == 412
        assert (await api.delete(url, headers={"If-Match": changed.headers["ETag"]})).status_code == 204


async def test_no_list_and_no_audit_holds_a_secret(house: House) -> None:
    """Secrets are shown on demand, to operators, and the audit says to whom."""
    product = house.registry.create_product("my lamps")
    device = house.registry.create_device(product.key, "lamp-0001")
    async with house.key() as api, house.key(Scope.READ) as reader:
        lists = [
            f"/products/{product.key}/devices",
            "/products",
            "/apps",
            "/keys",
            "/users",
            "/settings",
            "/jobs",
            "/logs",
        ]
        app = (await api.post(f"{V1}/apps", json={"name": "billing", "products": [product.key]})).json()
        shown = await api.get(f"{V1}/products/{product.key}/devices/lamp-0001/secret")
        assert shown.json() == {"secret": device.secret}
        text = "".join([(await api.get(V1 + path)).text for path in [*lists, "/audit"]])
        for secret in (device.secret, product.secret, app["secret"], api.headers["Authorization"].split()[1]):
            assert secret not in text
        audit = (await api.get(f"{V1}/audit", params={"action": "device.secret"})).json()["items"]
        assert [(entry["target"], entry["way"], entry["address"]) for entry in audit] == [
            (f"{product.key}/lamp-0001", "api", "192.0.2.9")
        ]
        refused = await reader.get(f"{V1}/products/{product.key}/devices/lamp-0001/secret")
        assert (refused.status_code, refused.headers["Content-Type"]) == (403, "application/problem+json")
        assert "needs the scope operate" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer uplk_wrong"}, 401),
        ({"Authorization": "Basic YTpi"}, 401),
        ({"Cookie": "uplinkd_session=guess"}, 401),
    ],
)
async def test_whoever_shows_nothing_that_holds_gets_nothing(
    house: House, headers: dict[str, str], status: int
) -> None:
    """401 with how to be let in."""
    async with house.client(**headers) as nobody:
        answer = await nobody.get(f"{V1}/products")
    assert answer.status_code == status
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["status"] == status


async def test_scopes_hold(house: House) -> None:
    """read looks, operate acts on devices, admin manages access."""
    async with house.key(Scope.READ) as reader, house.key(Scope.OPERATE) as operator:
        assert (await reader.post(f"{V1}/products", json={"name": "my lamps"})).status_code == 403
        assert (await operator.post(f"{V1}/products", json={"name": "my lamps"})).status_code == 201
        for path in ("/keys", "/users", "/audit", "/settings"):
            assert (await operator.get(V1 + path)).status_code == 403
        assert (await operator.post(f"{V1}/keys", json={"name": "x", "scope": "admin"})).status_code == 403
        assert (await operator.post(f"{V1}/users", json={"name": "x", "role": "admin"})).status_code == 403
        assert (await operator.post(f"{V1}/apps", json={"name": "x"})).status_code == 403


async def test_a_deleted_key_is_refused_at_once(house: House) -> None:
    """Also with an answer kept for its repeated creation."""
    async with house.key() as admin:
        key = (await admin.post(f"{V1}/keys", json={"name": "ci", "scope": "operate"})).json()["key"]
        async with house.client(Authorization=f"Bearer {key}") as ci:
            first = await ci.post(f"{V1}/products", json={"name": "my lamps"}, headers={"Idempotency-Key": "1"})
            assert first.status_code == 201
            assert (await admin.delete(f"{V1}/keys/ci")).status_code == 204
            again = await ci.post(f"{V1}/products", json={"name": "my lamps"}, headers={"Idempotency-Key": "1"})
            assert again.status_code == 401


async def test_a_repeated_creation_happens_once(house: House) -> None:
    """The second one gets the first one's answer; another request under the same key is a conflict."""
    product = house.registry.create_product("my lamps")
    url = f"{V1}/products/{product.key}/devices"
    async with house.key() as api, house.key() as other:
        headers = {"Idempotency-Key": "order 7"}
        first = await api.post(url, json={}, headers=headers)
        again = await api.post(url, json={}, headers=headers)
        assert (again.status_code, again.json()) == (201, first.json())
        assert again.headers["Idempotency-Replayed"] == "true"
        assert again.headers["ETag"] == first.headers["ETag"]
        assert len(list(house.registry.devices(product.key))) == 1
        assert (await api.post(url, json={"deviceName": "lamp"}, headers=headers)).status_code == 409
        assert (await other.post(url, json={}, headers=headers)).json() != first.json()
        failed = await api.post(f"{V1}/products", json={"name": "x"}, headers={"Idempotency-Key": "8"})
        assert failed.status_code == 400
        corrected = await api.post(f"{V1}/products", json={"name": "other lamps"}, headers={"Idempotency-Key": "8"})
        assert corrected.status_code == 201


async def test_a_creation_that_a_stop_cuts_off_happens_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thread does goes on, and nobody hears its outcome: the same request again is told to look first."""
    product = house.registry.create_product("my lamps")
    begun, going_on, create = threading.Event(), threading.Event(), house.registry.create_device

    def slow(*given: Any, **more: Any) -> Device:
        begun.set()
        going_on.wait(10)
        device: Device = create(*given, **more)
        return device

    monkeypatch.setattr(house.registry, "create_device", slow)
    url, headers = f"{V1}/products/{product.key}/devices", {"Idempotency-Key": "order 7"}
    async with house.key() as api:
        first = asyncio.create_task(api.post(url, json={}, headers=headers))
        await until(begun.is_set)
        first.cancel()
        await asyncio.wait([first])
        going_on.set()
        await until(lambda: list(house.registry.devices(product.key)))
        again = await api.post(url, json={}, headers=headers)
    assert (again.status_code, "its outcome is not known" in again.text) == (409, True)
    assert len(list(house.registry.devices(product.key))) == 1


async def test_devices_are_paged_by_cursor_prefix_and_state(house: House) -> None:
    """Each device once, by name."""
    product = house.registry.create_product("my lamps")
    for number in range(25):
        house.registry.create_device(product.key, f"lamp-{number:02}")
        house.registry.create_device(product.key, f"door-{number:02}")
    house.registry.set_enabled(product.key, "lamp-03", False)
    async with house.key(Scope.READ) as api:
        url, cursor, names = f"{V1}/products/{product.key}/devices", None, []
        while True:
            page = (
                await api.get(url, params={"prefix": "lamp-", "limit": 10, **({"cursor": cursor} if cursor else {})})
            ).json()
            names += [item["deviceName"] for item in page["items"]]
            if not (cursor := page["next"]):
                break
        assert names == [f"lamp-{number:02}" for number in range(25)]
        disabled = (await api.get(url, params={"state": "disabled"})).json()
        assert [item["deviceName"] for item in disabled["items"]] == ["lamp-03"]
        assert len((await api.get(url, params={"state": "inactive", "limit": 1000})).json()["items"]) == 49
        census = (await api.get(f"{V1}/products/{product.key}/census")).json()
        assert (census["total"], census["disabled"], census["inactive"]) == (50, 1, 49)


async def test_products_are_paged_and_searched(house: House) -> None:
    """An import may make thousands of them: neither a list nor a page has them all at once."""
    for number in range(120):
        house.registry.create_product(f"Lamps {number:03}", key=f"k{number}")
    async with house.key(Scope.READ) as api, house.signed_in() as browser:
        first = (await api.get(f"{V1}/products")).json()
        rest = (await api.get(f"{V1}/products", params={"cursor": first["next"], "limit": 1000})).json()
        keys = [item["productKey"] for item in first["items"] + rest["items"]]
        assert (len(first["items"]), keys, rest["next"]) == (100, [f"k{number}" for number in range(120)], None)
        found = (await api.get(f"{V1}/products", params={"text": "lamps 11"})).json()["items"]
        assert [item["productKey"] for item in found] == [f"k{number}" for number in range(110, 120)]
        assert (await api.get(f"{V1}/products", params={"text": "%"})).json()["items"] == []

        page = (await browser.get("/products?q=lamps")).text
        assert page.count('<a href="/products/k') == 50
        more = re.search(r'href="(/products\?[^"]*cursor=[^"]*)"', page)
        assert more
        second = (await browser.get(more[1].replace("&amp;", "&"))).text
        assert "Lamps 050" in second
        assert "Lamps 049" not in second
        assert (await browser.get("/search?q=Lamps 119")).headers["Location"] == "/products/k119"


async def finished(api: httpx.AsyncClient, job: dict[str, str]) -> dict[str, object]:
    for _ in range(400):
        found: dict[str, object] = (await api.get(f"{V1}/jobs/{job['id']}")).json()
        if found["state"] != "running":
            return found
        await asyncio.sleep(0.02)
    raise AssertionError("the job does not end")


async def test_a_fleet_goes_out_and_comes_in_as_a_stream(house: House) -> None:
    """What export gives, import takes."""
    async with house.key() as api:
        product = house.registry.create_product("my lamps")
        job = await api.post(f"{V1}/bulk-creations", json={"productKey": product.key, "prefix": "lamp-", "count": 1200})
        assert job.status_code == 202
        assert (await finished(api, job.json()))["result"]["created"] == 1200  # type: ignore[index]
        exported = (await api.get(f"{V1}/products/{product.key}/export", params={"prefix": "lamp-00"})).text
        rows = list(csv.DictReader(io.StringIO(exported)))
        assert len(rows) == 99 + 0
        assert rows[0]["DeviceName"] == "lamp-0001"
        deletion = await api.post(f"{V1}/product-deletions", params={"productKey": product.key})
        assert (await finished(api, deletion.json()))["result"] == {"deleted": 1200}
        headers = {"Content-Type": "text/csv"}
        job = await api.post(f"{V1}/imports", content=exported.encode(), headers=headers)
        assert (await finished(api, job.json()))["result"]["created"] == len(rows)  # type: ignore[index]
        assert house.registry.device(product.key, "lamp-0001").secret == rows[0]["DeviceSecret"]


async def test_a_file_that_is_no_fleet_is_refused_at_once_and_bad_rows_by_line(house: House) -> None:
    """400 for the file; for rows the job says which."""
    async with house.key() as api:
        headers = {"Content-Type": "text/csv"}
        no_fleet = await api.post(f"{V1}/imports", content=b"a,b\n1,2\n", headers=headers)
        assert (no_fleet.status_code, "ProductKey is missing" in no_fleet.json()["detail"]) == (400, True)
        wrong_kind = await api.post(f"{V1}/imports", content=b"x", headers={"Content-Type": "text/plain"})
        assert wrong_kind.status_code == 400
        fleet = b"ProductKey,DeviceName,DeviceSecret\npk,good,\npk,bad name,\n"
        result = (await finished(api, (await api.post(f"{V1}/imports", content=fleet, headers=headers)).json()))[
            "result"
        ]
        assert (result["stored"], result["bad"][0]["line"]) == (False, 3)  # type: ignore[index]
        kept = await api.post(f"{V1}/imports", content=fleet, headers=headers, params={"skipBad": "true"})
        assert (await finished(api, kept.json()))["result"]["created"] == 1  # type: ignore[index]


async def test_a_fleet_for_which_there_is_no_room_is_told_so(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the API and on the console's page: it is no fault of uplinkd, and may be tried again."""

    def full(**_: object) -> BinaryIO:
        return open("/dev/full", "w+b")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    fleet = b"ProductKey,DeviceName,DeviceSecret\n" + b"pk,lamp-1,\n" * 2000
    async with house.key() as api:
        answer = await api.post(f"{V1}/imports", content=fleet, headers={"Content-Type": "text/csv"})
        assert (answer.status_code, "No space left on device" in answer.json()["detail"]) == (503, True)
    async with house.signed_in() as browser:
        token = {"X-CSRF-Token": csrf_token(browser.client.cookies[COOKIE])}
        shown = await browser.client.post("/import", headers=token, files={"file": ("fleet.csv", fleet, "text/csv")})
        assert (shown.status_code, "No space left on device" in shown.text) == (503, True)


async def test_a_cancelled_import_stores_nothing(house: House) -> None:
    """It ends at its next step."""
    rows = "".join(f"pk,device{number:06},\n" for number in range(60_000))
    async with house.key() as api:
        content = b"ProductKey,DeviceName,DeviceSecret\n" + rows.encode()
        job = (await api.post(f"{V1}/imports", content=content, headers={"Content-Type": "text/csv"})).json()
        assert (await api.delete(f"{V1}/jobs/{job['id']}")).status_code == 202
        assert (await finished(api, job))["state"] == "cancelled"
    assert house.registry.products() == []


async def test_topic_classes_are_listed_added_and_removed(house: House) -> None:
    """With wildcards, whose # is sent as %23."""
    product = house.registry.create_product("my lamps")
    url = f"{V1}/products/{product.key}/topic-classes"
    async with house.key() as api:
        assert len((await api.get(url)).json()["items"]) == 6
        added = await api.post(url, json={"levels": "rooms/+/#", "right": "subscribe"})
        assert added.json()["topicClass"] == f"/{product.key}/${{deviceName}}/rooms/+/#"
        assert (await api.post(url, json={"levels": "rooms/+/#", "right": "subscribe"})).status_code == 409
        assert (await api.post(url, json={"levels": "a b", "right": "publish"})).status_code == 400
        assert (await api.delete(f"{url}/rooms/+/%23")).status_code == 204
        assert (await api.delete(f"{url}/rooms/+/%23")).status_code == 404


async def test_messages_are_searched_paged_and_shown_by_id(house: House) -> None:
    """The newest first; ids are text, since JavaScript would lose digits of them."""
    ids = [await house.stored(f"/pk/lamp-{number % 2}/user/update", b"%d" % number) for number in range(25)]
    binary = await house.stored("/pk/lamp-9/user/update", b"\xff\x00")
    async with house.key(Scope.READ) as api:
        cursor, seen = None, []
        while True:
            params: dict[str, str | int] = {
                "product": "pk",
                "device": "lamp-1",
                "limit": 5,
                **({"cursor": cursor} if cursor else {}),
            }
            page = (await api.get(f"{V1}/messages", params=params)).json()
            seen += [int(item["messageId"]) for item in page["items"]]
            if not (cursor := page["next"]):
                break
        assert seen == [number for place, number in enumerate(ids) if place % 2][::-1]
        shown = (await api.get(f"{V1}/messages/{binary}")).json()
        assert (shown["messageId"], shown["text"], base64.b64decode(shown["payload"])) == (
            str(binary),
            None,
            b"\xff\x00",
        )
        assert (await api.get(f"{V1}/messages/{binary + 1}")).status_code == 404
        assert (await api.get(f"{V1}/messages/abc")).status_code == 400
        assert (await api.get(f"{V1}/messages", params={"device": "a*"})).status_code == 400


async def test_a_message_goes_down_and_the_audit_has_it_without_its_payload(house: House) -> None:
    """To a device on one of its topics, or to all that listen."""
    product = house.registry.create_product("my lamps")
    house.registry.create_device(product.key, "lamp-0001")
    async with house.key() as api:
        url = f"{V1}/products/{product.key}"
        topic = f"/{product.key}/lamp-0001/user/get"
        sent = await api.post(f"{url}/devices/lamp-0001/messages", json={"topic": topic, "text": "s3cret 灯"})
        assert (sent.status_code, sent.json()) == (202, {"topic": topic, "messageId": str(2**60 + 1), "way": "waits"})
        assert house.sent[0][1] == "s3cret 灯".encode()
        raw = base64.b64encode(b"\x00\xff").decode()
        everybody = f"/broadcast/{product.key}/all"
        assert (await api.post(f"{url}/broadcasts", json={"topic": everybody, "payload": raw})).json()["sessions"] == 3
        assert house.sent[1][1] == b"\x00\xff"
        for wrong in (
            f"/{product.key}/lamp-0002/user/get",
            f"/{product.key}/lamp-00012/user/get",
            f"/broadcast/{product.key}/{product.key}/lamp-0001",
            f"/broadcast/{product.key}",
            "/",
        ):
            other = await api.post(f"{url}/devices/lamp-0001/messages", json={"topic": wrong})
            assert other.status_code == 400, wrong
        deeper = await api.post(f"{url}/broadcasts", json={"topic": f"/broadcast/{product.key}/a/b"})
        assert deeper.status_code == 400
        both = await api.post(f"{url}/broadcasts", json={"topic": everybody, "payload": raw, "text": "x"})
        assert both.status_code == 422
        audit = (await api.get(f"{V1}/audit", params={"action": "message"})).json()["items"]
        assert [entry["detail"] for entry in audit] == [f"{everybody}, 2 bytes", f"{topic}, 10 bytes"]
        assert "s3cret" not in str(audit)


async def test_refusals_are_searched_by_all_that_a_person_knows(house: House) -> None:
    """requestId, device, code, time, address; with what the code means, in the reader's language."""
    for number in range(12):
        await house.refused(
            request_id=f"{number:016x}", device_name=f"lamp-{number % 3}", code=20000 if number % 2 else 30001
        )
    async with house.key(Scope.READ) as api:
        one = (await api.get(f"{V1}/logs", params={"requestId": f"{7:016x}"})).json()["items"]
        assert [(item["deviceName"], item["message"]) for item in one] == [("lamp-1", "auth check error")]
        assert "not recognised" in one[0]["means"]
        chinese = await api.get(f"{V1}/logs", params={"requestId": f"{7:016x}"}, headers={"Accept-Language": "zh-CN"})
        assert "鉴权失败" in chinese.json()["items"][0]["means"]
        first = (await api.get(f"{V1}/logs", params={"code": 30001, "limit": 4})).json()
        rest = (await api.get(f"{V1}/logs", params={"code": 30001, "limit": 4, "cursor": first["next"]})).json()
        found = [item["requestId"] for item in first["items"] + rest["items"]]
        assert found == [f"{number:016x}" for number in (10, 8, 6, 4, 2, 0)]
        assert rest["next"] is None
        assert (await api.get(f"{V1}/logs", params={"address": "192.0.2.2"})).json()["items"] == []
        assert (await api.get(f"{V1}/logs", params={"until": 1000})).json()["items"] == []


async def test_nobody_can_lock_everybody_out(house: House) -> None:
    """The last admin stays one, and nobody deletes themselves."""
    async with house.signed_in() as browser:
        from uplinkd.admin.access import csrf_token

        client = browser.client
        token = {"X-CSRF-Token": csrf_token(client.cookies["uplinkd_session"])}
        demoted = await client.patch(f"{V1}/users/{browser.name}", json={"role": "viewer"}, headers=token)
        assert (demoted.status_code, "nobody would be left" in demoted.json()["detail"]) == (409, True)
        assert (await client.delete(f"{V1}/users/{browser.name}", headers=token)).status_code == 403
        assert (await client.delete(f"{V1}/users/{browser.name}")).status_code == 403  # no CSRF token


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/products", b"{", 422),
        ("POST", "/products", b'{"name": "my lamps", "colour": "red"}', 422),
        ("POST", "/products", b'{"name": "\\ud800aaaa"}', 422),
        ("POST", "/products", b"x" * (3 << 20), 413),
        ("GET", "/products?limit=x", b"", 422),
        ("GET", "/products?cursor=x", b"", 400),
        ("GET", "/logs?limit=0", b"", 422),
        ("GET", "/logs?cursor=x", b"", 400),
        ("GET", "/logs?cursor=9999999999999999999", b"", 400),
        ("GET", "/messages?cursor=9223372036854775807", b"", 200),
        ("GET", "/messages/9999999999999999999", b"", 400),
        ("GET", "/audit?cursor=%C2%B2", b"", 400),
        ("GET", "/nothing", b"", 404),
        ("PUT", "/products", b"", 405),
        ("GET", "/products/%00/devices", b"", 404),
        ("POST", "/products", b"[" * 100_000, 400),
    ],
)
async def test_bad_input_is_a_problem_document(
    house: House, method: str, path: str, content: bytes, status: int
) -> None:
    """With what was wrong; never a traceback."""
    async with house.key() as api:
        answer = await api.request(method, V1 + path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    if status >= 400:
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert set(answer.json()) >= {"type", "title", "status", "detail"}
    if status == 405:
        assert answer.headers["Allow"] == "GET, POST"


async def test_a_stream_that_cannot_begin_says_so_with_a_status(house: House) -> None:
    """A filter that is none, an engine that is away, too many who watch."""
    async with house.key(Scope.READ) as api:
        url = f"{V1}/messages/stream"
        assert (await api.get(url, params={"device": "a*"})).status_code == 400
        house.office.watching = 100
        full = await api.get(url)
        assert (full.status_code, full.headers["Retry-After"]) == (429, "5")
        house.office.watching = 0

        async def away() -> None:
            raise Unavailable("the engine does not answer: it is away")

        house.office.open_reader = away  # type: ignore[assignment]
        house.office._reader = None
        refused = await api.get(url)
        assert (refused.status_code, "it is away" in refused.json()["detail"]) == (503, True)
        assert house.office.watching == 0
