"""A server under random load, with too few pages and too few rows: every request ends as it should, and nothing is
left behind. The scheduler walks all its pages after every step, so a page lost or shared ends the server.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.e2e.conftest import Server, real

SECONDS = 12.0
NUM_CLIENTS = 12
MAX_SEQ_LEN = 160
PROMPTS = (
    "once upon a time ",
    "once upon a table ",
    "a b c d e f g h ",
    "xyz " * 20,
    "once upon a time there was " * 3,
)
TINY_POOL = ("--page-size", "4", "--num-pages", "70", "--max-running-requests", "6", "--max-prefill-length", "24")

Json = dict[str, Any]


class Client:
    """One of several that talk to the server at once. `answers`: greedy text by request, the same for all clients."""

    def __init__(self, url: str, seed: int, answers: dict[str, str]) -> None:
        self._http = httpx.Client(base_url=url, timeout=60)
        self._random = random.Random(seed)
        self._answers = answers

    def run(self, seconds: float) -> Counter[str]:
        kinds = [
            self.whole,
            self.whole,
            self.stream,
            self.stream,
            self.choices,
            self.refused,
            self.leave,
            self.time_out,
        ]
        counts: Counter[str] = Counter()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            kind = self._random.choice(kinds)
            kind()
            counts[kind.__name__] += 1
        return counts

    def close(self) -> None:
        self._http.close()

    def body(self) -> Json:
        body: Json = {"prompt": self._random.choice(PROMPTS), "max_tokens": self._random.choice([1, 7, 40])}
        body |= self._random.choice(
            [{"temperature": 0}, {"seed": 5}, {"seed": 5, "top_k": 7}, {"seed": 5, "top_p": 0.8}]
        )
        body |= self._random.choice([{}, {}, {"stop": ["e", "zz"]}, {"ignore_eos": True}])
        return body

    def whole(self) -> None:
        body = self.body()
        answer = self._http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        self.check(body, choice["text"], choice["finish_reason"], answer.json()["usage"])

    def stream(self) -> None:
        body = self.body()
        wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
        text, reasons, usage, last = "", [], {}, ""
        with self._http.stream("POST", "/v1/completions", json=wanted) as answer:
            assert answer.status_code == 200
            for line in filter(None, answer.iter_lines()):
                last = line.removeprefix("data: ")
                chunk = json.loads(last) if last != "[DONE]" else {"choices": []}
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    text += choice["text"]
                    reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        assert last == "[DONE]"
        assert len(reasons) == 1
        self.check(body, text, reasons[0], usage)

    def check(self, body: Json, text: str, reason: str, usage: Json) -> None:
        """One end, of the right kind; and the same text for the same request, whatever else was running."""
        assert reason in ("stop", "length")
        num_tokens = usage["completion_tokens"]
        assert 1 <= num_tokens <= body["max_tokens"]
        assert reason == "stop" or num_tokens == body["max_tokens"]
        assert not any(stop in text for stop in body.get("stop", ()))
        assert self._answers.setdefault(json.dumps(body), text) == text

    def choices(self) -> None:
        answer = self._http.post("/v1/chat/completions", json=self.chat(n=3))
        assert answer.status_code == 200, answer.text
        assert [choice["finish_reason"] in ("stop", "length") for choice in answer.json()["choices"]] == [True] * 3

    def refused(self) -> None:
        long = {"prompt": [5] * MAX_SEQ_LEN, "max_tokens": 1}
        both = {"prompt": ["fine", "too long " * 400], "stream": self._random.random() < 0.5}
        bad = self._random.choice([long, both, {"prompt": [5], "n": 0}, {"prompt": [10**6]}, {"prompt": ""}])
        assert self._http.post("/v1/completions", json=bad).status_code == 400

    def leave(self) -> None:
        """Go away after the first events."""
        with self._http.stream("POST", "/v1/chat/completions", json=self.chat(n=2, stream=True)) as answer:
            for _ in zip(range(self._random.randint(1, 4)), answer.iter_lines(), strict=False):
                pass

    def time_out(self) -> None:
        """Go away while a whole answer is made."""
        timeout = self._random.uniform(0.001, 0.1)
        with contextlib.suppress(httpx.TimeoutException):
            self._http.post("/v1/chat/completions", json=self.chat(n=2, ignore_eos=True), timeout=timeout)

    def chat(self, **more: object) -> Json:
        message = {"role": "user", "content": self._random.choice(PROMPTS)}
        return {"messages": [message], "max_tokens": self._random.randint(1, 60), **more}


def idle(server: Server) -> bool:
    """Whether the scheduler computes nothing for half a second."""
    scheduler = server.child("minisgl-TP0-scheduler")
    before = sum(scheduler.cpu_times()[:2])
    time.sleep(0.5)
    return sum(scheduler.cpu_times()[:2]) - before < 0.1


def memory(server: Server) -> int:
    """Resident bytes of all processes."""
    return sum(process.memory_info().rss for process in [psutil.Process(server.process.pid), *server.children])


def test_random_load_leaves_nothing_behind(start: Callable[..., Server], tiny_path: Path) -> None:
    server = start(real(tiny_path, "--max-seq-len", str(MAX_SEQ_LEN), *TINY_POOL), MINISGL_CHECK_INTEGRITY="1")
    answers: dict[str, str] = {}

    def run(seed: int, seconds: float) -> Counter[str]:
        with contextlib.closing(Client(server.url, seed, answers)) as client:
            return client.run(seconds)

    def load(seed: int, seconds: float) -> Counter[str]:
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            return sum(pool.map(run, range(seed, seed + NUM_CLIENTS), [seconds] * NUM_CLIENTS), Counter())

    load(0, SECONDS / 4)
    before = memory(server)
    counts = load(100, SECONDS)
    assert all(counts[kind] > 3 for kind in ("whole", "stream", "choices", "refused", "leave", "time_out")), counts
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert any(idle(server) for _ in range(10))
    assert memory(server) - before < 64 * 2**20
    with contextlib.closing(Client(server.url, 7, answers)) as quiet:
        for _ in range(10):
            quiet.whole()  # alone, a request gets what it got among others
    server.process.terminate()
    assert server.wait_exit() == 0
    assert not server.orphans()
    assert "Traceback" not in server.output()
