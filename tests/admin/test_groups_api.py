"""Consumer groups by the management API: what it gives, what it refuses, and what it leaves in the audit."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.admin.conftest import House
from uplinkd.asking import LIVE, Consumer, HookState, Live
from uplinkd.core.groups import Plan
from uplinkd.core.model import DeviceName, Message, ProductKey
from uplinkd.core.operators import Scope
from uplinkd.engine import DeadLetter, GroupState

V1 = "/api/v1"
URL = "https://backend.example.com/uplinkd?key=0penSesame"
HOOK = {"url": URL, "form": "binary", "batch": 100, "linger": 0.0, "lanes": 4, "timeout": 10.0}


def letter(number: int, payload: bytes = b"on") -> DeadLetter:
    message = Message(2**60 + number, "/pk/lamp-1/user/update", ProductKey("pk"), DeviceName("lamp-1"), 1000, payload)
    return DeadLetter(number, message, 16, "HTTP 500", 2000 + number)


def delivering(house: House, live: Live) -> None:
    """A process that delivers, and tells what goes on in it."""
    house.bus.listen(LIVE, lambda told: house.bus.tell(told.reply, live.document()))


async def test_a_group_is_made_shown_changed_moved_and_deleted(house: House) -> None:
    """With versions that another's change makes stale; what a change leaves out stays."""
    product = house.registry.create_product("my lamps")
    house.registry.create_app("billing", products=[product.key])
    async with house.key() as api:
        wanted = {"name": "reports", "products": [product.key], "kinds": ["uplink", "status"], "apps": ["billing"]}
        made = await api.post(f"{V1}/groups", json=wanted)
        assert made.status_code == 201, made.text
        assert made.headers["Location"] == f"{V1}/groups/reports"
        document = made.json()
        assert document == {
            "name": "reports",
            "allProducts": False,
            "products": [product.key],
            "topic": "",
            "kinds": ["uplink", "status"],
            "start": document["start"],
            "ackWait": 30.0,
            "tries": 16,
            "apps": ["billing"],
            "webhook": None,
            "paused": False,
            "createTime": document["createTime"],
            "secret": None,
        }
        url = f"{V1}/groups/reports"
        seen = {"If-Match": made.headers["ETag"]}
        shown = await api.get(url)
        assert {**shown.json(), "secret": None} == document
        assert shown.headers["ETag"] == seen["If-Match"]
        changed = await api.patch(url, json={"allProducts": True, "paused": True, "tries": 3}, headers=seen)
        assert changed.status_code == 200
        told = changed.json()
        assert (told["allProducts"], told["products"], told["paused"], told["tries"]) == (True, [], True, 3)
        assert (told["apps"], told["kinds"]) == (["billing"], ["uplink", "status"])
        for answer in (
            await api.patch(url, json={"paused": False}, headers=seen),
            await api.post(f"{url}/reset", json={"start": 5}, headers=seen),
            await api.delete(url, headers=seen),
        ):
            assert answer.status_code == 412
        moved = await api.post(f"{url}/reset", json={"start": 5000})
        assert (moved.status_code, moved.json()["start"]) == (200, 5000)
        assert abs((await api.post(f"{url}/reset", json={"start": None})).json()["start"] - time.time() * 1000) < 10_000
        assert (await api.delete(url)).status_code == 204
        assert (await api.get(url)).status_code == 404


async def test_a_webhooks_secret_is_told_once(house: House) -> None:
    """To whoever makes it: with the group, with its first webhook, anew."""
    async with house.key() as api, house.key(Scope.READ) as reader:
        url = f"{V1}/groups/hook"
        first = (
            await api.post(f"{V1}/groups", json={"name": "hook", "allProducts": True, "webhook": {"url": URL}})
        ).json()
        assert first["webhook"] == HOOK
        assert first["secret"].startswith("whsec_")
        assert (await api.patch(url, json={"webhook": {"url": URL, "lanes": 2}})).json()["secret"] is None
        renewed = (await api.post(f"{url}/secret")).json()["secret"]
        assert renewed not in (None, first["secret"])
        assert "secret" not in (await api.get(url)).json()
        assert (await api.patch(url, json={"webhook": None})).json()["webhook"] is None
        assert (await api.post(f"{url}/secret")).status_code == 400
        again = (await api.patch(url, json={"webhook": {"url": URL}})).json()["secret"]
        assert again not in (None, renewed)

        shown = (await reader.get(url)).json()["webhook"]["url"]
        assert shown == "https://backend.example.com/uplinkd"
        for who in (api, reader):
            assert "0penSesame" not in (await who.get(f"{V1}/groups")).text
        assert (await api.get(url)).json()["webhook"]["url"] == URL
        audit = (await api.get(f"{V1}/audit", params={"action": "group."})).text
        for secret in (first["secret"], renewed, again, "0penSesame"):
            assert secret not in audit


async def test_a_group_that_is_made_twice_is_made_once(house: House) -> None:
    """The same answer, with the same secret."""
    async with house.key() as api:
        answers = [
            await api.post(
                f"{V1}/groups",
                json={"name": "hook", "allProducts": True, "webhook": {"url": URL}},
                headers={"Idempotency-Key": "order-1"},
            )
            for _ in range(2)
        ]
        assert answers[0].json() == answers[1].json()
        assert len((await api.get(f"{V1}/groups")).json()["items"]) == 1


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "g"}, 400, "products names products, or allProducts is true"),
        ({"name": "g", "products": []}, 400, "products names products"),
        ({"name": "g", "products": ["a1"], "allProducts": True}, 422, "one of them is wanted"),
        ({"name": "g", "products": ["a1Nowhere"]}, 404, "no product 'a1Nowhere'"),
        ({"name": "a b", "allProducts": True}, 400, "1 to 64 letters"),
        ({"name": "g", "allProducts": True, "kinds": []}, 400, "at least one kind"),
        ({"name": "g", "allProducts": True, "kinds": ["what"]}, 422, "kinds"),
        ({"name": "g", "allProducts": True, "topic": "x"}, 400, "does not begin with a slash"),
        ({"name": "g", "allProducts": True, "ackWait": 0}, 400, "ack_wait = 0"),
        ({"name": "g", "allProducts": True, "webhook": {"url": "ftp://x"}}, 400, "it is such as"),
        ({"name": "g", "allProducts": True, "webhook": {}}, 422, "url"),
        ({"name": "g", "allProducts": True, "apps": ["billing"], "webhook": {"url": URL}}, 400, "not to both"),
        ({"name": "g", "allProducts": True, "start": -1}, 422, "start"),
        ({"name": "g", "allProducts": True, "nobody": 1}, 422, "nobody"),
    ],
)
async def test_what_is_wrong_with_a_group_is_said(house: House, body: Any, status: int, words: str) -> None:
    async with house.key() as api:
        answer = await api.post(f"{V1}/groups", json=body)
        assert (answer.status_code, words in answer.json()["detail"]) == (status, True), answer.text
        assert (await api.get(f"{V1}/groups")).json()["items"] == []


async def test_a_group_of_all_products_cannot_be_of_not_all(house: House) -> None:
    """Which ones it is then has to be said."""
    async with house.key() as api:
        await api.post(f"{V1}/groups", json={"name": "g", "allProducts": True})
        answer = await api.patch(f"{V1}/groups/g", json={"allProducts": False})
        assert (answer.status_code, "products names them" in answer.text) == (400, True)


async def test_how_far_a_group_is(house: House) -> None:
    """With who consumes it and how its webhook fares; of several that deliver the one that did something last tells of it."""
    house.registry.groups.create("hook", Plan())
    house.desk.states["hook"] = GroupState(12, 3, 5000, 40, 0, 1)
    consumers = [Consumer("hook", "billing", "c1", "192.0.2.1:5", 1000, 3, 100), Consumer("x", "y", "c", "z", 0, 0, 0)]
    hooks = [HookState("hook", False, 9, 1, 100, 50, "", 0), HookState("x", True, 0, 0, 0, 0, "", 0)]
    delivering(house, Live(consumers, hooks))
    delivering(house, Live([], [HookState("hook", True, 9, 2, 100, 200, "HTTP 500", 900)]))
    async with house.key(Scope.READ) as api:
        state = (await api.get(f"{V1}/groups/hook/state")).json()
        assert state == {
            **{"lag": 12, "held": 3, "oldest": 5000, "settled": 40, "dead": 0, "retrying": 1, "rate": 0.0},
            "consumers": [
                {"app": "billing", "client": "c1", "address": "192.0.2.1:5", "since": 1000, "held": 3, "credit": 100}
            ],
            "webhook": {
                **{"open": True, "accepted": 9, "failed": 2, "lastSuccess": 100, "lastFailure": 200},
                **{"fault": "HTTP 500", "nextTry": 900},
            },
        }
        (listed,) = (await api.get(f"{V1}/groups")).json()["items"]
        assert listed["state"] == {name: state[name] for name in listed["state"]}
        assert (await api.get(f"{V1}/groups/nobody/state")).status_code == 404


async def test_dead_letters_are_looked_at_offered_again_and_thrown_away(house: House) -> None:
    """In pages, by number, or all; the audit has who did it."""
    house.registry.groups.create("sad", Plan())
    house.desk.letters["sad"] = [letter(number, bytes([number])) for number in range(1, 8)]
    async with house.key() as api:
        group = f"{V1}/groups/sad"
        url = f"{group}/dead"
        page = (await api.get(url, params={"limit": 2})).json()
        assert [each["number"] for each in page["items"]] == ["1", "2"]
        assert page["items"][0] == {
            "number": "1",
            "time": 2001,
            "tries": 16,
            "reason": "HTTP 500",
            "message": page["items"][0]["message"],
        }
        assert page["items"][0]["message"]["messageId"] == str(2**60 + 1)
        assert (await api.get(url, params={"limit": 9, "after": page["next"]})).json()["items"][0]["number"] == "3"
        assert (await api.get(f"{url}/7")).json()["message"]["payload"] == "Bw=="
        assert (await api.get(f"{url}/8")).status_code == 404
        assert (await api.get(f"{url}/x")).status_code == 400

        assert (await api.post(f"{group}/retry", json={"numbers": ["1", "2", "99"]})).json() == {"count": 2}
        assert (await api.post(f"{group}/purge", json={"numbers": ["3"]})).json() == {"count": 1}
        begun = await api.post(f"{group}/retry-all")
        assert begun.status_code == 202
        job = await ended(api, begun.json()["id"])
        assert (job["state"], job["result"], job["total"]) == ("done", {"count": 4}, 4)
        assert [each.number for each in house.desk.offered] == [1, 2, 4, 5, 6, 7]
        house.desk.letters["sad"] = [letter(9)]
        assert (await api.post(f"{group}/purge", json={"all": True})).json() == {"count": 1}
        bodies: tuple[dict[str, Any], ...] = ({}, {"all": False}, {"numbers": []}, {"all": True, "numbers": ["1"]})
        for body in bodies:
            assert (await api.post(f"{group}/purge", json=body)).status_code == 422
        entries = (await api.get(f"{V1}/audit", params={"target": "sad"})).json()["items"]
        assert [(each["action"], each["detail"]) for each in entries[:4]] == [
            ("group.purge", "all"),
            ("group.retry", "all"),
            ("group.purge", "dead letters 3"),
            ("group.retry", "dead letters 1 2 99"),
        ]
        assert entries[0]["way"] == "api"


async def ended(api: Any, job_id: str) -> Any:
    while (job := (await api.get(f"{V1}/jobs/{job_id}")).json())["state"] == "running":
        await asyncio.sleep(0.01)
    return job


async def test_scopes_hold(house: House) -> None:
    """read looks, also at payloads; operate moves groups and acts on dead letters; who gets data is for admins to say."""
    house.registry.groups.create("g", Plan())
    house.desk.letters["g"] = [letter(1)]
    url = f"{V1}/groups/g"
    acts: dict[str, Any] = {"retry": {"numbers": ["1"]}, "retry-all": None, "purge": {"all": True}}
    async with house.key(Scope.READ) as reader, house.key(Scope.OPERATE) as operator:
        for path in ("", "/state", "/dead", "/dead/1"):
            assert (await reader.get(url + path)).status_code == 200
        for act, body in acts.items():
            assert (await reader.post(f"{url}/{act}", json=body)).status_code == 403
            assert (await operator.post(f"{url}/{act}", json=body)).status_code in (200, 202)
        assert (await reader.post(f"{url}/reset", json={"start": 1})).status_code == 403
        assert (await operator.post(f"{url}/reset", json={"start": 1})).status_code == 200
        assert (await operator.post(f"{V1}/groups", json={"name": "x", "allProducts": True})).status_code == 403
        assert (await operator.patch(url, json={"paused": True})).status_code == 403
        assert (await operator.post(f"{url}/secret")).status_code == 403
        assert (await operator.post(f"{V1}/apps/x/secret")).status_code == 403
        assert (await operator.delete(url)).status_code == 403


async def test_an_engine_that_is_away_leaves_the_groups_standing(house: House) -> None:
    """What they are is known; how far they are is not, and is not zero."""
    house.registry.groups.create("g", Plan())
    house.bus.connected = False
    async with house.key() as api:
        (listed,) = (await api.get(f"{V1}/groups")).json()["items"]
        assert (listed["name"], listed["state"]) == ("g", None)
        for path in ("/state", "/dead", "/dead/1"):
            assert (await api.get(f"{V1}/groups/g{path}")).status_code == 503
        assert (await api.post(f"{V1}/groups/g/retry", json={"numbers": ["1"]})).status_code == 503
        assert (await api.post(f"{V1}/groups/g/purge", json={"all": True})).status_code == 503


async def test_an_application_gets_a_new_secret(house: House) -> None:
    """In this answer alone; by it the client proves that it knows it."""
    app, old = house.registry.create_app("billing")
    async with house.key() as api:
        renewed = (await api.post(f"{V1}/apps/billing/secret")).json()
        assert (renewed["key"], renewed["secret"] != old) == (app.key, True)
        assert house.registry.app_secret(app.key) == renewed["secret"]
        assert (await api.post(f"{V1}/apps/nobody/secret")).status_code == 404
        assert renewed["secret"] not in (await api.get(f"{V1}/audit")).text
