"""The page in a real browser: Debian's Chromium, driven by Playwright, before real servers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.conftest import Server, model_path, poll

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Browser, Locator, Page, sync_playwright  # noqa: E402

__all__ = ["Page", "model_path", "poll"]  # what tests take from here
NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGS = ["--no-sandbox", "--disable-dev-shm-usage"]
STRICT = bool(os.environ.get("CI") or os.environ.get("REQUIRE_CHROMIUM"))
CONTEXT = {"viewport": {"width": 1280, "height": 860}, "locale": "en-GB", "color_scheme": "light"}
SECONDS = 100_000  # milliseconds that anything may take, on a machine that is busy


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="package")  # its event loop would be in the way of other tests'
def browser() -> Iterator[Browser]:
    program = chromium()
    if program is None:
        if STRICT:
            pytest.fail("Chromium is missing: apt-get install chromium")
        pytest.skip("needs Chromium (apt-get install chromium)")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=ARGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The built-in model, as anybody starts it."""
    log = tmp_path_factory.mktemp("logs") / "demo.log"
    with Server.running(["-m", "minisgl", "--port", "0", "--device", "cpu", "--dtype", "float32"], log) as server:
        yield server


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address as a new person does. Whatever goes wrong in the page, or is loaded from elsewhere, fails the
    test that did it."""
    contexts, faults = [], []

    def opened(url: str, **options: Any) -> Page:
        context = browser.new_context(**{**CONTEXT, **options})
        contexts.append(context)
        context.set_default_timeout(SECONDS)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("console", lambda told: _note(faults, told.type, told.text))
        page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: _check_origin(faults, url, request.url))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not faults


def _note(faults: list[str], kind: str, text: str) -> None:
    if kind == "error" and "the server responded with a status of 401" not in text:
        faults.append(text)


def _check_origin(faults: list[str], url: str, asked: str) -> None:
    origin = "/".join(url.split("/")[:3])
    if not asked.startswith((f"{origin}/", "blob:", "data:")):
        faults.append(f"loads {asked}")


def say(page: Page, text: str) -> Locator:
    """Send a message. Returns its answer, which may not be complete yet."""
    page.get_by_role("textbox", name="Write a message").fill(text)
    page.keyboard.press("Enter")
    page.locator(".message.user").last.get_by_text(text[:40]).wait_for()
    return page.locator(".message.answer").last


def wait_done(answer: Locator, state: str = "done") -> Locator:
    answer.and_(answer.page.locator(f"[data-state={state}][aria-busy=false]")).wait_for()
    return answer


def check_accessible(page: Page) -> None:
    """axe-core finds no serious fault."""
    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
    told = [f"{fault['id']}: {[node['target'] for node in fault['nodes']]}" for fault in serious]
    assert not told, "\n".join(told)
