"""Our CPU kernel: attention in float32 over a float32 or bfloat16 cache (`csrc/include/minisgl/cpu/attention.h`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from minisgl.attention.base import AttentionBatch
from minisgl.kernel.cpu import CpuOps

Tensor = torch.Tensor


class CpuMetadata(NamedTuple):
    sequences: Tensor  # [n, 4] int64: row of the page table, first token, number of tokens, position of the first
    page_table: Tensor  # [rows, max pages] int32
    page_size: int


class CpuBackend:
    """One for prefill and decode: each sequence is computed as what it is."""

    def __init__(self, ops: CpuOps) -> None:
        self._ops = ops

    def prepare(self, batch: AttentionBatch) -> CpuMetadata:
        sequences = np.stack((batch.rows, batch.offsets[:-1], batch.num_new, batch.starts), 1)
        return CpuMetadata(torch.from_numpy(sequences), torch.from_numpy(batch.page_table), batch.page_size)

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, metadata: CpuMetadata) -> Tensor:
        out = torch.empty(q.shape)
        self._ops.module.attend(self._ops.workers, q, k_cache, v_cache, *metadata, window or 0, out)
        return out
