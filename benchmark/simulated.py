"""Simulated against measured: the same requests for servers behind the cluster's router, and for `minisgl simulate`.

    python benchmark/simulated.py calibrate steps0.json steps1.json     minisgl bench --calibrate, all at the same time
    python benchmark/simulated.py measure run.json --replicas 2         servers with one thread each, three loads
    python benchmark/simulated.py compare run.json,again.json steps0.json steps1.json

The built-in model, its prompts made of ids, three loads: all at once; at random times, prompts that begin alike; bursts
of long prompts. The overhead of HTTP is measured on the idle servers. `others` is the share of the machine's processor
time that went to other programs: with more than a few per cent the figures are worth nothing. Even so a request now and
then is held up: of several runs, each request counts with the median of its times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from minisgl import simulate
from minisgl.benchmark import run_script
from minisgl.benchmark.metrics import Record
from minisgl.cluster.router import PrefixRouter, Prompt, text_blocks
from minisgl.simulate.cluster import Simulation
from minisgl.simulate.times import Served, calibrated
from minisgl.simulate.workload import Request, Session, generate

LOADS = {  # the flags of `minisgl simulate`; --rate and --prefixes are for each replica
    "at once": "--rate 50000 --duration 0.001 --prefix-len 0 --input-len 20:400 --output-len 8:48",
    "alike": "--rate 4 --duration 10 --prefixes 3 --prefix-len 320 --input-len 100:500 --output-len 4:24",
    "bursts": "--rate 3.5 --duration 10 --prefix-len 0 --input-len 200:900 --output-len 4:16 --burstiness 3",
}
ID_BYTES = 4
MAX_LEN = 2048  # the model's
FIRST_ID = 16  # ids of the loads follow one another from here on, so that none finds another's prompts in a cache


def loads(num_replicas: int) -> dict[str, list[Session]]:
    """With ids that the model has."""
    found, offset = {}, FIRST_ID
    for name, flags in LOADS.items():
        args = simulate.make_parser().parse_args([*flags.split(), "--turns", "1"])
        sessions = generate(args, num_replicas, MAX_LEN)
        ids = dict.fromkeys(token for session in sessions for token, _ in session[0].segments)
        names = {token: number for number, token in enumerate(ids, offset)}
        offset += len(names)
        found[name] = [
            [
                replace(turn, segments=tuple((names[token], length) for token, length in turn.segments))
                for turn in session
            ]
            for session in sessions
        ]
    assert offset < 4096, "the model has no more ids"
    return found


@contextmanager
def watched(told: dict[str, Any]) -> Iterator[None]:
    """Tells how long this took, and the share of all processor time that others than this process's tree had."""

    def taken() -> tuple[float, float]:
        system, me = psutil.cpu_times(), psutil.Process()
        tree = [one.cpu_times() for one in (me, *me.children(recursive=True))]
        mine = sum(times.user + times.system for times in tree) + tree[0].children_user + tree[0].children_system
        return system.user + system.nice + system.system + system.softirq + system.irq, mine

    begun, (busy, mine) = time.perf_counter(), taken()
    yield
    seconds, (later, more) = time.perf_counter() - begun, taken()
    others = max(0.0, later - busy - more + mine) / seconds / (os.cpu_count() or 1)
    told |= {"seconds": seconds, "others": others}


def calibrate(args: argparse.Namespace) -> None:
    told: dict[str, Any] = {}
    flags = ["--cpu-threads", "1", "--num-prompts", str(args.num_prompts)]
    command = [sys.executable, "-m", "minisgl", "bench", "--calibrate"]
    with watched(told), ExitStack() as stack:
        for file in args.files:
            stack.enter_context(subprocess.Popen([*command, file, *flags], stdout=subprocess.DEVNULL))
    print(f"calibrated in {told['seconds']:.1f} s; others {100 * told['others']:.1f} %")


@contextmanager
def serving(num_replicas: int) -> Iterator[list[str]]:
    """Addresses of so many servers with one thread each."""
    command = [sys.executable, "-m", "minisgl", "--port", "0", "--cpu-threads", "1"]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            for _ in range(num_replicas)
        ]
        for server in servers:
            stack.callback(server.terminate)
        yield [next(line.split()[-1] for line in server.stdout or () if "http" in line) for server in servers]


async def stream(
    client: httpx.AsyncClient, url: str, ids: list[int], output_len: int, begun: Callable[[], None] = lambda: None
) -> list[float]:
    """When each piece of the answer came. begun: called with the first. Raises: RuntimeError when it does not end."""
    body = {"model": "minisgl-demo", "prompt": ids, "max_tokens": output_len, "ignore_eos": True, "stream": True}
    times, ended = list[float](), False
    async with client.stream("POST", f"{url}/completions", json=body | {"temperature": 0}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                begun() if not times else None
                times.append(time.perf_counter())
            ended = ended or line == "data: [DONE]"
    if not ended:
        raise RuntimeError(f"HTTP {response.status_code} from {url}")
    return times


def token_ids(request: Request) -> list[int]:
    return np.repeat([token for token, _ in request.segments], [length for _, length in request.segments]).tolist()


async def send(urls: Sequence[str], sessions: Sequence[Session]) -> list[Record]:
    """Each at its time, to the replica that the router chooses."""
    router = PrefixRouter("prefix", 0)
    router.bytes_per_token = ID_BYTES
    router.set_replicas(urls)
    begun = time.perf_counter()

    async def one(client: httpx.AsyncClient, request: Request) -> Record:
        await asyncio.sleep(begun + request.time - time.perf_counter())
        ids = token_ids(request)
        text = np.array(ids, np.int32).tobytes()
        prompt = Prompt(text_blocks(text), len(text), request.place)
        url = router.choose(prompt) or ""
        placed = router.place(url, prompt)
        times = await stream(client, url, ids, request.output_len, placed.hold)
        placed.hold(0.0)
        start = begun + request.time
        arrivals = tuple(moment - start for moment in times)
        return Record(request.time, arrivals[-1], arrivals, len(ids), request.output_len)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=60, trust_env=False) as client:
        return list(await asyncio.gather(*(one(client, session[0]) for session in sessions)))


async def probe(url: str) -> list[float]:
    """Seconds to the first token of short requests, one after the other: of 16 tokens, and one."""
    times = []
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        for number in range(24):
            begun = time.perf_counter()
            times.append((await stream(client, url, [4000 + number] * 16, 1))[0] - begun)
    return times[4:]


def measure(args: argparse.Namespace) -> None:
    document: dict[str, Any] = {"replicas": args.replicas, "cores": os.cpu_count(), "loads": {}}
    with serving(args.replicas) as urls:
        document["probes"] = [asyncio.run(probe(url)) for url in urls]
        for name, sessions in ((name, load) for name, load in loads(args.replicas).items() if name in args.loads):
            told: dict[str, Any] = {}
            with watched(told):
                told["records"] = [asdict(record) for record in asyncio.run(send(urls, sessions))]
            document["loads"] |= {name: told}
    Path(args.file).write_text(json.dumps(document))


def figures(records: Sequence[Record]) -> dict[str, float]:
    """Output tokens/s until the last one came, and percentiles of the time to the first one in milliseconds."""
    until = max(record.start + record.e2e for record in records)
    p50, p90 = np.percentile([1000 * record.arrivals[0] for record in records], [50, 90])
    return {"tokens/s": sum(record.num_output for record in records) / until, "TTFT p50": float(p50), "p90": float(p90)}


def medians(runs: Sequence[dict[str, Any]]) -> list[Record]:
    """Of each request. runs: of one load."""
    by_start = (sorted((Record(**one) for one in run["records"]), key=lambda one: one.start) for run in runs)
    return [
        replace(
            same[0],
            arrivals=(statistics.median(one.arrivals[0] for one in same),),
            e2e=statistics.median(one.e2e for one in same),
        )
        for same in zip(*by_start, strict=True)
    ]


def compare(args: argparse.Namespace) -> None:
    documents = [json.loads(Path(file).read_text()) for file in args.file.split(",")]
    document = documents[0]
    fits = [calibrated(file, None) for file in args.calibrations]
    means = [statistics.mean(column) for column in zip(*(fit.coefficients for fit in fits), strict=True)]
    served: Served = replace(fits[0], coefficients=means)
    step = Simulation(served, 1, "random")
    step.run([[Request(0.0, ((1, 16),), 1, 2, "")]])
    overhead = max(
        0.0, statistics.median(chain(*(probes for one in documents for probes in one["probes"]))) - step.records[0].e2e
    )
    print(f"{document['replicas']} replicas; {served.about}; overhead {1000 * overhead:.1f} ms")
    for name, sessions in loads(document["replicas"]).items():
        if name not in document["loads"]:
            continue
        runs = [one["loads"][name] for one in documents]
        measured = figures(medians(runs))
        simulation = Simulation(replace(served, overhead=overhead), document["replicas"], "prefix")
        simulation.run(sessions)
        expected = figures(simulation.records)
        cells = [f"{key} {expected[key]:.1f} / {is_:.1f} = {expected[key] / is_:.2f}" for key, is_ in measured.items()]
        others = 100 * max(run["others"] for run in runs)
        print(f"{name:8}{len(sessions):4} requests   {'   '.join(cells)}   others {others:.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("calibrate")
    one.add_argument("files", nargs="+")
    one.add_argument("--num-prompts", type=int, default=140)
    one.set_defaults(run=calibrate)
    one = commands.add_parser("measure")
    one.add_argument("file")
    one.add_argument("--replicas", type=int, default=1)
    one.add_argument("--loads", nargs="+", default=[*LOADS], choices=[*LOADS])
    one.set_defaults(run=measure)
    one = commands.add_parser("compare")
    one.add_argument("file")
    one.add_argument("calibrations", nargs="+")
    one.set_defaults(run=compare)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_script(main)
