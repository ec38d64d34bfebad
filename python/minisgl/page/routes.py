"""The page at `/` and the API's description at `/docs`, as files: they hold nothing of anybody's, so that no key is
asked for. What they ask the server for needs one, like all else."""

import gzip
import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, Request, Response

from minisgl.page.stages import add_stages

PACKAGE = Path(__file__).parents[1]
ASSETS = PACKAGE / "page" / "assets"  # made by `npm run build` in the repository's `page/`
DOCUMENT = PACKAGE / "server" / "openapi.json"  # made by `python -m tools.openapi`
NAMES = (
    *("app.js", "worker.js", "style.css", "icon.svg", "licenses.txt"),
    *("docs.js", "docs-style.css", "swagger-ui-bundle.js", "swagger-ui.css"),
)
FILES = {  # by path, for everybody; nothing else is served, whatever lies beside it
    "/": ASSETS / "index.html",
    "/docs": ASSETS / "docs.html",
    "/page/openapi.json": DOCUMENT,
    **{f"/page/{name}": ASSETS / name for name in NAMES},
}
ALL_FILES = FILES | {"/openapi.json": DOCUMENT}  # for programs, which have the key
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".json": "application/json",
}
# Scripts, styles and connections are the server's own, or there are none. What a model writes can load nothing.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # kept, but asked for again: a newer server has another ETag
    "vary": "accept-encoding",
}


class Asset(NamedTuple):
    data: bytes
    packed: bytes
    etag: str


@cache
def _asset(path: str) -> Asset:
    data = ALL_FILES[path].read_bytes()
    return Asset(data, gzip.compress(data, mtime=0), f'W/"{hashlib.sha256(data).hexdigest()[:32]}"')


def asset(request: Request) -> Response:
    """A file of the page. It is read and packed when it is first asked for, beside the event loop."""
    path = request.scope["path"]
    found = _asset(path)
    headers = HEADERS | {"etag": found.etag, "content-type": TYPES[ALL_FILES[path].suffix]}
    if found.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(found.packed, headers={**headers, "content-encoding": "gzip"})
    return Response(found.data, headers=headers)


def add_page(app: FastAPI) -> None:
    for path in ALL_FILES:
        app.get(path, include_in_schema=False)(asset)
    add_stages(app)
