"""Correctness and speed of the linear layers of decode batches (Hopper), against cuBLAS.

    python benchmark/kernels/decode_gemm.py [--tokens 32 64 128 192 256] [--quick] [--seconds 120]

First a small product for each compiled kernel, then awkward shapes in every variant, then each layer of Qwen3 0.6B and
14B in a CUDA graph over enough copies of the weights to exceed the L2 cache. A variant that fails or is wrong says so
and the rest goes on. Every line is printed as soon as it is known.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minisgl.kernel import decode_gemm
from minisgl.kernel.cuda import CudaOps
from minisgl.kernel.decode_gemm import Variant
from minisgl.kernel.ops import Around

Tensor = torch.Tensor
PEAK = 4.3e12  # bytes per second that an H200 reads
COPIES_BYTES = 400_000_000
ODD_TOKENS = (17, 33, 100, 129, 180, 200, 256)
OPS = functools.cache(lambda: CudaOps(torch.cuda.get_device_capability()))
MAX_SPLIT = 8


def fits(variant: Variant, m: int, k: int) -> bool:
    """Whether a variant exists for `m` tokens and `k` inputs: registers and shared memory limit it."""
    tile, rows = decode_gemm.token_tile(m), variant.rows
    stage = 128 * (rows + tile)
    stages = (227 * 1024 - 1408 - 80 * rows) // stage
    sums = 4 * rows * tile if variant.split > 1 else 0
    room = stages >= 2 and min(stages, 24) * stage >= sums
    return room and (2 * rows + 32) * (tile // 2 + 48) <= 65536 and variant.split <= min(MAX_SPLIT, k // 64)


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    form: str  # linear, add or gate_up
    n: int  # outputs
    k: int

    @property
    def gated(self) -> bool:
        return self.form == "gate_up"

    @property
    def rows(self) -> int:
        return 2 * self.n if self.gated else self.n

    @property
    def bytes(self) -> int:
        return self.rows * self.k * 2


def model(name: str, hidden: int, qkv: int, attention: int, inner: int) -> list[Shape]:
    return [
        Shape(f"{name} qkv", "linear", qkv, hidden),
        Shape(f"{name} o", "add", hidden, attention),
        Shape(f"{name} gate_up", "gate_up", inner, hidden),
        Shape(f"{name} down", "add", hidden, inner),
        Shape(f"{name} head", "linear", 151936, hidden),
    ]


SHAPES = [*model("0.6B", 1024, 4096, 2048, 3072), *model("14B", 5120, 7168, 5120, 17408)]


def own(shape: Shape, x: Tensor, w: Tensor, residual: Tensor, variant: Variant | None) -> Tensor:
    around = Around(residual=residual if shape.form == "add" else None, gated=shape.gated)
    return decode_gemm.linear(x, w, around, variant)


def with_torch(shape: Shape, x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
    if shape.form == "add":
        return residual.addmm_(x, w.T)
    y = F.linear(x, w)
    return OPS().act_and_mul(y) if shape.gated else y


def reference(shape: Shape, x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
    y = torch.cat([x.float() @ part.float().T for part in w.split(16384)], dim=-1)
    if shape.gated:
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return residual.float() + y if shape.form == "add" else y


def wrong(shape: Shape, tokens: int, w: Tensor, variant: Variant | None) -> str:
    """'' or what is wrong with a variant, on fresh data and twice."""
    for _ in range(2):
        x = torch.randn(tokens, shape.k, device="cuda").bfloat16()
        residual = torch.randn(tokens, shape.n, device="cuda").bfloat16()
        expected = reference(shape, x, w, residual)
        # Freed memory that the output may get next holds NaN.
        poison = torch.full((tokens, shape.n), torch.nan, dtype=x.dtype, device="cuda")
        del poison
        torch.cuda.synchronize()
        actual = own(shape, x, w, residual, variant).float()
        off = (actual - expected).abs()
        error = (off.max() / expected.abs().max()).item()
        if not error < 1e-2:
            bad = ~(off <= 1e-2 * expected.abs().max())
            places = bad.nonzero()
            return f"relative error {error:.3g}, {len(places)} of {bad.numel()} wrong, first {places[:3].tolist()}"
    return ""


def report(line: str) -> None:
    print(line, flush=True)


def attempt(label: str, check: Callable[[], str]) -> bool:
    try:
        problem = check()
    except Exception as error:  # the others go on
        report(f"FAILED {label}: {type(error).__name__} {str(error)[:300]}")
        if "CUDA error" in str(error):
            report("the device is lost: giving up")
            os._exit(1)
        return False
    if problem:
        report(f"WRONG {label}: {problem}")
    return not problem


def smoke() -> None:
    """One product of each compiled kernel: a hang is between two of these lines."""
    forms = ("linear", "gate_up")
    for tile, form, rows, split in itertools.product(decode_gemm.TOKEN_TILES, forms, (64, 128, 192), (1, 2, 0)):
        shape = Shape("smoke", form, 256 if form == "gate_up" else 512, 320)
        variant = Variant(rows, split)
        if not fits(variant, tile, shape.k):
            continue
        print(f"smoke {tile:3d} tokens {shape.form} {tuple(variant)} ", end="", flush=True)
        w = torch.randn(shape.rows, shape.k, device="cuda").bfloat16() * shape.k**-0.5
        good = attempt("smoke", functools.partial(wrong, shape, tile, w, variant))
        torch.cuda.synchronize()
        report("ok" if good else "NOT OK")


def odd_shapes(pool: Tensor) -> None:
    count = failed = 0
    shapes = [Shape("odd", f, n, k) for f in ("linear", "add", "gate_up") for n, k in ((2000, 640), (9008, 192))]
    for tokens, shape in itertools.product(ODD_TOKENS, shapes):
        w = pool[: shape.rows * shape.k].view(shape.rows, shape.k)
        for variant in [None, *variants(tokens, shape, quick=False)]:
            label = f"{shape} {tokens} {variant}"
            count += 1
            failed += not attempt(label, functools.partial(wrong, shape, tokens, w, variant))
    report(f"odd shapes: {count} tried, {failed} failed")


def variants(tokens: int, shape: Shape, quick: bool) -> list[Variant]:
    """Those worth a measurement: neither too few blocks nor many more than fit at a time."""
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    chosen = decode_gemm.choose(tokens, shape.n, shape.k, shape.gated) or decode_gemm.Variant(64, 1)
    found = [chosen]
    for rows, split in itertools.product((64, 128, 192), (0, 1, 2, 3, 4, 6, 8)):
        tiles = -(-shape.rows // rows)
        blocks = tiles * split
        worthwhile = 0.4 * num_sms <= blocks <= 1.05 * num_sms if split else tiles * 4 >= num_sms
        variant = Variant(rows, split)
        if worthwhile and fits(variant, tokens, shape.k) and variant != chosen:
            found.append(variant)
    return found[:1] if quick else found


def graph_time(work: Callable[[], object], calls: int, budget: float) -> float:
    """Seconds per call of `work`, which makes `calls` of them: best of 3 rounds of graph replays."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    torch.cuda.synchronize()
    best, replays = float("inf"), 1
    for _ in range(4):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3 / replays
        best = min(best, seconds)
        replays = max(1, min(50, int(budget / 3 / seconds)))
    return best / calls


def sweep(shape: Shape, tokens: int, pool: Tensor, quick: bool) -> str:
    copies = min(100, max(2 if shape.bytes < COPIES_BYTES else 1, -(-COPIES_BYTES // shape.bytes)))
    weights = pool[: shape.rows * shape.k * copies].view(copies, shape.rows, shape.k)
    x = torch.randn(tokens, shape.k, device="cuda").bfloat16()
    residual = torch.zeros(tokens, shape.n, device="cuda").bfloat16()
    times: dict[str, float] = {}

    def measure(key: str, call: Callable[[Tensor], Tensor]) -> str:
        times[key] = graph_time(lambda: [call(w) for w in weights], copies, 0.008)
        return ""

    def with_variant(variant: Variant, w: Tensor) -> Tensor:
        return own(shape, x, w, residual, variant)

    tried = variants(tokens, shape, quick)
    for variant in tried:
        label = f"{shape.name} {tokens} {tuple(variant)}"
        if attempt(label, functools.partial(wrong, shape, tokens, weights[-1], variant)):
            key = "/".join(map(str, variant))
            attempt(label, functools.partial(measure, key, functools.partial(with_variant, variant)))
    others = {"torch": lambda w: with_torch(shape, x, w, residual), "cublas": lambda w: F.linear(x, w)}
    ours = dict(times)
    for name, call in others.items():
        attempt(name, functools.partial(measure, name, call))
    if not ours:
        return f"{shape.name:13s} {tokens:3d}  no variant works"
    best = min(ours, key=lambda key: ours[key])
    chosen = "/".join(map(str, tried[0]))
    seconds = ours[best]
    flops = 2 * tokens * shape.rows * shape.k
    detail = " ".join(f"{key}:{value * 1e6:.1f}" for key, value in sorted(ours.items(), key=lambda item: item[1]))
    return (
        f"{shape.name:13s} {tokens:3d} {seconds * 1e6:8.2f} {shape.bytes / seconds / PEAK:5.0%} "
        f"{flops / seconds / 1e12:6.0f} {ours.get(chosen, 0) * 1e6:8.2f} "
        f"{times.get('torch', 0) * 1e6:8.2f} {times.get('cublas', 0) * 1e6:8.2f}   {best:8s} {chosen:8s}  {detail}"
    )


def compile_all(tokens: list[int]) -> None:
    started = time.perf_counter()
    device = torch.device("cuda", torch.cuda.current_device())
    with ThreadPoolExecutor() as executor:
        list(executor.map(lambda tile: decode_gemm.prepare(device, torch.bfloat16, tile), tokens))
    report(f"compiled in {time.perf_counter() - started:.1f} s")


def watch(seconds: float) -> None:
    """Exit after this long: a GPU that hangs keeps Python from handling signals, but not a thread of its own."""

    def give_up() -> None:
        sys.stdout.write("\ngave up: out of time\n")
        sys.stdout.flush()
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 128, 192, 256])
    parser.add_argument("--quick", action="store_true", help="only the chosen variants")
    parser.add_argument("--no-check", action="store_true", help="no awkward shapes")
    parser.add_argument("--only", default="", help="shapes whose names contain this")
    parser.add_argument("--seconds", type=float, default=120, help="give up after this long, compilation apart")
    args = parser.parse_args()
    torch.manual_seed(0)
    gc.freeze()  # each capture collects garbage
    compile_all(list(decode_gemm.TOKEN_TILES))
    watch(args.seconds)
    smoke()
    largest = max(max(shape.bytes, COPIES_BYTES + shape.bytes) for shape in SHAPES)
    pool = torch.empty(largest // 2, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    if not args.no_check:
        odd_shapes(pool)
    report("shape           m       us share TFLOPs   chosen    torch   cublas   best     chosen    us by variant")
    for tokens, shape in itertools.product(args.tokens, SHAPES):
        if args.only in shape.name:
            report(sweep(shape, tokens, pool, args.quick))
    report("done")


if __name__ == "__main__":
    main()
