"""The KV cache itself: keys and values of each layer, addressed by slot (page * page_size + offset)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from minisgl.config.model import SCALE_BYTES, ModelConfig, PagedKV
from minisgl.kvcache.states import StatePool, lazy_zeros


class LayerCache(NamedTuple):
    """Keys and values of a layer: [num_slots, heads of this rank, k_dim or v_dim], in int8 a float32's bytes more."""

    k: torch.Tensor
    v: torch.Tensor


class KVPool:
    """The caches of all layers, zero at first. num_slots: of layers that see all, and of those whose windows slide;
    dtype: of keys and values; states: of the layers that have these, on the device that all are on.

    Memory is reserved, not touched: on a CPU the kernel commits a page of it when it is first written."""

    def __init__(
        self, model: ModelConfig, num_slots: Sequence[int], tp_size: int, dtype: torch.dtype, states: StatePool
    ) -> None:
        self.states = states
        self._layers: dict[int, LayerCache] = {}
        for index, spec in enumerate(model.cached_layers):
            if isinstance(cache := spec.attention.cache, PagedKV) and spec.attention.source is None:
                more = SCALE_BYTES if dtype == torch.int8 else 0
                num = num_slots[spec.attention.window is not None]
                shapes = ((num, cache.local_heads(tp_size), dim + more) for dim in (cache.k_dim, cache.v_dim))
                self._layers[index] = LayerCache(*(lazy_zeros(shape, dtype, states.device) for shape in shapes))

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]
