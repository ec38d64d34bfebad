"""Mixture of experts: route tokens, sort (token, choice) pairs by expert, two grouped GEMMs, sum over the choices.

Nothing waits for the device. Grids are upper bounds that follow from shapes alone, so every launch can be captured in a
CUDA graph: `num_pairs` pairs over `num_experts` experts need at most `num_pairs // block_m + min(num_pairs,
num_experts)` blocks of `block_m` rows, since each expert that is hit leaves one block partly filled at most. Pairs of
one expert keep their order and choices are summed in order: results do not depend on timing.

A pair is numbered token * top_k + choice.
"""
# mypy: allow-untyped-decorators, disable-error-code="import-not-found, no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from minisgl.kernel import experts as fp4
from minisgl.kernel.activations import route
from minisgl.kernel.float8 import GROUP, ROWS, merge
from minisgl.kernel.jit import load_kernel
from minisgl.kernel.ops import Routed, Stacked, Tensor
from minisgl.kernel.packed import Blocks, Float8
from minisgl.kernel.packed_gemm import codes_of, in_order
from minisgl.kernel.triton.common import Tile, begin, launch_options, native, precision, tiles, widen

SCANS, LONG = (1024, 4096), 12288  # pairs that a sorting program looks at together, the second of more than LONG


def moe_config(num_pairs: int, num_experts: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Tile, Tile]:
    """Of gate and up, and of down: they share block_m, since it is what pairs are sorted into."""
    by_average = tiles("experts", dtype, capability)
    first, second = next(both for most, both in by_average.items() if num_pairs <= most * num_experts)
    return Tile(*first), Tile(*second)


@dataclass(frozen=True, slots=True)
class Stack:
    """[num_experts, out, in]: in full (bits: 16), e4m3 times a scale (8), or as `packed_gemm.Codes` (4), or
    of 4 bits without seconds, floats (e2m1) times 2^(scale - 127), scales being uint8.

    data: [num_experts, out, in], of 4 bits in / 2, contiguous. scales, seconds: of all experts' rows, one for each
    `rows` of these and `group` columns, float32. bias: [num_experts, out].
    """

    data: Tensor
    scales: Tensor | None = None
    seconds: Tensor | None = None
    bits: int = 16
    rows: int = 1
    group: int = 1
    has_minima: bool = False
    bias: Tensor | None = None
    unit: float = 0.0  # of data of 4 bits that `kernel.experts` has packed: a factor of all


def stack_of(experts: Stacked, gated: bool = False, arch: tuple[int, int] = (0, 0)) -> Stack:
    """What experts do not have alike becomes the type of activations. arch: of a GPU with kernels of our own."""
    if isinstance(experts, Tensor):
        return Stack(experts.contiguous())
    dtype, found = experts[0], [list(parts) for parts in experts[1]]
    flat = [part for parts in found for part in parts]
    packed = [part for part in flat if not isinstance(part, Tensor)]
    blocks = [part.data for part in packed if isinstance(part, Blocks) and part.kind == "MXFP4"]
    if len(blocks) == len(flat):
        each = torch.cat(blocks).view(len(found), -1, blocks[0].shape[1])
        if arch > (0, 0) and dtype != torch.float32 and each.shape[1] % 16 == 0:
            data, unit = fp4.pack(each, dtype, gated, arch)
            return Stack(data, None, None, 4, unit=unit)
        each = each.unflatten(-1, (-1, 17))
        return Stack(in_order(each[..., 1:]).flatten(2), each[..., 0].contiguous(), None, 4, 1, 32)
    floats = [part for part in packed if isinstance(part, Float8)]
    if len(floats) == len(flat) and (weight := merge(floats)) is not None:
        rows, group = (ROWS, GROUP) if weight.has_groups else (1, weight.data.shape[1])
        return Stack(weight.data.unflatten(0, (len(found), -1)), weight.scales, None, 8, rows, group)
    if len(packed) == len(flat) and (codes := codes_of(packed)) is not None and codes.columns is None:
        _, group, has_minima = codes.kind
        return Stack(codes.codes.unflatten(0, (len(found), -1)), codes.scales, codes.seconds, 4, 1, group, has_minima)
    full = (part if isinstance(part, Tensor) else part.dequantize() for part in flat)
    return Stack(torch.cat([part.to(dtype) for part in full]).unflatten(0, (len(found), -1)))


@triton.jit(do_not_specialize=["num_pairs", "max_blocks"])
def _sort_kernel(
    experts_ptr, order_ptr, blocks_ptr, num_pairs, max_blocks, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, SCAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (expert): its part of `order` and of `blocks`. The last one marks the blocks that nobody needs."""
    begin(PDL)
    expert = tl.program_id(0)
    ids, offsets = tl.arange(0, BLOCK_E), tl.arange(0, SCAN)
    counts = tl.zeros((BLOCK_E,), tl.int32)  # how many pairs chose each
    for start in tl.range(0, num_pairs, SCAN):
        known = start + offsets < num_pairs
        counts += tl.histogram(tl.load(experts_ptr + start + offsets, mask=known, other=0), BLOCK_E, mask=known)
    num_blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(ids < expert, counts, 0), 0)
    first_block = tl.sum(tl.where(ids < expert, num_blocks, 0), 0)
    count = tl.sum(tl.where(ids == expert, counts, 0), 0)
    end = first + count
    end_block = first_block + (count + BLOCK_M - 1) // BLOCK_M
    for block in tl.range(first_block, tl.where(expert == NUM_EXPERTS - 1, max_blocks, end_block)):
        low = tl.minimum(first + (block - first_block) * BLOCK_M, end)
        tl.store(blocks_ptr + block * 4, expert)
        tl.store(blocks_ptr + block * 4 + 1, low)
        tl.store(blocks_ptr + block * 4 + 2, tl.minimum(low + BLOCK_M, end))
        tl.store(blocks_ptr + block * 4 + 3, 0)
    if count > 0:
        at = first
        for start in tl.range(0, num_pairs, SCAN):
            pair = start + offsets
            mine = tl.load(experts_ptr + pair, mask=pair < num_pairs, other=-1) == expert
            rank = tl.cumsum(mine.to(tl.int32), 0)
            tl.store(order_ptr + at + rank - 1, pair, mask=mine)
            at += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _product_kernel(
    x_ptr, w_ptr, scales_ptr, seconds_ptr, bias_ptr, weights_ptr, out_ptr, order_ptr, blocks_ptr, x_stride,
    IN: tl.constexpr, OUT: tl.constexpr, TOP_K: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, MINIMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATED: tl.constexpr, CLAMPED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (features, block), of the block's pairs.

    GATED: silu(x @ gate.T) * (x @ up.T) of tokens x → out [num_pairs, OUT], sorted; w: [experts, 2 * OUT, IN], gate's
    rows first. CLAMPED: `clamped_swiglu` instead. Otherwise weight * (x @ w.T) of sorted rows x [num_pairs, IN] → out,
    by pair; w: [experts, OUT, IN]. bias: of w's rows, or None.
    """
    begin(PDL)
    block_ptr = blocks_ptr + tl.program_id(1) * 4
    expert, first, end = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        row_ok, feature_ok = (row < end)[:, None], feature < OUT
        pair = tl.load(order_ptr + row, mask=row < end, other=0)
        w_row = expert.to(tl.int64) * ((2 if GATED else 1) * OUT) + feature
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if GATED:
            x_ptrs = x_ptr + (pair.to(tl.int64) // TOP_K * x_stride)[:, None] + k[None, :]
            up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        else:
            x_ptrs = x_ptr + row.to(tl.int64)[:, None] * IN + k[None, :]
            weight = tl.load(weights_ptr + pair, mask=row < end, other=0.0)
        for start in tl.range(0, IN, BLOCK_K):
            x_ok = row_ok if IN % BLOCK_K == 0 else row_ok & (start + k < IN)[None, :]
            x = tl.load(x_ptrs + start, mask=x_ok, other=0.0)
            w = _load_w(
                w_ptr, scales_ptr, seconds_ptr, w_row, feature_ok, start, x.dtype, IN, OUT, BITS, ROWS, GROUP, MINIMA,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if GATED:
                w_up = _load_w(
                    w_ptr, scales_ptr, seconds_ptr, w_row + OUT, feature_ok, start, x.dtype, IN, OUT, BITS, ROWS,
                    GROUP, MINIMA, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            if GATED:
                up = tl.dot(x, w_up, up, input_precision=PRECISION)
        to = row if GATED else pair
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + w_row, mask=feature_ok, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(bias_ptr + w_row + OUT, mask=feature_ok, other=0.0).to(tl.float32)[None, :]
        if CLAMPED:
            acc, up = tl.minimum(acc, 7.0), tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0
        acc = acc / (1.0 + tl.exp(acc * (-1.702 if CLAMPED else -1.0))) * up if GATED else acc * weight[:, None]
        at = to.to(tl.int64)[:, None] * OUT + feature[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=row_ok & feature_ok[None, :])


@triton.jit
def _load_w(
    w_ptr, scales_ptr, seconds_ptr, row, ok, start, DTYPE: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    BITS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_N] of DTYPE: columns from `start` on of rows of a `Stack`."""
    k = start + tl.arange(0, BLOCK_K)
    if BITS == 16:
        ptrs = w_ptr + row[None, :] * IN + k[:, None]
        if OUT % BLOCK_N == 0 and IN % BLOCK_K == 0:
            w = tl.load(ptrs)
        else:
            w = tl.load(ptrs, mask=ok[None, :] & (k < IN)[:, None], other=0.0)
    else:
        shared_by = row // ROWS
        scales = _load_shared(scales_ptr, shared_by, ok, start, IN, GROUP, BLOCK_N, BLOCK_K)
        if BITS == 8:
            codes = tl.load(w_ptr + row[:, None] * IN + k[None, :], mask=ok[:, None] & (k < IN)[None, :], other=0.0)
            values = widen(codes, tl.float32) * scales
        else:
            byte = start // 2 + tl.arange(0, BLOCK_K // 2)
            ptrs = w_ptr + row[:, None] * (IN // 2) + byte[None, :]
            codes = tl.load(ptrs, mask=ok[:, None] & (byte < IN // 2)[None, :], other=0)
            codes = tl.interleave(codes & 15, codes >> 4).to(tl.uint16)
            if seconds_ptr is None:  # their bits where float16 has them, times what its exponent is short of
                floats = (((codes & 8) << 12) | ((codes & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32)
                values = floats * 16384.0 * (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
            else:
                values = codes.to(tl.float32)
                seconds = _load_shared(seconds_ptr, shared_by, ok, start, IN, GROUP, BLOCK_N, BLOCK_K)
                values = (values - 8.0) * scales + seconds if MINIMA else (values - seconds) * scales
        w = tl.trans(values.to(DTYPE))
    return w


@triton.jit
def _load_shared(ptr, row, ok, at, IN: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """What columns of a group have in common: [BLOCK_N, BLOCK_K], or [BLOCK_N, 1] where these are all of one group."""
    GROUPS: tl.constexpr = (IN + GROUP - 1) // GROUP
    NUM: tl.constexpr = BLOCK_K // GROUP if GROUP < BLOCK_K and GROUPS > 1 else 1
    group = at // GROUP + tl.arange(0, NUM)
    known = ok[:, None] & (group < GROUPS)[None, :]
    shared = tl.load(ptr + row[:, None] * GROUPS + group[None, :], mask=known, other=0)
    if NUM > 1:
        shared = tl.reshape(tl.broadcast_to(shared[:, :, None], (BLOCK_N, NUM, GROUP)), (BLOCK_N, BLOCK_K))
    return shared


@triton.jit
def _sum_kernel(
    x_ptr, out_ptr, OUT: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, PDL: tl.constexpr
):
    """Program (token, features): the sum of the token's pairs, and of what is there."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if ADDS:
        total += tl.load(out_ptr + token * OUT + feature, mask=feature < OUT, other=0.0).to(tl.float32)
    for i in tl.static_range(TOP_K):
        total += tl.load(x_ptr + (token * TOP_K + i) * OUT + feature, mask=feature < OUT, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * OUT + feature, total.to(out_ptr.dtype.element_ty), mask=feature < OUT)


def sort_pairs(experts: Tensor, num_experts: int, block_m: int, pdl: bool = False) -> tuple[Tensor, Tensor]:
    """experts: [num_tokens, top_k] int32 → int32: [num_pairs], pairs by expert; and [max_blocks, 4]: expert, first and
    end index of these, first == end where there is no block, and 0."""
    num_pairs, device = experts.numel(), experts.device
    max_blocks = num_pairs // block_m + min(num_pairs, num_experts)
    order, blocks = (torch.empty(shape, dtype=torch.int32, device=device) for shape in (num_pairs, (max_blocks, 4)))
    _sort_kernel[(num_experts,)](
        experts, order, blocks, num_pairs, max_blocks, num_experts, triton.next_power_of_2(num_experts), block_m,
        SCANS[num_pairs > LONG], pdl, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return order, blocks


def choose_experts(logits: Tensor, top_k: int, sums_to_1: bool, arch: tuple[int, int], *pairs: Tensor) -> list[Tensor]:
    """logits: [num_tokens, num_experts] → weights, float32, and experts, int32, of each token's most probable experts:
    [num_tokens, top_k]. arch: see `fused_moe`. pairs: as of `sort_pairs`, to be filled: a block for each pair."""
    kinds = torch.float32, torch.int32
    if arch == (0, 0):
        return [part.to(kind) for part, kind in zip(route(logits, top_k, sums_to_1), kinds, strict=True)]
    chosen = [torch.empty((len(logits), top_k), dtype=kind, device=logits.device) for kind in kinds]
    load_kernel("routing", arch).route(logits, sums_to_1, *chosen, *(pairs or (None, None)))
    return chosen


def fused_moe(
    x: Tensor, routed: Routed, gate_up: Stack, down: Stack, top_k: int, renormalize: bool,
    config: tuple[Tile, Tile] | None = None, clamped: bool = False, arch: tuple[int, int] = (0, 0),
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Each token's `top_k` most probable experts' gated MLPs, weighted by their probabilities.

    x: [num_tokens, hidden]; routed: logits [num_tokens, num_experts], or weights in float32 and experts in int32, each
    [num_tokens, top_k]; gate_up: [num_experts, 2 * inner, hidden], gate's rows first; down: [num_experts, hidden,
    inner] → [num_tokens, hidden], in place of `residual` its sum with them. Sums are in float32. clamped: see the
    kernel. arch: of a GPU with kernels in CUDA; (0, 0): there are none. Temporary memory: num_tokens * top_k *
    (inner + hidden) elements of x's dtype.
    """
    (num_experts, twice, _), (num_tokens, hidden) = gate_up.data.shape, x.shape
    inner, capability = twice // 2, torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    assert x.stride(1) == 1
    assert down.data.shape[:2] == (num_experts, hidden)
    out = torch.empty((num_tokens, hidden), dtype=x.dtype, device=x.device) if residual is None else residual
    if not num_tokens:
        return out
    pdl, num_pairs = capability >= (9, 0), num_tokens * top_k
    gated = torch.empty((num_pairs, inner), dtype=x.dtype, device=x.device)
    logits = None if isinstance(routed, tuple) else routed
    if logits is not None and fp4.takes(gate_up, down, num_pairs, top_k):
        parts = (part for stack in (gate_up, down) for part in (stack.data, stack.unit, stack.bias))
        kind = top_k, renormalize, clamped, residual is not None
        fp4.load(x.dtype, capability).mixture(x, logits, *parts, gated, out, *kind)
        return out
    first, second = config or moe_config(num_pairs, num_experts, x.dtype, capability)
    if gate_up.unit or down.unit:  # Triton, for one of them, takes 16 pairs and more
        size = fp4.block_of(num_pairs, num_experts, capability)
        size = size if gate_up.unit and down.unit else min(max(size, 16), 64)
        first, second = replace(first, block_m=size), replace(second, block_m=size)
    assert first.block_m == second.block_m
    few = num_tokens == 1 or 8 * num_pairs <= num_experts  # hardly two have the same expert
    alone = logits is not None and arch > (0, 0) and few
    pairs = [torch.empty(n, dtype=torch.int32, device=x.device) for n in ((num_pairs,), (num_pairs, 4)) if alone]
    weights, experts = routed if isinstance(routed, tuple) else choose_experts(routed, top_k, renormalize, arch, *pairs)
    order, blocks = pairs or sort_pairs(experts, num_experts, first.block_m, pdl)
    scaled = torch.empty((num_pairs, hidden), dtype=x.dtype, device=x.device)
    _product(x, gate_up, gated, (order, blocks), weights, first, (True, clamped), pdl)
    _product(gated, down, scaled, (order, blocks), weights, second, (False, -bool(gate_up.unit and down.unit)), pdl)
    _sum_kernel[(num_tokens, triton.cdiv(hidden, 1024))](
        scaled, out, hidden, top_k, min(1024, triton.next_power_of_2(hidden)), residual is not None, pdl, num_warps=4,
        **launch_options(pdl),
    )  # fmt: skip
    return out


def _product(
    x: Tensor, w: Stack, out: Tensor, pairs: tuple[Tensor, Tensor], weights: Tensor, c: Tile,
    kind: tuple[int, int], pdl: bool,
) -> None:  # fmt: skip
    (order, blocks), top_k = pairs, weights.shape[1]
    if w.unit:
        module = fp4.load(x.dtype, torch.cuda.get_device_capability(x.device), c.block_m)
        module.product(x, w.data, w.unit, w.bias, weights, order, blocks, out, top_k, sum(kind), c.block_m)
        return
    data = native(w.data) if w.bits == 8 else w.data
    _product_kernel[(triton.cdiv(out.shape[1], c.block_n), len(blocks))](
        x, data, w.scales, w.seconds, w.bias, weights, out, order, blocks, x.stride(0), x.shape[1], out.shape[1], top_k,
        w.bits, w.rows, w.group, w.has_minima, c.block_m, c.block_n, c.block_k, *kind, precision(x.dtype), pdl,
        num_warps=c.num_warps, num_stages=c.num_stages, **launch_options(pdl),
    )  # fmt: skip
