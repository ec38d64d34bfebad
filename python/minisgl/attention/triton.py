"""The Triton backend, for prefill and decode. It needs neither a compiler nor a package that torch does not bring."""
# mypy: disable-error-code="import-not-found"

from typing import NamedTuple

import torch

from minisgl.attention.base import AttentionBackend, AttentionShape, AttentionStep, Tensor, to_device
from minisgl.config.model import AttentionSpec
from minisgl.kernel.ops import PagedSequences
from minisgl.kernel.triton import attention
from minisgl.kernel.triton.common import Tile, tiles
from minisgl.kvcache.pool import LayerCache


class TritonMetadata(NamedTuple):
    """blocks: of queries, as from `query_blocks`; None: all sequences decode. max_seq_len: no sequence is longer."""

    seqs: PagedSequences
    blocks: Tensor | None
    max_seq_len: int


class TritonBackend(AttentionBackend[TritonMetadata]):
    """`config/backends.yaml` says which shapes the kernels take."""

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        self._device, self._shape, self._group = device, shape, shape.num_qo_heads // shape.num_kv_heads
        capability, self._num_sms = (0, 0), 1  # of the interpreter, on a CPU
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._pdl = capability >= (9, 0)
        found = tiles("attention", shape.dtype, capability)
        self._prefill_config = Tile(*found[(shape.head_dim > 64) + (shape.head_dim > 128)])
        self._decode_config = attention.decode_config(shape.dtype, shape.head_dim, self._group)

    def prepare(self, step: AttentionStep, captured: bool) -> TritonMetadata:
        max_seq_len, blocks = self._shape.max_seq_len if captured else int(step.seq_lens.max()), None
        if not step.is_decode:
            rows = attention.query_blocks(step.starts, step.num_new, self._group, self._prefill_config.block_m)
            blocks = to_device(rows, self._device)
        return TritonMetadata(step.on_device(), blocks, max_seq_len)

    def forward(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: TritonMetadata, sinks: Tensor | None = None
    ) -> Tensor:
        (seqs, blocks, longest), splits, config = metadata, 1, self._prefill_config
        if blocks is None:
            config, longest = self._decode_config, min(spec.window or longest, longest)
            splits = attention.num_splits(len(q), self._shape.num_kv_heads, longest, config.block_n, self._num_sms)
        how = splits, config, self._pdl, spec.softcap or 0.0, sinks
        return attention.attention(q, cache.k, cache.v, seqs, blocks, spec.window, *how)
