"""The states of layers that have these in place of keys and values, by slot: those of rows, of the row that pads
captured steps, and snapshots."""

from collections.abc import Iterable

import numpy as np
import torch

from minisgl.config.model import ModelConfig
from minisgl.core import StateCopy


class StatePool:
    """Zeros at first. dtype: in which layers compute; draft_len: tokens that a slot keeps while it is not known whether
    they hold."""

    def __init__(
        self, model: ModelConfig, num_slots: int, draft_len: int, tp_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.device, self._layers = device, dict[int, list[torch.Tensor]]()
        self._stacks: list[torch.Tensor] = []  # [layers, num_slots, …], of all layers of a kind
        for kind in dict.fromkeys(model.states):
            layers = [index for index, spec in enumerate(model.layers) if spec.attention.cache == kind]
            shapes = [(len(layers), num_slots, *shape) for shape in kind.shapes(tp_size, draft_len)]
            stacks = [lazy_zeros(one, torch.float32 if len(one) > 4 else dtype, device) for one in shapes]
            self._layers |= {index: parts for index, *parts in zip(layers, *stacks, strict=True)}
            self._stacks += stacks

    def layer(self, index: int) -> list[torch.Tensor]:
        """Each [num_slots, …], in the order of the kind's `shapes`."""
        return self._layers[index]

    def copy(self, copies: Iterable[StateCopy]) -> None:
        """Make them, one after the other, for all layers. (At once they would take as much again: 50 MB for a slot.)"""
        for source, target in copies:
            for stack in self._stacks:
                stack[:, target] = stack[:, source] if source >= 0 else 0


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose pages the operating system commits on first use (`torch.zeros` writes them all on a CPU)."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros((*shape, dtype.itemsize), np.uint8)).view(dtype)[..., 0]
