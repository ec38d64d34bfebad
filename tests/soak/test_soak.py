"""A server under everything at once, with too few pages and rows, and with workers that are killed.

For MINISGL_SOAK_SECONDS (40; `make soak` takes 1,800). The scheduler walks all its pages after every step. In the end
nothing runs, and memory, threads and descriptors of each process are what they were after a while of the same.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest

from tests.e2e.conftest import Server, real, start, tiny_path
from tests.soak.clients import ADMIN, KEYS, MAX_SEQ_LEN, Client

__all__ = ["start", "tiny_path"]

SECONDS = float(os.environ.get("MINISGL_SOAK_SECONDS", "40"))
SEED = int(os.environ.get("MINISGL_SOAK_SEED", "0"))
NUM_CLIENTS = 8
KILLED = ["minisgl-TP0-scheduler", "minisgl-detokenizer-0", "minisgl-tokenizer-0"] * max(1, int(SECONDS / 180))
FLAGS = ("--max-seq-len", str(MAX_SEQ_LEN), "--page-size", "4", "--num-pages", "150", "--max-running-requests", "6")
FLAGS += ("--max-prefill-length", "24", "--num-tokenizer", "1", "--tool-call-parser", "hermes")
FLAGS += ("--api-key", ",".join(KEYS), "--admin-key", ADMIN, "--restart-workers", "1000")
MEGABYTE = 2**20
HEADERS = {"authorization": f"Bearer {ADMIN}"}


class Held(NamedTuple):
    """What a process holds."""

    megabytes: float
    num_threads: int
    num_fds: int


def workers(server: Server) -> dict[str, psutil.Process]:
    """The processes of the server now, by what they are."""
    main = psutil.Process(server.process.pid)
    children = {" ".join(child.cmdline()).strip(): child for child in main.children()}
    return {"server": main, **{name: child for name, child in children.items() if name.startswith("minisgl-")}}


def held(server: Server) -> dict[str, Held]:
    return {
        name: Held(process.memory_full_info().uss / MEGABYTE, process.num_threads(), process.num_fds())
        for name, process in workers(server).items()
    }


def load_of(server: Server) -> dict[str, int]:
    answer = httpx.get(f"{server.url}/server_info", headers=HEADERS, timeout=60)
    return dict(answer.json()["load"]) if answer.status_code == 200 else {"status": answer.status_code}


def wait_idle(server: Server) -> None:
    """Until nothing is left of what was asked, in any process."""
    deadline = time.monotonic() + 120
    while any((load := load_of(server)).values()):
        assert time.monotonic() < deadline, f"something is left: {load}"
        time.sleep(0.2)


def kill_some(server: Server, seconds: float, names: Sequence[str]) -> list[float]:
    """Kill these workers, one now and then; how long it took each time until the server was ready again."""
    recoveries = []
    for name in names:
        time.sleep(seconds / (len(names) + 1))
        workers(server)[name].kill()
        begin = time.monotonic()
        while httpx.get(f"{server.url}/health", timeout=60).status_code != 200:
            assert time.monotonic() - begin < 120, f"after {name} was killed, the server is not back"
            time.sleep(0.1)
        recoveries.append(time.monotonic() - begin)
    return recoveries


@pytest.mark.timeout(SECONDS * 2 + 300)
def test_nothing_is_lost_and_nothing_grows(start: Callable[..., Server], tiny_path: Path) -> None:
    server = start(real(tiny_path, *FLAGS), MINISGL_CHECK_INTEGRITY="1", MINISGL_INTEGRITY_FATAL="1")
    answers: dict[str, str] = {}

    def run(seed: int, seconds: float) -> Counter[str]:
        with closing(Client(server.url, seed, answers)) as client:
            client.run(seconds)
            return client.counts

    def load(seed: int, seconds: float, killed: Sequence[str]) -> Counter[str]:
        with ThreadPoolExecutor(NUM_CLIENTS + 1) as pool:
            kills = pool.submit(kill_some, server, seconds, killed)
            counts = sum(pool.map(run, range(seed, seed + NUM_CLIENTS), [seconds] * NUM_CLIENTS), Counter[str]())
            print(f"ready again after {', '.join(f'{s:.1f} s' for s in kills.result())}; {dict(counts)}")
        wait_idle(server)
        return counts

    third = len(KILLED) // 3
    load(SEED, SECONDS / 3, KILLED[:third])
    before = held(server)
    counts = load(SEED + 1000, SECONDS * 2 / 3, KILLED[third:])
    after = held(server)
    print("\n".join(f"{name}: {before.get(name)} -> {after[name]}" for name in after))
    assert before.keys() == after.keys()
    for name, now in after.items():
        assert now.megabytes - before[name].megabytes < 64, f"{name} has grown from {before[name]} to {now}"
        assert now.num_threads - before[name].num_threads <= 4, f"{name} has more threads: {before[name]}, {now}"
        assert now.num_fds - before[name].num_fds <= 4, f"{name} has more descriptors: {before[name]}, {now}"
    done = {kind for kind in dir(Client) if counts[kind]}
    assert len(done) >= 17, f"too few kinds of requests in the time: {sorted(done)}"
    metrics = httpx.get(f"{server.url}/metrics", headers=HEADERS, timeout=60).text
    failed = re.findall(r'http_requests_total\{.*status="5(?!03)\d\d".*', metrics)
    assert failed == []
    with closing(Client(server.url, SEED, answers)) as quiet:
        for _ in range(10):
            quiet.whole()  # alone, a request gets what it got among others
    server.children = [process for name, process in workers(server).items() if name != "server"]
    server.process.terminate()
    assert server.wait_exit() == 0
    assert not server.orphans()
    assert "Traceback" not in server.output()
    assert threading.active_count() < 50
