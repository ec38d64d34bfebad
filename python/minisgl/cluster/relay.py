"""From a client to a replica's own server and back, byte for byte; to another one, once, while nothing was sent."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
from multidict import CIMultiDict
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from yarl import URL

from minisgl.cluster.prompts import read_request
from minisgl.cluster.router import Prompt
from minisgl.errors import WorkerDied
from minisgl.server.access import ORIGIN
from minisgl.server.admission import Connection
from minisgl.server.answers.renderer import event
from minisgl.server.errors import ANTHROPIC_PATHS, anthropic_error, error_payload

logger = logging.getLogger(__name__)

# Of one connection, or told by us.
_HOP = (b"connection", b"keep-alive", b"transfer-encoding", b"expect", b"x-forwarded-for", b"x-forwarded-proto")
_NOT_OURS = ("user-agent", "accept", "accept-encoding", "content-type")  # unless the client sends them
_TAIL = 4096  # bytes at the end of an answer in which token counts are looked for
_CONNECT_SECONDS = 5.0
_ASK_SECONDS = 15.0  # for a whole answer to the ingress itself; a server gives its scheduler 10
_FRONT = "minisgl.front"  # in a scope: the `Front` that it came by
_ENDED = "the replica that was answering has ended; try again"


class Front(Connection):
    """A client's connection; applications find it in their scope."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        app: ASGIApp = self.app
        self.app = lambda scope, receive, send: app({**scope, _FRONT: self}, receive, send)

    async def send_chunk(self, part: bytes) -> None:
        """A part of an answer in chunks whose head has gone out; ASGI's way takes twice as long."""
        if self.flow.write_paused:
            await self.flow.drain()
        if part and not self.transport.is_closing():
            self.transport.write(b"%x\r\n%b\r\n" % (len(part), part))


@dataclass(slots=True)
class Chosen:
    """The replica that a request goes to. begun: to be called when its answer begins."""

    name: str
    url: str
    begun: Callable[[], None]
    learn: Callable[[bytes, list[tuple[bytes, bytes]]], None]  # from the end of an answer, and its headers


Answer = aiohttp.ClientResponse
Pick = Callable[[Prompt, list[str]], AbstractAsyncContextManager[Chosen]]


class Relay:
    """The ASGI application in front of all replicas. pick: chooses one that is none of those named, and waits for it;
    raises WorkerDied when there is none. max_body: bytes that are read of a body. session: with servers."""

    def __init__(self, pick: Pick, max_body: int) -> None:
        self._pick, self._max_body = pick, max_body
        made = partial(aiohttp.ClientSession, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)
        self.session = made(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30))
        self.counts = {"open": 0, "retried": 0, "broken": 0}  # requests; those that broke off

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.counts["open"] += 1
        try:
            body = await read_body(receive, self._max_body)
            if body is not None:
                await _while_connected(receive, self._relay(scope, body, send))
        finally:
            self.counts["open"] -= 1

    async def ask(self, scope: Scope, body: bytes, url: str) -> Response:
        """One replica's answer. Raises: WorkerDied when it gives none."""
        try:
            async with self._request(scope, body, url, _ASK_SECONDS) as answer:
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in _passed(answer)}
                return Response(await answer.read(), answer.status, headers)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise WorkerDied(f"a replica does not answer ({type(error).__name__}); try again") from None

    async def _relay(self, scope: Scope, body: bytes, send: Send) -> None:
        prompt, tried = read_request(scope["path"], Headers(scope=scope), body), list[str]()
        while True:
            async with self._pick(prompt, tried) as chosen:
                tried.append(chosen.name)
                if await self._attempt(scope, body, send, chosen, is_last=len(tried) > 1):
                    return
            self.counts["retried"] += 1
            logger.warning("%s gave no answer: the request goes to another replica", chosen.name)

    async def _attempt(self, scope: Scope, body: bytes, send: Send, chosen: Chosen, *, is_last: bool) -> bool:
        """Whether the client has had an answer, if only a part. Raises: WorkerDied when the last try fails."""
        try:
            async with self._request(scope, body, chosen.url) as answer:
                first = await answer.content.readany()  # a head alone is no answer yet
                if answer.status == 503 and not is_last:
                    return False  # it drains, or has lost its workers: whatever it was, nothing was computed
                chosen.begun()
                await self._pass_on(scope, answer, first, send, chosen)
                return True
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            if is_last:
                raise WorkerDied(f"no replica could answer ({type(error).__name__}); try again") from None
            return False

    async def _pass_on(self, scope: Scope, answer: Answer, first: bytes, send: Send, chosen: Chosen) -> None:
        headers = _passed(answer)
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        is_stream, part, tail, left = answer.content_type == "text/event-stream", first, b"", b""
        front: Front | None = scope.get(_FRONT) if is_stream and scope["http_version"] == "1.1" else None
        try:
            while part:
                if is_stream:  # events go on whole, or not at all
                    end = (part := left + part).rfind(b"\n\n") + 2
                    part, left = (part[:end], part[end:]) if end > 1 else (b"", part)
                tail = (tail + part)[-_TAIL:]
                if front is not None:
                    await front.send_chunk(part)
                else:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                part = await answer.content.readany()
        except (aiohttp.ClientError, OSError):
            self.counts["broken"] += 1
            if not is_stream:
                return  # without an end: the connection is closed, and the client sees that the answer is not whole
            left = _failure(scope["path"])
        else:
            chosen.learn(tail, headers)
        await send({"type": "http.response.body", "body": left, "more_body": False})

    @contextlib.asynccontextmanager
    async def _request(self, scope: Scope, body: bytes, url: str, seconds: float = 0.0) -> AsyncIterator[Answer]:
        headers = CIMultiDict[str]()
        for name, value in scope["headers"]:
            if name not in _HOP and name != b"content-length":
                headers.add(name.decode("latin-1"), value.decode("latin-1"))
        if scope.get("client"):
            headers["x-forwarded-for"] = scope["client"][0]
        query = scope["query_string"].decode("latin-1")
        path = from_root((scope.get("raw_path") or scope["path"].encode()).decode("latin-1"))
        target = URL(url + path + (f"?{query}" if query else ""), encoded=True)
        timeout = aiohttp.ClientTimeout(total=seconds or None, sock_connect=_CONNECT_SECONDS)
        request = partial(self.session.request, scope["method"], target, headers=headers, allow_redirects=False)
        data = body if body or scope["method"] in ("POST", "PUT", "PATCH") else None
        async with request(data=data, timeout=timeout, skip_auto_headers=_NOT_OURS) as answer:
            yield answer


def from_root(target: str) -> str:
    """The path that a request names, whatever it looks like: behind a replica's address it is never a part of that."""
    return "/" + ORIGIN.sub("", target).removeprefix("/")


def _passed(answer: Answer) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value) for name, value in answer.raw_headers if name.lower() not in _HOP]


async def read_body(receive: Receive, limit: int = 2**20) -> bytes | None:
    """The body, or as much of it as shows that it is too long; None when the client has gone."""
    body = bytearray()
    while len(body) <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return bytes(body[: limit + 1])


async def _while_connected(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Do it until it is done, or the client is gone."""
    work, watcher = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([work, watcher], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        for task in (work, watcher):
            task.cancel()
        await asyncio.gather(work, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _failure(path: str) -> bytes:
    """The event at the end of a stream that breaks off, as the dialect has it."""
    payload = error_payload(error := WorkerDied(_ENDED))
    if ANTHROPIC_PATHS.match(path):
        payload = anthropic_error(payload, error.status)
    elif path.startswith("/v1/responses"):
        payload = {"type": "error", "code": "server_error", "message": str(error), "param": None}
    return event(payload)
