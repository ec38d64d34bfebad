"""The reference of attention against a definition: ragged batches, scattered pages, windows, groups and blocks, scores
that are capped, sinks; and a step in two parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minisgl.attention import sdpa
from minisgl.attention.base import AttentionStep
from minisgl.attention.create import PairOfBackends
from minisgl.config.model import AttentionSpec, PagedKV
from minisgl.kvcache.pool import LayerCache

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: AttentionStep,
    window: int | None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query at a time, in float64."""
    out = torch.empty_like(q)
    for i, (row, start, num_new) in enumerate(zip(batch.rows, batch.starts, batch.num_new, strict=True)):
        for j in range(num_new):
            end = int(start + j + 1)
            positions = np.arange(max(0, end - window) if window else 0, end)
            slots = torch.from_numpy(batch.slots_of(row, positions))
            keys = k[slots].double().repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)
            values = v[slots].double().repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)
            token = int(batch.offsets[i]) + j
            scores = torch.einsum("hd,khd->hk", q[token].double(), keys) / HEAD_DIM**0.5
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            weights = scores.exp() / (scores.exp().sum(-1) + (0 if sinks is None else sinks.double().exp()))[:, None]
            out[token] = torch.einsum("hk,khd->hd", weights, values).float()
    return out


def make_batch(rng: np.random.Generator, page_size: int, shuffle: bool) -> tuple[AttentionStep, int]:
    """Up to six sequences; slots that none of them uses hold NaN."""
    num = int(rng.integers(1, 7))
    num_new = np.sort(np.where(rng.random(num) < 0.5, 1, rng.integers(2, 30, num)).astype(np.int64))
    starts = np.where(rng.random(num) < 0.3, 0, rng.integers(0, 40, num)).astype(np.int64)
    pages_per_row = -(-80 // page_size)
    pages = rng.permutation(num * pages_per_row) if shuffle else np.arange(num * pages_per_row)
    offsets = np.concatenate(([0], np.cumsum(num_new)))
    table = pages.reshape(num, pages_per_row).astype(np.int32)
    num_decode = int((num_new == 1).sum())
    step = AttentionStep(rng.permutation(num), starts, num_new, offsets, table, page_size, num_decode)
    return step, pages.size * page_size


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("block", [5, 512])
def test_sdpa(monkeypatch: pytest.MonkeyPatch, page_size: int, shuffle: bool, block: int) -> None:
    monkeypatch.setattr(sdpa, "QUERY_BLOCK", block)
    windows = [None, 1, 7, 33]
    backend = sdpa.SdpaBackend(torch.device("cpu"))
    pair = PairOfBackends(backend, backend)  # type: ignore[arg-type]
    rng = np.random.default_rng(block + page_size)
    torch.manual_seed(0)
    for _ in range(25):
        batch, num_slots = make_batch(rng, page_size, shuffle)
        k = torch.full((num_slots, NUM_KV_HEADS, HEAD_DIM), float("nan"))
        v = k.clone()
        for row, end in zip(batch.rows, batch.seq_lens.tolist(), strict=True):
            slots = torch.from_numpy(batch.slots_of(row, np.arange(end)))
            k[slots] = torch.randn(len(slots), NUM_KV_HEADS, HEAD_DIM)
            v[slots] = torch.randn(len(slots), NUM_KV_HEADS, HEAD_DIM)
        q = torch.randn(int(batch.offsets[-1]), NUM_HEADS, HEAD_DIM)
        metadata = backend.prepare(batch, captured=False)
        for window, cap, has_sinks in zip(windows, (None, 0.7, 2.0, None), (False, True, False, True), strict=True):
            spec = AttentionSpec(PagedKV(NUM_KV_HEADS, HEAD_DIM, HEAD_DIM), window, softcap=cap, sinks=has_sinks)
            sinks = torch.randn(NUM_HEADS) * 3 if has_sinks else None
            out = backend.forward(q, LayerCache(k, v), spec, metadata, sinks)
            torch.testing.assert_close(out, reference(q, k, v, batch, window, cap, sinks), atol=1e-5, rtol=1e-4)
        in_parts = pair.forward(q, LayerCache(k, v), spec, pair.prepare(batch, captured=False), sinks)
        torch.testing.assert_close(in_parts, out, atol=1e-6, rtol=1e-6)
