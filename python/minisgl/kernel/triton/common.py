"""What our Triton kernels share: how they are launched and begin, and how they read the paged cache."""
# mypy: allow-untyped-decorators, disable-error-code="import-not-found, no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.kernel.ops import PagedSequences

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """block_m: rows of queries (tokens times heads of a group); block_n: keys that a program loads at once."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def launch_options(pdl: bool) -> dict[str, bool]:
    """Programmatic dependent launch: a kernel is set up while the one before it ends. It begins with `begin`."""
    return {"launch_pdl": True} if pdl else {}


def precision(dtype: torch.dtype) -> str:
    """Of dot products."""
    return "ieee" if dtype == torch.float32 else "tf32"


def attention_options(
    q: Tensor, k: Tensor, v: Tensor, seqs: PagedSequences, window: int | None, config: AttentionConfig, pdl: bool
) -> dict[str, Any]:
    """What is built into a kernel of attention."""
    head_dim = q.shape[2]
    assert q.stride()[1:] == (head_dim, 1)
    assert k.is_contiguous()
    assert v.is_contiguous()
    shapes = {"GROUP": q.shape[1] // k.shape[1], "HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
    kind = {"HAS_WINDOW": window is not None, "PRECISION": precision(q.dtype), "PDL": pdl}
    sizes = {"BLOCK_N": config.block_n, "PAGE_SIZE": seqs.page_size}
    launch = {"num_warps": config.num_warps, "num_stages": config.num_stages, **launch_options(pdl)}
    return {**shapes, **kind, **sizes, **launch}


def native(cache: Tensor) -> Tensor:
    """Bytes of e4m3 as such, where the GPU converts them itself."""
    converts = cache.dtype == torch.uint8 and cache.is_cuda and torch.cuda.get_device_capability(cache.device) >= (8, 9)
    return cache.view(torch.float8_e4m3fn) if converts else cache


@triton.jit
def begin(PDL: tl.constexpr):
    """Waits for the kernel ahead, and lets the next one be set up."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """x, or what bytes of e4m3 stand for: their bits where float16 has them, times what its exponent is short of."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        x = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return x.to(DTYPE)


@triton.jit
def load_keys(
    k_ptr, v_ptr, DTYPE: tl.constexpr, pages_ptr, start, known, kv_stride, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys and values, [BLOCK_N, BLOCK_D] each, of DTYPE, of positions from `start` on, a multiple of BLOCK_N.

    known: [BLOCK_N], which of them the sequence has; if not all, MASKED. The others are 0: a NaN in a row that no query
    may see would spoil the sum, since 0 * NaN is NaN.
    """
    dims = tl.arange(0, BLOCK_D)
    offsets = tl.arange(0, BLOCK_N)
    if PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(pages_ptr + start // PAGE_SIZE).to(tl.int64)
        base = (page * PAGE_SIZE + start % PAGE_SIZE) * kv_stride
        at = base + (offsets[:, None] * kv_stride + dims[None, :])
    else:
        pos = start + offsets
        if MASKED:
            page = tl.load(pages_ptr + pos // PAGE_SIZE, mask=known, other=0)
        else:
            page = tl.load(pages_ptr + pos // PAGE_SIZE)
        slot = page.to(tl.int64) * PAGE_SIZE + pos % PAGE_SIZE
        at = (slot * kv_stride)[:, None] + dims[None, :]
    if MASKED or HEAD_DIM != BLOCK_D:
        valid = known[:, None]
        if HEAD_DIM != BLOCK_D:
            valid = valid & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + at, mask=valid, other=0.0)
        v = tl.load(v_ptr + at, mask=valid, other=0.0)
    else:
        k = tl.load(k_ptr + at)
        v = tl.load(v_ptr + at)
    return widen(k, DTYPE), widen(v, DTYPE)


@triton.jit
def attend(
    q, m, denom, acc, k_ptr, v_ptr, pages_ptr, first, end, q_pos, seq_len, scale, window, kv_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends to the keys of positions [first, end), `first` a multiple of BLOCK_N: → m, denom, acc."""
    offsets = tl.arange(0, BLOCK_N)
    for start in tl.range(first, end, BLOCK_N):
        pos = start + offsets
        k, v = load_keys(
            k_ptr, v_ptr, q.dtype, pages_ptr, start, pos < seq_len, kv_stride, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE,
            MASKED,
        )  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = pos[None, :] <= q_pos[:, None]
            if HAS_WINDOW:
                seen &= pos[None, :] > q_pos[:, None] - window
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        base_m = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new  # a row may see nothing here
        p = tl.exp2(s * scale - base_m[:, None])
        alpha = tl.exp2(m - base_m)
        denom = denom * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return m, denom, acc
