"""What a step takes on a CPU, by its new tokens and by how much lies before them.

    python -m benchmark.cpu.step_cost [DIRECTORY] [--threads 1] [--rounds 5] [--longest 30720]

DIRECTORY: with a `config.json`; weights are random; by default the built-in model's. Each share is `new` tokens of a
request that has `context` tokens in the cache. Prints a Markdown table: processor time of a step, the median of rounds
that take turns in random order, and in plain tokens (of a step of 512 tokens without any context).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minisgl.benchmark.metrics import describe_commit, describe_machine
from minisgl.config.families import read_model_config
from minisgl.config.locate import DEMO_MODEL
from minisgl.config.runtime import EngineConfig
from minisgl.core import Admission, PageUpdate, SamplingParams, ScheduledReq, StateCopy, StepPlan
from minisgl.engine.cpu import CpuRunner

GREEDY = SamplingParams(temperature=0.0, seed=0)
PAGE, ROWS, PLAIN = 16, 128, 512
SHARES = (  # how many, new tokens and context of each
    *((1, 512, 0), (1, 256, 0), (1, 128, 0), (1, 64, 0), (16, 32, 0), (64, 8, 0)),
    *((1, 512, 1536), (1, 512, 7680), (1, 512, 30208), (1, 128, 30208), (1, 64, 30208), (1, 16, 30208)),
    *((45, 11, 1900), (16, 32, 1900), (8, 64, 1900), (64, 4, 1900), (64, 2, 1900), (64, 1, 1900), (16, 1, 1900)),
    *((1, 4, 30208), (1, 1, 30208), (8, 1, 7680), (8, 2, 7680), (8, 16, 7680)),
)


def config_of(directory: Path, rows: int, longest: int, num_tokens: int, **options: Any) -> EngineConfig:
    """For a model with random weights and prompts of up to `longest` tokens, in a cache of `num_tokens`."""
    return EngineConfig(
        model_path=str(directory),
        model=replace(read_model_config(directory), max_position=longest, mtp=()),
        device="cpu",
        tp_size=1,
        init_method="",
        num_pages=num_tokens // PAGE,
        page_size=PAGE,
        max_running_requests=rows,
        max_prefill_length=1024,
        max_seq_len=longest,
        prefill_backend="cpu",
        decode_backend="cpu",
        dummy_weight=True,
        cpu_kernels=True,
        **options,
    )


class Engine:
    """A runner whose rows all have the same pages, as requests that share a prefix do."""

    def __init__(self, config: EngineConfig) -> None:
        self._runner, self._step, self._config = CpuRunner(config, rank=0), 0, config
        prompt = np.random.default_rng(0).integers(3, 1000, config.max_seq_len, dtype=np.int32)
        pages = tuple(range(config.max_seq_len // PAGE))
        admissions = tuple(Admission(row, prompt, GREEDY, len(prompt)) for row in range(ROWS))
        updates = tuple(PageUpdate(row, 0, pages) for row in range(ROWS))
        states = tuple(StateCopy(-1, row) for row in range(ROWS))
        first = StepPlan(0, admissions, updates, (ScheduledReq(0, 0, 1, 1),), states=states)
        self._runner.submit(first).result()
        for start in range(0, len(prompt), PLAIN):  # so that the cache has numbers in it
            self.run(1, min(PLAIN, len(prompt) - start), start)

    def run(self, num: int, new: int, context: int) -> float:
        """Seconds of processor time, of all threads."""
        self._step += 1
        reqs = tuple(ScheduledReq(row, context, new, 1) for row in range(num))
        plan = StepPlan(self._step, (), (), reqs, num_decode=num * (new == 1))
        begin = time.process_time()
        self._runner.submit(plan).result()
        return time.process_time() - begin

    def close(self) -> None:
        self._runner.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, nargs="?", default=DEMO_MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-cache-dtype", default="float16")
    parser.add_argument("--quantization")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=30_720)
    args = parser.parse_args()
    kinds = {"dtype": args.dtype, "kv_cache_dtype": args.kv_cache_dtype, "quantization": args.quantization}
    engine = Engine(config_of(args.directory, ROWS, args.longest, args.longest, num_threads=args.threads, **kinds))
    loads = [load for load in SHARES if load[1] + load[2] <= args.longest]
    times: dict[tuple[int, int, int], list[float]] = {load: [] for load in loads}
    for i in range(args.rounds + 1):
        for load in random.sample(loads, len(loads)):
            times[load] += [engine.run(*load)] if i else []  # the first round warms up
    print(f"{describe_machine()}, {describe_commit()}, {args.directory.name}, {args.quantization or args.dtype}\n")
    print("| shares | new | context | ms | in tokens | of which new | pairs a token's worth |\n|" + "---|" * 7)
    token = statistics.median(times[1, PLAIN, 0]) / PLAIN
    for num, new, context in loads:
        seconds = statistics.median(times[num, new, context])
        tokens, pairs = seconds / token, num * new * context
        worth = f"{pairs / (tokens - num * new):.0f}" if context and tokens > num * new else ""
        print(f"| {num} | {new} | {context} | {1e3 * seconds:.1f} | {tokens:.0f} | {num * new} | {worth} |", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
