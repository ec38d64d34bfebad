"""Feed-forward layers: the gated MLP, and a mixture of such."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from minisgl.config.model import MoEConfig
from minisgl.layers.base import Layer, LayerEnv, Tensor, WeightSlot
from minisgl.layers.linear import GateUpLinear, ReplicatedLinear, RowLinear


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
