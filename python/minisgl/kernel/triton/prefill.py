"""Causal attention of ragged prompts, or further chunks of them, over the paged cache.

Online softmax over blocks of keys (FlashAttention-2, arXiv 2307.08691, section 3.1), in powers of two. The query heads
that share a KV head are packed with the tokens into the rows of a block, row r being head r % GROUP of token
r // GROUP: keys are read once per group, and a short chunk still fills the block.
"""
# mypy: allow-untyped-decorators, disable-error-code="import-not-found, no-untyped-def"

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from minisgl.kernel.ops import PagedSequences
from minisgl.kernel.triton.common import AttentionConfig, attend, attention_options, begin, native

Tensor = torch.Tensor


def prefill_config(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> AttentionConfig:
    """What fits the shared memory: 227 KB on 9.0, 163 KB on 8.0, 99 KB on 8.6 and 8.9."""
    wide = head_dim > 128
    if dtype == torch.float32:  # no tensor cores: larger blocks do not fit the registers
        return AttentionConfig(16, 16, 4, 1)
    if capability in ((9, 0), (10, 0)):
        return AttentionConfig(128, 32, 8, 3) if wide else AttentionConfig(128, 64, 8, 5)
    if capability == (8, 0) and not wide:
        return AttentionConfig(128, 32, 8, 3)
    return AttentionConfig(64, 32 if wide else 64, 8, 2)


def prefill_blocks(
    starts: npt.NDArray[np.int64], num_new: npt.NDArray[np.int64], group: int, block_m: int
) -> npt.NDArray[np.int32]:
    """[num_blocks, 2]: sequence and first row of each block of queries; those with the most keys first, so that the
    last to start are short."""
    num_blocks = -(-(num_new * group) // block_m)
    seq = np.repeat(np.arange(len(num_new)), num_blocks)
    first = np.concatenate(([0], np.cumsum(num_blocks)))[seq]
    row = (np.arange(len(seq)) - first) * block_m
    last_token = np.minimum((row + block_m - 1) // group, num_new[seq] - 1)
    order = np.argsort(-(starts[seq] + last_token), kind="stable")
    return np.stack((seq, row), axis=1)[order].astype(np.int32)


# Views of a step's buffer begin anywhere; a kernel for each alignment would be compiled while requests wait.
@triton.jit(do_not_specialize_on_alignment=["blocks_ptr", "rows_ptr", "seq_lens_ptr", "cu_q_ptr"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, blocks_ptr, page_table_ptr, rows_ptr, seq_lens_ptr, cu_q_ptr,
    scale, window, q_stride, out_stride, kv_stride, table_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block, KV head). Strides in elements; a head is contiguous. scale: of the scores, times log2(e)."""
    begin(PDL)
    kv_head = tl.program_id(0)
    seq = tl.load(blocks_ptr + tl.program_id(1) * 2)
    first_row = tl.load(blocks_ptr + tl.program_id(1) * 2 + 1)
    seq_len = tl.load(seq_lens_ptr + seq)
    first_token = tl.load(cu_q_ptr + seq)
    q_len = tl.load(cu_q_ptr + seq + 1) - first_token
    pages_ptr = page_table_ptr + tl.load(rows_ptr + seq).to(tl.int64) * table_stride

    row = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    valid = (token < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    token_at = (first_token + token).to(tl.int64)
    q_at = (token_at * q_stride + head * HEAD_DIM)[:, None] + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=valid, other=0.0)
    q_pos = seq_len - q_len + token
    k_ptr += kv_head * HEAD_DIM
    v_ptr += kv_head * HEAD_DIM

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    denom = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Blocks of keys: [low, left) the window's edge, [left, diagonal) seen by every row, [diagonal, end) the diagonal.
    first_pos = seq_len - q_len + first_row // GROUP
    last_pos = tl.minimum(seq_len - q_len + (first_row + BLOCK_M - 1) // GROUP, seq_len - 1)
    end = last_pos + 1
    low = first_pos * 0
    diagonal = (first_pos + 1) // BLOCK_N * BLOCK_N
    if HAS_WINDOW:
        low = tl.maximum(first_pos + 1 - window, 0) // BLOCK_N * BLOCK_N
        diagonal = tl.maximum(diagonal, low)
        left = tl.maximum(last_pos + 1 - window, 0)
        left = tl.minimum((left + BLOCK_N - 1) // BLOCK_N * BLOCK_N, diagonal)
        m, denom, acc = attend(
            q, m, denom, acc, k_ptr, v_ptr, pages_ptr, low, left, q_pos, seq_len, scale, window, kv_stride,
            HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, HAS_WINDOW, True, PRECISION,
        )  # fmt: skip
        low = left
    m, denom, acc = attend(
        q, m, denom, acc, k_ptr, v_ptr, pages_ptr, low, diagonal, q_pos, seq_len, scale, window, kv_stride,
        HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, HAS_WINDOW, False, PRECISION,
    )  # fmt: skip
    m, denom, acc = attend(
        q, m, denom, acc, k_ptr, v_ptr, pages_ptr, diagonal, end, q_pos, seq_len, scale, window, kv_stride,
        HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, HAS_WINDOW, True, PRECISION,
    )  # fmt: skip
    out_at = (token_at * out_stride + head * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(out_ptr + out_at, (acc / denom[:, None]).to(out_ptr.dtype.element_ty), mask=valid)


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: PagedSequences,
    blocks: Tensor,
    window: int | None,
    config: AttentionConfig,
    pdl: bool,
) -> Tensor:
    """Attention of each query to the keys up to its own position, at most `window` of them.

    q: [num_tokens, num_qo_heads, head_dim], any stride between tokens; caches: [num_slots, num_kv_heads, head_dim],
    contiguous, of uint8 where they are e4m3; blocks: of `prefill_blocks`, on the device → [num_tokens, num_qo_heads,
    head_dim].
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _prefill_kernel[(k_cache.shape[1], blocks.shape[0])](
        q, native(k_cache), native(v_cache), out, blocks, seqs.page_table, seqs.rows, seqs.seq_lens, seqs.cu_q,
        q.shape[2]**-0.5 * math.log2(math.e), window or 0,
        q.stride(0), out.stride(0), k_cache.stride(0), seqs.page_table.stride(0),
        BLOCK_M=config.block_m, **attention_options(q, k_cache, v_cache, seqs, window, config, pdl),
    )  # fmt: skip
    return out
