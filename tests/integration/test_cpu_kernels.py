"""`csrc/src/cpu.cc` against torch: products in all weight types, attention, rotation and cache, sampling.

Each with one and two threads; `MINISGL_TEST_CPU_TARGET` tries instructions other than those of this processor's level.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from minisgl.attention.base import AttentionStep
from minisgl.attention.cpu import CpuBackend
from minisgl.config.model import AttentionSpec, PagedKV
from minisgl.kernel.activations import ACTIVATIONS
from minisgl.kernel.cpu import CpuOps
from minisgl.kernel.ops import Around, KVSlots, Matrix, RopeAngles, TorchOps, narrowed, widened
from minisgl.kernel.sampling import SamplingColumns
from minisgl.kernel.state import DeltaState, DeltaWeights, StateSequences
from minisgl.kvcache.pool import LayerCache

Tensor = torch.Tensor
TARGET = os.environ.get("MINISGL_TEST_CPU_TARGET", "")
TOLERANCE = {
    "float32": 2e-6,
    "bfloat16": 2e-6,
    "float16": 2e-6,
    "int8": 5e-6,
}  # of the largest output: only sums are rounded
ROWS = (1, 2, 3, 5, 6, 7, 8, 12, 13, 16, 31, 64, 65)


def narrower() -> list[str]:
    """Instructions that this processor has too, beside its widest."""
    if platform.machine() != "x86_64":
        return []
    has_avx512 = "avx512bw" in Path("/proc/cpuinfo").read_text()
    return ["x86-64-v2", *(["x86-64-v3"] if has_avx512 else [])]


@cache
def cpu_ops(num_threads: int, target: str = TARGET) -> CpuOps:
    return CpuOps(num_threads, target=target)


def matrix_of(ops: CpuOps, weight: Tensor, kind: str, activation: str | None = None) -> Matrix:
    if kind == "int8":
        return ops.int8_matrix(weight, activation)
    return ops.matrix(weight.to(getattr(torch, kind)), activation)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def as_stored(weight: Tensor, kind: str) -> Tensor:
    """What is left of a weight in memory."""
    if kind == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight * (127 / weight.abs().amax(1, keepdim=True))).round() * scale
    return weight.to(getattr(torch, kind)).float()


def close(out: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (out - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"off by {error:.2e} of the largest"


@pytest.mark.parametrize("shape", [(16, 32), (40, 33), (96, 300), (258, 1024), (7, 515), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize(
    ("num_threads", "target"), [(1, TARGET), (2, TARGET), *((2, target) for target in narrower())], ids=str
)
def test_products(num_threads: int, target: str, kind: str, shape: tuple[int, int]) -> None:
    ops = cpu_ops(num_threads, target)
    num_out, num_in = shape
    weight = random(num_out, num_in, seed=1, scale=num_in**-0.5)
    bias, norm = random(num_out, seed=2), random(num_in, seed=3).abs()
    stored = as_stored(weight, kind).double()
    matrix = matrix_of(ops, weight, kind)
    for rows in ROWS:
        x = random(rows, num_in, seed=rows)
        plain = x.double() @ stored.T + bias
        normed = TorchOps().rms_norm(x, norm, 1e-6)
        tolerance = TOLERANCE[kind] * 20 if kind == "int8" else TOLERANCE[kind]  # 15 bits of each row
        close(matrix.apply(x, Around(bias)), plain, tolerance)
        close(matrix.apply(x, Around(None, norm, 1e-6)), normed.double() @ stored.T, tolerance)
        residual = random(rows, num_out, seed=9)
        close(matrix.apply(x, Around(bias, residual=residual.clone())), plain + residual, tolerance)


@pytest.mark.parametrize("inner", [8, 16, 48, 100])
@pytest.mark.parametrize(("kind", "activation"), [*((kind, "silu") for kind in TOLERANCE), ("float32", "gelu_tanh")])
def test_gate_and_up(kind: str, activation: str, inner: int) -> None:
    weight, bias = random(2 * inner, 72, seed=1, scale=0.1), random(2 * inner, seed=2)
    matrix = matrix_of(cpu_ops(2), weight, kind, activation)
    for rows in ROWS:
        x = random(rows, 72, seed=rows)
        gate, up = (x.double() @ as_stored(weight, kind).double().T + bias).chunk(2, -1)
        close(matrix.apply(x, Around(bias, gated=True)), ACTIVATIONS[activation](gate, up), 20 * TOLERANCE[kind])


@pytest.mark.parametrize("kind", TOLERANCE)
def test_rows_of_a_table(kind: str) -> None:
    table = random(50, 33)
    rows = matrix_of(cpu_ops(2), table, kind).rows(torch.tensor([10, 9, 59, 60, 33]), first=10)
    expected = as_stored(table, kind)[[0, 0, 49, 0, 23]]
    expected[[1, 3]] = 0  # ids of other ranks
    torch.testing.assert_close(rows, expected)


def test_a_row_with_a_nan_spoils_no_other() -> None:
    for kind in ("float32", "int8"):
        matrix, x = matrix_of(cpu_ops(2), random(40, 64), kind), random(9, 64)
        before = matrix.apply(x)
        x[4, 7] = torch.nan
        after = matrix.apply(x)
        assert after[4].isnan().all()
        assert torch.equal(after[[0, 1, 2, 3, 5, 8]], before[[0, 1, 2, 3, 5, 8]])


CACHES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def targets() -> list[str]:
    return [TARGET, *narrower()]


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("dtype", CACHES, ids=str)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("dim", [24, 80, 128])
def test_norm_rotation_and_cache(dim: int, with_norm: bool, dtype: torch.dtype, target: str) -> None:
    num_q, num_kv, tokens = 6, 2, 5
    norm = random(num_q + num_kv, dim, seed=1) if with_norm else None
    angle = random(tokens, 1, dim // 2, seed=2)
    cos, sin = torch.cat((angle.cos(),) * 2, -1), torch.cat((-angle.sin(), angle.sin()), -1)
    slots = torch.tensor([3, 0, 11, 7, 5])
    room = narrowed(torch.zeros(2, 12, num_kv, dim), dtype)
    caches = [KVSlots(*room.clone(), slots) for _ in range(2)]
    outs = [
        ops.norm_rope_store(random(tokens, num_q + 2 * num_kv, dim, seed=3), norm, 1e-6, RopeAngles(cos, sin), cache)
        for ops, cache in zip((cpu_ops(2, target), TorchOps()), caches, strict=True)
    ]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.int8: 2**-5}.get(dtype, 1e-5)  # which way a tie goes
    for mine, theirs in ((caches[0].k, caches[1].k), (caches[0].v, caches[1].v)):
        wide = [widened(x, torch.float32) for x in (mine, theirs)]
        torch.testing.assert_close(*wide, atol=step if dtype == torch.int8 else 1e-5, rtol=step)


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("dtype", CACHES[1:], ids=str)
def test_what_caches_hold(dtype: torch.dtype, target: str) -> None:
    """Each number as torch rounds it; what is too large becomes the largest, and what is not finite stays so."""
    few = torch.tensor(
        [0.0, -0.0, 1.0, 65504.0, 65519.0, 65520.0, -7e4, 1e9, 6e-8, -3e-8, 2.9e-8, 6.1e-5, 2**-14, 5.96e-8]
    )
    values = torch.cat(
        (few, random(2046 - len(few), scale=3.0) * 2.0 ** torch.arange(2046 - len(few)).remainder(40).sub(26))
    )
    x = torch.zeros(33, 3, 64)
    x[:32, 2] = torch.cat((values, torch.tensor([torch.nan, torch.inf]))).view(32, 64)
    cache = KVSlots(*narrowed(torch.zeros(2, 33, 1, 64), dtype), torch.arange(33))
    angles = RopeAngles(torch.ones(33, 1, 64), torch.zeros(33, 1, 64))
    cpu_ops(2, target).norm_rope_store(x.clone(), None, 1e-6, angles, cache)
    kept, expected = (widened(rows, torch.float32)[:31, 0] for rows in (cache.v, narrowed(x[:, 2:], dtype)))
    assert kept.isfinite().all()
    if dtype == torch.int8:  # it may fall on the other side of a tie
        assert ((kept - expected).abs() < 1.01 * expected.abs().amax(-1, keepdim=True) / 127).all()
        assert (kept != expected).float().mean() < 0.01
    else:
        assert torch.equal(kept, expected)
    spoilt = widened(cache.v, torch.float32)[31, 0]
    assert not spoilt[-2:].isfinite().any()
    assert not widened(cache.k, torch.float32).any()


HEADS = [*((2 * group, 2) for group in range(1, 9)), (4, 4), (9, 3), (10, 1)]
DIMS = (24, 64, 80, 96, 128, 256)
PAGE_SIZES = (1, 16, 64)
LENGTHS = [(1, 0), (1, 130), (9, 0), (77, 40), (1, 63), (1, 700)]  # new tokens, and those before them


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention(heads: tuple[int, int], dim: int) -> None:
    """All heads with all sizes; page sizes and numbers of threads take turns."""
    turn = HEADS.index(heads) + DIMS.index(dim)
    num_threads, page_size = 1 + turn % 2, PAGE_SIZES[turn % 3]
    (num_q, num_kv), generator = heads, torch.Generator().manual_seed(dim)
    dtype = CACHES[turn % len(CACHES)]
    num_slots = 2048
    keys, values = (narrowed(torch.randn(num_slots, num_kv, dim, generator=generator), dtype) for _ in range(2))
    pages = np.zeros((8, 1024 // page_size + 1), np.int32)
    free = torch.randperm(num_slots // page_size, generator=generator).numpy()
    rows = np.array([3, 0, 6, 1, 2, 7])
    num_new, starts = np.array(LENGTHS).T
    for row, length in zip(rows, num_new + starts, strict=True):
        count = -(-length // page_size)
        pages[row, :count], free = free[:count], free[count:]
    spoilt = torch.from_numpy((free[:, None] * page_size + np.arange(page_size)).ravel())
    for kept in (keys, values):  # what belongs to nobody must not matter
        kept[spoilt] = narrowed(torch.full((len(spoilt), num_kv, dim), torch.nan), dtype)
    offsets = np.concatenate(([0], np.cumsum(num_new)))
    step = AttentionStep(rows, starts, num_new, offsets, pages, page_size, num_decode=0)
    backend = CpuBackend(cpu_ops(num_threads))
    q = torch.randn(int(offsets[-1]), num_q, dim, generator=generator)
    kinds = (None, None, False), (50, None, True), (None, 1.5, True), (50, 0.4, False)
    specs = [AttentionSpec(PagedKV(num_kv, dim, dim), window, softcap=cap, sinks=has) for window, cap, has in kinds]
    each = [3 * torch.randn(num_q, generator=generator) if spec.sinks else None for spec in specs]
    cache = LayerCache(keys, values)
    outs = [
        backend.forward(q, cache, spec, backend.prepare(step), some) for spec, some in zip(specs, each, strict=True)
    ]
    for i in range(len(rows)):
        slots = torch.from_numpy(step.slots_of(rows[i], np.arange(starts[i] + num_new[i])))
        mine = slice(offsets[i], offsets[i + 1])
        k, v = (widened(x[slots], q.dtype) for x in (keys, values))
        for out, spec, sinks in zip(outs, specs, each, strict=True):
            expected = reference(q[mine], k, v, int(starts[i]), spec, sinks)
            torch.testing.assert_close(out[mine], expected, atol=2e-5, rtol=1e-4)


def reference(q: Tensor, k: Tensor, v: Tensor, start: int, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    """One sequence: its new tokens, from position `start` on, and all its keys and values."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    place, at = torch.arange(len(k)), start + torch.arange(len(q))[:, None]
    seen = (place <= at) if spec.window is None else (place <= at) & (place > at - spec.window)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    weights = scores.masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    return torch.einsum("hqk,khd->qhd", weights / total, v)


@pytest.mark.parametrize("vocab_size", [5, 128, 4096, 50_001])
@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.0},
        {},
        {"top_k": 20},
        {"top_k": 300, "top_p": 0.9},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 3.0},
        {"min_p": 0.05},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_sampled_tokens_are_the_reference_s(given: dict[str, float], vocab_size: int) -> None:
    n = 64 if vocab_size < 50_000 else 24
    logits = random(n, vocab_size, seed=vocab_size, scale=2.0)
    logits[1] = 0.0  # all equal
    logits[2, vocab_size // 2 :] = -torch.inf
    logits[3, 4], logits[4, 0] = torch.nan, torch.inf
    values = {"temperature": 0.8, "seed": np.arange(n), "position": np.arange(n)} | given
    params, ids = SamplingColumns.of(n, **values), torch.zeros(n, dtype=torch.int32)
    mine, theirs = (ops.sample(logits, params, ids.clone()) for ops in (cpu_ops(2), TorchOps()))
    assert mine[3] == mine[4] == -1
    assert (mine != theirs).sum() <= (0 if not given.get("temperature", 1) else 1), "a sum may fall on the other side"


# Heads of keys and of values, their features, and the convolution's width.
NETS = [(2, 2, 128, 128, 4), (1, 3, 33, 17, 4), (2, 4, 16, 40, 2), (1, 1, 3, 1, 4), (2, 6, 32, 64, 3)]


@pytest.mark.parametrize("target", [TARGET, *narrower()])
@pytest.mark.parametrize("net", NETS, ids=str)
def test_gated_delta_net(net: tuple[int, int, int, int, int], target: str) -> None:
    """Sequences of any length, some of which go on from what an earlier step has left; with drafts, and what held."""
    num_k, num_v, k_dim, v_dim, width = net
    channels, features, num_slots = 2 * num_k * k_dim + num_v * v_dim, num_v * v_dim, 12
    vectors = random(num_v, seed=1).abs(), random(num_v, seed=2), random(v_dim, seed=3)
    weights = DeltaWeights(random(channels, width, seed=4), *vectors, 1e-6)
    past, memory = random(num_slots, channels, width - 1, seed=5), random(num_slots, num_v, k_dim, v_dim, seed=6)
    expected = DeltaState(past, memory, random(num_slots, 9, channels + features + 2 * num_v, seed=7))
    state = DeltaState(*(part.clone() for part in expected))
    drafts = [(0, 3), (3, 8), (2, 0), (0, 0), (9, 0), (8, 1)]  # of the last step's sequences: held, tried
    used = [*range(channels), *range(channels + features, channels + features + 2 * num_v)]
    for step, counts in enumerate([(1, 65, 2), (1, 1, 1, 1), (9, 1, 3, 8, 16, 7, 64), (4, 9, 1, 5, 70, 2)]):
        slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(step))[: len(counts)]
        held_and_tried = torch.tensor(drafts).T.contiguous() if step == 3 else ()
        seqs = StateSequences(slots, torch.tensor([0, *counts]).cumsum(0), *held_and_tried)
        x = random(sum(counts), channels + features + 2 * num_v + 1, seed=step)
        inputs = x[:, : channels + features], x[:, channels + features : -1]  # both with a stride of their own
        out = cpu_ops(2, target).gated_delta_net(*inputs, weights, state, seqs)
        close(out, TorchOps().gated_delta_net(*inputs, weights, expected, seqs), 2e-5)
        close(state.memory, expected.memory, 1e-5)
        close(state.conv, expected.conv, 1e-6)
        assert torch.equal(state.kept[..., used], expected.kept[..., used])
