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
MAX_NORM_K = 8192  # the norm's weight lies in shared memory beside the weights in flight


@functools.cache
def is_available(device: torch.device) -> bool:
    """Whether the kernels run on this GPU: it has 113 KiB of shared memory for a block (A100, Hopper)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ((8, 0), (9, 0))


def variants(tokens: int, gated: bool) -> list[int]:
    """The numbers of the kernel's variants, as in `dispatch` of the kernel file."""
    return [v for v in range(7) if not (gated and v == 0) and not (tokens > 16 and v == 3)]


def supports(m: int, n: int, k: int, dtype: torch.dtype, norm: bool = False) -> bool:
    """Whether `m` tokens times a weight of `n` outputs and `k` inputs can be computed here.

    n: for `norm_gate_up` the outputs, half of the weight's rows. norm: with a norm weight.
    """
    shape_fits = 0 <= m <= MAX_TOKENS and n > 0 and n % 8 == 0 and k > 0 and k % 32 == 0
    return shape_fits and (not norm or k <= MAX_NORM_K) and dtype in (torch.bfloat16, torch.float16)


def choose_variant(tokens: int, n: int, k: int, gated: bool, num_sms: int) -> int:
    """The variant for a shape: as many rows at once as a CTA has, up to where shared memory holds too few steps."""
    octets = -(-(n // 8) // num_sms) * (2 if gated else 1)
    for variant, limit in ((0, 1), (1, 2), (2, 4)):
        if octets <= limit and not (gated and variant == 0):
            return variant
    if octets <= 6:
        return 3 if k <= 4096 and tokens <= 16 else 4
    if octets <= 8 or tokens <= 8:
        return 5
    return 6


@functools.cache
def prepare(device: torch.device, dtype: torch.dtype, tokens: int) -> Any:
    """The kernels for `tokens` tokens, compiled on first use. device: with an index."""
    tile, arch = next(tile for tile in TOKEN_TILES if tokens <= tile), torch.cuda.get_device_capability(device)
    return load_kernel("skinny_gemm", arch, MINISGL_TOKENS=tile, MINISGL_FP16=int(dtype == torch.float16))


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _prepare(x: Tensor, n: int, gated: bool, variant: int | None) -> tuple[Any, int]:
    tokens, k = x.shape
    chosen = choose_variant(tokens, n, k, gated, _num_sms(x.device)) if variant is None else variant
    return prepare(x.device, x.dtype, tokens), chosen


def norm_linear(
    x: Tensor, norm: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None = None, variant: int | None = None
) -> Tensor:
    """linear(rms_norm(x)): x [m, k] with rows at any stride that is a multiple of 8, weight [n, k] -> [m, n].

    norm: the norm's weight; None: there is no norm.
    """
    module, variant = _prepare(x, len(weight), False, variant)
    out = x.new_empty(x.shape[0], len(weight))
    module.norm_linear(x, norm, eps, weight, bias, out, variant)
    return out


def norm_gate_up(x: Tensor, norm: Tensor, eps: float, weight: Tensor, variant: int | None = None) -> Tensor:
    """silu(gate) * up of [gate, up] = linear(rms_norm(x)): x [m, k], weight [2 * inner, k], gate rows first ->
    [m, inner]."""
    inner = len(weight) // 2
    module, variant = _prepare(x, inner, True, variant)
    out = x.new_empty(x.shape[0], inner)
    module.norm_gate_up(x, norm, eps, weight, out, variant)
    return out


def linear_add(
    x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None, variant: int | None = None
) -> Tensor:
    """residual [m, n] += linear(x), in place, rounded once; it is contiguous. x [m, k], weight [n, k]."""
    module, variant = _prepare(x, len(weight), False, variant)
    module.linear_add(x, weight, bias, residual, variant)
    return residual
