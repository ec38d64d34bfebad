"""What our Triton kernels share: how they begin, and how keys and values are read from the paged cache."""
# mypy: allow-untyped-decorators, disable-error-code="import-not-found, no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@dataclass(frozen=True, slots=True)
class PagedSequences:
    """Of a launch; int32 on the device. page_table: [rows, max pages]; rows, seq_lens: [n]; cu_q: [n + 1] offsets of
    the sequences' tokens in q. seq_lens counts this step's tokens too, which come last."""

    page_table: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    cu_q: torch.Tensor
    page_size: int  # tokens


def launch_options(pdl: bool) -> dict[str, bool]:
    """Programmatic dependent launch: a kernel is set up while the one before it ends. It begins with `begin`."""
    return {"launch_pdl": True} if pdl else {}


def precision(dtype: torch.dtype) -> str:
    """Of dot products."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def begin(PDL: tl.constexpr):
    """Waits for the kernel ahead, and lets the next one be set up."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def load_keys(
    k_ptr, v_ptr, pages_ptr, start, known, kv_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys and values, [BLOCK_N, BLOCK_D] each, of positions from `start` on, a multiple of BLOCK_N.

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
    return k, v
