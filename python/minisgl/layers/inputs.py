"""What layers get of each token beside the residual stream, from a table that has some features for each layer."""

from minisgl.config.model import ModelConfig
from minisgl.kernel.activations import ACTIVATIONS
from minisgl.layers.base import Layer, LayerEnv, Tensor
from minisgl.layers.linear import ColumnLinear, Linear, RowLinear, VocabTable


class LayerInputs(Layer):
    """Embeddings of all layers, with what is made of the first layer's input added (Gemma 4)."""

    def __init__(self, env: LayerEnv, config: ModelConfig) -> None:
        self._ops, self._eps, self._scale = env.ops, config.rms_norm_eps, config.hidden_size**-0.5
        self._size, shape = config.layer_inputs, (config.num_layers * config.layer_inputs, config.hidden_size)
        self.embed_tokens_per_layer = VocabTable(env, config.vocab_size, shape[0])
        self.per_layer_model_projection = Linear(env, shape)
        self.per_layer_projection_norm = env.vector(self._size)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        """ids: [num_tokens]; x: [num_tokens, hidden], what they are embedded as → [num_tokens, layers, features]."""
        both = self.embed_tokens_per_layer.forward(ids), self.per_layer_model_projection.project(x)
        own, shared = (part.view(len(ids), -1, self._size) for part in both)
        shared = self._ops.rms_norm(shared * self._scale, self.per_layer_projection_norm, self._eps)
        return (shared + own * self._size**0.5) * 2**-0.5


class LayerInput(Layer):
    """The last block of decoder layer `layer`, which adds its own input to the stream, gated by the stream."""

    stored_as = ""

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        self._eps, self._layer, size, what = config.rms_norm_eps, layer, config.layer_inputs, "features of an input"
        self._activate, self._mine = ACTIVATIONS[config.layers[layer].mlp.activation], env.share(size, what)
        self.gate = ColumnLinear(env, config.hidden_size, {"per_layer_input_gate": (size, 1)}, what)
        self.per_layer_projection = RowLinear(env, size, config.hidden_size, False, what)
        self.post_per_layer_input_norm = env.vector(config.hidden_size)

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; inputs: of `LayerInputs` → the new stream."""
        mine = inputs[:, self._layer, self._mine.start : self._mine.stop]
        gated = self._activate(self.gate.project(x), mine)
        return self.per_layer_projection.forward(gated, x, self.post_per_layer_input_norm, self._eps)
