"""Our CPU kernels as operations: `csrc/src/cpu.cc`, compiled for this processor's level on first use.

Weights lie in panels (`csrc/include/minisgl/cpu/linear.h`) and keep their type, or become int8; activations are float32
whatever the weights are.
"""

from __future__ import annotations

import weakref

import torch

from minisgl.kernel.jit import load_cpu_kernels
from minisgl.kernel.ops import KVSlots, Matrix, RopeAngles, TorchOps
from minisgl.kernel.sampling import SamplingColumns, TokenStore
from minisgl.utils.math import div_ceil

Tensor = torch.Tensor

_STORE, _ADD, _GATED = range(3)


class PanelMatrix(Matrix):
    """A weight in panels; those of gate and up take turns where the kernels have the activation."""

    def __init__(self, ops: CpuOps, weight: Tensor, activation: str | None, dtype: torch.dtype) -> None:
        """dtype: in memory, of the weight or int8."""
        super().__init__(ops, activation)
        self._module, self._workers = ops.module, ops.workers
        panel, (self._num_out, self._num_in) = ops.module.panel_size(), weight.shape
        self._is_pair = activation == "silu"
        num_panels = 2 * div_ceil(self._num_out // 2, panel) if self._is_pair else div_ceil(self._num_out, panel)
        depth = 4 // dtype.itemsize
        self._data = torch.empty(num_panels, div_ceil(self._num_in, depth), panel, depth, dtype=dtype)
        self._scale = torch.empty(num_panels * panel) if dtype == torch.int8 else None
        self._module.pack_weight(self._workers, weight.detach(), self._is_pair, self._data, self._scale)
        handle: int = self._module.create_linear(self._data, self._scale, self._num_out, self._num_in, self._is_pair)
        self.cpu_handle = handle
        weakref.finalize(self, self._module.destroy_linear, handle)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._run(x, None, 0.0, bias, _STORE, torch.empty(x.shape[0], self._num_out))

    def apply_add(self, x: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._run(x, None, 0.0, bias, _ADD, residual)

    def norm_apply(self, x: Tensor, norm: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
        return self._run(x, norm, eps, bias, _STORE, torch.empty(x.shape[0], self._num_out))

    def gate_up(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0, bias: Tensor | None = None) -> Tensor:
        if not self._is_pair:
            return super().gate_up(x, norm, eps, bias)
        return self._run(x, norm, eps, bias, _GATED, torch.empty(x.shape[0], self._num_out // 2))

    def _run(self, x: Tensor, norm: Tensor | None, eps: float, bias: Tensor | None, into: int, out: Tensor) -> Tensor:
        self._module.linear_rows(self._workers, self.cpu_handle, x.contiguous(), norm, eps, bias, into, out)
        return out

    def rows(self, ids: Tensor, first: int = 0) -> Tensor:
        out = torch.empty(len(ids), self._num_in)
        self._module.embed_ids(self._workers, self.cpu_handle, ids, first, out)
        return out


class CpuOps(TorchOps):
    """num_threads: that compute, the caller's included. target: a level of processors; by default this one's."""

    def __init__(self, num_threads: int, target: str = "") -> None:
        self.module = load_cpu_kernels(target)
        self.workers: int = self.module.create_workers(num_threads)
        weakref.finalize(self, self.module.destroy_workers, self.workers)

    def vector_dtype(self, dtype: torch.dtype) -> torch.dtype:  # noqa: ARG002
        return torch.float32

    def matrix(self, weight: Tensor, activation: str | None = None) -> Matrix:
        return PanelMatrix(self, weight, activation, weight.dtype)

    def int8_matrix(self, weight: Tensor, activation: str | None = None) -> Matrix:
        return PanelMatrix(self, weight, activation, torch.int8)

    def sample(self, logits: Tensor, columns: SamplingColumns, out: Tensor, store: TokenStore | None = None) -> Tensor:
        self.module.sample(self.workers, logits, columns.words, out)
        if store is not None:
            self.store_ids(store.token_ids, store.rows, columns["position"], out)
        return out

    def norm_rope_store(self, qkv: Tensor, norm: Tensor | None, eps: float, rope: RopeAngles, cache: KVSlots) -> Tensor:
        self.module.rope_store(self.workers, qkv, norm, eps, rope.cos, rope.sin, cache.slots, cache.k, cache.v)
        return qkv[:, : qkv.shape[1] - 2 * cache.k.shape[1]]
