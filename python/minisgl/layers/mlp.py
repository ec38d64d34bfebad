"""Feed-forward layers: the gated MLP, and a mixture of such."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from minisgl.config.model import MoEConfig
from minisgl.layers.base import Layer, LayerEnv, Tensor, WeightSlot
from minisgl.layers.linear import MergedColumnLinear, ReplicatedLinear, RowLinear


class GatedMLP(Layer):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, env: LayerEnv, hidden_size: int, intermediate_size: int, bias: bool) -> None:
        super().__init__()
        self._ops = env.ops
        sizes = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = MergedColumnLinear(env, hidden_size, sizes, bias)
        self.down_proj = RowLinear(env, intermediate_size, hidden_size, bias, "intermediate features")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self._ops.silu_and_mul(self.gate_up_proj(x)))
        return out

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.gate_up_proj.weights(prefix)
        yield from self.down_proj.weights(f"{prefix}down_proj.")


class SparseMLP(Layer):
    """Mixture of experts: each token goes through its `num_experts_per_tok` most probable experts.

    Every rank holds a share of every expert's features, so that ranks stay balanced whatever the router does. The
    reference loops over the experts that were hit.
    """

    def __init__(self, env: LayerEnv, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self._ops, self._comm, self._config = env.ops, env.comm, config
        self._inner, self._hidden = config.intermediate_size, hidden_size
        share = env.share(config.intermediate_size, "features of an expert")
        self._first = env.comm.rank * share
        self.gate = ReplicatedLinear(env, hidden_size, config.num_experts, bias=False)
        self.gate_up = env.empty(config.num_experts, 2 * share, hidden_size)
        self.down = env.empty(config.num_experts, hidden_size, share)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self._route(x)
        order = experts.flatten().argsort(stable=True)  # (token, choice) pairs by expert
        tokens = order // self._config.num_experts_per_tok
        counts = experts.flatten().bincount(minlength=self._config.num_experts).tolist()
        weights, out, begin = weights.flatten()[order, None], torch.zeros_like(x), 0
        for expert, count in enumerate(counts):
            if count:
                mine = tokens[begin : begin + count]
                hidden = self._ops.silu_and_mul(self._ops.linear(x[mine], self.gate_up[expert]))
                y = self._ops.linear(hidden, self.down[expert]) * weights[begin : begin + count]
                out.index_add_(0, mine, y)
                begin += count
        return self._comm.all_reduce(out)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids of each token's experts: [num_tokens, num_experts_per_tok]."""
        probs = self.gate(x).softmax(-1, dtype=torch.float32)
        weights, experts = probs.topk(self._config.num_experts_per_tok, dim=-1)
        if self._config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), experts

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.gate.weights(f"{prefix}gate.")
        share = self.down.shape[2]
        mine, shape = (self._first, self._first + share), (self._inner, self._hidden)
        for i in range(self._config.num_experts):
            expert = f"{prefix}experts.{i}."
            yield WeightSlot(f"{expert}gate_proj.weight", shape, self.gate_up[i, :share], mine)
            yield WeightSlot(f"{expert}up_proj.weight", shape, self.gate_up[i, share:], mine)
            yield WeightSlot(f"{expert}down_proj.weight", shape[::-1], self.down[i], (0, self._hidden), mine)
