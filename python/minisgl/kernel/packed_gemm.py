"""Linear layers with weights of 4 bits on GPUs (csrc/include/minisgl/packed_weight.cuh): of few tokens
(packed_few.cuh), of more (packed_gemm.cuh, on Hopper packed_wide.cuh), and of many by way of 16 bits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from minisgl.kernel import decode_gemm, skinny
from minisgl.kernel.jit import load_kernel, side_by_side
from minisgl.kernel.ops import Around, LayerOps, Matrix, Tensor
from minisgl.kernel.packed import Blocks, Grouped, Packed, placed

FEW_TILES, TILES, WIDE_TILES = (8, 16), (64,), (64, 128, 256)  # of tokens, of few and of more
UNIT_K = 128
GROUPS = (32, 64, 128)
SMALL, LARGE = 32 << 20, 128 << 20  # weights
ONE_TOKEN_K = 17408  # a token lies in shared memory, beside the weights in flight
FUSED_NORM_K = 5120  # its gains lie in shared memory
_COPY = 64 << 20  # weights in 16 bits at a time
_CHUNK_ROWS = 4096  # that are packed at a time
_ROWS = 256  # that are looked up at a time, with 15 others each


@dataclass(frozen=True, slots=True)
class Codes:
    """Weights as scale * (code - zero), or where there are minima, scale * (code - 8) + offset.

    codes: [out, in / 2] uint8, an even column in the lower half; scales, seconds (zeros or offsets): [out, in / group]
    float32; columns: as those of `Grouped`.
    """

    codes: Tensor
    scales: Tensor
    seconds: Tensor
    has_minima: bool = False
    columns: Tensor | None = None

    @property
    def kind(self) -> tuple[int, int, bool]:
        """Columns; columns with one scale; and whether there are minima."""
        num_in = 2 * self.codes.shape[1]
        return num_in, num_in // self.scales.shape[1], self.has_minima


def codes_of(parts: Sequence[Packed]) -> Codes | None:
    """The parts as one, the first one's rows first; None: not of 4 bits, not alike, or no kernel takes them."""
    found = [known for part in parts if (known := codes_of_part(part)) is not None]
    if len(found) < len(parts) or any(part.kind != found[0].kind for part in found):
        return None
    (num_in, group, _), columns = found[0].kind, found[0].columns
    if num_in % 32 or group not in (*GROUPS, num_in) or sum(len(part.codes) for part in found) % 16:
        return None
    for order in (part.columns for part in found):
        if order is not columns and (order is None or columns is None or not torch.equal(order, columns)):
            return None
    codes, scales, seconds = (torch.cat(t) for t in zip(*((p.codes, p.scales, p.seconds) for p in found), strict=True))
    return Codes(codes, scales, seconds, found[0].has_minima, columns)


def codes_of_part(part: Packed) -> Codes | None:
    """None: it has other than 4 bits, or blocks whose columns are in another order."""
    if isinstance(part, Blocks) and part.columns is not None:
        return None
    if isinstance(part, Grouped) and part.bits == 4:
        zeros = torch.full_like(part.scales, 8.0) if part.zeros is None else part.zeros
        return Codes(part.codes, part.scales.float(), zeros.float(), columns=part.columns)
    if isinstance(part, Blocks) and part.kind in ("Q4_0", "Q4_1"):
        return _small_blocks(part.data, 2 if part.kind == "Q4_0" else 4)
    return _q4_k(part.data) if isinstance(part, Blocks) and part.kind == "Q4_K" else None


def _halves(data: Tensor) -> Tensor:
    """[..., 2 * n] bytes → [..., n], the float16 that they are, as float32."""
    return data.contiguous().view(torch.float16).float()


def in_order(data: Tensor) -> Tensor:
    """[..., n] bytes with columns i and i + n → the same with columns 2i and 2i + 1."""
    codes = torch.cat((data & 15, data >> 4), -1)
    return codes[..., ::2] | codes[..., 1::2] << 4


def _small_blocks(data: Tensor, head: int) -> Codes:
    """Blocks of 32: scale, for Q4_1 the minimum, and codes. head: bytes before these."""
    blocks = data.unflatten(1, (-1, head + 16))
    params, codes = _halves(blocks[..., :head]), in_order(blocks[..., head:]).flatten(1)
    scales = params[..., 0].contiguous()
    has_minima = head == 4
    seconds = params[..., 1] + 8 * scales if has_minima else torch.full_like(scales, 8.0)
    return Codes(codes, scales, seconds, has_minima)


def _q4_k(data: Tensor) -> Codes:
    """Blocks of 256: factors of scales and of minima, eight of each with 6 bits, and codes."""
    blocks = data.unflatten(1, (-1, 144))
    d = _halves(blocks[..., :4])
    low, middle, high = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((low & 63, high & 15 | low >> 6 << 4), -1) * d[..., :1]
    minima = torch.cat((middle & 63, high >> 4 | middle >> 6 << 4), -1) * d[..., 1:]
    codes = in_order(blocks[..., 16:].unflatten(-1, (4, 32)))
    return Codes(codes.flatten(1), scales.flatten(1), (8 * scales - minima).flatten(1), has_minima=True)


def pack(weight: Codes, dtype: torch.dtype, gated: bool) -> tuple[Tensor, float]:
    """As the kernels read them: [out / 16, in / 128 rounded up, bytes] uint8, and a factor of all scales, which keeps
    them within the range of float16.

    dtype: of activations. gated: the rows of gate and up alternate, 8 of each.
    """
    (_, group, has_minima), codes, scales, seconds = weight.kind, weight.codes, weight.scales, weight.seconds
    largest = max(float(t.abs().max()) for t in ((scales, seconds) if has_minima else (scales,)))
    unit = 2.0 ** (math.frexp(largest)[1] - 15)
    zero = 1024 if dtype == torch.float16 else 128  # of which a code is the lowest bits
    seconds = (seconds / unit).half() if has_minima else (seconds + zero).to(dtype)
    params = torch.stack([t.view(torch.int16) for t in ((scales / unit).half(), seconds)], -1)  # [out, groups, 2]
    if group not in GROUPS:  # whole rows
        params = params.repeat_interleave(-(-group // UNIT_K), 1)
    num_out, half = codes.shape
    units = -(-half // (UNIT_K // 2))
    params = F.pad(params, (0, 0, 0, units * max(1, UNIT_K // group) - params.shape[1]))
    order = torch.arange(num_out, device=codes.device)
    order = order.view(2, -1, 8).transpose(0, 1).flatten() if gated else order
    return torch.cat([_pack_rows(codes[rows], params[rows], units) for rows in order.split(_CHUNK_ROWS)]), unit


def _pack_rows(codes: Tensor, params: Tensor, units: int) -> Tensor:
    data = F.pad(codes, (0, units * UNIT_K // 2 - codes.shape[1]))
    nibbles = torch.stack((data & 15, data >> 4), -1).view(-1, 2, 8, units, 4, 2, 2, 4, 2)
    # from [row tile, octet, row, unit, word, 16 k of it, their 8 k, quad, pair]
    lower, upper = nibbles.permute(0, 3, 1, 2, 7, 4, 8, 5, 6).unbind(-1)
    params = params.view(-1, 2, 8, units, params.shape[1] // units, 2).permute(0, 3, 1, 4, 2, 5)
    return torch.cat(((lower | upper << 4).flatten(2), params.contiguous().view(torch.uint8).flatten(2)), -1)


class How(NamedTuple):
    """kernel: none for products by way of 16 bits. tile: of tokens."""

    kernel: str = ""
    tile: int = 0
    variant: int = 0


def one_token(module: Any, x: Tensor, around: Around, out: Tensor, variant: int, *weight: object) -> Tensor:
    """out, by csrc/src/one_token.cu. weight: with its scales, and a factor of all. variant: -1: the kernel's choice."""
    kind = around.residual is not None, around.gated, variant
    module.one_token_linear(x, around.norm, around.eps, *weight, around.bias, out, *kind)
    return out


def choose(m: int, n: int, k: int, arch: tuple[int, int]) -> How:
    """How `m` tokens are multiplied with a weight [n, k]. Measured on an H200 (docs/performance-log.md)."""
    is_hopper, weights = arch == (9, 0), n * k
    if m == 1 and k <= ONE_TOKEN_K:
        return How("one_token", 1, -1)
    if m <= 8 or (m <= 16 and not (is_hopper and k >= n)):
        return How("packed_gemm", 8 if m <= 8 else 16, 2 if m <= 8 else 3)
    if not is_hopper:
        return How("packed_gemm", TILES[0]) if m <= 128 else How()
    if m <= 128:
        return How("packed_wide", 64 if m <= 64 else 128, 2)
    if m <= 192 or (m <= 256 and weights <= LARGE):
        return How("packed_wide", 128, 3 if m <= 192 else 2)
    return How("packed_wide", 256, 2) if m <= 256 or (m <= 1024 and weights > SMALL) else How()


class PackedMatrix(Matrix):
    """Weights of 4 bits, which kernels unpack as they read them."""

    def __init__(
        self, ops: LayerOps, arch: tuple[int, int], weight: Codes, dtype: torch.dtype, activation: str | None
    ) -> None:
        """arch: compute capability to compile for. Raises: ConfigError if it cannot."""
        super().__init__(ops, len(weight.codes), activation)
        self._num_in, group, has_minima = weight.kind
        self._arch, self._dtype, self._columns = arch, dtype, weight.columns
        self._gated = activation == "silu"
        self._weight, self._unit = pack(weight, dtype, self._gated)
        self._workspace = decode_gemm.workspace(self._weight.device)
        kind = {"GROUP": group if group in GROUPS else UNIT_K, "MINIMA": int(has_minima)}
        self._kind = {f"MINISGL_{key}": n for key, n in (kind | {"FP16": int(dtype == torch.float16)}).items()}
        tiles = ("packed_wide", WIDE_TILES) if arch == (9, 0) else ("packed_gemm", TILES)
        tasks = [("one_token", 1), ("packed_gemm", FEW_TILES[0]), ("packed_gemm", FEW_TILES[1])]
        tasks += [(tiles[0], tile) for tile in tiles[1]]
        side_by_side(partial(self._kernel, *task) for task in [("packed_dense", 0), *tasks])

    def _kernel(self, name: str, tile: int = 0) -> Any:
        tokens = {"MINISGL_TOKENS": tile, "MINISGL_SHARED": skinny.SHARED.get(self._arch, 99)} if tile else {}
        return load_kernel(name, self._arch, **self._kind, **tokens)

    def multiply(self, x: Tensor, around: Around, how: How | None = None) -> Tensor:
        kernel, tile, variant = how or choose(len(x), self._num_out, self._num_in, self._arch)
        out = around.target(x, self._num_out, x.dtype)
        fuses = self._columns is None and 0 < tile <= FEW_TILES[-1] and self._num_in <= FUSED_NORM_K
        if around.norm is not None and not fuses:
            x, around = self._ops.rms_norm(x, around.norm, around.eps), replace(around, norm=None)
        x = x.contiguous() if self._columns is None else x.index_select(1, self._columns)
        places = self._weight, self._unit, around.bias, out, *self._workspace
        kind = around.residual is not None, around.gated, variant
        if len(x) == 0:
            return out
        if not kernel:
            return self._multiply_dense(x, out, around)
        if kernel == "one_token":
            return one_token(self._kernel(kernel, tile), x, around, out, variant, self._weight, None, self._unit)
        if kernel == "packed_wide":
            self._kernel(kernel, tile).packed_wide_linear(x, *places, *kind)
        else:
            self._kernel(kernel, tile).packed_linear(x, around.norm, around.eps, *places, *kind)
        return out

    def _multiply_dense(self, x: Tensor, out: Tensor, around: Around) -> Tensor:
        """With a copy of 16 bits, of some rows at a time."""
        num_tiles = max(1, _COPY // (16 * self._num_in))
        parts = out.split(around.num_out(16 * num_tiles), 1)
        for weight, part in zip(self._weight.split(num_tiles), parts, strict=True):
            dense = self._dequantize(weight, around.gated).T
            if around.gated:
                part.copy_(self._ops.act_and_mul(x @ dense))
            else:
                torch.addmm(part, x, dense, beta=int(around.residual is not None), out=part)
        return out if around.bias is None else out.add_(around.bias)

    def _dequantize(self, weight: Tensor, gated: bool) -> Tensor:
        """[n, units, bytes] → [16 * n, in]: rows of gate, then of up; or as they are."""
        dense = weight.new_empty((16 * len(weight), self._num_in), dtype=self._dtype)
        self._kernel("packed_dense").dequantize(weight, self._unit, dense, gated)
        return dense

    def fused(self, x: Tensor, around: Around) -> Tensor | None:
        fits = around.gated == self._gated and not (around.gated and around.bias is not None)
        return self.multiply(x, around) if fits else None

    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = self.multiply(x, Around()).view(len(x), -1, 2, 8).transpose(1, 2).reshape(len(x), -1)
        return out if bias is None else out.add_(bias)

    def taken(self, ids: Tensor) -> Tensor:
        assert not self._gated
        return placed(torch.cat([self._rows(some) for some in ids.split(_ROWS)]), self._columns)

    def _rows(self, ids: Tensor) -> Tensor:
        tiles = self._dequantize(self._weight.index_select(0, ids // 16), gated=False).view(len(ids), 16, -1)
        return tiles[torch.arange(len(ids), device=ids.device), ids % 16]
