"""Correctness and speed of the Triton linear layers of decode batches, against cuBLAS and separate operations.

    python benchmark/kernels/triton_linear.py [--tokens 32 64 128 192 256] [--models 0.6B 14B] [--seconds 88]

Kernels are compiled first, by a pool of processes, as many as get done in time. Each configuration is checked, then
timed in a CUDA graph over enough copies of the weights to exceed the L2 cache. A configuration that fails or is wrong
is named and left out. The fastest come last, as entries of `MEASURED`.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minisgl.kernel.ops import TorchOps
from minisgl.kernel.triton import linear as kernels
from minisgl.kernel.triton.linear import Config

EPS = 1e-6
PEAK = 4.3e12  # bytes per second that an H200 reads
ROTATED = 400_000_000  # bytes of weights in a round, many times the L2 cache
CHECKED = {32: (17, 32), 64: (33, 64), 128: (100, 128), 192: (129, 192), 256: (200, 256)}


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    form: str  # store, add, gate_up
    n: int  # outputs
    k: int
    has_norm: bool

    @property
    def rows(self) -> int:
        return 2 * self.n if self.form == "gate_up" else self.n

    @property
    def bytes(self) -> int:
        return self.rows * self.k * 2


def model(name: str, hidden: int, qkv: int, attention: int, inner: int) -> list[Shape]:
    return [
        Shape(f"{name} qkv", "store", qkv, hidden, True),
        Shape(f"{name} o", "add", hidden, attention, False),
        Shape(f"{name} gate_up", "gate_up", inner, hidden, True),
        Shape(f"{name} down", "add", hidden, inner, False),
        Shape(f"{name} head", "store", 151936, hidden, False),
    ]


MODELS = {"0.6B": model("0.6B", 1024, 4096, 2048, 3072), "14B": model("14B", 5120, 7168, 5120, 17408)}


def large(tokens: int) -> list[Config]:
    """For weights that take long enough to read to keep every SM busy. block_n: rows of the weights; see `fitting`."""
    if tokens <= 32:
        return [
            Config(32, 128, 64, 4, 5, 264), Config(32, 256, 64, 8, 6, 132), Config(32, 128, 64, 4, 3, 396),
            Config(32, 64, 64, 4, 4, 528), Config(32, 128, 128, 4, 5, 132), Config(32, 128, 64, 4, 5, 0),
            Config(32, 128, 64, 4, 5, 264, tma=False),
        ]  # fmt: skip
    if tokens <= 64:
        return [
            Config(64, 128, 64, 4, 4, 264), Config(64, 256, 64, 8, 5, 132), Config(64, 128, 64, 4, 3, 396),
            Config(64, 128, 128, 8, 4, 132), Config(64, 64, 64, 4, 4, 396), Config(64, 128, 64, 4, 4, 0),
            Config(64, 128, 64, 4, 4, 264, swap=False), Config(64, 128, 64, 4, 4, 264, tma=False),
        ]  # fmt: skip
    middle = [
        Config(128, 256, 64, 8, 4, 132), Config(128, 128, 64, 8, 3, 264, max_registers=128),
        Config(128, 128, 64, 4, 3, 264),
        Config(128, 128, 128, 8, 3, 132), Config(128, 256, 64, 8, 4, 132, swap=False), Config(128, 256, 64, 8, 4, 0),
    ]  # fmt: skip
    if tokens <= 128:
        return [*middle, Config(64, 256, 64, 8, 5, 132), Config(128, 64, 64, 4, 4, 264)]
    return [
        Config(256, 128, 64, 8, 4, 132), middle[0], middle[1], middle[4], middle[5], Config(64, 256, 64, 8, 5, 132),
        Config(256, 128, 64, 8, 4, 0), Config(256, 64, 64, 8, 4, 132),
    ]  # fmt: skip


def small(tokens: int) -> list[Config]:
    """For weights that are read in a few microseconds: what counts is that all SMs take part, and how they meet."""
    block_m = 32 if tokens <= 32 else 64 if tokens <= 64 else 128
    configs = [
        Config(block_m, 64, 128, 4, 3, 132), Config(block_m, 64, 64, 4, 4, 264), Config(block_m, 128, 64, 4, 4, 132),
        Config(block_m, 64, 128, 4, 4, 0), Config(max(64, block_m), 32, 128, 4, 4, 0, swap=False),
        Config(max(64, block_m), 32, 128, 4, 4, 132, swap=False),
    ]  # fmt: skip
    if tokens > 32:
        configs += [Config(32, 64, 128, 4, 4, 0)]
    if tokens > 64:
        configs += [Config(64, 64, 128, 4, 4, 0), Config(64, 32, 128, 4, 4, 0, swap=False)]
    if tokens > 128:
        configs += [Config(64, 128, 128, 4, 3, 0)]
    return configs


def fitting(shape: Shape, tokens: int) -> list[tuple[Config, bool]]:
    """Configurations and whether they compute the norm, of which only the first few are tried."""
    configs = large(tokens) if shape.bytes > 30_000_000 else small(tokens)
    if shape.form == "gate_up":
        configs = [dataclasses.replace(c, block_n=c.block_n // 2) for c in configs if not c.swap or c.block_n > 64]
    if shape.form == "gate_up" and shape.bytes <= 30_000_000:
        configs.append(Config(32 if tokens <= 32 else 64, 64, 128, 4, 3, 0))
        configs.append(Config(min(128, max(32, 1 << (tokens - 1).bit_length())), 64, 64, 4, 4, 264))
    return [(c, False) for c in configs] + [(c, True) for c in configs[:3] if shape.has_norm]


def call(
    shape: Shape, config: Config, x: torch.Tensor, w: torch.Tensor, gain: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    if shape.form == "gate_up":
        return kernels.gate_up(x, w, gain, EPS, config)
    if shape.form == "add":
        return kernels.linear_add(x, w, residual, None, config)
    return kernels.linear(x, w, None, gain, EPS, config)


class _Compiler:
    """In the kernel's place: compiles it instead of launching it."""

    def __init__(self, kernel: object) -> None:
        self.kernel = kernel

    def __getitem__(self, _: object) -> Callable[..., object]:
        return lambda *args, **options: self.kernel.warmup(*args, grid=(1,), **options)  # type: ignore[attr-defined]


def compile_one(form: str, config: Config, norm: bool) -> str:
    """In a process of the pool: the kernel lands in Triton's cache. Any shape will do. → '' or what is wrong."""
    try:
        if not isinstance(kernels._linear_kernel, _Compiler):
            kernels._linear_kernel = _Compiler(kernels._linear_kernel)
        shape = Shape("", form, 512, 512, norm)
        x = torch.empty(32, 512, dtype=torch.bfloat16, device="cuda")
        w = torch.empty(shape.rows, 512, dtype=torch.bfloat16, device="cuda")
        call(shape, config, x, w, x[0] if norm else None, torch.empty_like(w[:32]))
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


Key = tuple[str, Config, bool]


def key_of(form: str, config: Config, norm: bool) -> Key:
    """Configurations with the same key share a kernel."""
    return form, dataclasses.replace(config, programs=int(config.programs > 0)), norm


def compile_all(keys: list[Key], seconds: float) -> set[Key]:
    started, done = time.perf_counter(), set()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=context)
    futures: dict[Future[str], Key] = {pool.submit(compile_one, *key): key for key in keys}
    finished, _ = wait(futures, timeout=seconds)
    for future in finished:
        try:
            wrong = future.result()
        except Exception as error:
            wrong = repr(error)[:200]
        if wrong:
            print(f"FAILED to compile {futures[future]}: {wrong}", flush=True)
        else:
            done.add(futures[future])
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"compiled {len(done)} of {len(keys)} kernels in {time.perf_counter() - started:.1f} s", flush=True)
    return done


def graph_time(work: Callable[[], None], calls: int, budget: float = 0.008) -> float:
    """Seconds per call of `work`, which makes `calls` of them: best of 3 rounds of graph replays."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        work()
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


def reference(
    shape: Shape, x: torch.Tensor, gain: torch.Tensor | None, w: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    x32 = x.float()
    if gain is not None:
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS) * gain.float()
    y = torch.cat([x32 @ part.float().T for part in w.split(16384)], dim=-1)
    if shape.form == "gate_up":
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return residual.float() + y if shape.form == "add" else y


class Case:
    """A shape with a number of tokens: data, references, timings."""

    def __init__(self, shape: Shape, tokens: int, buffer: torch.Tensor, ops: TorchOps) -> None:
        self.shape, self.tokens, self.ops = shape, tokens, ops
        self.copies = min(100, max(2, -(-ROTATED // shape.bytes)))
        size = shape.rows * shape.k * self.copies
        self.weights = list(buffer[:size].view(self.copies, shape.rows, shape.k))
        self.x = torch.randn(256, shape.k, device="cuda").bfloat16()
        self.gain = (1 + 0.2 * torch.randn(shape.k, device="cuda")).bfloat16()
        self.residual = torch.randn(256, shape.n, device="cuda").bfloat16()
        self.expected = {
            (m, norm): self._reference(m, norm)
            for m in CHECKED.get(tokens, (tokens,))
            for norm in ({False, shape.has_norm})
        }

    def _reference(self, m: int, norm: bool) -> torch.Tensor:
        gain = self.gain if norm else None
        return reference(self.shape, self.x[:m], gain, self.weights[-1], self.residual[:m])

    def wrong(self, config: Config, norm: bool) -> str:
        """'' or what is wrong."""
        for (m, with_norm), expected in self.expected.items():
            if with_norm != norm:
                continue
            # Freed memory that the output may get next holds NaN.
            poison = torch.full((m, self.shape.n), torch.nan, dtype=torch.bfloat16, device="cuda")
            residual = self.residual[:m].clone()
            del poison
            gain = self.gain if norm else None
            actual = call(self.shape, config, self.x[:m], self.weights[-1], gain, residual).float()
            error = ((actual - expected).abs().max() / expected.abs().max()).item()
            if not error < 1e-2:
                return f"relative error {error:.3g} with {m} tokens"
        return ""

    def time(self, work: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]) -> float:
        x, residual = self.x[: self.tokens], torch.zeros_like(self.residual[: self.tokens])
        work(x, self.weights[0], residual)
        return graph_time(lambda: [work(x, w, residual) for w in self.weights] and None, self.copies)

    def own(self, config: Config, norm: bool) -> float:
        gain = self.gain if norm else None
        return self.time(lambda x, w, residual: call(self.shape, config, x, w, gain, residual))

    def cublas(self) -> float:
        if self.shape.form == "add":
            return self.time(lambda x, w, residual: residual.addmm_(x, w.T))
        return self.time(lambda x, w, _: F.linear(x, w))

    def separate(self) -> float:
        """cuBLAS with the kernels before and after."""

        def work(x: torch.Tensor, w: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            y = F.linear(self.ops.rms_norm(x, self.gain, EPS), w)
            return self.ops.silu_and_mul(y) if self.shape.form == "gate_up" else y

        return self.time(work)

    def normed(self, config: Config) -> float:
        """The norm's kernel, then ours without norm."""
        return self.time(
            lambda x, w, residual: call(
                self.shape, config, self.ops.rms_norm(x, self.gain, EPS), w, None, residual
            )
        )  # fmt: skip


def show(case: Case, label: str, seconds: float) -> None:
    rate, flops = case.shape.bytes / seconds, 2 * case.tokens * case.shape.bytes / 2 / seconds
    print(
        f"{case.shape.name:12s} {case.tokens:3d} {seconds * 1e6:8.2f} us {rate / 1e9:6.0f} GB/s {rate / PEAK:5.0%} "
        f"{flops / 1e12:5.0f} TFLOP/s  {label}",
        flush=True,
    )


def sweep(case: Case, compiled: set[Key], best: dict[tuple[str, bool, int], tuple[float, Config]]) -> None:
    shape, tokens = case.shape, case.tokens

    def attempt(label: str, measure: Callable[[], float]) -> float | None:
        try:
            seconds = measure()
        except Exception as error:  # the others go on
            print(f"FAILED {shape.name} {tokens} {label}: {type(error).__name__} {str(error)[:200]}", flush=True)
            return None
        show(case, label, seconds)
        return seconds

    attempt("cublas", case.cublas)
    if shape.has_norm:
        attempt("separate", case.separate)
    for config, norm in fitting(shape, tokens):
        if key_of(shape.form, config, norm) not in compiled:
            continue
        try:
            wrong = case.wrong(config, norm)
        except Exception as error:
            wrong = f"{type(error).__name__} {str(error)[:200]}"
        if wrong:
            print(f"WRONG {shape.name} {tokens} {config} norm={norm}: {wrong}", flush=True)
            continue
        seconds = attempt(f"{config}{' norm' if norm else ''}", lambda c=config, n=norm: case.own(c, n))
        if seconds is not None and seconds < best.get((shape.name, norm, tokens), (1.0, config))[0]:
            best[shape.name, norm, tokens] = seconds, config
    plain = best.get((shape.name, False, tokens))
    if shape.has_norm and plain is not None:
        attempt("norm's kernel + best without", lambda: case.normed(plain[1]))


def watch(seconds: int) -> None:
    """End the process for certain, whatever the device is doing."""

    def end() -> None:
        time.sleep(seconds)
        print("gave up: out of time", flush=True)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(3)

    threading.Thread(target=end, daemon=True).start()


def table(best: dict[tuple[str, bool, int], tuple[float, Config]], shapes: list[Shape], tokens: list[int]) -> str:
    lines = []
    for shape in shapes:
        for norm in (False, True):
            entries = [(m, *best[shape.name, norm, m]) for m in tokens if (shape.name, norm, m) in best]
            if entries:
                lines.append(f"    ({shape.n}, {shape.k}, {norm}): (  # {shape.name}")
                lines += [f"        ({m}, {config}),  # {s * 1e6:.2f} us" for m, s, config in entries]
                lines.append("    ),")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 128, 192, 256])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seconds", type=int, default=88, help="end after this long at the latest")
    args = parser.parse_args()
    started = time.perf_counter()
    watch(args.seconds)
    torch.manual_seed(0)
    shapes = [shape for name in args.models for shape in MODELS[name]]
    # Large models and few tokens first, should time run out.
    cases = [(shape, m) for m in args.tokens for shape in sorted(shapes, key=lambda s: -s.bytes)]
    keys = list(dict.fromkeys(key_of(s.form, c, norm) for s, m in cases for c, norm in fitting(s, m)))
    with ThreadPoolExecutor(1) as executor:
        made = executor.submit(make_ops)
        compiled = compile_all(keys, 0.5 * args.seconds)
        ops = made.result()
    kernels.prepare(torch.device("cuda"))
    num_elements = max(shape.bytes for shape in shapes) + ROTATED  # two copies, or more than ROTATED bytes
    buffer = torch.empty(num_elements, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    best: dict[tuple[str, bool, int], tuple[float, Config]] = {}
    for shape, m in cases:
        if time.perf_counter() - started > args.seconds - 8:
            print("out of time: the rest is left out", flush=True)
            break
        try:
            sweep(Case(shape, m, buffer, ops), compiled, best)
        except Exception as error:
            print(f"FAILED {shape.name} {m}: {type(error).__name__} {str(error)[:300]}", flush=True)
    print(f"\n{table(best, shapes, args.tokens)}\n{time.perf_counter() - started:.1f} s", flush=True)
    os._exit(0)  # without waiting for the compiler's processes


def make_ops() -> TorchOps:
    try:
        from minisgl.kernel.cuda import create_cuda_ops

        return create_cuda_ops(torch.device("cuda"))
    except Exception as error:
        print(f"FAILED to make our other kernels, torch's take their place: {str(error)[:200]}", flush=True)
        return TorchOps()


if __name__ == "__main__":
    main()
