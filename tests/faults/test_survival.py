"""Broken pages, exceptions, logits that are no numbers and lack of memory in a real server: what they hurt ends with an
error, all else has the greedy answer of a fresh server, during and after."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import zmq

from tests.faults.conftest import Faults, Server, fake, model_path, real, tiny_path
from tests.faults.test_integrity import replay

__all__ = ["model_path", "tiny_path"]
PROMPTS = [f"{word} and {word}" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
SECONDS = 120.0  # more than anything below takes; CI's machine may be busy
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


class Asked:
    """A server with faults; how each prompt is answered when all are asked at once."""

    def __init__(self, server: Server, faults: Faults, folder: Path) -> None:
        self.server, self.faults, self.folder = server, faults, folder
        self.pids = sorted(child.pid for child in server.children)
        self.expected = self.ask()
        assert all(isinstance(answer, list) for answer in self.expected)
        assert self.ask() == self.expected

    def one(self, index: int) -> list[Any] | int:
        """The tokens of an answer, or the status of an error that a client can read."""
        body: dict[str, Any] = {"prompt": PROMPTS[index], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        body |= [{}, {"logprobs": 2}, {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}][
            index % 3
        ]
        response = httpx.post(f"{self.server.url}/v1/completions", json=body, timeout=SECONDS)
        if response.status_code == 200:
            (choice,) = response.json()["choices"]
            return [choice["text"], (choice["logprobs"] or {}).get("tokens")]
        assert response.json()["error"]["message"]
        return response.status_code

    def ask(self) -> list[list[Any] | int]:
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            return list(pool.map(self.one, range(len(PROMPTS))))

    def ask_with(self, point: str, action: str) -> int:
        """Ask while the fault comes true. How many had an error: the others have the right answer."""
        for _ in range(20):
            planter = threading.Timer(0.05, self.faults.plant, ["TP0", point, action])
            planter.start()
            answers = self.ask()
            planter.join()
            if self.faults.is_taken("TP0", point):
                break
        wrong = [answer for answer, right in zip(answers, self.expected, strict=True) if answer != right]
        assert all(answer in (500, 503) for answer in wrong), wrong
        return len(wrong)

    def as_before(self) -> None:
        assert self.ask() == self.expected
        children = psutil.Process(self.server.process.pid).children(recursive=True)
        assert set(self.pids) <= {child.pid for child in children}, "a worker was started again"
        assert httpx.get(f"{self.server.url}/health", timeout=SECONDS).status_code == 200


def started(tiny_path: Path, folder: Path, *flags: str) -> Iterator[Asked]:
    faults = Faults(folder / "faults")
    faults.folder.mkdir()
    flags = ("--max-seq-len", "256", "--num-pages", "64", *flags)
    walk = {"MINISGL_CHECK_INTEGRITY": "1", "MINISGL_INTEGRITY_FATAL": "0"}
    server = Server(real(tiny_path, *flags), folder / "server.log", **faults.env, **walk)
    try:
        yield Asked(server, faults, folder)
    finally:
        server.close()


@pytest.fixture(scope="module")
def asked(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    yield from started(tiny_path, tmp_path_factory.mktemp("survival"))


@pytest.mark.parametrize("how", ["free", "exhaust", "count"])
def test_broken_pages_cost_those_that_run(asked: Asked, how: str) -> None:
    before = len(asked.server.output())
    assert asked.ask_with("pages", how) >= 1
    asked.as_before()
    (line,) = [line for line in asked.server.output()[before:].splitlines() if "with an empty cache" in line]
    shown = replay(Path(line.rpartition("dump: ")[2]))
    assert shown.stdout.splitlines()[0].removeprefix("found then: ") in line
    assert shown.returncode == 0, shown.stdout
    assert "found now: IntegrityError: " in shown.stdout


@pytest.mark.parametrize(
    ("point", "action"),
    [
        ("allocate", "raise memory"),
        ("allocate", "raise error"),
        ("turn", "raise memory"),
        ("turn", "raise error"),
        ("step", "raise memory"),
        ("step", "raise error"),
    ],
)
def test_an_exception_costs_those_that_run(asked: Asked, point: str, action: str) -> None:
    assert asked.ask_with(point, action) >= 1
    asked.as_before()


def test_no_memory_to_send_a_step_costs_one_request_at_most(asked: Asked) -> None:
    """One by one, its outputs can be sent, unless there is only one."""
    assert asked.ask_with("send", "raise memory") <= 1
    asked.as_before()


def test_logits_that_are_no_numbers_end_only_their_own_request(asked: Asked) -> None:
    assert [asked.ask_with("logits", f"nan {row}") for row in (0, 0, 0)] == [1, 1, 1]
    asked.as_before()


def test_logits_that_are_no_numbers_with_two_ranks(tiny_path: Path, tmp_path: Path) -> None:
    for asked in started(tiny_path, tmp_path, "--tp", "2"):
        assert asked.ask_with("logits", "nan 0") == 1
        asked.as_before()


def endpoints(server: Server) -> list[str]:
    """Where the server's processes listen."""
    processes = [psutil.Process(server.process.pid), *server.children]
    connections = [connection for process in processes for connection in process.net_connections("unix")]
    return sorted({c.laddr for c in connections if "/minisgl-" in str(c.laddr)})


def test_no_frame_on_an_internal_socket_hurts_anybody(model_path: Path, tmp_path: Path) -> None:
    """Noise, truncated and oversized headers, and msgpack of something else, at each socket of a running server."""
    draw = random.Random(0)
    with Server.running(fake(model_path, num_tokenizer=1), tmp_path / "server.log") as server:
        paths = endpoints(server)
        assert {Path(path).name for path in paths} >= {"backend", "frontend", "detokenizer-0", "tokenizer-0"}
        context = zmq.Context()
        for path in paths:
            socket = context.socket(zmq.PUSH)
            socket.connect(f"ipc://{path}")
            for _ in range(300):
                socket.send(draw.randbytes(draw.randrange(200)))
            for frame in (
                b"",
                b"\xdd\xff\xff\xff\xff",
                b"\x91\x81\xa4type\xa4ping",
                b"\x91" * 5000,
                b"\xc6\xff\xff\xff\xff",
            ):
                socket.send(frame)
            socket.send_multipart([b"several", b"parts"])
            socket.close(linger=5000)
        context.term()
        body = {"prompt": "hello", "max_tokens": 5}
        for _ in range(5):
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=SECONDS)
            assert answer.status_code == 200, answer.text
        assert all(child.is_running() for child in server.children)
        told = [line for line in server.output().splitlines() if "are no message" in line]
        assert 4 <= len(told) <= 12 * len(paths)
