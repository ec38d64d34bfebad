"""A server that is told to stop: it says so, finishes what runs, and cuts nobody off."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.conftest import Server, fake
from tests.waiting import poll

Start = Callable[..., Server]
ENDING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
HELLO: Any = {"model": "fake-model", "messages": [{"role": "user", "content": "hello"}]}
CHAT = "/v1/chat/completions"


class Running(threading.Thread):
    """A request that is under way, in a thread of its own."""

    def __init__(self, server: Server, *, stream: bool, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = server.url + CHAT
        self._body = {**HELLO, "stream": stream, "max_tokens": max_tokens}
        self.begun = threading.Event()
        self.text = ""
        self.headers: Any = {}
        self.status = 0
        self.start()

    def run(self) -> None:
        with httpx.Client(timeout=60) as client, client.stream("POST", self._url, json=self._body) as answer:
            self.status, self.headers = answer.status_code, answer.headers
            for text in answer.iter_text():
                self.text += text
                self.begun.set()

    def end(self) -> None:
        self.join(60)
        assert not self.is_alive(), "the request hangs"


@pytest.mark.parametrize("signum", ENDING)
def test_a_draining_server_says_so_and_finishes_what_runs(
    start: Start, model_path: Path, signum: signal.Signals
) -> None:
    server = start(fake(model_path, delay=0.05), MINISGL_DRAIN_TIMEOUT="100")
    whole = Running(server, stream=False, max_tokens=100)
    streams = [Running(server, stream=True, max_tokens=120) for _ in range(8)]
    for stream in streams:
        assert stream.begun.wait(60)
    with httpx.Client(base_url=server.url, timeout=60) as idle:
        assert "connection" not in idle.get("/health").headers
        server.process.send_signal(signum)
        while (health := idle.get("/health")).status_code == 200:  # on the connection from before
            time.sleep(0.05)
    assert (health.status_code, health.headers["connection"]) == (503, "close")
    assert "draining" in health.text
    live = httpx.get(f"{server.url}/health/live", timeout=60)
    assert (live.status_code, live.headers["connection"]) == (200, "close")
    refused = httpx.post(server.url + CHAT, json=HELLO, timeout=60)
    assert (refused.status_code, refused.headers["connection"]) == (503, "close")
    assert int(refused.headers["retry-after"]) >= 1
    assert "draining" in refused.json()["error"]["message"]
    for request in (whole, *streams):
        request.end()
    assert all(stream.text.rstrip().endswith("data: [DONE]") for stream in streams)
    assert all('"length"' in stream.text for stream in streams)
    assert (whole.status, whole.headers["connection"]) == (200, "close")
    assert server.wait_exit() == 0
    assert server.orphans() == []
    assert "Traceback" not in server.output()


def test_what_does_not_finish_in_time_ends_with_an_error(start: Start, model_path: Path) -> None:
    server = start([*fake(model_path, delay=0.2)], MINISGL_DRAIN_TIMEOUT="1.5")
    stream, whole = (Running(server, stream=kind, max_tokens=400) for kind in (True, False))
    assert stream.begun.wait(60)
    server.wait_load(2)
    begin = time.monotonic()
    server.process.terminate()
    stream.end()
    whole.end()
    assert time.monotonic() - begin >= 1.5
    assert "shutting down" in stream.text
    assert whole.status == 503
    assert server.wait_exit() == 0


def test_keep_alive_clients_lose_nothing(start: Start, model_path: Path) -> None:
    """Clients with pooled connections, in a loop over two servers: the one that is stopped refuses politely."""
    servers = [start(fake(model_path, max_running=64)) for _ in range(2)]
    stop, failures, counts = threading.Event(), [], [0] * 48

    def loop(index: int) -> None:
        with httpx.Client(timeout=60) as client:
            turn = index
            while not stop.is_set():
                for attempt in range(2):
                    try:
                        answer = client.post(servers[turn % 2].url + CHAT, json={**HELLO, "max_tokens": 3})
                    except httpx.HTTPError as error:
                        if attempt == 1 or not isinstance(error, httpx.ConnectError):  # nothing was sent then
                            failures.append(repr(error))
                            break
                    else:
                        if answer.status_code == 200:
                            counts[index] += 1
                            break
                        if attempt == 1 or answer.status_code != 503:
                            failures.append(f"{answer.status_code}: {answer.text}")
                    turn += 1
                turn += 1

    def go_round() -> None:
        """Until each of them has had an answer from either server."""
        before = [*counts]
        poll(lambda: all(now > count + 1 for now, count in zip(counts, before, strict=True)) or failures != [], "stuck")

    threads = [threading.Thread(target=loop, args=(index,), daemon=True) for index in range(48)]
    for thread in threads:
        thread.start()
    go_round()
    servers[0].process.terminate()
    assert servers[0].wait_exit() == 0
    go_round()
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
