"""The reference backend: gathers each sequence's KV, then calls torch's scaled_dot_product_attention.

Single-token sequences (decode) are gathered together, padded to the longest, and computed in one call; longer ones
(prefill) one by one. Padding repeats the sequence's own first slot, so that a weight of zero never meets another
request's NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from minisgl.attention.base import AttentionBatch, IntArray
from minisgl.errors import ConfigError

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """All single-token sequences of a step, for one window."""

    slots: Tensor  # [batch * max_len] int64
    mask: Tensor | None  # [batch, 1, 1, max_len] bool; None where nothing is padded
    max_len: int


@dataclass(frozen=True, slots=True)
class PrefillSeq:
    """One longer sequence, for one window."""

    begin: int  # its tokens in the batch
    end: int
    slots: Tensor  # [kv_len] int64
    mask: Tensor | None  # [num_new, kv_len] bool; None: causal from position 0


@dataclass(frozen=True, slots=True)
class SdpaMetadata:
    """Per window: the groups. `decode_tokens` is None when the decode tokens are the whole batch."""

    has_decode: bool
    decode_tokens: Tensor | None  # [num decode tokens] int64: where they are in the batch
    decode: dict[int | None, DecodeGroup] = field(default_factory=dict)
    prefill: dict[int | None, list[PrefillSeq]] = field(default_factory=dict)


class SdpaBackend:
    """See the module. windows: every window that some layer has."""

    def __init__(self, windows: Iterable[int | None], device: torch.device) -> None:
        self._windows = tuple(dict.fromkeys(windows))
        self._device = device

    def prepare(self, batch: AttentionBatch) -> SdpaMetadata:
        single = np.flatnonzero(batch.num_new == 1)
        longer = np.flatnonzero(batch.num_new > 1)
        tokens = self._tensor(batch.offsets[single]) if len(longer) else None
        metadata = SdpaMetadata(has_decode=len(single) > 0, decode_tokens=tokens)
        for window in self._windows:
            if len(single):
                metadata.decode[window] = self._decode_group(batch, single, window)
            metadata.prefill[window] = [self._prefill_seq(batch, int(i), window) for i in longer]
        return metadata

    def _decode_group(self, batch: AttentionBatch, seqs: IntArray, window: int | None) -> DecodeGroup:
        ends = batch.starts[seqs] + 1
        begins = np.maximum(ends - window, 0) if window else np.zeros_like(ends)
        lens = ends - begins
        max_len = int(lens.max())
        offsets = np.arange(max_len)
        valid = offsets < lens[:, None]
        positions = begins[:, None] + np.where(valid, offsets, 0)
        slots = batch.slots_of(batch.rows[seqs][:, None], positions)
        mask = None if valid.all() else self._tensor(valid[:, None, None, :])
        return DecodeGroup(self._tensor(slots.reshape(-1)), mask, max_len)

    def _prefill_seq(self, batch: AttentionBatch, seq: int, window: int | None) -> PrefillSeq:
        start, end = int(batch.starts[seq]), int(batch.starts[seq] + batch.num_new[seq])
        begin = max(start + 1 - window, 0) if window else 0
        slots = self._tensor(batch.slots(int(batch.rows[seq]), begin, end))
        mask = None
        if start > 0 or (window is not None and end > window):
            queries, keys = np.arange(start, end)[:, None], np.arange(begin, end)
            allowed = keys <= queries
            mask = self._tensor(allowed & (keys > queries - window) if window else allowed)
        return PrefillSeq(int(batch.offsets[seq]), int(batch.offsets[seq + 1]), slots, mask)

    def _tensor(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def forward(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, metadata: SdpaMetadata
    ) -> Tensor:
        prefill = metadata.prefill[window]
        if not prefill:
            return _decode(q, k_cache, v_cache, metadata.decode[window])
        out = torch.empty_like(q)
        for seq in prefill:
            out[seq.begin : seq.end] = _prefill(q[seq.begin : seq.end], k_cache, v_cache, seq)
        if metadata.decode_tokens is not None and metadata.has_decode:
            tokens = metadata.decode_tokens
            out[tokens] = _decode(q[tokens], k_cache, v_cache, metadata.decode[window])
        return out


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: DecodeGroup) -> Tensor:
    """q: [batch, num_qo_heads, head_dim], one token each. Heads that share a KV head act as so many queries."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    shape = (batch, group.max_len, num_kv_heads, head_dim)
    k = k_cache.index_select(0, group.slots).view(shape).transpose(1, 2)
    v = v_cache.index_select(0, group.slots).view(shape).transpose(1, 2)
    q = q.view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask).reshape(batch, num_heads, head_dim)


def _prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq: PrefillSeq) -> Tensor:
    """q: [num_new, num_qo_heads, head_dim] of one sequence."""
    k = k_cache.index_select(0, seq.slots).transpose(0, 1)[None]
    v = v_cache.index_select(0, seq.slots).transpose(0, 1)[None]
    q = q.transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seq.mask, is_causal=seq.mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


BACKENDS = {"sdpa": SdpaBackend}


def create_backend(name: str, windows: Iterable[int | None], device: torch.device) -> SdpaBackend:
    """Raises: ConfigError for a backend that this build does not have."""
    if name not in BACKENDS:
        raise ConfigError(f"attention backend {name!r} is not available (available: {', '.join(BACKENDS)})")
    return BACKENDS[name](windows, device)
