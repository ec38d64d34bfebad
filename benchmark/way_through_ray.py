"""What the way through Ray costs: a plain server and a cluster of one replica, in turns.

    python benchmark/way_through_ray.py [--seconds 60] [--streams 16] [--output-len 48] [flags of the server]

Rounds follow one another until the time is over; in each, both answer the same number of requests, in an order that
changes. While the plain server does, the cluster's processes are stopped, with what they take while nothing happens.
Prints the ratios of the cluster to the plain server (output tokens/s, mean time to the first token) of each
round, their medians with intervals of 95 % (bootstrap), and how much processor time each kind of process takes for a
token, beyond what it takes while nothing happens, which is told too. Client and servers share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from random import Random

import aiohttp
import psutil

from minisgl.benchmark import run_script
from minisgl.benchmark.shapes import WORDS

_WARM_ROUNDS = 1
_IDLE_SECONDS = 4.0
_SETTLE_SECONDS = 1.0  # in which processes that were stopped do what they have missed


@dataclass(frozen=True, slots=True)
class Round:
    """Of one server. seconds: until the last answer has ended; first: to the first token, in the mean; busy:
    processor seconds of each kind of process."""

    seconds: float
    first: float
    busy: Counter[str]


def started(*command: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "minisgl", *command]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def address(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    return next(found[1] for line in server.stdout if (found := re.search(r" at (http://\S+)/v1", line)))


def kind(process: psutil.Process, plain: set[int]) -> str:
    """What it is, in a word."""
    words = " ".join(process.cmdline()).strip()
    if process.pid == os.getpid():
        return "client"
    if process.pid in plain:
        return "plain server"
    if words.startswith("ray::ServeReplica:minisgl:"):
        return words.removeprefix("ray::ServeReplica:minisgl:").lower() + " actor"
    if "minisgl.cluster.child" in words or any(
        "minisgl.cluster.child" in " ".join(one.cmdline()) for one in process.parents()
    ):
        return "replica's server"
    return "owner" if "cluster serve" in words else "rest of Ray"


class Watch:
    """Processor time of this process and of all that it has started, by whatever way."""

    def __init__(self) -> None:
        self.kinds: dict[int, str] = {}

    def find(self, plain: psutil.Process) -> None:
        tree = {plain.pid, *(one.pid for one in plain.children(recursive=True))}
        ours = psutil.Process()
        for one in (ours, *ours.children(recursive=True)):
            try:
                self.kinds[one.pid] = kind(one, tree)
            except psutil.Error:
                continue

    @contextmanager
    def paused(self) -> Iterator[None]:
        """All that belongs to the cluster."""
        others = [pid for pid, name in self.kinds.items() if name not in ("client", "plain server")]
        signal_all(others, signal.SIGSTOP)
        try:
            yield
        finally:
            signal_all(others, signal.SIGCONT)
            time.sleep(_SETTLE_SECONDS)

    def taken(self) -> Counter[str]:
        found = Counter[str]()
        for pid, name in self.kinds.items():
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.Error:
                continue
            found[name] += times.user + times.system  # type: ignore[assignment]
        return found


def signal_all(pids: Sequence[int], signum: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


async def ask(session: aiohttp.ClientSession, url: str, text: str, output_len: int) -> float:
    """Seconds to the first token."""
    body = {"prompt": text, "max_tokens": output_len, "ignore_eos": True, "stream": True, "temperature": 0}
    begun = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        await answer.content.readany()
        first = time.perf_counter() - begun
        tail = b""
        async for part in answer.content.iter_any():
            tail = (tail + part)[-64:]
    assert tail.endswith(b"data: [DONE]\n\n"), tail
    return first


async def one_round(url: str, args: argparse.Namespace, rng: Random, watch: Watch) -> Round:
    """Each stream sends one request after the other, with words that no other request has."""
    firsts = list[float]()

    async def stream(session: aiohttp.ClientSession) -> None:
        for _ in range(args.requests):
            words = " ".join(rng.choices(WORDS, k=args.words))
            firsts.append(await ask(session, url, words, args.output_len))

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        before, begun = watch.taken(), time.perf_counter()
        await asyncio.gather(*(stream(session) for _ in range(args.streams)))
        seconds = time.perf_counter() - begun
    busy = watch.taken()
    busy.subtract(before)
    return Round(seconds, statistics.mean(firsts), busy)


def interval(values: Sequence[float]) -> str:
    """The median, and its interval."""
    rng = Random(0)
    drawn = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return f"{statistics.median(values):.3f} ({drawn[50]:.3f} to {drawn[-51]:.3f})"


def tell(rounds: Sequence[Sequence[Round]], idle: Counter[str], tokens: int) -> None:
    plain, cluster = zip(*rounds, strict=True)
    rates = [one.seconds / other.seconds for one, other in zip(plain, cluster, strict=True)]
    firsts = [other.first / one.first for one, other in zip(plain, cluster, strict=True)]
    for name, values in (("tokens/s", rates), ("first token", firsts)):
        print(f"{name}: {interval(values)}; rounds " + " ".join(f"{value:.2f}" for value in values))
    print(
        f"plain: {tokens / statistics.median(one.seconds for one in plain):.0f} tokens/s, "
        f"{1000 * statistics.median(one.first for one in plain):.0f} ms to the first"
    )
    for name, some in (("plain", plain), ("cluster", cluster)):
        seconds = sum(one.seconds for one in some)
        total = sum((one.busy for one in some), Counter[str]())
        cells = [f"{what} {1e6 * (total[what] - idle[what] * seconds) / tokens / len(some):.0f}" for what in total]
        print(f"{name}, µs of processor time a token beyond idle: " + ", ".join(cells))
    print("idle, % of a core: " + ", ".join(f"{what} {100 * share:.1f}" for what, share in idle.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=1, help="of each stream in a round")
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--output-len", type=int, default=48)
    args, flags = parser.parse_known_args()
    watch, rng, deadline = Watch(), Random(0), time.monotonic() + args.seconds
    with ExitStack() as stack:
        servers = [started("serve", "--port", "0", *flags), started("cluster", "serve", "--port", "0", *flags)]
        for server in servers:
            stack.enter_context(server)
            stack.callback(server.terminate)
        urls = [address(server) for server in servers]
        for url in urls * _WARM_ROUNDS:
            asyncio.run(one_round(url, args, rng, watch))
        watch.find(psutil.Process(servers[0].pid))
        before = watch.taken()
        time.sleep(_IDLE_SECONDS)
        idle = watch.taken()
        idle.subtract(before)
        idle = Counter({name: taken / _IDLE_SECONDS for name, taken in idle.items()})
        rounds = list[list[Round]]()
        while time.monotonic() < deadline:
            order = [0, 1] if len(rounds) % 2 == 0 else [1, 0]
            found = dict[int, Round]()
            for index in order:
                with watch.paused() if index == 0 else nullcontext():
                    found[index] = asyncio.run(one_round(urls[index], args, rng, watch))
            rounds.append([found[0], found[1]])
        tell(rounds, idle, args.streams * args.requests * args.output_len)


if __name__ == "__main__":
    run_script(main)
