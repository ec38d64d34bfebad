"""Products with e4m3 weights on GPUs.

A few tokens are multiplied as they are, with weights that become the tokens' type in registers: reading them is what
takes time. Of more tokens a Hopper GPU takes e4m3 too, with a scale of each token, or of each token and 128 features.
Elsewhere weights are widened for each product of many tokens.
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
TOKEN_TILES = {False: (32, 64, 128, 256), True: (32, 64, 128)}  # by whether rows have several scales
WAVES = -1  # a split: blocks take whole tiles, one after the other
SKINNY_TOKENS, SKINNY_WEIGHTS = 8, 32 << 20  # where more are multiplied as e4m3
# Where rows have one scale, the library's product of more is faster; for gate and up it takes one more pass.
MAX_TOKENS, MAX_GATED_TOKENS = 64, 256
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


def choose(m: int, n: int, k: int, gated: bool, groups: bool) -> tuple[int, Variant]:
    """Tokens of a tile, and how the work is shared out. n: of gate_up one half."""
    tile = next((tile for tile in TOKEN_TILES[groups] if m <= tile), TOKEN_TILES[groups][-1])
    if m <= MAX_TOKENS:  # half the bytes: what is best of 16 bits for fewer tokens is so here for twice as many
        return tile, decode_gemm.choose(min(m, 32), n, k, gated) or Variant(128, 0)
    return tile, Variant(128, WAVES if div_ceil(m, tile) * div_ceil(n, 128) > 512 else 0)


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
            self._few = SKINNY_TOKENS if weight.data.numel() <= SKINNY_WEIGHTS else 0
        compile_kernels(device, dtype, weight.has_groups)
        self._quantize = load_kernel("quantize", torch.cuda.get_device_capability(device)).quantize

    def quantize(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor]:
        """x, or its norm where there is a weight → e4m3 as uint8, and scales: [m], or [k / 128, m rounded up]."""
        m, k = x.shape
        shape = (div_ceil(k, GROUP), div_ceil(m, 128) * 128) if self.weight.has_groups else (m,)
        scales = torch.empty(shape, dtype=torch.float32, device=x.device)
        out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        self._quantize(x, norm, eps, self._input_scale, out, scales)
        return out, scales

    def product(self, x: tuple[Tensor, Tensor], around: Around, how: tuple[int, Variant] | None = None) -> Tensor:
        """x: of `quantize`. how: see `choose`."""
        (data, scales), (m, k), has_groups = x, x[0].shape, self.weight.has_groups
        is_plain = how is None and not has_groups and self._dtype == torch.bfloat16
        if is_plain and m > (MAX_GATED_TOKENS if around.gated else MAX_TOKENS):
            return self.library_product(x, around)
        out = around.target(data, len(self.weight.data), self._dtype)
        tile, variant = how or choose(m, out.shape[1], k, around.gated, has_groups)
        module = decode_gemm.prepare(data.device, self._dtype, tile, 1 + has_groups)
        decode_gemm.run(module, data, self.weight.data, around, out, variant, self.weight.scales, scales)
        return out

    def library_product(self, x: tuple[Tensor, Tensor], around: Around) -> Tensor:
        data, weight = (part.view(torch.float8_e4m3fn) for part in (x[0], self.weight.data))
        scales = x[1][:, None], self.weight.scales[None]
        out = torch._scaled_mm(data, weight.t(), *scales, around.bias, out_dtype=torch.bfloat16, use_fast_accum=True)
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
