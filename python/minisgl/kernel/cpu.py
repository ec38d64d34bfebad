"""Our CPU kernels as operations: `csrc/src/cpu.cc`, compiled for this processor's level on first use.

Weights lie in panels (`csrc/include/minisgl/cpu/linear.h`) and keep their type, or become int8; activations are float32
whatever the weights are.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from minisgl.kernel.jit import load_cpu_kernels
from minisgl.kernel.ops import KVSlots, RopeAngles, TorchOps
from minisgl.kernel.sampling import SamplingColumns, TokenStore
from minisgl.utils.math import div_ceil

Tensor = torch.Tensor

_STORE, _ADD, _GATED = range(3)


class Matrix:
    """A weight in panels. pair: it is gate above up; then their panels take turns."""

    def __init__(self, ops: CpuOps, weight: Tensor, *, pair: bool, to_int8: bool) -> None:
        module, panel = ops.module, ops.module.panel_size()
        self.shape = num_out, num_in = weight.shape
        num_panels = 2 * div_ceil(num_out // 2, panel) if pair else div_ceil(num_out, panel)
        dtype = torch.int8 if to_int8 else weight.dtype
        depth = 4 // dtype.itemsize
        self.data = torch.empty(num_panels, div_ceil(num_in, depth), panel, depth, dtype=dtype)
        self.scale = torch.empty(num_panels * panel) if to_int8 else None
        module.pack_weight(ops.workers, weight.detach(), pair, self.data, self.scale)
        self.handle: int = module.create_linear(self.data, self.scale, num_out, num_in, pair)
        weakref.finalize(self, module.destroy_linear, self.handle)

    def __len__(self) -> int:
        return int(self.shape[0])


class CpuOps(TorchOps):
    """num_threads: that compute, the caller's included. to_int8: weights become int8, but for exact ones.

    target: as for `kernel.jit.load_cpu_kernels`."""

    vector_dtype = torch.float32

    def __init__(self, num_threads: int, *, to_int8: bool = False, target: str = "") -> None:
        self.module = load_cpu_kernels(target)
        self.workers: int = self.module.create_workers(num_threads)
        self._to_int8 = to_int8
        weakref.finalize(self, self.module.destroy_workers, self.workers)

    def pack_weight(self, weight: Tensor, *, pair: bool = False, exact: bool = False) -> Any:
        return Matrix(self, weight, pair=pair, to_int8=self._to_int8 and not exact)

    def pack_table(self, weight: Tensor) -> Any:
        return self.pack_weight(weight)

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        return self._linear(x, weight, None, 0.0, bias, _STORE, len(weight))

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Any, bias: Tensor | None = None) -> Tensor:
        return self._linear(x, weight, norm, eps, bias, _STORE, len(weight))

    def gate_up(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        return self._linear(x, weight, None, 0.0, bias, _GATED, len(weight) // 2)

    def norm_gate_up(self, x: Tensor, norm: Tensor, eps: float, weight: Any, bias: Tensor | None = None) -> Tensor:
        return self._linear(x, weight, norm, eps, bias, _GATED, len(weight) // 2)

    def linear_add(self, x: Tensor, weight: Any, residual: Tensor, bias: Tensor | None = None) -> Tensor:
        self.module.linear_rows(self.workers, weight.handle, x.contiguous(), None, 0.0, bias, _ADD, residual)
        return residual

    def _linear(
        self, x: Tensor, weight: Matrix, norm: Tensor | None, eps: float, bias: Tensor | None, into: int, width: int
    ) -> Tensor:
        out = torch.empty(x.shape[0], width)
        self.module.linear_rows(self.workers, weight.handle, x.contiguous(), norm, eps, bias, into, out)
        return out

    def embedding(self, ids: Tensor, weight: Any, first: int = 0) -> Tensor:
        out = torch.empty(len(ids), weight.shape[1])
        self.module.embed_ids(self.workers, weight.handle, ids, first, out)
        return out

    def sample(self, logits: Tensor, columns: SamplingColumns, out: Tensor, store: TokenStore | None = None) -> Tensor:
        self.module.sample(self.workers, logits, columns.words, out)
        if store is not None:
            self.store_ids(store.token_ids, store.rows, columns["position"], out)
        return out

    def qk_norm_rope_store(
        self, qkv: Tensor, norm: Tensor | None, eps: float, rope: RopeAngles, cache: KVSlots
    ) -> Tensor:
        self.module.rope_store(self.workers, qkv, norm, eps, rope.cos, rope.sin, cache.slots, cache.k, cache.v)
        return qkv[:, : qkv.shape[1] - 2 * cache.k.shape[1]]
