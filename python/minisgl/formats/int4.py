"""Weights that are stored in full, made 4 bits wide: groups of 32 columns with a scale and a zero."""

import torch

from minisgl.errors import ConfigError
from minisgl.formats.base import ByName, Tensor, Tensors
from minisgl.kernel.jit import load_cpu_kernels
from minisgl.kernel.packed import Grouped

GROUP = 32  # columns
WIDE = ("model.embed_tokens.", "lm_head.")  # what needs more bits


class Int4(ByName):
    """Made once they are loaded. Embedding and head have 8 bits; what groups do not divide stays in full."""

    def part(self, prefix: str, tensors: Tensors) -> Grouped | Tensor:
        return quantize(prefix, tensors["weight"], 8 if prefix in WIDE else 4)


def quantize(prefix: str, weight: Tensor, bits: int, importance: Tensor | None = None) -> Grouped | Tensor:
    """weight: [out, in]; importance: [in], of errors in each column. The weight itself where groups do not divide it.

    Raises: ConfigError naming a weight that is not finite, or where there is no C++ compiler for the search.
    """
    num_out, num_in = weight.shape
    if num_in % GROUP:
        return weight
    kernels = load_cpu_kernels()
    codes = torch.empty(num_out, num_in * bits // 8, dtype=torch.uint8)
    scales = torch.empty(num_out, num_in // GROUP, dtype=torch.float16)
    zeros = None if bits == 8 else torch.empty_like(scales, dtype=torch.uint8)
    plain = weight.detach() if weight.dtype == torch.bfloat16 else weight.detach().float()
    workers = kernels.create_workers(torch.get_num_threads())
    is_finite = kernels.make_narrow(workers, plain.contiguous(), importance, codes, scales, zeros)
    kernels.destroy_workers(workers)
    if not is_finite:
        raise ConfigError(f"{prefix}weight holds NaN or infinity, and cannot be quantized")
    return Grouped(codes, scales, zeros, bits)
