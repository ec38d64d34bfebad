"""Builds, checks and times the kernels against their torch references, on the shapes of a model of eight billion
parameters. A time is that of one call among many in a CUDA graph, on inputs that change from call to call so that
those too large for the L2 cache come from memory; `of copy` compares bytes per second with a large copy on this GPU.

    python benchmark/kernels/ops.py
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from minisgl.errors import ConfigError
from minisgl.kernel.cuda import CudaOps, compile_kernels
from minisgl.kernel.ops import Around, KVSlots, RopeAngles, TorchOps
from minisgl.kernel.sampling import SamplingColumns

Tensor = torch.Tensor
Run = Callable[[TorchOps], tuple[Tensor, ...]]

HIDDEN, INNER, NUM_Q, NUM_KV, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 151936
DTYPE = torch.bfloat16
TOLERANCE = 0.02  # of the largest value; bfloat16 rounds to 0.004
MISMATCHES = 0.02  # sampled tokens may differ where a number falls on the border between two
_WORKING_SET = 192 << 20  # bytes that calls cycle through: more than an L2 cache
_MILLISECONDS = 15.0  # per measurement
_REFERENCE_LIMIT = 50.0  # ms a call; slower references are not timed


@dataclass(frozen=True)
class Case:
    """`make()` allocates inputs and returns the call on them. The results of its first call with our operations are
    compared with those of its first call with the reference, which comes second."""

    name: str
    shape: str
    num_bytes: int  # that have to be moved
    make: Callable[[], Run]
    is_sampling: bool = False


@dataclass(frozen=True)
class Result:
    microseconds: float
    reference: float | None  # microseconds
    error: float  # largest difference relative to the largest value; for sampling, the share of other tokens
    passed: bool


def _randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype) * scale


def _norm(n: int) -> Run:
    x, weight = _randn(n, HIDDEN), _randn(HIDDEN)
    return lambda ops: (ops.rms_norm(x, weight, 1e-6),)


def _rope(n: int) -> Run:
    theirs = _randn(n, NUM_Q + 2 * NUM_KV, HEAD_DIM)
    ours = theirs.clone()  # is rotated in place
    norm = 1 + _randn(NUM_Q + NUM_KV, HEAD_DIM, scale=0.1)
    angles = torch.rand(n, 1, HEAD_DIM // 2, device="cuda") * 6
    cos, sin = angles.cos(), angles.sin()
    rope = RopeAngles(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    k, v = (torch.zeros(n, NUM_KV, HEAD_DIM, dtype=DTYPE, device="cuda") for _ in range(2))
    cache = KVSlots(k, v, torch.randperm(n, device="cuda"))

    def run(ops: TorchOps) -> tuple[Tensor, ...]:
        qkv = ours if isinstance(ops, CudaOps) else theirs
        return ops.norm_rope_store(qkv, norm, 1e-6, rope, cache), k, v

    return run


def _silu(n: int) -> Run:
    gate_up = _randn(n, 2 * INNER)
    return lambda ops: (ops.act_and_mul(gate_up),)


@functools.cache
def _embedding_table() -> Tensor:
    return _randn(VOCAB, HIDDEN)


def _embedding(n: int) -> Run:
    weight, ids = _embedding_table(), torch.randint(0, VOCAB, (n,), device="cuda")
    return lambda ops: (ops.matrix(weight).rows(ids),)


def _step(n: int) -> Run:
    tokens = torch.randint(0, VOCAB, (n, 4096), dtype=torch.int32, device="cuda")
    pages = torch.randint(0, 1000, (n, 256), dtype=torch.int32, device="cuda")
    rows = torch.randperm(n, dtype=torch.int32, device="cuda")
    positions = torch.randint(0, 4096, (n,), dtype=torch.int32, device="cuda")
    angles = [_randn(4096, 2 * HEAD_DIM, dtype=torch.float32)]

    def run(ops: TorchOps) -> tuple[Tensor, ...]:
        ids, (slots,), (rope,) = ops.step_inputs(rows, positions, tokens, [pages], 16, angles)
        return ids, slots, rope.cos, rope.sin

    return run


def _norm_gate_up(n: int) -> Run:
    x, norm, weight = _randn(n, HIDDEN), _randn(HIDDEN), _randn(2 * INNER, HIDDEN, scale=HIDDEN**-0.5)
    return lambda ops: (ops.matrix(weight, "silu").apply(x, Around(None, norm, 1e-6, gated=True)),)


def _linear_add(n: int) -> Run:
    x, weight = _randn(n, INNER), _randn(HIDDEN, INNER, scale=INNER**-0.5)
    ours = _randn(n, HIDDEN)
    theirs = ours.clone()
    return lambda ops: (ops.matrix(weight).apply(x, Around(residual=ours if isinstance(ops, CudaOps) else theirs)),)


def _sample(n: int, **values: float) -> Run:
    logits = _randn(n, VOCAB, scale=3.0)
    columns = SamplingColumns.of(n, "cuda", **values, seed=np.arange(n), position=np.arange(n))
    out = torch.full((n,), -7, dtype=torch.int32, device="cuda")
    return lambda ops: (ops.sample(logits, columns, out),)


def cases() -> Iterator[Case]:
    """From one token, through decode batches, to a chunk of prefill."""
    row = HIDDEN * DTYPE.itemsize
    heads = (2 * (NUM_Q + 2 * NUM_KV) * DTYPE.itemsize + 2 * 4) * HEAD_DIM
    for n in (1, 64, 256, 8192):
        yield Case("rms_norm", f"{n} x {HIDDEN}", 2 * n * row, functools.partial(_norm, n))
        yield Case(
            "norm_rope_store", f"{n} x ({NUM_Q}+2*{NUM_KV}) x {HEAD_DIM}", n * heads, functools.partial(_rope, n)
        )
        yield Case("silu_and_mul", f"{n} x {INNER}", 3 * n * INNER * DTYPE.itemsize, functools.partial(_silu, n))
        yield Case("embedding", f"{n} x {HIDDEN}", 2 * n * row, functools.partial(_embedding, n))
    for n in (1, 256):
        yield Case("step_inputs", f"{n}", n * 4 * 4 * HEAD_DIM, functools.partial(_step, n))
    for n in (1, 8, 32, 256):
        weights = INNER * row
        yield Case("norm_gate_up", f"{n} x {HIDDEN} x 2*{INNER}", 2 * weights, functools.partial(_norm_gate_up, n))
        yield Case("linear_add", f"{n} x {INNER} x {HIDDEN}", weights, functools.partial(_linear_add, n))
    yield from _sampling_cases()


def _sampling_cases() -> Iterator[Case]:
    settings: dict[str, dict[str, float]] = {
        "greedy": {"temperature": 0.0},
        "unfiltered": {"temperature": 1.0},
        "top-k 50": {"temperature": 1.0, "top_k": 50},
        "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
        "top-k 50, top-p 0.95": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
        "min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    }
    for n in (1, 32, 256):
        for name, values in settings.items():
            make = functools.partial(_sample, n, **values)
            yield Case(f"sample {name}", f"{n} x {VOCAB}", n * VOCAB * DTYPE.itemsize, make, True)


def measure(calls: list[Callable[[], object]]) -> float:
    """Microseconds per call, of many in one CUDA graph, taking the calls in turn."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for call in calls:
        call()
    start.record()
    calls[0]()
    end.record()
    end.synchronize()
    once = start.elapsed_time(end)
    num = max(1, min(200, int(_MILLISECONDS / 4 / max(once, 1e-3))))
    num = -(-num // len(calls)) * len(calls) if num > 1 else 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num):
            calls[i % len(calls)]()
    graph.replay()
    start.record()
    for _ in range(4):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / (4 * num)


def run_case(case: Case, ours: TorchOps, reference: TorchOps) -> Result:
    num = max(1, min(8, _WORKING_SET // max(case.num_bytes, 1)))
    runs = [case.make() for _ in range(num)]
    actual = [result.clone() for result in runs[0](ours)]
    expected = runs[0](reference)
    if case.is_sampling:
        error, limit = float((actual[0] != expected[0]).float().mean()), MISMATCHES
    else:
        error, limit = max(_difference(*pair) for pair in zip(actual, expected, strict=True)), TOLERANCE
    own_time = measure([functools.partial(run, ours) for run in runs])
    begin = time.perf_counter()
    runs[0](reference)
    torch.cuda.synchronize()
    is_slow = (time.perf_counter() - begin) * 1000 > _REFERENCE_LIMIT
    theirs = None if is_slow else measure([functools.partial(run, reference) for run in runs])
    return Result(own_time, theirs, error, error <= limit)


def _difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where something is not a number."""
    difference = float(
        (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-9)
    )
    return difference if math.isfinite(difference) else math.inf


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of one GiB by a kernel; the copy engine is slower."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 8 * source.numel() / measure([lambda: torch.neg(source, out=target)]) * 1e6


def main() -> int:
    """0 when every kernel agrees with its reference."""
    if not torch.cuda.is_available():
        print("no GPU that this PyTorch can use was found")
        return 1
    torch.manual_seed(0)
    failures = 0
    with torch.inference_mode():
        try:
            arch = torch.cuda.get_device_capability()
            begin = time.perf_counter()
            compile_kernels(torch.device("cuda", torch.cuda.current_device()), DTYPE)
            print(f"kernels for sm_{arch[0]}{arch[1]} ready after {time.perf_counter() - begin:.0f} s")
            ops = CudaOps(arch)
        except ConfigError as error:
            print(error)
            return 1
        bandwidth = copy_bandwidth()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies {bandwidth / 1e9:.0f} GB/s\n")
        print(f"{'kernel':28} {'shape':22} {'us':>9} {'torch us':>9} {'MB':>8} {'GB/s':>7} {'of copy':>8} {'error':>9}")
        for case in cases():
            try:
                result = run_case(case, ops, TorchOps())
            except Exception as error:  # one kernel's fault; the others are still worth a line
                failures += 1
                print(f"{case.name:28} {case.shape:22} FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            failures += not result.passed
            print(_line(case, result, bandwidth), flush=True)
    print(f"\n{failures} failed" if failures else "\nall agree with their references")
    return 1 if failures else 0


def _line(case: Case, result: Result, bandwidth: float) -> str:
    rate = case.num_bytes / result.microseconds * 1e6
    reference = "slow" if result.reference is None else f"{result.reference:.1f}"
    return (
        f"{case.name:28} {case.shape:22} {result.microseconds:9.1f} {reference:>9} {case.num_bytes / 1e6:8.2f} "
        f"{rate / 1e9:7.0f} {rate / bandwidth:8.0%} {result.error:9.1e}{'' if result.passed else '  DIFFERS'}"
    )


if __name__ == "__main__":
    sys.exit(main())
