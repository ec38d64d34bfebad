"""Triton's attention kernels: correct first, then how fast. Prefill in TFLOP/s, decode as a share of copy bandwidth.

    python benchmark/kernels/attention_prefill.py [--only prefill|decode] [--seconds 58]

Each variant of blocks is compiled, compared with torch on a small batch, then timed from a CUDA graph over several
copies of the cache that together exceed the L2. A variant that fails is a row of the table.
"""

from __future__ import annotations

import argparse
import signal
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from minisgl.kernel.ops import PagedSequences
from minisgl.kernel.triton.attention import attention, num_splits, query_blocks
from minisgl.kernel.triton.common import Tile

Tensor = torch.Tensor
DEVICE, DTYPE, HEAD_DIM, NUM_KV_HEADS = torch.device("cuda"), torch.bfloat16, 128, 8
DECODE_VARIANTS = (
    Tile(16, 64, 4, 3),
    Tile(16, 64, 4, 5),
    Tile(16, 64, 2, 3),
    Tile(16, 64, 8, 5),
    Tile(16, 128, 4, 3),
    Tile(16, 128, 8, 3),
    Tile(16, 32, 2, 5),
    Tile(16, 32, 4, 7),
)
PREFILL_VARIANTS = (
    Tile(128, 64, 8, 3),
    Tile(128, 64, 8, 5),
    Tile(128, 128, 8, 3),
    Tile(128, 128, 8, 2),
    Tile(64, 64, 4, 3),
)
# (name, sequence lengths, of which new)
PREFILLS = (
    ("1 x 8192", [8192], [8192]),
    ("8 x 1024", [1024] * 8, [1024] * 8),
    ("4 x 64 of 4096", [4096] * 4, [64] * 4),
)
# (sequences, tokens, query heads per KV head); of the groups beyond 2 only the first variants
DECODES = ((256, 1000, 2), (16, 4000, 2), (1, 8192, 2), (256, 1000, 5), (256, 1000, 8))


class Case:
    """Sequences on scattered pages; caches: as many copies as it takes to exceed 200 MB."""

    def __init__(self, seq_lens: list[int], num_new: list[int], group: int, page_size: int) -> None:
        rng = np.random.default_rng(0)
        counts = [-(-n // page_size) for n in seq_lens]
        table = np.zeros((len(seq_lens), max(counts)), dtype=np.int32)
        pages = rng.permutation(sum(counts))
        for i, end in enumerate(np.cumsum(counts)):
            table[i, : counts[i]] = pages[end - counts[i] : end]
        ints = partial(torch.tensor, dtype=torch.int32, device=DEVICE)
        self.table, self.num_new, self.seq_lens, self.page_size = table, num_new, seq_lens, page_size
        self.seqs = PagedSequences(
            ints(table), ints(range(len(seq_lens))), ints(seq_lens), ints([0, *np.cumsum(num_new)]), page_size
        )
        torch.manual_seed(0)
        self.q = torch.randn(sum(num_new), group * NUM_KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
        shape = (len(pages) * page_size, NUM_KV_HEADS, HEAD_DIM)
        self.kv_bytes = 2 * sum(seq_lens) * NUM_KV_HEADS * HEAD_DIM * 2
        copies = max(2, 200_000_000 // self.kv_bytes + 1)
        self.caches = [torch.randn(2, *shape, device=DEVICE, dtype=DTYPE) for _ in range(min(copies, 16))]
        starts = np.array(seq_lens) - np.array(num_new)
        self.flops = 4 * HEAD_DIM * group * NUM_KV_HEADS * int(
            sum(n * s + n * (n + 1) // 2 for s, n in zip(starts, num_new, strict=True))
        )  # fmt: skip

    def blocks(self, config: Tile) -> Tensor:
        num_new = np.array(self.num_new)
        group = self.q.shape[1] // NUM_KV_HEADS
        blocks = query_blocks(np.array(self.seq_lens) - num_new, num_new, group, config.block_m)
        return torch.from_numpy(blocks).to(DEVICE)

    def reference(self) -> Tensor:
        """By torch, one sequence at a time."""
        out, first = [], 0
        for i, (length, new) in enumerate(zip(self.seq_lens, self.num_new, strict=True)):
            pos = np.arange(length)
            slots = self.table[i, pos // self.page_size].astype(np.int64) * self.page_size + pos % self.page_size
            k, v = self.caches[0][:, torch.from_numpy(slots).to(DEVICE)].transpose(1, 2)[:, None]
            q = self.q[first : first + new].transpose(0, 1)[None]
            seen = torch.ones(new, length, device=DEVICE, dtype=torch.bool).tril(length - new)
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1))
            first += new
        return torch.cat(out)


def seconds(calls: list[Callable[[], Any]], repeats: int = 7) -> float:
    """Median time of one call, all of them in one CUDA graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """Bytes per second that a kernel's large copy reads and writes."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    return 8 * source.numel() / seconds([lambda: torch.neg(source, out=target)] * 4)


def check(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out.float(), expected.float(), atol=2e-2, rtol=2e-2)


def bench_prefill(config: Tile, page_size: int, group: int = 2) -> Any:
    def run(case: Case, caches: Tensor, blocks: Tensor) -> Tensor:
        return attention(case.q, caches[0], caches[1], case.seqs, blocks, None, 1, config, True)

    small = Case([700, 130], [300, 130], group, page_size)
    check(run(small, small.caches[0], small.blocks(config)), small.reference())
    row = []
    for _, seq_lens, num_new in PREFILLS:
        case = Case(seq_lens, num_new, group, page_size)
        blocks = case.blocks(config)
        taken = seconds([partial(run, case, caches, blocks) for caches in case.caches[:6]])
        row.append(f"{case.flops / taken / 1e12:.0f}")
    return row


def bench_decode(config: Tile, page_size: int, bandwidth: float, groups: bool) -> Any:
    sms = torch.cuda.get_device_properties(0).multi_processor_count

    def run(case: Case, caches: Tensor, splits: int) -> Tensor:
        return attention(case.q, caches[0], caches[1], case.seqs, None, None, splits, config, True)

    small = Case([700, 130, 1], [1, 1, 1], 2, page_size)
    for splits in (1, 5):
        check(run(small, small.caches[0], splits), small.reference())
    row = []
    for batch, length, group in DECODES if groups else DECODES[:3]:
        case = Case([length] * batch, [1] * batch, group, page_size)
        splits = num_splits(batch, NUM_KV_HEADS, length, config.block_n, sms)
        taken = seconds([partial(run, case, caches, splits) for caches in case.caches])
        row.append(f"{taken * 1e6:.1f} us {case.kv_bytes / taken / bandwidth:.0%}")
        del case
    return row


def attempt(function: Callable[..., Any], *args: Any) -> list[str]:
    try:
        return function(*args)
    except Exception as error:  # one variant's failure is a result too
        return [f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["prefill", "decode"])
    parser.add_argument("--seconds", type=int, default=58, help="give up after as many")
    args = parser.parse_args()
    signal.alarm(args.seconds)
    torch.cuda.init()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    table: list[tuple[str, list[str]]] = []
    if args.only != "decode":
        table.append(("prefill TFLOP/s, group 2", [name for name, _, _ in PREFILLS]))
        variants = [(16, config) for config in PREFILL_VARIANTS] + [
            (128, PREFILL_VARIANTS[0]),
            (128, PREFILL_VARIANTS[2]),
        ]
        for page_size, c in variants:
            name = f"page {page_size}: {c.block_m} x {c.block_n}, {c.num_warps} warps, {c.num_stages} stages"
            table.append((name, attempt(bench_prefill, c, page_size)))
            print(*table[-1], flush=True)
    if args.only != "prefill":
        bandwidth = copy_bandwidth()
        table.append((f"decode, of {bandwidth / 1e9:.0f} GB/s", [f"{b} x {n}, group {g}" for b, n, g in DECODES]))
        for page_size, d in [(16, d) for d in DECODE_VARIANTS] + [(1, DECODE_VARIANTS[0]), (128, DECODE_VARIANTS[0])]:
            name = f"page {page_size}: {d.block_n}, {d.num_warps} warps, {d.num_stages} stages"
            table.append(
                (name, attempt(bench_decode, d, page_size, bandwidth, d in DECODE_VARIANTS[:2] and page_size > 1))
            )
            print(*table[-1], flush=True)
    print()
    for name, row in table:
        print("| " + " | ".join([f"{name:42}", *(f"{cell:>18}" for cell in row)]) + " |")


if __name__ == "__main__":
    main()
