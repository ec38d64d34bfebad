"""Linear layers of a decode batch (up to 256 tokens) on Hopper's tensor cores, with their neighbours fused.

The kernels (csrc/include/minisgl/decode_gemm.cuh) start before the kernel ahead of them ends and read their weights
meanwhile, so weights must not be written by work that is still in flight on the stream. Launches share a workspace: use
one stream of a device at a time.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from minisgl.kernel.jit import load_kernel

MAX_TOKENS = 256
TOKEN_TILES = (32, 64, 128, 192, 256)
MAX_SPLIT = 8


class Variant(NamedTuple):
    """How a product is shared out among thread blocks."""

    rows: int
    """Of weights in a tile: 64, 128, 192 or 256."""
    split: int
    """Blocks that share a tile's inputs; 0: every block has the same amount of consecutive work (stream-K)."""
    per_sm: int = 1
    """Blocks on an SM at a time: 2 halve each one's shared memory."""


def is_available(device: torch.device) -> bool:
    """Whether the kernels run on this GPU (Hopper)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def supports(m: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether `m` tokens times a weight of `n` outputs and `k` inputs can be computed here; n of gate_up: one half."""
    shape_fits = 0 <= m <= MAX_TOKENS and n > 0 and n % 16 == 0 and k > 0 and k % 64 == 0
    return shape_fits and n < 1 << 20 and k < 1 << 20 and dtype in (torch.bfloat16, torch.float16)


def token_tile(m: int) -> int:
    """Tokens of the kernel that computes `m` of them."""
    return next(tile for tile in TOKEN_TILES if m <= tile)


def fits(variant: Variant, m: int, k: int) -> bool:
    """Whether a variant exists for `m` tokens and `k` inputs: registers and shared memory limit it."""
    tile = token_tile(m)
    if (variant.rows == 192 and tile > 192) or (variant.rows == 256 and tile > 128):
        return False
    if variant.per_sm == 2 and (variant.rows > 128 or (variant.rows == 128 and tile > 128)):
        return False
    stage = 128 * (variant.rows + tile)
    stages = ((227 if variant.per_sm == 1 else 113) * 1024 - 1408 - 1280 * variant.rows // 16) // stage
    sums = 4 * variant.rows * tile if variant.split > 1 else 0
    return stages >= 2 and min(stages, 24) * stage >= sums and variant.split <= min(MAX_SPLIT, k // 64)


def choose(m: int, n: int, k: int, gated: bool, num_sms: int) -> Variant:
    """The variant for `m` tokens, `n` outputs (of gate_up: one half) and `k` inputs.

    Many tiles: equal shares, with tall tiles, which read the tokens less often. Few: a cluster for each tile, as many
    blocks as there are SMs or a little fewer.
    """
    rows = 2 * n if gated else n
    for tall in (256, 128):
        if -(-rows // tall) >= num_sms and fits(Variant(tall, 0), m, k):
            return Variant(tall, 0)
    best, best_blocks = Variant(64, 1), 0
    for tall in (128, 64):
        tiles = -(-rows // tall)
        split = max(1, min(MAX_SPLIT, num_sms // tiles, k // 64))
        variant = Variant(tall, split)
        if fits(variant, m, k) and tiles * split > best_blocks:
            best, best_blocks = variant, tiles * split
        if best_blocks >= 0.8 * num_sms:
            break
    return best


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums that blocks leave for others, and their flags (zero between launches)."""
    blocks = 2 * _num_sms(device)
    partials = torch.empty(blocks * 256 * 128, dtype=torch.float32, device=device)
    flags = torch.zeros(blocks, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)
    return partials, flags


@functools.cache
def _module(device: torch.device, dtype: torch.dtype, tile: int) -> Any:
    _workspace(device)
    defines: dict[str, int | str] = {"MINISGL_TOKENS": tile}
    if dtype == torch.float16:
        defines["MINISGL_FP16"] = 1
    return load_kernel("decode_gemm", torch.cuda.get_device_capability(device), defines)


def prepare(device: torch.device, dtype: torch.dtype, tokens: int) -> Any:
    """The compiled kernels for `tokens` tokens. The first call of a device and tile must not be inside a graph capture.

    device: with an index.
    """
    return _module(device, dtype, token_tile(tokens))


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    add: bool,
    gated: bool,
    variant: Variant | None,
) -> torch.Tensor:
    m, k = x.shape
    if m == 0:
        return out
    module = prepare(x.device, x.dtype, m)
    variant = variant or choose(m, out.shape[1], k, gated, _num_sms(x.device))
    module.decode_linear(x, weight, bias, out, *_workspace(x.device), add, gated, *variant)
    return out


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, variant: Variant | None = None
) -> torch.Tensor:
    """x [m, k] with rows at any stride that is a multiple of 8, weight [n, k], bias [n] -> [m, n]."""
    return _run(x, weight, bias, x.new_empty(x.shape[0], weight.shape[0]), False, False, variant)


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
    variant: Variant | None = None,
) -> torch.Tensor:
    """residual += linear(x), in place, rounded once: residual [m, n] contiguous -> residual."""
    return _run(x, weight, bias, residual, True, False, variant)


def gate_up(x: torch.Tensor, weight: torch.Tensor, variant: Variant | None = None) -> torch.Tensor:
    """silu(gate) * up of [gate, up] = linear(x): x [m, k], weight [2 * inner, k], gate rows first -> [m, inner]."""
    return _run(x, weight, None, x.new_empty(x.shape[0], weight.shape[0] // 2), False, True, variant)
