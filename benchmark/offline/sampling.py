"""What sampling, penalties, biases, masks and log-probabilities cost in a decode step of a CPU's engine.

    python benchmark/offline/sampling.py [--shape NAME|DIR] [--streams 64] [--len 64] [--steps 3] [--rounds 20]
                                         [--seconds 75] [--only KIND …] [--json FILE]

One engine; the kinds take turns, each with `--steps` steps of which the median counts, so that what else the machine
does falls on all. Every row samples the token at the same position again and again, behind `--len` tokens, half of them
output. Without `--shape` it is the built-in model. Prints medians, and that of the rounds' ratios to their plain steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minisgl.benchmark import run_script
from minisgl.benchmark.metrics import describe_machine
from minisgl.benchmark.shapes import write_shape
from minisgl.config.families import read_model_config
from minisgl.config.locate import DEMO_MODEL
from minisgl.config.runtime import EngineConfig
from minisgl.core import MASK_READY, Admission, PageUpdate, SamplingParams, ScheduledReq, StepPlan
from minisgl.engine.cpu import create_steps
from minisgl.utils.math import div_ceil

PAGE_SIZE, ENDS = 16, (2, 3)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, once more": {},
    "greedy": {"temperature": 0.0},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50": {"top_k": 50},
    "min-p 0.05": {"min_p": 0.05},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": ((5, 1.0), (6, -1.0))},
    "300 biases": {"logit_bias": tuple((token, 1.0) for token in range(300))},
    "min_tokens": {"min_tokens": 10**6},
    "logprobs, 5": {"logprobs": 5},
    "logprobs, 20": {"logprobs": 20},
    "masks": {},
}


class Steps:
    """An engine with a request in each row, which has `length` tokens."""

    def __init__(self, path: Path, num_rows: int, length: int, dummy_weight: bool) -> None:
        model, pages = read_model_config(path), div_ceil(length + 1, PAGE_SIZE)
        config = EngineConfig(
            str(path), model, "bfloat16", "cpu", 1, num_rows * pages, PAGE_SIZE, num_rows, max(length, num_rows),
            length + 1, "cpu", "cpu", 2, dummy_weight, kv_cache_dtype="bfloat16", cpu_kernels=True,
        )  # fmt: skip
        self._steps, self._num = create_steps(config, 0), 0
        rng = np.random.default_rng(0)
        self._ids = rng.integers(0, min(model.vocab_size, 4000), (num_rows, length)).astype(np.int32)
        self._pages = tuple(PageUpdate(row, 0, tuple(range(row * pages, (row + 1) * pages))) for row in range(num_rows))
        self._reqs = tuple(ScheduledReq(row, length - 1, 1, 1) for row in range(num_rows))
        self.shape = num_rows, div_ceil(model.vocab_size, 32)
        self._words = rng.integers(-(2**31), 2**31, self.shape).astype(np.int32)

    def __call__(
        self, words: npt.NDArray[np.int32], states: npt.NDArray[np.int32], ids: npt.NDArray[np.int32] | None
    ) -> None:
        """As `Masks`, of all rows."""
        assert ids is None
        words[:], states[:] = self._words, MASK_READY

    def time(self, kind: str, num_steps: int) -> float:
        """Median seconds of a step, once the requests are of this kind."""
        num_rows, length = self._ids.shape
        masked = tuple(range(num_rows)) if kind == "masks" else ()
        params = [SamplingParams(**{"temperature": 0.8, "seed": row} | KINDS[kind]) for row in range(num_rows)]
        admissions = tuple(Admission(row, self._ids[row], params[row], length // 2, ENDS) for row in range(num_rows))
        seconds = []
        for step in range(num_steps + 1):
            self._num += 1
            news = ((), ()) if step else (admissions, self._pages)
            plan = StepPlan(self._num, *news, self._reqs, num_rows, masked=masked)
            begin = time.perf_counter()
            self._steps.launch(plan, self if masked else None).result(plan)
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds[1:])


@contextlib.contextmanager
def model_path(shape: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield DEMO_MODEL if shape is None else write_shape(shape, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape")
    for name, default in (("streams", 64), ("len", 64), ("steps", 3), ("rounds", 20), ("seconds", 75)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures")
    args = parser.parse_args()
    torch.set_num_threads(2)
    deadline = time.perf_counter() + args.seconds
    kinds = list(dict.fromkeys(["plain", *args.only]))
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    with model_path(args.shape) as path, torch.inference_mode():
        steps = Steps(path, args.streams, args.len, dummy_weight=args.shape is not None)
        for kind in kinds:
            steps.time(kind, 1)
        while len(seconds["plain"]) < args.rounds and time.perf_counter() < deadline:
            for kind in kinds:
                seconds[kind].append(steps.time(kind, args.steps))
    print(f"{len(seconds['plain'])} rounds\n\n| rows | ms of a step | speed, of plain |\n|---|---:|---:|")
    for kind, values in seconds.items():
        ratio = statistics.median(plain / value for plain, value in zip(seconds["plain"], values, strict=True))
        print(f"| {kind} | {statistics.median(values) * 1e3:.3f} | {ratio:.3f} |")
    if args.json:
        args.json.write_text(json.dumps({"machine": describe_machine(), "seconds": seconds}))


if __name__ == "__main__":
    run_script(main)
