"""Around all routes: request ids and the access log, CORS, API keys. Plain ASGI: a stream's events pass untouched."""

from __future__ import annotations

import difflib
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minisgl.config.runtime import AccessConfig
from minisgl.server.bodies import json_response
from minisgl.server.render import error_body
from minisgl.server.render_messages import as_asked

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
IGNORED = "x-minisgl-ignored"  # the fields of the request that were
MAX_IGNORED_CHARS = 1000
MAX_TOLD = 512  # names of ignored fields that the log has
OPEN_PATHS = ("/health", "/health/live")  # no key is asked for: load balancers have none
QUIET_PATHS = (*OPEN_PATHS, "/metrics")  # asked every few seconds: in the log at DEBUG only
_CLIENT_ID = re.compile(r"[!-~]{1,128}")  # what a client's id may be, to be echoed and logged

OnRequest = Callable[[str, str, int], None]


def guarded(app: ASGIApp, access: AccessConfig, on_request: OnRequest | None = None, *, log: bool = True) -> ASGIApp:
    """The application as it meets the world. on_request: told method, route and status of each request that has ended.

    CORS is outside of the keys: browsers ask whether they may send one without sending it.
    """
    routes = [route.path for route in getattr(app, "routes", ())]
    if access.api_keys:
        app = ApiKeys(app, access.api_keys)
    if access.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=access.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, IGNORED],
        )
    return Paths(RequestLog(app, on_request, log=log), routes)


class Paths:
    """Finds routes however they are spelt: with and without /v1, with slashes too many; and HEAD where there is GET."""

    def __init__(self, app: ASGIApp, routes: Iterable[str]) -> None:
        parts = [route.split("/") for route in routes]
        self._app = app
        self._versioned = {part[2] for part in parts if part[1] == "v1" and len(part) > 2}
        self._others = {part[1] for part in parts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path, found, model = scope["path"].partition("/models/")  # whose id may have slashes of its own
            parts = [part for part in [*path.split("/"), found.strip("/")] if part]
            while parts[:1] == ["v1"] and len(parts) > 1 and parts[1] in self._others - self._versioned:
                parts = parts[1:]
            if parts and parts[0] in self._versioned:
                parts = ["v1", *parts]
            method = "GET" if scope["method"] == "HEAD" else scope["method"]  # the server sends no body, then
            path = "/" + "/".join([*parts, model.rstrip("/")] if model.strip("/") else parts)
            scope = {**scope, "method": method, "path": path}
        await self._app(scope, receive, send)


class ApiKeys:
    """Answers 401 to requests without one of the keys, as bearer token or as Anthropic's clients send it."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        known = scope["type"] == "http" and self._known(Headers(scope=scope))
        if known:
            scope.setdefault("state", {})["owner"] = known
        if known or scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        message = (
            "this server asks for an API key (Authorization: Bearer KEY, or x-api-key: KEY); none that it knows came"
        )
        refusal = as_asked(scope, error_body(message, 401, code="invalid_api_key"), 401)
        scope["state"]["refused"] = None, "invalid_api_key"
        await json_response(refusal, 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    def _known(self, headers: Headers) -> str:
        """The digest of the key, or "". It takes the same time whichever it is, and however right a wrong one is."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "").strip()]
        digests = [_digest(key.encode("latin-1")) for key in given if key]
        matches = [one.hex() for one in digests for digest in self._digests if hmac.compare_digest(one, digest)]
        return matches[0] if matches else ""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class RequestLog:
    """Gives each request an id, which its answer has too, and a line in the log when it has ended.

    Routes and we tell each other through `scope["state"]`: `request_id`, and `owner` where there are keys, from here,
    `totals` (a `Totals`) and `reading` (a `Reading`) from them.
    """

    def __init__(self, app: ASGIApp, on_request: OnRequest | None, *, log: bool) -> None:
        self._app = app
        self._on_request = on_request
        self._log = log
        self._told: set[str] = set()  # ignored fields

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _CLIENT_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begin = time.perf_counter()
        status, first_byte = 499, 0.0  # unless an answer begins, the client has gone

        async def send_marked(message: Message) -> None:
            nonlocal status, first_byte
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = headers["request-id"] = request_id  # the second is Anthropic's name for it
                reading = scope["state"].get("reading")
                if reading is not None and reading.ignored:
                    headers[IGNORED] = _listed(reading.ignored)
                    self._tell(reading.ignored)
            elif not first_byte:
                first_byte = time.perf_counter() - begin
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        finally:
            if self._on_request is not None:
                route = getattr(scope.get("route"), "path", "none")  # not the path: anybody may make those up
                self._on_request(scope["method"], route, status)
            if self._log:
                _log_line(scope, status, first_byte, time.perf_counter() - begin)

    def _tell(self, ignored: Mapping[str, Collection[str]]) -> None:
        """Once for each name, so that nobody's requests fill the log or the memory."""
        for name in [name for name in ignored if name not in self._told][: MAX_TOLD - len(self._told)]:
            self._told.add(name)
            close = difflib.get_close_matches(name.rpartition(".")[2], ignored[name], n=1, cutoff=0.8)
            hint = f"; did you mean {close[0]}?" if close else ""
            level = logging.WARNING if close else logging.INFO
            logger.log(level, "requests have a field %s, which has no effect here (told once)%s", name, hint)


def _listed(names: Iterable[str]) -> str:
    """As a header may have it: ASCII, with commas between them only."""
    text = ", ".join(quote(name, safe="[]$@:/+") for name in names)
    return text if len(text) <= MAX_IGNORED_CHARS else text[:MAX_IGNORED_CHARS].rpartition(",")[0] + ", ..."


def _log_line(scope: Scope, status: int, first_byte: float, seconds: float) -> None:
    state = scope["state"]
    totals = state.get("totals")
    usage = totals.usage() if totals is not None else None
    tokens = f", {usage['prompt_tokens']} + {usage['completion_tokens']} tokens" if usage else ""
    param, code = state.get("refused", ("", None))
    why = f", refused for {param or 'the whole'} ({code or 'invalid_value'})" if "refused" in state else ""
    path = scope.get("raw_path") or b""  # still quoted, so that it cannot break the line; without the query
    client = scope["client"][0] if scope.get("client") else "-"
    logger.log(
        logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO,
        "%s %s %s %d in %.3f s, first byte after %.3f s%s%s, id %s",
        client,
        scope["method"],
        path.decode("ascii", "backslashreplace"),
        status,
        seconds,
        first_byte,
        tokens,
        why[:200],
        state["request_id"],
    )
