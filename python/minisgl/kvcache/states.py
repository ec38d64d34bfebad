"""The states of layers that have these in place of keys and values, by slot: those of rows, of the row that pads
captured steps, and snapshots."""

from collections.abc import Iterable
from itertools import groupby

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
            shapes = {shape: torch.float32 if len(shape) > 2 else dtype for shape in kind.shapes(tp_size, draft_len)}
            stacks = [lazy_zeros((len(layers), num_slots, *shape), kept, device) for shape, kept in shapes.items()]
            self._layers |= {index: parts for index, *parts in zip(layers, *stacks, strict=True)}
            self._stacks += stacks

    def layer(self, index: int) -> list[torch.Tensor]:
        """Each [num_slots, …], in the order of the kind's `shapes`."""
        return self._layers[index]

    def copy(self, copies: Iterable[StateCopy]) -> None:
        """Make them, one after the other, for all layers; zeros that follow one another at once. (Copies at once would
        hold as much again: a slot may take 50 MB.)"""
        for is_new, group in groupby(copies, key=lambda copy: copy.source < 0):
            pairs = list(group)
            targets = torch.tensor([copy.target for copy in pairs], device=self.device)
            for stack in self._stacks:
                if is_new:
                    stack.index_fill_(1, targets, 0)
                for source, target in () if is_new else pairs:
                    stack[:, target] = stack[:, source]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose pages the operating system commits on first use (`torch.zeros` writes them all on a CPU)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
