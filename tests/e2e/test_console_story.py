"""The newcomer's story in a real browser: from the banner's password to a message that arrives, a sign that is wrong, and the
explanation that puts it right."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.browser import choose_password, chromium, one_time_password, sign_in, visit
from tests.house import Server, environment, login_body

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("console")]


def test_a_newcomer_finds_their_way_by_the_console_alone(tmp_path: Path) -> None:
    """Sign in, make a product, a class and a device, copy a snippet, run it, see the message come in live, break the sign, read
    why it was refused, examine it at the workbench, put it right."""
    server = Server(tmp_path / "data", console_port=0).start()
    try:
        with chromium() as browser, visit(browser, server) as visitor:
            page = visitor.page
            sign_in(visitor, one_time_password(server))
            choose_password(visitor, one_time_password(server))
            sign_in(visitor)

            page.click("nav >> text=Products")
            page.fill("[name=name]", "my lamps")
            page.click("form[action='/products'] button")
            page.wait_for_url(re.compile(r"/products/a1\w{9}\?"))
            product = page.url.split("/")[-1].split("?")[0]

            page.click("nav.tabs >> text=Topic classes")
            page.fill("label [name=levels]", "user/report")
            page.click("section form button.primary")
            page.wait_for_selector("td:has-text('/user/report')")

            page.click("nav.tabs >> text=Devices")
            page.fill("label [name=name]", "lamp-0001")
            page.click(f"form[action='/products/{product}/devices'] button")
            page.wait_for_selector("h1:has-text('lamp-0001')")
            assert "never activated" in page.inner_text("h1")
            page.click("dl button.copy[data-fetch]")
            page.wait_for_selector("dl button.copy:has-text('copied')")
            secret = page.evaluate("navigator.clipboard.readText()")
            assert re.fullmatch(r"\w{32}", secret)
            page.click("#snippet-curl button.copy")
            page.wait_for_selector("#snippet-curl button.copy:has-text('copied')")
            snippet = page.evaluate("navigator.clipboard.readText()")
            assert secret in snippet
            assert secret not in page.content()

            live = visitor.context.new_page()
            live.goto(f"{visitor.url}/live?product={product}")
            live.wait_for_selector("#feed:has-text('live')")
            done = subprocess.run(
                ["bash", "-c", snippet], capture_output=True, timeout=30, env=environment(), cwd=tmp_path, check=False
            )
            assert b'"messageId"' in done.stdout, done.stdout + done.stderr
            row = live.wait_for_selector("#rows tr")
            assert row
            assert "lamp-0001" in row.inner_text()

            broken = json.loads(login_body(product, "lamp-0001", "not the secret"))
            answer = subprocess.run(
                ["curl", "-s", "--cacert", server.ca, f"{server.url}/auth", "--json", json.dumps(broken)],
                capture_output=True,
                timeout=10,
                check=True,
            ).stdout
            request_id = json.loads(answer)["info"]["requestId"]
            page.fill("#q", request_id)
            page.press("#q", "Enter")
            page.wait_for_url("**/logs?**")
            end = time.monotonic() + 10
            while page.query_selector(f".refusal:has-text('{request_id}')") is None:  # it is recorded within a second
                assert time.monotonic() < end, "the refusal is not found"
                time.sleep(0.1)
                page.reload()
            told = page.inner_text(".refusal")
            assert "20000" in told
            assert "wrong sign: the server signed" in told
            assert secret not in page.content()

            page.click("nav >> text=Signature workbench")
            page.fill("[name=text]", json.dumps(broken))
            page.click("main button.primary")
            page.wait_for_selector("#result .findings .bad")
            assert broken["sign"] in page.inner_text("#result")
            page.fill("[name=text]", login_body(product, "lamp-0001", secret).decode())
            page.click("main button.primary")
            page.wait_for_selector("#result .findings .good")
            assert page.query_selector("#result .findings .bad") is None

            visitor.go("/audit")
            audit = page.inner_text("table")
            for action in ("product.create", "topic.add", "device.create", "device.secret", "session.begin"):
                assert action in audit
            page.click("text=中文")
            page.wait_for_selector("h1:has-text('审计日志')")
            assert visitor.faults == []
    finally:
        server.stop()
