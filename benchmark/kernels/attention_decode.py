"""Decode attention on one GPU: is it right, how many microseconds, what share of the bandwidth of a copy?

    python benchmark/kernels/attention_decode.py [--quick] [--seconds 540] [--shape 16,8,128]

Every variant is first compared with float32 (rows of others hold NaN, the output too; the second of two graph replays
counts). Then a CUDA graph of as many layers as it takes to exceed the L2 cache is replayed; the median of the replays,
divided by the layers, is the time of a call. `stream` and `cluster N` are the two kernels of the cuda backend, `+early`
reads old tokens before the kernels before it are done. A row that fails says so and the rest goes on.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

import torch

from minisgl.attention.base import PagedBatch
from minisgl.attention.cuda import CudaBackend, cluster_size
from minisgl.attention.paged import AttentionShape

Tensor = torch.Tensor
Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k_cache, v_cache → out
SHAPES = [(16, 8, 128), (40, 8, 128), (64, 8, 128), (16, 2, 128), (32, 8, 64)]
BATCHES = (1, 16, 64, 256)
REPLAYS = 15
MIN_BYTES = 400 << 20  # of keys and values in a graph: several times the L2 cache


def graph_of(body: Callable[[], None]) -> torch.cuda.CUDAGraph:
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
    """GB/s read and written by a copy of 2 GiB."""
    source = torch.zeros(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    graph = graph_of(lambda: target.copy_(source))
    return 2 * source.numel() / median_us(graph) / 1000


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
        self.batch = PagedBatch(table, rows, seq_lens, cu_q, page_size, 1, max(lens))
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

    def expected(self, k: Tensor, v: Tensor) -> Tensor:
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
        expected = self.expected(k, v)
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


def variants(case: Case, shape: AttentionShape, quick: bool) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Names, and functions that make the call; making it may fail too."""
    device = torch.device("cuda", torch.cuda.current_device())

    def cuda(cluster: int, early: bool) -> Call:
        backend = CudaBackend(shape, device)
        out = torch.empty(case.q.shape, dtype=case.q.dtype, device=device)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            backend.launch(q, k, v, None, case.batch, out, cluster, early)
            return out

        return call

    def triton() -> Call:
        from minisgl.attention.triton import TritonBackend

        backend = TritonBackend(shape, device)
        return lambda q, k, v: backend.decode(q, k, v, None, case.batch)

    n, sms = len(case.lens), torch.cuda.get_device_properties(device).multi_processor_count
    chosen = cluster_size(n, shape.num_kv_heads, sms)
    sizes = [chosen] if quick else sorted({0, 1, chosen, *([2, 4, 8, 16] if n * shape.num_kv_heads < 256 else [])})
    for size in sizes:
        for early in (False, True):
            name = f"{f'cluster {size}' if size else 'stream'}{' +early' if early else ''}"
            yield name + (" *" if size == chosen else ""), lambda size=size, early=early: cuda(size, early)
    yield "triton", triton


def cases(quick: bool, only: tuple[int, ...] | None) -> Iterator[tuple[AttentionShape, int, str, list[int], int]]:
    generator = torch.Generator().manual_seed(1)
    for num_qo, num_kv, dim in [only] if only else SHAPES:  # type: ignore[misc]
        for n in BATCHES:
            uniform = torch.randint(100, 2001, (n,), generator=generator).tolist()
            for name, lens in (("1000", [1000] * n), ("100-2000", uniform)):
                for page_size in (1, 16):
                    if quick and (page_size == 16) == (name == "1000"):
                        continue
                    yield (
                        AttentionShape(num_qo, num_kv, dim, torch.bfloat16, page_size, 256, 4096),
                        n,
                        name,
                        lens,
                        page_size,
                    )


def alive() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run(args: argparse.Namespace, rows: list[str]) -> int:
    """Fills `rows` with lines of the table → failures."""
    peak = copy_bandwidth()
    rows.append(f"{torch.cuda.get_device_name()}: a copy moves {peak:.0f} GB/s; * is what the backend chooses")
    rows.append(f"{'Hq,Hkv,D':>10} {'batch':>5} {'tokens':>8} {'page':>4} {'us':>8} {'GB/s':>6} {'share':>6}  variant")
    failures = 0
    for shape, n, name, lens, page_size in cases(args.quick, args.shape):
        label = f"{shape.num_qo_heads},{shape.num_kv_heads},{shape.head_dim}"
        case = Case(shape, lens, page_size)
        for variant, make in variants(case, shape, args.quick):
            start = f"{label:>10} {n:>5} {name:>8} {page_size:>4}"
            try:
                call = make()
                case.check(call)
                us = case.time_us(call)
                speed = case.num_bytes / us / 1000
                row = f"{start} {us:8.2f} {speed:6.0f} {speed / peak:6.1%}  {variant}"
            except ImportError as error:
                row = f"{start} {'-':>8} {'-':>6} {'-':>6}  {variant}: {error}"
            except Exception as error:
                failures += 1
                row = f"{start}  FAILED  {variant}: {type(error).__name__}: {str(error)[:200]}"
                traceback.print_exc()
            rows.append(row)
            print(row, flush=True)
            if failures and not alive():
                rows.append("the GPU's context is lost; the rest was not run")
                return failures
        del case
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="what the backend chooses, half of the cases")
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
