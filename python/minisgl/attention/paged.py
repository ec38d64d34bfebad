"""Attention on a device that holds the page table: one backend for prefill, one for decode, in one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from minisgl.attention.base import AttentionBatch, PagedBatch, PagedStep

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What kernels and workspaces are made for; heads are those of this rank."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int
    max_running_requests: int
    max_seq_len: int
    windows: tuple[int | None, ...] = (None,)  # that layers have


class PrefillBackend(Protocol):
    """q: [num_tokens, num_qo_heads, head_dim], perhaps strided between tokens; caches: [num_slots, num_kv_heads,
    head_dim]; window: tokens that a position sees, itself included → like q, contiguous."""

    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, batch: PagedBatch) -> Tensor: ...


class DecodeBackend(Protocol):
    """As `PrefillBackend`, for one token per sequence; captured in CUDA graphs, so nothing may depend on the values on
    the device but what the device does. One that plans on the host has a method `plan_decode(batch, graph)` too, called
    before each step, and before a step is captured."""

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, batch: PagedBatch) -> Tensor: ...


class PagedAttention:
    """An `AttentionBackend` of two."""

    def __init__(self, prefill: PrefillBackend, decode: DecodeBackend) -> None:
        self._prefill, self._decode = prefill, decode
        self.plan_decode: Callable[[PagedBatch, bool], None] | None = getattr(decode, "plan_decode", None)

    def prepare(self, batch: AttentionBatch) -> PagedStep:
        assert batch.paged is not None
        if self.plan_decode is not None and batch.paged.num_decode:
            self.plan_decode(batch.paged.decode, False)
        return batch.paged

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, metadata: PagedStep) -> Tensor:
        num = metadata.num_decode
        if metadata.prefill is None:
            return self._decode.decode(q, k_cache, v_cache, window, metadata.decode)
        out = self._prefill.prefill(q[num:], k_cache, v_cache, window, metadata.prefill)
        if num == 0:
            return out
        return torch.cat((self._decode.decode(q[:num], k_cache, v_cache, window, metadata.decode), out))
