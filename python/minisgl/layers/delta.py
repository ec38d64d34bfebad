"""Gated delta nets, which stand in the place of attention in most layers of hybrid models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from minisgl.attention.base import StepContext
from minisgl.config.model import ModelConfig
from minisgl.config.states import DeltaNet
from minisgl.formats.base import Shard, WeightSlot
from minisgl.kernel.state import DeltaWeights
from minisgl.layers.base import CpuSpec, Layer, LayerEnv, Tensor, whole
from minisgl.layers.linear import Linear, RowLinear


class GatedDeltaNet(Layer):
    """The block of decoder layer `layer`: projections, the net with its state, output. Ranks share the heads."""

    name = "linear_attn"

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        spec, hidden = config.layers[layer].attention.cache, config.hidden_size
        assert isinstance(spec, DeltaNet)
        self._ops, self._layer, self._spec, self._eps = env.ops, layer, spec, config.rms_norm_eps
        num_k, num_v = (env.share(n, "heads of a delta net") for n in (spec.num_k_heads, spec.num_v_heads))
        keys, values, each = num_k * spec.k_dim, num_v * spec.v_dim, num_v // num_k
        sizes, orders = {"in_proj_q": keys, "in_proj_k": keys, "in_proj_v": values, "in_proj_z": values}, {}
        gates = {"in_proj_b": num_v, "in_proj_a": num_v}
        if spec.is_grouped:
            sizes, gates = {"in_proj_qkvz": 2 * (keys + values)}, {"in_proj_ba": 2 * num_v}
            orders["in_proj_qkvz."] = _ungrouped(num_k, (spec.k_dim, spec.k_dim, each * spec.v_dim, each * spec.v_dim))
            orders["in_proj_ba."] = _ungrouped(num_k, (each, each))
        self.in_proj, self.gates_proj = (projection(env, hidden, rows, orders) for rows in (sizes, gates))
        self.out_proj = RowLinear(env, spec.num_v_heads * spec.v_dim, hidden, False, "features of a delta net")
        a_log, dt_bias = (torch.empty(num_v, dtype=torch.float32, device=env.device) for _ in range(2))
        norm = env.vector(spec.v_dim)
        self._weights = DeltaWeights(env.vector(2 * keys + values, spec.width), a_log, dt_bias, norm, self._eps)
        rank, size = env.comm.rank, env.comm.size
        self._heads = rank * num_v, (rank + 1) * num_v
        parts = torch.arange(spec.num_channels).split_with_sizes((size * keys, size * keys, size * values))
        self._channels = torch.cat([part.chunk(size)[rank] for part in parts])

    def forward(self, x: Tensor, norm: Tensor | None, after: Tensor | None, step: StepContext) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the block's input; after: of its output →
        the new stream."""
        assert norm is not None, "no family does without"
        qkvz, ba = (linear.matrix.norm_apply(x, norm, self._eps) for linear in (self.in_proj, self.gates_proj))
        state = step.kv.states.layer(self._layer)
        out = self._ops.gated_delta_net(qkvz, ba, self._weights, state, step.seqs)
        return self.out_proj.forward(out, x, after, self._eps)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.in_proj.weights(prefix)
        yield from self.gates_proj.weights(prefix)
        yield from self.out_proj.weights(f"{prefix}out_proj.")
        mine, channels, shape = self._weights, self._channels, (self._spec.num_channels, 1, self._spec.width)
        yield WeightSlot(
            f"{prefix}conv1d.weight", shape, mine.conv, (0, shape[0]), transform=lambda part: part[channels, 0]
        )
        for name, target in (("A_log", mine.a_log), ("dt_bias", mine.dt_bias)):
            yield WeightSlot(f"{prefix}{name}", (self._spec.num_v_heads,), target, self._heads)
        yield whole(f"{prefix}norm.weight", mine.norm)

    def cpu_spec(self) -> CpuSpec | None:
        specs = [linear.cpu_spec() for linear in (self.in_proj, self.gates_proj, self.out_proj)]
        matrices = [matrix for spec in specs if spec is not None for matrix in spec.matrices]
        return CpuSpec(tuple(matrices), "delta_net", self._weights) if None not in specs else None


def projection(
    env: LayerEnv,
    hidden: int,
    sizes: Mapping[str, int],
    orders: Mapping[str, Tensor] | None = None,
    bias: bool = False,
) -> Linear:
    """One matrix of several layers. sizes: by their names, the rows that each rank has of them; orders: of `Linear`."""
    shards, at = dict[str, Shard](), 0
    for name, rows in sizes.items():
        first = env.comm.rank * rows
        shards[f"{name}."], at = Shard((env.comm.size * rows, hidden), (first, first + rows), at=at), at + rows
    return Linear(env, (at, hidden), shards, bias, orders=orders)


def _ungrouped(num_groups: int, sizes: Sequence[int]) -> Tensor:
    """The order of rows that brings together those of a kind, where each group has so many of every kind."""
    rows = torch.arange(num_groups * sum(sizes)).view(num_groups, -1)
    return torch.cat([part.flatten() for part in rows.split_with_sizes(sizes, 1)])
