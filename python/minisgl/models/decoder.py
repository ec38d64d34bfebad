"""The decoder-only transformer that every supported family is an instance of; `ModelConfig` holds the differences."""

from __future__ import annotations

from collections.abc import Iterator

from minisgl.attention.base import StepContext
from minisgl.config.model import ModelConfig, MoE
from minisgl.formats.base import WeightSlot
from minisgl.layers.attention import Attention, GatedMLP, SparseMLP
from minisgl.layers.base import CpuSpec, Layer, LayerEnv, Part, Tensor, whole
from minisgl.layers.linear import VocabTable


class DecoderLayer(Layer):
    """Pre-norm attention and MLP, each of which adds to the residual stream."""

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        hidden, eps, mlp = config.hidden_size, config.rms_norm_eps, config.layers[layer].mlp
        self.self_attn = Attention(env, config, layer)
        self.mlp = SparseMLP(env, hidden, mlp, eps) if isinstance(mlp, MoE) else GatedMLP(env, hidden, mlp, eps)
        self.input_layernorm = env.vector(hidden)
        self.post_attention_layernorm = env.vector(hidden)

    def forward(self, x: Tensor, step: StepContext) -> Tensor:
        x = self.self_attn.forward(x, self.input_layernorm, step)
        return self.mlp.forward(x, self.post_attention_layernorm)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield whole(f"{prefix}input_layernorm.weight", self.input_layernorm)
        yield from self.self_attn.weights(f"{prefix}self_attn.")
        yield whole(f"{prefix}post_attention_layernorm.weight", self.post_attention_layernorm)
        yield from self.mlp.weights(f"{prefix}mlp.")

    def cpu_spec(self) -> CpuSpec | None:
        attention, mlp = self.self_attn.cpu_spec(), self.mlp.cpu_spec()
        if attention is None or mlp is None:
            return None
        norms = (self.input_layernorm, self.post_attention_layernorm, *attention.norms)
        return CpuSpec(attention.matrices + mlp.matrices, norms, attention.window)


class DecoderModel:
    """Token ids to logits."""

    def __init__(self, env: LayerEnv, config: ModelConfig) -> None:
        self._vocab_size, self._eps = config.vocab_size, config.rms_norm_eps
        self.embed_tokens = VocabTable(env, config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(env, config, i) for i in range(config.num_layers)]
        self.norm = env.vector(config.hidden_size)
        self.lm_head = self.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = VocabTable(env, config.vocab_size, config.hidden_size)

    def hidden(self, input_ids: Tensor, step: StepContext) -> Tensor:
        """input_ids: [num_tokens] int64 → the residual stream after the last layer: [num_tokens, hidden]."""
        x = self.embed_tokens.forward(input_ids)
        for layer in self.layers:
            x = layer.forward(x, step)
        return x

    def logits(self, x: Tensor, logit_tokens: Tensor | None) -> Tensor:
        """x: `hidden`'s result; logit_tokens: [n] int64, of those whose logits are wanted (None: all) → [n, vocab_size]
        in the model's dtype."""
        if logit_tokens is not None:
            x = x.index_select(0, logit_tokens)
        return self.lm_head.logits(x, self.norm, self._eps) if len(x) else x.new_empty(0, self._vocab_size)

    def parts(self) -> Iterator[Part]:
        """All that is to be filled. No more than one part is in memory both as it was loaded and as it is packed."""
        yield Part([*self.embed_tokens.weights("model.embed_tokens.")], self.embed_tokens.pack)
        for i, layer in enumerate(self.layers):
            yield Part([*layer.weights(f"model.layers.{i}.")], layer.pack)
        yield Part([whole("model.norm.weight", self.norm)], lambda: None)
        if self.lm_head is not self.embed_tokens:
            yield Part([*self.lm_head.weights("lm_head.")], self.lm_head.pack)

    def cpu_specs(self) -> list[CpuSpec] | None:
        """Of the embedding, each layer and the head; None if the CPU engine cannot compute one of them."""
        layers = (self.embed_tokens, *self.layers, self.lm_head)
        specs = [spec for layer in layers if (spec := layer.cpu_spec()) is not None]
        return specs if len(specs) == len(layers) else None
