"""Short convolutions between gates, which stand in the place of attention in most layers of LFM2."""

from __future__ import annotations

from collections.abc import Iterator

from minisgl.attention.base import StepContext
from minisgl.config.model import ModelConfig
from minisgl.config.states import ShortConv
from minisgl.formats.base import WeightSlot
from minisgl.layers.base import Layer, LayerEnv, Tensor
from minisgl.layers.delta import projection
from minisgl.layers.linear import RowLinear


class GatedShortConv(Layer):
    """The block of decoder layer `layer`: projection, convolution, output. Ranks share the channels."""

    name = "conv"

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        spec, hidden = config.layers[layer].attention.cache, config.hidden_size
        assert isinstance(spec, ShortConv)
        self._ops, self._layer, self._spec, self._eps = env.ops, layer, spec, config.rms_norm_eps
        share = env.share(spec.num_channels, "channels of a convolution")
        self._channels = env.comm.rank * share, (env.comm.rank + 1) * share
        sizes = dict.fromkeys(("before_proj", "behind_proj", "value_proj"), share)
        self.in_proj = projection(env, hidden, sizes, bias=spec.bias)
        self.out_proj = RowLinear(env, spec.num_channels, hidden, spec.bias, "channels of a convolution")
        self._weight, self._bias = env.vector(share, spec.width), env.vector(share) if spec.bias else None

    def forward(self, x: Tensor, norm: Tensor | None, after: Tensor | None, step: StepContext) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the block's input; after: of its output →
        the new stream."""
        assert norm is not None, "no family does without"
        gated, seen = self.in_proj.matrix.norm_apply(x, norm, self._eps, self.in_proj.bias), step.kv.states
        out = self._ops.short_conv(gated, self._weight, self._bias, seen.conv(self._layer), step.seqs)
        return self.out_proj.forward(out, x, after, self._eps)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.in_proj.weights(prefix)
        yield from self.out_proj.weights(f"{prefix}out_proj.")
        shape = self._spec.num_channels, 1, self._spec.width
        yield WeightSlot(
            f"{prefix}conv.weight", shape, self._weight, self._channels, transform=lambda part: part.flatten(1)
        )
        if self._bias is not None:
            yield WeightSlot(f"{prefix}conv.bias", shape[:1], self._bias, self._channels)
