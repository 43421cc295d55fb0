"""A real headless Chromium in front of the real console."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

from tests.house import Server

__all__ = ["PASSWORD", "Visit", "choose_password", "chromium", "one_time_password", "sign_in", "visit"]

PASSWORD = "correct horse battery"
# Without the last four it calls for updates, which a closed network refuses by the hundred.
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The machine's Chromium; the test is skipped where there is none."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """One person's browser window. `faults` has what the browser complains of: failed scripts, what the policy forbids."""

    page: Page
    context: BrowserContext
    url: str
    faults: list[str] = field(default_factory=list)

    def go(self, path: str) -> int:
        answer = self.page.goto(self.url + path)
        assert answer
        return answer.status


@contextlib.contextmanager
def visit(browser: Browser, server: Server, **options: Any) -> Iterator[Visit]:
    """A fresh window on the server's console."""
    url = f"http://127.0.0.1:{server.console_port}"
    context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 860}, **options})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
    page = context.new_page()
    made = Visit(page, context, url)

    def complain(message: ConsoleMessage) -> None:
        # An answer of 4xx is what a test may ask for; it asserts on that itself.
        if message.type == "error" and "Failed to load resource" not in message.text:
            made.faults.append(f"{page.url}: {message.text}")

    page.on("console", complain)
    page.on("pageerror", lambda error: made.faults.append(f"{page.url}: {error}"))
    page.on("dialog", lambda dialog: dialog.accept())
    page.set_default_timeout(10_000)
    try:
        yield made
    finally:
        context.close()


def one_time_password(server: Server) -> str:
    found = re.search(r"one-time password (\S+)", server.banner)
    assert found, server.banner
    return found[1]


def sign_in(made: Visit, password: str = PASSWORD) -> None:
    """As admin."""
    page = made.page
    made.go("/sign-in")
    page.fill("[name=name]", "admin")
    page.fill("[name=password]", password)
    page.click("main button.primary")
    page.wait_for_url(re.compile(r"/(password)?$"))


def choose_password(made: Visit, old: str) -> None:
    """On the page to which the one-time password leads."""
    page = made.page
    page.fill("[name=old]", old)
    page.fill("[name=new]", PASSWORD)
    page.fill("[name=again]", PASSWORD)
    page.click("main button.primary")
    page.wait_for_url(re.compile(r"/sign-in"))
