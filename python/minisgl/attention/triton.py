"""The Triton backend: any page size, window and grouping.

Needs neither a compiler nor further packages. `shape` and `batch` are `AttentionShape` and the device-side description
of a step's sequences; both kinds of batches hold the sequences of their own call only, `cu_q` counting from 0.
"""
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

from typing import Any

import torch

from minisgl.errors import ConfigError

try:
    from minisgl.kernel.triton import decode, prefill
except ModuleNotFoundError as error:
    raise ConfigError(f"--attention-backend triton needs {error.name}: pip install triton") from error

Tensor = torch.Tensor


class TritonBackend:
    """See the module. `config.cuda` has chosen it for a shape that the kernels take."""

    def __init__(self, shape: Any, device: torch.device) -> None:
        self._device, self._shape = device, shape
        self._group = shape.num_qo_heads // shape.num_kv_heads
        self._capability, self._num_sms = (0, 0), 1
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._capability = (properties.major, properties.minor)
            self._num_sms = properties.multi_processor_count
        self._pdl = self._capability >= (9, 0)
        self._prefill_config = prefill.prefill_config(shape.dtype, shape.head_dim, self._capability)
        self._decode_config = decode.decode_config(shape.dtype, shape.head_dim)
        self._partials = self._allocate()
        self._planned: Any = None
        self._blocks = torch.empty((0, 2), dtype=torch.int32, device=device)

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

    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, batch: Any) -> Tensor:
        """q: [num_tokens, num_qo_heads, head_dim], any stride between tokens; caches: [num_slots, num_kv_heads,
        head_dim] of one layer, this step's keys and values stored. window: tokens that a position sees, itself
        included.

        → [num_tokens, num_qo_heads, head_dim]. Not for CUDA graphs: the grid follows from the sequences' lengths.
        """
        if batch is not self._planned:  # every layer gets the same object
            self._planned, self._blocks = batch, self._plan(batch)
        return prefill.prefill_attention(
            q, k_cache, v_cache, _sequences(batch), self._blocks, window, self._prefill_config, self._pdl
        )

    def _plan(self, batch: Any) -> Tensor:
        blocks = prefill.prefill_blocks(batch.starts_cpu, batch.num_new_cpu, self._group, self._prefill_config.block_m)
        tensor = torch.from_numpy(blocks)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()  # a copy from pageable memory would wait for the stream
        return tensor.to(self._device, non_blocking=True)

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, batch: Any) -> Tensor:
        """As `prefill`, of one token per sequence; [batch, num_qo_heads, head_dim]. May be captured in a CUDA graph."""
        splits = self._num_splits(q.shape[0], min(window or batch.max_seq_len, batch.max_seq_len))
        return decode.decode_attention(
            q, k_cache, v_cache, _sequences(batch), window, splits, self._partials, self._decode_config, self._pdl
        )


def _sequences(batch: Any) -> prefill.PagedSequences:
    return prefill.PagedSequences(batch.page_table, batch.rows, batch.seq_lens, batch.cu_q, batch.page_size)
