"""The KV cache itself: keys and values of each layer, addressed by slot (page * page_size + offset)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from minisgl.config.model import SCALE_BYTES, ModelConfig, PagedKV


class LayerCache(NamedTuple):
    """Keys and values of one layer: [num_slots, heads of this rank, k_dim or v_dim]; in int8 each has its scale behind
    it, the bytes of a float32."""

    k: torch.Tensor
    v: torch.Tensor


class KVPool:
    """The caches of all layers, zero at first.

    Memory is reserved, not touched: on a CPU the kernel commits a page of it when it is first written.
    """

    def __init__(
        self, model: ModelConfig, num_slots: int, tp_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers: list[LayerCache] = []
        for spec in model.layers:
            cache = spec.attention.cache
            assert isinstance(cache, PagedKV), "`config.device` has refused other kinds"
            more = SCALE_BYTES if dtype == torch.int8 else 0
            shapes = ((num_slots, cache.local_heads(tp_size), dim + more) for dim in (cache.k_dim, cache.v_dim))
            self._layers.append(LayerCache(*(_lazy_zeros(shape, dtype, device) for shape in shapes)))

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor, page_size: int) -> None:
        """Write what the pages `sources` hold, in all layers, to the pages `targets`: [n] int64, no target twice."""
        for pages in (x.view(-1, page_size, *x.shape[1:]) for layer in self._layers for x in layer):
            pages.index_copy_(0, targets, pages.index_select(0, sources))


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose pages the operating system commits on first use (`torch.zeros` writes them all on a CPU)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
