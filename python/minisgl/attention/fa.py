"""FlashAttention-3 (arXiv 2407.08608) by the optional package `sglang-kernel`."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from minisgl.errors import ConfigError

Tensor = torch.Tensor


class FlashAttentionBackend:
    """Same interface as `TritonBackend`. Raises: ConfigError when the package cannot be imported."""

    def __init__(self, _shape: Any, device: torch.device) -> None:
        try:
            self._attend = importlib.import_module("sgl_kernel.flash_attn").flash_attn_with_kvcache
        except (ImportError, OSError) as error:  # OSError: a library of another CUDA version
            raise ConfigError(
                f"--attention-backend fa needs sgl_kernel ({error}): pip install sglang-kernel"
            ) from error
        self._planned: Any = None
        self._pages = torch.empty((0, 0), dtype=torch.int32, device=device)

    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, batch: Any) -> Tensor:
        """q: [num_tokens, num_qo_heads, head_dim] → the same shape."""
        if batch is not self._planned:  # every layer gets the same object
            self._planned, self._pages = batch, _pages(batch)
        return self._run(q, k_cache, v_cache, window, batch, self._pages, batch.max_q_len)

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, batch: Any) -> Tensor:
        """As `prefill`, of one token per sequence. May be captured: each layer gathers the pages anew, as what an eager
        run gathered must not be frozen into a graph."""
        return self._run(q, k_cache, v_cache, window, batch, _pages(batch), 1)

    def _run(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, batch: Any, pages: Tensor, max_q_len: int
    ) -> Tensor:
        shape = (-1, batch.page_size, *k_cache.shape[1:])
        out: Tensor = self._attend(
            q=q,
            k_cache=k_cache.view(shape),
            v_cache=v_cache.view(shape),
            cache_seqlens=batch.seq_lens,
            page_table=pages,
            cu_seqlens_q=batch.cu_q,
            max_seqlen_q=max_q_len,
            causal=True,
            window_size=(window - 1, 0) if window else (-1, -1),
        )
        return out


def _pages(batch: Any) -> Tensor:
    """[num_seqs, max pages]: each sequence's row of the page table."""
    max_pages = -(-batch.max_seq_len // batch.page_size)
    pages: Tensor = batch.page_table[:, :max_pages].index_select(0, batch.rows)
    return pages
