"""The console's pages: who gets in, what forms do, and that what people and devices write stays text."""

from __future__ import annotations

import asyncio
import re
import time

import pytest
from argon2 import PasswordHasher

from tests.admin.conftest import PASSWORD, House
from uplinkd.admin.access import check_password, first_password, hash_password
from uplinkd.core.groups import Plan, Webhook
from uplinkd.core.operators import Role
from uplinkd.metrics import HANDSHAKE_FAILURES

PAGES = [
    "/",
    "/products",
    "/products/{pk}",
    "/products/{pk}/topics",
    "/products/{pk}/keys",
    "/products/{pk}/settings",
    "/products/{pk}/devices/lamp-0001",
    "/live",
    "/groups",
    "/groups/reports",
    "/groups/hook",
    "/messages",
    "/logs",
    "/codes",
    "/workbench",
    "/access",
    "/users",
    "/audit",
    "/settings",
    "/jobs",
    "/password",
]
ADMINS = {"/users", "/audit", "/settings"}


def product_with_device(house: House) -> str:
    product = house.registry.create_product("my lamps")
    house.registry.create_device(product.key, "lamp-0001")
    house.registry.create_app("billing", products=[product.key])
    house.registry.groups.create("reports", Plan(products=(product.key,), apps=("billing",)))
    house.registry.groups.create("hook", Plan(webhook=Webhook(url="https://backend.example.com/uplinkd")))
    return str(product.key)


@pytest.mark.parametrize("language", ["en", "zh"])
async def test_every_page_answers_in_both_languages(house: House, language: str) -> None:
    """Without a secret in it."""
    pk = product_with_device(house)
    secret = house.registry.device(pk, "lamp-0001").secret
    await house.stored(f"/{pk}/lamp-0001/user/update", b'{"on":true}')
    await house.refused(product_key=pk, device_name="lamp-0001")
    async with house.signed_in() as browser:
        for path in PAGES:
            page = await browser.get(path.format(pk=pk), headers={"Accept-Language": language})
            assert page.status_code == 200, (path, page.text)
            assert f'<html lang="{"zh-CN" if language == "zh" else "en"}"' in page.text
            assert secret not in page.text, path
            assert ("退出登录" in page.text) is (language == "zh")


@pytest.mark.parametrize("language", ["en", "zh"])
async def test_the_overview_tells_of_handshakes(house: House, language: str) -> None:
    """Old firmware shows by its static RSA; each reason for which a handshake fails has words of its own."""
    meter = house.metrics.meter(0)
    async with house.signed_in(Role.VIEWER) as browser:
        accept = {"Accept-Language": language}
        assert "static RSA" not in (await browser.get("/", headers=accept)).text
        meter.shook_hands("TLSv1.2", "rsa")
        for reason in HANDSHAKE_FAILURES:
            meter.handshake_failed(reason)
        page = (await browser.get("/", headers=accept)).text
        shown = re.findall(r"<dd>1 × (.+?)</dd>", page)
        assert len(set(shown)) == len(HANDSHAKE_FAILURES)
        assert "<dt>TLSv1.2 RSA</dt><dd>1 " in page
        told = (await browser.get("/api/v1/stats")).json()
        assert told["handshakes"] == {"TLSv1.2 rsa": 1}
        assert told["handshakeFailures"] == dict.fromkeys(HANDSHAKE_FAILURES, 1)


async def test_the_settings_are_explained_in_the_readers_language(house: House) -> None:
    async with house.signed_in() as browser:
        page = (await browser.get("/settings", headers={"Accept-Language": "zh"})).text
        assert "存放所有状态的目录" in page
        assert "folder that holds all state" not in page
        assert "folder that holds all state" in (await browser.get("/settings")).text


async def test_the_overview_counts_devices_and_refusals(house: House) -> None:
    """Devices online are in each sample, for the chart; the refusals of the last hour by code are in what the page asks for
    while it is looked at."""
    pk = product_with_device(house)
    await house.refused(product_key=pk, device_name="lamp-0001")
    house.office.figures.count_online = lambda: house.office.census().online
    running = asyncio.create_task(house.office.figures.run())
    async with house.signed_in(Role.VIEWER) as browser:
        told = (await browser.get("/api/v1/stats")).json()
        assert list(told["refused"].values()) == [1]
        (code,) = told["refused"]
        assert f'<a href="/logs?code={code}&amp;since=1h">{code}</a> × 1' in (await browser.get("/")).text
        while not (kept := (await browser.get("/api/v1/stats/history")).json()["items"]):
            await asyncio.sleep(0.05)
        assert kept[-1]["online"] == 0
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_an_application_reaches_one_of_very_many_products(house: House) -> None:
    """The first are offered by name, the others are named by their keys; what it reaches already stays chosen."""
    keys = [house.registry.create_product(f"product {number:03}").key for number in range(60)]
    async with house.signed_in() as browser:
        assert (
            await browser.post("/access/apps", name="billing", further=f"{keys[57]}, {keys[58]}")
        ).status_code == 200
        page = (await browser.get("/access")).text
        assert page.count('name="products"') == 50 + 2 + 50
        assert [f'value="{key}" checked' in page for key in keys[57:]] == [True, True, False]
        version = house.registry.app("billing").version
        chosen = {"products": [keys[0], keys[58]], "further": keys[59], "version": version}
        assert (await browser.post("/access/apps/billing/products", **chosen)).status_code == 303
        assert set(house.registry.app("billing").products) == {keys[0], keys[58], keys[59]}
        unknown = await browser.post("/access/apps", name="other", further="a1nowhere")
        assert (unknown.status_code, 'name="further" value="a1nowhere"' in unknown.text) == (404, True)


async def test_roles_decide_what_is_shown_and_done(house: House) -> None:
    """A viewer looks, and sees no button that would be refused; forms posted all the same are refused."""
    pk = product_with_device(house)
    device = f"/products/{pk}/devices/lamp-0001"
    async with house.signed_in(Role.VIEWER) as viewer, house.signed_in(Role.OPERATOR) as operator:
        assert "Reset secret" not in (await viewer.get(device)).text
        assert "Reset secret" in (await operator.get(device)).text
        for act in ("disable", "reset", "delete", "secret", "send"):
            assert (await viewer.post(f"{device}/{act}", topic="x", payload="x")).status_code == 403
        assert (await viewer.get(f"{device}/snippets/curl")).status_code == 403
        assert (await viewer.get(f"/products/{pk}/devices.csv")).status_code == 403
        assert (await viewer.post("/products", name="more lamps")).status_code == 403
        for path in ADMINS:
            assert (await operator.get(path)).status_code == 403
        assert (await operator.post("/access/keys", name="x", scope="admin")).status_code == 403
        assert (await operator.post("/users", name="x", role="admin")).status_code == 403
    assert house.registry.device(pk, "lamp-0001").enabled


async def test_nobody_gets_in_without_signing_in(house: House) -> None:
    """Pages lead to the sign-in, and from there back; to this server alone."""
    async with house.client() as nobody:
        answer = await nobody.get("/products?q=x")
        assert (answer.status_code, answer.headers["Location"]) == (303, "/sign-in?back=%2Fproducts%3Fq%3Dx")
        assert (await nobody.post("/products", data={"name": "more lamps"})).status_code == 401
        house.registry.operators.create_user("eve", Role.VIEWER, hash_password(PASSWORD), one_time=False)
        for elsewhere in ("https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)"):
            data = {"name": "eve", "password": PASSWORD, "back": elsewhere}
            assert (await nobody.post("/sign-in", data=data)).headers["Location"] == "/"


async def test_the_first_password_is_good_for_one_sign_in(house: House) -> None:
    """Until its owner has chosen another, nothing else is open; a lost one is replaced at the next start."""
    operators = house.registry.operators
    lost, password = first_password(operators), first_password(operators)
    assert lost != password
    async with house.client() as client:
        data = {"name": "admin", "password": lost}
        assert (await client.post("/sign-in", data=data)).status_code == 401
        data["password"] = password
        signed_in = await client.post("/sign-in", data=data)
        assert signed_in.headers["Location"] == "/password"
        cookie = signed_in.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=lax" in cookie
        assert (await client.get("/products")).headers["Location"] == "/password"
        assert (await client.get("/api/v1/products")).status_code == 403
        form = re.search(r'name="csrf" value="(\w+)"', (await client.get("/password")).text)
        assert form
        short = {"csrf": form[1], "old": password, "new": "short", "again": "short"}
        assert "at least 10 characters" in (await client.post("/password", data=short)).text
        chosen = {"csrf": form[1], "old": password, "new": PASSWORD, "again": PASSWORD}
        assert (await client.post("/password", data=chosen)).headers["Location"] == "/sign-in?done=password"
        assert (await client.get("/products")).headers["Location"].startswith("/sign-in")
    assert first_password(operators) is None


def test_in_a_shared_registry_one_gateway_alone_makes_the_first_password(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts later leaves it as it is; of two that start at once one makes it."""
    operators = house.registry.operators
    password = first_password(operators, shared=True)
    assert password
    assert first_password(operators, shared=True) is None
    assert check_password(operators.find_user("admin"), password)
    monkeypatch.setattr(operators, "users", list)  # it had looked before the other one was done
    assert first_password(operators, shared=True) is None
    assert check_password(operators.find_user("admin"), password)


async def test_guessing_passwords_is_slowed_down(house: House) -> None:
    """Ten a minute for one user from one address; the right one is refused then, too, and others are not."""
    operators = house.registry.operators
    for name in ("alice", "bob"):
        operators.create_user(name, Role.VIEWER, hash_password(PASSWORD), one_time=False)
    async with house.client() as client:
        codes = [
            (await client.post("/sign-in", data={"name": "alice", "password": f"wrong {number}"})).status_code
            for number in range(10)
        ]
        assert codes == [401] * 10
        refused = await client.post("/sign-in", data={"name": "alice", "password": PASSWORD})
        assert refused.status_code == 429
        assert "too many attempts" in refused.text
        assert (await client.post("/sign-in", data={"name": "bob", "password": PASSWORD})).status_code == 303
    entries = operators.audit(action="session.refused", limit=100)
    assert len(entries) == 10
    assert "wrong" not in str(entries)


async def test_a_form_of_another_site_does_nothing(house: House) -> None:
    """No CSRF token, another session's, or a browser that says where the request comes from."""
    async with house.signed_in() as browser, house.signed_in() as other:
        for csrf in ("", "0" * 64):
            assert (
                await browser.client.post("/products", data={"name": "more lamps", "csrf": csrf})
            ).status_code == 403
        from uplinkd.admin.access import csrf_token

        foreign = csrf_token(other.client.cookies["uplinkd_session"])
        assert (await browser.client.post("/products", data={"name": "more lamps", "csrf": foreign})).status_code == 403
        said = await browser.client.post("/sign-out", headers={"Sec-Fetch-Site": "cross-site"})
        assert said.status_code == 403
        assert house.registry.products() == []
        assert (await browser.post("/products", name="more lamps")).status_code == 303


async def test_signing_out_ends_the_session_itself(house: House) -> None:
    """Who has copied the cookie has nothing."""
    async with house.signed_in() as browser:
        cookie = browser.client.cookies["uplinkd_session"]
        await browser.post("/sign-out")
        async with house.client(Cookie=f"uplinkd_session={cookie}") as thief:
            assert (await thief.get("/products")).status_code == 303


async def test_headers_keep_browsers_strict(house: House) -> None:
    """On pages, on errors, on the API."""
    async with house.client() as client:
        for path in ("/sign-in", "/nothing", "/api/v1/products", "/static/console.css", "/healthz"):
            headers = (await client.get(path)).headers
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert "unsafe" not in headers["Content-Security-Policy"]
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert (headers.get("Cache-Control") == "no-store") is not path.startswith("/static")
        assert "Server" not in (await client.get("/sign-in")).headers


async def test_a_fault_of_ours_is_answered_as_strictly(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 with the same headers, and nothing of what went wrong."""

    def broken(**_: object) -> None:
        raise ZeroDivisionError("s3cret")

    monkeypatch.setattr(house.registry, "product_page", broken)
    async with house.signed_in() as browser:
        for path in ("/products", "/api/v1/products"):
            answer = await browser.get(path)
            assert answer.status_code == 500
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert answer.headers["Cache-Control"] == "no-store"
            assert "s3cret" not in answer.text


async def test_a_choice_that_a_form_does_not_have_is_refused(house: House) -> None:
    """It was not made by the form."""
    pk = product_with_device(house)
    async with house.signed_in() as browser:
        for path, fields in (
            ("/access/keys", {"name": "x", "scope": "root"}),
            ("/users", {"name": "x", "role": "root"}),
            (f"/products/{pk}/topics", {"levels": "a", "right": "root"}),
        ):
            assert (await browser.post(path, **fields)).status_code == 422, path


async def test_pages_load_nothing_from_elsewhere(house: House) -> None:
    """Every address in a page or its static files is of this server."""
    pk = product_with_device(house)
    async with house.signed_in() as browser:
        texts = [(await browser.get(path.format(pk=pk))).text for path in [*PAGES, "/api/v1/docs"]]
        texts += [
            (await browser.get(f"/static/{name}")).text for name in ("console.css", "console.js", "chart.js", "live.js")
        ]
    for text in texts:
        for url in re.findall(r"""(?:src|href|action)=["']([^"']+)|url\(([^)]+)\)|from "([^"]+)\"""", text):
            assert re.match(r"/|#|\./|\?|data:", "".join(url)), url


async def test_what_devices_and_people_write_stays_text(house: House) -> None:
    """A payload, a topic, a reason, a name that looks like HTML is shown as it is."""
    evil = "<script>alert(1)</script>"
    pk = product_with_device(house)
    house.registry.rename_product(pk, "<b>&quot;lamps</b>")
    number = await house.stored(f"/{pk}/lamp-0001/user/update", evil.encode())
    await house.refused(reason=evil, product_key=pk, device_name=evil, topic=f'/{pk}/"onload=x')
    async with house.signed_in() as browser:
        for path in (
            "/",
            "/messages",
            f"/messages/{number}",
            "/logs",
            f"/products/{pk}",
            f"/products/{pk}/devices/lamp-0001",
        ):
            text = (await browser.get(path)).text
            assert evil not in text, path
            assert "<b>&quot;" not in text
        assert "&lt;script&gt;" in (await browser.get("/messages")).text
        assert (await browser.post("/workbench", text=evil)).status_code == 200


async def test_the_acts_on_a_device(house: House) -> None:
    """Each does what its button says; an old page does not undo what somebody did meanwhile."""
    pk = product_with_device(house)
    device, registry = f"/products/{pk}/devices/lamp-0001", house.registry
    async with house.signed_in(Role.OPERATOR) as browser:
        before = registry.device(pk, "lamp-0001")
        assert (await browser.post(f"{device}/disable", version=before.version)).status_code == 303
        assert not registry.device(pk, "lamp-0001").enabled
        stale = await browser.post(f"{device}/enable", version=before.version)
        assert (stale.status_code, "changed meanwhile" in stale.text) == (412, True)
        assert (await browser.post(f"{device}/enable")).status_code == 303
        shown = await browser.post(f"{device}/secret")
        assert before.secret in shown.text
        renewed = await browser.post(f"{device}/reset")
        secret = registry.device(pk, "lamp-0001").secret
        assert secret != before.secret
        assert secret in renewed.text
        snippet = await browser.get(f"{device}/snippets/python")
        assert secret in snippet.text
        sent = await browser.post(f"{device}/send", topic=f"/{pk}/lamp-0001/user/get", payload='{"on":false}')
        assert (sent.status_code, "it waits for the device" in sent.text) == (200, True)
        wrong = await browser.post(f"{device}/send", topic="/elsewhere", payload="x")
        assert (wrong.status_code, "is not of the device" in wrong.text) == (400, True)
        assert (await browser.post(f"{device}/delete")).headers["Location"] == f"/products/{pk}?done=device.delete"
        assert (await browser.get(device)).status_code == 404
    actions = [entry.action for entry in registry.operators.audit(target=f"{pk}/lamp-0001", limit=100)]
    assert actions == [
        "device.delete",
        "message.send",
        "device.secret",
        "device.reset-secret",
        "device.secret",
        "device.enable",
        "device.disable",
        "device.create",
    ]


async def test_products_topics_and_apps_by_forms(house: House) -> None:
    """Made, changed, deleted; what breaks a rule is said on the page."""
    async with house.signed_in() as browser:
        made = await browser.post("/products", name="my lamps")
        pk = made.headers["Location"].split("/")[2].split("?")[0]
        again = await browser.post("/products", name="my lamps")
        assert (again.status_code, "there is a product named" in again.text) == (409, True)
        assert (await browser.post(f"/products/{pk}/topics", levels="user/report", right="publish")).status_code == 303
        bad = await browser.post(f"/products/{pk}/topics", levels="a b", right="publish")
        assert (bad.status_code, "letters, digits and underscores" in bad.text) == (400, True)
        assert (await browser.post(f"/products/{pk}/topics/remove", levels="user/report")).status_code == 303
        assert house.registry.product(pk).secret in (await browser.post(f"/products/{pk}/keys")).text
        version = house.registry.product(pk).version
        assert (await browser.post(f"/products/{pk}/settings", name="our lamps", version=version)).status_code == 303
        stale = await browser.post(f"/products/{pk}/settings", name="their lamps", version=version)
        assert stale.status_code == 412
        app = await browser.post("/access/apps", name="billing", products=pk, sends="1")
        assert re.search(r"shown this once", app.text)
        version = house.registry.app("billing").version
        assert (await browser.post("/access/apps/billing/products", version=version)).status_code == 303
        assert house.registry.app("billing").products == ()
        assert (await browser.post("/access/apps/billing/delete")).status_code == 303
        key = await browser.post("/access/keys", name="ci", scope="read")
        assert "uplk_" in key.text
        assert (await browser.post("/access/keys/ci/delete")).status_code == 303
        user = await browser.post("/users", name="eve", role="viewer")
        assert "The one-time password of eve" in user.text
        assert (await browser.post("/users/eve/role", role="operator")).status_code == 303
        assert (await browser.post("/users/eve/password")).status_code == 200
        assert (await browser.post("/users/eve/delete")).status_code == 303
        wrong = await browser.post(f"/products/{pk}/delete", confirm="something else")
        assert wrong.status_code == 400
        job = await browser.post(f"/products/{pk}/delete", confirm=pk)
        for _ in range(200):
            page = await browser.get(job.headers["Location"])
            if 'data-state="done"' in page.text:
                break
            await asyncio.sleep(0.02)
        assert house.registry.products() == []


async def test_refusals_that_repeat_are_shown_once(house: House) -> None:
    """With how often they came, on the overview and on the device's page; the search has each of them."""
    pk = product_with_device(house)
    for _ in range(7):
        await house.refused(product_key=pk, device_name="lamp-0001", reason="the same again")
    await house.refused(product_key=pk, device_name="lamp-0001", reason="something else")
    async with house.signed_in(Role.VIEWER) as browser:
        for path in ("/", f"/products/{pk}/devices/lamp-0001"):
            page = (await browser.get(path)).text
            assert (page.count("the same again"), page.count("something else"), page.count("7 times")) == (1, 1, 1)
        assert (await browser.get(f"/logs?product={pk}")).text.count("the same again") == 7


async def test_who_is_held_back_by_flow_control_is_shown_with_how_much(house: House) -> None:
    """On the overview, with links; on the device's page what concerns it; on neither when there is nothing."""
    pk = product_with_device(house)
    title = "Held back by flow control, last hour"
    async with house.signed_in(Role.VIEWER) as browser:
        paths = ("/", f"/products/{pk}/devices/lamp-0001")
        assert not any([title in (await browser.get(path)).text for path in paths])
        reason = "the device sends more than 30 messages a second (device_rate)"
        await house.refused(product_key=pk, device_name="lamp-0001", code=40000, reason=reason, times=12_345)
        await house.refused(product_key="", device_name="", code=40000, reason="another", times=7)
        overview, device = [(await browser.get(path)).text for path in paths]
        for page in (overview, device):
            assert title in page
            assert "<b>12,345 times</b>" in page
            assert f'href="{paths[1]}"' in page
        assert "address=192.0.2.1" in overview
        assert "<b>7 times</b>" in overview
        assert "<b>7 times</b>" not in device
        browser.client.cookies.set("language", "zh")
        assert "设备每秒发送超过 30 条消息（device_rate）" in (await browser.get(paths[1])).text


async def test_a_filter_that_breaks_a_rule_is_explained(house: House) -> None:
    """On the live page too, whose stream would not begin."""
    async with house.signed_in(Role.VIEWER) as browser:
        for path in ("/live", "/messages"):
            page = (await browser.get(path, params={"topic": "user/update"})).text
            assert "it does not begin with a slash" in page, path
        assert 'data-stream="messages"' not in (await browser.get("/live?topic=user/update")).text
        assert 'data-stream="messages"' in (await browser.get("/live?product=&device=&topic=")).text


async def test_what_was_typed_stands_there_after_a_fault(house: House) -> None:
    """In the form that it came from, which is open; the fault in the reader's language. What was sent down and what became of it
    stand together."""
    pk = product_with_device(house)
    async with house.signed_in() as browser:
        product = (await browser.post("/products", name="x & y z", key="a-1")).text
        assert re.search(r'<details class="act" name="act" open>.{,200}action="/products"', product, re.DOTALL)
        assert 'value="x &amp; y z"' in product
        assert 'value="a-1"' in product
        many = (await browser.post(f"/products/{pk}/bulk", prefix="lamp!", count="7", start="3")).text
        assert re.search(r'<details class="act" name="act" open>.{,200}/bulk"', many, re.DOTALL)
        assert 'value="7"' in many
        topics = (await browser.post(f"/products/{pk}/topics", levels="a b", right="both")).text
        assert 'value="a b"' in topics
        assert '<option value="both" selected>' in topics
        browser.client.cookies.set("language", "zh")
        sent = await browser.post(f"/products/{pk}/devices/lamp-0001/send", topic="/a/b/c", payload="<keep> me")
        section = sent.text.partition('id="send"')[2].partition("</section>")[0]
        assert (sent.status_code, "不属于设备" in section) == (400, True)
        assert 'value="/a/b/c"' in section
        assert "&lt;keep&gt; me</textarea>" in section
        user = (await browser.post("/users", name="e v e", role="operator")).text
        assert 'value="e v e"' in user
        assert '<option value="operator" selected>操作员: ' in user
        assert "用户名 &#39;e v e&#39;：应为" in user


async def test_the_answer_to_a_form_can_be_loaded_anew(house: House) -> None:
    """A change of the language, or an ended session, leads to the page that the form stands on."""
    pk = product_with_device(house)
    device = f"/products/{pk}/devices/lamp-0001"
    async with house.signed_in() as browser:
        for path, above in [
            (f"{device}/secret", device),
            (f"{device}/send", device),
            (f"/products/{pk}/bulk", f"/products/{pk}"),
            (f"/products/{pk}/devices", f"/products/{pk}"),
            (f"/products/{pk}/topics/remove", f"/products/{pk}/topics"),
            ("/access/keys", "/access"),
            ("/access/apps/billing/delete", "/access"),
            ("/users/eve/role", "/users"),
            ("/import", "/products"),
        ]:
            answer = await browser.get(path)
            assert (answer.status_code, answer.headers.get("Location")) == (303, above), path
        browser.client.cookies.delete("uplinkd_session")
        ended = await browser.client.post(f"{device}/reset", data={"csrf": "of a session that has ended"})
        assert ended.status_code == 401
        assert f'href="/sign-in?back={device.replace("/", "%2F")}"' in ended.text


async def test_the_search_box_knows_what_was_typed(house: House) -> None:
    """A device, a product, a requestId, a messageId."""
    pk = product_with_device(house)
    async with house.signed_in(Role.VIEWER) as browser:
        for text, where in [
            ("lamp-0001", f"/products/{pk}/devices/lamp-0001"),
            ("lamp-", f"/products/{pk}/devices/lamp-0001"),
            (pk, f"/products/{pk}"),
            ("my lamps", f"/products/{pk}"),
            ("0123456789abcdef", "/logs?requestId=0123456789abcdef"),
            ("1937430198214918145", "/messages/1937430198214918145"),
            ("nothing like it", "/products?q=nothing+like+it"),
        ]:
            assert (await browser.get("/search", params={"q": text})).headers["Location"] == where


async def test_a_file_is_imported_by_a_form(house: House) -> None:
    """With the token of the session, as multipart."""
    from uplinkd.admin.access import csrf_token

    fleet = b"ProductKey,DeviceName,DeviceSecret\npk,lamp-1,\npk,lamp-2,s3cret\n"
    async with house.signed_in(Role.OPERATOR) as browser:
        csrf = csrf_token(browser.client.cookies["uplinkd_session"])
        answer = await browser.client.post("/import", data={"csrf": csrf}, files={"file": ("fleet.csv", fleet)})
        assert answer.status_code == 303, answer.text
        for _ in range(200):
            page = (await browser.get(answer.headers["Location"])).text
            if 'data-state="running"' not in page:
                break
            await asyncio.sleep(0.02)
        assert 'data-state="done"' in page
        refused = await browser.client.post("/import", data={"csrf": csrf}, files={"file": ("x.csv", b"a,b\n")})
        assert (refused.status_code, "ProductKey is missing" in refused.text) == (400, True)
        assert '<input name="file" type="file"' in refused.text
    assert house.registry.device("pk", "lamp-2").secret == "s3cret"


async def test_an_engine_that_is_away_leaves_the_console_standing(house: House) -> None:
    """Pages say so, within a moment; what needs no message goes on."""
    from uplinkd.core.errors import Unavailable

    async def away() -> None:
        raise Unavailable("the engine does not answer: it is away")

    house.office.open_reader = away  # type: ignore[assignment]
    pk = product_with_device(house)
    async with house.signed_in() as browser:
        begun = time.monotonic()
        assert "does not answer" in (await browser.get("/")).text
        assert "it is away" in (await browser.get(f"/products/{pk}/devices/lamp-0001")).text
        assert "it is away" in (await browser.get("/messages")).text
        assert (await browser.get("/messages/1937430198214918145")).status_code == 503
        ready = await browser.get("/readyz")
        assert (ready.status_code, "it is away" in ready.text) == (503, True)
        assert (await browser.get("/healthz")).status_code == 200
        assert time.monotonic() - begun < 8


async def test_a_flood_of_sign_ins_does_not_eat_the_machine(house: House) -> None:
    """Two passwords are checked at a time, each takes 64 MiB; of very many the rest is asked to come again."""
    dear = PasswordHasher().hash(PASSWORD)
    assert dear.startswith("$argon2id$v=19$m=65536,t=3,")
    house.registry.operators.create_user("alice", Role.VIEWER, dear, one_time=False)
    async with house.client() as client:
        data = {"name": "alice", "password": "wrong password"}
        codes = [
            answer.status_code
            for answer in await asyncio.gather(*(client.post("/sign-in", data=data) for _ in range(60)))
        ]
    assert set(codes) == {401, 429}
    assert codes.count(401) <= 22
