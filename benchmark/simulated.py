"""Simulated against measured: the same requests for servers behind the cluster's router, and for `minisgl simulate`.

    python benchmark/simulated.py measure run.json --replicas 2      servers with one thread each: training, three loads
    python benchmark/simulated.py compare run.json,again.json        beside what is simulated

The built-in model, its prompts made of ids, three loads: all at once; at random times, prompts that begin alike; bursts
of long prompts. What steps take, and HTTP around them, is fitted to a training load of the same servers, with other
requests: their traces tell of each step what it was made of and how long it took, so that what shares the cores with it
counts as it does later. `others` is the share of the machine's processor time that went to other programs: with more
than a few per cent the figures are worth nothing. Even so a request now and then is held up: of several runs, each
request counts with the median of its times.
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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from minisgl import simulate
from minisgl.benchmark import run_script
from minisgl.benchmark.metrics import Record
from minisgl.cluster.router import RUNNING_TOKENS, PrefixRouter, Prompt, text_blocks
from minisgl.config.runtime import SchedulerConfig
from minisgl.simulate.cluster import Simulation
from minisgl.simulate.times import Step, fitted
from minisgl.simulate.workload import Request, generate

# The flags of `minisgl simulate`; --rate and --prefixes are for each replica.
WARM_UP = {"warm-up": "--rate 5 --duration 3 --prefix-len 0 --input-len 20:800 --output-len 4:24 --seed 7"}
TRAINING = {
    "training at once": "--rate 40000 --duration 0.001 --prefix-len 0 --input-len 10:500 --output-len 4:64 --seed 8",
    "training": "--rate 4 --duration 12 --prefixes 3 --prefix-len 90 --input-len 20:800 --output-len 2:32 --seed 9 "
    "--burstiness 2",
}
LOADS = {
    "at once": "--rate 50000 --duration 0.001 --prefix-len 0 --input-len 20:400 --output-len 8:48",
    "alike": "--rate 4 --duration 10 --prefixes 3 --prefix-len 320 --input-len 100:500 --output-len 4:24",
    "bursts": "--rate 3.5 --duration 10 --prefix-len 0 --input-len 200:900 --output-len 4:16 --burstiness 3",
}
ID_BYTES = 4
FIRST_ID = 16  # ids of the loads follow one another from here on, so that none finds another's prompts in a cache


def loads(num_replicas: int) -> dict[str, list[Request]]:
    """In order of time, with ids that the model has."""
    found, offset = {}, FIRST_ID
    for name, flags in (WARM_UP | TRAINING | LOADS).items():
        args = simulate.make_parser().parse_args([*flags.split(), "--turns", "1"])
        requests = [session[0] for session in generate(args, num_replicas, max_seq_len=2048)]
        ids = dict.fromkeys(token for request in requests for token, _ in request.segments)
        names = {token: number for number, token in enumerate(ids, offset)}
        offset += len(names)
        found[name] = [
            replace(one, segments=tuple((names[token], length) for token, length in one.segments)) for one in requests
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
        return system.user + system.nice + system.system + system.softirq + system.irq + system.steal, mine

    begun, (busy, mine) = time.perf_counter(), taken()
    yield
    seconds, (later, more) = time.perf_counter() - begun, taken()
    cores = os.cpu_count() or 1
    others = max(0.0, later - busy - more + mine) / seconds / cores
    told |= {"seconds": seconds, "others": others, "busy": (later - busy) / seconds / cores}


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
    client: aiohttp.ClientSession, url: str, ids: list[int], output_len: int, begun: Callable[[], None]
) -> tuple[str, list[float]]:
    """The request's id, and when each piece of the answer came. begun: called with the first.
    Raises: RuntimeError when it does not end."""
    body = {"model": "minisgl-demo", "prompt": ids, "max_tokens": output_len, "ignore_eos": True, "stream": True}
    times, last = list[float](), b""
    async with client.post(f"{url}/completions", json=body | {"temperature": 0}) as response:
        async for part in response.content.iter_any():
            begun() if not times else None
            times.append(time.time())
            last = part
    if not last.endswith(b"data: [DONE]\n\n"):
        raise RuntimeError(f"HTTP {response.status} from {url}")
    return response.headers["x-request-id"], times


def token_ids(request: Request) -> list[int]:
    return np.repeat([token for token, _ in request.segments], [length for _, length in request.segments]).tolist()


async def send(urls: Sequence[str], requests: Sequence[Request]) -> list[tuple[str, Record]]:
    """Each at its time, to the replica that the router chooses: with the id of each."""
    router = PrefixRouter("prefix", 0)
    router.bytes_per_token = ID_BYTES
    router.set_replicas(urls)
    prompts = [token_ids(request) for request in requests]
    begun = time.time() + 0.2

    async def one(client: aiohttp.ClientSession, request: Request, ids: list[int]) -> tuple[str, Record]:
        start = begun + request.time
        await asyncio.sleep(start - time.time())
        text = np.array(ids, np.int32).tobytes()
        prompt = Prompt(text_blocks(text), len(text), request.session)
        url = router.choose(prompt) or ""
        hold = router.place(url, prompt)
        name, times = await stream(client, url, ids, request.output_len, partial(hold, RUNNING_TOKENS))
        hold(0.0)
        arrivals = tuple(moment - start for moment in times)
        return name, Record(request.time, arrivals[-1], arrivals, len(ids), request.output_len)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as client:
        return list(await asyncio.gather(*(one(client, *pair) for pair in zip(requests, prompts, strict=True))))


async def get(url: str, path: str) -> Any:
    async with aiohttp.ClientSession() as client, client.get(url.removesuffix("/v1") + path) as response:
        return await response.json()


def steps_of(told: dict[str, Any], first: int) -> tuple[list[Step], int]:
    """What a server's trace tells of its steps from one on, and the number of the next. Those with requests that it
    does not remember are left out."""
    outputs = {output["uid"]: output for request in told["requests"] for output in request["outputs"]}
    computed = Counter({uid: output["num_cached"] for uid, output in outputs.items()})
    steps = list[Step]()
    for step in told["steps"]:
        shares = [(computed[uid], count) for _, uid, count, _ in step["rows"]]
        computed.update({uid: count for _, uid, count, _ in step["rows"]})
        if step["step"] >= first and step["device_ms"] and all(uid in outputs for _, uid, *_ in step["rows"]):
            steps.append((shares, step["device_ms"] / 1000))
    return steps, told["steps"][-1]["step"] + 1


def around(told: dict[str, Any], sent: Sequence[tuple[str, Record]]) -> list[float]:
    """Of each request that a server's trace tells of, the seconds between its client and its scheduler, both ways."""
    events = {one["id"]: {event["name"]: event for event in one["outputs"][0]["events"]} for one in told["requests"]}
    found = [(events[name], record) for name, record in sent if name in events]
    return [record.arrivals[0] - (own["detokenized"]["first"] - own["queued"]["time"]) for own, record in found]


def measure(args: argparse.Namespace) -> None:
    document: dict[str, Any] = {"replicas": args.replicas, "cores": os.cpu_count(), "loads": {}}
    with serving(args.replicas) as urls:
        info = asyncio.run(get(urls[0], "/server_info"))
        document["config"] = {name: info[name] for name in SchedulerConfig.__dataclass_fields__ if name in info}
        nexts = [0] * args.replicas
        for name, requests in loads(args.replicas).items():
            told: dict[str, Any] = {"steps": [], "around": []}
            with watched(told):
                sent = asyncio.run(send(urls, requests))
            for index, url in enumerate(urls):
                traced = asyncio.run(get(url, f"/trace?format=json&steps=2048&requests={len(requests)}"))
                steps, nexts[index] = steps_of(traced, nexts[index])
                told["steps"] += steps
                told["around"] += around(traced, sent)
            document["loads"][name] = told | {"records": [asdict(record) for _, record in sent]}
            print(f"{name:18}{told['seconds']:6.1f} s   others {100 * told['others']:.1f} %", flush=True)
    Path(args.file).write_text(json.dumps(document))


def figures(records: Sequence[Record]) -> dict[str, float]:
    """Output tokens/s until the last one came, and percentiles of the time to the first one in milliseconds."""
    until = max(record.start + record.e2e for record in records)
    p50, p90 = np.percentile([1000 * record.arrivals[0] for record in records], [50, 90])
    return {"tokens/s": sum(record.num_output for record in records) / until, "TTFT p50": float(p50), "p90": float(p90)}


def medians(runs: Sequence[dict[str, Any]]) -> list[Record]:
    """Of each request. runs: of one load."""
    same = zip(*(run["records"] for run in runs), strict=True)
    return [
        Record(
            one[0]["start"],
            statistics.median(run["e2e"] for run in one),
            (statistics.median(run["arrivals"][0] for run in one),),
            one[0]["num_prompt"],
            one[0]["num_output"],
        )
        for one in same
    ]


def compare(args: argparse.Namespace) -> None:
    documents = [json.loads(Path(file).read_text()) for file in args.file.split(",")]
    trained = [document["loads"][name] for document in documents for name in TRAINING]
    served = fitted("", SchedulerConfig(**documents[0]["config"]), [step for one in trained for step in one["steps"]])
    paced = [seconds for document in documents for seconds in document["loads"]["training"]["around"]]
    served = replace(served, overhead=statistics.median(paced))
    num_replicas = documents[0]["replicas"]
    print(f"{num_replicas} replicas{served.about}; overhead {1000 * served.overhead:.1f} ms")
    for name, requests in loads(num_replicas).items():
        runs = [document["loads"][name] for document in documents]
        measured = figures(medians(runs))
        simulation = Simulation(served, num_replicas, "prefix")
        simulation.run([[request] for request in requests])
        expected = figures(simulation.records)
        cells = [f"{key} {expected[key]:.1f} / {is_:.1f} = {expected[key] / is_:.2f}" for key, is_ in measured.items()]
        others = 100 * max(run["others"] for run in runs)
        print(f"{name:18}{len(requests):4} requests   {'   '.join(cells)}   others {others:.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure")
    one.add_argument("file")
    one.add_argument("--replicas", type=int, default=1)
    one.set_defaults(run=measure)
    one = commands.add_parser("compare")
    one.add_argument("file", help="several, with commas between them, are runs of the same")
    one.set_defaults(run=compare)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_script(main)
