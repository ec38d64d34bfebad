"""How the weights of linear layers are stored in a checkpoint and held in memory: one class for each format.

A weight [out, in] may have several tensors: with the values, perhaps packed or transposed, their scales and zeros. A
format makes this rank's tensors (`create`), says which part of which tensor of the checkpoint goes into them (`slots`),
and turns them, once they are filled, into what layers multiply with (`matrix`, `experts`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from minisgl.config.model import MoE
from minisgl.kernel.ops import Experts, LayerOps, Matrix, loop_over_experts

Tensor = torch.Tensor
Shape = tuple[int, int]
Tensors = dict[str, Tensor]  # of one weight, or of a stack of experts, by names that the format chooses


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


@dataclass(frozen=True, slots=True)
class Shard:
    """What this rank holds of one linear layer of the checkpoint: `rows`, and of those `cols`, of a weight of `shape`
    [out, in]. They are rows `at` and following of the rank's own weight, which may hold several layers', and are
    followed by `padding` rows of zeros, where the tensors do not exist yet."""

    shape: Shape
    rows: tuple[int, int]
    cols: tuple[int, int] | None = None
    at: int = 0
    padding: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The shard's rows of this rank's tensor, [out, ...]."""
        return tensor[self.at : self.at + self.rows[1] - self.rows[0]]


class WeightFormat(ABC):
    """One way of storing weights. Unless a format says otherwise, checkpoints have one tensor `weight`, [out, in]."""

    def create(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensors:
        """Uninitialised tensors of a weight of `shape` [out, in], or of a stack [num_experts, out, in].

        dtype: of activations. Memory is committed when the loader writes it. A format that knows a weight's type by its
        name returns {}, and puts its tensors there in `slots`.
        Raises: ConfigError when the format cannot hold the shape, because it has groups of another size.
        """
        return {"weight": torch.empty(shape, dtype=dtype, device=device)}

    def slots(self, prefix: str, tensors: Tensors, shard: Shard) -> Iterator[WeightSlot]:
        """What is to be read for a shard from the checkpoint's tensors, whose names start with `prefix`.

        Raises: ConfigError when the shard cuts through a group of values with one scale.
        """
        yield WeightSlot(f"{prefix}weight", shard.shape, shard.of(tensors["weight"]), shard.rows, shard.cols)

    @abstractmethod
    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:
        """The filled tensors as a matrix, which keeps what it needs of them. activation: of its `gate_up`."""

    def experts(self, ops: LayerOps, gate_up: Tensors, down: Tensors, spec: MoE) -> Experts:
        """The filled tensors of two stacks as a mixture of experts: a matrix each, where no kernel takes them all."""
        first = [self.matrix(ops, expert, spec.activation) for expert in experts_of(gate_up, spec.num_experts)]
        second = [self.matrix(ops, expert) for expert in experts_of(down, spec.num_experts)]
        return lambda x, logits: loop_over_experts(x, logits, first, second, spec)


def experts_of(stack: Tensors, num_experts: int) -> Iterator[Tensors]:
    """The tensors of each expert: views of those of the stack, or the stack itself, while it has none."""
    for i in range(num_experts):
        yield {name: tensor[i] for name, tensor in stack.items()} if stack else stack


class Dense(WeightFormat):
    """Weights as they are stored."""

    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:
        return ops.matrix(tensors["weight"], activation)

    def experts(self, ops: LayerOps, gate_up: Tensors, down: Tensors, spec: MoE) -> Experts:
        return ops.experts(gate_up["weight"], down["weight"], spec) or super().experts(ops, gate_up, down, spec)


class Int8(WeightFormat):
    """Rounded to int8, with a scale for each row, once they are loaded."""

    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:
        return ops.int8_matrix(tensors["weight"], activation)


DENSE = Dense()
