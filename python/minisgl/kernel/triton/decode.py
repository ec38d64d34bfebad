"""Attention of one query token per sequence over the paged cache: each sequence's keys are split among programs.

Partial softmaxes are merged by their log-sum-exp (Flash-Decoding, and FlashAttention, arXiv 2205.14135, section 3.1).
The number of splits is fixed by the host, what each reads is computed on the device from the sequence's length: a CUDA
graph that holds the launch serves any lengths. A split without keys ends at once.
"""
# mypy: allow-untyped-decorators, disable-error-code="import-not-found, no-untyped-def"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minisgl.kernel.ops import PagedSequences
from minisgl.kernel.triton.common import AttentionConfig, attend, attention_options, begin, launch_options, native

Tensor = torch.Tensor

MAX_SPLITS = 64
MERGE_STEP = 8  # splits that the merge loads at once
WAVES = 4  # programs per multiprocessor to aim for


@dataclass(frozen=True, slots=True)
class Partials:
    """Workspace of the splits, float32, of as many elements at least. acc: [batch * heads * splits * head_dim];
    lse: [batch * heads * splits], base 2."""

    acc: Tensor
    lse: Tensor


def decode_config(dtype: torch.dtype, head_dim: int) -> AttentionConfig:
    """At most 64 KB of shared memory, which every GPU since 8.0 has.

    Of num_stages, half are in flight where a page number must be loaded before the keys.
    """
    if dtype == torch.float32:
        return AttentionConfig(1, 32, 4, 1)
    return AttentionConfig(1, 32 if head_dim > 128 else 64, 4, 3)


def num_splits(batch_size: int, num_kv_heads: int, max_seq_len: int, block_n: int, num_sms: int) -> int:
    """Enough programs for the chip, each with two blocks of keys at least; 1 where the batch alone fills it."""
    wanted = round(WAVES * num_sms / (batch_size * num_kv_heads))
    return max(1, min(wanted, -(-max_seq_len // (2 * block_n)), MAX_SPLITS))


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["rows_ptr", "seq_lens_ptr"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, lse_ptr, page_table_ptr, rows_ptr, seq_lens_ptr,
    scale, window, q_stride, kv_stride, table_stride, splits,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SPLIT: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, KV head, split): the group's query heads, padded to BLOCK_G rows of the dot products."""
    begin(PDL)
    kv_head, seq, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + seq)
    pages_ptr = page_table_ptr + tl.load(rows_ptr + seq).to(tl.int64) * table_stride
    low = tl.maximum(seq_len - window, 0) if HAS_WINDOW else seq_len * 0
    first_block = low // BLOCK_N
    num_blocks = (seq_len + BLOCK_N - 1) // BLOCK_N - first_block
    per_split = (num_blocks + splits - 1) // splits
    first = (first_block + split * per_split) * BLOCK_N
    end = tl.minimum(first + per_split * BLOCK_N, seq_len)

    rows = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + rows
    valid = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_at = seq.to(tl.int64) * q_stride + (head * HEAD_DIM)[:, None] + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=valid, other=0.0)
    k_ptr += kv_head * HEAD_DIM
    v_ptr += kv_head * HEAD_DIM
    m = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    denom = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    m, denom, acc = attend(
        q, m, denom, acc, k_ptr, v_ptr, pages_ptr, first, end, rows * 0 + seq_len - 1, seq_len, scale, window,
        kv_stride, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, HAS_WINDOW, True, PRECISION,
    )  # fmt: skip
    acc = acc / tl.where(denom == 0.0, 1.0, denom)[:, None]
    index = (seq * (NUM_KV_HEADS * GROUP) + head).to(tl.int64)  # of (sequence, query head)
    if SPLIT:
        part = index * splits + split
        tl.store(lse_ptr + part, tl.where(denom == 0.0, float("-inf"), m + tl.log2(denom)), mask=rows < GROUP)
        tl.store(acc_ptr + (part * HEAD_DIM)[:, None] + dims[None, :], acc, mask=valid & (first < end))
    else:
        out_at = (index * HEAD_DIM)[:, None] + dims[None, :]
        tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    acc_ptr, lse_ptr, out_ptr, splits, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, query head): the mean of its partial results, weighted by exp2(lse)."""
    begin(PDL)
    index = tl.program_id(0).to(tl.int64)
    all_splits = tl.arange(0, BLOCK_S)
    lse = tl.load(lse_ptr + index * splits + all_splits, mask=all_splits < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse - top), 0)
    dims = tl.arange(0, BLOCK_D)
    out = tl.zeros((BLOCK_D,), tl.float32)
    for first in tl.range(0, splits, STEP):
        split = first + tl.arange(0, STEP)
        part = index * splits + split
        weight = tl.exp2(tl.load(lse_ptr + part, mask=split < splits, other=float("-inf")) - top)
        used = (weight > 0.0)[:, None] & (dims < HEAD_DIM)[None, :]  # a split without keys has written nothing
        acc = tl.load(acc_ptr + (part * HEAD_DIM)[:, None] + dims[None, :], mask=used, other=0.0)
        out += tl.sum(acc * weight[:, None], 0)
    out = out / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + index * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: PagedSequences,
    window: int | None,
    splits: int,
    partials: Partials,
    config: AttentionConfig,
    pdl: bool,
) -> Tensor:
    """Attention of each sequence's only query to its last `window` keys; zeros where a sequence has none.

    q: [batch, num_qo_heads, head_dim], any stride between tokens; caches: [num_slots, num_kv_heads, head_dim],
    contiguous, of uint8 where they are e4m3 → [batch, num_qo_heads, head_dim].
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    assert splits == 1 or batch * num_heads * splits <= partials.lse.numel()
    options = attention_options(q, k_cache, v_cache, seqs, window, config, pdl)
    out = torch.empty((batch, num_heads, head_dim), dtype=q.dtype, device=q.device)
    block_g = max(16, triton.next_power_of_2(options["GROUP"]))
    _decode_kernel[(num_kv_heads, batch, splits)](
        q, native(k_cache), native(v_cache), out, partials.acc, partials.lse, seqs.page_table, seqs.rows, seqs.seq_lens,
        head_dim**-0.5 * math.log2(math.e), window or 0,
        q.stride(0), k_cache.stride(0), seqs.page_table.stride(0), splits,
        NUM_KV_HEADS=num_kv_heads, BLOCK_G=block_g, SPLIT=splits > 1, **options,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(batch * num_heads,)](
            partials.acc, partials.lse, out, splits, head_dim, options["BLOCK_D"], MAX_SPLITS, MERGE_STEP, pdl,
            num_warps=2 if head_dim <= 128 else 4, **launch_options(pdl),
        )  # fmt: skip
    return out
