"""The choice of backends by name: each module is imported only when asked for, since some need optional packages."""

from __future__ import annotations

from typing import cast

import torch

from minisgl.attention.base import AttentionBackend
from minisgl.attention.paged import AttentionShape, PagedAttention
from minisgl.attention.sdpa import SdpaBackend
from minisgl.config.model import PagedKV
from minisgl.config.runtime import EngineConfig
from minisgl.errors import ConfigError

Backend = AttentionBackend[object]  # each gets back what it has prepared, and only it knows what that is


def create_backend(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> Backend:
    """The backend of one rank's layers; but for "cpu", which an engine makes of its kernels.

    Raises: ConfigError for one, or a pair, that this device does not have.
    """
    prefill, decode = config.prefill_backend, config.decode_backend
    if prefill == decode == "sdpa":
        return cast(Backend, SdpaBackend(device))
    if device.type == "cpu" or "sdpa" in (prefill, decode):
        raise ConfigError(f"--attention-backend {prefill},{decode} is not available on {device.type}")
    shape = _shape(config, dtype)
    first = _create(prefill, shape, device)
    return cast(Backend, PagedAttention(first, first if decode == prefill else _create(decode, shape, device)))


def _shape(config: EngineConfig, dtype: torch.dtype) -> AttentionShape:
    specs = [layer.attention for layer in config.model.layers]
    cache = specs[0].cache  # as all layers': `config.attention` has seen to it
    assert isinstance(cache, PagedKV)
    return AttentionShape(
        num_qo_heads=config.model.num_qo_heads // config.tp_size,
        num_kv_heads=cache.local_heads(config.tp_size),
        head_dim=config.model.head_dim,
        dtype=dtype,
        page_size=config.page_size,
        max_running_requests=config.max_running_requests,
        max_seq_len=config.max_seq_len,
        windows=tuple(dict.fromkeys(spec.window for spec in specs)),
    )


def _create(name: str, shape: AttentionShape, device: torch.device) -> Backend:
    if name == "triton":
        from minisgl.attention.triton import TritonBackend

        return cast(Backend, TritonBackend(shape, device))
    if name == "cuda":
        from minisgl.attention.cuda import CudaBackend

        return cast(Backend, CudaBackend(shape, device))
    if name == "fi":
        from minisgl.attention.fi import FlashInferBackend

        return cast(Backend, FlashInferBackend(shape, device))
    if name == "fa":
        from minisgl.attention.fa import FlashAttentionBackend

        return cast(Backend, FlashAttentionBackend(shape, device))
    raise ConfigError(f"--attention-backend {name!r} is unknown (known: sdpa, cpu, triton, cuda, fi, fa)")
