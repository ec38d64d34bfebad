"""What no HTTP client would send, or only by mistake: each gets an answer or a closed connection, none of it is a fault
of ours, and the server goes on."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from tests.faults.conftest import Server, fake

JSON = b'{"prompt": "a", "max_tokens": 1}'
HOST = b"Host: x\r\n"
HEAD = HOST + b"Content-Type: application/json\r\n"
CHAT = b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "stream": true}'
QUIET = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def get(path: bytes = b"/health", headers: bytes = HOST, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return b"%s %s HTTP/%s\r\n%s\r\n" % (method, path, version, headers)


def post(headers: bytes = b"", body: bytes = JSON, line: bytes = b"POST /v1/completions HTTP/1.1") -> bytes:
    return b"%s\r\n%s%sContent-Length: %d\r\n\r\n%s" % (line, HEAD, headers, len(body), body)


def chunked(body: bytes, encoding: bytes = b"chunked", headers: bytes = b"") -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\n%s%sTransfer-Encoding: %s\r\n\r\n%s"
    return head % (HEAD, headers, encoding, body)


def chunk(data: bytes = JSON, size: bytes = b"") -> bytes:
    return b"%s\r\n%s\r\n" % (size or b"%x" % len(data), data)


END = b"0\r\n\r\n"
UPGRADE = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
HEADERS = (
    *(b"X-Request-Id", b"Authorization", b"Accept", b"Cookie", b"Origin", b"X-Forwarded-For", b"Content-Encoding"),
    *(b"Content-Type", b"Connection", b"X-Forwarded-Proto", b"Range", b"TE", b"Expect", b"Date", b"X-Api-Key"),
)
VALUES = (b"\xff\xfe", b"", b"\x1b[2J", b"a" * 50_000, b", ,, ;=;\x80", b"100-continue", b'"\\"', b"nan")
REQUESTS: dict[str, bytes] = {
    "HTTP/1.0": post(line=b"POST /v1/completions HTTP/1.0"),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/3.7": get(version=b"3.7"),
    "h2c": get(headers=HOST + b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAM\r\n"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
    "all bytes": bytes(range(256)) * 10,
    "zeros": bytes(1000),
    "empty lines": b"\r\n" * 10,
    "absolute": post(line=b"POST http://x/v1/completions HTTP/1.1"),
    "absolute, odd": post(line=b"POST http://[::1:99999/v1/completions HTTP/1.1"),
    "authority": get(b"x:443", method=b"CONNECT"),
    "asterisk": get(b"*", method=b"OPTIONS"),
    "no host": get(headers=b""),
    "two hosts": get(headers=HOST * 2),
    "odd host": get(headers=b"Host: \xff\xfe\r\n"),
    "host and port": get(headers=b"Host: x:99999999999999999999\r\n"),
    "half an address": get(headers=b"Host: [::1\r\n"),
    "5,000 headers": get(headers=HOST + b"".join(b"x-%d: y\r\n" % i for i in range(5000))),
    "a million bytes of header": get(headers=HOST + b"x: " + b"y" * 10**6 + b"\r\n"),
    "long path": get(b"/" + b"a" * 60_000),
    "v1 again and again": get(b"/v1" * 20_000),
    "slashes": get(b"/" * 60_000),
    "odd path": get(b"/\xff\xfe"),
    "quoted path": get(b"/%ff%00%0a%0d%2e%2e/%zz%f"),
    "space in a path": get(b"/a b"),
    "query": get(b"/v1/responses/x/input_items?limit=%ff&order=%00&&=&limit=%zz"),
    "fragment": get(b"/health#x;y?z"),
    "two lengths": post(b"Content-Length: %d\r\n" % len(JSON)),
    "two lengths that differ": post(b"Content-Length: 5\r\n"),
    "length and chunks": chunked(chunk() + END, headers=b"Content-Length: 3\r\n"),
    "chunks": chunked(chunk() + END),
    "many chunks": chunked(b"".join(chunk(b"%c" % byte) for byte in JSON) + END),
    "extension": chunked(chunk(size=b"20;" + b"x" * 10**5) + END),
    "trailers": chunked(chunk() + b"0\r\nX: y\r\nContent-Length: 5\r\n\r\n"),
    "trailers without end": chunked(chunk() + b"0\r\n" + b"x: y\r\n" * 50_000 + b"\r\n"),
    "a broken header": get(headers=HOST + b"X: a\rb\r\n"),
    "zero in a header": get(headers=HOST + b"X: a\0b\r\n"),
    "a folded header": get(headers=HOST + b"X: a\r\n b\r\n"),
    "no colon": get(headers=HOST + b"nocolon\r\n"),
    "no name": get(headers=HOST + b": a\r\n"),
    "space behind a name": get(headers=HOST + b"X : a\r\n"),
    "no carriage return": get().replace(b"\r", b""),
    "websocket": get(b"/v1/completions", HOST + UPGRADE + b"dGhlIHNhbXBsZSBub25jZQ==\r\n"),
    "odd websocket": get(headers=HOST + UPGRADE + b"\xff\r\n"),
    "preflight": get(headers=HOST + b"Origin: \xff\r\nAccess-Control-Request-Method: \xff\r\n", method=b"OPTIONS"),
    "body of GET": get(headers=HOST + b"Content-Length: 5\r\n") + b"hello",
    **{f"method {m!r:.20}": get(b"/v1/completions", method=m) for m in (b"BREW", b"get", b"G\0T", b"(", b"A" * 5000)},
    **{
        f"length {length!r:.20}": b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: %s\r\n\r\n" % (HEAD, length)
        + JSON
        for length in (b"-1", b"+5", b"0x10", b"\xb2", b"1" * 5000, b"9" * 19, b"", b"1 1", b"18446744073709551616")
    },
    **{
        f"encoding {encoding!r}": chunked(chunk() + END, encoding)
        for encoding in (b"gzip, chunked", b"identity", b"CHUNKED", b"chunked, chunked", b"xchunked", b"chunked\x0b")
    },
    **{f"size {size!r}": chunked(chunk(size=size) + END) for size in (b"g", b"-1", b"0x20", b"f" * 22, b'20;a="\r\n"')},
    **{f"{name!r}: {v!r:.20}": post(name + b": " + v + b"\r\n") for name in HEADERS for v in VALUES},
}


@pytest.fixture(scope="module")
def fuzzed(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.running(fake(model_path, max_seq_len=64), tmp_path_factory.mktemp("logs") / "fuzz.log") as server:
        yield server
        is_idle(server)


def is_idle(server: Server) -> None:
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    for name in ("num_running_requests", "num_waiting_requests"):
        server.wait_load(0, name)


def connect(server: Server, data: bytes, seconds: float) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=seconds)
    with contextlib.suppress(OSError):  # it has been refused before its end; what was said is still to be read
        connection.sendall(data)
    return connection


def answers(connection: socket.socket, data: bytes, count: int = 1) -> list[int]:
    """Statuses, up to so many. Raises: TimeoutError when nothing comes, and the connection stays open."""
    statuses = []
    with connection, contextlib.suppress(ConnectionError, http.client.HTTPException):  # closed
        for _ in range(count):
            response = http.client.HTTPResponse(connection, method="HEAD" if data.startswith(b"HEAD") else "GET")
            response.begin()
            response.read()
            statuses.append(response.status)
    return statuses


@pytest.mark.parametrize("name", REQUESTS)
def test_odd_requests(fuzzed: Server, name: str) -> None:
    """Each is whole, so an answer is due; a long one that is refused early may not be able to read it."""
    data = REQUESTS[name]
    statuses = answers(connect(fuzzed, data, 30), data)
    assert all(200 <= status < 500 for status in statuses)
    assert statuses or len(data) > 60_000


SEEDS = (
    post(),
    post(b"X-Request-Id: a\r\n", CHAT, b"POST /v1/chat/completions HTTP/1.1"),
    post(b"", b'{"input": "a", "max_output_tokens": 1}', b"POST /v1/responses HTTP/1.1"),
    post(b"", CHAT, b"POST /v1/messages HTTP/1.1"),
    post(b"", b'{"text": "a"}', b"POST /generate HTTP/1.1"),
    post(b"", b'{"prompt": "a"}', b"POST /tokenize HTTP/1.1"),
    post(b"", b'{"tokens": [5, 6]}', b"POST /detokenize HTTP/1.1"),
    post(b"", b'{"rid": ["a"]}', b"POST /abort_request HTTP/1.1"),
    chunked(chunk() + END),
    get(b"/v1/responses/resp_a/input_items?limit=5&order=asc"),
    get() * 3,
    get(b"/metrics", method=b"HEAD"),
)
PIECES = (
    *(
        b"\r\n",
        b"\n",
        b"\0",
        b"\xff",
        b" ",
        b":",
        b"\r\n\r\n",
        b"[[[[",
        b'"',
        b"\\ud800",
        b"-1",
        b"1e999",
        b"{}",
        b"null",
    ),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 0\r\n",
        b"Connection: close\r\n",
        b"%00",
        b"/../",
        b"0\r\n\r\n",
    ),
)
EDIT = st.tuples(st.integers(0, 400), st.integers(0, 20), st.sampled_from(PIECES) | st.binary(max_size=20))


@settings(QUIET, max_examples=300)
@given(st.sampled_from(SEEDS), st.lists(EDIT, min_size=1, max_size=4))
def test_requests_with_mistakes(fuzzed: Server, seed: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    """Where no answer comes at once, the server takes the request for unfinished: the client goes away."""
    data = seed
    for place, cut, piece in edits:
        place %= len(data) + 1
        data = data[:place] + piece + data[place + cut :]
    try:
        statuses = answers(connect(fuzzed, data, 0.1), data, 3)
    except TimeoutError:
        return
    assert all(200 <= status < 500 for status in statuses), data


def test_requests_that_break_off(fuzzed: Server) -> None:
    for seed in SEEDS:
        for end in range(1, len(seed), 7):
            connect(fuzzed, seed[:end], 30).close()
    is_idle(fuzzed)


OPERATIONS = {
    found.ok().label: found.ok()
    for found in schemathesis.openapi.from_path("python/minisgl/server/openapi.json").get_all_operations()
}


@pytest.mark.parametrize("label", OPERATIONS)
def test_the_document_and_its_opposite(fuzzed: Server, label: str) -> None:
    """What the OpenAPI document says, and what it does not."""
    made = [OPERATIONS[label].as_strategy(generation_mode=mode) for mode in GenerationMode]

    @settings(QUIET, max_examples=20)
    @given(st.one_of(made))
    def send(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("timeout"), int | float):
            case.body["timeout"] = 600  # of nothing: a 504, as documented
        case.call_and_validate(base_url=fuzzed.url, checks=[not_a_server_error], timeout=60)

    send()
