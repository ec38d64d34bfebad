"""From a client to a replica's own server and back, byte for byte; to another one, once, while nothing was sent."""

import asyncio
import contextlib
import io
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast
from weakref import WeakSet

import aiohttp
import anyio
import msgspec
import zmq
from multidict import CIMultiDict
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from yarl import URL

from minisgl.cluster.router import RUNNING_TOKENS, PrefixRouter, Prompt, text_blocks
from minisgl.errors import MiniSGLError, WorkerDied
from minisgl.scheduler.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch
from minisgl.server.access import ORIGIN
from minisgl.server.admission import Connection
from minisgl.server.answers.renderer import event
from minisgl.server.errors import ANTHROPIC_PATHS, anthropic_error, error_payload

logger = logging.getLogger(__name__)

# Of one connection, or told by us.
_HOP = (b"connection", b"keep-alive", b"transfer-encoding", b"expect", b"x-forwarded-for", b"x-forwarded-proto")
_NOT_OURS = ("user-agent", "accept", "accept-encoding", "content-type")  # unless the client sends them
# What comes before a prompt's end, in this order, in one dialect or another.
_FIELDS = ("tools", "system", "instructions", "messages", "input", "prompt", "text", "input_ids", "query", "documents")
_NAMES = ("cache_salt", "prompt_cache_key", "previous_response_id")
_RAW = [(name, msgspec.Raw, msgspec.Raw()) for name in _FIELDS]
_Fields = msgspec.defstruct("_Fields", [*_RAW, *((name, str | None, None) for name in _NAMES)])
_decode = msgspec.json.Decoder(_Fields).decode  # passes over all else, and over what prompts are made of
_MAX_NAME = 1024  # characters of a session's
_KEPT = re.compile(r"/(?:v1/responses|trace)/([^/]+)")  # by one replica, which alone can answer
_STORED = re.compile(rb'"id": ?"(resp_[0-9a-zA-Z]+)"')
_TOKENS = re.compile(rb'"(?:prompt|input)_tokens": ?(\d+)')
_CHUNK = re.compile(rb"([0-9a-f]+)\r\n(?=data:|event:|:)")  # of events: what comes behind is no chunk's head
_END = b"\n\n\r\n"  # of an event, and of the chunk; events have no CR
_LONG = 2**18  # bytes of a body that is sent in pieces
_TAIL = 4096  # bytes at the end of an answer in which token counts are looked for
_CONNECT_SECONDS = 5.0
_ASK_SECONDS = 15.0  # for a whole answer to the ingress itself; a server gives its scheduler 10
_WAIT_SECONDS = 60.0  # for a replica, where there is none
_PATIENCE_SECONDS = 1.0  # for another replica than the one that gave no answer
_SHUN_SECONDS = 5.0  # after a replica has given no answer; by then Ray knows, if it has ended
_LOOK_SECONDS = 0.1  # between two looks at what replicas publish, or for one: each event by itself would wake us up
_LOST = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # when a node that says nothing is taken for gone
_FRONT = "minisgl.front"  # in a scope: the `Front` that it came by
Told = Mapping[str, dict[str, Any]]  # by a replica's name, what it tells of itself (`Replica.record_replica_metadata`)
Answer = aiohttp.ClientResponse
_FAILURES = (aiohttp.ClientError, OSError, asyncio.TimeoutError)  # of a replica, to answer


class Front(Connection):
    """A client's connection; applications find it in their scope."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        app: ASGIApp = self.app
        self.app = lambda scope, receive, send: app({**scope, _FRONT: self}, receive, send)


class _Passing(asyncio.Protocol):
    """In aiohttp's place while only whole events come: they go on in the chunks that they are in, at half the cost."""

    def __init__(self, front: Front, connection: aiohttp.connector.Connection, tail: bytes) -> None:
        self._transport = cast(asyncio.Transport, connection.transport)
        self._aiohttp, self._front = cast(asyncio.Protocol, connection.protocol), front
        self._tail, self._has_ended = tail, asyncio.Event()

    async def run(self) -> bytes:
        """Until something else comes, which aiohttp gets, or the client is slow. Returns the end of what went on."""
        self._transport.set_protocol(self)
        try:
            await self._has_ended.wait()
        finally:
            self._transport.set_protocol(self._aiohttp)
        return self._tail

    def data_received(self, data: bytes) -> None:
        found = _CHUNK.match(data) if data.endswith(_END) else None
        is_whole = found is not None and data.startswith(_END[2:], found.end() + int(found[1], 16))
        if is_whole and not self._front.transport.is_closing():
            self._front.transport.write(data)
            self._tail = (self._tail + data)[-_TAIL:]
        if not is_whole or self._front.flow.write_paused:
            self._transport.set_protocol(self._aiohttp)
            self._has_ended.set()
        if not is_whole:
            self._aiohttp.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._aiohttp.connection_lost(exc)
        self._has_ended.set()


class Relay:
    """Answers requests with a replica's answers. max_body: bytes that are read of a body. session: with servers;
    counts: requests that are open, that went to a second replica, whose answers broke off; ready: the replicas; here:
    that of this process."""

    here: ClassVar["Relay"]

    def __init__(self, router: PrefixRouter, max_body: int) -> None:
        self.router, self._max_body = router, max_body
        self._sockets = WeakSet[socket.socket]()
        tcp = aiohttp.TCPConnector(limit=0, keepalive_timeout=30, socket_factory=self._socket)
        self.session = aiohttp.ClientSession(connector=tcp, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)
        self.counts = {"open": 0, "retried": 0, "broken": 0}
        self.ready: Told = {}
        self.refusal: MiniSGLError | None = None
        self._shunned: dict[str, float] = {}  # replicas, and until when
        self._hearing: dict[str, asyncio.Task[None]] = {}

    @property
    def num_in_flight(self) -> int:
        return self.counts["open"]

    def refuse(self, error: MiniSGLError) -> None:
        """From now on no POST goes to a replica; those that have gone there go on."""
        self.refusal = self.refusal or error

    def fail(self, error: MiniSGLError) -> None:
        """End all answers that have not ended by themselves."""
        self.refuse(error)
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def meet(self, told: Told) -> None:
        """These are the replicas from now on."""
        self.router.set_replicas(told)
        for gone in self.ready.keys() - told.keys():
            self._hearing.pop(gone).cancel()
            self._shunned.pop(gone, None)
        for name in told.keys() - self.ready.keys():
            self._hearing[name] = asyncio.ensure_future(self._hear(name, told[name]["events"][0]))
        self.ready = dict(told)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises: WorkerDied when no replica answers."""
        self.counts["open"] += 1
        try:
            async with contextlib.AsyncExitStack() as stack:
                name, prompt, answer, first = await self._begun(scope, receive, stack)
                if (place := scope.get("state", {}).get("place")) is not None:
                    place.begin()  # nobody has the body any more
                headers = _passed(answer)
                await send({"type": "http.response.start", "status": answer.status, "headers": headers})
                tail = await self._pass_on(scope, answer, first, send)
                self._learn(name, prompt, tail, headers)
        except ClientDisconnect:
            pass  # before it had asked for anything
        finally:
            self.counts["open"] -= 1

    async def ask(self, scope: Scope, body: bytes, url: str) -> Response:
        """One replica's answer. Raises: WorkerDied when it gives none."""
        try:
            async with self._request(scope, body, url, _ASK_SECONDS) as answer:
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in _passed(answer)}
                return Response(await answer.read(), answer.status, headers)
        except _FAILURES as error:
            raise WorkerDied(f"a replica does not answer ({type(error).__name__}); try again") from None

    async def _begun(
        self, scope: Scope, receive: Receive, stack: contextlib.AsyncExitStack
    ) -> tuple[str, Prompt, Answer, bytes]:
        """The replica that answers, what it was asked, its answer until the stack ends, and the beginning of that.
        Raises: WorkerDied, ClientDisconnect."""
        body = await read_body(scope, receive, self._max_body) if scope["method"] == "POST" else b""
        await stack.enter_async_context(_while_connected(receive))
        prompt, tried = read_request(scope["path"], Headers(scope=scope), body), list[str]()
        while True:
            async with contextlib.AsyncExitStack() as attempt:
                name = await self.replica(scope["method"], prompt, tried)
                hold = self.router.place(name, prompt)
                attempt.callback(hold, 0.0)
                try:
                    answer = await attempt.enter_async_context(self._request(scope, body, self.ready[name]["url"]))
                    first = await answer.content.readany()  # a head alone is no answer yet
                    if answer.status != 503 or tried:  # it drains, or has lost its workers: nothing was computed
                        hold(RUNNING_TOKENS)
                        stack.push_async_exit(attempt.pop_all())
                        return name, prompt, answer, first
                except _FAILURES as error:
                    if tried:
                        raise WorkerDied(f"no replica could answer ({type(error).__name__}); try again") from None
            tried.append(name)
            self._shunned[name] = time.monotonic() + _SHUN_SECONDS
            self.counts["retried"] += 1
            logger.warning("%s gave no answer: the request goes to another replica", name)

    async def replica(self, method: str, prompt: Prompt, tried: Sequence[str]) -> str:
        """The one to ask now, which is none that was tried. Raises: WorkerDied when there is none for long."""
        begin = time.monotonic()
        while (now := time.monotonic()) < begin + _WAIT_SECONDS:
            if self.refusal is not None and method == "POST":
                raise self.refusal
            keeper = self.router.sessions.get(prompt.keeper, prompt.keeper)
            if keeper in self.ready and keeper not in tried:  # shunned or not: nobody else has it
                return keeper
            excluded = {*tried, *(name for name, until in self._shunned.items() if until > now)}
            name = self.router.choose(prompt, excluded)
            if name is None and now > begin + _PATIENCE_SECONDS:
                name = self.router.choose(prompt)
            if name is not None:
                return name
            await asyncio.sleep(_LOOK_SECONDS)
        raise WorkerDied("no replica is ready; try again")

    async def _pass_on(self, scope: Scope, answer: Answer, part: bytes, send: Send) -> bytes:
        """Returns the end of the answer; of one that breaks off, nothing."""
        is_stream, tail, left = answer.content_type == "text/event-stream", b"", b""
        front: Front | None = scope.get(_FRONT) if is_stream and scope["http_version"] == "1.1" else None
        try:
            while part:
                if is_stream:  # events go on whole, or not at all
                    end = (part := left + part).rfind(b"\n\n") + 2
                    part, left = (part[:end], part[end:]) if end > 1 else (b"", part)
                tail = (tail + part)[-_TAIL:]
                await send({"type": "http.response.body", "body": part, "more_body": True})
                part = answer.content.read_nowait()
                if front is not None and answer.connection is not None and not part and not left:
                    tail = await _Passing(front, answer.connection, tail).run()
                part = part or await answer.content.readany()
        except _FAILURES:
            self.counts["broken"] += 1
            if not is_stream:
                return b""  # without an end: the connection is closed, and the client sees that it is not whole
            left, tail = _failure(scope["path"]), b""
        await send({"type": "http.response.body", "body": left, "more_body": False})
        return tail

    def _request(
        self, scope: Scope, body: bytes, url: str, seconds: float | None = None
    ) -> contextlib.AbstractAsyncContextManager[Answer]:
        headers = CIMultiDict[str]()
        for name, value in scope["headers"]:
            if name not in _HOP and name != b"content-length":
                headers.add(name.decode("latin-1"), value.decode("latin-1"))
        if scope.get("client"):
            headers["x-forwarded-for"] = scope["client"][0]
        query = scope["query_string"].decode("latin-1")
        # Whatever the target looks like, behind a replica's address it is never a part of that.
        path = ORIGIN.sub("", (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")).removeprefix("/")
        target = URL(f"{url}/{path}" + (f"?{query}" if query else ""), encoded=True)
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=_CONNECT_SECONDS)
        request = partial(self.session.request, scope["method"], target, headers=headers, allow_redirects=False)
        data = io.BytesIO(body) if len(body) > _LONG else body or None  # in pieces, or at once
        return request(data=data, timeout=timeout, skip_auto_headers=_NOT_OURS)

    def _socket(self, address: tuple[Any, ...]) -> socket.socket:
        """To a replica's node, which may be gone without a word."""
        self._sockets.add(made := socket.socket(*address[:3]))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _LOST.items():
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return made

    def _learn(self, name: str, prompt: Prompt, tail: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """From an answer: how long tokens are, and who will be asked for it again."""
        kept = [value.decode("latin-1") for key, value in headers if key == b"x-request-id"]
        self.router.calibrate(prompt.num_bytes, int((_TOKENS.findall(tail) or [0])[-1]))
        for key in (*kept, *(found.decode() for found in _STORED.findall(tail))):
            self.router.learn(name, Prompt((), 0, key))

    async def _hear(self, name: str, endpoint: str) -> None:
        """What a replica evicts."""
        with zmq.Context[zmq.Socket[bytes]].instance().socket(zmq.SUB) as events:
            events.setsockopt(zmq.SUBSCRIBE, b"")
            events.connect(endpoint)
            expected, size = 0, 1
            while True:
                while not events.poll(0):
                    await asyncio.sleep(_LOOK_SECONDS)
                _, counted, data = events.recv_multipart()
                batch, number = decode_batch(data), int.from_bytes(counted, "big")
                if expected and number != expected:  # some are lost, or its scheduler has begun anew
                    self.router.forget(name)
                for one in batch.events:
                    if isinstance(one, BlockRemoved):
                        self.router.forget(name, len(one.block_hashes) * size)
                    elif isinstance(one, BlockStored):
                        size = one.block_size
                    elif isinstance(one, AllBlocksCleared) and number:
                        self.router.forget(name)
                expected = number + 1


def read_request(path: str, headers: Headers, body: bytes) -> Prompt:
    """Whatever the body is: what makes no sense has no text, and the server says so. x-replica: who is to be asked."""
    if (found := _KEPT.match(path)) is not None or "x-replica" in headers:
        return Prompt((), 0, keeper=headers.get("x-replica") or (found[1] if found else ""))
    try:
        fields = msgspec.structs.asdict(_decode(body))
    except (msgspec.DecodeError, RecursionError):
        fields = msgspec.structs.asdict(_Fields())
    # As JSON without its last bracket or quote: a longer list or text begins with that of a shorter one.
    text = b"".join(memoryview(fields[name])[:-1] for name in _FIELDS)
    salt = f"{headers.get('authorization')} {headers.get('x-api-key')} {fields['cache_salt']}"
    names = (headers.get("x-session-id") or fields["prompt_cache_key"] or "", fields["previous_response_id"] or "")
    return Prompt(text_blocks(text, salt), len(text), *(name if len(name) <= _MAX_NAME else "" for name in names))


def _passed(answer: Answer) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value) for name, value in answer.raw_headers if name.lower() not in _HOP]


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body, or as much of it as shows that it is too long. Raises: ClientDisconnect."""
    body = bytearray()
    async for part in Request(scope, receive).stream():
        body += part
        if len(body) > limit:
            break
    return bytes(body[: limit + 1])


@contextlib.asynccontextmanager
async def _while_connected(receive: Receive) -> AsyncIterator[None]:
    """The block is done until it is done, or the client is gone."""
    with anyio.CancelScope() as scope:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            scope.cancel()

        watcher = asyncio.ensure_future(watch())
        try:
            yield
        finally:
            watcher.cancel()


def _failure(path: str) -> bytes:
    """The event at the end of a stream that breaks off, as the dialect has it."""
    payload = error_payload(error := WorkerDied("the replica that was answering has ended; try again"))
    if ANTHROPIC_PATHS.match(path):
        payload = anthropic_error(payload, error.status)
    elif path.startswith("/v1/responses"):
        payload = {"type": "error", "code": "server_error", "message": str(error), "param": None}
    return event(payload)
