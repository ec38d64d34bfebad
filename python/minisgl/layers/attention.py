"""The two halves of a decoder layer: attention, and the feed-forward network or a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from minisgl.attention.base import StepContext
from minisgl.config.model import ModelConfig, MoEConfig
from minisgl.kernel.ops import KVSlots
from minisgl.layers.base import Layer, LayerEnv, Tensor, WeightSlot, whole
from minisgl.layers.linear import GateUpLinear, QKVLinear, ReplicatedLinear, RowLinear


class Attention(Layer):
    """The attention block of decoder layer `layer`: projections, norm, rotation, cache, attention, output."""

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self._ops, self._layer, self._eps = env.ops, layer, config.rms_norm_eps
        self._head_dim, self._window = config.head_dim, config.sliding_window(layer)
        self.qkv_proj = QKVLinear(
            env, config.hidden_size, config.num_qo_heads, config.num_kv_heads, config.head_dim, config.qkv_bias
        )
        q_size = config.num_qo_heads * config.head_dim
        self.o_proj = RowLinear(env, q_size, config.hidden_size, config.o_bias, "attention features")
        self._num_q, self._num_kv = self.qkv_proj.num_qo_heads, self.qkv_proj.num_kv_heads
        self.qk_norm = env.vector(self._num_q + self._num_kv, config.head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, norm: Tensor, step: StepContext) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the layer's input → the new stream."""
        qkv = self._ops.norm_linear(x, norm, self._eps, self.qkv_proj.matrix, self.qkv_proj.bias)
        cache = KVSlots(step.kv.k[self._layer], step.kv.v[self._layer], step.slots)
        qkv = qkv.view(x.shape[0], -1, self._head_dim)
        q = self._ops.qk_norm_rope_store(qkv, self.qk_norm, self._eps, step.rope, cache)
        out = step.backend.forward(q, cache.k, cache.v, self._window, step.metadata)
        projected: Tensor = self.o_proj(out.reshape(x.shape[0], -1), x)
        return projected

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.qkv_proj.weights(prefix)
        yield from self.o_proj.weights(f"{prefix}o_proj.")
        if self.qk_norm is not None:
            yield whole(f"{prefix}q_norm.weight", self.qk_norm[: self._num_q])
            yield whole(f"{prefix}k_norm.weight", self.qk_norm[self._num_q :])


class GatedMLP(Layer):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, env: LayerEnv, hidden_size: int, intermediate_size: int, bias: bool, eps: float) -> None:
        super().__init__()
        self._ops, self._eps = env.ops, eps
        self.gate_up_proj = GateUpLinear(env, hidden_size, intermediate_size, bias)
        self.down_proj = RowLinear(env, intermediate_size, hidden_size, bias, "intermediate features")

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the block's input → the new stream."""
        proj = self.gate_up_proj
        out: Tensor = self.down_proj(self._ops.norm_gate_up(x, norm, self._eps, proj.matrix, proj.bias), x)
        return out

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.gate_up_proj.weights(prefix)
        yield from self.down_proj.weights(f"{prefix}down_proj.")


class SparseMLP(Layer):
    """Mixture of experts: each token goes through its `num_experts_per_tok` most probable experts.

    Every rank holds a share of every expert's features, so that ranks stay balanced whatever the router does.
    """

    def __init__(self, env: LayerEnv, hidden_size: int, config: MoEConfig, eps: float) -> None:
        super().__init__()
        self._ops, self._comm, self._config, self._eps = env.ops, env.comm, config, eps
        self._inner, self._hidden = config.intermediate_size, hidden_size
        share = env.share(config.intermediate_size, "features of an expert")
        self._first = env.comm.rank * share
        self.gate = ReplicatedLinear(env, hidden_size, config.num_experts, bias=False)
        self.gate_up = env.empty(config.num_experts, 2 * share, hidden_size)
        self.down = env.empty(config.num_experts, hidden_size, share)
        self._experts: tuple[Any, Any] = (self.gate_up, self.down)

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        """As `GatedMLP.forward`."""
        hidden = self._ops.rms_norm(x, norm, self._eps)
        top_k, renormalize = self._config.num_experts_per_tok, self._config.norm_topk_prob
        part = self._ops.moe(hidden, self.gate(hidden), *self._experts, top_k, renormalize)
        return self._comm.all_reduce(x.add_(part) if self._comm.rank == 0 else part)

    def pack(self) -> None:
        super().pack()
        if self._ops.vector_dtype is not None:
            pairs = [self._ops.pack_weight(weight, pair=True) for weight in self.gate_up]
            self._experts = pairs, [self._ops.pack_weight(weight) for weight in self.down]
            self.gate_up = self.down = nn.Parameter(torch.empty(0), requires_grad=False)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.gate.weights(f"{prefix}gate.")
        share = self.down.shape[2]
        mine, shape = (self._first, self._first + share), (self._inner, self._hidden)
        for i in range(self._config.num_experts):
            expert = f"{prefix}experts.{i}."
            yield WeightSlot(f"{expert}gate_proj.weight", shape, self.gate_up[i, :share], mine)
            yield WeightSlot(f"{expert}up_proj.weight", shape, self.gate_up[i, share:], mine)
            yield WeightSlot(f"{expert}down_proj.weight", shape[::-1], self.down[i], (0, self._hidden), mine)
