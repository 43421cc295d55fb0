"""Consumer groups in the console: what its forms do, and what is shown of a group."""

from __future__ import annotations

import asyncio
import html
import re
import time
from dataclasses import replace

import pytest

from tests.admin.conftest import House
from tests.admin.test_groups_api import delivering, letter
from uplinkd.asking import Consumer, HookState, Live
from uplinkd.core.groups import Form, Group, Kind, Plan, Webhook
from uplinkd.core.operators import Role
from uplinkd.engine import GroupState

URL = "https://backend.example.com/uplinkd?key=0penSesame"
REST = {"ack_wait": "30", "tries": "16", "batch": "100", "linger": "0", "lanes": "4", "timeout": "10", "start": "now"}


async def test_a_webhook_is_made_by_its_url_and_its_secret_shown_once(house: House) -> None:
    """On the page of the new group, and never again; a renewed one likewise."""
    async with house.signed_in() as browser:
        made = await browser.post(
            "/groups", name="hook", all_products="1", kinds="uplink", to="webhook", url=URL, **REST
        )
        assert made.status_code == 200
        group = house.registry.groups.get("hook")
        assert group.plan == Plan(webhook=Webhook(url=URL))
        assert group.secret in html.unescape(made.text)
        shown = (await browser.get("/groups/hook")).text
        assert group.secret not in html.unescape(shown)
        assert "0penSesame" in shown
        assert "0penSesame" not in (await browser.get("/groups")).text
        renewed = (await browser.post("/groups/hook/secret")).text
        assert house.registry.groups.get("hook").secret in html.unescape(renewed)
        assert (await browser.get("/groups/hook/secret")).headers["Location"] == "/groups/hook"
    async with house.signed_in(Role.VIEWER) as browser:
        assert "0penSesame" not in (await browser.get("/groups/hook")).text


async def test_a_group_of_an_application_is_made_changed_moved_and_deleted(house: House) -> None:
    """Only what was chosen is taken of a form: an application, where no webhook was."""
    lamps, pumps = (house.registry.create_product(name).key for name in ("my lamps", "my pumps"))
    app, _ = house.registry.create_app("billing")
    async with house.signed_in() as browser:
        made = await browser.post(
            "/groups",
            name="reports",
            **{
                "products": [lamps],
                "further": f" {pumps} ,{lamps}",
                "kinds": ["status", "lifecycle"],
                "topic": "/+/+/user/#",
            },
            **{"to": "apps", "apps": "billing", "url": "left over", **REST, "start": "1h", "ack_wait": "2.5"},
        )
        assert made.headers["Location"] == "/groups/reports?done=group.create"
        group = house.registry.groups.get("reports")
        assert group.plan == Plan(
            products=(lamps, pumps),
            topic="/+/+/user/#",
            kinds=frozenset({Kind.STATUS, Kind.LIFECYCLE}),
            ack_wait=2.5,
            apps=("billing",),
        )
        assert abs(time.time() * 1000 - 3_600_000 - group.start) < 10_000
        page = (await browser.get("/groups/reports")).text
        assert f"authId={app.key},consumerGroupId=reports|" in page

        version = re.search(r'name="version" value="([^"]+)"', page)
        assert version
        change = {"version": version[1], "all_products": "1", "kinds": "uplink", "to": "webhook", "url": URL, **REST}
        changed = await browser.post("/groups/reports/change", **change, form="batch")
        assert changed.status_code == 200  # with the first webhook's secret
        plan = house.registry.groups.get("reports").plan
        assert (plan.products, plan.apps, plan.webhook) == (None, (), Webhook(url=URL, form=Form.BATCH))
        stale = await browser.post("/groups/reports/change", **change, form="binary")
        assert (stale.status_code, "was changed meanwhile" in stale.text) == (412, True)

        paused = await browser.post("/groups/reports/pause", paused="1")
        assert paused.headers["Location"].endswith("done=group.pause")
        assert house.registry.groups.get("reports").plan.paused
        await browser.post("/groups/reports/pause")
        assert not house.registry.groups.get("reports").plan.paused
        for start, moment in (("all", 0), ("time", 5000)):
            await browser.post("/groups/reports/reset", start=start, start_ms="5000")
            assert house.registry.groups.get("reports").start == moment
        assert (await browser.post("/groups/reports/reset", start="time", start_ms="")).status_code == 400
        assert (await browser.post("/groups/reports/delete")).headers["Location"] == "/groups?done=group.delete"
        assert house.registry.groups.all() == []
        assert (await browser.get("/groups/reports")).status_code == 404


async def test_a_pause_undoes_no_change_that_is_made_meanwhile(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused then, as any change of a group that is another by now."""
    groups = house.registry.groups
    before: Group = groups.create("reports", Plan())
    with monkeypatch.context() as patch:

        def seen(name: str) -> Group:
            patch.undo()
            groups.change(name, replace(before.plan, tries=7))
            return before

        patch.setattr(groups, "get", seen)
        async with house.signed_in() as browser:
            refused = await browser.post("/groups/reports/pause", paused="1")
    assert (refused.status_code, "was changed meanwhile" in refused.text) == (412, True)
    assert groups.get("reports").plan == replace(before.plan, tries=7)


async def test_what_was_typed_stands_there_after_a_fault(house: House) -> None:
    """With what was wrong, in the reader's language."""
    async with house.signed_in() as browser:
        for wrong, words in (
            ({"url": ""}, "where to?"),
            ({"url": "ftp://x"}, "it is such as"),
            ({"lanes": "many"}, "not a whole number"),
            ({"ack_wait": "soon"}, "not a number"),
            ({"kinds": ""}, "at least one kind"),
            ({"form": "xml"}, "it is one of"),
            ({"all_products": ""}, "choose the products"),
        ):
            fields = {
                "name": "g-1",
                "all_products": "1",
                "kinds": "uplink",
                "to": "webhook",
                "url": URL,
                **REST,
                **wrong,
            }
            answer = await browser.post("/groups", **fields)
            assert (answer.status_code, words in answer.text) == (400, True), (wrong, answer.text)
            assert 'value="g-1"' in answer.text
        answer = await browser.client.post(
            "/groups/g/reset", data={}, headers={"Accept-Language": "zh"}
        )  # without the session's token
        assert answer.status_code in (401, 403)
        assert house.registry.groups.all() == []


async def test_a_page_of_a_group_tells_how_it_fares(house: House) -> None:
    """Its figures, who consumes it, what its webhook last said, and its dead letters, of which what is in them stays text."""
    house.registry.create_app("billing")
    house.registry.groups.create("reports", Plan(apps=("billing",)))
    house.registry.groups.create("hook", Plan(webhook=Webhook(url=URL)))
    house.desk.states["hook"] = GroupState(1234, 3, round(time.time() * 1000) - 600_000, 40, 0, 1)
    house.desk.letters["hook"] = [letter(number, b"<b>on</b>") for number in range(1, 30)]
    hook = HookState("hook", True, 9, 2, 100, 200, "HTTP 500 <i>", 900)
    delivering(house, Live([Consumer("reports", "billing", "client-7", "192.0.2.1:5", 1000, 3, 100)], [hook]))
    async with house.signed_in() as browser:
        page = (await browser.get("/groups/hook")).text
        assert "<b data-lag>1,234</b>" in page
        assert "<b data-oldest>10 min</b>" in page
        assert "HTTP 500 &lt;i&gt;" in page
        assert "its webhook does not answer" in page
        assert "<b>on</b>" not in page
        assert "after=20" in page
        assert str(2**60 + 21) not in page
        assert str(2**60 + 21) in (await browser.get("/groups/hook?after=20")).text
        assert "client-7" in (await browser.get("/groups/reports")).text
        listed = (await browser.get("/groups")).text
        assert "consumers: 1" in listed
        assert "its webhook does not answer" in listed
        chinese = (await browser.get("/groups/hook", headers={"Accept-Language": "zh"})).text
        assert "Webhook 无响应" in chinese


async def test_dead_letters_are_offered_again_and_thrown_away_by_forms(house: House) -> None:
    """One by one, or all; all again is a job, whose page says how many there were."""
    house.registry.groups.create("sad", Plan())
    house.desk.letters["sad"] = [letter(number) for number in range(1, 6)]
    async with house.signed_in(Role.OPERATOR) as browser:
        assert (
            (await browser.post("/groups/sad/dead", act="retry", number="1")).headers["Location"].endswith("dead.retry")
        )
        assert (
            (await browser.post("/groups/sad/dead", act="purge", number="2")).headers["Location"].endswith("dead.purge")
        )
        assert [each.number for each in house.desk.letters["sad"]] == [3, 4, 5]
        assert (await browser.post("/groups/sad/dead", act="purge", number="x")).status_code == 400
        assert (await browser.post("/groups/sad/dead", act="eat")).status_code == 404
        begun = await browser.post("/groups/sad/dead", act="retry")
        assert begun.headers["Location"].startswith("/jobs/")
        for _ in range(100):
            job = (await browser.get(begun.headers["Location"])).text
            if "messages offered again" in job:
                break
            await asyncio.sleep(0.01)
        assert 'href="/groups/sad"' in job
        assert [each.number for each in house.desk.offered] == [1, 3, 4, 5]
        house.desk.letters["sad"] = [letter(9)]
        await browser.post("/groups/sad/dead", act="purge")
        assert house.desk.letters["sad"] == []
        assert (await browser.post("/groups/sad/pause", paused="1")).status_code == 403
        assert (await browser.post("/groups/sad/reset", start="all")).status_code == 303


async def test_an_engine_that_is_away_leaves_the_pages_standing(house: House) -> None:
    """They say so; what a form asks of it is answered with why not."""
    house.registry.groups.create("sad", Plan())
    house.bus.connected = False
    async with house.signed_in() as browser:
        page = await browser.get("/groups/sad")
        assert (page.status_code, "the engine is away" in page.text) == (200, True)
        assert (await browser.get("/groups")).status_code == 200
        for act in ("retry", "purge"):
            assert (await browser.post("/groups/sad/dead", act=act)).status_code == 503
