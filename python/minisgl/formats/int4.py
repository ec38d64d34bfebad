"""Weights that are stored in full, made 4 bits wide: groups of 32 columns with a scale and a zero."""

from __future__ import annotations

import torch

from minisgl.errors import ConfigError
from minisgl.formats.base import ByName, Tensor, Tensors
from minisgl.formats.grouped import pack
from minisgl.kernel.packed import Grouped

GROUP = 32  # columns
WIDE = ("model.embed_tokens.", "lm_head.")  # what needs more bits
_SPANS = (13.0, 14.2, 15.4, 16.6)  # steps that a group's range is divided into: with more than 15 its ends are cut
_GROUPS_AT_ONCE = 1 << 14  # as many as caches hold


class Int4(ByName):
    """Made once they are loaded. Embedding and head have 8 bits; what groups do not divide stays in full."""

    def part(self, prefix: str, tensors: Tensors) -> Grouped | Tensor:
        return quantize(prefix, tensors["weight"], 8 if prefix in WIDE else 4)


def quantize(prefix: str, weight: Tensor, bits: int, importance: Tensor | None = None) -> Grouped | Tensor:
    """weight: [out, in]; importance: [in], of errors in each column. The weight itself where groups do not divide it.

    Raises: ConfigError naming a weight that is not finite.
    """
    num_out, num_in = weight.shape
    if num_in % GROUP:
        return weight
    codes = torch.empty(num_out, num_in, dtype=torch.uint8)
    scales = torch.empty(num_out, num_in // GROUP, dtype=torch.float16)
    zeros = torch.empty_like(scales, dtype=torch.uint8)
    step = max(1, _GROUPS_AT_ONCE * GROUP // num_in)
    by_group = None if importance is None else importance.float().view(-1, GROUP)
    for begin in range(0, num_out, step):
        rows = slice(begin, begin + step)
        part = weight[rows].float()
        groups = part.view(len(part), -1, GROUP)
        if not bool(groups.isfinite().all()):
            raise ConfigError(f"{prefix}weight holds NaN or infinity, and cannot be quantized")
        scale, zero = _symmetric(groups) if bits == 8 else _search(groups, by_group)
        scales[rows] = scale = scale.half()
        zeros[rows] = zero
        steps = groups / torch.where(scale == 0, 1, scale.float()).unsqueeze(-1) + zero.unsqueeze(-1)
        codes[rows] = steps.round_().clamp_(0, 2**bits - 1).flatten(1)
    return Grouped(pack(codes, bits), scales, None if bits == 8 else zeros, bits)


def _symmetric(groups: Tensor) -> tuple[Tensor, Tensor]:
    scale = groups.abs().amax(-1) / 127
    return scale, torch.full_like(scale, 128)


def _search(groups: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """groups: [out, n, 32]; importance: [n, 32] → scales and zeros, [out, n]: the best of a few.

    For given codes q - z, the scale with the least squared error is <x, q - z> / <q - z, q - z>, and what it takes away
    from <x, x> is <x, q - z>² / <q - z, q - z>: so candidates are compared without computing what they stand for.
    """
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    best = scale = zero = torch.zeros_like(low)
    weighted = groups if importance is None else groups * importance
    for span in _SPANS:
        inverse = span / (high - low).clamp_(min=1e-30)
        middle = (7.5 - (low + high) / 2 * inverse).floor_()
        steps = groups * inverse.unsqueeze(-1)
        for shift in (0, 1):
            candidate = (middle + shift).clamp_(0, 15)
            codes = (steps + candidate.unsqueeze(-1)).round_().clamp_(0, 15).sub_(candidate.unsqueeze(-1))
            product = torch.linalg.vecdot(weighted, codes)
            square = torch.linalg.vecdot(codes if importance is None else codes * importance, codes).clamp_(min=1e-30)
            gain = product.square() / square
            is_better = gain > best
            best, zero = torch.where(is_better, gain, best), torch.where(is_better, candidate, zero)
            scale = torch.where(is_better, product / square, scale)
    return scale, zero
