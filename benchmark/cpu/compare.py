"""minisgl on a CPU beside llama.cpp and Hugging Face `generate()`: the same weights, in one run.

    pip install gguf
    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python
    python -m benchmark.cpu.compare [--model qwen3-0.6b] [--rounds 3] [--precisions bfloat16] [--json FILE]

--model: a shape, with random weights; `built-in`; or the directory of a dense Qwen3 or Qwen3.5 model. Its GGUF files
are written to --work-dir (7 GB for Qwen3-0.6B), and kept. Or a GGUF file, which both engines read (--precisions Q4_0).
For each precision the engines are loaded, each in a process of its own, and within each round they take turns, load by
load, so that a machine whose speed drifts slows all of them. Decode is timed from the first token of all streams to the
last; prefill to the first token of one prompt. Prints a Markdown table of medians over the rounds, in brackets the
median of each round's ratio to llama.cpp at the same precision.

The bandwidth floor: weights are read once per token of a single stream, at the rate at which all threads together
search memory for a byte that is not there (`memchr` of the C library: nothing is written, and little computed).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.cpu.checkpoint import bytes_read, prepare, write_gguf
from benchmark.cpu.engines import ENGINES, Failed, Setup, Timing, Worker
from minisgl.benchmark.floor import weights_read
from minisgl.benchmark.metrics import describe_commit, describe_machine
from minisgl.config.families import read_model_config
from minisgl.config.model import ModelConfig

# By precision: the engines, and its name in each. All are compared with the first of llama.cpp's.
GROUPS = {
    "float32": [("minisgl", "float32"), ("llama.cpp", "F32"), ("transformers", "float32")],
    "bfloat16": [("minisgl", "bfloat16"), ("llama.cpp", "BF16"), ("llama.cpp", "F16")],
    "int8": [("minisgl", "int8"), ("llama.cpp", "Q8_0")],
    "int4": [("minisgl", "int4"), ("llama.cpp", "Q4_0"), ("llama.cpp", "Q4_K_M")],
    "Q8_0": [("minisgl", "Q8_0"), ("llama.cpp", "Q8_0")],  # from here on, both read one GGUF file
    "Q4_0": [("minisgl", "Q4_0"), ("llama.cpp", "Q4_0")],
    "Q4_K_M": [("minisgl", "Q4_K_M"), ("llama.cpp", "Q4_K_M")],
}
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.7}  # else as many as the GGUF file has
CHECK = (24, 16)  # a prompt, and tokens after it, that are compared with those of transformers in float32


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts of `input_len` tokens. output_len: 1 measures prefill, more measures decode."""

    name: str
    num_streams: int
    input_len: int
    output_len: int

    def prompts(self, seed: int, vocab_size: int) -> list[list[int]]:
        numbers = random.Random(f"{self.name} {seed}")
        return [[numbers.randrange(vocab_size) for _ in range(self.input_len)] for _ in range(self.num_streams)]

    def rate(self, timing: Timing) -> float:
        """Tokens per second."""
        if self.output_len == 1:
            return self.num_streams * self.input_len / timing.prefill
        return timing.num_decoded / timing.decode


@dataclass(slots=True)
class Row:
    """What one engine reached at one precision: tokens/s by load and round; `problem`: why there is no more of it."""

    group: str
    engine: str
    precision: str
    version: str = ""
    problem: str = ""
    agreement: str = ""
    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    floor_shares: list[float] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    num_bytes: float = 0  # of weights that are read for a token
    worker: Worker | None = None

    def run(self, prompts: list[list[int]], num_tokens: int) -> Timing | None:
        if self.worker is None:
            return None
        try:
            return self.worker.run(prompts, num_tokens)
        except Failed as error:
            self.problem, self.worker = str(error), None
            return None


class Bandwidth:
    """Bytes per second that all threads read together: the best of several passes over more than a cache holds."""

    def __init__(self, num_threads: int, num_bytes: int = 256 * 2**20) -> None:
        self._buffers = [np.full(num_bytes, 0, np.uint8) for _ in range(num_threads)]
        self._search = ctypes.CDLL(None).memchr  # without the lock of the interpreter
        self._search.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)

    def measure(self, passes: int = 5) -> float:
        return max(self._pass() for _ in range(passes))

    def _pass(self) -> float:
        threads = [threading.Thread(target=self._search, args=(b.ctypes.data, 1, b.nbytes)) for b in self._buffers]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(buffer.nbytes for buffer in self._buffers) / (time.perf_counter() - start)


class Comparison:
    """All groups, one after the other; `rows` and `bandwidths` are what comes out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._directory = prepare(args.model, args.work_dir)
        self._model: ModelConfig = read_model_config(self._directory)
        self.loads = [Load(f"decode {n}", n, args.input_len, args.output_len) for n in args.batches]
        self.loads.append(Load(f"prefill {args.prefill_len}", 1, args.prefill_len, 1))
        self.rows: list[Row] = []
        self.bandwidths: list[float] = []
        self._bandwidth = Bandwidth(args.threads)
        self._expected: Timing | None = None

    def run_group(self, group: str) -> None:
        rows = [Row(group, *pair) for pair in GROUPS[group] if pair[0] in self._args.engines]
        self.rows += rows
        try:
            for row in rows:
                self._start(row)
            self._check(rows)
            for load in (self.loads[0], self.loads[-1]):
                for row in rows:  # to warm up
                    row.run(load.prompts(-1, self._model.vocab_size), min(load.output_len, 9))
            for number in range(self._args.rounds):
                self._round(number, rows)
        finally:
            for row in rows:
                if row.worker is not None:
                    row.worker.close()

    def _start(self, row: Row) -> None:
        gguf = None
        try:
            if row.precision not in WEIGHT_BYTES:
                gguf = write_gguf(self._directory, row.precision, self._args.work_dir)
                row.num_bytes = bytes_read(gguf)
            else:
                row.num_bytes = weights_read(self._model, "float32", 1) / 4 * WEIGHT_BYTES[row.precision]
            row.worker = Worker(row.engine, self._setup(row.precision, gguf), self._args.limit)
            row.version = row.worker.version
        except (Failed, ImportError) as error:
            row.problem = str(error)
        show(f"{row.group}: {row.engine} {row.precision}: {row.problem or row.version}")

    def _setup(self, precision: str, gguf: Path | None) -> Setup:
        lengths = [(load.num_streams, load.input_len + load.output_len) for load in self.loads]
        lengths.append((1, sum(CHECK)))
        return Setup(
            directory=self._directory,
            precision=precision,
            gguf=gguf,
            num_threads=self._args.threads,
            max_new=max(self._args.output_len, CHECK[1]),
            max_len=max(length for _, length in lengths),
            kv_tokens=max(count * length for count, length in lengths),
        )

    def _check(self, rows: list[Row]) -> None:
        """Whether all engines got the same weights, and read them alike."""
        prompts = Load("check", 1, CHECK[0], CHECK[1]).prompts(0, self._model.vocab_size)
        timings = [(row, row.run(prompts, CHECK[1])) for row in rows]
        for row, timing in timings:
            if timing and (row.engine, row.precision) == ("transformers", "float32"):
                self._expected = timing
        for row, timing in timings:
            if timing and self._expected:
                row.agreement = describe_agreement(timing, self._expected)
                show(f"{row.group}: {row.engine} {row.precision}: {row.agreement}")

    def _round(self, number: int, rows: list[Row]) -> None:
        self.bandwidths.append(self._bandwidth.measure())
        order = rows[number % len(rows) :] + rows[: number % len(rows)]
        for load in self.loads:
            prompts = load.prompts(number, self._model.vocab_size)
            for row in order:
                if (timing := row.run(prompts, load.output_len)) is None:
                    continue
                rate = load.rate(timing)
                row.rates[load.name].append(rate)
                row.settings[load.name] = timing.setting
                if load.name == "decode 1":
                    row.floor_shares.append(rate * row.num_bytes / self.bandwidths[-1])
                show(f"{row.group}, round {number}, {load.name}: {row.engine} {row.precision} {rate:.2f}")


def describe_agreement(timing: Timing, expected: Timing) -> str:
    """How far the greedy tokens are the expected ones, and the relative error of the logits at the first of them."""
    ours, theirs = timing.tokens[0], expected.tokens[0]
    same = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(theirs))
    text = f"{same} of {len(theirs)} tokens"
    if timing.logits is not None and expected.logits is not None:
        error = np.linalg.norm(timing.logits - expected.logits) / np.linalg.norm(expected.logits)
        text += f", logits within {error:.1e}"
    return text


def to_table(rows: list[Row], loads: list[str]) -> str:
    """Markdown: medians, in brackets the median ratio to the first row of llama.cpp in the group."""
    lines = [f"| engine | {' | '.join(loads)} | of the floor, decode 1 | beside transformers, float32 |"]
    lines.append("|---|" + "---:|" * (len(loads) + 1) + "---|")
    for row in rows:
        peers = (peer for peer in rows if peer.group == row.group and peer.engine == "llama.cpp")
        peer = next(peers, None)
        cells = [to_cell(row.rates.get(load, []), peer.rates.get(load, []) if peer else []) for load in loads]
        cells.append(f"{statistics.median(row.floor_shares):.0%}" if row.floor_shares else "–")
        notes = "; ".join(note for note in (row.agreement, row.problem) if note)
        lines.append(f"| {row.engine} {row.precision} | {' | '.join(cells)} | {notes or '–'} |")
    return "\n".join(lines)


def to_cell(rates: list[float], peer: list[float]) -> str:
    if not rates:
        return "–"
    ratios = [ours / theirs for ours, theirs in zip(rates, peer, strict=False)]  # one may have failed on the way
    return f"{statistics.median(rates):.1f}" + (f" ({statistics.median(ratios):.2f})" if ratios else "")


def to_document(args: argparse.Namespace, comparison: Comparison, loads_before: tuple[float, ...]) -> dict[str, Any]:
    """The raw figures, and what is needed to repeat them."""
    names = ("group", "engine", "precision", "version", "problem", "agreement", "rates", "floor_shares", "settings")
    return {
        "commit": describe_commit(),
        "machine": describe_machine(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "load_average": {"before": loads_before, "after": os.getloadavg()},
        "bandwidth": comparison.bandwidths,
        "rows": [{name: getattr(row, name) for name in names} for row in comparison.rows],
    }


def show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = parser.add_argument
    add("--model", default="qwen3-0.6b", help="qwen3-0.6b, qwen3-tiny (for tests), …, built-in, or a directory")
    add("--work-dir", type=Path, default=Path.home() / ".cache" / "minisgl-compare", help="keeps what is made")
    add("--precisions", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    add("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    add("--rounds", type=int, default=3)
    add("--batches", nargs="+", type=int, default=[1, 8, 16], help="streams that decode together")
    add("--input-len", type=int, default=128, help="prompt tokens of each stream")
    add("--output-len", type=int, default=64, help="tokens of each stream; transformers makes fewer")
    add("--prefill-len", type=int, default=512, help="tokens of the prompt whose prefill is measured")
    add("--threads", type=int, default=num_cores, help="of every engine")
    add("--limit", type=float, default=300.0, help="seconds after which a load is given up, and its engine left out")
    add("--json", type=Path, metavar="FILE", help="write the raw figures")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    loads_before = os.getloadavg()
    comparison = Comparison(args)
    for group in args.precisions:
        comparison.run_group(group)
    print(to_table(comparison.rows, [load.name for load in comparison.loads]))
    if comparison.bandwidths:
        rate, count = statistics.median(comparison.bandwidths) / 1e9, args.threads
        print(f"\nTokens/s. {count} threads read {rate:.1f} GB/s. Load average before: {loads_before[0]:.1f}.")
    if args.json:
        args.json.write_text(json.dumps(to_document(args, comparison, loads_before), indent=1))


if __name__ == "__main__":
    main()
