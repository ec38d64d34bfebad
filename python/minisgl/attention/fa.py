"""FlashAttention-3 (arXiv 2407.08608) by the optional package `sglang-kernel`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from minisgl.attention.base import AttentionBackend, AttentionShape, AttentionStep, importing
from minisgl.config.model import AttentionSpec
from minisgl.kernel.ops import PagedSequences
from minisgl.kvcache.pool import LayerCache

Tensor = torch.Tensor


class FlashMetadata(NamedTuple):
    """pages: of each sequence, as from `gather_pages`; None: they are gathered by each layer, since what was gathered
    before a capture must not be frozen into the graph."""

    seqs: PagedSequences
    pages: Tensor | None
    max_q_len: int


class FlashAttentionBackend(AttentionBackend[FlashMetadata]):
    """Raises: ConfigError when the package cannot be imported."""

    def __init__(self, shape: AttentionShape, _device: torch.device) -> None:
        with importing("fa", "sgl_kernel", "sglang-kernel"):
            from sgl_kernel.flash_attn import flash_attn_with_kvcache
        self._attend = flash_attn_with_kvcache
        self._max_seq_len = shape.max_seq_len

    def prepare(self, step: AttentionStep, captured: bool) -> FlashMetadata:
        seqs = step.on_device()
        pages = None if captured else gather_pages(seqs, int(step.seq_lens.max()))
        return FlashMetadata(seqs, pages, int(step.num_new.max()))

    def forward(self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: FlashMetadata) -> Tensor:
        seqs, pages, window = metadata.seqs, metadata.pages, spec.window
        out: Tensor = self._attend(
            q=q,
            k_cache=cache.k.unflatten(0, (-1, seqs.page_size)),
            v_cache=cache.v.unflatten(0, (-1, seqs.page_size)),
            cache_seqlens=seqs.seq_lens,
            page_table=gather_pages(seqs, self._max_seq_len) if pages is None else pages,
            cu_seqlens_q=seqs.cu_q,
            max_seqlen_q=metadata.max_q_len,
            causal=True,
            window_size=(window - 1, 0) if window else (-1, -1),
        )
        return out


def gather_pages(seqs: PagedSequences, max_seq_len: int) -> Tensor:
    """[n, max pages]: each sequence's row of the page table."""
    max_pages = -(-max_seq_len // seqs.page_size)
    return seqs.page_table[:, :max_pages].index_select(0, seqs.rows)
