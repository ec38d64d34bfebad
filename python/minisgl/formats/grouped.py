"""Checkpoints of integers with a scale for each group of columns: AWQ, GPTQ and compressed-tensors."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from minisgl.config.quantization import Scheme
from minisgl.formats.base import Shard, Tensor, Tensors, WeightSlot
from minisgl.formats.stored import StoredFormat
from minisgl.kernel.packed import Grouped
from minisgl.utils.math import div_ceil

# Of a part of a checkpoint's tensor: the whole shape, rows and columns, and what makes [out, …] of them.
Place = tuple[tuple[int, ...], tuple[int, int], tuple[int, int], Callable[[Tensor], Tensor] | None]
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where a word of AWQ has its eight values, in order


@dataclass(frozen=True, slots=True)
class _Layer:
    """A shard of one linear layer, and which of the checkpoint's groups of columns its own are in."""

    prefix: str
    shard: Shard
    bits: int
    groups: tuple[int, int]
    all_groups: int

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    def words(self, begin: int, end: int) -> tuple[int, int]:
        """The words that hold these values."""
        return begin // self.per_word, div_ceil(end, self.per_word)


class GroupedFormat(StoredFormat):
    """Base of those below. codes, scales, zeros, order: the tensors' names in the checkpoint."""

    codes, scales, zeros, order = "qweight", "scales", "qzeros", "g_idx"
    rows_at, codes_type = ("scales", 1), "I32"

    def packed_slots(self, prefix: str, tensors: Tensors, shard: Shard, scheme: Scheme) -> Iterator[WeightSlot]:
        layer = self._layer(prefix, shard, scheme)
        self.check_type(f"{prefix}{self.codes}", self.codes_type)
        width = shard.local[1] * layer.bits // 8
        yield self._slot(tensors, "codes", self.codes, layer, width, torch.uint8)
        width, scale_type = layer.groups[1] - layer.groups[0], self.float_type(f"{prefix}{self.scales}")
        yield self._slot(tensors, "scales", self.scales, layer, width, scale_type)
        if self.has_zeros(prefix):
            yield self._slot(tensors, "zeros", self.zeros, layer, width, torch.uint8)
        if (name := f"{prefix}{self.order}") in self.header:
            groups = tensors[f"{prefix}order"] = torch.empty(shard.local[1], dtype=torch.int64)
            first = layer.groups[0]
            yield WeightSlot(name, shard.shape[1:], groups, shard.span, transform=lambda part: part - first)

    def has_zeros(self, prefix: str) -> bool:
        return f"{prefix}{self.zeros}" in self.header or not self.header

    @abstractmethod
    def place(self, what: str, layer: _Layer) -> Place:
        """Where a layer's "codes", "scales" or "zeros" are."""

    def _layer(self, prefix: str, shard: Shard, scheme: Scheme) -> _Layer:
        num_in, (begin, end) = shard.shape[1], shard.span
        group = scheme.group or num_in
        first, last = begin // group, div_ceil(end, group)
        layer = _Layer(prefix, shard, scheme.bits, (first, last), div_ceil(num_in, group))
        name = f"{prefix}{self.codes}"
        if num_in % group:
            raise self.error(name, f"groups of {group} do not divide its {num_in} columns")
        if (begin % group or end % group) and last - first > 1:
            raise self.error(name, f"tensor parallelism would cut its {num_in} columns through groups of {group}")
        if num_in % layer.per_word or begin % layer.per_word or end % layer.per_word:
            raise self.error(name, f"columns [{begin}, {end}) of {num_in} are not {layer.per_word} to a word")
        return layer

    def _slot(
        self, tensors: Tensors, what: str, name: str, layer: _Layer, width: int, dtype: torch.dtype
    ) -> WeightSlot:
        target = self.add(tensors, f"{layer.prefix}{what}", layer.shard, width, dtype)
        shape, rows, cols, change = self.place(what, layer)
        return WeightSlot(f"{layer.prefix}{name}", shape, target, rows, cols, change)

    def part(self, prefix: str, tensors: Tensors) -> Grouped | Tensor:
        if "weight" in tensors:
            return tensors["weight"]
        codes, scales, zeros = tensors["codes"], tensors["scales"], tensors.get("zeros")
        self.check_scales(f"{prefix}{self.scales}", scales)
        bits = self.scheme(prefix).bits
        if zeros is not None and bool((zeros == 2 ** (bits - 1)).all()):
            zeros = None
        columns = None
        if "order" in tensors:
            columns = self._by_group(f"{prefix}{self.order}", tensors["order"], scales.shape[1])
        if columns is not None:
            codes = pack(unpack(codes, bits)[:, columns], bits)
            columns = columns.to(codes.device)
        return Grouped(codes, scales, zeros, bits, columns)

    def _by_group(self, name: str, groups: Tensor, num_groups: int) -> Tensor | None:
        """groups: [in], of each column → the columns, group by group; None: they are in order."""
        size = len(groups) // num_groups
        if torch.equal(groups, torch.arange(len(groups)) // size):
            return None
        valid = bool(((groups >= 0) & (groups < num_groups)).all())
        if not valid or bool((groups.bincount(minlength=num_groups) != size).any()):
            reason = f"the columns here are not in {num_groups} groups of {size}"
            raise self.error(name, f"{reason}; with act-order, --tensor-parallel-size must be 1")
        return groups.argsort(stable=True)


class Gptq(GroupedFormat):
    """qweight: [in / 8, out], words of rows; scales: [groups, out]; qzeros: [groups, out / 8], words of columns, often
    one less than the zeros; g_idx: [in], of each row its group."""

    def place(self, what: str, layer: _Layer) -> Place:
        num_out, num_in = layer.shard.shape
        rows, cols = layer.shard.rows, layer.words(*layer.shard.span)
        if what == "codes":
            shape = (num_in // layer.per_word, num_out)
            return shape, cols, rows, lambda part: part.t().contiguous().view(torch.uint8)
        if what == "scales":
            return (layer.all_groups, num_out), layer.groups, rows, Tensor.t
        shape, words = (layer.all_groups, div_ceil(num_out, layer.per_word)), layer.words(*rows)
        return shape, layer.groups, words, lambda part: self._columns(part, layer, self.spec.zero_offset)

    def _columns(self, words: Tensor, layer: _Layer, offset: int = 0) -> Tensor:
        """Words of columns, of which the shard's become rows."""
        values, first = self.unpack_words(words, layer.bits), layer.shard.rows[0] % layer.per_word
        return (values[:, first : first + layer.shard.local[0]].t() + offset) & (2**layer.bits - 1)

    def unpack_words(self, words: Tensor, bits: int) -> Tensor:
        """[n, words] → [n, values]."""
        return unpack(words.contiguous().view(torch.uint8), bits)


class Awq(Gptq):
    """qweight: [in, out / 8], words of columns in an order of their own, as those of qzeros."""

    def place(self, what: str, layer: _Layer) -> Place:
        if what != "codes":
            return super().place(what, layer)
        num_out, num_in = layer.shard.shape
        shape, words = (num_in, div_ceil(num_out, layer.per_word)), layer.words(*layer.shard.rows)
        return shape, layer.shard.span, words, lambda part: pack(self._columns(part, layer), layer.bits)

    def unpack_words(self, words: Tensor, bits: int) -> Tensor:
        return super().unpack_words(words, bits).view(len(words), -1, 8)[:, :, _AWQ_ORDER].flatten(1)


class Compressed(GroupedFormat):
    """weight_packed: [out, in / 8]; weight_scale: [out, groups]; weight_zero_point: [out / 8, groups], words of
    rows."""

    codes, scales, zeros, order = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
    rows_at = ("weight_scale", 0)

    def has_zeros(self, prefix: str) -> bool:
        return f"{prefix}{self.zeros}" in self.header

    def place(self, what: str, layer: _Layer) -> Place:
        (num_out, num_in), rows = layer.shard.shape, layer.shard.rows
        if what == "codes":
            shape, cols = (num_out, num_in // layer.per_word), layer.words(*layer.shard.span)
            return shape, rows, cols, lambda part: part.contiguous().view(torch.uint8)
        if what == "scales":
            return (num_out, layer.all_groups), rows, layer.groups, None
        shape, first = (div_ceil(num_out, layer.per_word), layer.all_groups), rows[0] % layer.per_word
        return shape, layer.words(*rows), layer.groups, lambda part: self._rows(part, layer, first)

    def _rows(self, part: Tensor, layer: _Layer, first: int) -> Tensor:
        words = part.t().clone(memory_format=torch.contiguous_format)  # strides of a single word are not changed else
        values = unpack(words.view(torch.uint8), layer.bits).t()
        return values[first : first + layer.shard.local[0]]


class CompressedInt8(Compressed):
    """weight: [out, in] int8; weight_scale: [out, 1]."""

    codes, codes_type = "weight", "I8"

    def place(self, what: str, layer: _Layer) -> Place:
        if what != "codes":
            return super().place(what, layer)
        shard = layer.shard
        return shard.shape, shard.rows, shard.span, lambda part: part.contiguous().view(torch.uint8) ^ 128


def unpack(codes: Tensor, bits: int) -> Tensor:
    """[n, bytes] uint8 → [n, values], of which a byte's lower half comes first."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(1) if bits == 4 else codes


def pack(values: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack`."""
    return values[:, ::2] | values[:, 1::2] << 4 if bits == 4 else values.contiguous()
