"""Correctness and speed of the fused linear layers of a few tokens, against cuBLAS and separate operations.

    python benchmark/kernels/skinny_gemm.py [--tokens 1 8 16] [--quick]

Everything timed runs in a CUDA graph over enough copies of the weights to exceed the L2 cache. First each shape of
Qwen3 0.6B, 14B and 32B (of 4 ranks) by variant, then whole steps of 0.6B and 14B without attention. A variant that
fails or is wrong is named and left out. Tables come last.
"""

from __future__ import annotations

import argparse
import functools
import gc
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minisgl.kernel import skinny
from minisgl.kernel.ops import Around

EPS = 1e-6
VARIANTS = ((8, 1), (8, 2), (8, 4), (8, 6), (4, 6), (4, 8), (4, 16))  # warps, and octets of rows that they take at once
PEAK = 4.3e12  # bytes per second that an H200 reads


def variants(tokens: int, gated: bool, float8: bool = False, shared: int = 113) -> list[int]:
    """The numbers of the kernel's variants, as in `dispatch` of the kernel file, of which two steps fit the memory."""
    tiles = next(tile for tile in skinny.TOKEN_TILES if tokens <= tile) // 8 * (2 if float8 else 1)
    steps = [(shared - 27) * 1024 // (warps * (octets + tiles) * 512) for warps, octets in VARIANTS]
    return [v for v, n in enumerate(steps) if n >= 2 and not (gated and v == 0) and not (tokens > 16 and v == 3)]


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    form: str
    n: int  # outputs
    k: int

    @property
    def rows(self) -> int:
        return 2 * self.n if self.form == "gate_up" else self.n

    @property
    def bytes(self) -> int:
        return self.rows * self.k * 2


def model(name: str, hidden: int, qkv: int, attention: int, inner: int) -> list[Shape]:
    return [
        Shape(f"{name} qkv", "norm", qkv, hidden),
        Shape(f"{name} o", "add", hidden, attention),
        Shape(f"{name} gate_up", "gate_up", inner, hidden),
        Shape(f"{name} down", "add", hidden, inner),
    ]


MODELS = {
    "0.6B": (28, model("0.6B", 1024, 4096, 2048, 3072), Shape("0.6B head", "norm", 151936, 1024)),
    "14B": (40, model("14B", 5120, 7168, 5120, 17408), Shape("14B head", "norm", 151936, 5120)),
}
SHAPES = [
    *MODELS["0.6B"][1],
    *MODELS["14B"][1],
    *model("32B/4", 5120, 2560, 2048, 6400),
    *model("32B/2", 5120, 5120, 4096, 12800),
    MODELS["0.6B"][2],
    MODELS["14B"][2],
]


def fused(
    shape: Shape,
    x: torch.Tensor,
    gain: torch.Tensor,
    w: torch.Tensor,
    residual: torch.Tensor,
    variant: int = -1,
) -> torch.Tensor:
    around = Around(residual=residual)
    if shape.form != "add":
        around = Around(norm=gain, eps=EPS, gated=shape.form == "gate_up")
    return skinny.linear(x, w, around, variant=variant)


def separate(
    shape: Shape, x: torch.Tensor, gain: torch.Tensor, w: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    if shape.form == "add":
        return residual.add_(F.linear(x, w))
    y = F.linear(F.rms_norm(x, (x.shape[-1],), gain, EPS), w)
    if shape.form == "gate_up":
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return y


def reference(
    shape: Shape, x: torch.Tensor, gain: torch.Tensor, w: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    x32 = x.float()
    if shape.form != "add":
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS) * gain.float()
    y = torch.cat([x32 @ part.float().T for part in w.split(16384)], dim=-1)
    if shape.form == "gate_up":
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return residual.float() + y if shape.form == "add" else y


def graph_time(work: Callable[[], object], calls: int, budget: float = 0.02) -> float:
    """Seconds per call of `work`, which makes `calls` of them: best of 3 rounds of graph replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
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


class Pool:
    """Random weights for every shape: views of one buffer."""

    def __init__(self, num_elements: int) -> None:
        self.buffer = torch.empty(num_elements, dtype=torch.bfloat16, device="cuda")
        for part in self.buffer.split(1 << 30):
            part.normal_(0, 0.02)

    def weights(self, shape: Shape, copies: int, offset: int = 0) -> torch.Tensor:
        size = shape.rows * shape.k * copies
        return self.buffer[offset : offset + size].view(copies, shape.rows, shape.k)


def is_correct(shape: Shape, tokens: int, w: torch.Tensor, variant: int) -> str:
    """'' or what is wrong with a variant, on fresh data."""
    x = torch.randn(tokens, shape.k, device="cuda").bfloat16()
    gain = (1 + 0.2 * torch.randn(shape.k, device="cuda")).bfloat16()
    residual = torch.randn(tokens, shape.n, device="cuda").bfloat16()
    expected = reference(shape, x, gain, w, residual)
    # Freed memory that the output may get next holds NaN.
    poison = torch.full((tokens, shape.n), torch.nan, dtype=x.dtype, device="cuda")
    del poison
    torch.cuda.synchronize()
    actual = fused(shape, x, gain, w, residual, variant).float()
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    return "" if error < 1e-2 else f"relative error {error:.3g}"


def sweep(shape: Shape, tokens: int, pool: Pool, variants: list[int]) -> dict[int | str, float]:
    """Seconds per call by variant, 'cublas' (linear alone) and 'separate' (with its neighbours)."""
    copies = min(100, max(2, -(-400_000_000 // shape.bytes)))
    weights = pool.weights(shape, copies)
    x = torch.randn(tokens, shape.k, device="cuda").bfloat16()
    gain = torch.ones(shape.k, device="cuda").bfloat16()
    residual = torch.zeros(tokens, shape.n, device="cuda").bfloat16()
    times: dict[int | str, float] = {}

    def measure(key: int | str, call: Callable[[torch.Tensor], object]) -> None:
        try:
            wrong = is_correct(shape, tokens, weights[-1], key) if isinstance(key, int) else ""
            if wrong:
                print(f"WRONG {shape.name} m={tokens} variant {key}: {wrong}", flush=True)
                return
            times[key] = graph_time(lambda: [call(w) for w in weights], copies)
        except Exception as error:  # the others go on
            print(f"FAILED {shape.name} m={tokens} {key}: {str(error)[:200]}", flush=True)

    def with_variant(variant: int, w: torch.Tensor) -> torch.Tensor:
        return fused(shape, x, gain, w, residual, variant)

    for variant in variants:
        if not (variant == 0 and shape.form == "gate_up"):
            measure(variant, functools.partial(with_variant, variant))
    measure("cublas", lambda w: F.linear(x, w))
    measure("separate", lambda w: separate(shape, x, gain, w, residual))
    return times


def step_time(name: str, tokens: int, pool: Pool, call: Callable[..., torch.Tensor]) -> float:
    """Seconds of a decode step without attention: q stands for attention's output."""
    layers, shapes, head = MODELS[name]
    hidden = head.k
    weights, offset = [], 0
    for _ in range(layers):
        for shape in shapes:
            weights.append((shape, pool.weights(shape, 1, offset)[0]))
            offset += shape.rows * shape.k
    weights.append((head, pool.weights(head, 1, offset)[0]))
    gain = torch.ones(hidden, device="cuda").bfloat16()
    start = torch.randn(tokens, hidden, device="cuda").bfloat16()

    def step() -> None:
        residual, y = start * 1, start
        for shape, w in weights:
            source = y[:, : shape.k] if shape.form == "add" else residual
            y = call(shape, source, gain, w, residual)

    return graph_time(step, 1, budget=0.1)


def compile_all(tokens: list[int]) -> None:
    started = time.perf_counter()
    torch.cuda.get_device_capability()
    tiles = sorted({8 if m <= 8 else 16 if m <= 16 else 32 for m in tokens})
    with ThreadPoolExecutor() as executor:
        list(executor.map(lambda m: skinny.prepare(torch.device("cuda", 0), torch.bfloat16, m), tiles))
    print(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)


def row_of(shape: Shape, tokens: int, times: dict[int | str, float]) -> str:
    own = {key: value for key, value in times.items() if isinstance(key, int) and key >= 0}
    if not own and -1 not in times:
        return f"{shape.name:14s} {tokens:3d}  no variant works"
    own = own or {-1: times[-1]}
    best = min(own, key=lambda key: own[key])
    rate = shape.bytes / own[best]
    others = " ".join(f"{key}:{value * 1e6:.1f}" for key, value in sorted(own.items()))
    return (
        f"{shape.name:14s} {tokens:3d} {best:4d} {times.get(-1, 0) * 1e6:8.2f} "
        f"{own[best] * 1e6:8.2f} {rate / 1e9:6.0f} {rate / PEAK:5.0%} "
        f"{times.get('cublas', 0) * 1e6:8.2f} {times.get('separate', 0) * 1e6:8.2f}   {others}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--quick", action="store_true", help="only the chosen variants")
    parser.add_argument("--seconds", type=int, default=150, help="give up after this long")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("gave up: out of time"))
    signal.alarm(args.seconds)
    torch.manual_seed(0)
    gc.freeze()  # each capture collects garbage
    compile_all(args.tokens)
    pool = Pool(15_000_000_000)
    torch.cuda.synchronize()
    steps = ["step without attention, ms: model, tokens, fused, separate, least by bytes"]
    rows = [f"{'shape':14s}   m best   chosen       us   GB/s share   cublas separate   us by variant"]
    for tokens in args.tokens:
        for shape in SHAPES:
            kinds = [-1] if args.quick else [-1, *variants(tokens, shape.form == "gate_up")]
            rows.append(row_of(shape, tokens, sweep(shape, tokens, pool, kinds)))
            print(rows[-1], flush=True)
        for name, (layers, shapes, head) in MODELS.items():
            try:
                own = step_time(name, tokens, pool, fused) * 1e3
                other = step_time(name, tokens, pool, separate) * 1e3
            except Exception as error:
                steps.append(f"{name} {tokens}: FAILED {str(error)[:200]}")
                continue
            least = (layers * sum(shape.bytes for shape in shapes) + head.bytes) / PEAK * 1e3
            steps.append(f"{name:6s} {tokens:3d} {own:8.3f} {other:8.3f} {least:8.3f}")
    print("\n".join(["", *rows, "", *steps]), flush=True)


if __name__ == "__main__":
    main()
