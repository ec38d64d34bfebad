"""How long a running stream waits beside requests with long contexts, with attention counted in steps and without.

    python -m benchmark.cpu.stream_gaps [--requests 200] [--rounds 3] [--long 12000]

The built-in model's shape with random weights, one thread; planner and engine take turns, so that all time is a
step's. Both ways take turns in one process. Prints processor time of the steps that the stream is in, and of all, and
the ratio of each (counted to not counted) for all rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from benchmark.cpu.step_cost import PAGE, config_of
from minisgl.benchmark.metrics import describe_commit, describe_machine
from minisgl.config.device import attention_tokens
from minisgl.config.locate import DEMO_MODEL
from minisgl.config.runtime import SchedulerConfig
from minisgl.core import SamplingParams
from minisgl.engine.cpu import CpuRunner
from minisgl.scheduler.planner import Planner

Load = Callable[[Planner, int], None]  # adds requests, from a uid on


def prompt(size: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 4000), k=size)


def outputs(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, seed=0)


def alike(planner: Planner, uid: int, count: int) -> None:
    """The same 1,900 tokens, which are in the cache, and 11 of their own."""
    for i in range(count):
        planner.add(uid + i, prompt(1900, 1) + prompt(11, uid + i), outputs(4))


def alone(planner: Planner, uid: int, size: int) -> None:
    planner.add(uid, prompt(size, uid), outputs(1))


def usual(planner: Planner, uid: int) -> None:
    """64 chats of 100 to 500 tokens, and as many outputs as a chat has."""
    rng = random.Random(0)
    for i in range(64):
        planner.add(uid + i, prompt(rng.randint(100, 500), uid + i), outputs(rng.randint(32, 128)))


def run(planner: Planner, runner: CpuRunner, load: Load, uid: int, has_stream: bool) -> tuple[float, float, float]:
    """→ the longest and the median step that a stream was in while there was other work, and all steps: seconds."""
    planner.add(uid, prompt(1900, 1), outputs(1))
    if has_stream:
        planner.add(uid + 1, prompt(20, 2), outputs(10_000))
    while planner.waiting or any(req.num_computed < req.prompt_len for req in planner.running):
        turn(planner, runner)
    load(planner, uid + 2)
    seconds = []
    while len(planner.reqs) > has_stream:
        seconds.append(turn(planner, runner))
    for left in list(planner.reqs):
        planner.abort(left)
    return max(seconds), statistics.median(seconds), sum(seconds)


def turn(planner: Planner, runner: CpuRunner) -> float:
    begin = time.process_time()
    planned = planner.plan()
    assert planned is not None
    planner.retire(runner.submit(planned.plan).result())
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", type=int, default=12_000)
    parser.add_argument("--only", default="", help="loads whose names have this")
    args = parser.parse_args()
    kinds = {"dtype": "bfloat16", "kv_cache_dtype": "float16", "num_threads": 1}
    engine = config_of(DEMO_MODEL, 256, args.long + 16, 120_000, **kinds)
    runner, span = CpuRunner(engine, rank=0), attention_tokens(engine)
    config = SchedulerConfig(256, 512, engine.max_seq_len, engine.num_pages, PAGE, attention_tokens=span)
    configs = {True: config, False: replace(config, attention_tokens=1 << 40)}
    loads: dict[str, tuple[Load, bool]] = {
        f"a stream, {args.requests} of 1,900 cached": (partial(alike, count=args.requests), True),
        f"a stream, a prompt of {args.long}": (partial(alone, size=args.long), True),
        f"a prompt of {args.long} alone": (partial(alone, size=args.long), False),
        "a prompt of 1,900 alone": (partial(alone, size=1900), False),
        "64 chats": (usual, False),
    }
    print(f"{describe_machine()}, {describe_commit()}; attention counts, over {span} tokens as one more, or does not\n")
    print("| | longest step, ms | median, ms | all, s | ratios of the longest | of all |\n|" + "---|" * 6)
    chosen = {name: load for name, load in loads.items() if args.only in name}
    for index, (name, (load, has_stream)) in enumerate(chosen.items()):
        found: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
        for i in range(args.rounds):
            for counts in random.sample((True, False), 2):
                uid = (index * args.rounds + i) * 10_000
                found[counts].append(run(Planner(configs[counts]), runner, load, uid, has_stream))
        pairs = [*zip(found[True], found[False], strict=True)]
        middle = {
            counts: [statistics.median(column) for column in zip(*rows, strict=True)] for counts, rows in found.items()
        }
        shown = [" / ".join(f"{scale * middle[c][k]:.{d}f}" for c in (True, False)) for k, scale, d in COLUMNS]
        ratios = [" ".join(f"{a[k] / b[k]:.2f}" for a, b in pairs) for k in (0, 2)]
        print(f"| {name} | {' | '.join([*shown, *ratios])} |", flush=True)
    runner.close()


COLUMNS = ((0, 1e3, 0), (1, 1e3, 0), (2, 1, 2))  # of what `run` returns: scale, decimals

if __name__ == "__main__":
    main()
