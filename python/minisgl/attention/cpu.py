"""Our CPU kernel: attention in float32 over a cache of any type but fp8 (`csrc/include/minisgl/cpu/attention.h`)."""

import numpy as np
import torch

from minisgl.attention.base import AttentionBackend, AttentionStep, Tensor
from minisgl.config.model import AttentionSpec
from minisgl.kernel.cpu import CpuOps
from minisgl.kvcache.pool import LayerCache

Metadata = tuple[Tensor, Tensor, int]


class CpuBackend(AttentionBackend[Metadata]):
    """One for prefill and decode: each sequence is computed as what it is."""

    def __init__(self, ops: CpuOps) -> None:
        self._ops = ops

    def prepare(self, step: AttentionStep, captured: bool = False) -> Metadata:  # noqa: ARG002 (there are no graphs)
        """Of each sequence its row of the page table, its first token, how many they are, and the position of the first
        ([n, 4] int64); the page table ([rows, max pages] int32); and tokens of a page."""
        sequences = np.stack((step.rows, step.offsets[:-1], step.num_new, step.starts), 1)
        return torch.from_numpy(sequences), torch.from_numpy(step.page_table), step.page_size

    def forward(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: Metadata, sinks: Tensor | None = None
    ) -> Tensor:
        out, kind = torch.empty(q.shape), (spec.window or 0, spec.softcap or 0.0, sinks)
        self._ops.module.attend(self._ops.workers, q, *cache, *metadata, *kind, out)
        return out
