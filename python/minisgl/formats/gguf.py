"""Weights as GGUF files have them: rows of blocks, each weight of its own type. They stay in the mapped file until they
are packed, and are never made larger on the way."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from minisgl.formats.base import ByName, Shard, Tensors, WeightSlot
from minisgl.gguf.model import GgufModel, StoredTensor, open_model
from minisgl.kernel.ops import LayerOps, Matrix
from minisgl.kernel.packed import Blocks, Packed

Tensor = torch.Tensor

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\.\w+\.weight)")
_ROTATED = re.compile(r"\.self_attn\.[qk]_proj\.\w+$")
_CHECKED_BYTES = 16 << 20


class Gguf(ByName):
    """A layer's type is known from the file. Its tensors are bytes, [out, bytes of a row], by their names in a Hugging
    Face checkpoint: parts of the mapped file, where that has all rows in our order.

    dtype: of activations. device: that computes.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._model = open_model(path)

    def slots(self, prefix: str, tensors: Tensors, shard: Shard) -> Iterator[WeightSlot]:
        name, (begin, end) = f"{prefix}weight", shard.rows
        stored, data = self._rows(name)
        if stored is None or stored.shape[-2:] != shard.shape:  # the loader says what is wrong
            yield WeightSlot(name, shard.shape, torch.empty(0, dtype=torch.uint8), (begin, begin))
            return
        if shard.cols is not None:
            data = data[:, slice(*(_bytes_of(stored, column) for column in shard.cols))]
        if shard.padding or is_interleaved(self._model, name):
            tensors[name] = torch.zeros(end - begin + shard.padding, data.shape[1], dtype=torch.uint8)
            target = _typed(tensors[name][: end - begin], stored)
            yield WeightSlot(name, shard.shape, target, shard.rows)
        else:
            tensors[name] = data[begin:end]
            yield WeightSlot(name, shard.shape, data[:0], (begin, begin))  # nothing is left to be read

    def part(self, prefix: str, tensors: Tensors) -> Packed | Tensor:
        blocks = self._blocks(f"{prefix}weight", tensors["weight"])
        keeps_half = blocks.kind == "F16" and self._device.type == "cpu"
        return blocks if keeps_half or blocks.kind not in _FLOATS else blocks.data.view(_FLOATS[blocks.kind])

    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:
        matrix = super().matrix(ops, tensors, activation)
        self._model.release()
        return matrix

    def _rows(self, name: str) -> tuple[StoredTensor | None, Tensor]:
        """What the file has for a weight, perhaps in a stack of all experts', and its bytes: [out, bytes of a row]."""
        if stored := self._model.tensors.get(name):
            return stored, bytes_of(stored)
        if match := _EXPERT.fullmatch(name):
            stored = self._model.tensors.get(match[1] + match[3])
            if stored is not None and int(match[2]) < stored.shape[0]:
                return stored, bytes_of(stored)[int(match[2])]
        return None, torch.empty(0)

    def _blocks(self, name: str, data: Tensor) -> Blocks:
        stored, _ = self._rows(name)
        assert stored is not None
        kind, step = stored.kind, max(1, _CHECKED_BYTES // data.shape[1])
        for begin in range(0, len(data) if kind.scales else 0, step):
            rows = data[begin : begin + step].view(torch.float16)
            blocks = rows.view(len(rows), -1, kind.num_bytes // 2)
            if not all(blocks[..., offset // 2].float().sum().isfinite() for offset in kind.scales):
                raise stored.wrong("has scales that are infinite, or not a number")
        num_in = data.shape[1] // kind.num_bytes * kind.values
        return Blocks(kind.name, data.contiguous().to(self._device), num_in)


class Slice:
    """A tensor of a file, of which parts can be had: as safetensors has them, in our order of rows. Parts of tensors
    that are no floats are bytes."""

    def __init__(self, model: GgufModel, name: str) -> None:
        self._model, self._stored = model, model.tensors[name]
        self._half = model.interleaved_dim // 2 if is_interleaved(model, name) else 0

    def get_dtype(self) -> str:
        return self._stored.kind.name

    def get_shape(self) -> tuple[int, ...]:
        return self._stored.shape

    def __getitem__(self, index: slice | tuple[int, slice]) -> Tensor:
        data = _typed(bytes_of(self._stored), self._stored)
        if self._half and isinstance(index, slice):  # feature i of a head's half h is the file's 2 * i + h
            rows = torch.arange(len(data))[index]
            within = rows % (2 * self._half)
            part = data[rows - within + within % self._half * 2 + within // self._half]
        else:
            part = data[index].clone()
        self._model.release()
        return part


def open_slices(path: Path) -> dict[str, Slice]:
    """The tensors of a file, and of those that it is split into, by their names in a Hugging Face checkpoint."""
    model = open_model(path)
    return {name: Slice(model, name) for name in model.tensors}


def bytes_of(stored: StoredTensor) -> Tensor:
    """The bytes of a tensor in the mapped file: [..., bytes of a row]."""
    data = torch.frombuffer(stored.file.data, dtype=torch.uint8, count=stored.num_bytes, offset=stored.offset)
    return data.view(*stored.shape[:-1], -1)


def _typed(data: Tensor, stored: StoredTensor) -> Tensor:
    """Bytes as the floats that they are, or as bytes."""
    return data.view(_FLOATS.get(stored.kind.name, torch.uint8))


def is_interleaved(model: GgufModel, name: str) -> bool:
    """Whether a tensor has the two features of a pair, which are rotated together, side by side."""
    return model.interleaved_dim > 0 and _ROTATED.search(name) is not None


def _bytes_of(stored: StoredTensor, column: int) -> int:
    """Where in a row a column begins. Raises: ConfigError when that is within a block."""
    if column % stored.kind.values:
        size = f"{stored.kind.values} columns, and the ranks' parts begin at column {column}"
        raise stored.wrong(f"cannot be shared with --tensor-parallel-size: {stored.kind.name} has blocks of {size}")
    return stored.kind.row_bytes(column)
