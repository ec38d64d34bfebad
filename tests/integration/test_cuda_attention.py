"""The CUDA decode backend against a definition in float32: scattered pages, lengths, windows, groups, both kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from minisgl.attention.base import AttentionShape, AttentionStep
from minisgl.config.model import AttentionSpec, PagedKV
from minisgl.kernel.ops import PagedSequences
from minisgl.kvcache.pool import LayerCache

Tensor = torch.Tensor
HOPPER = (9, 0)
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER, reason="needs a Hopper GPU"
)


def make_shape(num_qo: int, num_kv: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> AttentionShape:
    return AttentionShape(num_qo, num_kv, dim, dtype, page_size=1, max_running_requests=64, max_seq_len=8192)


def spec_of(shape: AttentionShape, window: int | None) -> AttentionSpec:
    return AttentionSpec(PagedKV(shape.num_kv_heads, shape.head_dim, shape.head_dim), window)


class Case:
    """Sequences whose pages are scattered over a pool; slots that no token has hold NaN."""

    def __init__(self, shape: AttentionShape, lens: list[int], page_size: int) -> None:
        torch.manual_seed(len(lens) * 1000 + page_size)
        n, width = len(lens), -(-max(lens) // page_size) + 1
        table = torch.randperm(n * width, device="cuda").view(n, width).int()
        rows = torch.randperm(n, device="cuda").int()
        heads, dim = shape.num_qo_heads + 2 * shape.num_kv_heads, shape.head_dim
        self.q = torch.randn(n, heads, dim, device="cuda").to(shape.dtype)[:, : shape.num_qo_heads]
        size = (n * width * page_size, shape.num_kv_heads, dim)
        self.cache = LayerCache(*(torch.full(size, float("nan"), dtype=shape.dtype, device="cuda") for _ in range(2)))
        self.slots = []
        for row, length in zip(rows.tolist(), lens, strict=True):
            pos = torch.arange(length, device="cuda")
            self.slots.append(table[row].long()[pos // page_size] * page_size + pos % page_size)
            for cache in self.cache:
                cache[self.slots[-1]] = torch.randn(length, *size[1:], device="cuda").to(shape.dtype)
        seq_lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
        cu_q = torch.arange(n + 1, dtype=torch.int32, device="cuda")
        self.seqs = PagedSequences(table, rows, seq_lens, cu_q, page_size)
        rows_cpu, ones, table_cpu = rows.cpu().long().numpy(), np.ones(n, dtype=np.int64), table.cpu().numpy()
        starts, offsets = np.array(lens) - 1, np.arange(n + 1)
        self.step = AttentionStep(rows_cpu, starts, ones, offsets, table_cpu, page_size, n, self.seqs)

    def narrow(self) -> None:
        """The cache becomes e4m3."""
        self.cache = LayerCache(*(x.to(torch.float8_e4m3fn).view(torch.uint8) for x in self.cache))

    def widened(self) -> list[Tensor]:
        """Keys and values in float32."""
        return [(x.view(torch.float8_e4m3fn) if x.dtype == torch.uint8 else x).float() for x in self.cache]

    def reference(self, window: int | None, sinks: Tensor | None = None) -> Tensor:
        """In float32; zeros for an empty sequence."""
        out = torch.zeros(self.q.shape, device="cuda")
        group = self.q.shape[1] // self.cache.k.shape[1]
        for i, slots in enumerate(self.slots):
            seen = slots[-window:] if window else slots
            keys, values = (x[seen].repeat_interleave(group, dim=1) for x in self.widened())
            scores = torch.einsum("hd,khd->hk", self.q[i].float(), keys) / self.q.shape[2] ** 0.5
            if sinks is not None:
                scores = torch.cat((scores, sinks[:, None]), 1)
            out[i] = torch.einsum("hk,khd->hd", scores.softmax(-1)[:, : len(seen)], values)
        return out


def check(out: Tensor, expected: Tensor) -> None:
    """Every (sequence, head) by itself, so that one wrong one does not hide among many; empty sequences are zero."""
    error = (out.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
    assert error.isfinite().all()
    assert error.max() < 0.02


@pytest.mark.gpu
@needs_hopper
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("num_qo", "num_kv", "dim", "dtype", "plan"),
    [
        (16, 8, 128, torch.bfloat16, None),
        (40, 8, 128, torch.bfloat16, None),
        (64, 8, 128, torch.float16, None),
        (16, 1, 128, torch.bfloat16, None),  # two tensor-core tiles of queries
        (16, 2, 128, torch.bfloat16, None),
        (32, 8, 64, torch.bfloat16, None),
        (3, 3, 64, torch.float16, None),
        (28, 4, 128, torch.bfloat16, None),
        (32, 16, 64, torch.bfloat16, None),
        (16, 8, 128, torch.bfloat16, (4, 1)),
        (40, 8, 128, torch.bfloat16, (4, 2)),
        (16, 2, 128, torch.bfloat16, (4, 1)),
        (16, 1, 128, torch.bfloat16, (4, 2)),
        (32, 8, 64, torch.bfloat16, (16, 1)),
        (32, 8, 64, torch.bfloat16, (8, 2)),
        (16, 4, 256, torch.bfloat16, None),
        (16, 2, 256, torch.float16, None),
        (16, 1, 256, torch.bfloat16, None),
    ],
)
def test_decode(num_qo: int, num_kv: int, dim: int, dtype: torch.dtype, plan: tuple[int, int] | None) -> None:
    from minisgl.attention.cuda import CudaBackend

    shape = make_shape(num_qo, num_kv, dim, dtype)
    backend = CudaBackend(shape, torch.device("cuda", torch.cuda.current_device()), plan)
    batches = [[1], [1000], [5000], [0, 1, 2, 15, 16, 17, 127, 128, 129], [1, 3000, 1, 700], [63, 64, 65] * 20]
    for page_size in (1, 7, 16):
        for lens in batches:
            case = Case(shape, lens, page_size)
            for window in (None, 1, 100):
                expected = case.reference(window)
                for cluster in (0, 1, 2, 8, 16):
                    for fresh in (0, 1, 70):
                        out = torch.full(case.q.shape, float("nan"), dtype=dtype, device="cuda")
                        given = torch.tensor([fresh], dtype=torch.int32, device=out.device) if fresh else None
                        backend.launch(case.q, case.cache, window or 0, case.seqs, out, cluster, given)
                        check(out, expected)
                metadata = backend.prepare(case.step, captured=False)
                check(backend.forward(case.q, case.cache, spec_of(shape, window), metadata), expected)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("num_qo", "num_kv", "dim", "dtype"),
    [
        (16, 8, 128, torch.bfloat16),
        (40, 8, 128, torch.bfloat16),
        (16, 1, 128, torch.float16),
        (24, 2, 64, torch.float16),
        (16, 2, 256, torch.bfloat16),
    ],
)
def test_decode_of_e4m3(num_qo: int, num_kv: int, dim: int, dtype: torch.dtype) -> None:
    from minisgl.attention.cuda import CudaBackend

    shape = replace(make_shape(num_qo, num_kv, dim, dtype), has_float8=True)
    backend = CudaBackend(shape, torch.device("cuda", torch.cuda.current_device()))
    for page_size in (1, 16):
        for lens in ([1], [1000], [0, 1, 2, 15, 16, 17, 127, 128, 129], [1, 3000, 1, 700], [63, 64, 65] * 20):
            case = Case(shape, lens, page_size)
            case.narrow()
            for window in (None, 100):
                expected = case.reference(window)
                for cluster in (0, 1, 2, 16):
                    out = torch.full(case.q.shape, float("nan"), dtype=dtype, device="cuda")
                    backend.launch(case.q, case.cache, window or 0, case.seqs, out, cluster, None)
                    check(out, expected)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("num_qo", "num_kv", "dim", "float8"),
    [
        (64, 8, 64, False),
        (10, 2, 128, False),
        (16, 1, 128, True),
        (28, 4, 64, True),
        (3, 3, 128, False),
        (16, 4, 256, False),
    ],
)
def test_sinks(num_qo: int, num_kv: int, dim: int, float8: bool) -> None:
    """Of both kernels, split and merged; one head's sink outweighs all tokens, another's counts nothing."""
    from minisgl.attention.cuda import CudaBackend

    shape = replace(make_shape(num_qo, num_kv, dim), has_float8=float8)
    backend = CudaBackend(shape, torch.device("cuda", torch.cuda.current_device()))
    sinks = torch.randn(num_qo, device="cuda") * 2
    sinks[0], sinks[1], sinks[-1] = 5.0, -80.0, 3.0
    for lens in ([1], [1000], [0, 1, 2, 15, 16, 17, 127, 128, 129], [1, 3000, 1, 700], [63, 64, 65] * 20):
        case = Case(shape, lens, 16)
        if float8:
            case.narrow()
        for window in (None, 128):
            expected = case.reference(window, sinks)
            for cluster in (0, 1, 2, 16):
                out = torch.full(case.q.shape, float("nan"), dtype=shape.dtype, device="cuda")
                backend.launch(case.q, case.cache, window or 0, case.seqs, out, cluster, None, sinks)
                check(out, expected)
            metadata = backend.prepare(case.step, captured=False)
            check(backend.forward(case.q, case.cache, spec_of(shape, window), metadata, sinks), expected)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.timeout(300)
@pytest.mark.parametrize("plan", [(8, 1), (4, 1), (4, 2)])
def test_decode_many_sequences_twice_in_a_graph(plan: tuple[int, int]) -> None:
    """The counters of split sequences are zero again after each launch; lengths may change between replays."""
    from minisgl.attention.cuda import CudaBackend

    shape = make_shape(16, 8, 128)
    backend = CudaBackend(shape, torch.device("cuda", torch.cuda.current_device()), plan)
    lens = [1 + 37 * i % 1500 for i in range(300)]
    case = Case(shape, lens, 16)
    metadata, spec = backend.prepare(case.step, captured=True), spec_of(shape, None)
    backend.forward(case.q, case.cache, spec, metadata)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [backend.forward(case.q, case.cache, spec, metadata) for _ in range(3)]
    for shorter in (0, 0, 1, 5):
        case.seqs.seq_lens.copy_(torch.tensor([max(1, x - shorter) for x in lens], dtype=torch.int32))
        case.slots = [slots[: max(1, x - shorter)] for slots, x in zip(case.slots, lens, strict=True)]
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        expected = case.reference(None)
        for out in outs:
            check(out, expected)


def test_cluster_size_fills_the_gpu_then_leaves_it_to_the_stream_kernel() -> None:
    from minisgl.attention.cuda import cluster_size

    assert [cluster_size(n, 8, 132) for n in (1, 2, 4, 16, 33, 34, 256)] == [16, 16, 8, 2, 1, 0, 0]
