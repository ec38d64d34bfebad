"""The reference backend: gathers each sequence's KV, then calls torch's scaled_dot_product_attention.

Single-token sequences (decode) are gathered in groups of similar length, each padded to its longest, as many as fit the
processor's cache: one gather of everything would go through main memory twice more (docs/performance-log.md). Longer
sequences (prefill) come one by one, in blocks of queries. Where slots follow one another nothing is copied.

Padding repeats the sequence's own first slot, so that a weight of zero never meets another request's NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from minisgl.attention.base import AttentionBatch, IntArray

Tensor = torch.Tensor

GROUP_BYTES = 4 << 20  # of keys gathered together for decode
QUERY_BLOCK = 512  # of prefill; bounds the mask


@dataclass(frozen=True, slots=True)
class Call:
    """One call of scaled_dot_product_attention: sequences of `num_queries` tokens each, over `kv_len` slots each."""

    tokens: slice  # the queries, of the tokens in the order of `WindowCalls`
    num_seqs: int
    kv_len: int
    slots: Tensor | slice  # [num_seqs * kv_len] int64
    mask: Tensor | None  # added to the scores; broadcasts to [num_seqs, num_kv_heads, queries, kv_len]
    is_causal: bool = False


@dataclass(frozen=True, slots=True)
class WindowCalls:
    """The calls of a layer that has some window. `order`: [num_tokens] int64, the batch's tokens as the calls want
    them, `inverse` puts them back; None where the batch is in that order already."""

    calls: list[Call]
    order: Tensor | None
    inverse: Tensor | None


SdpaMetadata = dict[int | None, WindowCalls]


class SdpaBackend:
    """See the module. windows: every window that some layer has; kv_bytes: of one slot's keys in one layer."""

    def __init__(self, windows: Iterable[int | None], kv_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self._windows = tuple(dict.fromkeys(windows))
        self._group_slots = max(1, GROUP_BYTES // kv_bytes)
        self._dtype, self._device = dtype, device
        self._workspace: dict[str, Tensor] = {}

    def prepare(self, batch: AttentionBatch) -> SdpaMetadata:
        return {window: self._prepare(batch, window) for window in self._windows}

    def _prepare(self, batch: AttentionBatch, window: int | None) -> WindowCalls:
        single, longer = np.flatnonzero(batch.num_new == 1), np.flatnonzero(batch.num_new > 1)
        calls: list[Call] = []
        order: list[IntArray] = []
        for group in self._decode_groups(batch, single, window):
            calls.append(self._decode_call(batch, group, window, sum(map(len, order))))
            order.append(batch.offsets[group])
        for i in longer.tolist():
            calls += self._prefill_calls(batch, i, window, sum(map(len, order)))
            order.append(np.arange(batch.offsets[i], batch.offsets[i + 1]))
        tokens = np.concatenate(order)
        if _consecutive(tokens):
            return WindowCalls(calls, None, None)
        return WindowCalls(calls, self._tensor(tokens), self._tensor(np.argsort(tokens)))

    def _decode_groups(self, batch: AttentionBatch, seqs: IntArray, window: int | None) -> Iterator[IntArray]:
        """Sequences together of at most `_group_slots` slots, padding included; by length if they are not all one."""
        lens = _decode_lens(batch, seqs, window)
        if not len(seqs) or len(seqs) * int(lens.max()) <= self._group_slots:
            yield from [seqs] if len(seqs) else []
            return
        order = np.argsort(lens, kind="stable")
        first = 0
        for i in range(1, len(seqs) + 1):
            if i == len(seqs) or int(lens[order[i]]) * (i + 1 - first) > self._group_slots:
                yield seqs[order[first:i]]
                first = i

    def _decode_call(self, batch: AttentionBatch, seqs: IntArray, window: int | None, token: int) -> Call:
        lens = _decode_lens(batch, seqs, window)
        max_len = int(lens.max())
        offsets = np.arange(max_len)
        valid = offsets < lens[:, None]
        positions = (batch.starts[seqs] + 1 - lens)[:, None] + np.where(valid, offsets, 0)
        slots = batch.slots_of(batch.rows[seqs][:, None], positions)
        mask = None if valid.all() else self._mask(valid)[:, None, None]
        return Call(slice(token, token + len(seqs)), len(seqs), max_len, self._slots(slots.reshape(-1)), mask)

    def _prefill_calls(self, batch: AttentionBatch, seq: int, window: int | None, token: int) -> Iterator[Call]:
        start, end = int(batch.starts[seq]), int(batch.starts[seq] + batch.num_new[seq])
        row, token = int(batch.rows[seq]), token - start  # the query at a position is at token + position
        if start == 0 and (window is None or end <= window):
            yield Call(slice(token, token + end), 1, end, self._slots(batch.slots(row, 0, end)), None, is_causal=True)
            return
        # Query i of a block of n sees keys up to kv_len - n + i: every block's mask is a view of one larger mask.
        size = min(QUERY_BLOCK, end - start)
        longest = min(end, window - 1 + size) if window else end
        keys, queries = np.arange(longest), np.arange(size)[:, None] + (longest - size)
        allowed = (keys <= queries) & (keys > queries - window) if window else keys <= queries
        mask = self._mask(allowed)
        for first in range(start, end, size):
            last = min(first + size, end)
            begin = max(first + 1 - window, 0) if window else 0
            slots = self._slots(batch.slots(row, begin, last))
            part = mask[size - (last - first) :, longest - (last - begin) :]
            yield Call(slice(token + first, token + last), 1, last - begin, slots, part)

    def _mask(self, allowed: np.ndarray[Any, np.dtype[np.bool_]]) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=self._dtype)
        return mask.masked_fill_(torch.from_numpy(~allowed), float("-inf")).to(self._device)

    def _slots(self, slots: IntArray) -> Tensor | slice:
        return slice(int(slots[0]), int(slots[-1]) + 1) if _consecutive(slots) else self._tensor(slots)

    def _tensor(self, array: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def forward(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, metadata: SdpaMetadata
    ) -> Tensor:
        plan = metadata[window]
        if plan.order is not None:
            q = q.index_select(0, plan.order)
        if len(plan.calls) == 1:
            out = self._call(q, k_cache, v_cache, plan.calls[0])
        else:
            out = torch.cat([self._call(q[call.tokens], k_cache, v_cache, call) for call in plan.calls])
        return out if plan.inverse is None else out.index_select(0, plan.inverse)

    def _call(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, call: Call) -> Tensor:
        """q: [num tokens of the call, num_qo_heads, head_dim] → the same shape."""
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = k_cache.shape[1]
        shape = (call.num_seqs, call.kv_len, num_kv_heads, head_dim)
        k = self._gather("k", k_cache, call.slots).view(shape).transpose(1, 2)
        v = self._gather("v", v_cache, call.slots).view(shape).transpose(1, 2)
        if call.num_seqs == num_tokens:  # one query each: the heads that share a KV head act as so many queries
            q = q.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
            return F.scaled_dot_product_attention(q, k, v, call.mask).reshape(num_tokens, num_heads, head_dim)
        q = q.transpose(0, 1)[None]
        gqa = num_heads != num_kv_heads
        out = F.scaled_dot_product_attention(q, k, v, call.mask, is_causal=call.is_causal, enable_gqa=gqa)
        return out[0].transpose(0, 1)

    def _gather(self, name: str, cache: Tensor, slots: Tensor | slice) -> Tensor:
        """The slots' rows of a cache, in a workspace that is kept: a fresh one would be page-faulted in every time."""
        if isinstance(slots, slice):
            return cache[slots]
        size = len(slots)
        workspace = self._workspace.get(name)
        if workspace is None or len(workspace) < size:
            workspace = torch.empty((size * 5 // 4, *cache.shape[1:]), dtype=cache.dtype, device=cache.device)
            self._workspace[name] = workspace
        return torch.index_select(cache, 0, slots, out=workspace[:size])


def _decode_lens(batch: AttentionBatch, seqs: IntArray, window: int | None) -> IntArray:
    """Slots that the only new token of each sequence sees."""
    ends = batch.starts[seqs] + 1
    return np.minimum(ends, window) if window else ends


def _consecutive(numbers: IntArray) -> bool:
    """Whether each number is the one before it plus one."""
    return len(numbers) - 1 == numbers[-1] - numbers[0] and bool((np.diff(numbers) == 1).all())
