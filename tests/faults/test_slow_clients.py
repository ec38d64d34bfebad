"""Clients that read nothing, or send half of what they announce: cut off in time, and nobody else notices."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import Server, fake
from tests.faults.load import Client, post, raise_descriptor_limit
from tests.waiting import poll

READ, WRITE = 3.0, 2.0  # the server's timeouts
PATIENCE = 300.0  # the same where nobody is to be cut off meanwhile
DELAY = 0.02  # seconds a step
SLACK = 20  # seconds: on a busy machine
NUM = 300  # of each kind of slow clients
CHAT = "/v1/chat/completions"
MESSAGE = {"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True}


def timed(model_path: Path, log: Path, read: float, write: float) -> AbstractContextManager[Server]:
    raise_descriptor_limit(8192)
    options = {"delay": DELAY, "max_running": 1024, "max_seq_len": 4096}
    limits = {"MINISGL_READ_TIMEOUT": str(read), "MINISGL_WRITE_TIMEOUT": str(write)}
    return Server.running(fake(model_path, **options), log, **limits)


@pytest.fixture(scope="module")
def slow(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with timed(model_path, tmp_path_factory.mktemp("logs") / "server.log", READ, WRITE) as server:
        yield server


def connect(server: Server, data: bytes, *, buffer: int = 0) -> socket.socket:
    """A connection that has sent this. buffer: bytes that its kernel takes for it."""
    port = int(server.url.rpartition(":")[2])
    made = socket.socket()
    if buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.connect(("127.0.0.1", port))
    made.sendall(data)
    return made


def read_all(connection: socket.socket, seconds: float = SLACK) -> bytes:
    connection.settimeout(seconds)
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionError:
        pass
    return data


def head(path: str, length: int, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
    return "\r\n".join([*lines, f"content-length: {length}", "", ""]).encode()


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.", '"invalid_request_error"'),
        (b"P", '"invalid_request_error"'),
        (head(CHAT, 100) + b"{", '"invalid_request_error"'),
        (head("/v1/messages", 100) + b'{"model"', '"type":"error"'),
        (head("/tokenize", 100), '"invalid_request_error"'),
    ],
    ids=["head", "byte", "body", "message", "no body"],
)
def test_half_a_request_is_answered_with_408(slow: Server, sent: bytes, kind: str) -> None:
    begin = time.monotonic()
    with connect(slow, sent) as connection:
        answer = read_all(connection)
    assert READ - 0.1 <= time.monotonic() - begin <= READ + SLACK
    assert answer.startswith(b"HTTP/1.1 408 ") and kind.encode() in answer and b"connection: close" in answer


def test_a_connection_that_says_nothing_is_closed(slow: Server) -> None:
    with connect(slow, b"") as connection:
        assert read_all(connection) == b""


def test_a_trickle_is_no_request(slow: Server) -> None:
    """A byte now and then does not keep a connection open."""
    begin = time.monotonic()
    with connect(slow, head(CHAT, 10_000)) as connection:
        connection.settimeout(0.2)
        answer = b""
        while not answer and time.monotonic() - begin < READ + SLACK:
            try:
                connection.sendall(b" ")
                answer = connection.recv(4096)
            except TimeoutError:
                pass
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_slow_body_that_goes_on_is_waited_for(slow: Server) -> None:
    data = b'{"messages": [{"role": "user", "content": "' + b"x" * 12_000 + b'"}], "max_tokens": 1}'
    begin = time.monotonic()
    with connect(slow, head(CHAT, len(data))) as connection:
        for first in range(0, len(data), 1000):
            connection.sendall(data[first : first + 1000])
            time.sleep(2 * READ / 12)
        connection.settimeout(SLACK)
        assert time.monotonic() - begin > READ
        assert connection.recv(4096).startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))  # the prompt may be too long


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/nowhere"])
def test_a_body_over_the_limit_is_refused_before_it_is_read(slow: Server, path: str) -> None:
    with connect(slow, head(path, 10**10) + b"{") as connection:
        connection.settimeout(SLACK)  # had it been waited for, this would be a 408
        assert connection.recv(4096).startswith(b"HTTP/1.1 404 " if path == "/nowhere" else b"HTTP/1.1 413 ")
        read_all(connection)  # ends: the connection is closed


HALF = [head(CHAT, 1000) + b"{", b"POST /v1/chat/completions HTTP/1.1\r\nhost: "]


def test_many_slow_clients_are_cut_off(slow: Server) -> None:
    """Streams that are never read, half-sent bodies and half-sent heads."""
    told = {"logprobs": True, "top_logprobs": 20}  # some 2 kB an event
    stream = post(CHAT, {**MESSAGE, **told, "stream": True, "max_tokens": 1500})
    process = psutil.Process(slow.process.pid)
    before = process.memory_info().rss
    for connection in [connect(slow, data) for data in HALF for _ in range(NUM)]:
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")
        connection.close()
    poll(lambda: process.num_fds() < NUM, "what was cut off is still open")
    unread = [connect(slow, stream, buffer=4096) for _ in range(NUM)]
    poll(lambda: slow.load("num_running_requests") > 0, "none of them runs")
    poll(lambda: slow.load("num_running_requests") == 0, "nobody ends them", 100)
    grown = process.memory_info().rss - before
    endings = [read_all(connection) for connection in unread]
    for connection in unread:
        connection.close()
    assert not any(b"[DONE]" in ending for ending in endings), "a stream that nobody read went to its end"
    assert grown < 100 * 2**20


def test_others_do_not_notice_slow_clients(model_path: Path, tmp_path: Path) -> None:
    """What these cost is measured in the server's own processor time: other work on the machine disturbs rates. None
    of them is cut off meanwhile."""
    with timed(model_path, tmp_path / "log", PATIENCE, PATIENCE) as server:
        process = psutil.Process(server.process.pid)
        clock = ~server.process.pid << 3 | 2  # its processor time in nanoseconds, as clock_getcpuclockid numbers it

        def is_at_rest() -> bool:
            begin = time.clock_gettime(clock)
            time.sleep(0.2)
            return time.clock_gettime(clock) - begin < 0.005

        async def cost() -> float:
            """The server's processor time for eight streams, in seconds."""
            clients = [Client(server.url, "127.0.0.2") for _ in range(8)]
            begin = time.clock_gettime(clock)
            each = post(CHAT, {**MESSAGE, "max_tokens": 30})
            answers = await asyncio.gather(*(client.send(each) for client in clients))
            assert [answer.status for answer in answers] == [200] * 8
            for client in clients:
                await client.close()
            return time.clock_gettime(clock) - begin

        asyncio.run(cost())
        quiet, beside = [], []
        for _ in range(6):  # in turns: what else the machine does changes
            poll(is_at_rest, "it never rests")
            quiet.append(asyncio.run(cost()))
            idle = [connect(server, data) for data in HALF for _ in range(NUM)]
            poll(lambda: process.num_fds() >= 2 * NUM, "not all were accepted")
            poll(is_at_rest, "it does not wait for what comes")
            beside.append(asyncio.run(cost()))
            for connection in idle:
                connection.close()
            poll(lambda: process.num_fds() < NUM, "what has left is still there")
        costs = [" ".join(f"{1000 * seconds:.0f}" for seconds in found) for found in (quiet, beside)]
        print(f"eight streams: {costs[0]} ms; beside {2 * NUM} others: {costs[1]} ms")
        assert min(beside) - min(quiet) <= 0.05 * 30 * DELAY, "a twentieth of the time that the streams take"
