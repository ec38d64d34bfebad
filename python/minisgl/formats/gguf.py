"""Weights as GGUF files have them: rows of blocks, each weight of its own type. They stay in the mapped file until they
are packed, and are never made larger on the way."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from minisgl.formats.base import ByName, Shard, Tensors, WeightSlot
from minisgl.gguf.model import NAMES, GgufModel, StoredTensor, open_model
from minisgl.kernel.ops import LayerOps, Matrix
from minisgl.kernel.packed import Blocks, Packed

Tensor = torch.Tensor

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\.\w+\.weight)")
_CHECKED_BYTES = 16 << 20


class Gguf(ByName):
    """A layer's type is known from the file. Its tensors are bytes, [out, bytes of a row], by their names in a Hugging
    Face checkpoint: parts of the mapped file, where that has all rows in our order.

    dtype: of activations. device: that computes.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._model, self._slices = open_model(path), open_slices(path)

    def slots(self, prefix: str, tensors: Tensors, shard: Shard) -> Iterator[WeightSlot]:
        name, (begin, end) = f"{prefix}weight", shard.rows
        found, data = self._rows(name)
        if found is None or found.shape[-2:] != shard.shape:  # the loader says what is wrong
            yield WeightSlot(name, shard.shape, torch.empty(0, dtype=torch.uint8), (begin, begin))
            return
        if shard.cols is not None:
            data = data[:, slice(*(_bytes_of(found, shard.shape[1], column) for column in shard.cols))]
        if shard.padding or shard.order is not None or found.rows is not None:
            tensors[name] = torch.zeros(end - begin + shard.padding, data.shape[1], dtype=torch.uint8)
            target = _typed(tensors[name][: end - begin], found.stored)
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

    def _rows(self, name: str) -> tuple["Slice | None", Tensor]:
        """What the file has for a weight, perhaps in a stack of all experts', and its bytes: [out, bytes of a row]."""
        if found := self._slices.get(name):
            return found, bytes_of(found.stored)
        if match := _EXPERT.fullmatch(name):
            found = self._slices.get(match[1] + match[3])
            if found is not None and int(match[2]) < found.shape[0]:
                return found, bytes_of(found.stored)[int(match[2])]
        return None, torch.empty(0)

    def _blocks(self, name: str, data: Tensor) -> Blocks:
        found, _ = self._rows(name)
        assert found is not None
        kind, step = found.stored.kind, max(1, _CHECKED_BYTES // data.shape[1])
        for begin in range(0, len(data) if kind.scales else 0, step):
            rows = data[begin : begin + step].view(torch.float16)
            blocks = rows.view(len(rows), -1, kind.num_bytes // 2)
            if not all(blocks[..., offset // 2].float().sum().isfinite() for offset in kind.scales):
                raise found.stored.wrong("has scales that are infinite, or not a number")
        num_in, columns = data.shape[1] // kind.num_bytes * kind.values, found.columns
        if columns is not None and kind.name in _FLOATS:
            data, columns = _typed(data, found.stored)[:, columns.argsort()].view(torch.uint8), None
        return Blocks(kind.name, data.contiguous().to(self._device), num_in, columns)


class Slice:
    """A tensor as a Hugging Face checkpoint has it, of which parts can be had, as safetensors has them: some rows of one
    of the file's. Parts of tensors that are no floats are bytes.

    rows: which of the tensor's each of ours is, [out] int64; columns: which of ours each of the tensor's is, [in] int64;
    None: they are in order. change: of what is read.
    """

    def __init__(self, model: GgufModel, stored: StoredTensor, rows: range | Tensor, columns: Tensor | None) -> None:
        self.shape = (len(rows), *stored.shape[1:])
        if isinstance(rows, range):
            offset = stored.offset + rows.start * (stored.num_bytes // stored.shape[0])
            stored = replace(stored, shape=self.shape, offset=offset)
        self._model, self.stored, self.columns = model, stored, columns
        self.rows = None if isinstance(rows, range) else rows
        self.change: Callable[[Tensor], Tensor] | None = None

    def get_dtype(self) -> str:
        return self.stored.kind.name

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def __getitem__(self, index: slice | tuple[int, slice]) -> Tensor:
        data = _typed(bytes_of(self.stored), self.stored)
        part = data[index].clone() if self.rows is None else data[self.rows[index]]
        self._model.release()
        return part if self.change is None else self.change(part.float())


class _Layout:
    """What converters have done with the tensors of a Hugging Face checkpoint, as its configuration tells."""

    def __init__(self, model: GgufModel) -> None:
        self._model, c = model, model.read_json("config.json")
        names = "num_attention_heads", "linear_num_key_heads", "linear_num_value_heads"
        heads, self._keys, values = (c[name] or 1 for name in names)
        dim, size, each = c["head_dim"] or c["hidden_size"] // heads, c["linear_value_head_dim"] or 1, values // self._keys
        of_keys, of_kv = self._keys * (c["linear_key_head_dim"] or 1), (c["num_key_value_heads"] or heads) * dim
        self._sizes = {"q_proj": heads * dim, "k_proj": of_kv, "v_proj": of_kv}
        self._sizes |= {"in_proj_q": of_keys, "in_proj_k": of_keys, "in_proj_v": values * size}
        self._turns = {"pairs": (dim // 2, 2, 1), "values": (each, self._keys, size), "heads": (each, self._keys, 1)}

    def slices(self, stored: StoredTensor) -> Iterator[tuple[str, Slice]]:
        """Of a tensor, or of the parts that lie one below the other in it, with our names."""
        (stem, names), layout, first = self._model.our_names(stored.name), self._model.layout, 0
        if len(stored.shape) < NAMES["dimensions"].get(stem, 0):
            stored = replace(stored, shape=(*stored.shape[:-1], 1, stored.shape[-1]))
        for name in names:
            last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
            even = stored.shape[0] // len(names)
            end = first + (self._sizes.get(last, even) if len(names) > 1 else even)
            part = Slice(self._model, stored, *self._order(layout.get("orders", {}).get(last), stored, range(first, end)))
            if layout.get("adds_one") and stored.name.endswith("norm.weight") and stem != "ssm_norm":
                part.change = lambda weight: weight - 1
            if stem == "ssm_a":
                part.change = lambda decay: decay.neg().log()
            yield name, part
            first = end
        if first != stored.shape[0]:
            raise stored.wrong(f"has {stored.shape[0]} rows; by the metadata its parts have {first}")

    def _order(self, kind: str | None, stored: StoredTensor, rows: range) -> tuple[range | Tensor, Tensor | None]:
        """Which of a tensor's rows each of ours is, and which of our columns each of its own; None: they are in order.
        rows: those that are ours in any order."""
        if kind == "groups":
            return torch.arange(stored.shape[0]).view(self._keys, 2, -1)[:, rows.start // len(rows)].flatten(), None
        if kind == "columns":
            return rows, self._turned("values", stored.shape[1]).argsort()
        return rows if kind is None else rows.start + self._turned(kind, len(rows)), None

    def _turned(self, kind: str, count: int) -> Tensor:
        """The order of so many features, all of which, or the last ones, have changed places."""
        dims = self._turns[kind]
        kept = 0 if kind == "pairs" else count - prod(dims)
        return torch.cat((torch.arange(kept), torch.arange(kept, count).view(-1, *dims).transpose(1, 2).flatten()))


def open_slices(path: Path) -> dict[str, Slice]:
    """The tensors of a file, and of those that it is split into, by their names in a Hugging Face checkpoint."""
    model = open_model(path)
    layout = _Layout(model)
    return {name: part for stored in model.stored.values() for name, part in layout.slices(stored)}


def bytes_of(stored: StoredTensor) -> Tensor:
    """The bytes of a tensor in the mapped file: [..., bytes of a row]."""
    data = torch.frombuffer(stored.file.data, dtype=torch.uint8, count=stored.num_bytes, offset=stored.offset)
    return data.view(*stored.shape[:-1], -1)


def _typed(data: Tensor, stored: StoredTensor) -> Tensor:
    """Bytes as the floats that they are, or as bytes."""
    return data.view(_FLOATS.get(stored.kind.name, torch.uint8))


def _bytes_of(found: Slice, num_columns: int, column: int) -> int:
    """Where in a row a column begins. Raises: ConfigError when that is within a block, or they are not in order."""
    kind, problem = found.stored.kind, "cannot be shared with --tensor-parallel-size: "
    if column % kind.values:
        problem += f"{kind.name} has blocks of {kind.values} columns, and the ranks' parts begin at column {column}"
        raise found.stored.wrong(problem)
    if found.columns is not None and column % num_columns:
        raise found.stored.wrong(problem + "its heads take turns")
    return kind.row_bytes(column)
