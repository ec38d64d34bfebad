"""The operations that models are made of, and their torch reference: the seam where C++ and CUDA kernels plug in.

An `Ops` object is given to every layer. A faster implementation subclasses `TorchOps`, overrides what it is better at
and is chosen in `create_ops`; tests compare each against the reference. All work on ragged batches: the first
dimension of activations is `num_tokens`, whatever requests the tokens belong to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from minisgl.kernel.sampling import SamplingColumns, TokenStore, sample_reference

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class RopeAngles:
    """Of a step's tokens. cos, sin: [num_tokens, 1, head_dim] float32, the first half of `sin` negated: x rotated is
    x * cos + roll(x, head_dim / 2) * sin."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class KVSlots:
    """Where a step's keys and values go in one layer. k, v: [num_slots, num_kv_heads, head_dim]; slots: [num_tokens]
    int64."""

    k: Tensor
    v: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True)
class CpuKernels:
    """What our CPU kernels are started with."""

    num_threads: int
    to_int8: bool  # weights of linear layers and the embedding


class TorchOps:
    """The reference: plain torch, any device and dtype."""

    vector_dtype: torch.dtype | None = None  # of norms and biases; None: the weights' own

    def pack_weight(self, weight: Tensor, *, pair: bool = False, exact: bool = False) -> Any:  # noqa: ARG002
        """weight: [out, in], in whatever layout `linear` likes best. The plain one may be freed by the caller.

        pair: it is for `gate_up`. exact: not to be quantised.
        """
        return weight

    def pack_table(self, weight: Tensor) -> Any:
        """weight: [num_ids, hidden], as `embedding` likes it best, and `linear` where it is the LM head too."""
        return weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [num_tokens, in]; weight: [out, in], plain or packed → [num_tokens, out]."""
        return F.linear(x, weight, bias)

    def embedding(self, ids: Tensor, weight: Tensor, first: int = 0) -> Tensor:
        """Rows of a table: ids [num_tokens] int64; weight: [num_ids, hidden] → [num_tokens, hidden].

        first: the id of the table's first row. Ids outside the table belong to other ranks, and give zeros.
        """
        local = ids - first
        here = (local >= 0) & (local < len(weight))
        return weight.index_select(0, local.where(here, 0)).masked_fill_(~here[:, None], 0)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: [..., n]; weight broadcasts against it. Root-mean-square norm (arXiv 1910.07467), statistics in fp32."""
        if x.dtype == torch.float32:
            scale = torch.rsqrt_(x.square().mean(-1, keepdim=True).add_(eps))
            return (x * scale).mul_(weight)
        wide = x.float()
        scale = torch.rsqrt_(wide.square().mean(-1, keepdim=True).add_(eps))
        return wide.mul_(scale).to(x.dtype).mul_(weight)

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`linear` of the normalised x."""
        return self.linear(self.rms_norm(x, norm, eps), weight, bias)

    def norm_gate_up(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`gate_up` of the normalised x."""
        return self.silu_and_mul(self.norm_linear(x, norm, eps, weight, bias))

    def gate_up(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """silu(gate) * up; weight: [2 * n, in], gate's rows first → [num_tokens, n]."""
        return self.silu_and_mul(self.linear(x, weight, bias))

    def linear_add(self, x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
        """residual + linear(x), in place of `residual`: [num_tokens, out]."""
        return residual.add_(self.linear(x, weight, bias))

    def qk_norm_rope_store(
        self, qkv: Tensor, norm: Tensor | None, eps: float, rope: RopeAngles, cache: KVSlots
    ) -> Tensor:
        """Norm of each query and key head (where there is a weight), rotate them, and store keys and values.

        qkv: [num_tokens, num_q + 2 * num_kv, head_dim], which may be overwritten; norm: [num_q + num_kv, head_dim].
        The rotation pairs dimension i with i + head_dim / 2, as Hugging Face checkpoints do.
        → the queries: [num_tokens, num_q, head_dim], perhaps with another stride between tokens.
        """
        num_kv = cache.k.shape[1]
        num_q = qkv.shape[1] - 2 * num_kv
        qk = qkv[:, : num_q + num_kv]
        if norm is not None:
            qk = self.rms_norm(qk, norm, eps)
        cos, sin = rope.cos.to(qk.dtype), rope.sin.to(qk.dtype)
        qk = (qk * cos).addcmul_(qk.roll(qk.shape[-1] // 2, -1), sin)
        cache.k.index_copy_(0, cache.slots, qk[:, num_q:])
        cache.v.index_copy_(0, cache.slots, qkv[:, num_q + num_kv :])
        return qk[:, :num_q]

    def moe(self, x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int, norm: bool) -> Tensor:
        """Each token's `top_k` most probable experts, weighted by their probabilities (with `norm`, made to sum to 1).

        x: [num_tokens, hidden]; router_logits: [num_tokens, num_experts]; gate_up: [num_experts, 2 * n, hidden];
        down: [num_experts, hidden, n] → [num_tokens, hidden]. The reference loops over the experts that were hit.
        """
        weights, experts = router_logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
        if norm:
            weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)  # (token, choice) pairs by expert
        tokens, weights = order // top_k, weights.to(x.dtype).flatten()[order, None]
        out, begin = torch.zeros_like(x), 0
        for expert, count in enumerate(experts.flatten().bincount(minlength=len(gate_up)).tolist()):
            if count:
                mine = tokens[begin : begin + count]
                hidden = self.gate_up(x[mine], gate_up[expert])
                out.index_add_(0, mine, self.linear(hidden, down[expert]) * weights[begin : begin + count])
                begin += count
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up: [num_tokens, 2 * n] → silu(gate) * up, [num_tokens, n]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def step_inputs(
        self, rows: Tensor, positions: Tensor, token_ids: Tensor, page_table: Tensor, page_size: int, angles: Tensor
    ) -> tuple[Tensor, Tensor, RopeAngles]:
        """Ids and slots of a step's tokens ([num_tokens] int64 both) and their angles.

        rows, positions: [num_tokens] int32 into the tables token_ids: [rows, tokens] int32 and page_table: [rows,
        pages] int32; angles: [positions, 2 * head_dim] float32, cosines then sines.
        """
        rows, positions = rows.long(), positions.long()
        slots = page_table[rows, positions // page_size].long() * page_size + positions % page_size
        cos, sin = angles.index_select(0, positions)[:, None].chunk(2, -1)
        return token_ids[rows, positions].long(), slots, RopeAngles(cos, sin)

    def scatter(self, table: Tensor, index: Tensor, values: Tensor) -> None:
        """table.flatten()[index] = values, all int32; no index comes twice."""
        table.view(-1).index_copy_(0, index.long(), values)

    def sample(self, logits: Tensor, columns: SamplingColumns, out: Tensor, store: TokenStore | None = None) -> Tensor:
        """Sample each row of `logits` [n, vocab] into `out` [n] int32, and into a table of tokens.

        -1 where a row's largest logit is not finite; see `sample_reference`.
        """
        sample_reference(logits, columns, out, by_logit=logits.device.type == "cpu")
        if store is not None:
            self.store_ids(store.token_ids, store.rows, columns["position"], out)
        return out

    def store_ids(self, token_ids: Tensor, rows: Tensor, positions: Tensor, ids: Tensor) -> None:
        """Sampled ids become input of later steps: token_ids[rows, positions] = ids, [n]. A failed row (-1) gets some
        valid id, which nobody will see."""
        token_ids.index_put_((rows.long(), positions), ids.clamp(min=0))


class OneDnnOps(TorchOps):
    """oneDNN's inner product for fp32 on CPUs, on weights in its own blocked layout.

    From 2 to 64 rows, a decode batch, it is two to three times as fast as MKL's GEMM; otherwise equal. One layout,
    made for 16 rows, serves all numbers of rows (`benchmark/cpu_linear.py`, docs/performance-log.md).
    """

    def pack_weight(self, weight: Tensor, *, pair: bool = False, exact: bool = False) -> Tensor:  # noqa: ARG002
        if weight.dtype != torch.float32:
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)
        return packed

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.dtype != torch.float32 or (x.shape[0] > 64 and not weight.is_mkldnn):
            return F.linear(x, weight, bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out


def create_ops(device: torch.device, dtype: torch.dtype, moe_backend: str, cpu: CpuKernels | None = None) -> TorchOps:
    """The fastest operations available on `device`, for a model of this dtype. cpu: our own, on a CPU."""
    if device.type == "cuda":
        from minisgl.kernel.cuda import create_cuda_ops

        return create_cuda_ops(device, dtype, moe_backend)
    if cpu is not None:
        from minisgl.kernel.cpu import CpuOps

        return CpuOps(cpu.num_threads, to_int8=cpu.to_int8)
    if torch.backends.mkldnn.is_available():
        return OneDnnOps()
    return TorchOps()
