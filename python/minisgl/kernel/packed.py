"""Weights of few bits, as checkpoints have them: what kernels repack, and the values that they stand for.

A linear layer may have several, one below the other: a file keeps some of its rows with more bits than others.
"""

from dataclasses import dataclass
from functools import cache

import torch

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of blocks as GGUF files have them. kind: ggml's name of their type, such as "Q4_K"; data: [out, bytes of a
    row] uint8; columns: as those of `Grouped`."""

    kind: str
    data: Tensor
    num_in: int
    columns: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.data), self.num_in

    def dequantize(self) -> Tensor:
        """The values, [out, in] float32, with columns where the input's features are."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        values = torch.from_numpy(dequantize(self.data.cpu().numpy(), GGMLQuantizationType[self.kind]))
        return placed(values.to(self.data.device), self.columns)


@cache
def grid_of(kind: str) -> Tensor | None:
    """Of types whose codes name several values at a time, these: [codes, 4 or 8] uint8, which of the type's magnitudes
    each is. The tables are the `gguf` package's."""
    from gguf import quants

    found = getattr(quants, kind)
    if not found.grid_map:
        return None
    found.init_grid()
    return torch.bucketize(torch.from_numpy(found.grid[0, 0]), torch.tensor(found.grid_map, dtype=torch.float32)).byte()


@dataclass(frozen=True, slots=True)
class Grouped:
    """Integers, with a scale, and perhaps a zero, for each group of columns: scale * (code - zero).

    codes: [out, in / 2] uint8, of which an even column is the lower half, or with 8 bits [out, in]; scales: [out,
    in / group], of any float type; zeros: [out, in / group] uint8, or None: half of the codes' range (8, 128).
    columns: [in] int64, which of the input's features each column multiplies; None: its own.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    bits: int = 4
    columns: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor) -> "Grouped":
        """[out, in] rounded to the nearest of 15 levels, of each 64 columns."""
        groups = weight.float().unflatten(1, (-1, 64))
        scales = groups.abs().amax(-1).clamp(min=1e-12) / 7
        codes = (groups / scales[..., None]).round_().add_(8).byte()
        return cls((codes[..., ::2] | codes[..., 1::2] << 4).flatten(1), scales)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.codes.shape[1] * 8 // self.bits

    def dequantize(self) -> Tensor:
        """The values, [out, in] float32, with columns where the input's features are."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
        zeros = 2 ** (self.bits - 1) if self.zeros is None else self.zeros.float().unsqueeze(-1)
        groups = codes.float().unflatten(1, (self.scales.shape[1], -1))
        return placed(((groups - zeros) * self.scales.float().unsqueeze(-1)).flatten(1), self.columns)


@dataclass(frozen=True, slots=True)
class Float8:
    """data: [out, in] float8_e4m3fn; scales: [1, 1], [out, 1], or [r, c] for blocks of 128 × 128, the last of which may
    be smaller, float32 all. input_scale: of activations; None: theirs are taken anew."""

    data: Tensor
    scales: Tensor
    input_scale: float | None = None

    @classmethod
    def of(cls, weight: Tensor) -> "Float8":
        """[out, in] rounded, with a scale of each row."""
        scales = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 448
        return cls((weight / scales).to(torch.float8_e4m3fn), scales)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.data), self.data.shape[1]

    def row_scales(self) -> Tensor:
        """Of each row its scales, [out, c] float32."""
        num_out, r = len(self.data), len(self.scales)
        each = num_out if r == 1 else 1 if r == num_out else 128
        return self.scales.float().repeat_interleave(each, 0)[:num_out]

    def dequantize(self) -> Tensor:
        """The values, [out, in] float32."""
        scales = self.row_scales()
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(128, 1)[:, : self.shape[1]]
        return self.data.float() * scales


def placed(values: Tensor, columns: Tensor | None) -> Tensor:
    """The values, [n, in], with columns where the input's features are."""
    return values if columns is None else torch.empty_like(values).index_copy_(1, columns.to(values.device), values)


Packed = Blocks | Grouped | Float8
