"""Products with e4m3 weights on GPUs.

A few tokens are multiplied as they are, with weights that become the tokens' type in registers: reading them is what
takes time. Of more tokens a Hopper GPU takes e4m3 too, with a scale of each token, or of each token and 128 features:
our kernel of a batch, the library of more. Elsewhere weights are widened for each product of many tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minisgl.kernel import decode_gemm, skinny
from minisgl.kernel.decode_gemm import Variant
from minisgl.kernel.jit import load_kernel
from minisgl.kernel.ops import LayerOps
from minisgl.kernel.packed import Float8
from minisgl.kernel.product import Around, FusedMatrix
from minisgl.utils.math import div_ceil

Tensor = torch.Tensor

GROUP = 128  # columns that share a scale, where rows have several
TOKEN_TILES = {False: (32, 64, 128, 256), True: (32, 64)}  # by whether rows have several scales
WAVES = -1  # a split: blocks take whole tiles, one after the other
SKINNY_TOKENS, SKINNY_WEIGHTS = 1, 48 << 20  # where more are multiplied as e4m3
# The library multiplies more of them faster. With one scale of a row, the pass that it takes to add to a residual, or
# for gate and up, makes the second of these limits.
MAX_TOKENS, MAX_FUSED_TOKENS = 64, 128
MAX_FEATURES = 32768  # of the kernel that quantises tokens


class Weight(NamedTuple):
    """data: [out, in], e4m3 as uint8; scales: [out] float32, or [out / 8, in / 128 rounded up]."""

    data: Tensor
    scales: Tensor

    @property
    def has_groups(self) -> bool:
        return self.scales.dim() == 2

    def widen(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """The values of some rows, or of all: [rows, in]."""
        data, scales = self.data, self.scales
        if rows is not None:
            data, scales = data.index_select(0, rows), scales.index_select(0, rows // 8 if self.has_groups else rows)
        elif self.has_groups:
            scales = scales.repeat_interleave(8, 0)
        scales = scales.repeat_interleave(GROUP, 1)[:, : data.shape[1]] if self.has_groups else scales[:, None]
        return (data.view(torch.float8_e4m3fn).to(dtype) * scales).to(dtype)


def merge(parts: Sequence[Float8]) -> Weight | None:
    """The parts as one weight; None where the kernels do not take their shapes."""
    columns, num_in = {part.scales.shape[1] for part in parts}, parts[0].shape[1]
    if len(columns) > 1 or num_in % 16 or any(part.shape[0] % 16 for part in parts):
        return None
    scales = torch.cat([part.row_scales() for part in parts])
    scales = scales[:, 0] if scales.shape[1] == 1 else scales[::8]
    data = [part.data.view(torch.uint8) for part in parts]
    return Weight(data[0].contiguous() if len(data) == 1 else torch.cat(data), scales.contiguous())


class Tokens(NamedTuple):
    """data: [n, in], e4m3 as uint8; scales: [n] float32, or [in / 128 rounded up, n]. What is behind the first `num`
    tokens is not set: it makes n a multiple of 64 where they have several scales."""

    data: Tensor
    scales: Tensor
    num: int


def choose(m: int, n: int, k: int, gated: bool, groups: bool) -> tuple[int, Variant]:
    """Tokens of a tile, and how the work is shared out. n: of gate_up one half. Measured on an H200, 132 processors."""
    tile = next((tile for tile in TOKEN_TILES[groups] if m <= tile), TOKEN_TILES[groups][-1])
    rows = 128 if tile > 128 else 192
    blocks = div_ceil(2 * n if gated else n, rows) * div_ceil(m, tile)
    if blocks > 512:
        return tile, Variant(rows, WAVES)
    split = (s for s in (1, 2, 3, 4, 6, 8) if 100 <= blocks * s <= 132 and s <= k // 256)
    return tile, Variant(rows, next(split, 0))


@functools.cache
def library_takes_blocks(device: torch.device) -> bool:
    """Whether torch multiplies e4m3 with scales of 128 x 128: cuBLAS does since 12.9, on Hopper."""
    data = torch.zeros(128, 512, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.ones(4, 128, device=device).t(), torch.ones(1, 4, device=device).t()
    try:
        torch._scaled_mm(data, data.t(), *scales, out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@functools.cache
def compile_kernels(device: torch.device, dtype: torch.dtype, groups: bool) -> None:
    """All that products with such weights may need, side by side."""
    tasks = [functools.partial(skinny.prepare, device, dtype, tokens, True) for tokens in skinny.TOKEN_TILES]
    if decode_gemm.is_available(device):
        tasks += [functools.partial(decode_gemm.prepare, device, dtype, t, 1 + groups) for t in TOKEN_TILES[groups]]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda task: task(), tasks))


class Float8Matrix(FusedMatrix):
    """input_scale: of activations; None: tokens have their own. Raises: ConfigError where kernels do not compile."""

    def __init__(
        self, ops: LayerOps, weight: Weight, dtype: torch.dtype, input_scale: float | None, activation: str | None
    ) -> None:
        super().__init__(ops, activation)
        self.weight, self._dtype, self._input_scale = weight, dtype, input_scale or 0.0
        device = weight.data.device
        self._on_hopper = decode_gemm.is_available(device) and weight.data.shape[1] <= MAX_FEATURES
        self._few = skinny.MAX_TOKENS
        if self._on_hopper:
            self._few = SKINNY_TOKENS if weight.data.numel() <= SKINNY_WEIGHTS and not weight.has_groups else 0
        compile_kernels(device, dtype, weight.has_groups)
        self._quantize = load_kernel("quantize", torch.cuda.get_device_capability(device)).quantize
        self._library_scales = self._scales_of_library() if dtype == torch.bfloat16 and self._on_hopper else None

    def _scales_of_library(self) -> Tensor | None:
        """[1, out] or [in / 128, out / 128]; None: it does not take such."""
        data, scales = self.weight
        if not self.weight.has_groups:
            return scales[None]
        if len(scales) % 16 or scales.shape[1] % 4 or data.shape[1] % GROUP or not library_takes_blocks(data.device):
            return None
        blocks = scales.unflatten(0, (-1, 16))
        return blocks[:, 0].contiguous().t() if bool((blocks == blocks[:, :1]).all()) else None

    def quantize(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Tokens:
        """x, or its norm where there is a weight."""
        m, k = x.shape
        rows = div_ceil(m, 64) * 64 if self.weight.has_groups else m
        shape = (div_ceil(k, GROUP), rows) if self.weight.has_groups else (m,)
        scales = torch.empty(shape, dtype=torch.float32, device=x.device)
        out = torch.empty(rows, k, dtype=torch.uint8, device=x.device)
        self._quantize(x, norm, eps, self._input_scale, out[:m], scales)
        return Tokens(out, scales, m)

    def product(self, x: Tokens, around: Around, how: tuple[int, Variant] | None = None) -> Tensor:
        """how: see `choose`."""
        is_fused = around.gated or around.residual is not None
        most = MAX_FUSED_TOKENS if is_fused and not self.weight.has_groups else MAX_TOKENS
        if how is None and x.num > most and self._library_scales is not None:
            return self.library_product(x, around, self._library_scales)
        data, kind = x.data[: x.num], self.weight.has_groups
        out = around.target(data, len(self.weight.data), self._dtype)
        tile, variant = how or choose(x.num, out.shape[1], data.shape[1], around.gated, kind)
        module = decode_gemm.prepare(data.device, self._dtype, tile, 1 + kind)
        decode_gemm.run(module, data, self.weight.data, around, out, variant, self.weight.scales, x.scales)
        return out

    def library_product(self, x: Tokens, around: Around, weight_scales: Tensor) -> Tensor:
        data, weight = (part.view(torch.float8_e4m3fn) for part in (x.data, self.weight.data.t()))
        token_scales, is_fast = (x.scales.t(), False) if self.weight.has_groups else (x.scales[:, None], True)
        scales = token_scales, weight_scales
        out = torch._scaled_mm(data, weight, *scales, out_dtype=torch.bfloat16, use_fast_accum=is_fast)[: x.num]
        out = out if around.bias is None else out.add_(around.bias)
        if around.gated:
            return self._ops.act_and_mul(out)
        return out if around.residual is None else around.residual.add_(out)

    def fused(self, x: Tensor, around: Around) -> Tensor | None:
        (m, k), n = x.shape, around.num_out(len(self.weight.data))
        if m <= self._few and skinny.is_available(x.device):
            fits = (x.dtype, around.norm is not None, True, skinny.shared_memory(x.device))
            if skinny.supports(m, n, k, *fits):
                return skinny.linear(x, self.weight.data, around, self.weight.scales)
        if not self._on_hopper or n % 16:
            return None
        return self.product(self.quantize(x, around.norm, around.eps), around)

    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight.widen(x.dtype), bias)

    def rows(self, ids: Tensor, first: int = 0) -> Tensor:
        local = ids - first
        here = (local >= 0) & (local < len(self.weight.data))
        return self.weight.widen(self._dtype, local.where(here, 0)).masked_fill_(~here[:, None], 0)
