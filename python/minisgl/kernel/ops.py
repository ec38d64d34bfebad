"""The operations that models are made of, and their torch reference: the seam where C++ and CUDA kernels plug in.

An `Ops` object is given to every layer. A faster implementation subclasses `TorchOps`, overrides what it is better at
and is chosen in `create_ops`; tests compare each against the reference. All work on ragged batches: the first
dimension of activations is `num_tokens`, whatever requests the tokens belong to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


class TorchOps:
    """The reference: plain torch, any device and dtype."""

    def pack_weight(self, weight: Tensor) -> Tensor:
        """weight: [out, in], in whatever layout `linear` likes best. The plain one may be freed by the caller."""
        return weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [num_tokens, in]; weight: [out, in], plain or packed → [num_tokens, out]."""
        return F.linear(x, weight, bias)

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        """ids: [num_tokens] int64; weight: [vocab, hidden] → [num_tokens, hidden]."""
        return weight.index_select(0, ids)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: [..., n]; weight broadcasts against it. Root-mean-square norm (arXiv 1910.07467), statistics in fp32."""
        if x.dtype == torch.float32:
            scale = torch.rsqrt_(x.square().mean(-1, keepdim=True).add_(eps))
            return (x * scale).mul_(weight)
        wide = x.float()
        scale = torch.rsqrt_(wide.square().mean(-1, keepdim=True).add_(eps))
        return wide.mul_(scale).to(x.dtype).mul_(weight)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual), the sum in place of `residual`."""
        residual = residual.add_(x)
        return self.rms_norm(residual, weight, eps), residual

    def qk_norm_rope(self, qk: Tensor, norm_weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        """Norm of each head (where there is a weight), then rotate.

        qk: [num_tokens, num_heads, head_dim], queries and keys together; norm_weight: [num_heads, head_dim];
        cos, sin: [num_tokens, 1, head_dim] float32, the first half of `sin` negated (see `RotaryEmbedding`).
        The rotation pairs dimension i with i + head_dim / 2, as Hugging Face checkpoints do.
        """
        if norm_weight is not None:
            qk = self.rms_norm(qk, norm_weight, eps)
        cos, sin = cos.to(qk.dtype), sin.to(qk.dtype)
        return (qk * cos).addcmul_(qk.roll(qk.shape[-1] // 2, -1), sin)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up: [num_tokens, 2 * n] → silu(gate) * up, [num_tokens, n]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        """Write k, v: [num_tokens, num_kv_heads, head_dim] to the slots [num_tokens] int64 of one layer's cache."""
        k_cache.index_copy_(0, slots, k)
        v_cache.index_copy_(0, slots, v)


class CpuOps(TorchOps):
    """oneDNN's inner product for fp32 on CPUs, on weights in its own blocked layout.

    From 2 to 64 rows, a decode batch, it is two to three times as fast as MKL's GEMM; otherwise equal. One layout,
    made for 16 rows, serves all numbers of rows (`benchmark/cpu_linear.py`, docs/performance-log.md).
    """

    def pack_weight(self, weight: Tensor) -> Tensor:
        if weight.dtype != torch.float32:
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)
        return packed

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.dtype != torch.float32 or (x.shape[0] > 64 and not weight.is_mkldnn):
            return F.linear(x, weight, bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out


def create_ops(device: str) -> TorchOps:
    """The fastest operations available on `device`."""
    if device == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return CpuOps()
    return TorchOps()
