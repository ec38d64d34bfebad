"""Products with e4m3 weights on GPUs.

Hopper multiplies them with tokens in e4m3 too, with a scale of each token, or of each token and 128 features: up to a
batch our kernel does, of more the library's. Elsewhere a few tokens are multiplied as they are, with weights that
become the tokens' type in registers: reading them is what takes time. For more, weights are widened each time.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minisgl.kernel import decode_gemm, skinny
from minisgl.kernel.decode_gemm import Variant
from minisgl.kernel.jit import load_kernel, side_by_side
from minisgl.kernel.ops import Around, LayerOps, Matrix, Tensor
from minisgl.kernel.packed import Float8
from minisgl.kernel.packed_gemm import ONE_TOKEN_K, one_token
from minisgl.utils.math import div_ceil

GROUP, ROWS = 128, 8  # columns and rows that share a scale, where rows have several
TOKEN_TILES = {False: (32, 64, 128, 256), True: (32, 64)}  # by whether rows have several scales
WAVES = -1  # a split: blocks take whole tiles, one after the other
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
        data = self.data if rows is None else self.data[rows]
        index = torch.arange(len(data), device=data.device) if rows is None else rows
        scales = self.scales[index // ROWS].repeat_interleave(GROUP, 1) if self.has_groups else self.scales[index, None]
        return (data.view(torch.float8_e4m3fn).to(dtype) * scales[:, : data.shape[1]]).to(dtype)


def merge(parts: Sequence[Float8]) -> Weight | None:
    """The parts as one weight; None where the kernels do not take their shapes."""
    columns, num_in = {part.scales.shape[1] for part in parts}, parts[0].shape[1]
    if len(columns) > 1 or num_in % 16 or any(part.shape[0] % 16 for part in parts):
        return None
    scales = torch.cat([part.row_scales() for part in parts])
    scales = scales[:, 0] if scales.shape[1] == 1 else scales[::ROWS]
    data = [part.data.view(torch.uint8) for part in parts]
    return Weight(data[0].contiguous() if len(data) == 1 else torch.cat(data), scales.contiguous())


def choose(m: int, n: int, k: int, gated: bool, groups: bool) -> tuple[int, Variant]:
    """Tokens of a tile, and how the work is shared out. n: of gate_up one half. Measured on an H200, 132 processors."""
    tile = next((tile for tile in TOKEN_TILES[groups] if m <= tile), TOKEN_TILES[groups][-1])
    rows = 128 if tile > 128 else 192
    blocks = div_ceil(2 * n if gated else n, rows) * div_ceil(m, tile)
    if blocks > 512:
        return tile, Variant(rows, WAVES)
    split = (s for s in (1, 2, 3, 4, 6, 8) if 100 <= blocks * s <= 132 and s <= k // 256)
    return tile, Variant(rows, next(split, 0))


class Float8Matrix(Matrix):
    """input_scale: of activations; None: tokens have their own. Raises: ConfigError where kernels do not compile."""

    def __init__(
        self, ops: LayerOps, weight: Weight, dtype: torch.dtype, input_scale: float | None, activation: str | None
    ) -> None:
        super().__init__(ops, len(weight.data), activation)
        self.weight, self._dtype, self._input_scale = weight, dtype, input_scale or 0.0
        device = weight.data.device
        self._on_hopper = decode_gemm.is_available(device) and weight.data.shape[1] <= MAX_FEATURES
        tasks = [partial(skinny.prepare, device, dtype, tile, True) for tile in skinny.TOKEN_TILES]
        defines = {"MINISGL_FP16": int(dtype == torch.float16), "MINISGL_FP8": 1, "MINISGL_SHARED": 113}
        self._one_token = partial(load_kernel, "one_token", (9, 0), **defines)
        if self._on_hopper:
            prepare = partial(decode_gemm.prepare, device, dtype, kind=1 + weight.has_groups)
            tasks = [self._one_token, *(partial(prepare, tile) for tile in TOKEN_TILES[weight.has_groups])]
        side_by_side(tasks)
        self._quantize = load_kernel("quantize", torch.cuda.get_device_capability(device)).quantize
        self._library_scales = self._find_library_scales() if dtype == torch.bfloat16 and self._on_hopper else None

    def _find_library_scales(self) -> Tensor | None:
        """The weight's, as torch takes them: [1, out], or with cuBLAS 12.9 [in / 128, out / 128]. None: it does not."""
        (data, scales), (_, k) = self.weight, self.weight.data.shape
        if not self.weight.has_groups:
            return scales[None]
        if len(scales) % (GROUP // ROWS) or k % (4 * GROUP):
            return None
        blocks = scales.unflatten(0, (-1, GROUP // ROWS))
        found = blocks[:, 0].contiguous().t()
        try:
            self.library_product(self.quantize(data.new_zeros(64, k, dtype=self._dtype)), Around(), found)
        except (RuntimeError, ValueError):
            return None
        return found if bool((blocks == blocks[:, :1]).all()) else None

    def quantize(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor]:
        """x, or its norm where there is a weight → e4m3 as uint8, and scales: [m], or [k / 128, m rounded up to 64],
        with memory for as many tokens."""
        (m, k), has_groups = x.shape, self.weight.has_groups
        rows = div_ceil(m, 64) * 64 if has_groups else m
        scales = torch.empty((div_ceil(k, GROUP), rows) if has_groups else (m,), dtype=torch.float32, device=x.device)
        out = torch.empty(rows, k, dtype=torch.uint8, device=x.device)[:m]
        self._quantize(x, norm, eps, self._input_scale, out, scales)
        return out, scales

    def product(self, x: tuple[Tensor, Tensor], around: Around, how: tuple[int, Variant] | None = None) -> Tensor:
        """x: of `quantize`. how: see `choose`."""
        (data, scales), has_groups = x, self.weight.has_groups
        most = MAX_TOKENS if has_groups or not (around.gated or around.residual is not None) else MAX_FUSED_TOKENS
        if how is None and self._library_scales is not None and len(data) > most:
            return self.library_product(x, around, self._library_scales)
        out = around.target(data, self._num_out, self._dtype)
        tile, variant = how or choose(len(data), out.shape[1], data.shape[1], around.gated, has_groups)
        module = decode_gemm.prepare(data.device, self._dtype, tile, 1 + has_groups)
        decode_gemm.run(module, data, self.weight.data, around, out, variant, self.weight.scales, scales)
        return out

    def library_product(self, x: tuple[Tensor, Tensor], around: Around, weight_scales: Tensor) -> Tensor:
        (data, scales), weight = x, self.weight.data.view(torch.float8_e4m3fn).t()
        num_tokens, is_fast = len(data), not self.weight.has_groups
        data = data.as_strided((scales.shape[-1], data.shape[1]), data.stride())  # what follows the last is anything
        operands = data.view(torch.float8_e4m3fn), weight, scales[:, None] if is_fast else scales.t(), weight_scales
        out = torch._scaled_mm(*operands, out_dtype=torch.bfloat16, use_fast_accum=is_fast)[:num_tokens]
        out = out if around.bias is None else out.add_(around.bias)
        if around.gated:
            return self._ops.act_and_mul(out)
        return out if around.residual is None else around.residual.add_(out)

    def fused(self, x: Tensor, around: Around) -> Tensor | None:
        if around.gated and (around.bias is not None or self._activation != "silu"):
            return None
        n = around.num_out(self._num_out)
        if self._on_hopper and len(x) == 1 and x.shape[1] % GROUP == 0 and x.shape[1] <= ONE_TOKEN_K:
            out = around.target(x, self._num_out, x.dtype)
            return one_token(self._one_token(), x, around, out, -1, *self.weight, 1.0)
        if not self._on_hopper and skinny.takes(x, n, around.norm is not None, float8=True):
            return skinny.linear(x, self.weight.data, around, self.weight.scales)
        if not self._on_hopper or n % 16:
            return None
        return self.product(self.quantize(x, around.norm, around.eps), around)

    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight.widen(x.dtype), bias)

    def taken(self, ids: Tensor) -> Tensor:
        return self.weight.widen(self._dtype, ids)
