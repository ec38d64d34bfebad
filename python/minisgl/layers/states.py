"""Blocks that have a state, and stand in the place of attention in most layers of hybrid models."""

from collections.abc import Sequence

import torch

from minisgl.attention.base import StepContext
from minisgl.config.model import ModelConfig
from minisgl.config.states import DeltaNet, ShortConv
from minisgl.formats.base import DENSE, WeightSlot
from minisgl.kernel.state import DeltaState, DeltaWeights
from minisgl.layers.base import Layer, LayerEnv, Tensor, whole
from minisgl.layers.linear import ColumnLinear, RowLinear

_HEADS, _CHANNELS = "heads of a delta net", "channels of a convolution"


class GatedDeltaNet(Layer):
    """A gated delta net, as the block of decoder layer `layer`: projections, the net with its state, output. Ranks
    share the heads."""

    stored_as = "linear_attn"

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        spec, hidden = config.layers[layer].attention.cache, config.hidden_size
        assert isinstance(spec, DeltaNet)
        self._ops, self._layer, self._spec, self._eps = env.ops, layer, spec, config.rms_norm_eps
        num_k, mine = (env.share(num, _HEADS) for num in (spec.num_k_heads, spec.num_v_heads))
        keys, values, each = (spec.num_k_heads, spec.k_dim), (spec.num_v_heads, spec.v_dim), len(mine) // len(num_k)
        parts, orders = {"in_proj_q": keys, "in_proj_k": keys, "in_proj_v": values, "in_proj_z": values}, {}
        gates = dict.fromkeys(("in_proj_b", "in_proj_a"), (spec.num_v_heads, 1))
        if spec.is_grouped:
            key, value = spec.k_dim, each * spec.v_dim
            groups = {"in_proj_qkvz": (key, key, value, value), "in_proj_ba": (each, each)}
            parts, gates = ({name: (keys[0], sum(sizes))} for name, sizes in groups.items())
            orders = {name: _ungrouped(len(num_k), sizes) for name, sizes in groups.items()}
        is_joint = env.format is DENSE and env.device.type == "cuda" and len(mine) % 8 == 0  # one norm, one product
        self.in_proj = ColumnLinear(env, hidden, parts | gates if is_joint else parts, _HEADS, orders=orders)
        self.gates_proj = None if is_joint else ColumnLinear(env, hidden, gates, _HEADS, orders=orders)
        self.out_proj = RowLinear(env, values[0] * values[1], hidden, False, _HEADS)
        kinds = torch.arange(spec.num_channels).split_with_sizes([num * size for num, size in (keys, keys, values)])
        channels = torch.cat([part.chunk(env.comm.size)[env.comm.rank] for part in kinds])
        a_log, dt_bias = (torch.empty(len(mine), dtype=torch.float32, device=env.device) for _ in range(2))
        conv, shape = env.vector(len(channels), spec.width), (spec.num_channels, 1, spec.width)
        self._weights = DeltaWeights(conv, a_log, dt_bias, env.vector(spec.v_dim), self._eps)
        convolution = WeightSlot("conv1d.weight", shape, conv, (0, shape[0]), transform=lambda part: part[channels, 0])
        rows = mine.start, mine.stop
        shared = [WeightSlot(n, values[:1], x, rows) for n, x in (("A_log", a_log), ("dt_bias", dt_bias))]
        self.slots = [convolution, *shared, whole("norm.weight", self._weights.norm)]
        self.cpu_block = "delta_net", self._weights

    def forward(self, x: Tensor, norm: Tensor | None, after: Tensor | None, step: StepContext) -> Tensor:
        """x: [num_tokens, hidden], the stream; norm: of the block's input; after: of its output → the new stream."""
        qkvz, gates, num = self.in_proj.project(x, norm, self._eps), self.gates_proj, 2 * len(self._weights.a_log)
        qkvz, ba = (qkvz, gates.project(x, norm, self._eps)) if gates else (qkvz[:, :-num], qkvz[:, -num:])
        state = DeltaState(*step.kv.states.layer(self._layer))
        out = self._ops.gated_delta_net(qkvz, ba, self._weights, state, step.seqs)
        return self.out_proj.forward(out, x, after, self._eps)


def _ungrouped(num_groups: int, sizes: Sequence[int]) -> Tensor:
    """The order of rows that brings together those of a kind, where each group has so many of every kind."""
    rows = torch.arange(num_groups * sum(sizes)).view(num_groups, -1)
    return torch.cat([part.flatten() for part in rows.split_with_sizes(sizes, 1)])


class GatedShortConv(Layer):
    """A short convolution between gates, as the block of decoder layer `layer` (LFM2): projection, convolution, output.
    Ranks share the channels."""

    stored_as = "conv"

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        spec, hidden = config.layers[layer].attention.cache, config.hidden_size
        assert isinstance(spec, ShortConv)
        self._ops, self._layer, self._eps = env.ops, layer, config.rms_norm_eps
        mine, shape = env.share(spec.num_channels, _CHANNELS), (spec.num_channels, 1, spec.width)
        parts = dict.fromkeys(("before_proj", "behind_proj", "value_proj"), (spec.num_channels, 1))
        self.in_proj = ColumnLinear(env, hidden, parts, _CHANNELS, spec.bias)
        self.out_proj = RowLinear(env, spec.num_channels, hidden, spec.bias, _CHANNELS)
        self._weight, self._bias = env.vector(len(mine), spec.width), env.vector(len(mine)) if spec.bias else None
        self.cpu_block, rows = ("short_conv", (self._weight, self._bias)), (mine.start, mine.stop)
        self.slots = [WeightSlot("conv.weight", shape, self._weight, rows, transform=lambda part: part.flatten(1))]
        self.slots += [] if self._bias is None else [WeightSlot("conv.bias", shape[:1], self._bias, rows)]

    def forward(self, x: Tensor, norm: Tensor | None, after: Tensor | None, step: StepContext) -> Tensor:
        """x: [num_tokens, hidden], the stream; norm: of the block's input; after: of its output → the new stream."""
        gated, state = self.in_proj.project(x, norm, self._eps), step.kv.states.layer(self._layer)
        out = self._ops.short_conv(gated, self._weight, self._bias, state, step.seqs)
        return self.out_proj.forward(out, x, after, self._eps)
