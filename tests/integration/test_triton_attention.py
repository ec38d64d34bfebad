"""Triton's attention kernels against a definition; on a GPU, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from minisgl.attention.base import AttentionShape, AttentionStep
from minisgl.config.model import AttentionSpec, PagedKV
from minisgl.kernel.ops import PagedSequences
from minisgl.kvcache.pool import LayerCache
from tests.triton_cpu import DEVICE, DTYPES, INTERPRET, MARKS, needs_gpu

pytestmark = MARKS
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make_shape(
    num_qo_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, page_size: int
) -> AttentionShape:
    return AttentionShape(num_qo_heads, num_kv_heads, head_dim, dtype, page_size, 8, 4096)


@dataclass(frozen=True)
class Case:
    """A step and what it attends to. Slots that belong to nobody hold NaN."""

    shape: AttentionShape
    step: AttentionStep
    q: torch.Tensor
    cache: LayerCache


def make_case(shape: AttentionShape, starts: list[int], num_new: list[int], seed: int = 0) -> Case:
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

    offsets = np.concatenate(([0], np.cumsum(num_new)))
    seqs = PagedSequences(ints(table), ints(rows), ints(seq_lens), ints(offsets), page)
    num_decode = num_seqs if max(num_new) == 1 else 0
    step = AttentionStep(
        rows.astype(np.int64), np.array(starts), np.array(num_new), offsets, table, page, num_decode, seqs
    )
    q, k, v = (x.to(DEVICE, shape.dtype) for x in (torch.empty_like(q).copy_(q), k, v))
    wide = q.new_zeros(len(q), num_heads, shape.head_dim)
    wide[:, : shape.num_qo_heads] = q
    return Case(shape, step, wide[:, : shape.num_qo_heads], LayerCache(k, v))


def narrowed(case: Case) -> Case:
    """With a cache of e4m3."""
    return replace(case, cache=LayerCache(*(x.to(torch.float8_e4m3fn).view(torch.uint8) for x in case.cache)))


def widened(cache: LayerCache) -> list[torch.Tensor]:
    """Keys and values, in float64."""
    return [(x.view(torch.float8_e4m3fn) if x.dtype == torch.uint8 else x).double() for x in cache]


def attend(
    case: Case, window: int | None = None, cap: float | None = None, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    from minisgl.attention.triton import TritonBackend

    backend, heads = TritonBackend(case.shape, DEVICE), PagedKV(case.shape.num_kv_heads, *[case.shape.head_dim] * 2)
    spec = AttentionSpec(heads, window, softcap=cap, sinks=sinks is not None)
    return backend.forward(case.q, case.cache, spec, backend.prepare(case.step, captured=False), sinks)


def reference(
    case: Case, window: int | None, cap: float | None = None, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """One sequence at a time, in float64."""
    step, shape, batch = case.step, case.shape, case.step.on_device()
    out = []
    table, rows, cu_q = batch.page_table.cpu().long(), batch.rows.tolist(), batch.cu_q.tolist()
    for i, (start, num_new) in enumerate(zip(step.starts, step.num_new, strict=True)):
        keys = torch.arange(int(start + num_new))
        slots = (table[rows[i], keys // batch.page_size] * batch.page_size + keys % batch.page_size).to(DEVICE)
        k, v = (
            x[slots].double().repeat_interleave(shape.num_qo_heads // shape.num_kv_heads, 1)
            for x in widened(case.cache)
        )
        scores = torch.einsum("qhd,khd->hqk", case.q[cu_q[i] : cu_q[i + 1]].double(), k) / shape.head_dim**0.5
        pos = torch.arange(int(start), int(start + num_new))[:, None]
        seen = (keys <= pos) & (keys > pos - window) if window else keys <= pos
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        weights = scores.masked_fill(~seen.to(DEVICE), float("-inf")).exp()
        total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.double().exp()[:, None, None])
        out.append(torch.einsum("hqk,khd->qhd", weights / total, v))
    return torch.cat(out)


def spoiled(case: Case, window: int) -> Case:
    """With NaN behind the windows of all tokens, where pages may be other requests'."""
    step, cache = case.step, LayerCache(*(x.clone() for x in case.cache))
    for row, start in zip(step.rows, step.starts, strict=True):
        slots = torch.from_numpy(step.slots_of(row, np.arange(max(0, start - window + 1)))).to(DEVICE)
        for x in cache:
            x[slots] = 0x7F if x.dtype == torch.uint8 else torch.nan
    return replace(case, cache=cache)


def check(case: Case, window: int | None, cap: float | None = None, sinks: torch.Tensor | None = None) -> None:
    tolerance, expected = TOLERANCE[case.shape.dtype], reference(case, window, cap, sinks)
    case = spoiled(case, window) if window else case
    torch.testing.assert_close(attend(case, window, cap, sinks).double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 7, 70])
def test_prefill(dtype: torch.dtype, page_size: int, window: int | None) -> None:
    """Prompts, and chunks that extend a prefix, some shorter than a block and some of several."""
    shape = make_shape(4, 2, 64, dtype, page_size)
    check(make_case(shape, [0, 0, 37, 63, 0, 100], [1, 33, 1, 70, 130, 45]), window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_cache_of_e4m3(dtype: torch.dtype, page_size: int, head_dim: int) -> None:
    shape = make_shape(4, 2, head_dim, dtype, page_size)
    for starts, num_new in (([0, 0, 37, 100], [1, 33, 70, 45]), ([0, 4, 63, 64, 150], [1] * 5)):
        check(narrowed(make_case(shape, starts, num_new)), None)
        check(narrowed(make_case(shape, starts, num_new)), 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 80), (5, 128), (8, 96), (3, 256), (2, 128)])
@pytest.mark.parametrize("page_size", [16, 128])
def test_prefill_shapes(dtype: torch.dtype, group: int, head_dim: int, page_size: int) -> None:
    shape = make_shape(2 * group, 2, head_dim, dtype, page_size)
    check(make_case(shape, [0, 61, 5], [67, 20, 3]), None)
    check(make_case(shape, [0, 61, 5], [67, 20, 3]), 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 7, 70])
def test_decode(dtype: torch.dtype, page_size: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from minisgl.kernel.triton import attention

    for splits in (1, 3) if INTERPRET else (1, 3, 8):
        monkeypatch.setattr(attention, "num_splits", lambda *_, splits=splits: splits)
        starts = [0, 4, 63, 64, 150] if INTERPRET else [0, 1, 4, 31, 32, 63, 64, 250]
        check(make_case(make_shape(4, 2, 64, dtype, page_size), starts, [1] * len(starts)), window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 80), (5, 128), (8, 96), (2, 256), (2, 128), (20, 64)])
@pytest.mark.parametrize("page_size", [16, 128])
def test_decode_shapes(dtype: torch.dtype, group: int, head_dim: int, page_size: int) -> None:
    shape = make_shape(2 * group, 2, head_dim, dtype, page_size)
    check(make_case(shape, [300, 99], [1, 1]), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim", "page_size"), [(5, 80, 16), (8, 64, 1), (2, 256, 128)])
@pytest.mark.parametrize(("cap", "has_sinks"), [(0.8, False), (None, True), (3.0, True)])
def test_capped_scores_and_sinks(
    dtype: torch.dtype,
    group: int,
    head_dim: int,
    page_size: int,
    cap: float | None,
    has_sinks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts and single tokens, whose keys are split or not; one head's sink outweighs all, another's nothing."""
    from minisgl.kernel.triton import attention

    shape = make_shape(2 * group, 2, head_dim, dtype, page_size)
    sinks = torch.randn(2 * group, device=DEVICE) * 2 if has_sinks else None
    if sinks is not None:
        sinks[0], sinks[-1] = 60.0, -60.0
    check(make_case(shape, [0, 0, 61, 5], [1, 67, 20, 3]), 20, cap, sinks)
    for splits, window in ((1, None), (3, None), (3, 33)):
        monkeypatch.setattr(attention, "num_splits", lambda *_, splits=splits: splits)
        check(make_case(shape, [0, 4, 150], [1] * 3), window, cap, sinks)


def test_decode_without_keys() -> None:
    """A sequence of length 0 gives zeros, whatever the slots hold."""
    out = attend(make_case(make_shape(4, 2, 64, DTYPES[-1], 16), [-1, 30], [1, 1]))
    assert not out[0].any()
    assert torch.isfinite(out[1]).all()


def test_split_of_any_length() -> None:
    """The number of splits depends on what the host knows only, fills the chip and stays in bounds."""
    from minisgl.kernel.triton.attention import num_splits

    assert num_splits(256, 8, 40960, 64, 132) == 1
    assert num_splits(1, 8, 40960, 64, 132) == 64
    assert num_splits(16, 8, 40960, 64, 132) == 4
    assert num_splits(1, 8, 100, 64, 132) == 1


@needs_gpu
def test_decode_in_a_graph() -> None:
    """What is captured serves other lengths."""
    from minisgl.attention.triton import TritonBackend

    shape = make_shape(8, 2, 128, torch.bfloat16, 16)
    case = make_case(shape, [700, 99, 10], [1, 1, 1])
    backend = TritonBackend(shape, DEVICE)
    spec, metadata = AttentionSpec(PagedKV(2, 128, 128)), backend.prepare(case.step, captured=True)
    run = lambda: backend.forward(case.q, case.cache, spec, metadata)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for starts in ([700, 99, 10], [3, 50, 0]):
        case.step.on_device().seq_lens.copy_(torch.tensor(starts) + 1)
        case.step.starts[:] = starts
        graph.replay()
        torch.testing.assert_close(out.double(), reference(case, None), atol=1.6e-2, rtol=1.6e-2)
