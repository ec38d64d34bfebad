"""Steps of a model on a CPU: all layers in one call of C++, beside the same kernels layer by layer.

    python -m benchmark.cpu.whole_step DIRECTORY [--quantization int4] [--threads 2] [--rounds 9]

DIRECTORY: with a `config.json`; weights are random. Both engines are in one process, and take turns in random order.
Prints a Markdown table: medians over the rounds in milliseconds, and the ratios (the first to the second).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np

from minisgl.benchmark.metrics import describe_commit, describe_machine
from minisgl.config.families import read_model_config
from minisgl.config.runtime import EngineConfig
from minisgl.core import Admission, PageUpdate, SamplingParams, ScheduledReq, StateCopy, StepPlan
from minisgl.engine.cpu import CpuRunner
from minisgl.models.decoder import DecoderModel

GREEDY = SamplingParams(temperature=0.0, seed=0)
PAGE, CONTEXT, STEPS = 16, 64, 12  # tokens of a page, of a stream's prompt, and decode steps of a round


class Engine:
    """One of the two. in_one: all layers in one call."""

    def __init__(self, config: EngineConfig, in_one: bool) -> None:
        self._pages_per_row = config.max_seq_len // PAGE
        with patch.object(DecoderModel, "cpu_specs", DecoderModel.cpu_specs if in_one else lambda _: None):
            self._runner = CpuRunner(config, rank=0)
        assert (type(self._runner.steps.forward).__name__ == "WholeStep") == in_one
        self._step = 0

    def _run(self, plan: StepPlan) -> float:
        begin = time.perf_counter()
        self._runner.submit(plan).result()
        return time.perf_counter() - begin

    def prefill(self, rows: int, length: int) -> float:
        """Seconds that prompts of `length` take, of so many rows."""
        prompt = np.random.default_rng(0).integers(3, 1000, length, dtype=np.int32)
        admissions = tuple(Admission(row, prompt, GREEDY, length) for row in range(rows))
        first = [row * self._pages_per_row for row in range(rows)]
        pages = tuple(
            PageUpdate(row, 0, tuple(range(at, at + self._pages_per_row)))
            for row, at in zip(range(rows), first, strict=True)
        )
        reqs = tuple(ScheduledReq(row, 0, length, 1) for row in range(rows))
        states = tuple(StateCopy(-1, row) for row in range(rows))
        self._step += 1
        return self._run(StepPlan(self._step, admissions, pages, reqs)._replace(states=states))

    def decode(self, rows: int) -> float:
        """Seconds of a decode step of so many rows, the median."""
        self.prefill(rows, CONTEXT)
        times = []
        for i in range(STEPS):
            reqs = tuple(ScheduledReq(row, CONTEXT + i, 1, 1) for row in range(rows))
            self._step += 1
            times.append(self._run(StepPlan(self._step, (), (), reqs, rows)))
        return statistics.median(times)

    def close(self) -> None:
        self._runner.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    config = EngineConfig(
        model_path=str(args.directory),
        model=read_model_config(args.directory),
        dtype=args.dtype,
        device="cpu",
        tp_size=1,
        init_method="",
        num_pages=16 * 640 // PAGE,
        page_size=PAGE,
        max_running_requests=16,
        max_prefill_length=8192,
        max_seq_len=640,
        prefill_backend="cpu",
        decode_backend="cpu",
        num_threads=args.threads,
        dummy_weight=True,
        kv_cache_dtype="bfloat16",
        cpu_kernels=True,
        quantization=args.quantization,
    )
    engines = {in_one: Engine(config, in_one) for in_one in (True, False)}
    print(f"{describe_machine()}, {describe_commit()}, {args.directory.name}, {args.quantization or args.dtype}\n")
    print("| | in one, ms | by layer, ms | ratio | all ratios |\n|---|---|---|---|---|")
    loads = {f"decode, {rows}": partial(Engine.decode, rows=rows) for rows in (1, 8, 16)}
    loads["prefill, 512"] = partial(Engine.prefill, rows=1, length=512)
    for name, load in loads.items():
        found: dict[bool, list[float]] = {True: [], False: []}
        for i in range(args.rounds + 1):
            for in_one in random.sample((True, False), 2):
                seconds = load(engines[in_one])
                found[in_one] += [1000 * seconds] if i else []  # the first one warms up
        ratios = [a / b for a, b in zip(found[True], found[False], strict=True)]
        ours, theirs = (statistics.median(found[in_one]) for in_one in (True, False))
        told = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {ours:.2f} | {theirs:.2f} | {statistics.median(ratios):.2f} | {told} |", flush=True)
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
