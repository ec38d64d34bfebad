"""Attention backends by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from minisgl.attention.base import AttentionBackend
from minisgl.attention.sdpa import SdpaBackend
from minisgl.errors import ConfigError

BACKENDS = {"sdpa": SdpaBackend}


def create_backend(
    prefill: str,
    decode: str,
    windows: Iterable[int | None],
    kv_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionBackend:
    """The backend of a model whose layers have these windows; kv_bytes: of one slot's keys in one layer.

    Raises: ConfigError for a backend, or a pair of them, that this build does not have.
    """
    for name in (prefill, decode):
        if name not in BACKENDS:
            raise ConfigError(
                f"--attention-backend {name!r} is not available on {device.type} (available: {', '.join(BACKENDS)})"
            )
    if prefill != decode:
        raise ConfigError(f"--attention-backend {prefill},{decode}: this pair is not available")
    return BACKENDS[prefill](windows, kv_bytes, dtype, device)
