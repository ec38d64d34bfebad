"""Linear layers of a decode batch (up to 256 tokens) on Hopper's tensor cores, with their neighbours fused.

The kernels (csrc/include/minisgl/decode_gemm.cuh) start before the kernel ahead of them ends and read their weights
meanwhile, so weights must not be written by work that is still in flight on the stream. Launches share a workspace: use
one stream of a device at a time, and let the first launch be outside of a graph capture.
"""

import functools
from typing import Any, NamedTuple

import torch

from minisgl.kernel.jit import load_kernel
from minisgl.kernel.ops import Around, Tensor

MAX_TOKENS = 256
TOKEN_TILES = (32, 64, 128, 160, 192, 256)
SMALL_WEIGHTS = 33 << 18  # elements: 8 Mi, and some rows more, as of a delta net's gates


class Variant(NamedTuple):
    """How a product is shared out among thread blocks."""

    rows: int  # of weights in a tile: 64, 128 or 192
    split: int  # blocks that share a tile's inputs; 0: each has the same amount of consecutive work (stream-K)


@functools.cache
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


def choose(m: int, n: int, k: int, gated: bool, adds_both: bool = False) -> Variant | None:
    """The fastest variant for `m` tokens, `n` outputs (of gate_up: one half) and `k` inputs; None: cuBLAS is faster.

    adds_both: a bias and a residual stream, for which cuBLAS needs two kernels. Measured: docs/performance-log.md.
    """
    if (2 * n if gated else n) * k <= SMALL_WEIGHTS:  # what counts is that many blocks share the little there is
        if gated:
            return Variant(64, 1)
        tiles, steps = -(-n // 64), k // 64
        split = max((s for s in (1, 2, 3, 4, 6, 8) if tiles * s <= 96 and s * 8 <= steps), default=1)
        return Variant(64, split) if m <= 64 else None
    if m > 192:
        return None
    if gated:
        return Variant(128, 0)
    if n >= 1 << 15:  # a head
        return Variant(192, 0) if m <= 64 else None
    if k > 2 * n:
        return Variant(192, 4)
    if m <= 32:
        return Variant(192, 4) if n <= k else Variant(128, 2)
    return Variant(128, 4) if adds_both and m <= 160 and n < k and n * k <= 2 * SMALL_WEIGHTS else None


@functools.cache
def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums that blocks leave for others, and their flags (zero between launches)."""
    blocks = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    partials = torch.empty(blocks * 256 * 128, dtype=torch.float32, device=device)
    flags = torch.zeros(blocks, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)
    return partials, flags


@functools.cache
def prepare(device: torch.device, dtype: torch.dtype, tile: int, kind: int = 0) -> Any:
    """The kernels for tiles of so many tokens, compiled on first use. device: with an index. kind: of operands, as in
    the kernel file."""
    arch, half = torch.cuda.get_device_capability(device), int(dtype == torch.float16)
    return load_kernel("decode_gemm", arch, MINISGL_TOKENS=tile, MINISGL_FP16=half, MINISGL_FP8=kind)


def linear(x: Tensor, weight: Tensor, around: Around, variant: Variant | None = None) -> Tensor:
    """x [m, k] with rows at any stride that is a multiple of 8, weight [n, k] -> [m, n], of gate and up [m, n / 2]."""
    out = around.target(x, len(weight), x.dtype)
    (m, k), n = x.shape, out.shape[1]
    if m > 0:
        variant = variant or choose(m, n, k, around.gated) or Variant(128 if m <= 128 else 64, 1)
        run(prepare(x.device, x.dtype, token_tile(m)), x, weight, around, out, variant)
    return out


def run(
    module: Any, x: Tensor, weight: Tensor, around: Around, out: Tensor, variant: Variant,
    row_scales: Tensor | None = None, token_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """module: of `prepare`. The norm is done already."""
    places, kind = (around.bias, out, *workspace(x.device)), (around.residual is not None, around.gated)
    module.decode_linear(x, weight, *places, row_scales, token_scales, *kind, *variant)
