"""Products of the gated delta rule (arXiv 2412.06464, section 3.3): sequences in chunks of tokens, in two kernels.

With A[i, j] = beta_i k_i.k_j decay(j to i) below the diagonal, the tokens of a chunk add (1 + A)^-1 beta (v - decayed k
memory): the first kernel finds the factors of that for all chunks at once, the second walks along a sequence with the
memory in registers. Chunks of a sequence are numbered from `cu_q // CHUNK + sequence` on, so that no table of them is
needed; some numbers are of no chunk. Sequences of one token are left out.
"""
# mypy: allow-untyped-decorators, disable-error-code="import-not-found, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.kernel.state import StateSequences, Tensor
from minisgl.kernel.triton.common import begin, launch_options, precision

BLOCK_V = 32  # features of values that a program walks along with


@triton.jit
def _rows(ptr, t, real, stride, size, BLOCK: tl.constexpr):
    """[tokens, BLOCK]: features of tokens t; 0 from `size` on."""
    d = tl.arange(0, BLOCK)[None, :]
    return tl.load(ptr + t[:, None] * stride + d, mask=real[:, None] & (d < size), other=0.0)


# Views of a step's buffer begin anywhere; a kernel for each alignment would be compiled while requests wait.
@triton.jit(do_not_specialize=["num_tokens", "num_seqs"], do_not_specialize_on_alignment=["cu_q_ptr"])
def _within_kernel(
    qkv_ptr, gates_ptr, scores_ptr, read_ptr, added_ptr, cu_q_ptr, num_tokens, num_seqs, HK: tl.constexpr,
    DK: tl.constexpr, HV: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (chunk, head): scores of queries with decay [num_tokens, HV, CHUNK]; and what tokens add, which is
    added [num_tokens, HV, DV] - read [num_tokens, HV, DK] @ memory. CHUNK is 2 ** LEVELS."""
    begin(PDL)
    chunk, head, seq = tl.program_id(0), tl.program_id(1), -1
    for few in tl.range(0, num_seqs, 128):
        other = few + tl.arange(0, 128)
        number = tl.load(cu_q_ptr + other, mask=other < num_seqs, other=2**30) // CHUNK + other
        seq += tl.sum((number <= chunk).to(tl.int32), 0)
    start, end = tl.load(cu_q_ptr + seq), tl.load(cu_q_ptr + seq + 1)
    first = start + (chunk - start // CHUNK - seq) * CHUNK
    if (first < end) & (end - start > 1):
        CHANNELS: tl.constexpr = 2 * HK * DK + HV * DV
        i = tl.arange(0, CHUNK)
        dtype = qkv_ptr.dtype.element_ty
        row, column, real, t = i[:, None], i[None, :], first + i < end, (first + i).to(tl.int64)
        token = t[:, None] * HV + head
        total = tl.cumsum(tl.load(gates_ptr + t * HV + head, mask=real, other=0.0), 0)
        beta = tl.load(gates_ptr + (num_tokens + t) * HV + head, mask=real, other=0.0)
        q_ptr = qkv_ptr + head // (HV // HK) * DK
        k_ptr, v_ptr = q_ptr + HK * DK, qkv_ptr + 2 * HK * DK + head * DV
        q, k = _rows(q_ptr, t, real, CHANNELS, DK, BLOCK_K), _rows(k_ptr, t, real, CHANNELS, DK, BLOCK_K)
        v, d, e = _rows(v_ptr, t, real, CHANNELS, DV, BLOCK_V), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
        decay = tl.exp(tl.where(row >= column, total[:, None] - total[None, :], float("-inf")))
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * decay
        tl.store(scores_ptr + token * CHUNK + column, scores.to(dtype), mask=real[:, None])
        overlap = tl.dot(k, tl.trans(k), input_precision=PRECISION) * decay * beta[:, None]
        inverse = (row == column).to(tl.float32)  # of 1 + A, by blocks on the diagonal that become twice as large
        for level in tl.static_range(LEVELS):
            below = (row >> level == (column >> level) + 1) & (row >> level + 1 == column >> level + 1)
            part = tl.dot(tl.where(below, overlap, 0.0), inverse, input_precision=PRECISION)
            inverse -= tl.dot(inverse, part, input_precision=PRECISION)
        inverse *= beta[None, :]
        added = tl.dot(inverse.to(dtype), v, input_precision=PRECISION).to(dtype)
        tl.store(added_ptr + token * DV + e[None, :], added, mask=real[:, None] & (e < DV)[None, :])
        inverse *= tl.exp(total)[None, :]
        read = tl.dot(inverse.to(dtype), k, input_precision=PRECISION).to(dtype)
        tl.store(read_ptr + token * DK + d[None, :], read, mask=real[:, None] & (d < DK)[None, :])


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "cu_q_ptr", "tried_ptr"])
def _across_kernel(
    qkv_ptr, gates_ptr, scores_ptr, read_ptr, added_ptr, memory_ptr, out_ptr, slots_ptr, cu_q_ptr, tried_ptr,
    HK: tl.constexpr, DK: tl.constexpr, HV: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (features of values, head, sequence): outputs, and the memory after them."""
    begin(PDL)
    low, head, seq = tl.program_id(0) * BLOCK_V, tl.program_id(1), tl.program_id(2)
    start, end = tl.load(cu_q_ptr + seq), tl.load(cu_q_ptr + seq + 1)
    num_tried = 0 if tried_ptr is None else tl.load(tried_ptr + seq)
    if (end - start > 1) & (num_tried == 0):
        CHANNELS: tl.constexpr = 2 * HK * DK + HV * DV
        d, e = tl.arange(0, BLOCK_K)[:, None], low + tl.arange(0, BLOCK_V)[None, :]
        at = (tl.load(slots_ptr + seq).to(tl.int64) * HV + head) * (DK * DV) + d * DV + e
        memory = tl.load(memory_ptr + at, mask=(d < DK) & (e < DV), other=0.0)
        q_ptr = qkv_ptr + head // (HV // HK) * DK
        dtype = qkv_ptr.dtype.element_ty
        for first in tl.range(start, end, CHUNK):
            t = (first + tl.arange(0, CHUNK)).to(tl.int64)
            real = t < end
            log_decay = tl.load(gates_ptr + t * HV + head, mask=real, other=0.0)
            total, whole = tl.cumsum(log_decay, 0)[:, None], tl.sum(log_decay, 0)
            q = _rows(q_ptr, t, real, CHANNELS, DK, BLOCK_K)
            k = _rows(q_ptr + HK * DK, t, real, CHANNELS, DK, BLOCK_K)
            read = _rows(read_ptr + head * DK, t, real, HV * DK, DK, BLOCK_K)
            added = _rows(added_ptr + head * DV + low, t, real, HV * DV, DV - low, BLOCK_V).to(tl.float32)
            scores = _rows(scores_ptr + head * CHUNK, t, real, HV * CHUNK, CHUNK, CHUNK)
            before = memory.to(dtype)
            added = (added - tl.dot(read, before, input_precision=PRECISION)).to(dtype)
            o = tl.dot(q, before, input_precision=PRECISION) * tl.exp(total)
            o = tl.dot(scores, added, o, input_precision=PRECISION).to(dtype)
            tl.store(out_ptr + t[:, None] * (HV * DV) + head * DV + e, o, mask=real[:, None] & (e < DV))
            k = (k * tl.exp(whole - total)).to(dtype)
            memory = tl.dot(tl.trans(k), added, memory * tl.exp(whole), input_precision=PRECISION)
        tl.store(memory_ptr + at, memory, mask=(d < DK) & (e < DV))


def delta_chunks(qkv: Tensor, gates: Tensor, memory: Tensor, seqs: StateSequences, out: Tensor) -> None:
    """The rule for all sequences of several tokens that end with no draft. qkv: [num_tokens, 2 * Hk * Dk + Hv * Dv],
    queries and keys of length 1, scaled; gates: [2, num_tokens, Hv] float32, logarithms of decays, then betas; memory:
    [slots, Hv, Dk, Dv] float32, brought up to date; out: [num_tokens, Hv * Dv]."""
    (num_tokens, channels), (_, num_v, k_dim, v_dim), num = qkv.shape, memory.shape, len(seqs.slots)
    capability = torch.cuda.get_device_capability(out.device) if out.is_cuda else (0, 0)
    precise, pdl = precision(qkv.dtype), capability >= (9, 0)
    # What fits the registers, and 99 KB of shared memory on 8.6. One stage gives wrong results on 9.0 (Triton 3.6).
    chunk, warps = (16, 8) if qkv.dtype == torch.float32 else (64 if k_dim <= 128 else 32, 4)
    scores, read, added = (qkv.new_empty(num_tokens, num_v, size) for size in (chunk, k_dim, v_dim))
    block_k, block_v = (max(16, triton.next_power_of_2(dim)) for dim in (k_dim, v_dim))
    shape = (channels - num_v * v_dim) // (2 * k_dim), k_dim, num_v, v_dim, block_k
    _within_kernel[(num_tokens // chunk + num, num_v)](
        qkv, gates, scores, read, added, seqs.cu_q, num_tokens, num, *shape, block_v, chunk, chunk.bit_length() - 1,
        precise, pdl, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    _across_kernel[(triton.cdiv(v_dim, BLOCK_V), num_v, num)](
        qkv, gates, scores, read, added, memory, out, *seqs[:2], seqs.tried, *shape, BLOCK_V, chunk, precise, pdl,
        num_warps=warps, num_stages=3 if capability == (9, 0) and chunk == 64 else 2, **launch_options(pdl),
    )  # fmt: skip
