"""The backend of a rank's layers, by name, and on GPUs the pair of one for prefill and one for decode."""

from pkgutil import resolve_name
from typing import NamedTuple, cast

import torch

from minisgl.attention.base import AttentionBackend, AttentionShape, AttentionStep, Tensor
from minisgl.attention.sdpa import SdpaBackend
from minisgl.config.device import BACKENDS
from minisgl.config.model import AttentionSpec, PagedKV
from minisgl.config.runtime import EngineConfig
from minisgl.core import most_samples
from minisgl.errors import ConfigError
from minisgl.kvcache.pool import LayerCache

Backend = AttentionBackend[object]  # each gets back what it has prepared, and only it knows what that is


class PairMetadata(NamedTuple):
    """num_decode: how many tokens, which come first, decode. None: there are no such sequences."""

    num_decode: int
    decode: object
    prefill: object


class PairOfBackends(AttentionBackend[PairMetadata]):
    """The sequences that decode, and those that do not, are a step of its own each."""

    def __init__(self, prefill: Backend, decode: Backend) -> None:
        self._prefill, self._decode, self.plans_captured = prefill, decode, decode.plans_captured

    def prepare(self, step: AttentionStep, captured: bool) -> PairMetadata:
        num, end = step.num_decode, len(step.rows)
        decode = self._decode.prepare(step.part(0, num), captured) if num else None
        return PairMetadata(num, decode, self._prefill.prepare(step.part(num, end), captured) if num < end else None)

    def forward(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: PairMetadata, sinks: Tensor | None = None
    ) -> Tensor:
        num = metadata.num_decode
        if metadata.prefill is None:
            return self._decode.forward(q, cache, spec, metadata.decode, sinks)
        out = self._prefill.forward(q[num:], cache, spec, metadata.prefill, sinks)
        return torch.cat((self._decode.forward(q[:num], cache, spec, metadata.decode, sinks), out)) if num else out


def create_backend(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> Backend:
    """dtype: that it computes in. Not for "cpu", which an engine makes of its kernels.

    Raises: ConfigError for a backend, or a pair, that this device does not have."""
    names = prefill, decode = config.prefill_backend, config.decode_backend
    if prefill == decode == "sdpa":
        return cast(Backend, SdpaBackend(device))
    if device.type == "cpu" or not all(name in BACKENDS and BACKENDS[name].made_by for name in names):
        raise ConfigError(f"--attention-backend {prefill},{decode} is not available on {device.type}")
    specs = [spec for layer in config.model.layers if isinstance((spec := layer.attention).cache, PagedKV)]
    kv = config.model.caches()[0]  # as that of all layers: `config.device` has seen to it
    shape = AttentionShape(
        num_qo_heads=config.model.num_qo_heads // config.tp_size,
        num_kv_heads=kv.local_heads(config.tp_size),
        head_dim=config.model.head_dim,
        dtype=dtype,
        page_size=config.page_size,
        max_running_requests=2 * most_samples(config.max_running_requests) + 1,  # of a step that verifies: its tokens
        max_seq_len=config.max_seq_len,
        has_float8=config.kv_cache_dtype == "fp8",
        windows=tuple(dict.fromkeys(spec.window for spec in specs)),
    )
    made: dict[str, Backend] = {name: resolve_name(BACKENDS[name].made_by)(shape, device) for name in {*names}}
    return cast(Backend, PairOfBackends(made[prefill], made[decode]))
