"""The reference that kernels are tested against: torch's scaled_dot_product_attention, one sequence after the other,
over what was gathered from the cache: the sequence's own, so that a weight of zero never meets another request's NaN.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minisgl.attention.base import AttentionBackend, AttentionStep, Tensor
from minisgl.config.model import AttentionSpec, PagedKV
from minisgl.kernel.ops import widened
from minisgl.kvcache.pool import LayerCache

QUERY_BLOCK = 512  # tokens; bounds the mask


class Block(NamedTuple):
    """Some tokens of a sequence, and the sequence up to the last of them."""

    tokens: slice  # of the batch
    slots: Tensor  # [num_keys] int64
    distance: Tensor  # [num tokens, num_keys] int64: from a key to a query; negative: it comes later
    first: int  # position of the first token


class SdpaBackend(AttentionBackend[list[Block]]):
    """Any device, shape and type."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def prepare(self, step: AttentionStep, captured: bool) -> list[Block]:  # noqa: ARG002 (it cannot be captured)
        blocks = []
        for seq, (start, num_new) in enumerate(zip(step.starts.tolist(), step.num_new.tolist(), strict=True)):
            for first in range(0, num_new, QUERY_BLOCK):
                last = min(first + QUERY_BLOCK, num_new)
                tokens = slice(int(step.offsets[seq]) + first, int(step.offsets[seq]) + last)
                slots = step.slots_of(step.rows[seq], np.arange(start + last))
                positions = torch.arange(start + last, device=self._device)
                distance = positions[start + first :, None] - positions
                blocks.append(Block(tokens, torch.from_numpy(slots).to(self._device), distance, start + first))
        return blocks

    def forward(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: list[Block], sinks: Tensor | None = None
    ) -> Tensor:
        assert isinstance(spec.cache, PagedKV)
        out = q.new_empty(*q.shape[:2], spec.cache.v_dim)
        for block in metadata:
            begin = max(0, block.first - spec.window + 1) if spec.window is not None else 0  # before it is none's
            distance = block.distance[:, begin:]
            mask = distance >= 0
            if spec.window is not None:
                mask &= distance < spec.window
            queries = q[block.tokens].transpose(0, 1)
            k, v = (widened(x[block.slots[begin:]], q.dtype).transpose(0, 1) for x in cache)
            out[block.tokens] = attend(queries, k, v, mask, spec, sinks).transpose(0, 1)
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    """q: [heads, tokens, dim]; k, v: [KV heads, keys, dim] → like q."""
    if sinks is None and spec.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    if spec.softcap is not None:
        scores = (scores / spec.softcap).tanh() * spec.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(mask), 1)), -1)
    return scores.softmax(-1)[..., : k.shape[1]].to(v.dtype) @ v
