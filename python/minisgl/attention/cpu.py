"""Our CPU kernel: attention in float32 over a cache of any type but fp8 (`csrc/include/minisgl/cpu/attention.h`)."""

from typing import NamedTuple

import numpy as np
import torch

from minisgl.attention.base import AttentionBackend, AttentionStep
from minisgl.config.model import AttentionSpec
from minisgl.kernel.cpu import CpuOps
from minisgl.kvcache.pool import LayerCache

Tensor = torch.Tensor


class CpuMetadata(NamedTuple):
    sequences: Tensor  # [n, 4] int64: row of the page table, first token, number of tokens, position of the first
    page_table: Tensor  # [rows, max pages] int32
    page_size: int


class CpuBackend(AttentionBackend[CpuMetadata]):
    """One for prefill and decode: each sequence is computed as what it is."""

    def __init__(self, ops: CpuOps) -> None:
        self._ops = ops

    def prepare(self, step: AttentionStep, captured: bool = False) -> CpuMetadata:  # noqa: ARG002 (there are no graphs)
        sequences = np.stack((step.rows, step.offsets[:-1], step.num_new, step.starts), 1)
        return CpuMetadata(torch.from_numpy(sequences), torch.from_numpy(step.page_table), step.page_size)

    def forward(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: CpuMetadata, sinks: Tensor | None = None
    ) -> Tensor:
        out, kind = torch.empty(q.shape), (spec.window or 0, spec.softcap or 0.0, sinks)
        self._ops.module.attend(self._ops.workers, q, *cache, *metadata, *kind, out)
        return out
