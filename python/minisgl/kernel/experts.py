"""Experts in MXFP4 on GPUs, as the tensor cores want them (csrc/include/minisgl/experts.cuh)."""

from functools import partial
from typing import Any

import torch

from minisgl.kernel.jit import load_kernel, side_by_side
from minisgl.utils.math import div_ceil

# Pairs of one expert that are multiplied together, by how many of them it gets on average at most.
BLOCKS = {0.5: 4, 5: 8, 12: 16, 24: 32, float("inf"): 64}
HOPPER = {0.5: 4, 4: 8, 48: 64, float("inf"): 128}  # from 64 on its tensor cores take them


def load(dtype: torch.dtype, arch: tuple[int, int], block_m: int = 0) -> Any:
    """The module for blocks of so many pairs."""
    kind: dict[str, int] = {"MINISGL_TOKENS": block_m} if arch == (9, 0) and block_m >= 64 else {}
    return load_kernel("experts_wide" if kind else "experts", arch, MINISGL_FP16=int(dtype == torch.float16), **kind)


def block_of(num_pairs: int, num_experts: int, arch: tuple[int, int]) -> int:
    sizes = HOPPER if arch == (9, 0) else BLOCKS
    return next(size for average, size in sizes.items() if num_pairs <= num_experts * average)


def takes(gate_up: Any, down: Any, num_pairs: int, top_k: int) -> bool:
    """Whether the module's `mixture` computes it: two `grouped_gemm.Stack`, and hardly two pairs of one expert."""
    num_experts, inner = len(gate_up.data), gate_up.data.shape[1] // 2
    fits = gate_up.unit > 0 and down.unit > 0 and num_experts <= 256 and top_k * inner <= 1 << 14
    return fits and (num_pairs == top_k or 8 * num_pairs <= num_experts)


def pack(blocks: torch.Tensor, dtype: torch.dtype, gated: bool, arch: tuple[int, int]) -> tuple[torch.Tensor, float]:
    """blocks: [experts, rows, bytes] of `packed.Blocks`, of `gated` ones gate's rows first → the same of uint8 as the
    kernels read them, and the factor of all weights that has no room there. Compiles what multiplies with it."""
    side_by_side(partial(load, dtype, arch, block_m) for block_m in ((0, 64, 128) if arch == (9, 0) else (0,)))
    shift = max(0, int(blocks[..., ::17].max()) - 128)
    out = blocks.new_empty(*blocks.shape[:2], div_ceil(blocks.shape[2] // 17, 4) * 68)
    for matrix, to in zip(blocks, out, strict=True):
        load(dtype, arch).pack(matrix, to, gated, (126 if dtype == torch.bfloat16 else -98) - shift)
    return out, 2.0**shift
