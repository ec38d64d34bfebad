"""The Triton backend, for prefill and decode. It needs neither a compiler nor a package that torch does not bring."""
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

from typing import NamedTuple

import torch

from minisgl.attention.base import AttentionBackend, AttentionShape, AttentionStep
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
        self._partials = self._allocate()

    def _allocate(self) -> decode.Partials:
        """Room for the splits of any batch."""
        sizes = range(1, self._shape.max_running_requests + 1)
        parts = max(n * self._num_splits(n, self._shape.max_seq_len) for n in sizes) * self._shape.num_qo_heads
        acc = torch.empty(parts * self._shape.head_dim, dtype=torch.float32, device=self._device)
        return decode.Partials(acc, torch.empty(parts, dtype=torch.float32, device=self._device))

    def _num_splits(self, batch_size: int, max_seq_len: int) -> int:
        return decode.num_splits(
            batch_size, self._shape.num_kv_heads, max_seq_len, self._decode_config.block_n, self._num_sms
        )

    def prepare(self, step: AttentionStep, captured: bool) -> TritonMetadata:
        max_seq_len = self._shape.max_seq_len if captured else int(step.seq_lens.max())
        return TritonMetadata(step.on_device(), None if step.is_decode else self._blocks(step), max_seq_len)

    def _blocks(self, step: AttentionStep) -> Tensor:
        blocks = prefill.prefill_blocks(step.starts, step.num_new, self._group, self._prefill_config.block_m)
        tensor = torch.from_numpy(blocks)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()  # a copy from pageable memory would wait for the stream
        return tensor.to(self._device, non_blocking=True)

    def forward(self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: TritonMetadata) -> Tensor:
        seqs, blocks, window = metadata.seqs, metadata.blocks, spec.window
        if blocks is not None:
            return prefill.prefill_attention(q, cache.k, cache.v, seqs, blocks, window, self._prefill_config, self._pdl)
        splits = self._num_splits(q.shape[0], min(window or metadata.max_seq_len, metadata.max_seq_len))
        return decode.decode_attention(
            q, cache.k, cache.v, seqs, window, splits, self._partials, self._decode_config, self._pdl
        )
