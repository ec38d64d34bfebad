"""Attention over paged KV on GPUs, and the choice of backends by name: each module is imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from minisgl.attention.base import AttentionBackend, AttentionBatch, PagedBatch, PagedStep
from minisgl.attention.sdpa import SdpaBackend
from minisgl.config.runtime import EngineConfig
from minisgl.errors import ConfigError
from minisgl.kernel.ops import TorchOps

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What kernels and workspaces are made for; heads are those of this rank."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int
    max_running_requests: int
    max_seq_len: int
    windows: tuple[int | None, ...] = (None,)  # that layers have


# q: [num_tokens, num_qo_heads, head_dim], perhaps strided between tokens; caches: [num_slots, num_kv_heads, head_dim];
# window: tokens that a position sees, itself included → like q, contiguous.
Attend = Callable[[Tensor, Tensor, Tensor, int | None, PagedBatch], Tensor]


class PagedAttention:
    """An `AttentionBackend` of two, with a method `prefill` and a method `decode`: each an `Attend`.

    `decode` gets one token per sequence. It is captured in CUDA graphs, so nothing may depend on the values on the
    device but what the device does. A backend that plans on the host has a method `plan_decode(batch, graph)` too,
    called before each step, and before a step is captured.
    """

    def __init__(self, prefill: Any, decode: Any) -> None:
        self._prefill: Attend = prefill.prefill
        self._decode: Attend = decode.decode
        self.plan_decode: Callable[[PagedBatch, bool], None] | None = getattr(decode, "plan_decode", None)

    def prepare(self, batch: AttentionBatch) -> PagedStep:
        assert batch.paged is not None
        if self.plan_decode is not None and batch.paged.num_decode:
            self.plan_decode(batch.paged.decode, False)
        return batch.paged

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, metadata: PagedStep) -> Tensor:
        num = metadata.num_decode
        if metadata.prefill is None:
            return self._decode(q, k_cache, v_cache, window, metadata.decode)
        out = self._prefill(q[num:], k_cache, v_cache, window, metadata.prefill)
        if num == 0:
            return out
        return torch.cat((self._decode(q[:num], k_cache, v_cache, window, metadata.decode), out))


def create_backend(config: EngineConfig, dtype: torch.dtype, device: torch.device, ops: TorchOps) -> AttentionBackend:
    """The backend of one rank's layers. Raises: ConfigError for one, or a pair, that this device does not have."""
    prefill, decode = config.prefill_backend, config.decode_backend
    model, page_size = config.model, config.page_size
    num_kv_heads = model.num_local_kv_heads(config.tp_size)
    windows = tuple(dict.fromkeys(model.sliding_window(layer) for layer in range(model.num_layers)))
    if prefill == decode == "sdpa":
        return SdpaBackend(windows, num_kv_heads * model.head_dim * dtype.itemsize, dtype, device)
    if prefill == decode == "cpu":
        from minisgl.attention.cpu import CpuBackend
        from minisgl.kernel.cpu import CpuOps

        if isinstance(ops, CpuOps):
            return CpuBackend(ops)
    if device.type == "cpu" or "sdpa" in (prefill, decode):
        raise ConfigError(f"--attention-backend {prefill},{decode} is not available on {device.type}")
    num_qo_heads = model.num_qo_heads // config.tp_size
    rows, length = config.max_running_requests, config.max_seq_len
    shape = AttentionShape(num_qo_heads, num_kv_heads, model.head_dim, dtype, page_size, rows, length, windows)
    first = _create(prefill, shape, device)
    return PagedAttention(first, first if decode == prefill else _create(decode, shape, device))


def _create(name: str, shape: AttentionShape, device: torch.device) -> Any:
    backend: Any
    if name == "triton":
        from minisgl.attention.triton import TritonBackend as backend
    elif name == "cuda":
        from minisgl.attention.cuda import CudaBackend as backend
    elif name == "fi":
        from minisgl.attention.fi import FlashInferBackend as backend
    elif name == "fa":
        from minisgl.attention.fa import FlashAttentionBackend as backend
    else:
        raise ConfigError(f"--attention-backend {name!r} is unknown (known: sdpa, cpu, triton, cuda, fi, fa)")
    return backend(shape, device)
