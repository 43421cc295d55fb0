"""Every page in both languages, both themes, on a desk and on a phone: looked at by a machine, and kept as pictures for people."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.browser import PASSWORD, Visit, choose_password, chromium, one_time_password, sign_in, visit
from tests.cli.test_group_command import buried
from tests.house import Device, Server, cli, cli_json, login_body

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("console")]

PICTURES = Path(os.environ.get("UPLINKD_TEST_PICTURES") or Path(__file__).parent.parent.parent / "artefacts")
LOOKS: dict[str, dict[str, Any]] = {
    "desk": {"viewport": {"width": 1280, "height": 860}},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}
# Swagger UI is not ours to mend: neither its contrasts nor its width.
FOREIGN = "/api/v1/docs"


@dataclass
class Fleet:
    server: Server
    product: str
    message: int

    @property
    def pages(self) -> dict[str, str]:
        product = f"/products/{self.product}"
        return {
            "overview": "/",
            "products": "/products",
            "product-devices": product,
            "product-topics": f"{product}/topics",
            "product-keys": f"{product}/keys",
            "product-settings": f"{product}/settings",
            "device": f"{product}/devices/lamp-0001",
            "live": "/live",
            "groups": "/groups",
            "group-webhook": "/groups/backend",
            "group-amqp": "/groups/reports",
            "messages": "/messages",
            "message": f"/messages/{self.message}",
            "logs": "/logs",
            "codes": "/codes",
            "workbench": "/workbench",
            "jobs": "/jobs",
            "access": "/access",
            "users": "/users",
            "audit": "/audit",
            "settings": "/settings",
            "password": "/password",
            "not-found": "/nothing",
            "api": FOREIGN,
        }


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A server with something of everything on it."""
    data = tmp_path_factory.mktemp("console") / "data"
    server = Server(data, console_port=0).start()
    try:
        product = cli_json("product", "create", "street lamps", data=data)["productKey"]
        rows = "".join(f"{product},lamp-{number:04},s3cret{number:04}\n" for number in range(1, 121))
        (data.parent / "fleet.csv").write_text("ProductKey,DeviceName,DeviceSecret\n" + rows)
        cli("device", "import", str(data.parent / "fleet.csv"), data=data)
        cli("device", "disable", product, "lamp-0007", data=data)
        cli("app", "create", "billing", "--product", product, data=data)
        cli("group", "create", "reports", "--product", product, "--app", "billing", "--from", "1h", data=data)
        cli(
            "group",
            "create",
            "backend",
            "--all-products",
            "--webhook",
            "https://backend.example.com/uplinkd",
            data=data,
        )
        buried(data, "backend", b'{"temperature":21.5}', b"\x00\xff", b"x" * 300)
        cli("topic", "add", product, "rooms/+/state", "--right", "subscribe", data=data)
        cli("apikey", "create", "ci", "--scope", "read", data=data)
        cli("user", "create", "eve", "--role", "viewer", data=data)
        message = asyncio.run(report(server, product))
        yield Fleet(server, product, message)
    finally:
        server.stop()


async def report(server: Server, product: str) -> int:
    """Some seconds of traffic, refusals among it."""
    devices = [
        Device(server, product, f"lamp-{number:04}", f"s3cret{number:04}") for number in range(1, 9) if number != 7
    ]
    last = 0
    for device in devices:
        assert await device.login() == 0
    for turn in range(12):
        for place, device in enumerate(devices):
            payload = f'{{"on":{str(bool(turn % 2)).lower()},"temperature":{20 + place + turn / 10:.1f}}}'
            _, last = await device.publish(payload.encode())
        await devices[0].publish(b"x", "user/nope")
        await asyncio.sleep(0.3)
    await devices[0].post("/auth", login_body(product, "lamp-0002", "wrong"), "Content-Type: application/json")
    for device in devices:
        await device.close()
    return last


def see(visitor: Visit, name: str, path: str, look: str) -> None:
    """Go there, let it settle, take the picture; it must not be wider than the window."""
    page = visitor.page
    visitor.go(path)
    if name in ("overview", "live", "api"):
        page.wait_for_timeout(1300)
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}-{look}.png", full_page=name != "api")
    if path != FOREIGN:
        viewport = page.viewport_size
        assert viewport
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= viewport["width"], f"{path} is {width} px wide ({look})"


def findings(visitor: Visit) -> list[str]:
    """What axe finds serious or critical."""
    violations = Axe().run(visitor.page).response["violations"]
    return [
        f"{visitor.page.url}: {each['id']}: {each['help']}: {[node['html'][:150] for node in each['nodes'][:3]]}"
        for each in violations
        if each["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("where", LOOKS)
def test_every_page_in_both_languages_and_themes(fleet: Fleet, where: str) -> None:
    """No script fails, nothing is forbidden by the policy, no page is wider than its window, axe finds nothing serious; a
    picture of each is kept."""
    found: list[str] = []
    with chromium() as browser, visit(browser, fleet.server, **LOOKS[where]) as visitor:
        look = f"{where}-sign-in"
        for language in ("en", "zh"):
            visitor.go(f"/prefer?language={language}&back=/sign-in")
            see(visitor, "sign-in", "/sign-in", f"{where}-{language}-light")
            found += findings(visitor)
        try:
            sign_in(visitor, PASSWORD) if where == "phone" else first_sign_in(visitor, fleet.server)
        except Exception as error:
            raise AssertionError(f"nobody gets in ({look})") from error
        for theme in ("light", "dark"):
            for language in ("en", "zh"):
                visitor.go(f"/prefer?language={language}&theme={theme}&back=/codes")
                for name, path in fleet.pages.items():
                    see(visitor, name, path, f"{where}-{language}-{theme}")
                    if language == "en" and path != FOREIGN:
                        found += findings(visitor)
                examined(visitor, fleet, f"{where}-{language}-{theme}")
        assert visitor.faults == []
    assert found == []


def first_sign_in(visitor: Visit, server: Server) -> None:
    sign_in(visitor, one_time_password(server))
    choose_password(visitor, one_time_password(server))
    sign_in(visitor)


def examined(visitor: Visit, fleet: Fleet, look: str) -> None:
    """The workbench with a result."""
    visitor.go("/workbench")
    visitor.page.fill("[name=text]", login_body(fleet.product, "lamp-0001", "s3cret0001\n").decode())
    visitor.page.click("main button.primary")
    visitor.page.wait_for_selector("#result")
    visitor.page.screenshot(path=PICTURES / f"workbench-result-{look}.png", full_page=True)


def test_the_menu_of_a_phone_opens_and_leads_on(fleet: Fleet) -> None:
    """What is a column on a desk is behind one touch there."""
    with chromium() as browser, visit(browser, fleet.server, **LOOKS["phone"]) as visitor:
        sign_in(visitor, PASSWORD)
        assert not visitor.page.is_visible("nav.side")
        visitor.page.tap(".drawer summary")
        visitor.page.tap("nav.side >> text=Products")
        visitor.page.wait_for_url(re.compile("/products$"))


def test_a_live_page_finds_its_way(fleet: Fleet) -> None:
    """A filter that breaks a rule is explained instead of tried again; without a session the page goes to sign in, and from there
    comes back."""
    with chromium() as browser, visit(browser, fleet.server) as visitor:
        page = visitor.page
        sign_in(visitor, PASSWORD)
        visitor.go("/live?topic=user/update")
        assert "does not begin with a slash" in page.inner_text(".note.bad")
        visitor.go(f"/live?product={fleet.product}")
        page.wait_for_selector("#feed:has-text('live')")
        kept = [each for each in visitor.context.cookies() if each["name"] != "uplinkd_session"]
        visitor.context.clear_cookies()
        visitor.context.add_cookies(kept)  # type: ignore[arg-type]  # as it gave them
        # As after a break of the connection.
        page.evaluate(
            "import('/static/stream.js').then(({ stream }) => "
            "stream('/api/v1/stats/stream', 'stats', () => {}, { opened: () => {}, away: () => {} }))"
        )
        page.wait_for_url(re.compile("/sign-in"))
        page.fill("[name=name]", "admin")
        page.fill("[name=password]", PASSWORD)
        page.click("main button.primary")
        page.wait_for_url(re.compile(f"/live.product={fleet.product}"))
        assert visitor.faults == []


def test_what_drops_down_closes_again(fleet: Fleet) -> None:
    """By Escape, by a click elsewhere, and when another opens."""
    with chromium() as browser, visit(browser, fleet.server) as visitor:
        page = visitor.page
        sign_in(visitor, PASSWORD)
        visitor.go("/products")
        page.click("summary:has-text('Make a product')")
        assert page.is_visible("form[action='/products']")
        page.click("summary:has-text('Import devices')")
        assert not page.is_visible("form[action='/products']")
        page.keyboard.press("Escape")
        assert not page.is_visible("form[action='/import']")
        page.click(".menu summary")
        page.click("h1")
        assert not page.is_visible(".menu .panel")


def test_live_messages_can_be_paused_and_filtered(fleet: Fleet) -> None:
    """Paused, the page stands still and counts; going on, it shows what came."""

    def one(payload: str) -> None:
        topic, who = f"/{fleet.product}/lamp-0003/user/update", ("--product", fleet.product, "--device", "lamp-0003")
        cli("publish", topic, payload, "--url", fleet.server.url, *who, data=fleet.server.data)

    with chromium() as browser, visit(browser, fleet.server) as visitor:
        page = visitor.page
        sign_in(visitor, PASSWORD)
        visitor.go(f"/live?product={fleet.product}&device=lamp-0003")
        page.wait_for_selector("#feed:has-text('live')")
        time.sleep(0.5)
        one("first")
        page.wait_for_selector("#rows tr:has-text('first')")
        page.click("#pause")
        one("second")
        page.wait_for_selector("#feed:has-text('1 more')")
        assert page.query_selector("#rows tr:has-text('second')") is None
        page.click("#pause")
        page.wait_for_selector("#rows tr:has-text('second')")
        other = visitor.context.new_page()
        other.goto(f"{visitor.url}/live?product={fleet.product}&device=lamp-0004")
        other.wait_for_selector("#feed:has-text('live')")
        one("third")
        page.wait_for_selector("#rows tr:has-text('third')")
        assert other.query_selector("#rows tr") is None
        assert visitor.faults == []


def test_a_group_is_made_by_its_url_alone_and_its_figures_are_live(fleet: Fleet) -> None:
    """By keyboard and mouse: a name, a URL, a time in the reader's own zone; then the lag grows without a reload."""

    def publish(payload: str) -> None:
        topic, who = f"/{fleet.product}/lamp-0005/user/update", ("--product", fleet.product, "--device", "lamp-0005")
        cli("publish", topic, payload, "--url", fleet.server.url, *who, data=fleet.server.data)

    with chromium() as browser, visit(browser, fleet.server, timezone_id="Asia/Shanghai") as visitor:
        page = visitor.page
        sign_in(visitor, PASSWORD)
        visitor.go("/groups")
        page.focus("summary:has-text('Make a consumer group')")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.type("by-hand")
        page.check("[name=all_products]")
        assert not page.is_visible(".named")
        page.check("[value=apps]")
        assert not page.is_visible("[name=url]")
        page.check("[value=webhook]")
        page.fill("[name=url]", "https://backend.example.com/by-hand")
        assert not page.is_visible("[type=datetime-local]")
        page.select_option("[name=start]", "time")
        page.fill("[type=datetime-local]", "2026-11-27T08:00:00")
        page.click(".group-form button.primary")
        page.wait_for_selector(".note:has-text('whsec_')")
        (made,) = [each for each in cli_json("group", "list", data=fleet.server.data) if each["name"] == "by-hand"]
        assert (made["start"], made["allProducts"], made["webhook"]["url"]) == (
            1795737600000,
            True,
            "https://backend.example.com/by-hand",
        )
        visitor.go("/groups/by-hand")
        page.click("summary:has-text('Set the position')")
        page.click("button:text-is('Set')")
        page.wait_for_selector(".note.good:has-text('The position is set')")
        page.wait_for_selector("[data-lag]:text-is('0')")
        publish("one")
        page.wait_for_selector("[data-lag]:text-is('1')")
        publish("two")
        page.wait_for_selector("[data-lag]:text-is('2')")
        page.click("button:text-is('Pause')")
        page.wait_for_selector("h1 .state:has-text('paused')")
        page.click("button:text-is('Delete')")
        page.wait_for_url("**/groups?**")
        assert page.query_selector("text=by-hand") is None

        visitor.go("/groups/backend")
        page.click("tbody tr:first-child button:has-text('Offer again')")
        page.wait_for_selector(".note.good:has-text('offered again')")
        page.wait_for_selector("[data-dead]:text-is('2')")
        page.click("button:text-is('Throw all away')")
        page.wait_for_selector("[data-dead]:text-is('0')")
        assert visitor.faults == []


def test_what_happens_to_a_group_is_seen_without_a_reload(fleet: Fleet) -> None:
    """That its webhook does not answer, and why, in the reader's language; a dead letter that comes; that it is paused."""

    def group(*arguments: str) -> None:
        cli("group", *arguments, data=fleet.server.data)

    url = "https://backend.invalid/uplinkd"
    group("create", "silent", "--all-products", "--webhook", url, "--from", "now")
    with chromium() as browser, visit(browser, fleet.server) as visitor:
        page = visitor.page
        sign_in(visitor, PASSWORD)
        visitor.go("/prefer?language=zh&back=/groups")
        page.wait_for_selector("[data-group=silent] .state:text-is('投递中')")
        one = visitor.context.new_page()
        one.goto(f"{visitor.url}/groups/silent")
        one.wait_for_selector("h1 .state.online:text-is('投递中')")
        group("reset", "silent", "--to", "1h")
        one.wait_for_selector("#hook:has-text('找不到对方的主机名')")
        one.wait_for_selector("h1 .state.disabled:text-is('Webhook 无响应')", timeout=20_000)
        one.wait_for_selector("#hook dt:text-is('下次尝试')")
        page.wait_for_selector("[data-group=silent] .state.disabled:text-is('Webhook 无响应')")
        assert one.query_selector("#dead tbody tr") is None
        with ThreadPoolExecutor(1) as aside:  # the browser's loop runs in this thread
            aside.submit(buried, fleet.server.data, "silent", b"late").result()
        one.wait_for_selector("#dead tbody tr:has-text('late')")
        group("change", "silent", "--pause")
        page.wait_for_selector("[data-group=silent] .state:text-is('已暂停')")
        group("delete", "silent")
        assert visitor.faults == []
