"""Workers die, hang and fail at any time: each request gets an answer or one error, and the server serves again."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import zmq

from tests.faults.conftest import Faults, Server, fake, real
from tests.waiting import still_running

Start = Callable[..., Server]
HELLO: Any = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
NUM_STREAMS = 32
REQUEST_SECONDS = 120.0  # more than any round below takes; CI's machine may be busy
SERVE_SECONDS = 60.0  # on a quiet machine it is a third of it at most

TITLES = {"TP0": "minisgl-TP0-scheduler", "TP1": "minisgl-TP1-scheduler"}


def process_of(server: Server, worker: str) -> psutil.Process:
    """The worker's process of this moment, by its name in the log."""
    title, deadline = TITLES.get(worker, f"minisgl-{worker}"), time.monotonic() + REQUEST_SECONDS
    while time.monotonic() < deadline:
        for child in psutil.Process(server.process.pid).children():
            with suppress(psutil.Error):  # it has just ended
                if " ".join(child.cmdline()).strip() == title:
                    return child
    raise AssertionError(f"there is no {title}")


class Crowd(threading.Thread):
    """32 clients that ask again and again, every second one for a stream. How each request ended is counted."""

    def __init__(self, server: Server, **body: Any) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.body = {"messages": HELLO, "max_tokens": 24, "ignore_eos": True, **body}
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.longest = 0.0
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=REQUEST_SECONDS, limits=limits) as client:
            await asyncio.gather(*(self._ask_on(client, index % 2 == 0) for index in range(NUM_STREAMS)))

    async def _ask_on(self, client: httpx.AsyncClient, stream: bool) -> None:
        while not self._stopped.is_set():
            begin = time.monotonic()
            try:
                end = await self._ask(client, stream)
            except Exception as error:
                end = f"{type(error).__name__}: {error} after {time.monotonic() - begin:.1f} s"
                self.wrong.append(end)
                await asyncio.sleep(0.1)
            self.ends[end if end in ("answer", "error") else "wrong"] += 1
            self.longest = max(self.longest, time.monotonic() - begin)
            await asyncio.sleep(0.1)  # for what else there is to do on this machine

    async def _ask(self, client: httpx.AsyncClient, stream: bool) -> str:
        async with client.stream("POST", CHAT, json={**self.body, "stream": stream}) as answer:
            lines = [line async for line in answer.aiter_lines() if line and not line.startswith(":")]
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0
            assert json.loads(lines[0])["error"]["type"] == "server_error"
            return "error"
        assert answer.status_code == 200, lines
        if not stream:
            assert json.loads(lines[0])["choices"][0]["finish_reason"] == "length"
            return "answer"
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
        if "error" in events[-1]:
            assert not any("error" in event for event in events[:-1]), "more than one error"
            return "error"
        assert lines[-1] == "data: [DONE]"
        assert [e["choices"][0]["finish_reason"] for e in events if e["choices"]].count("length") == 1
        return "answer"

    def leave(self) -> None:
        self._stopped.set()
        self.join(2 * REQUEST_SECONDS)
        assert not self.is_alive(), "a request hangs"

    def end(self) -> None:
        self.leave()
        assert self.wrong == []
        assert self.ends["answer"] >= NUM_STREAMS // 2
        assert self.longest < REQUEST_SECONDS


def serves(server: Server, model: str) -> float:
    """Seconds until a new request is answered: with an error again and again, or at last with an answer."""
    begin = time.monotonic()
    body = {"model": model, "messages": HELLO, "max_tokens": 2}
    with httpx.Client(base_url=server.url, timeout=REQUEST_SECONDS) as http:
        while http.post(CHAT, json=body).status_code != 200:
            assert time.monotonic() - begin < REQUEST_SECONDS
            time.sleep(0.05)
    return time.monotonic() - begin


def is_idle(server: Server) -> bool:
    answer = httpx.get(f"{server.url}/server_info", timeout=REQUEST_SECONDS)
    return answer.status_code == 200 and set(answer.json()["load"].values()) == {0}


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.05)


def restarts(server: Server) -> int:
    text = httpx.get(f"{server.url}/metrics", timeout=REQUEST_SECONDS).text
    lines = [line for line in text.splitlines() if line.startswith("minisgl:worker_restarts_total{")]
    assert len(lines) > 1
    return int(sum(float(line.split()[-1]) for line in lines))


@contextmanager
def nothing_left(server: Server, folder: Path, shared: set[str]) -> Iterator[None]:
    """The server stops in order after this block: no process, socket directory or shared memory stays."""
    seen: set[psutil.Process] = set(server.children)
    yield
    seen |= set(psutil.Process(server.process.pid).children(recursive=True))
    server.process.terminate()
    assert server.wait_exit() == 0
    assert still_running(seen) == []
    assert not list(folder.glob("minisgl-*"))
    wait_until(lambda: set(os.listdir("/dev/shm")) <= shared)


def hurt(server: Server, faults: Faults, worker: str, action: str) -> None:
    """`kill`, `stop`, or `POINT ACTION`."""
    point, _, what = action.partition(" ")
    if what:
        faults.plant(worker, point, what)
        wait_until(lambda: faults.is_taken(worker, point), REQUEST_SECONDS)
    else:
        process_of(server, worker).send_signal(signal.SIGKILL if action == "kill" else signal.SIGSTOP)


def one_round(server: Server, faults: Faults, worker: str, action: str, model: str) -> float:
    """Seconds from when it was noticed until a new request was answered."""
    before, group = len(server.output()), "scheduler" if worker.startswith("TP") else worker
    hurt(server, faults, worker, action)
    wait_until(lambda: f"; {group}: started again (" in server.output()[before:], REQUEST_SECONDS)
    seconds = serves(server, model)
    wait_until(lambda: f"{group}: serves again after" in server.output()[before:], REQUEST_SECONDS)
    return seconds


TOKENIZER = ("kill", "stop", "message raise error", "message hang")
SCHEDULER = ("kill", "stop", "turn raise engine", "turn raise memory", "turn hang", "step stall", "beat drop 30")
ROUNDS = {
    "two-tokenizers": [
        *(("TP0", action) for action in SCHEDULER),
        *((w, action) for w in ("detokenizer-0", "tokenizer-0", "tokenizer-1") for action in TOKENIZER),
    ],
    "shared-tokenizer": [*(("detokenizer-0", action) for action in TOKENIZER), ("TP0", "kill")],
    "two-ranks": [("TP0", "kill"), ("TP1", "kill"), ("TP1", "stop"), ("TP1", "turn hang")],
    "built-in": [("TP0", "kill"), ("TP0", "turn hang")],
}
assert sum(map(len, ROUNDS.values())) == 30


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ROUNDS)
def test_rounds_of_faults_under_32_streams(
    start: Start, faults: Faults, model_path: Path, tiny_path: Path, short_path: Path, kind: str
) -> None:
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    print(f"seed {seed}")
    watching = {"restart_workers": 1000, "heartbeat_timeout": 2, "step_timeout": 1}
    flags = (
        "--restart-workers",
        "1000",
        "--heartbeat-timeout",
        "4",
        "--step-timeout",
        "4",
        "--max-running-requests",
        "16",
    )
    command, model = {
        "two-tokenizers": (fake(model_path, num_tokenizer=2, delay=0.06, max_running=16, **watching), "fake-model"),
        "shared-tokenizer": (fake(model_path, delay=0.03, max_running=16, **watching), "fake-model"),
        "two-ranks": (real(tiny_path, "--tp", "2", *flags), "tiny"),
        "built-in": (["-m", "minisgl", "--port", "0", *flags], "minisgl-demo"),
    }[kind]
    shared = set(os.listdir("/dev/shm"))
    begin = time.monotonic()
    server = start(command, TMPDIR=str(short_path), **faults.env)
    limit = max(SERVE_SECONDS, 5 * (time.monotonic() - begin))  # the second where the machine has much else to do
    rounds = list(ROUNDS[kind])
    chance.shuffle(rounds)
    serves(server, model)
    crowd = Crowd(server, model=model)
    with nothing_left(server, short_path, shared):
        for worker, action in rounds:
            time.sleep(chance.uniform(0.1, 0.6))
            seconds = one_round(server, faults, worker, action, model)
            print(f"{worker} {action}: serves after {seconds:.1f} s")
            assert seconds < limit
        crowd.end()
        print(f"{dict(crowd.ends)}, longest {crowd.longest:.1f} s")
        num_deaths = server.output().count(": started again (")
        assert restarts(server) == num_deaths >= len(rounds)  # a busy machine may be silent for longer than it may
        wait_until(lambda: is_idle(server))
    assert server.output().count(": started again (") == num_deaths, "nobody is started again at the end"


async def lines_of(client: httpx.AsyncClient, begun: Callable[[], None]) -> list[str]:
    """A stream of two seconds and more. begun: called with its first token, behind the role."""
    body = {"messages": HELLO, "max_tokens": 40, "ignore_eos": True, "stream": True}
    lines: list[str] = []
    async with client.stream("POST", CHAT, json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                lines.append(line)
                if len(lines) == 2:
                    begun()
    return lines


async def ends_of_eight(server: Server, num_begun: int, hurt: Callable[[], None]) -> list[str]:
    """The last lines of eight streams. So many of them, which run together, have begun when it happens."""
    begun = asyncio.Semaphore(0)
    async with httpx.AsyncClient(base_url=server.url, timeout=REQUEST_SECONDS) as client:
        tasks = [asyncio.create_task(lines_of(client, begun.release)) for _ in range(8)]
        for _ in range(num_begun):
            await begun.acquire()
        await asyncio.to_thread(server.wait_load, 8)
        hurt()
        return [lines[-1] for lines in await asyncio.gather(*tasks)]


def test_what_has_not_begun_is_served_afterwards(start: Start, model_path: Path) -> None:
    server = start(fake(model_path, num_tokenizer=1, delay=0.05, max_running=2))
    for worker, num_failed in (("TP0", 2), ("detokenizer-0", 2), ("tokenizer-0", 0)):
        ends = asyncio.run(ends_of_eight(server, 2, lambda worker=worker: process_of(server, worker).kill()))
        failed = [end for end in ends if "error" in end]
        assert len(failed) == num_failed
        assert all(worker in end for end in failed)
        assert ends.count("data: [DONE]") == 8 - num_failed
        wait_until(lambda: is_idle(server))


def test_a_worker_that_dies_in_a_drain_is_started_again_too(start: Start, model_path: Path) -> None:
    server = start(fake(model_path, delay=0.05, max_running=4), MINISGL_DRAIN_TIMEOUT="100")

    def hurt() -> None:
        server.process.terminate()
        time.sleep(0.2)
        process_of(server, "TP0").kill()

    ends = asyncio.run(ends_of_eight(server, 4, hurt))
    assert server.wait_exit() == 0
    assert ends.count("data: [DONE]") == 4
    assert sum("TP0" in end for end in ends) == 4
    assert server.orphans() == []


def test_beyond_the_limit_the_server_ends(start: Start, model_path: Path) -> None:
    server = start(fake(model_path, num_tokenizer=1, delay=0.05, restart_workers=1), MINISGL_DRAIN_TIMEOUT="1000")
    process_of(server, "tokenizer-0").kill()
    serves(server, "fake-model")
    crowd = Crowd(server, max_tokens=400)
    server.wait_load(NUM_STREAMS, "num_running_requests")  # all are under way, for twenty seconds
    process_of(server, "TP0").kill()
    assert server.wait_exit() == 1, "nobody waits for what cannot end"
    assert "the server stops" in server.output()
    assert server.orphans() == []
    crowd.leave()
    assert crowd.ends["error"] >= NUM_STREAMS  # each of those; then nobody listens any more
    assert all(end.startswith(("ConnectError", "ReadError", "RemoteProtocolError")) for end in crowd.wrong)


@pytest.mark.parametrize(("limit", "recovers"), [(2, True), (1, False)])
def test_a_start_that_fails_is_another_death(
    start: Start, model_path: Path, faults: Faults, limit: int, recovers: bool
) -> None:
    server = start(fake(model_path, restart_workers=limit), **faults.env)
    faults.plant("detokenizer-0", "start", "raise error")
    process_of(server, "detokenizer-0").kill()
    if recovers:
        serves(server, "fake-model")
        assert server.output().count("started again (") == 2
        assert server.output().count("serves again") == 1
    else:
        assert server.wait_exit() == 1


def test_health_is_honest_while_workers_start(start: Start, model_path: Path, faults: Faults) -> None:
    server, go_on = start(fake(model_path, delay=0.01), **faults.env), faults.folder / "go on"
    faults.plant("TP0", "start", f"wait {go_on}")
    process_of(server, "TP0").kill()
    with httpx.Client(base_url=server.url, timeout=REQUEST_SECONDS) as http:
        wait_until(lambda: http.get("/health").status_code == 503)
        answer = http.get("/health")
        assert int(answer.headers["retry-after"]) > 0
        assert "TP0" in answer.json()["error"]["message"]
        assert http.get("/health/live").status_code == 200
        assert http.get("/server_info").status_code == 503
        assert http.get("/metrics").status_code == 200
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, server.url + CHAT, json={"messages": HELLO, "max_tokens": 2})
            time.sleep(1)
            assert not asked.done()
            go_on.touch()
            assert asked.result().status_code == 200  # it was kept
        assert http.get("/health").status_code == 200


def test_health_is_honest_while_a_step_does_not_end(start: Start, model_path: Path, faults: Faults) -> None:
    server = start(fake(model_path, step_timeout=12), MINISGL_HEALTH_TIMEOUT="60", **faults.env)
    faults.plant("TP0", "step", "stall")
    crowd = Crowd(server)
    with httpx.Client(base_url=server.url, timeout=REQUEST_SECONDS) as http:
        wait_until(lambda: faults.is_taken("TP0", "step"))
        wait_until(lambda: http.get("/health").status_code == 503)
        assert restarts(server) == 0
        answer = http.get("/health")
        assert "step" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"]
        assert http.get("/health/live").status_code == 200
        wait_until(lambda: restarts(server) == 1)
        wait_until(lambda: http.get("/health").status_code == 200)
    crowd.end()


def test_health_is_honest_while_a_worker_is_silent(start: Start, model_path: Path, faults: Faults) -> None:
    """As a stopped rank above 0 is, which no question passes."""
    server = start(fake(model_path), **faults.env)
    faults.plant("detokenizer-0", "beat", "drop 20")  # twice as long as nobody minds
    with httpx.Client(base_url=server.url, timeout=REQUEST_SECONDS) as http:
        wait_until(lambda: http.get("/health").status_code == 503)
        assert "detokenizer-0" in http.get("/health").json()["error"]["message"]
        assert http.get("/health/live").status_code == 200
        wait_until(lambda: http.get("/health").status_code == 200)
    assert restarts(server) == 0


def test_frames_that_make_no_sense_are_dropped(start: Start, model_path: Path, short_path: Path) -> None:
    server = start(fake(model_path), TMPDIR=str(short_path))
    (directory,) = short_path.glob("minisgl-*")
    nonsense = (b"", b"\xc1", b"\x91\x81\xa4type\xa5reply", b"\x80", os.urandom(1000))
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.connect(f"ipc://{directory}/frontend")
        for frame in nonsense * 20:
            push.send(frame)
        with httpx.Client(base_url=server.url, timeout=REQUEST_SECONDS) as http:
            wait_until(lambda: "are no message" in server.output())
            assert http.get("/health").status_code == 200
            assert http.post(CHAT, json={"messages": HELLO, "max_tokens": 2}).status_code == 200
    assert server.output().count("are no message") <= 7
