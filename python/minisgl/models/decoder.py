"""The decoder-only transformer that every supported family is an instance of; `ModelConfig` holds the differences."""

from collections.abc import Iterator
from dataclasses import replace

from minisgl.attention.base import StepContext
from minisgl.config.model import ModelConfig, MoE, PagedKV
from minisgl.config.states import DeltaNet, ShortConv
from minisgl.formats.base import WeightSlot
from minisgl.layers.attention import Attention, GatedMLP, LayerInput, LayerInputs, SparseMLP
from minisgl.layers.base import CpuSpec, Layer, LayerEnv, Part, Tensor, whole
from minisgl.layers.linear import VocabTable
from minisgl.layers.states import GatedDeltaNet, GatedShortConv

Block = Attention | GatedDeltaNet | GatedShortConv
_BLOCKS: dict[type, type[Block]] = {PagedKV: Attention, DeltaNet: GatedDeltaNet, ShortConv: GatedShortConv}


class DecoderLayer(Layer):
    """Attention and MLP, each of which adds to the residual stream, with norms before or after."""

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        hidden, eps, mlp = config.hidden_size, config.rms_norm_eps, config.layers[layer].mlp
        self.self_attn = _BLOCKS[type(config.layers[layer].attention.cache)](env, config, layer)
        self.mlp = SparseMLP(env, hidden, mlp, eps) if isinstance(mlp, MoE) else GatedMLP(env, hidden, mlp, eps)
        norms = config.layers[layer].norms
        names = norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp
        self.norms = tuple(env.vector(hidden) if name else None for name in names)
        found = [(name, norm) for name, norm in zip(names, self.norms, strict=True) if norm is not None]
        self.slots = [whole(f"{name}.weight", norm, config.norm_offset) for name, norm in found]
        self.input = LayerInput(env, config, layer) if config.layer_inputs else None
        self._scalar = env.vector(1) if config.layer_scalars else None
        self.slots += [] if self._scalar is None else [whole("layer_scalar", self._scalar)]

    def forward(self, x: Tensor, step: StepContext, inputs: Tensor | None = None) -> Tensor:
        """x: [num_tokens, hidden]; inputs: [num_tokens, layers, features], of `LayerInputs` → the new stream."""
        x = self.self_attn.forward(x, self.norms[0], self.norms[1], step)
        x = self.mlp.forward(x, self.norms[2], self.norms[3])
        if self.input is not None and inputs is not None:
            x = self.input.forward(x, inputs)
        return x if self._scalar is None else x.mul_(self._scalar)

    def cpu_spec(self) -> CpuSpec | None:
        attention, mlp = self.self_attn.cpu_spec(), self.mlp.cpu_spec()
        if attention is None or mlp is None or self.input is not None or self._scalar is not None:
            return None
        return CpuSpec(blocks=(replace(attention, norms=self.norms[:2]), replace(mlp, norms=self.norms[2:])))


class DecoderModel:
    """Token ids to logits."""

    def __init__(self, env: LayerEnv, config: ModelConfig) -> None:
        self.config, self._eps, table = config, config.rms_norm_eps, (config.vocab_size, config.hidden_size)
        self.embed_tokens = VocabTable(env, *table)
        self.inputs = LayerInputs(env, config) if config.layer_inputs else None
        self.layers = [DecoderLayer(env, config, i) for i in range(config.num_layers)]
        self.norm = env.vector(config.hidden_size)
        self.lm_head = self.embed_tokens if config.tie_word_embeddings else VocabTable(env, *table)
        pooling, self._ops = config.pooling, env.ops
        self.behind = dict[int, Tensor]()  # by layer, what the last step's stream was behind it: where a head reads it
        classifies = pooling is not None and pooling.kind == "score" and not pooling.label_ids
        self.score = env.vector(1, config.hidden_size) if classifies else None

    def hidden(self, input_ids: Tensor, step: StepContext) -> Tensor:
        """input_ids: [num_tokens] int64 → the residual stream after the last layer: [num_tokens, hidden]."""
        x = self.embed_tokens.forward(input_ids)
        if self.config.embedding_scale != 1:
            x *= self.config.embedding_scale
        inputs = self.inputs.forward(input_ids, x) if self.inputs is not None else None
        for i, layer in enumerate(self.layers, 1):
            x = layer.forward(x, step, inputs)
            if i in self.behind:
                self.behind[i] = x.clone()
        return x

    def pooled(self, x: Tensor, kind: str) -> Tensor:
        """x: rows of `hidden`'s result → behind the last norm, [n, hidden] float32; if kind is "score", [n, labels]."""
        labels = self.config.pooling.label_ids if self.config.pooling is not None else ()
        if kind == "score" and labels:
            return self.logits(x, None)[:, list(labels)].float()
        states = self._ops.rms_norm(x, self.norm, self._eps).float() / self.config.logit_scale
        return states if self.score is None else states @ self.score.float().T

    def logits(self, x: Tensor, logit_tokens: Tensor | None) -> Tensor:
        """x: `hidden`'s result; logit_tokens: [n] int64, of those whose logits are wanted (None: all) → [n, vocab_size]
        in the model's dtype."""
        x = x if logit_tokens is None else x.index_select(0, logit_tokens)
        if not len(x):
            return x.new_empty(0, self.config.vocab_size)
        return self.capped(self.lm_head.logits(x, self.norm, self._eps))

    def capped(self, logits: Tensor) -> Tensor:
        """logits: changed in place."""
        cap = self.config.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def parts(self) -> Iterator[Part]:
        """All that is to be filled. No more than one part is in memory both as it was loaded and as it is packed."""
        layers: dict[str, Layer | None] = {"model.embed_tokens.": self.embed_tokens, "model.": self.inputs}
        layers |= {f"model.layers.{i}.": layer for i, layer in enumerate(self.layers)}
        layers["lm_head."] = None if self.lm_head is self.embed_tokens else self.lm_head
        yield from (Part([*layer.weights(name)], layer.pack) for name, layer in layers.items() if layer is not None)
        vectors = [whole("model.norm.weight", self.norm, self.config.norm_offset, self.config.logit_scale)]
        if self.score is not None:
            vectors.append(WeightSlot("score.weight", (1, self.config.hidden_size), self.score, (0, 1)))
        yield Part(vectors, lambda: None)

    def cpu_specs(self) -> list[CpuSpec] | None:
        """Of the embedding, each layer and the head; None if the CPU engine cannot compute one of them."""
        layers = () if self.behind else (self.embed_tokens, *self.layers, self.lm_head)
        specs = [spec for layer in layers if (spec := layer.cpu_spec()) is not None]
        return specs if len(specs) == len(layers) > 0 else None
