"""How the weights of linear layers are stored in a checkpoint and held in memory: one class for each format.

A weight [out, in] may have several tensors: with the values, perhaps packed or transposed, their scales and zeros. A
format makes this rank's tensors (`create`), says which part of which tensor of the checkpoint goes into them (`slots`),
and turns them, once they are filled, into what layers multiply with (`matrix`, `experts`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch

from minisgl.config.model import MoE
from minisgl.kernel.ops import Biases, Experts, LayerOps, Matrix, Stacked, loop_over_experts
from minisgl.kernel.packed import Float8, Packed

Tensor = torch.Tensor
Shape = tuple[int, int]
# Layers that may be stored one below the other, as one.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED |= {"in_proj_qkv": ("in_proj_q", "in_proj_k", "in_proj_v")}
FUSED |= {"in_proj": ("before_proj", "behind_proj", "value_proj")}
Tensors = dict[str, Tensor]  # of one weight, or of a stack of experts, by names that the format chooses


class Header(NamedTuple):
    """What a checkpoint says of a tensor, a scalar being [1]. dtype: "float32", "bfloat16", …, or safetensors' name."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Where a part of one checkpoint tensor goes: `target` = tensor[rows] or tensor[rows, cols], converted and, along
    leading dimensions that the checkpoint lacks, repeated."""

    name: str  # in the checkpoint
    shape: tuple[int, ...]  # of the whole checkpoint tensor
    target: Tensor
    rows: tuple[int, int]
    cols: tuple[int, int] | None = None
    transform: Callable[[Tensor], Tensor] | None = None  # of that part, which is then read at once, to target's shape
    order: Tensor | None = None  # which of its rows each of the target's is, int64; it is then read at once, too


@dataclass(frozen=True, slots=True)
class Shard:
    """What this rank holds of one linear layer of the checkpoint: `rows`, and of those `cols`, of a weight of `shape`
    [out, in]. They are rows `at` and following of the rank's own weight, which may hold several layers', and
    `padding` rows of zeros follow them. order: which of the checkpoint's rows each of them is, int64."""

    shape: Shape
    rows: tuple[int, int]
    cols: tuple[int, int] | None = None
    at: int = 0
    padding: int = 0
    order: torch.Tensor | None = None

    @property
    def local(self) -> Shape:
        """The shard's own shape."""
        return self.rows[1] - self.rows[0] if self.order is None else len(self.order), self.span[1] - self.span[0]

    @property
    def span(self) -> tuple[int, int]:
        """Its columns."""
        return self.cols or (0, self.shape[1])

    def of(self, tensor: Tensor) -> Tensor:
        """The shard's rows of this rank's tensor, [out, ...]."""
        return tensor[self.at : self.at + self.local[0]]


class WeightFormat:
    """One way of storing weights: unless a format says otherwise, in one tensor `weight`, [out, in], and in full."""

    def create(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensors:
        """Uninitialised tensors of a weight of `shape` [out, in], or of a stack [num_experts, out, in].

        dtype: of activations. Memory is committed when the loader writes it.
        Raises: ConfigError when the format cannot hold the shape, because it has groups of another size.
        """
        return {"weight": torch.empty(shape, dtype=dtype, device=device)}

    def slots(self, prefix: str, tensors: Tensors, shard: Shard) -> Iterator[WeightSlot]:
        """What is to be read for a shard from the checkpoint's tensors, whose names start with `prefix`.

        Raises: ConfigError when the shard cuts through a group of values with one scale.
        """
        yield WeightSlot(f"{prefix}weight", shard.shape, shard.of(tensors["weight"]), shard.rows, shard.cols)

    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:
        """The filled tensors as a matrix, which keeps what it needs of them. activation: of its `gate_up`."""
        return ops.matrix(tensors["weight"], activation)

    def stacked(self, stack: Tensors) -> Stacked | None:
        """The filled tensors of a stack, for a kernel that takes all experts. None: it would not know them."""
        return stack.get("weight")

    def experts(self, ops: LayerOps, gate_up: Tensors, down: Tensors, spec: MoE, biases: Biases = None) -> Experts:
        """The filled tensors of two stacks as a mixture of experts: a matrix each, where no kernel takes them all."""
        if kernel := ops.experts((self.stacked(gate_up), self.stacked(down)), spec, biases):
            return kernel
        first = [self.matrix(ops, expert, spec.activation) for expert in experts_of(gate_up, spec.num_experts)]
        second = [self.matrix(ops, expert) for expert in experts_of(down, spec.num_experts)]
        return lambda x, logits, residual=None: loop_over_experts(x, logits, residual, (first, second), spec, biases)


def experts_of(stack: Tensors, num_experts: int) -> Iterator[Tensors]:
    """The tensors of each expert: views of the stack's; side by side, by names; or the stack, while it has none."""
    if any(".experts." in name for name in stack):
        by_name = groupby(stack, lambda name: name.split(".experts.")[1].partition(".")[0])
        yield from ({name: stack[name] for name in names} for _, names in by_name)
    else:
        for i in range(num_experts):
            yield {name: tensor[i] for name, tensor in stack.items()} if stack else stack


class ByName(WeightFormat, ABC):
    """Makes what a linear layer needs once its name is known: layers that are rows of one matrix may differ. Names of
    tensors begin as in the checkpoint, and one layer's stand beside one another."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """dtype: of activations, and of what is stored in full."""
        self.dtype, self._device = dtype, device

    def create(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensors:  # noqa: ARG002
        return {}

    def add(self, tensors: Tensors, name: str, shard: Shard, width: int, dtype: torch.dtype) -> Tensor:
        """A new tensor [the shard's rows, width]; rows of padding, which are zeros, follow it."""
        num_rows = shard.local[0]
        tensors[name] = whole = torch.empty(num_rows + shard.padding, width, dtype=dtype, device=self._device)
        whole[num_rows:] = 0
        return whole[:num_rows]

    def slots(self, prefix: str, tensors: Tensors, shard: Shard) -> Iterator[WeightSlot]:
        target = self.add(tensors, f"{prefix}weight", shard, shard.local[1], self.dtype)
        yield WeightSlot(f"{prefix}weight", shard.shape, target, shard.rows, shard.cols)

    @abstractmethod
    def part(self, prefix: str, tensors: Tensors) -> Packed | Tensor:
        """One layer's filled tensors, `prefix` left out of their names: packed, or in full."""

    def parts(self, tensors: Tensors) -> list[Packed | Tensor]:
        """The layers of one matrix."""
        layers = groupby(tensors, lambda name: name.rpartition(".")[0] + ".")
        return [self.part(p, {name.removeprefix(p): tensors[name] for name in names}) for p, names in layers]

    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:
        parts = self.parts(tensors)
        packed = [part for part in parts if not isinstance(part, Tensor)]
        if packed and len(packed) == len(parts):
            return ops.packed_matrix(packed, self.dtype, activation)
        widest = ops.vector_dtype(self.dtype)  # what else than `dtype` can be computed with
        full = [part if isinstance(part, Tensor) else part.dequantize() for part in parts]
        kept = {weight.dtype if weight.dtype in (self.dtype, widest) else widest for weight in full}
        dtype = kept.pop() if len(kept) == 1 else widest
        full = [weight.to(dtype) for weight in full]
        return ops.matrix(torch.cat(full) if len(full) > 1 else full[0], activation)

    def stacked(self, stack: Tensors) -> Stacked:
        return self.dtype, (self.parts(tensors) for tensors in experts_of(stack, 0))


class Int8(WeightFormat):
    """Rounded to int8, with a scale for each row, once they are loaded."""

    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:
        return ops.int8_matrix(tensors["weight"], activation)


class Rounded(WeightFormat):
    """Rounded to e4m3, with a scale for each row, once they are loaded: rows of a layer that the host holds go to the
    device a few at a time, which never holds it in full. loaded: where that layer lies; device: that computes."""

    _ROWS_BYTES = 64 << 20

    def __init__(self, loaded: torch.device, device: torch.device) -> None:
        self._loaded, self._device = loaded, device

    def create(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensors:  # noqa: ARG002
        return super().create(shape, dtype, self._loaded)

    def _rounded(self, weight: Tensor) -> list[Float8]:
        step = 128 * max(1, self._ROWS_BYTES // (128 * weight.shape[1] * weight.itemsize))  # rows
        return [Float8.of(weight[first : first + step].to(self._device)) for first in range(0, len(weight), step)]

    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:
        return ops.packed_matrix(self._rounded(tensors["weight"]), tensors["weight"].dtype, activation)

    def stacked(self, stack: Tensors) -> Stacked:
        return stack["weight"].dtype, (self._rounded(weight) for weight in stack["weight"])


DENSE = WeightFormat()
