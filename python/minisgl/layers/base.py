"""What every layer is built from and how its parameters are filled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from minisgl.distributed.comm import Communicator
from minisgl.errors import ConfigError
from minisgl.kernel.ops import TorchOps

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerEnv:
    """Where layers live and what they compute with; the same for all layers of a model."""

    comm: Communicator
    ops: TorchOps
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised matrix: memory is committed when the loader writes it."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)

    def vector(self, *shape: int) -> nn.Parameter:
        """The same for norms and biases, in the type that the operations want them in."""
        dtype = self.ops.vector_dtype or self.dtype
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=self.device), requires_grad=False)

    def share(self, total: int, what: str) -> int:
        """This rank's part of `total`. Raises: ConfigError when the ranks cannot share it evenly."""
        if total % self.comm.size:
            raise ConfigError(f"--tensor-parallel-size {self.comm.size} does not divide the model's {total} {what}")
        return total // self.comm.size


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Where a part of one checkpoint tensor goes: `target` = tensor[rows] or tensor[rows, cols], converted and, along
    leading dimensions that the checkpoint lacks, repeated."""

    name: str  # in the checkpoint
    shape: tuple[int, ...]  # of the whole checkpoint tensor
    target: Tensor
    rows: tuple[int, int]
    cols: tuple[int, int] | None = None


class Part(NamedTuple):
    """Some of a model's slots, and what is to be called once they are filled."""

    slots: Sequence[WeightSlot]
    finish: Callable[[], None]


class Layer(nn.Module, ABC):
    """A module that says where its checkpoint tensors go."""

    @abstractmethod
    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        """The slots of this layer, whose checkpoint names start with `prefix`."""

    def pack(self) -> None:
        """Called once all slots are filled: bring weights into the layout that the kernels like best."""
        for child in self.children():
            if isinstance(child, Layer):
                child.pack()


class MatrixLayer(Layer):
    """A layer with one matrix, which `pack` replaces where the kernels like another layout better."""

    def __init__(self, env: LayerEnv, num_rows: int, num_cols: int) -> None:
        super().__init__()
        self._ops, self._comm = env.ops, env.comm
        self.weight = env.empty(num_rows, num_cols)
        self._packed: Any = None

    @property
    def matrix(self) -> Any:
        """`weight` as the operations take it."""
        return self.weight if self._packed is None else self._packed

    def pack(self) -> None:
        packed = self._packed_weight()
        if packed is not self.weight:
            self._packed = packed
            self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    @abstractmethod
    def _packed_weight(self) -> Any: ...


def whole(name: str, target: Tensor) -> WeightSlot:
    """A vector that every rank holds entirely."""
    return WeightSlot(name, (target.shape[-1],), target, (0, target.shape[-1]))
