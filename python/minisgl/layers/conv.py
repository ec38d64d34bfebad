"""Short convolutions between gates, which stand in the place of attention in most layers of LFM2."""

from collections.abc import Iterator

from minisgl.attention.base import StepContext
from minisgl.config.model import ModelConfig
from minisgl.config.states import ShortConv
from minisgl.formats.base import WeightSlot
from minisgl.layers.base import CpuSpec, Layer, LayerEnv, Tensor, joined
from minisgl.layers.linear import ColumnLinear, RowLinear

_WHAT = "channels of a convolution"


class GatedShortConv(Layer):
    """The block of decoder layer `layer`: projection, convolution, output. Ranks share the channels."""

    name = "conv"

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        spec, hidden = config.layers[layer].attention.cache, config.hidden_size
        assert isinstance(spec, ShortConv)
        self._ops, self._layer, self._eps = env.ops, layer, config.rms_norm_eps
        mine, self._shape = env.share(spec.num_channels, _WHAT), (spec.num_channels, 1, spec.width)
        self._channels = mine.start, mine.stop
        parts = dict.fromkeys(("before_proj", "behind_proj", "value_proj"), (spec.num_channels, 1))
        self.in_proj = ColumnLinear(env, hidden, parts, _WHAT, spec.bias)
        self.out_proj = RowLinear(env, spec.num_channels, hidden, spec.bias, _WHAT)
        self._weight, self._bias = env.vector(len(mine), spec.width), env.vector(len(mine)) if spec.bias else None

    def forward(self, x: Tensor, norm: Tensor | None, after: Tensor | None, step: StepContext) -> Tensor:
        """x: [num_tokens, hidden], the stream; norm: of the block's input; after: of its output → the new stream."""
        gated, state = self.in_proj.project(x, norm, self._eps), step.kv.states.layer(self._layer)
        out = self._ops.short_conv(gated, self._weight, self._bias, state, step.seqs)
        return self.out_proj.forward(out, x, after, self._eps)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.in_proj.weights(prefix)
        yield from self.out_proj.weights(f"{prefix}out_proj.")
        name, shape, rows = f"{prefix}conv.weight", self._shape, self._channels
        yield WeightSlot(name, shape, self._weight, rows, transform=lambda part: part.flatten(1))
        if self._bias is not None:
            yield WeightSlot(f"{prefix}conv.bias", shape[:1], self._bias, rows)

    def cpu_spec(self) -> CpuSpec | None:
        return joined((self.in_proj, self.out_proj), "short_conv", (self._weight, self._bias))
