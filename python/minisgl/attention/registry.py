"""Attention backends by name. Each module is imported only when its backend is asked for."""

from __future__ import annotations

from typing import Any

import torch

from minisgl.attention.base import AttentionBackend
from minisgl.attention.paged import AttentionShape, PagedAttention
from minisgl.attention.sdpa import SdpaBackend
from minisgl.config.runtime import EngineConfig
from minisgl.errors import ConfigError
from minisgl.kernel.ops import TorchOps


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
    if name == "triton":
        from minisgl.attention.triton import TritonBackend

        return TritonBackend(shape, device)
    if name == "cuda":
        from minisgl.attention.cuda import CudaBackend

        return CudaBackend(shape, device)
    if name == "fi":
        from minisgl.attention.fi import FlashInferBackend

        return FlashInferBackend(shape, device)
    if name == "fa":
        from minisgl.attention.fa import FlashAttentionBackend

        return FlashAttentionBackend(shape, device)
    raise ConfigError(f"--attention-backend {name!r} is unknown (known: sdpa, cpu, triton, cuda, fi, fa)")
