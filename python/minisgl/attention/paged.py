"""Attention over paged KV on GPUs, by one backend for prefill and one for decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from minisgl.attention.base import AttentionBackend, AttentionStep
from minisgl.config.model import AttentionSpec
from minisgl.kvcache.pool import LayerCache

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


class PagedMetadata(NamedTuple):
    """num_decode: how many tokens, which come first, decode. None: there are no such sequences."""

    num_decode: int
    decode: object
    prefill: object


class PagedAttention:
    """The sequences that decode, and those that do not, as a step of its own each."""

    def __init__(self, prefill: AttentionBackend[object], decode: AttentionBackend[object]) -> None:
        self._prefill, self._decode = prefill, decode
        self.plans_captured = decode.plans_captured

    def prepare(self, step: AttentionStep, captured: bool) -> PagedMetadata:
        num, end = step.num_decode, len(step.rows)
        decode = self._decode.prepare(step.part(0, num), captured) if num else None
        return PagedMetadata(num, decode, self._prefill.prepare(step.part(num, end), captured) if num < end else None)

    def forward(self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: PagedMetadata) -> Tensor:
        num = metadata.num_decode
        if metadata.prefill is None:
            return self._decode.forward(q, cache, spec, metadata.decode)
        out = self._prefill.forward(q[num:], cache, spec, metadata.prefill)
        return torch.cat((self._decode.forward(q[:num], cache, spec, metadata.decode), out)) if num else out
