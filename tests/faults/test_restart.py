"""Workers die, hang and fail at any time: each request gets an answer or one error, and the server serves again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.faults.conftest import Server, fake

Start = Callable[..., Server]
HELLO: Any = [{"role": "user", "content": "hello"}]


def test_the_next_request_works(start: Start, model_path: Path) -> None:
    server = start(fake(model_path, num_tokenizer=1))
    with httpx.Client(base_url=server.url, timeout=30) as http:
        for worker in ("minisgl-detokenizer-0", "minisgl-tokenizer-0", "minisgl-TP0-scheduler"):
            child = next(c for c in psutil.Process(server.process.pid).children() if worker in " ".join(c.cmdline()))
            child.kill()
            begin = time.monotonic()
            answer = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 4})
            print(worker, answer.status_code, time.monotonic() - begin)
            assert answer.status_code == 200
        print(http.get("/metrics").text)
    print(server.output())
