"""Linear layers of a few tokens with their neighbours fused, bound by the reading of the weights.

The kernels (csrc/src/skinny_gemm.cu) start before the kernel ahead of them ends and read their weights meanwhile, so
weights must not be written by work that is still in flight on the stream.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from minisgl.kernel.jit import load_kernel

Tensor = torch.Tensor

TOKEN_TILES = (8, 16, 32)
MAX_TOKENS = TOKEN_TILES[-1]
VARIANTS = ((8, 1), (8, 2), (8, 4), (8, 6), (4, 6), (4, 8), (4, 16), (8, 8))  # warps, and octets of rows that they take at once
MAX_NORM_K = 8192  # the norm's weight lies in shared memory beside the weights in flight
SHARED = {(8, 0): 113, (9, 0): 113, (8, 6): 99, (8, 9): 99}  # KiB of shared memory that a block gets, by GPU


@functools.cache
def is_available(device: torch.device) -> bool:
    """Whether the kernels run on this GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in SHARED


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Of a block, in KiB."""
    return SHARED[torch.cuda.get_device_capability(device)]


def variants(tokens: int, gated: bool, float8: bool = False, shared: int = 113) -> list[int]:
    """The numbers of the kernel's variants, as in `dispatch` of the kernel file, of which two steps fit the memory."""
    tiles = next(tile for tile in TOKEN_TILES if tokens <= tile) // 8 * (2 if float8 else 1)
    steps = [(shared - 27) * 1024 // (warps * (octets + tiles) * 512) for warps, octets in VARIANTS]
    return [v for v in range(8) if steps[v] >= 2 and not (gated and v == 0) and not (tokens > 16 and v in (3, 7))]


def supports(
    m: int, n: int, k: int, dtype: torch.dtype, norm: bool = False, float8: bool = False, shared: int = 113
) -> bool:
    """Whether `m` tokens times a weight of `n` outputs and `k` inputs can be computed here.

    n: for `norm_gate_up` the outputs, half of the weight's rows. norm: with a norm weight. float8: e4m3. shared: KiB.
    """
    shape_fits = 0 <= m <= MAX_TOKENS and n > 0 and n % 8 == 0 and k > 0 and k % (64 if float8 else 32) == 0
    max_norm_k = MAX_NORM_K if shared == 113 and not (float8 and m > 16) else 5120
    return shape_fits and (not norm or k <= max_norm_k) and dtype in (torch.bfloat16, torch.float16)


def choose_variant(
    tokens: int, n: int, k: int, gated: bool, num_sms: int, float8: bool = False, shared: int = 113
) -> int:
    """The variant for a shape: as many rows at once as a CTA has, up to where shared memory holds too few steps."""
    chosen = _preferred(tokens, k, -(-(n // 8) // num_sms) * (2 if gated else 1), gated)
    return chosen if chosen in variants(tokens, gated, float8, shared) else 5 if chosen == 6 else 4


def _preferred(tokens: int, k: int, octets: int, gated: bool) -> int:
    """octets: of rows that a CTA has."""
    for variant, limit in ((0, 1), (1, 2), (2, 4)):
        if octets <= limit and not (gated and variant == 0):
            return variant
    if octets <= 6:
        return 3 if k <= 4096 and tokens <= 16 else 4
    if octets <= 8 or tokens <= 8:
        return 5
    return 6


@functools.cache
def prepare(device: torch.device, dtype: torch.dtype, tokens: int, float8: bool = False) -> Any:
    """The kernels for `tokens` tokens, compiled on first use. device: with an index. float8: weights are e4m3."""
    tile, arch = next(tile for tile in TOKEN_TILES if tokens <= tile), torch.cuda.get_device_capability(device)
    defines = {"MINISGL_TOKENS": tile, "MINISGL_FP16": int(dtype == torch.float16), "MINISGL_SHARED": SHARED[arch]}
    return load_kernel("skinny_gemm", arch, **defines, MINISGL_FP8=int(float8))


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _prepare(x: Tensor, n: int, gated: bool, variant: int | None, scales: Tensor | None) -> tuple[Any, int]:
    (tokens, k), kind = x.shape, (scales is not None, shared_memory(x.device))
    chosen = choose_variant(tokens, n, k, gated, _num_sms(x.device), *kind) if variant is None else variant
    return prepare(x.device, x.dtype, tokens, kind[0]), chosen


def norm_linear(
    x: Tensor, norm: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None = None,
    variant: int | None = None, scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """linear(rms_norm(x)): x [m, k] with rows at any stride that is a multiple of 8, weight [n, k] -> [m, n].

    norm: the norm's weight; None: there is no norm. scales: of e4m3 (as uint8), as `float8.Weight` has them.
    """
    module, variant = _prepare(x, len(weight), False, variant, scales)
    out = x.new_empty(x.shape[0], len(weight))
    module.norm_linear(x, norm, eps, weight, scales, bias, out, variant)
    return out


def norm_gate_up(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, variant: int | None = None, scales: Tensor | None = None
) -> Tensor:
    """silu(gate) * up of [gate, up] = linear(rms_norm(x)): x [m, k], weight [2 * inner, k], gate rows first ->
    [m, inner]."""
    inner = len(weight) // 2
    module, variant = _prepare(x, inner, True, variant, scales)
    out = x.new_empty(x.shape[0], inner)
    module.norm_gate_up(x, norm, eps, weight, scales, out, variant)
    return out


def linear_add(
    x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None, variant: int | None = None,
    scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual [m, n] += linear(x), in place, rounded once; it is contiguous. x [m, k], weight [n, k]."""
    module, variant = _prepare(x, len(weight), False, variant, scales)
    module.linear_add(x, weight, scales, bias, residual, variant)
    return residual
