"""The documentation site, as `make docs-site` has built it: no page fetches from elsewhere, and diagrams are drawn."""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.browser.conftest import Page
from tests.e2e.conftest import ROOT
from tests.waiting import poll

SITE = ROOT / "build" / "site"
pytestmark = pytest.mark.skipif(
    not (SITE / "index.html").is_file() and not os.environ.get("REQUIRE_SITE"), reason="needs make docs-site"
)
# What a browser fetches by itself, as a link is not.
FETCHED = re.compile(r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?([^"'\s>]+)""")
SHEETS = re.compile(r"""<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|icon|preconnect))[^>]*href=["']?([^"'\s>]+)""")


class _Files(SimpleHTTPRequestHandler):
    def translate_path(self, path: str) -> str:
        """The theme looks for a sitemap beside each page of two languages, and does without."""
        return super().translate_path("/sitemap.xml" if path.endswith("/sitemap.xml") else path)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Files, directory=str(SITE)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_pages_fetch_from_the_site_alone() -> None:
    pages = list(SITE.rglob("*.html"))
    assert len(pages) > 80
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for address in FETCHED.findall(text) + SHEETS.findall(text):
            assert not re.match(r"(https?:)?//", address), f"{page.relative_to(SITE)} fetches {address}"


@pytest.mark.parametrize("path", ["diagrams/", "zh/diagrams/"])
def test_diagrams_are_drawn(site: str, visit: Callable[..., Page], path: str) -> None:
    """`visit` fails what is fetched from elsewhere. The theme puts each drawing where its text was."""
    page = visit(f"{site}/{path}")
    drawn = page.locator("div.mermaid")
    poll(lambda: drawn.count() >= 5, "five diagrams")
    assert page.locator("pre.mermaid").count() == 0
    for index in range(drawn.count()):
        box = drawn.nth(index).bounding_box()
        assert box is not None and box["height"] > 60, index
