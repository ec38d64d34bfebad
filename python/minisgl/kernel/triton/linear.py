"""Linear layers of a decode batch (17 to 256 tokens) with their neighbours fused, bound by the reading of the weights.

The product's tiles are cut into steps along K, and each program takes an equal, consecutive share of all steps, as in
stream-K (Osama et al., 2023, section 4): every SM is busy to the end whatever the shape. A tile that several programs
share is summed in float32 by the last of them to arrive, in the order of the programs: results do not depend on timing.

The norm needs no pass of its own: rms_norm(x) @ w.T = rstd * ((x * gain) @ w.T), and programs gather the sums of
squares on their way.

With programmatic dependent launch a program asks for its first weights before the kernel ahead of it ends, so weights
must not be written by work that is still in flight on the stream. One stream at a time: calls share a workspace.
"""
# mypy: allow-untyped-decorators, disable-error-code="import-not-found, no-untyped-def"

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

MIN_TOKENS, MAX_TOKENS = 17, 256
WORKSPACE = 160 * 2 * 256 * 128
"""Floats for the unfinished tiles: two for each program."""
MAX_PROGRAMS, MAX_TILES = 2048, 1 << 16
PREFETCHED = 256  # inputs of each output that a program asks for ahead of time


@dataclass(frozen=True, slots=True)
class Config:
    """How a product is computed; every field but `programs` makes another kernel.

    block_m: tokens; block_n: outputs; block_k: inputs of a step. programs: how many share the steps, 0: one program
    for each tile. swap: the weights are the tensor cores' left operand, of which they take at least 64 rows. tma: tiles
    come through tensor descriptors. max_registers: of a thread, for more programs on an SM.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int = 0
    swap: bool = True
    tma: bool = True
    max_registers: int | None = None


MEASURED: dict[tuple[int, int, bool], tuple[tuple[int, Config], ...]] = {}
"""(outputs, inputs, with norm) → the fastest configurations, each with the number of tokens up to which it holds."""


@triton.jit
def _prefetch(w_ptr, row, start, rows, k, INPUTS: tl.constexpr):
    """Have L2 read INPUTS inputs of each row, from `start` on, one request for each line of 128 bytes."""
    line: tl.constexpr = 128 // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    column = tl.minimum(start + tl.arange(0, INPUTS // line) * line, k - 1)
    pointers = w_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * k + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _tile(source, row, start, rows, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """source[row : row + ROWS, start : start + COLUMNS]; what lies beyond `rows` is arbitrary."""
    if TMA:
        tile = source.load([row, start])
    else:
        index = tl.minimum(row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        tile = tl.load(source + index[:, None] * stride + (start + tl.arange(0, COLUMNS))[None, :])
    return tile


@triton.jit
def _dot(x, w, acc, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def _accumulate(
    x_source, w_source, norm_ptr, row_m, row_n, first, last, num_tokens, n, k, x_stride, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Steps `first` to `last` of a tile → its product (of the gate), that of up (if GATED), sums of squares [BLOCK_M].

    Products: [BLOCK_N, BLOCK_M] if SWAP, else [BLOCK_M, BLOCK_N].
    """
    rows: tl.constexpr = BLOCK_N if SWAP else BLOCK_M
    columns: tl.constexpr = BLOCK_M if SWAP else BLOCK_N
    num_rows = 2 * n if GATED else n
    acc = tl.zeros((rows, columns), tl.float32)
    other = tl.zeros((rows, columns), tl.float32) if GATED else 0.0
    squares = tl.zeros((BLOCK_M,), tl.float32) if norm_ptr is not None else 0.0
    for step in tl.range(first, last):
        start = step * BLOCK_K
        x = _tile(x_source, row_m, start, num_tokens, x_stride, BLOCK_M, BLOCK_K, TMA)
        w = _tile(w_source, row_n, start, num_rows, k, BLOCK_N, BLOCK_K, TMA)
        if norm_ptr is not None:
            gain = tl.load(norm_ptr + start + tl.arange(0, BLOCK_K)).to(tl.float32)
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            x = (wide * gain[None, :]).to(x.dtype)
        acc = _dot(x, w, acc, SWAP)
        if GATED:
            up = _tile(w_source, row_n + n, start, num_rows, k, BLOCK_N, BLOCK_K, TMA)
            other = _dot(x, up, other, SWAP)
    return acc, other, squares


@triton.jit
def _finish(
    acc, other, squares, bias_ptr, norm_ptr, out_ptr, row_m, row_n, num_tokens, n, k, eps, FORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """What follows a tile's product, once, in float32."""
    token, feature = row_m + tl.arange(0, BLOCK_M), row_n + tl.arange(0, BLOCK_N)
    real = (token < num_tokens)[:, None] & (feature < n)[None, :]
    at = token.to(tl.int64)[:, None] * n + feature[None, :]
    y = tl.trans(acc) if SWAP else acc
    if norm_ptr is not None:
        rstd = tl.rsqrt(squares / k + eps)
        y *= rstd[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + feature, mask=feature < n, other=0.0).to(tl.float32)[None, :]
    if FORM == "gate_up":
        up = tl.trans(other) if SWAP else other
        if norm_ptr is not None:
            up *= rstd[:, None]
        y = y / (1.0 + tl.exp(-y)) * up
    if FORM == "add":
        y += tl.load(out_ptr + at, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _gathered(
    partial_ptr, squares_ptr, from_program, to_program, share, tile_begin, GATED: tl.constexpr, NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums over the programs that share the tile of which `tile_begin` is the first step."""
    PLANE: tl.constexpr = ROWS * COLUMNS
    PLANES: tl.constexpr = 2 if GATED else 1
    inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    other = tl.zeros((ROWS, COLUMNS), tl.float32) if GATED else 0.0
    squares = tl.zeros((BLOCK_M,), tl.float32) if NORM else 0.0
    for program in tl.range(from_program, to_program + 1, num_stages=1):
        slot = program * 2 + (program * share < tile_begin).to(tl.int32)
        pointers = partial_ptr + slot * (PLANES * PLANE) + inner
        acc += tl.load(pointers, cache_modifier=".cg")
        if GATED:
            other += tl.load(pointers + PLANE, cache_modifier=".cg")
        if NORM:
            squares += tl.load(squares_ptr + slot * BLOCK_M + tl.arange(0, BLOCK_M), cache_modifier=".cg")
    return acc, other, squares


@triton.jit(do_not_specialize=["num_tokens", "share"])
def _linear_kernel(
    x_source, w_source, w_ptr, bias_ptr, norm_ptr, out_ptr, partial_ptr, squares_ptr, counters_ptr, num_tokens, n, k,
    x_stride, share, eps, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, STREAM: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program p: steps p * share to (p + 1) * share of all tiles' steps, tiles of the same outputs side by side.

    x: [num_tokens, k], w: [n, k] (gate_up: [2 * n, k]) → out [num_tokens, n]; sources are pointers or, if TMA,
    descriptors. partial: [programs, 2, 1 or 2, tile], squares: [programs, 2, BLOCK_M], where 2 are a program's first
    and last unfinished tile; counters: [tiles], zero before and after.
    """
    GATED: tl.constexpr = FORM == "gate_up"
    PLANES: tl.constexpr = 2 if GATED else 1
    TILE: tl.constexpr = BLOCK_M * BLOCK_N
    rows: tl.constexpr = BLOCK_N if SWAP else BLOCK_M
    columns: tl.constexpr = BLOCK_M if SWAP else BLOCK_N
    program, steps = tl.program_id(0), k // BLOCK_K
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    begin = program * share
    end = tl.minimum(begin + share, tiles_m * tl.cdiv(n, BLOCK_N) * steps)
    if PREFETCH and begin < end:
        row = begin // steps // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
        start = begin % steps * BLOCK_K
        _prefetch(w_ptr, row, start, PLANES * n, k, PREFETCH)
        if GATED:
            _prefetch(w_ptr, row + n, start, PLANES * n, k, PREFETCH)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for tile in tl.range(begin // steps, tl.cdiv(end, steps), num_stages=1):
        row_m, row_n = tile % tiles_m * BLOCK_M, tile // tiles_m * BLOCK_N
        first = tl.maximum(begin - tile * steps, 0)
        last = tl.minimum(end - tile * steps, steps)
        acc, other, squares = _accumulate(
            x_source, w_source, norm_ptr, row_m, row_n, first, last, num_tokens, n, k, x_stride, GATED, BLOCK_M,
            BLOCK_N, BLOCK_K, SWAP, TMA,
        )  # fmt: skip
        if not STREAM or last - first == steps:
            _finish(
                acc, other, squares, bias_ptr, norm_ptr, out_ptr, row_m, row_n, num_tokens, n, k, eps, FORM, BLOCK_M,
                BLOCK_N, SWAP,
            )  # fmt: skip
        else:
            slot = program * 2 + (begin < tile * steps).to(tl.int32)
            inner = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
            pointers = partial_ptr + slot * (PLANES * TILE) + inner
            tl.store(pointers, acc)
            if GATED:
                tl.store(pointers + TILE, other)
            if norm_ptr is not None:
                tl.store(squares_ptr + slot * BLOCK_M + tl.arange(0, BLOCK_M), squares)
            tl.debug_barrier()  # the whole program's stores come before its arrival
            from_program = tile * steps // share
            to_program = (tile * steps + steps - 1) // share
            arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
            if arrived == to_program - from_program:
                tl.store(counters_ptr + tile, 0)
                total, total_up, total_squares = _gathered(
                    partial_ptr, squares_ptr, from_program, to_program, share, tile * steps, GATED,
                    norm_ptr is not None, BLOCK_M, rows, columns,
                )  # fmt: skip
                _finish(
                    total, total_up, total_squares, bias_ptr, norm_ptr, out_ptr, row_m, row_n, num_tokens, n,
                    k, eps, FORM, BLOCK_M, BLOCK_N, SWAP,
                )  # fmt: skip


@functools.cache
def _workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """partial, squares and counters of the kernel, for all calls on the device."""
    partial = torch.empty(WORKSPACE, dtype=torch.float32, device=device)
    squares = torch.empty(MAX_PROGRAMS * 2 * MAX_TOKENS, dtype=torch.float32, device=device)
    return partial, squares, torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def prepare(device: torch.device) -> None:
    """Get the workspace. To be called before the first capture of a CUDA graph, which must not own it."""
    _workspace(torch.empty(0, device=device).device)  # with its index, as tensors name it
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def _share(config: Config, planes: int, num_tiles: int, steps: int) -> tuple[int, int]:
    """→ steps of each program, how many programs."""
    if not config.programs:
        return steps, num_tiles
    room = WORKSPACE // (2 * planes * config.block_m * config.block_n)
    programs = min(config.programs, room, MAX_PROGRAMS, num_tiles * steps)
    share = triton.cdiv(num_tiles * steps, programs)
    return share, triton.cdiv(num_tiles * steps, share)


def _launch(
    form: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    config: Config | None,
) -> torch.Tensor:
    (m, k), n = x.shape, out.shape[1]
    planes = 2 if form == "gate_up" else 1
    assert weight.shape == (planes * n, k)
    assert weight.is_contiguous()
    assert out.is_contiguous()
    assert x.stride(1) == 1
    c = config or choose(m, n, k, planes == 2, norm is not None)
    assert k % c.block_k == 0
    steps, num_tiles = k // c.block_k, triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n)
    assert num_tiles <= MAX_TILES
    share, programs = _share(c, planes, num_tiles, steps)
    partial, squares, counters = _workspace(x.device)
    x_source = _descriptor(x, c.block_m, c.block_k) if c.tma else x
    w_source = _descriptor(weight, c.block_n, c.block_k) if c.tma else weight
    on_gpu = os.environ.get("TRITON_INTERPRET") != "1"
    options = {"launch_pdl": True, "maxnreg": c.max_registers} if on_gpu else {}
    _linear_kernel[(programs,)](
        x_source, w_source, weight, bias, norm, out, partial, squares, counters, m, n, k, x.stride(0), share,
        float(eps), form, c.block_m, c.block_n, c.block_k, c.swap, c.tma, c.programs > 0, PREFETCHED if on_gpu else 0,
        on_gpu, num_warps=c.num_warps, num_stages=c.num_stages, **options,
    )  # fmt: skip
    return out


def supports(x: torch.Tensor, weight: torch.Tensor, gated: bool = False) -> bool:
    """Whether x [m, k] times weight [n, k] can be computed here: 17 to 256 tokens in half precision on Hopper."""
    (m, k), n = x.shape, len(weight) // (2 if gated else 1)
    return (
        MIN_TOKENS <= m <= MAX_TOKENS
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and k % 256 == 0
        and n % 16 == 0
        and x.stride(1) == 1
        and x.stride(0) % 16 == 0
        and weight.is_contiguous()
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
        and x.device.type == "cuda"
        and _capability(x.device)[0] == 9
    )


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def choose(m: int, n: int, k: int, gated: bool = False, norm: bool = False) -> Config:
    """The configuration for m tokens, n outputs (gated: half of the weight's rows) and k inputs: as measured on an
    H200, else by the rules that follow from there."""
    for limit, config in MEASURED.get((n, k, norm), ()):
        if m <= limit:
            return config
    block_m = 32 if m <= 32 else 64 if m <= 64 else 128
    large = n * k * (2 if gated else 1) >= 1 << 24
    block_n = 64 if gated or not large else 128
    return Config(block_m, block_n, 64, 4, 4, 264)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    config: Config | None = None,
) -> torch.Tensor:
    """rms_norm(x) @ weight.T + bias, without norm where `norm`, its weight, is None.

    x: [m, k] with rows at any stride that is a multiple of 16; weight: [n, k] → [m, n].
    """
    out = x.new_empty(x.shape[0], weight.shape[0])
    return _launch("store", x, weight, bias, norm, eps, out, config)


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """residual += x @ weight.T + bias, in place, rounded once. residual: [m, n], contiguous → residual."""
    return _launch("add", x, weight, bias, None, 0.0, residual, config)


def gate_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    config: Config | None = None,
) -> torch.Tensor:
    """silu(gate) * up of rms_norm(x). x: [m, k]; weight: [2 * inner, k], gate's rows first → [m, inner]."""
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    return _launch("gate_up", x, weight, None, norm, eps, out, config)
