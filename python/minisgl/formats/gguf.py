"""Weights as GGUF files have them: rows of blocks, each weight of its own type. They stay in the mapped file until they
are packed, and are never made larger on the way."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from minisgl.formats.base import ByName, Shard, Tensor, Tensors, WeightSlot
from minisgl.gguf.model import NAMES, GgufModel, StoredTensor, open_model
from minisgl.kernel.ops import LayerOps, Matrix
from minisgl.kernel.packed import Blocks, Packed

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\.\w+\.weight)")


class Gguf(ByName):
    """A layer's type is known from the file. Its tensors are bytes, [out, bytes of a row], by their names in a Hugging
    Face checkpoint: parts of the mapped file, where that has all rows in our order.

    dtype: of activations. device: that computes.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._model, self._slices, self._found = open_model(path), open_slices(path), dict[str, Slice]()

    def slots(self, prefix: str, tensors: Tensors, shard: Shard) -> Iterator[WeightSlot]:
        name, (begin, end) = f"{prefix}weight", shard.rows
        target, rows = torch.empty(0, dtype=torch.uint8), (begin, begin)  # nothing is to be read, or the loader objects
        found, first = self._slices.get(name), 0
        if match := _EXPERT.fullmatch(name):  # in a stack of all
            found, first = self._slices.get(match[1] + match[3]), int(match[2]) * shard.shape[0]
        if found is not None and found.get_shape()[-2:] == shard.shape:
            self._found[name], data = found, found.bytes.flatten(0, -2)[first:, found.span(*shard.span)]
            if shard.padding or shard.order is not None or found.rows is not None:
                tensors[name] = torch.zeros(end - begin + shard.padding, data.shape[1], dtype=torch.uint8)
                target, rows = tensors[name][: end - begin].view(found.dtype), shard.rows
            else:
                tensors[name] = data[begin:end]
        yield WeightSlot(name, shard.shape, target, rows)

    def part(self, prefix: str, tensors: Tensors) -> Packed | Tensor:
        found, data = self._found[f"{prefix}weight"], tensors["weight"]
        kind, columns = found.stored.kind, found.columns
        if kind.scales:
            halves = data.view(torch.float16).view(len(data), -1, kind.num_bytes // 2)
            if not all(halves[..., at // 2].sum(dtype=torch.float32).isfinite() for at in kind.scales):
                raise found.stored.wrong("has scales that are infinite, or not a number")
        if kind.name in _FLOATS and columns is not None:
            data, columns = data.view(found.dtype)[:, columns.argsort()].view(torch.uint8), None
        data = data.contiguous().to(self._device)
        if kind.name in _FLOATS and not (kind.name == "F16" and self._device.type == "cpu"):  # where that is kept
            return data.view(found.dtype)
        return Blocks(kind.name, data, data.shape[1] // kind.num_bytes * kind.values, columns)

    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:
        matrix = super().matrix(ops, tensors, activation)
        self._model.release()
        return matrix


@dataclass(frozen=True, slots=True)
class Slice:
    """A tensor as a Hugging Face checkpoint has it, of which parts can be had, as safetensors has them. rows: which of
    the file's each of ours is; columns: which of ours each of the file's is, int64; None: they are in order. is_decay:
    it is the logarithm of what the file has, times -1."""

    model: GgufModel
    stored: StoredTensor
    rows: Tensor | None = None
    columns: Tensor | None = None
    is_decay: bool = False

    def get_dtype(self) -> str:
        return self.stored.kind.name

    def get_shape(self) -> tuple[int, ...]:
        return self.stored.shape if self.rows is None else (len(self.rows), *self.stored.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of parts: the floats that they are, or bytes."""
        return _FLOATS.get(self.stored.kind.name, torch.uint8)

    @property
    def bytes(self) -> Tensor:
        """Of the tensor in the mapped file: [..., bytes of a row]."""
        at = self.stored
        data = torch.frombuffer(at.file.data, dtype=torch.uint8, count=at.num_bytes, offset=at.offset)
        return data.view(*at.shape[:-1], -1)

    def __getitem__(self, index: tuple[int | slice, ...]) -> Tensor:
        data = self.bytes.view(self.dtype)
        part = data[index].clone() if self.rows is None else data[self.rows[index]]
        self.model.release()
        return part.float().neg().log() if self.is_decay else part

    def span(self, begin: int, end: int) -> slice:
        """Where in a row columns lie. Raises: ConfigError within a block, or where they are in another order."""
        kind, size = self.stored.kind, self.stored.shape[-1]
        column = next((column for column in (begin, end) if column % kind.values), None)
        if column is not None or (self.columns is not None and (begin, end) != (0, size)):
            reason = f"{kind.name} has blocks of {kind.values} columns, and the ranks' parts begin at column {column}"
            reason = "the heads of its columns take turns" if column is None else reason
            raise self.stored.wrong(f"cannot be shared with --tensor-parallel-size: {reason}")
        return slice(kind.row_bytes(begin), kind.row_bytes(end))


def open_slices(path: Path) -> dict[str, Slice]:
    """The tensors of a file, and of those that it is split into, by their names in a Hugging Face checkpoint: what
    converters have done with them is undone."""
    model, found = open_model(path), dict[str, Slice]()
    config, layout = model.config, model.layout
    for name_in_file, stored in model.stored.items():
        (stem, names), first = model.our_names(name_in_file), 0
        if len(stored.shape) < NAMES["dimensions"].get(stem, 0):
            stored = replace(stored, shape=(*stored.shape[:-1], 1, stored.shape[-1]))
        num_rows, row_bytes = stored.shape[0], stored.num_bytes // stored.shape[0]
        for name in names:  # of parts that lie one below the other
            last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
            keys, kind = NAMES["sizes"].get(last), layout.get("orders", {}).get(last)
            size = prod(config[key] for key in keys) if keys and len(names) > 1 else num_rows // len(names)
            columns = _order("columns", config, stored.shape[-1]) if last in layout.get("columns", ()) else None
            rows = _order(kind, config, num_rows if kind == "groups" else first + size, first, first + size)
            part = replace(stored, shape=(size, *stored.shape[1:]), offset=stored.offset + first * row_bytes)
            found[name] = Slice(model, part if rows is None else stored, rows, columns, last == "A_log")
            first += size
        if first != num_rows:
            raise stored.wrong(f"has {num_rows} rows; by the metadata its parts have {first}")
    return found


def _order(kind: str | None, config: dict[str, Any], count: int, first: int = 0, end: int = -1) -> Tensor | None:
    """Which of `count` features each of ours, [first, end) of them, is; None: they are in order."""
    names = "linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim"
    keys, values, v_dim = (config[name] or 1 for name in names)
    dims = {"pairs": (config["head_dim"] // 2, 2, 1), "groups": (keys, 2, values // keys)}
    dims |= {"heads": (values // keys, keys, 1), "values": (values // keys, keys, v_dim)}
    dims["columns"] = keys, values // keys, v_dim
    kept = {"groups": 0, "values": count - values * v_dim}.get(kind or "", first)
    turned = torch.arange(kept, count).view(-1, *dims.get(kind or "", (1, 1, 1))).transpose(1, 2).flatten()
    rows = torch.cat((torch.arange(kept), turned))[first : end if end >= 0 else count]
    return None if bool((rows.diff() == 1).all()) else rows
