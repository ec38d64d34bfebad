"""Around all routes: request ids and the access log, CORS, names, origins, keys. Plain ASGI:
events pass untouched. There are HTTP requests only: neither websockets nor a lifespan."""

import asyncio
import difflib
import hmac
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from ipaddress import IPv6Network, ip_address
from itertools import pairwise, takewhile
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minisgl.config.runtime import AccessConfig
from minisgl.errors import RequestError
from minisgl.page.routes import FILES
from minisgl.server.bodies.intake import check_content_type
from minisgl.server.errors import error_response, shown

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
IGNORED = "x-minisgl-ignored"  # the fields of the request that were
MAX_IGNORED_CHARS = 1000
MAX_TOLD = 512  # names of ignored fields that the log has
OPEN_PATHS = ("/health", "/health/live", *FILES)  # no key is asked for: load balancers have none, nor has the page yet
OPERATOR_PATHS = ("/metrics", "/flush_cache", "/server_info", "/trace/live", "/trace/pace")  # of all; and `abort_all`
MAX_WRONG_KEYS = 10  # of one address in a minute; then they are answered late, however many are sent at once:
WRONG_KEY_SECONDS, MAX_WRONG_KEY_SECONDS = 0.1, 30.0  # after one another, and none later than that
MAX_ADDRESSES = 4096  # that wrong keys are counted of
QUIET_PATHS = (*OPEN_PATHS, "/metrics", "/trace/live")  # asked every few seconds: in the log at DEBUG only
ORIGIN = re.compile("^https?://[^/]*", re.IGNORECASE)  # a request may name the whole URL
_CLIENT_ID = re.compile(r"[!-~]{1,128}")  # what a client's id may be, to be echoed and logged

OnRequest = Callable[[str, str, int], None]


def address_of(scope: Scope) -> str:
    """Where a request comes from. Who has an IPv6 address has 2**64 of them: it is their network."""
    host = str((scope.get("client") or ("",))[0]).removeprefix("::ffff:")
    with suppress(ValueError):
        host = str(IPv6Network((host.partition("%")[0], 64), strict=False))
    return host


def is_called(names: Iterable[str], host: str) -> bool:
    """Whether this `Host` of a request is one of the server's names, with any port; addresses, and none at all, are."""
    name = re.sub(r":\d*$", "", host.lower()).rstrip(".")
    try:
        return not name or bool(ip_address(name.strip("[]")))
    except ValueError:
        return any(fnmatchcase(name, one) or (not one and "." not in name) for one in names)


def guarded(app: ASGIApp, access: AccessConfig, on_request: OnRequest | None = None, *, log: bool = True) -> ASGIApp:
    """The application as it meets the world. on_request: told method, route and status of each request that has ended.

    CORS is outside of the keys: browsers ask whether they may send one without sending it.
    """
    routes = [route.path for route in getattr(app, "routes", ())]
    app = Guard(app, access)
    if access.cors_origins:
        methods, headers = ["GET", "POST", "DELETE"], [REQUEST_ID, IGNORED]
        app = CORSMiddleware(app, access.cors_origins, methods, allow_headers=["*"], expose_headers=headers)
    return Paths(RequestLog(app, on_request, log=log), routes)


class Paths:
    """Finds routes however they are spelt: with and without /v1, with slashes too many; and HEAD where there is GET."""

    def __init__(self, app: ASGIApp, routes: Iterable[str]) -> None:
        parts = [route.split("/") for route in routes]
        self._app = app
        self._versioned = {part[2] for part in parts if part[1] == "v1" and len(part) > 2}
        self._others = {part[1] for part in parts} - self._versioned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, found, model = ORIGIN.sub("", scope["path"]).partition("/models/")  # whose id may have slashes
        parts = [part for part in [*path.split("/"), found.strip("/")] if part]
        known = (one == "v1" and after in self._others for one, after in pairwise(parts))
        parts = parts[sum(takewhile(bool, known)) :]
        if parts and parts[0] in self._versioned:
            parts = ["v1", *parts]
        method = "GET" if scope["method"] == "HEAD" else scope["method"]  # the server sends no body, then
        path = "/" + "/".join([*parts, model.rstrip("/")] if model.strip("/") else parts)
        await self._app({**scope, "method": method, "path": path}, receive, send)


class Guard:
    """Refuses what comes by another name than the server's (against DNS rebinding), from a web page of another origin,
    without a key where one is asked for, or without the operator's. Keys come as bearer tokens or as Anthropic's
    clients send them; wrong ones are answered slowly once an address has tried several."""

    def __init__(self, app: ASGIApp, access: AccessConfig) -> None:
        self._app, self._access = app, access
        operators = access.admin_keys or (access.api_keys if len(access.api_keys) == 1 else ())
        keys = (*access.admin_keys, *access.api_keys)
        # With a secret of this process: digests go to other processes, and no key can be found from one of them.
        self._digest = partial(hmac.digest, os.urandom(32), digest="sha256")
        self._keys = {self._digest(key.encode()): key in operators for key in keys}
        self._wrong: dict[str, tuple[int, float]] = {}  # by address: how many keys, and when the next is answered
        self._since = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope, Headers(scope=scope))
        except RequestError as error:
            if error.status == 429:
                error.retry_after = 60
                _, answered = self._wrong.get(address_of(scope), (0, 0.0))
                await asyncio.sleep(min(answered - time.monotonic(), MAX_WRONG_KEY_SECONDS))
            await error_response(scope, error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        path, host, changes = scope["path"], headers.get("host", ""), scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if not is_called(self._access.hosts, host):
            message = f"this server is not known as {shown(host)}; --allowed-hosts says by which names it may be called"
            raise RequestError(message, code="unknown_host", status=403)
        origin, site = headers.get("origin", ""), headers.get("sec-fetch-site", "")  # as browsers tell
        same = site in ("same-origin", "none") if site else origin.partition("://")[2] == host or not origin
        if changes and not same and {"*", origin}.isdisjoint(self._access.cors_origins):
            message = "web pages of other origins may not use this server, unless --cors-origin names theirs"
            raise RequestError(message, code="foreign_origin", status=403)
        owner = scope["state"]["owner"] = self._known(headers, address_of(scope))
        scope["state"]["operator"] = not self._keys or self._keys.get(bytes.fromhex(owner), False)
        if self._access.api_keys and not owner and path not in OPEN_PATHS:
            message = "this server asks for an API key (Authorization: Bearer KEY, or x-api-key: KEY)"
            raise RequestError(f"{message}; none that it knows came", code="invalid_api_key", status=401)
        require_operator(scope["state"], path, path in OPERATOR_PATHS)
        if changes and "content-type" in headers:
            check_content_type(headers["content-type"])

    def _known(self, headers: Headers, address: str) -> str:
        """The digest of the key, or "". It takes the same time whichever it is, and however right a wrong one is.

        Raises: RequestError (429) when the address has tried too many.
        """
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "").strip()]
        digests = [self._digest(key.encode("latin-1")) for key in given if key]
        matches = [one.hex() for one in digests for digest in self._keys if hmac.compare_digest(one, digest)]
        if digests and self._keys and not matches:
            now = time.monotonic()
            if now - self._since > 60 or len(self._wrong) > MAX_ADDRESSES:
                self._wrong, self._since = {}, now
            count, answered = self._wrong.get(address, (0, now))
            self._wrong[address] = count + 1, max(answered, now) + WRONG_KEY_SECONDS
            if count >= MAX_WRONG_KEYS:
                raise RequestError("too many wrong keys; wait a minute", code="invalid_api_key", status=429)
        return matches[0] if matches else ""


def require_operator(state: Mapping[str, Any], what: str, needed: object = True) -> None:
    """Raises: RequestError (401, 403) unless the request came with the operator's key, where there are keys."""
    if needed and not state["operator"]:
        status = 403 if state["owner"] else 401
        raise RequestError(f"{what} needs the operator's key (--admin-key)", code="admin_key_required", status=status)


class RequestLog:
    """Gives each request an id, which its answer has too, and a line in the log when it has ended.

    Routes and we tell each other through `scope["state"]`: `request_id`, `owner` (whose request it is, by API key) and
    `operator` from here, `answer` (a `Renderer`) and `reading` (a `Reading`) from them.
    """

    def __init__(self, app: ASGIApp, on_request: OnRequest | None, *, log: bool) -> None:
        self._app = app
        self._on_request = on_request
        self._log = log
        self._told: set[str] = set()  # ignored fields

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
                    names = ", ".join(quote(name, safe="[]$@:/+") for name in reading.ignored)  # ASCII, one by one
                    is_long = len(names) > MAX_IGNORED_CHARS
                    headers[IGNORED] = names[:MAX_IGNORED_CHARS].rpartition(",")[0] + ", ..." if is_long else names
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


def _log_line(scope: Scope, status: int, first_byte: float, seconds: float) -> None:
    state = scope["state"]
    usage = state["answer"].usage() if "answer" in state else None
    tokens = f", {usage['prompt_tokens']} + {usage['completion_tokens']} tokens" if usage else ""
    _, param, code = state.get("refused", (0, "", None))
    why = f", refused for {param or 'the whole'} ({code or 'invalid_value'})" if "refused" in state else ""
    path = scope.get("raw_path") or b""  # still quoted, so that it cannot break the line; without the query
    client = scope["client"][0] if scope.get("client") else "-"
    values = status, seconds, first_byte, tokens, why[:200], state["request_id"]
    level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
    text = "%s %s %s %d in %.3f s, first byte after %.3f s%s%s, id %s"
    logger.log(level, text, client, scope["method"], path.decode("ascii", "backslashreplace"), *values)
