"""Linear layers of a few tokens with their neighbours fused, bound by the reading of the weights.

The kernels (csrc/src/skinny_gemm.cu) start before the kernel ahead of them ends and read their weights meanwhile, so
weights must not be written by work that is still in flight on the stream.
"""

import functools
from typing import Any

import torch

from minisgl.kernel.jit import load_kernel
from minisgl.kernel.ops import Around, Tensor

TOKEN_TILES = (8, 16, 32)
MAX_TOKENS = TOKEN_TILES[-1]
MAX_NORM_K = 8192  # the norm's weight lies in shared memory beside the weights in flight
SHARED = {(8, 0): 113, (9, 0): 113, (8, 6): 99, (8, 9): 99}  # KiB of shared memory that a block gets, by GPU


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Of a block, in KiB; 0 where the kernels do not run."""
    return SHARED.get(torch.cuda.get_device_capability(device), 0) if device.type == "cuda" else 0


def supports(
    m: int, n: int, k: int, dtype: torch.dtype, norm: bool = False, float8: bool = False, shared: int = 113
) -> bool:
    """Whether `m` tokens times a weight of `n` outputs and `k` inputs can be computed here. n: one half of gate and up.
    norm: with a norm weight. float8: e4m3. shared: KiB."""
    shape_fits = 0 <= m <= MAX_TOKENS and n > 0 and n % 8 == 0 and k > 0 and k % (64 if float8 else 32) == 0
    max_norm_k = MAX_NORM_K if shared == 113 and not (float8 and m > 16) else 5120
    return shape_fits and (not norm or k <= max_norm_k) and dtype in (torch.bfloat16, torch.float16)


def takes(x: Tensor, n: int, norm: bool, float8: bool = False) -> bool:
    """`supports`, on x's GPU."""
    shared = shared_memory(x.device)
    return shared > 0 and supports(len(x), n, x.shape[1], x.dtype, norm, float8, shared)


@functools.cache
def prepare(device: torch.device, dtype: torch.dtype, tokens: int, float8: bool = False) -> Any:
    """The kernels for `tokens` tokens, compiled on first use. device: with an index. float8: weights are e4m3."""
    tile, arch = next(tile for tile in TOKEN_TILES if tokens <= tile), torch.cuda.get_device_capability(device)
    defines = {"MINISGL_TOKENS": tile, "MINISGL_FP16": int(dtype == torch.float16), "MINISGL_SHARED": SHARED[arch]}
    return load_kernel("skinny_gemm", arch, **defines, MINISGL_FP8=int(float8))


def linear(x: Tensor, weight: Tensor, around: Around, scales: Tensor | None = None, variant: int = -1) -> Tensor:
    """x [m, k] with rows at any stride that is a multiple of 8, weight [n, k] -> [m, n], of gate and up [m, n / 2].

    scales: of e4m3 (as uint8), as `float8.Weight` has them. variant: -1: the kernel's choice.
    """
    out, module = around.target(x, len(weight), x.dtype), prepare(x.device, x.dtype, len(x), scales is not None)
    kind = around.residual is not None, around.gated, around.apart
    module.skinny_linear(x, around.norm, around.eps, weight, scales, around.bias, out, *kind, variant)
    return out
