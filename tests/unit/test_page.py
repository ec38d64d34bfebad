"""The page's files: in both languages, within its budgets, and served with a strict policy. What it does is tried in
tests/browser."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from minisgl.page.routes import ASSETS, FILES, add_page

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "page"
MAX_LINES = 3500  # of sources
MAX_PAGE, MAX_DOCS = 250_000, 600_000  # bytes, packed
SOURCES = [path for path in (PAGE / "src").rglob("*") if path.suffix in (".js", ".css", ".json", ".html")]


@pytest.fixture(scope="module")
def http() -> TestClient:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    add_page(app)
    return TestClient(app)


WORDS: dict[str, list[str]] = json.loads((PAGE / "src" / "i18n.json").read_text(encoding="utf-8"))


def test_each_key_has_words_in_both_languages_and_the_same_values_to_fill_in() -> None:
    assert WORDS
    for key, (english, chinese) in WORDS.items():
        assert english.strip() and chinese.strip(), key
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese)), key


def test_each_key_that_the_page_uses_is_there_and_each_that_is_there_is_used() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in SOURCES if path.suffix == ".js")
    used = set(re.findall(r'\bt\("([^"]+)"', code)) | set(re.findall(r'"([a-z]+\.[a-z0-9_.]+|[a-z]+)"', code))
    families = tuple(re.findall(r"\bt(?:Or)?\(`([^`$]+)\$\{", code))
    assert families
    assert not set(re.findall(r'\bt\("([^"]+)"', code)) - set(WORDS)
    assert not {key for key in WORDS if key not in used and not key.startswith(families)}


def test_sizes_stay_within_their_budgets() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert sum(lines.values()) <= MAX_LINES
    assert max(lines.values()) <= 400
    long = [path for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 120]
    assert {path.suffix for path in long} <= {".css", ".json"}  # a rule, or a sentence, on a line
    sizes = {path: len(gzip.compress(file.read_bytes())) for path, file in FILES.items()}
    docs = {path for path in sizes if "docs" in path or "swagger" in path or path.endswith("openapi.json")}
    assert sum(size for path, size in sizes.items() if path not in docs) <= MAX_PAGE
    assert sum(sizes[path] for path in docs) <= MAX_DOCS


def test_only_the_files_that_are_named_are_there_and_served(http: TestClient) -> None:
    assert {file for file in FILES.values() if file.parent == ASSETS} == {*ASSETS.iterdir()}
    for path, file in FILES.items():
        assert http.get(path).content == file.read_bytes()
    for path in ("/page/", "/page/routes.py", "/page/../errors.py", "/page/%2e%2e/errors.py", "/page/app.js/x"):
        assert http.get(path).status_code == 404


def test_scripts_and_connections_are_the_servers_own(http: TestClient) -> None:
    answer = http.get("/")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/docs"):
        text = http.get(path).text
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=|https?://", text)


def test_browsers_keep_what_has_not_changed(http: TestClient) -> None:
    first = http.get("/page/app.js", headers={"accept-encoding": "gzip"})
    assert first.headers["content-encoding"] == "gzip" and first.headers["cache-control"] == "no-cache"
    again = http.get("/page/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    plain = http.get("/page/app.js", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers and plain.content == first.content


def test_the_lock_file_names_no_registry() -> None:
    assert "http" not in (PAGE / "package-lock.json").read_text(encoding="utf-8")
