"""Causal attention over the paged cache: of ragged prompts, of further chunks of them, and of single tokens.

Online softmax over blocks of keys (FlashAttention-2, arXiv 2307.08691, section 3.1), in powers of two. The query heads
that share a KV head are packed with the tokens into the rows of a block, row r being head r % GROUP of token
r // GROUP: keys are read once per group, and a short chunk still fills the block.

Sequences that decode have a block each. Where these are too few for the GPU, each sequence's keys are split among
programs, and partial softmaxes are merged by their log-sum-exp (Flash-Decoding). The number of splits is fixed by the
host, what each reads is computed on the device from the sequence's length: a CUDA graph that holds the launch serves
any lengths. A split without keys ends at once.
"""
# mypy: allow-untyped-decorators, disable-error-code="import-not-found, no-untyped-def"

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from minisgl.kernel.ops import PagedSequences, Tensor
from minisgl.kernel.triton.common import Tile, begin, launch_options, native, precision, widen

MAX_SPLITS = 64
MERGE_STEP = 8  # splits that the merge loads at once
WAVES = 4  # programs per multiprocessor to aim for where sequences decode


def decode_config(dtype: torch.dtype, head_dim: int, group: int) -> Tile:
    """At most 64 KB of shared memory, which every GPU since 8.0 has.

    Of num_stages, half are in flight where a page number must be loaded before the keys.
    """
    block_m = max(16, triton.next_power_of_2(group))  # of products
    if dtype == torch.float32:
        return Tile(block_m, 32, 4, 1)
    return Tile(block_m, 32 if head_dim > 128 else 64, 4, 3)


def num_splits(batch_size: int, num_kv_heads: int, max_seq_len: int, block_n: int, num_sms: int) -> int:
    """Enough programs for the chip, each with two blocks of keys at least; 1 where the batch alone fills it."""
    wanted = round(WAVES * num_sms / (batch_size * num_kv_heads))
    return max(1, min(wanted, -(-max_seq_len // (2 * block_n)), MAX_SPLITS))


def query_blocks(
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


@triton.jit
def _load_keys(
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
def _attend(
    q, m, denom, acc, k_ptr, v_ptr, pages_ptr, first, end, q_pos, seq_len, scale, window, kv_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends to the keys of positions [first, end), `first` a multiple of BLOCK_N: → m, denom, acc."""
    offsets, behind = tl.arange(0, BLOCK_N), tl.min(q_pos, 0) - window if HAS_WINDOW else -1
    for start in tl.range(first, end, BLOCK_N):
        pos = start + offsets
        known = (pos < seq_len) & (pos > behind)  # pages behind the window may be other requests'
        k, v = _load_keys(
            k_ptr, v_ptr, q.dtype, pages_ptr, start, known, kv_stride, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE,
            MASKED,
        )  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAP > 0:  # tanh, by 2^x
            s = (1.0 - 2.0 / (1.0 + tl.exp2(s * (scale * 2.0 / CAP)))) * (CAP * 1.4426950408889634 / scale)
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


@triton.jit
def _attend_all(
    q, k_ptr, v_ptr, pages_ptr, low, end, first_pos, last_pos, q_pos, seq_len, scale, window, kv_stride,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr, DECODES: tl.constexpr, HAS_WINDOW: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries, at positions from `first_pos` to `last_pos`, attends to keys [low, end): → m, denom, acc.

    They lie in [low, left), the window's edge; [left, diagonal), seen by every row; and [diagonal, end), the diagonal.
    """
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    denom = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    left, diagonal = low, low
    if not DECODES:
        diagonal = tl.maximum((first_pos + 1) // BLOCK_N * BLOCK_N, low)
        if HAS_WINDOW:
            left = tl.maximum(last_pos + 1 - window, 0)
            left = tl.minimum(tl.cdiv(left, BLOCK_N) * BLOCK_N, diagonal)
    for part in tl.static_range(2 if DECODES else 0 if HAS_WINDOW else 1, 3):
        first = low if part == 0 else left if part == 1 else diagonal
        stop = left if part == 0 else diagonal if part == 1 else end
        m, denom, acc = _attend(
            q, m, denom, acc, k_ptr, v_ptr, pages_ptr, first, stop, q_pos, seq_len, scale, window, kv_stride,
            HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, HAS_WINDOW, CAP, part != 1, PRECISION,
        )  # fmt: skip
    return m, denom, acc


# Views of a step's buffer begin anywhere; a kernel for each alignment would be compiled while requests wait.
@triton.jit(
    do_not_specialize=["splits"], do_not_specialize_on_alignment=["blocks_ptr", "rows_ptr", "seq_lens_ptr", "cu_q_ptr"]
)
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, lse_ptr, blocks_ptr, page_table_ptr, rows_ptr, seq_lens_ptr, cu_q_ptr,
    sinks_ptr, scale, window, q_stride, kv_stride, table_stride, splits,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, DECODES: tl.constexpr, SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (KV head, block, split). Strides in elements; a head is contiguous. scale: of the scores, times log2(e).
    CAP: scores become CAP * tanh(score / CAP); 0: none. sinks: [heads], scores of no token, or None.
    DECODES: block i is the only token of sequence i."""
    begin(PDL)
    kv_head = tl.program_id(0)
    if DECODES:
        seq, first_row = tl.program_id(1), 0
        first_token, q_len = seq, 1
    else:
        seq, first_row = tl.load(blocks_ptr + tl.program_id(1) * 2), tl.load(blocks_ptr + tl.program_id(1) * 2 + 1)
        first_token = tl.load(cu_q_ptr + seq)
        q_len = tl.load(cu_q_ptr + seq + 1) - first_token
    seq_len = tl.load(seq_lens_ptr + seq)
    pages_ptr = page_table_ptr + tl.load(rows_ptr + seq).to(tl.int64) * table_stride

    row = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    valid = (token < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    token_at = (first_token + token).to(tl.int64)
    q = tl.load(q_ptr + (token_at * q_stride + head * HEAD_DIM)[:, None] + dims[None, :], mask=valid, other=0.0)
    q_pos = seq_len - q_len + token
    k_ptr += kv_head * HEAD_DIM
    v_ptr += kv_head * HEAD_DIM
    first_pos = seq_len - q_len + first_row // GROUP
    last_pos = tl.minimum(seq_len - q_len + (first_row + BLOCK_M - 1) // GROUP, seq_len - 1)
    low = tl.maximum(first_pos + 1 - window, 0) // BLOCK_N * BLOCK_N if HAS_WINDOW else first_pos * 0
    end = last_pos + 1
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end - low, BLOCK_N), splits) * BLOCK_N
        low += tl.program_id(2) * share
        end = tl.minimum(low + share, end)
    m, denom, acc = _attend_all(
        q, k_ptr, v_ptr, pages_ptr, low, end, first_pos, last_pos, q_pos, seq_len, scale, window, kv_stride, HEAD_DIM,
        BLOCK_M, BLOCK_D, BLOCK_N, PAGE_SIZE, DECODES, HAS_WINDOW, CAP, PRECISION,
    )  # fmt: skip

    if sinks_ptr is not None and not SPLIT:
        denom += tl.exp2(tl.load(sinks_ptr + head) * 1.4426950408889634 - m)
    acc = acc / tl.where(denom == 0.0, 1.0, denom)[:, None]
    index = token_at * NUM_HEADS + head
    if SPLIT:
        part = index * splits + tl.program_id(2)
        lse = tl.where(denom == 0.0, float("-inf"), m + tl.log2(denom))
        tl.store(lse_ptr + part, lse, mask=token < q_len)
        tl.store(acc_ptr + (part * HEAD_DIM)[:, None] + dims[None, :], acc, mask=valid & (low < end))
    else:
        at = (index * HEAD_DIM)[:, None] + dims[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    acc_ptr, lse_ptr, out_ptr, sinks_ptr, splits, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, query head): the mean of its partial results, weighted by exp2(lse)."""
    begin(PDL)
    index = tl.program_id(0).to(tl.int64)
    all_splits = tl.arange(0, BLOCK_S)
    lse = tl.load(lse_ptr + index * splits + all_splits, mask=all_splits < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse - top), 0)
    if sinks_ptr is not None:
        total += tl.exp2(tl.load(sinks_ptr + index % NUM_HEADS) * 1.4426950408889634 - top)
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


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqs: PagedSequences, blocks: Tensor | None, window: int | None,
    splits: int, config: Tile, pdl: bool, cap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each query to the keys up to its own position, at most `window` of them; zeros where there are none.

    q: [num_tokens, num_qo_heads, head_dim], any stride between tokens; caches: [num_slots, num_kv_heads, head_dim],
    contiguous, of uint8 where they are e4m3; blocks: of `query_blocks`, on the device, or None: each sequence has one
    token, and its keys may be split; cap, sinks: as in the kernel → [num_tokens, num_qo_heads, head_dim].
    """
    (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k_cache.shape[1]
    assert q.stride()[1:] == (head_dim, 1)
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    assert splits == 1 or blocks is None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_parts = num_tokens * num_heads * splits if splits > 1 else 0
    acc, lse = (q.new_empty(num_parts, size, dtype=torch.float32) for size in (head_dim, 1))
    num_blocks, block_d = num_tokens if blocks is None else len(blocks), triton.next_power_of_2(head_dim)
    _attention_kernel[(num_kv_heads, num_blocks, splits)](
        q, native(k_cache), native(v_cache), out, acc, lse, seqs.rows if blocks is None else blocks,
        seqs.page_table, seqs.rows, seqs.seq_lens, seqs.cu_q, sinks, head_dim**-0.5 * math.log2(math.e), window or 0,
        q.stride(0), k_cache.stride(0), seqs.page_table.stride(0), splits,
        num_heads, num_heads // num_kv_heads, head_dim, config.block_m, block_d, config.block_n, seqs.page_size,
        blocks is None, splits > 1, window is not None, cap, precision(q.dtype), pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(pdl),
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(num_tokens * num_heads,)](
            acc, lse, out, sinks, splits, num_heads, head_dim, block_d, MAX_SPLITS, MERGE_STEP, pdl,
            num_warps=2 if head_dim <= 128 else 4, **launch_options(pdl),
        )  # fmt: skip
    return out
