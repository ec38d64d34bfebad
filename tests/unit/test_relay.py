"""The way through the ingress, byte for byte: servers that play a part behind it, and stock clients in front."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from minisgl.cluster import relay
from minisgl.cluster.relay import Front, Relay
from minisgl.cluster.router import PrefixRouter, Prompt
from minisgl.errors import MiniSGLError, WorkerDied
from minisgl.server.errors import error_response
from minisgl.server.serve import HttpServer

SECONDS = 60  # more than anything takes
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy"
EVENTS = b"".join(b'data: {"number":%d}\n\n' % number for number in range(200))
EVENTS += b'data: {"usage":{"prompt_tokens":7}}\n\ndata: [DONE]\n\n'
Play = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]  # what a server does about a request with such a head


class InTurn(PrefixRouter):
    """Chooses one replica after the other. learned: numbers of tokens that prompts had, as answers have told."""

    def __init__(self) -> None:
        super().__init__()
        self.learned = list[int]()

    def choose(self, prompt: Prompt, excluded: Collection[str] = ()) -> str | None:
        assert prompt.num_bytes >= 0
        return next((name for name in self.loads if name not in excluded), None)

    def calibrate(self, num_bytes: int, num_tokens: int) -> None:
        assert num_bytes >= 0
        self.learned.append(num_tokens)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass(slots=True)
class Way:
    """ingress: what listens, and its url. heads: of the requests that servers have had; connections: that they took."""

    relay: Relay
    fronts: list[Front] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    ingress: HttpServer = field(init=False)
    running: asyncio.Task[None] = field(init=False)
    learned: list[int] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def raw(self, request: bytes) -> bytes:
        """All that comes until the connection is closed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            return await asyncio.wait_for(reader.read(), SECONDS)
        finally:
            writer.close()


@asynccontextmanager
async def way(plays: Sequence[Play], *, max_body: int = 2**20) -> AsyncIterator[Way]:
    """An ingress in front of servers, of which a request tries one after the other."""

    async def serve(play: Play, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        one.connections += 1
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).lower():
                if b"content-length: " in head:
                    await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
                one.heads.append(head)
                await play(head, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await one.relay(scope, receive, send)
        except MiniSGLError as error:
            await error_response(scope, error)(scope, receive, send)

    def connection(*args: object, **kwargs: object) -> Front:
        one.fronts.append(Front(*args, **kwargs, read=SECONDS, write=SECONDS))
        return one.fronts[-1]

    one = Way(Relay(router := InTurn(), max_body), learned=router.learned)
    servers = [await asyncio.start_server(partial(serve, play), "127.0.0.1") for play in plays]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    one.relay.meet({f"{port}": {"url": f"http://127.0.0.1:{port}", "events": ["inproc://nobody"]} for port in ports})
    config = uvicorn.Config(answer, http=connection, ws="none", lifespan="off", log_config=None)
    config.server_header, config.date_header, config.limit_concurrency = False, False, 64
    listener = socket.create_server(("127.0.0.1", 0))
    one.port, listening = listener.getsockname()[1], asyncio.Event()
    one.ingress = HttpServer(config, one.relay, listener, SECONDS, listening.set)
    one.running = asyncio.create_task(one.ingress.serve(sockets=[listener]))
    try:
        await asyncio.wait_for(listening.wait(), SECONDS)
        yield one
    finally:
        one.ingress.should_exit = one.ingress.force_exit = True
        await one.running
        one.relay.meet({})
        await one.relay.session.close()
        for server in servers:
            server.close()


async def streamed(_: bytes, writer: asyncio.StreamWriter) -> None:
    """In chunks that end anywhere, in writes that end anywhere else."""
    await _written(writer, (EVENTS[at : at + 13] for at in range(0, len(EVENTS), 13)), 29)


async def by_events(_: bytes, writer: asyncio.StreamWriter) -> None:
    """One or two in a chunk, as servers have them, and a write for each; at last, writes that end anywhere."""
    events = [event + b"\n\n" for event in EVENTS.split(b"\n\n")[:-1]]
    for at, event in enumerate(events[:100]):
        writer.write((STREAM if at == 0 else b"") + chunk(event))
        await asyncio.sleep(0.001)
    pairs = ([*events[at : at + 2]] for at in range(100, len(events), 2))
    await _written(writer, map(b"".join, pairs), 7, head=b"")


async def _written(writer: asyncio.StreamWriter, chunks: Iterable[bytes], size: int, head: bytes = STREAM) -> None:
    text = head + b"".join(map(chunk, chunks)) + chunk(b"")
    for at in range(0, len(text), size):
        writer.write(text[at : at + size])
        await writer.drain()
        await asyncio.sleep(0)


async def broken(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM + chunk(b"data: 1\n\ndata: 2\n\nda") + chunk(b"ta: thr"))
    await writer.drain()
    await asyncio.sleep(0.05)  # so that both halves are on their way
    writer.close()


async def refuses(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(BUSY)


async def whole(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwhole")


@pytest.mark.parametrize("play", [streamed, by_events])
async def test_events_cut_anywhere_arrive_as_they_were_on_kept_connections(play: Play) -> None:
    async with way([play]) as one, httpx.AsyncClient(base_url=one.url, timeout=SECONDS) as client:
        for _ in range(3):
            answer = await client.post("/v1/completions?a=b%20c", json={"prompt": "x"}, headers={"X-Mine": "yes"})
            assert answer.content == EVENTS
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert one.connections == 1
        assert one.learned == [7] * 3
    assert one.heads[0].startswith(b"post /v1/completions?a=b%20c http/1.1\r\n")
    assert b"\r\nx-mine: yes\r\n" in one.heads[0]
    assert b"\r\nx-forwarded-for: 127.0.0.1\r\n" in one.heads[0]


async def test_an_answer_tells_how_long_the_prompt_was() -> None:
    texts = [b'{"usage":{"prompt_tokens":14,"total_tokens":38}}', b'"usage": {"input_tokens": 9}', b'{"choices": []}']
    left = iter(texts)

    async def plays(_: bytes, writer: asyncio.StreamWriter) -> None:
        text = next(left)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)

    async with way([plays]) as one, httpx.AsyncClient(base_url=one.url, timeout=SECONDS) as client:
        for text in texts:
            assert (await client.post("/v1/completions", json={})).content == text
        assert one.learned == [14, 9, 0]


async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    async with way([streamed]) as one:
        text = await one.raw(b"POST /v1/completions HTTP/1.0\r\ncontent-length: 0\r\n\r\n")
    assert text.partition(b"\r\n\r\n")[2] == EVENTS
    assert b"\r\nhost: " in one.heads[0]


@pytest.mark.parametrize(
    ("path", "end"), [("/v1/completions", b'data: {"error":'), ("/v1/messages", b"event: error\ndata: ")]
)
async def test_a_stream_that_breaks_off_ends_whole(path: str, end: bytes) -> None:
    async with way([broken]) as one, httpx.AsyncClient(base_url=one.url, timeout=SECONDS) as client:
        answer = await client.post(path, json={})
    assert answer.content.startswith(b"data: 1\n\ndata: 2\n\n" + end), answer.content
    assert b"try again" in answer.content
    assert answer.content.endswith(b"}\n\n")
    assert b"thr" not in answer.content
    assert (one.relay.counts["retried"], one.relay.counts["broken"]) == (0, 1)


async def test_an_answer_that_breaks_off_is_begun_once_and_its_connection_ends() -> None:
    has_come = asyncio.Event()

    async def breaks(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
        await asyncio.wait_for(has_come.wait(), SECONDS)
        writer.close()

    async with way([breaks, whole]) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        try:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
            text = await asyncio.wait_for(reader.readuntil(b"{"), SECONDS)
            has_come.set()
            text += await asyncio.wait_for(reader.read(), SECONDS)
        finally:
            writer.close()
        assert text.count(b"HTTP/1.1 ") == 1
        assert text.endswith(b"\r\n\r\n{")
        assert one.connections == 1
        assert one.relay.counts == {"open": 0, "retried": 0, "broken": 1}


async def test_a_request_target_names_no_other_server() -> None:
    others = list[bytes]()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        others.append(b"somebody came")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1") as other, way([whole]) as one:
        place = f"127.0.0.1:{other.sockets[0].getsockname()[1]}"
        for target, path in (
            (f"@{place}/latest", f"/@{place}/latest"),
            (f"x:y@{place}/", f"/x:y@{place}/"),
            (f"//{place}/", f"//{place}/"),
            (f".{place}/", f"/.{place}/"),
            (f"http://{place}/v1/models?a=b", "/v1/models?a=b"),
            (f"HTTPS://{place}", "/"),
            ("*", "/*"),
        ):
            text = await one.raw(f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            assert text.endswith(b"\r\n\r\nwhole"), target
            assert one.heads.pop().startswith(f"get {path} http/1.1\r\n".encode())
        assert not others


async def test_a_server_that_stands_still_is_asked_for_so_long_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_ASK_SECONDS", 0.05)
    ended = asyncio.Event()

    async def stands_still(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        ended.set()

    async with await asyncio.start_server(stands_still, "127.0.0.1") as server, way([]) as one:
        scope = {"method": "GET", "path": "/metrics", "headers": [], "query_string": b""}
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(WorkerDied, match="a replica does not answer"):
            await asyncio.wait_for(one.relay.ask(scope, b"", url), SECONDS)
        await asyncio.wait_for(ended.wait(), SECONDS)


async def test_who_has_answered_nothing_is_asked_no_more() -> None:
    async def dies(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM)  # a head is no answer yet
        writer.close()

    for first in (dies, refuses):
        async with way([first, streamed]) as one, httpx.AsyncClient(base_url=one.url, timeout=SECONDS) as client:
            assert (await client.post("/generate", json={})).content == EVENTS
            assert one.relay.counts["retried"] == 1
    async with way([refuses, refuses]) as one, httpx.AsyncClient(base_url=one.url, timeout=SECONDS) as client:
        answer = await client.post("/generate", json={})
        assert (answer.status_code, answer.content) == (503, b"busy")


async def test_a_slow_client_holds_up_its_server_and_gets_all() -> None:
    event = b"data: " + b"x" * 65_000 + b"\n\n"
    sent = 0

    async def plays(_: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(STREAM)
        for _ in range(1000):  # 65 MB, far more than sockets hold
            writer.write(chunk(event))
            await writer.drain()
            sent += 1
        writer.write(chunk(b""))

    async with way([plays]) as one, httpx.AsyncClient(base_url=one.url, timeout=SECONDS) as client:
        async with client.stream("POST", "/v1/completions", json={}) as answer:
            before = -1
            while before != sent or not any(front.flow.write_paused for front in one.fronts):
                before = sent
                await asyncio.sleep(0.2)
            assert sent < 500
            size = 0
            async for part in answer.aiter_raw():
                size += len(part)
        assert size == 1000 * len(event)
        assert one.relay.counts["open"] == 0


async def test_a_client_that_leaves_ends_what_it_asked_for() -> None:
    ended = asyncio.Event()

    async def plays(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM)
        try:
            while not writer.is_closing():
                writer.write(chunk(b"data: 1\n\n"))
                await writer.drain()
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    async with way([plays]) as one, httpx.AsyncClient(base_url=one.url, timeout=SECONDS) as client:
        async with client.stream("POST", "/v1/completions", json={}) as answer:
            assert await anext(answer.aiter_raw())
        await asyncio.wait_for(ended.wait(), SECONDS)
        while one.relay.counts["open"]:
            await asyncio.sleep(0.01)


async def test_answers_without_a_body_and_long_ones() -> None:
    async def plays(head: bytes, writer: asyncio.StreamWriter) -> None:
        size = b"" if head.startswith(b"head") else b"y" * 3_000_000
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\nX-Request-Id: r\r\n\r\n" + size)

    async with way([plays]) as one, httpx.AsyncClient(base_url=one.url, timeout=SECONDS) as client:
        for method in ("HEAD", "GET", "HEAD"):
            answer = await client.request(method, "/v1/models")
            assert len(answer.content) == (3_000_000 if method == "GET" else 0)
            assert answer.headers["content-length"] == "3000000"
        assert one.connections == 1


async def test_a_body_is_given_up_when_its_answer_begins() -> None:
    has_come = asyncio.Event()
    size = 16 * 2**20

    async def plays(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(b"data: 1\n\n"))
        await asyncio.wait_for(has_come.wait(), SECONDS)
        writer.write(chunk(b"data: [DONE]\n\n") + chunk(b""))

    async with way([plays], max_body=2 * size) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        tracemalloc.start()
        try:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size)
            for _ in range(16):
                writer.write(bytes(size // 16))
                await writer.drain()
            await asyncio.wait_for(reader.readuntil(b"data: 1\n\n"), SECONDS)
            assert tracemalloc.get_traced_memory()[1] > size, "it was there"
            assert tracemalloc.get_traced_memory()[0] < size // 4
            has_come.set()
            await asyncio.wait_for(reader.readuntil(b"[DONE]"), SECONDS)
        finally:
            tracemalloc.stop()
            writer.close()


async def test_a_node_that_says_nothing_more_is_noticed() -> None:
    """The kernel asks it, now and then, as long as it owes an answer."""
    timers = list[str]()

    async def plays(_: bytes, writer: asyncio.StreamWriter) -> None:
        port = f":{writer.get_extra_info('sockname')[1]:04X}"
        with open("/proc/net/tcp") as table:
            timers.extend(row.split()[5] for row in table if row.split()[2].endswith(port))
        await whole(_, writer)

    async with way([plays]) as one, httpx.AsyncClient(base_url=one.url, timeout=SECONDS) as client:
        assert (await client.post("/v1/completions", json={})).content == b"whole"
    kinds = {kind: int(ticks, 16) / os.sysconf("SC_CLK_TCK") for kind, ticks in (one.split(":") for one in timers)}
    assert 0 < kinds["02"] <= 10, "a timer of the kind that keeps alive, and its seconds"


async def test_draining_tells_before_it_closes() -> None:
    """What was asked is answered; an answer on a connection that stays open otherwise says that it is the last one."""
    has_come = asyncio.Event()

    async def plays(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(b"data: 1\n\n"))
        await asyncio.wait_for(has_come.wait(), SECONDS)
        writer.write(chunk(b"data: [DONE]\n\n") + chunk(b""))

    post = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    async with way([whole, plays]) as one, AsyncExitStack() as stack:
        connections = [await asyncio.open_connection("127.0.0.1", one.port) for _ in range(3)]
        for _, writer in connections:
            stack.callback(writer.close)
        (idle, ask), (busy, ask_long), (new, ask_late) = connections
        ask.write(post)
        assert b"connection: close" not in await asyncio.wait_for(idle.readuntil(b"whole"), SECONDS)
        one.relay.router.set_replicas(list(one.relay.ready)[1:])
        ask_long.write(post)
        await asyncio.wait_for(busy.readuntil(b"data: 1\n\n"), SECONDS)
        one.ingress.on_signal()
        await asyncio.sleep(0.05)
        for reader, writer in ((idle, ask), (new, ask_late)):
            writer.write(post)
            text = await asyncio.wait_for(reader.read(), SECONDS)
            assert text.startswith(b"HTTP/1.1 503 "), text
            assert b"\r\nconnection: close\r\n" in text.lower(), text
            assert b"draining" in text
        has_come.set()
        assert b"[DONE]" in await asyncio.wait_for(busy.read(), SECONDS)
        await asyncio.wait_for(one.running, SECONDS)
    assert one.relay.counts == {"open": 0, "retried": 0, "broken": 0}


async def test_answers_that_outlast_the_drain_timeout_end_whole() -> None:
    """Those that have begun with an event, the others with a status."""

    async def plays(_: bytes, writer: asyncio.StreamWriter) -> None:
        if len(one.heads) == 1:
            writer.write(STREAM + chunk(b"data: 1\n\nda"))
        await asyncio.sleep(SECONDS)

    async with way([plays]) as one, httpx.AsyncClient(base_url=one.url, timeout=SECONDS) as client:
        async with client.stream("POST", "/v1/completions", json={}) as answer:
            parts = answer.aiter_raw()
            text = await anext(parts)
            other = asyncio.create_task(client.post("/v1/completions", json={}))
            while len(one.heads) < 2:
                await asyncio.sleep(0.001)
            one.ingress.drain_timeout = 0.05
            one.ingress.on_signal()
            async for part in parts:
                text += part
        assert text.startswith(b'data: 1\n\ndata: {"error":'), text
        assert text.endswith(b"}\n\n")
        assert (await other).status_code == 503


def test_full_collections_walk_over_nothing_that_was_imported() -> None:
    """By the objects that a collection looks at once the server listens: a tenth of those there were, at most."""

    async def run() -> int:
        async with way([streamed]):
            return len(gc.get_objects())

    before = len(gc.get_objects())
    try:
        assert asyncio.run(run()) < before / 10
    finally:
        gc.unfreeze()


def test_connections_leave_descriptors_for_replicas() -> None:
    """With a limit of 256, all connections that are let in, and as many to replicas, find one."""
    code = "import resource, os; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); "
    code += "from minisgl.server.serve import max_connections; print(max_connections(2), len(os.listdir('/dev/fd')))"
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=path)
    limit, used = map(int, ended.stdout.split())
    assert limit > 50
    assert 2 * limit + used + 24 <= 256
