"""The KV cache itself: one pair of tensors per layer, addressed by slot (page * page_size + offset)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from minisgl.config.model import ModelConfig


class LayerCache(NamedTuple):
    """Keys and values of one layer: [num_slots, heads of this rank, k_dim or v_dim]."""

    k: torch.Tensor
    v: torch.Tensor


class KVPool:
    """K and V of every layer: [num_slots, num_local_kv_heads, head_dim], zero at first.

    Memory is reserved, not touched: on a CPU the kernel commits a page of it when it is first written.
    """

    def __init__(
        self, model: ModelConfig, num_slots: int, tp_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (model.num_layers, num_slots, max(1, model.num_kv_heads // tp_size), model.head_dim)
        self.keys, self.values = (_lazy_zeros(shape, dtype, device) for _ in range(2))
        pairs = zip(self.keys.unbind(0), self.values.unbind(0), strict=True)
        self._layers = [LayerCache(k, v) for k, v in pairs]

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor, page_size: int) -> None:
        """Write what the pages `sources` hold, in all layers, to the pages `targets`: [n] int64, no target twice."""
        for cache in (self.keys, self.values):
            pages = cache.view(len(cache), -1, page_size, *cache.shape[2:])
            pages.index_copy_(1, targets, pages.index_select(1, sources))

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose pages the operating system commits on first use (`torch.zeros` writes them all on a CPU)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
