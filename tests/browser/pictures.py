"""Makes the pictures of the page in docs/img. Run: python -m tests.browser.pictures docs/img"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.browser.conftest import ARGS, chromium, say, wait_done
from tests.e2e.conftest import Server

FLAGS = ["--port", "0", "--device", "cpu", "--num-pages", "512", "--slow-motion"]


def chat(page: Page, folder: Path) -> None:
    """A conversation, and the token view of its last answer."""
    wait_done(say(page, "How does continuous batching work?"))
    answer = wait_done(say(page, "Tell me a joke about a lighthouse keeper."))
    answer.get_by_role("button", name="Tokens and their probabilities").click()
    answer.locator(".token:not(.grade-1), .token:last-child").first.click()  # one that was not certain
    page.get_by_role("log").evaluate("node => node.scrollTop = node.scrollHeight")
    page.wait_for_timeout(500)
    page.screenshot(path=folder / "chat.png")


def inside(page: Page, folder: Path) -> None:
    """A long prompt amid running streams, in slow motion, after requests with a shared prefix; then its stages."""
    page.get_by_role("link", name="Inside").click()
    page.locator(".controls[data-ready]").wait_for()
    page.locator("[data-load=shared]").click()
    page.locator(".controls[data-state=running]").wait_for()
    page.locator(".controls[data-state=done]").wait_for()
    page.get_by_role("slider", name="Slow motion").fill("3")
    page.get_by_text("200 ms after each step").wait_for()
    page.locator("[data-load=long]").click()
    page.locator("tr.running").nth(6).wait_for()
    page.wait_for_timeout(2500)
    page.screenshot(path=folder / "inside.png")
    page.get_by_role("slider", name="Slow motion").fill("0")
    page.locator(".controls[data-state=done]").wait_for(timeout=60_000)


def main(folder: Path) -> None:
    with (
        tempfile.TemporaryDirectory() as logs,
        Server.running(["-m", "minisgl", *FLAGS], Path(logs) / "log") as server,
        sync_playwright() as driver,
    ):
        started = driver.chromium.launch(executable_path=chromium(), args=ARGS)
        page = started.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light", locale="en-GB")
        page.goto(server.url)
        chat(page, folder)
        page.set_viewport_size({"width": 1280, "height": 1180})
        inside(page, folder)
        started.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
