"""Our CPU kernels as operations: `csrc/src/cpu.cc`, compiled for this processor's level on first use.

Weights lie in panels (`csrc/include/minisgl/cpu/linear.h`) and keep their type, or become int8; activations are float32
whatever the weights are.
"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch

from minisgl.kernel.jit import load_cpu_kernels
from minisgl.kernel.ops import Around, KVSlots, Matrix, RopeAngles, Tensor, TorchOps
from minisgl.kernel.packed import Blocks, Float8, Grouped, Packed, grid_of
from minisgl.kernel.state import DeltaState, DeltaWeights, StateSequences
from minisgl.utils.math import div_ceil

Shape = tuple[int, int]
Kept = Blocks | Grouped  # weights of few bits that kernels may multiply with

_STORE, _ADD, _GATED = 0, 1, {"silu": 2, "gelu_tanh": 3}  # what becomes of products; activations of pairs
_PIECE = 64 * 2**20  # bytes
_ALIGNMENT = 64


class PanelMatrix(Matrix):
    """A weight in panels; those of gate and up take turns where the kernels have the activation."""

    def __init__(self, ops: "CpuOps", shape: Shape, data: list[Tensor], handle: int, activation: str | None) -> None:
        """handle: of the kernels, for what lies in `data`."""
        super().__init__(ops, shape[0], activation)
        self._module, self._workers = ops.module, ops.workers
        self._num_in, self.data, self._is_pair = shape[1], data, activation in _GATED
        self.cpu_handle = handle
        weakref.finalize(self, self._module.destroy_linear, handle)

    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._run(x, Around(bias))

    def fused(self, x: Tensor, around: Around) -> Tensor | None:
        return self._run(x, around) if self._is_pair or not around.gated else None

    def _run(self, x: Tensor, around: Around) -> Tensor:
        into = _GATED[self._activation or ""] if around.gated else _STORE if around.residual is None else _ADD
        out, norm = around.target(x, self._num_out, torch.float32), (around.norm, around.eps)
        self._module.linear_rows(self._workers, self.cpu_handle, x.contiguous(), *norm, around.bias, into, out)
        return out

    def rows(self, ids: Tensor, first: int = 0) -> Tensor:
        out = torch.empty(len(ids), self._num_in)
        self._module.embed_ids(self._workers, self.cpu_handle, ids, first, out)
        return out


def part_of(part: Kept, begin: int, end: int) -> Kept:
    """Rows [begin, end)."""
    if isinstance(part, Blocks):
        return replace(part, data=part.data[begin:end])
    zeros = None if part.zeros is None else part.zeros[begin:end]
    return replace(part, codes=part.codes[begin:end], scales=part.scales[begin:end], zeros=zeros)


class CpuOps(TorchOps):
    """num_threads: that compute, the caller's included. target: a level of processors; by default this one's."""

    def __init__(self, num_threads: int, target: str = "") -> None:
        self.module = load_cpu_kernels(target)
        self.workers: int = self.module.create_workers(num_threads)
        weakref.finalize(self, self.module.destroy_workers, self.workers)
        self._free = torch.empty(0, dtype=torch.uint8)

    def vector_dtype(self, dtype: torch.dtype) -> torch.dtype:  # noqa: ARG002
        return torch.float32

    def matrix(self, weight: Tensor, activation: str | None = None) -> Matrix:
        return self._plain_matrix(weight, activation, weight.dtype)

    def int8_matrix(self, weight: Tensor, activation: str | None = None) -> Matrix:
        return self._plain_matrix(weight, activation, torch.int8)

    def packed_matrix(self, parts: Sequence[Packed], dtype: torch.dtype, activation: str | None = None) -> Matrix:  # noqa: ARG002
        """Kept as they are where there are kernels for all parts, and else in a type that loses nothing."""
        half, is_pair = sum(part.shape[0] for part in parts) // 2, activation in _GATED
        if is_pair and len(parts) == 1 and not isinstance(part := parts[0], Float8):
            parts = [part_of(part, 0, half), part_of(part, half, 2 * half)]
        kept = [narrow for part in parts if (narrow := self._as_kept(part)) is not None]
        columns = [part.columns for part in kept]
        orders = {one is None or one.numpy().tobytes() for one in columns}
        is_odd = is_pair and [part.shape[0] for part in parts] != [half, half]
        if len(kept) == len(parts) and not is_odd and len(orders) == 1:
            return self._packed_matrix(kept, columns[0], activation)
        for kind, plain in (("F16", torch.float16), ("BF16", torch.bfloat16)):
            rows = [part.data for part in parts if isinstance(part, Blocks) and part.kind == kind]
            if len(rows) == len(parts):
                return self.matrix(torch.cat(rows).view(plain), activation)
        return super().packed_matrix(parts, torch.float32, activation)

    def _as_kept(self, part: Packed) -> Kept | None:
        """The same with 16-bit scales; None where kernels cannot keep it."""
        if isinstance(part, Float8):
            return None
        if isinstance(part, Grouped) and part.scales.dtype.itemsize > 2:
            narrow = [part.scales.to(dtype) for dtype in (torch.float16, torch.bfloat16)]
            scales = next((scales for scales in narrow if torch.equal(scales.float(), part.scales.float())), None)
            if scales is None:
                return None
            part = replace(part, scales=scales)
        return part if self._num_bytes(part) >= 0 else None

    def _num_bytes(self, part: Kept) -> int:
        """In memory; -1 where there is no kernel."""
        name, group, has_zeros = part.kind if isinstance(part, Blocks) else "", 0, False
        if isinstance(part, Grouped):
            name, has_zeros = f"grouped{part.bits}", part.zeros is not None
            group = part.shape[1] // part.scales.shape[1]
        return int(self.module.packed_bytes(name, *part.shape, group, has_zeros))

    def _packed_matrix(self, parts: list[Kept], columns: Tensor | None, activation: str | None) -> Matrix:
        shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
        handle: int = self.module.create_packed(*shape, activation in _GATED, columns)
        data = [self._room(self._num_bytes(part)) for part in parts]
        matrix = PanelMatrix(self, shape, [*data, *([] if columns is None else [columns])], handle, activation)
        for part, packed in zip(parts, data, strict=True):
            if isinstance(part, Blocks):
                self.module.add_blocks(self.workers, handle, part.kind, part.data, grid_of(part.kind), packed)
                continue
            zeros = None if part.zeros is None else part.zeros.contiguous()
            numbers = part.codes.contiguous(), part.scales.contiguous(), zeros
            self.module.add_grouped(self.workers, handle, f"grouped{part.bits}", *numbers, packed)
        return matrix

    def _room(self, num_bytes: int) -> Tensor:
        """Memory of panels. Matrices lie side by side in large pieces: alone, most would not fill large pages."""
        if num_bytes > len(self._free):
            piece = torch.empty(max(num_bytes, _PIECE), dtype=torch.uint8)
            if num_bytes > _PIECE // 2:
                return piece[:num_bytes]
            self._free = piece
        room, self._free = self._free[:num_bytes], self._free[div_ceil(num_bytes, _ALIGNMENT) * _ALIGNMENT :]
        return room

    def _plain_matrix(self, weight: Tensor, activation: str | None, dtype: torch.dtype) -> Matrix:
        """dtype: in memory, of the weight or int8."""
        panel, (num_out, num_in), is_pair = self.module.panel_size(), weight.shape, activation in _GATED
        num_panels = 2 * div_ceil(num_out // 2, panel) if is_pair else div_ceil(num_out, panel)
        depth = 4 // dtype.itemsize
        sizes = num_panels, div_ceil(num_in, depth), panel, depth
        data = self._room(math.prod(sizes) * dtype.itemsize).view(dtype).view(sizes)
        scale = torch.empty(num_panels * panel) if dtype == torch.int8 else None
        self.module.pack_weight(self.workers, weight.detach(), is_pair, data, scale)
        handle: int = self.module.create_linear(data, scale, num_out, num_in, is_pair)
        return PanelMatrix(self, (num_out, num_in), [data] if scale is None else [data, scale], handle, activation)

    def by_kernel(self, name: str, logits: Tensor, *others: Tensor | None) -> bool:
        getattr(self.module, name)(self.workers, logits, *others)
        return True

    def norm_rope_store(self, qkv: Tensor, norm: Tensor | None, eps: float, rope: RopeAngles, cache: KVSlots) -> Tensor:
        qkv, tables = qkv.contiguous(), (rope.cos, rope.sin, cache.slots, cache.k, cache.v)
        self.module.rope_store(self.workers, qkv, norm, eps, *tables)
        return qkv[:, : qkv.shape[1] - 2 * cache.k.shape[1]]

    def gated_delta_net(
        self, qkvz: Tensor, ba: Tensor, weights: DeltaWeights, state: DeltaState, seqs: StateSequences
    ) -> Tensor:
        out = torch.empty(len(qkvz), weights.norm.numel() * len(weights.a_log))
        self.module.delta_net(self.workers, qkvz, ba, *weights, *state, *seqs, out)
        return out
