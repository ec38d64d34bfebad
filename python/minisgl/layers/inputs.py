"""What layers get of each token beside the residual stream, from a table that has some features for each layer."""

from collections.abc import Iterator

from minisgl.config.model import ModelConfig
from minisgl.formats.base import Shard, WeightSlot
from minisgl.kernel.activations import ACTIVATIONS
from minisgl.layers.base import Layer, LayerEnv, Tensor, whole
from minisgl.layers.linear import ColumnLinear, Linear, RowLinear, VocabTable


class LayerInputs(Layer):
    """Embeddings of all layers, with what is made of the first layer's input added (Gemma 4)."""

    def __init__(self, env: LayerEnv, config: ModelConfig) -> None:
        self._ops, self._eps, self._scale = env.ops, config.rms_norm_eps, config.hidden_size**-0.5
        self._size, shape = config.layer_inputs, (config.num_layers * config.layer_inputs, config.hidden_size)
        self.table = VocabTable(env, config.vocab_size, shape[0])
        self.proj = Linear(env, shape, {"": Shard(shape, (0, shape[0]))})  # on every rank
        self.norm = env.vector(self._size)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        """ids: [num_tokens]; x: [num_tokens, hidden], what they are embedded as → [num_tokens, layers, features]."""
        own, shared = (part.view(len(ids), -1, self._size) for part in (self.table.forward(ids), self.proj.project(x)))
        shared = self._ops.rms_norm(shared * self._scale, self.norm, self._eps)
        return (shared + own * self._size**0.5) * 2**-0.5

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.table.weights(f"{prefix}embed_tokens_per_layer.")
        yield from self.proj.weights(f"{prefix}per_layer_model_projection.")
        yield whole(f"{prefix}per_layer_projection_norm.weight", self.norm)


class LayerInput(Layer):
    """The last block of decoder layer `layer`, which adds its own input to the stream, gated by the stream."""

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        self._eps, self._layer, size, what = config.rms_norm_eps, layer, config.layer_inputs, "features of an input"
        self._activate, self._mine = ACTIVATIONS[config.layers[layer].mlp.activation], env.share(size, what)
        self.gate = ColumnLinear(env, config.hidden_size, {"per_layer_input_gate": (size, 1)}, what)
        self.proj = RowLinear(env, size, config.hidden_size, False, what)
        self.norm = env.vector(config.hidden_size)

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; inputs: of `LayerInputs` → the new stream."""
        mine = inputs[:, self._layer, self._mine.start : self._mine.stop]
        return self.proj.forward(self._activate(self.gate.project(x), mine), x, self.norm, self._eps)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.gate.weights(prefix)
        yield from self.proj.weights(f"{prefix}per_layer_projection.")
        yield whole(f"{prefix}post_per_layer_input_norm.weight", self.norm)
