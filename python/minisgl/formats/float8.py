"""Checkpoints of 8-bit floats: Qwen3-*-FP8 and others of `fp8`, compressed-tensors, ModelOpt; of 4 bits: gpt-oss."""

from collections.abc import Iterator

import torch

from minisgl.config.quantization import Scheme
from minisgl.formats.base import Shard, Tensor, Tensors, WeightSlot
from minisgl.formats.stored import StoredFormat
from minisgl.kernel.packed import Blocks, Float8
from minisgl.utils.math import div_ceil

BLOCK = 128  # rows and columns of one scale, where a matrix of them is stored


class Float8Format(StoredFormat):
    """weight: [out, in] float8_e4m3fn; weight_scale: [1] or [out, 1], or weight_scale_inv or weight_scale: one for each
    128 × 128; input_scale: [1], where activations have one."""

    def packed_slots(self, prefix: str, tensors: Tensors, shard: Shard, scheme: Scheme) -> Iterator[WeightSlot]:  # noqa: ARG002
        self.check_type(f"{prefix}weight", "F8_E4M3")
        weight = self.add(tensors, f"{prefix}weight", shard, shard.local[1], torch.float8_e4m3fn)
        yield WeightSlot(f"{prefix}weight", shard.shape, weight, shard.rows, shard.cols)
        yield self._scales(prefix, tensors, shard)
        if f"{prefix}input_scale" in self.header:
            scale = tensors[f"{prefix}input_scale"] = torch.empty(1)
            yield WeightSlot(f"{prefix}input_scale", (1,), scale, (0, 1))

    def _scales(self, prefix: str, tensors: Tensors, shard: Shard) -> WeightSlot:
        name = self._scale_name(prefix)
        shape = self.header[name].shape if name in self.header else (1,)
        (num_out, num_in), key, rows = shard.shape, f"{prefix}scale", shard.rows
        self.float_type(name)
        if shape in ((num_out,), (num_out, 1)):
            target = self.add(tensors, key, shard, 1, torch.float32)
            return WeightSlot(name, shape, target, rows, transform=lambda part: part.view(-1, 1))
        if shape == (1,):
            tensors[key] = torch.empty(1, 1)
            return WeightSlot(name, shape, tensors[key], (0, 1))
        rows, cols = (self._blocks(name, *part) for part in ((rows, num_out), (shard.span, num_in)))
        tensors[key] = torch.zeros(div_ceil(shard.local[0] + shard.padding, BLOCK), cols[1] - cols[0])
        target = tensors[key][: div_ceil(shard.local[0], BLOCK)]  # of the rows that it has here, which may be more
        return WeightSlot(name, (div_ceil(num_out, BLOCK), div_ceil(num_in, BLOCK)), target, rows, cols)

    def _scale_name(self, prefix: str) -> str:
        name = f"{prefix}weight_scale"
        return f"{name}_inv" if f"{name}_inv" in self.header else name

    def _blocks(self, name: str, part: tuple[int, int], size: int) -> tuple[int, int]:
        """The blocks that hold rows or columns [begin, end) of `size`."""
        (begin, end), first, last = part, part[0] // BLOCK, div_ceil(part[1], BLOCK)
        if last - first > 1 and (begin % BLOCK or (end % BLOCK and end != size)):
            raise self.error(name, f"[{begin}, {end}) of {size}, a rank's or a part's, cuts blocks of {BLOCK}")
        return first, last

    def part(self, prefix: str, tensors: Tensors) -> Float8 | Tensor:
        if "scale" not in tensors:
            return tensors["weight"]
        self.check_scales(self._scale_name(prefix), tensors["scale"])
        static = tensors.get("input_scale")
        if static is not None:
            self.check_scales(f"{prefix}input_scale", static)
        weight = tensors["weight"]
        return Float8(weight, tensors["scale"].to(weight.device), None if static is None else float(static))


class Mxfp4(StoredFormat):
    """Experts in e2m1, of each: …_blocks: [out, in / 32, 16] uint8, an even column in the lower half; …_scales:
    [out, in / 32], exponents (MXFP4 of the OCP's MX 1.0)."""

    def packed_slots(self, prefix: str, tensors: Tensors, shard: Shard, scheme: Scheme) -> Iterator[WeightSlot]:  # noqa: ARG002
        name = prefix[:-1]
        cols, groups = (shard.span[0] // 32, shard.span[1] // 32), (shard.shape[0], shard.shape[1] // 32)
        if shard.span != (32 * cols[0], 32 * cols[1]):
            raise self.error(f"{name}_blocks", f"a rank's part of its {shard.shape[1]} columns cuts groups of 32")
        for what, size in (("blocks", [16]), ("scales", [])):
            self.check_type(f"{name}_{what}", "U8")
            target = self.add(tensors, f"{prefix}{what}", shard, (cols[1] - cols[0]) * sum(size or [1]), torch.uint8)
            target = target.view(len(target), -1, *size)
            yield WeightSlot(f"{name}_{what}", (*groups, *size), target, shard.rows, cols)

    def part(self, prefix: str, tensors: Tensors) -> Blocks | Tensor:
        """Blocks as GGUF files have them: an exponent, and columns i and i + 16 in a byte."""
        if "weight" in tensors:
            return tensors["weight"]
        scales = tensors["scales"] if self.header else torch.full_like(tensors["scales"], 122)  # of random weights
        self.check_scales(f"{prefix[:-1]}_scales", torch.exp2(scales.float() - 127))
        pairs = tensors["blocks"].view(*scales.shape, 16)
        codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
        blocks = scales.unsqueeze(-1), codes[..., :16] | codes[..., 16:] << 4
        return Blocks("MXFP4", torch.cat(blocks, -1).flatten(1), 2 * tensors["blocks"].shape[1])
