"""Decode attention on one GPU: is it right, how many microseconds, what share of the bandwidth of a copy?

    python benchmark/kernels/attention_decode.py [--quick | --sweep] [--seconds 540] [--shape 16,8,128]

Every variant is first compared with float32 (rows of others hold NaN, the output too; the second of two graph replays
counts). Then a CUDA graph of as many layers as it takes to exceed the L2 cache is replayed; the median of the replays,
divided by the layers, is the time of a call. `stream` and `cluster N` are the two kernels of the cuda backend, `+early`
reads old tokens before the kernels before it are done. A row that fails says so and the rest goes on.

`--sweep` times the plans of the stream kernel (`stream WARPSxBLOCKS`), clusters and Triton at pages of 16 tokens, with
early reads, and ends with the fastest of each batch.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from minisgl.attention.base import AttentionShape, AttentionStep
from minisgl.attention.cuda import MAX_CLUSTER, PLANS, CudaBackend, cluster_size
from minisgl.config.model import AttentionSpec, PagedKV
from minisgl.kernel.ops import PagedSequences
from minisgl.kvcache.pool import LayerCache

Tensor = torch.Tensor
Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k_cache, v_cache → out
SHAPES = [(16, 8, 128), (40, 8, 128), (64, 8, 128), (16, 2, 128), (32, 8, 64)]
BATCHES = (1, 16, 64, 256)
SWEEP_BATCHES = (16, 32, 64, 128, 256)
SWEEP_PLANS = {
    64: ((8, 1), (4, 1), (8, 2), (16, 1)),
    128: ((8, 1), (4, 1), (4, 2)),
    256: ((4, 1), (2, 1), (2, 2)),
}  # by head_dim: warps, blocks
SWEEP_CLUSTER_BLOCKS_PER_SM = 4  # clusters of more blocks are not tried
REPLAYS = 15
MIN_BYTES = 400 << 20  # of keys and values in a graph: several times the L2 cache


def graph_of(body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def median_us(graph: torch.cuda.CUDAGraph) -> float:
    """Of one replay. The host runs ahead, so that launches do not count."""
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) * 1000


def copy_bandwidth() -> float:
    """GB/s read and written by a copy of 2 GiB by a kernel; the copy engine is slower."""
    source = torch.zeros(1 << 29, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    graph = graph_of(lambda: torch.neg(source, out=target))
    return 8 * source.numel() / median_us(graph) / 1000


class Case:
    """A batch, and the caches of several layers in which its tokens stand at random pages."""

    def __init__(self, shape: AttentionShape, lens: list[int], page_size: int) -> None:
        torch.manual_seed(0)
        n, width = len(lens), -(-max(lens) // page_size)
        self.lens, self.shape = lens, shape
        table = torch.randperm(n * width, device="cuda").view(n, width).int()
        seq_lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
        rows = torch.arange(n, dtype=torch.int32, device="cuda")
        cu_q = torch.arange(n + 1, dtype=torch.int32, device="cuda")
        seqs = PagedSequences(table, rows, seq_lens, cu_q, page_size)
        ones, table_cpu = np.ones(n, dtype=np.int64), table.cpu().numpy()
        self.step = AttentionStep(
            np.arange(n), np.array(lens) - 1, ones, np.arange(n + 1), table_cpu, page_size, num_decode=n, device=seqs
        )
        self.num_bytes = sum(lens) * shape.num_kv_heads * shape.head_dim * 4
        num_layers = min(128, max(8, -(-MIN_BYTES // self.num_bytes))) if n < 256 else 4
        size = (n * width * page_size, shape.num_kv_heads, shape.head_dim)
        positions = torch.arange(width * page_size, device="cuda")
        slots = table.long()[:, positions // page_size] * page_size + positions % page_size
        foreign = slots[positions >= seq_lens[:, None]]
        self.slots = [slots[i, :length] for i, length in enumerate(lens)]
        self.caches = [[torch.randn(size, device="cuda", dtype=shape.dtype) for _ in "kv"] for _ in range(num_layers)]
        for cache in (cache for pair in self.caches for cache in pair):
            cache[foreign] = float("nan")
        heads = shape.num_qo_heads + 2 * shape.num_kv_heads
        self.q = torch.randn(n, heads, shape.head_dim, device="cuda", dtype=shape.dtype)[:, : shape.num_qo_heads]

    @functools.cached_property
    def expected(self) -> Tensor:
        """Of the first layer."""
        k, v = self.caches[0]
        group = self.shape.num_qo_heads // self.shape.num_kv_heads
        out = torch.empty(self.q.shape, device="cuda")
        for i, slots in enumerate(self.slots):
            q = self.q[i].float().view(-1, group, self.shape.head_dim)
            scores = torch.einsum("hgd,khd->hgk", q, k[slots].float()) / self.shape.head_dim**0.5
            out[i] = torch.einsum("hgk,khd->hgd", scores.softmax(-1), v[slots].float()).flatten(0, 1)
        return out

    def check(self, call: Call) -> None:
        """Raises: AssertionError with the number that is wrong."""
        k, v = self.caches[0]
        outs: list[Tensor] = []
        graph = graph_of(lambda: outs.append(call(self.q, k, v)))
        out = outs[-1]
        for _ in range(2):
            out.fill_(float("nan"))
            graph.replay()
        expected = self.expected
        assert out.isfinite().all(), f"{int((~out.isfinite()).sum())} values are not finite"
        error = float((out.float() - expected).norm() / expected.norm())
        worst = float(((out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
        assert error < 1e-2, f"relative error {error:.4f}"
        assert worst < 5e-2, f"relative error {worst:.4f} of one head"

    def time_us(self, call: Call) -> float:
        def layers() -> None:
            for k, v in self.caches:
                call(self.q, k, v)

        return median_us(graph_of(layers)) / len(self.caches)


def cuda_call(case: Case, cluster: int, early: bool, plan: tuple[int, int] | None = None) -> Call:
    device = torch.device("cuda", torch.cuda.current_device())
    backend = CudaBackend(case.shape, device, plan)
    out = torch.empty(case.q.shape, dtype=case.q.dtype, device=device)
    fresh = torch.ones(1, dtype=torch.int32, device=device) if early else None

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        backend.launch(q, LayerCache(k, v), 0, case.step.on_device(), out, cluster, fresh)
        return out

    return call


def triton_call(case: Case) -> Call:
    from minisgl.attention.triton import TritonBackend

    backend = TritonBackend(case.shape, torch.device("cuda", torch.cuda.current_device()))
    spec = AttentionSpec(PagedKV(case.shape.num_kv_heads, case.shape.head_dim, case.shape.head_dim))
    metadata = backend.prepare(case.step, captured=False)
    return lambda q, k, v: backend.forward(q, LayerCache(k, v), spec, metadata)


def variants(case: Case, quick: bool) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Names, and functions that make the call; making it may fail too. * is what the backend chooses."""
    n, num_kv = len(case.lens), case.shape.num_kv_heads
    chosen = cluster_size(n, num_kv, num_sms())
    sizes = [chosen] if quick else sorted({0, 1, chosen, *([2, 4, 8, 16] if n * num_kv < 256 else [])})
    for size in sizes:
        for early in (False, True):
            name = f"{f'cluster {size}' if size else 'stream'}{' +early' if early else ''}"
            yield name + (" *" if size == chosen else ""), functools.partial(cuda_call, case, size, early)
    yield "triton", functools.partial(triton_call, case)


def sweep_variants(case: Case) -> Iterator[tuple[str, Callable[[], Call]]]:
    n, num_kv = len(case.lens), case.shape.num_kv_heads
    chosen = cluster_size(n, num_kv, num_sms())
    for plan in SWEEP_PLANS[case.shape.head_dim]:
        star = " *" if not chosen and plan == PLANS[case.shape.head_dim] else ""
        yield f"stream {plan[0]}x{plan[1]}{star}", functools.partial(cuda_call, case, 0, True, plan)
    size = 1
    while size <= MAX_CLUSTER and n * num_kv * size <= SWEEP_CLUSTER_BLOCKS_PER_SM * num_sms():
        star = " *" if chosen == size else ""
        yield f"cluster {size}{star}", functools.partial(cuda_call, case, size, True, PLANS[case.shape.head_dim])
        size *= 2
    yield "triton", functools.partial(triton_call, case)


def num_sms() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def compile_all(shapes: list[tuple[int, int, int]]) -> None:
    """The kernels of a sweep, at once: each takes a compiler some 20 s. What fails says so when it is used."""
    device = torch.device("cuda", torch.cuda.current_device())

    def build(shape: tuple[int, int, int], plan: tuple[int, int]) -> None:
        try:
            CudaBackend(AttentionShape(*shape, torch.bfloat16, 16, 256, 4096), device, plan)
        except Exception:
            traceback.print_exc()

    jobs = [(shape, plan) for shape in shapes for plan in SWEEP_PLANS[shape[2]]]
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        for future in [pool.submit(build, *job) for job in jobs]:
            future.result()


def cases(args: argparse.Namespace) -> Iterator[tuple[AttentionShape, int, str, list[int], int]]:
    """Shapes, batch sizes, names of the lengths, lengths, page sizes."""
    generator = torch.Generator().manual_seed(1)
    for num_qo, num_kv, dim in [args.shape] if args.shape else SHAPES:
        for n in SWEEP_BATCHES if args.sweep else BATCHES:
            uniform = torch.randint(100, 2001, (n,), generator=generator).tolist()
            for name, lens in (("1000", [1000] * n), ("100-2000", uniform)):
                for page_size in (16,) if args.sweep else (1, 16):
                    if args.quick and (page_size == 16) == (name == "1000"):
                        continue
                    shape = AttentionShape(num_qo, num_kv, dim, torch.bfloat16, page_size, 256, 4096)
                    yield shape, n, name, lens, page_size


def alive() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def measure(case: Case, start: str, peak: float, name: str, make: Callable[[], Call]) -> tuple[str, float | None, bool]:
    """→ a row of the table, microseconds, whether it failed."""
    try:
        call = make()
        case.check(call)
        us = case.time_us(call)
        speed = case.num_bytes / us / 1000
        return f"{start} {us:8.2f} {speed:6.0f} {speed / peak:6.1%}  {name}", us, False
    except ImportError as error:
        return f"{start} {'-':>8} {'-':>6} {'-':>6}  {name}: {error}", None, False
    except Exception as error:
        traceback.print_exc()
        return f"{start}  FAILED  {name}: {type(error).__name__}: {str(error)[:200]}", None, True


def best_of(start: str, times: dict[str, float]) -> str:
    """The case's times, fastest first."""
    return f"{start}  " + "  ".join(f"{name} {us:.1f}" for name, us in sorted(times.items(), key=lambda item: item[1]))


def run(args: argparse.Namespace, rows: list[str]) -> int:
    """Fills `rows` with lines of the table → failures."""
    if args.sweep:
        begin = time.monotonic()
        compile_all([args.shape] if args.shape else SHAPES)
        print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    peak = copy_bandwidth()
    rows.append(f"{torch.cuda.get_device_name()}: a copy moves {peak:.0f} GB/s; * is what the backend chooses")
    columns = "fastest first, us" if args.sweep else f"{'us':>8} {'GB/s':>6} {'share':>6}  variant"
    rows.append(f"{'Hq,Hkv,D':>10} {'batch':>5} {'tokens':>8} {'page':>4} {columns}")
    failures = 0
    for shape, n, name, lens, page_size in cases(args):
        start = f"{shape.num_qo_heads},{shape.num_kv_heads},{shape.head_dim}"
        start = f"{start:>10} {n:>5} {name:>8} {page_size:>4}"
        case = Case(shape, lens, page_size)
        times: dict[str, float] = {}
        for variant, make in sweep_variants(case) if args.sweep else variants(case, args.quick):
            row, us, failed = measure(case, start, peak, variant, make)
            print(row, flush=True)
            failures += failed
            if us is not None:
                times[variant] = us
            if failed or not args.sweep:
                rows.append(row)
            if failures and not alive():
                rows.append("the GPU's context is lost; the rest was not run")
                return failures
        if args.sweep:
            rows.append(best_of(start, times))
        del case
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="what the backend chooses, half of the cases")
    parser.add_argument("--sweep", action="store_true", help="the kernels' variants against each other")
    parser.add_argument("--seconds", type=int, default=540, help="stop after this long")
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split(","))), help="query heads,KV heads,dim")
    args = parser.parse_args()
    rows: list[str] = []

    def stop() -> None:
        print("\n".join(["", *rows, f"stopped after {args.seconds} s"]), flush=True)
        os._exit(124)

    # A thread of its own: a handler of a signal waits for Python, which may wait for the GPU for ever. The alarm, whose
    # default is to end the process, is for when the thread cannot run either.
    watchdog = threading.Timer(args.seconds, stop)
    watchdog.daemon = True
    watchdog.start()
    signal.alarm(args.seconds + 15)
    failures = run(args, rows)
    print("\n".join(["", *rows, f"{failures} failed"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
