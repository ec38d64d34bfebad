"""Triton's attention kernels against a definition; on a GPU, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.triton_cpu import DEVICE, DTYPES, INTERPRET, MARKS, needs_gpu

pytestmark = MARKS
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Shape:
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int
    max_running_requests: int = 8
    max_seq_len: int = 4096


@dataclass(frozen=True)
class Batch:
    page_table: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    cu_q: torch.Tensor
    page_size: int
    max_q_len: int
    max_seq_len: int
    starts_cpu: np.ndarray[Any, Any]
    num_new_cpu: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """A batch and what it attends to. Slots that belong to nobody hold NaN."""

    shape: Shape
    batch: Batch
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def make_case(shape: Shape, starts: list[int], num_new: list[int], seed: int = 0) -> Case:
    rng, page = np.random.default_rng(seed), shape.page_size
    torch.manual_seed(seed)
    seq_lens = np.array(starts) + np.array(num_new)
    num_seqs, max_pages = len(starts), max(-(-int(seq_lens.max()) // page), 1) + 1
    table = rng.permutation((num_seqs + 1) * max_pages).reshape(num_seqs + 1, max_pages).astype(np.int32)
    rows = rng.permutation(num_seqs + 1)[:num_seqs].astype(np.int32)
    k = torch.full((table.size * page, shape.num_kv_heads, shape.head_dim), float("nan"))
    v = k.clone()
    for row, seq_len in zip(rows, seq_lens, strict=True):
        pos = np.arange(seq_len)
        slots = torch.from_numpy(table[row, pos // page].astype(np.int64) * page + pos % page)
        k[slots], v[slots] = torch.randn(2, len(slots), shape.num_kv_heads, shape.head_dim)
        table[row, -(-seq_len // page) :] = 2**30  # entries beyond a sequence's end mean nothing
    num_heads = shape.num_qo_heads + 2 * shape.num_kv_heads  # as a view of a wider tensor
    q = torch.randn(sum(num_new), num_heads, shape.head_dim)[:, : shape.num_qo_heads]

    def ints(array: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(array), dtype=torch.int32, device=DEVICE)

    batch = Batch(
        ints(table), ints(rows), ints(seq_lens), ints(np.concatenate(([0], np.cumsum(num_new)))), page,
        max(num_new), int(seq_lens.max()), np.array(starts), np.array(num_new),
    )  # fmt: skip
    q, k, v = (x.to(DEVICE, shape.dtype) for x in (torch.empty_like(q).copy_(q), k, v))
    wide = q.new_zeros(len(q), num_heads, shape.head_dim)
    wide[:, : shape.num_qo_heads] = q
    return Case(shape, batch, wide[:, : shape.num_qo_heads], k, v)


def reference(case: Case, window: int | None) -> torch.Tensor:
    """One sequence at a time, in float64."""
    batch, shape = case.batch, case.shape
    out = []
    table, rows, cu_q = batch.page_table.cpu().long(), batch.rows.tolist(), batch.cu_q.tolist()
    for i, (start, num_new) in enumerate(zip(batch.starts_cpu, batch.num_new_cpu, strict=True)):
        keys = torch.arange(int(start + num_new))
        slots = (table[rows[i], keys // batch.page_size] * batch.page_size + keys % batch.page_size).to(DEVICE)
        k, v = (
            x[slots].double().repeat_interleave(shape.num_qo_heads // shape.num_kv_heads, 1) for x in (case.k, case.v)
        )
        scores = torch.einsum("qhd,khd->hqk", case.q[cu_q[i] : cu_q[i + 1]].double(), k) / shape.head_dim**0.5
        pos = torch.arange(int(start), int(start + num_new))[:, None]
        seen = (keys <= pos) & (keys > pos - window) if window else keys <= pos
        scores = scores.masked_fill(~seen.to(DEVICE), float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(out)


def check(case: Case, method: str, window: int | None) -> None:
    from minisgl.attention.triton import TritonBackend

    backend = TritonBackend(case.shape, DEVICE)
    out = getattr(backend, method)(case.q, case.k, case.v, window, case.batch)
    tolerance = TOLERANCE[case.shape.dtype]
    torch.testing.assert_close(out.double(), reference(case, window), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 7, 70])
def test_prefill(dtype: torch.dtype, page_size: int, window: int | None) -> None:
    """Prompts, and chunks that extend a prefix, some shorter than a block and some of several."""
    shape = Shape(4, 2, 64, dtype, page_size)
    check(make_case(shape, [0, 0, 37, 63, 0, 100], [1, 33, 1, 70, 130, 45]), "prefill", window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 80), (5, 128), (8, 96), (3, 256), (2, 128)])
@pytest.mark.parametrize("page_size", [16, 128])
def test_prefill_shapes(dtype: torch.dtype, group: int, head_dim: int, page_size: int) -> None:
    shape = Shape(2 * group, 2, head_dim, dtype, page_size)
    check(make_case(shape, [0, 61, 5], [67, 20, 3]), "prefill", None)
    check(make_case(shape, [0, 61, 5], [67, 20, 3]), "prefill", 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 7, 70])
def test_decode(dtype: torch.dtype, page_size: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from minisgl.kernel.triton import decode

    for splits in (1, 3) if INTERPRET else (1, 3, 8):
        monkeypatch.setattr(decode, "num_splits", lambda *_, splits=splits: splits)
        starts = [0, 4, 63, 64, 150] if INTERPRET else [0, 1, 4, 31, 32, 63, 64, 250]
        check(make_case(Shape(4, 2, 64, dtype, page_size), starts, [1] * len(starts)), "decode", window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 80), (5, 128), (8, 96), (2, 256), (2, 128), (20, 64)])
@pytest.mark.parametrize("page_size", [16, 128])
def test_decode_shapes(dtype: torch.dtype, group: int, head_dim: int, page_size: int) -> None:
    shape = Shape(2 * group, 2, head_dim, dtype, page_size)
    check(make_case(shape, [300, 99], [1, 1]), "decode", None)


def test_decode_without_keys() -> None:
    """A sequence of length 0 gives zeros, whatever the slots hold."""
    from minisgl.attention.triton import TritonBackend

    shape = Shape(4, 2, 64, DTYPES[-1], 16)
    case = make_case(shape, [-1, 30], [1, 1])
    out = TritonBackend(shape, DEVICE).decode(case.q, case.k, case.v, None, case.batch)
    assert not out[0].any()
    assert torch.isfinite(out[1]).all()


def test_split_of_any_length() -> None:
    """The number of splits depends on what the host knows only, fills the chip and stays in bounds."""
    from minisgl.kernel.triton.decode import num_splits

    assert num_splits(256, 8, 40960, 64, 132) == 1
    assert num_splits(1, 8, 40960, 64, 132) == 64
    assert num_splits(16, 8, 40960, 64, 132) == 4
    assert num_splits(1, 8, 100, 64, 132) == 1


@needs_gpu
def test_decode_in_a_graph() -> None:
    """What is captured serves other lengths."""
    from minisgl.attention.triton import TritonBackend

    shape = Shape(8, 2, 128, torch.bfloat16, 16)
    case = make_case(shape, [700, 99, 10], [1, 1, 1])
    backend = TritonBackend(shape, DEVICE)
    run = lambda: backend.decode(case.q, case.k, case.v, None, case.batch)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for starts in ([700, 99, 10], [3, 50, 0]):
        case.batch.seq_lens.copy_(torch.tensor(starts) + 1)
        case.batch.starts_cpu[:] = starts
        graph.replay()
        torch.testing.assert_close(out.double(), reference(case, None), atol=1.6e-2, rtol=1.6e-2)
