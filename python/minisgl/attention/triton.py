"""The Triton backend, for prefill and decode. It needs neither a compiler nor a package that torch does not bring."""
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

from typing import NamedTuple

import torch

from minisgl.attention.base import AttentionBackend, AttentionShape, AttentionStep, to_device
from minisgl.config.model import AttentionSpec
from minisgl.kernel.ops import PagedSequences
from minisgl.kernel.triton import decode, prefill
from minisgl.kvcache.pool import LayerCache

Tensor = torch.Tensor


class TritonMetadata(NamedTuple):
    """blocks: of queries, as from `prefill_blocks`; None: all sequences decode. max_seq_len: no sequence is longer."""

    seqs: PagedSequences
    blocks: Tensor | None
    max_seq_len: int


class TritonBackend(AttentionBackend[TritonMetadata]):
    """`config/backends.yaml` says which shapes the kernels take."""

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        self._device, self._shape = device, shape
        self._group = shape.num_qo_heads // shape.num_kv_heads
        capability, self._num_sms = (0, 0), 1  # of the interpreter, on a CPU
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._pdl = capability >= (9, 0)
        self._prefill_config = prefill.prefill_config(shape.dtype, shape.head_dim, capability)
        self._decode_config = decode.decode_config(shape.dtype, shape.head_dim)
        batches = range(1, shape.max_running_requests + 1)  # room for the splits of any
        parts = max(n * self._num_splits(n, shape.max_seq_len) for n in batches) * shape.num_qo_heads
        acc = torch.empty(parts * shape.head_dim, dtype=torch.float32, device=device)
        self._partials = decode.Partials(acc, torch.empty(parts, dtype=torch.float32, device=device))

    def _num_splits(self, batch_size: int, max_seq_len: int) -> int:
        num_kv_heads, block_n = self._shape.num_kv_heads, self._decode_config.block_n
        return decode.num_splits(batch_size, num_kv_heads, max_seq_len, block_n, self._num_sms)

    def prepare(self, step: AttentionStep, captured: bool) -> TritonMetadata:
        max_seq_len = self._shape.max_seq_len if captured else int(step.seq_lens.max())
        if step.is_decode:
            return TritonMetadata(step.on_device(), None, max_seq_len)
        blocks = prefill.prefill_blocks(step.starts, step.num_new, self._group, self._prefill_config.block_m)
        return TritonMetadata(step.on_device(), to_device(blocks, self._device), max_seq_len)

    def forward(self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: TritonMetadata) -> Tensor:
        seqs, blocks, window, pdl = metadata.seqs, metadata.blocks, spec.window, self._pdl
        if blocks is not None:
            return prefill.prefill_attention(q, *cache, seqs, blocks, window, self._prefill_config, pdl)
        splits = self._num_splits(q.shape[0], min(window or metadata.max_seq_len, metadata.max_seq_len))
        return decode.decode_attention(q, *cache, seqs, window, splits, self._partials, self._decode_config, pdl)
