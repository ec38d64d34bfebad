"""What a model is made of, as explicit numbers: a specification of each layer, and what all layers share. No torch."""

from dataclasses import dataclass, field
from math import prod

from minisgl.config.pooling import Pooling
from minisgl.config.quantization import Quantization
from minisgl.config.states import State

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_BYTES = {**DTYPE_BYTES, "fp8": 1, "int8": 1}  # of what caches hold
SCALE_BYTES = 4  # of each key and each value of a head in int8


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """A table of rotary angles: base and scaling, as `families.yaml` names them."""

    theta: float
    type: str = "default"
    max_position: int = 0  # of the unscaled model (`original_max_position_embeddings` where given)
    scaling: dict[str, float] = field(default_factory=dict)
    factors: tuple[float, ...] = ()  # by which the frequencies are divided, one for each
    long_factors: tuple[float, ...] = ()  # in their place where sequences may be longer than `max_position`
    rotary_dim: int = 0  # features of a head that are rotated, the first ones; 0: all
    is_interleaved: bool = False  # checkpoints have the two features of a pair side by side, not in two halves
    scale: float = 1.0  # of queries and of keys: its square is that of the scores
    query_beta: float = 0.0  # queries at position p are times 1 + query_beta * log(1 + floor(p / max_position))


@dataclass(frozen=True, slots=True)
class PagedKV:
    """A cache that grows with its sequence, in pages: a key and a value for each token and head."""

    heads: int  # on all ranks
    k_dim: int
    v_dim: int

    def local_heads(self, tp_size: int) -> int:
        """Heads that one rank stores: a share, or a replica of one where heads are fewer than ranks."""
        return max(1, self.heads // tp_size)

    def local_size(self, tp_size: int) -> int:
        """Numbers that one rank stores for a token."""
        return self.local_heads(tp_size) * (self.k_dim + self.v_dim)


CacheSpec = PagedKV | State


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What attention computes in a layer. `config/backends.yaml` says which backend computes what of it."""

    cache: CacheSpec
    window: int | None = None  # tokens that a position sees, itself included; None: all before it
    rope_index: int = 0  # of `ModelConfig.ropes`
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: bool = False  # a weight of each head takes part in the softmax
    gated: str = ""  # what comes out is multiplied with the sigmoid of gates: of its "features", or of "heads"
    source: int | None = None  # the layer whose keys and values it attends to; None: its own
    value_norms: bool = False  # values are normalised, too, without a weight
    values_are_keys: bool = False  # before norm and rotation


@dataclass(frozen=True, slots=True)
class DenseMLP:
    """down(activation(gate(x)) * up(x))."""

    intermediate_size: int
    bias: bool = False
    activation: str = "silu"

    @property
    def active_features(self) -> int:
        """Inner features that one token goes through."""
        return self.intermediate_size

    def num_weights(self, hidden_size: int, tp_size: int) -> int:
        return 3 * self.intermediate_size * hidden_size // tp_size


@dataclass(frozen=True, slots=True)
class MoE:
    """Mixture of experts, each a `DenseMLP`.

    sums_to_1: whether the probabilities do that weight a token's `num_experts_per_tok` most probable experts.
    shared_size: inner features of one more expert, which all tokens go through, weighted by the sigmoid of a gate; 0:
    there is none. bias: of router and experts. turns: weights are stored as [in, out], columns of gate and up in turn.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    sums_to_1: bool = False
    activation: str = "silu"
    shared_size: int = 0
    bias: bool = False
    turns: bool = False

    @property
    def active_features(self) -> int:
        return self.num_experts_per_tok * self.intermediate_size + self.shared_size

    def num_weights(self, hidden_size: int, tp_size: int) -> int:
        features = self.num_experts * self.intermediate_size + self.shared_size
        return 3 * features * hidden_size // tp_size + self.num_experts * hidden_size


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Names of a layer's norms: of what goes into attention and into the MLP, and of what comes out of each, before it
    is added to the residual stream; "" where there is none."""

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    of_heads: str = ""  # "each": of each query and key head; "all": of all queries' features at once, and of all keys'


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: its two halves and its norms."""

    attention: AttentionSpec
    mlp: DenseMLP | MoE
    norms: LayerNorms = LayerNorms()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer."""

    architecture: str  # "LlamaForCausalLM", …
    vocab_size: int
    hidden_size: int
    num_qo_heads: int
    head_dim: int  # of queries
    rms_norm_eps: float  # of the residual stream
    max_position: int  # longest sequence that the model is made for, scaling included
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeConfig, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    dtype: str = "float32"  # of the checkpoint
    eos_token_ids: tuple[int, ...] = ()
    packed_bytes: int = 0  # of weights that stay packed as they are stored; 0: there are none
    quantization: Quantization | None = None  # of these, in safetensors
    norm_offset: float = 0.0  # that checkpoints leave out of the weights of norms
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # logits become softcap * tanh(logit / softcap)
    layer_inputs: int = 0  # features that each layer gets of each token from a table of its own; 0: there is none
    layer_scalars: bool = False  # each layer's result is multiplied with a number of its own
    pooling: Pooling | None = None  # what is made of hidden states; None: nothing
    mtp: tuple[LayerSpec, ...] = ()  # of the head that foretells tokens; (): there is none, or it is not used
    second: "tuple[str, ModelConfig] | None" = None  # a small one that guesses, in the same pages; and where it is
    aux_layers: tuple[int, ...] = ()  # of heads of their own: behind which of the model's layers they read the stream
    norms_residual: bool | None = None  # of EAGLE's heads: whether what they add to is normalised; None: of others
    block: tuple[int, int] | None = None  # of DFlash's heads: its tokens, and which stands for those to come

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def cached_layers(self) -> tuple[LayerSpec, ...]:
        """All that have a cache, in the order of their caches."""
        return (*self.layers, *self.mtp)

    def caches(self, windowed: bool | None = None) -> list[PagedKV]:
        """Of layers with keys and values of their own: of those whose windows slide, of the others, or of all."""
        specs = [layer.attention for layer in self.cached_layers if layer.attention.source is None]  # but not others'
        kinds = (True, False) if windowed is None else (windowed,)
        return [spec.cache for spec in specs if isinstance(spec.cache, PagedKV) and (spec.window is not None) in kinds]

    @property
    def window(self) -> int:
        """Tokens that those layers see whose windows slide; 0: there are none."""
        specs = [layer.attention for layer in self.layers if isinstance(layer.attention.cache, PagedKV)]
        return max([spec.window or 0 for spec in specs], default=0)

    @property
    def num_kv_heads(self) -> int:
        """The fewest that a layer has."""
        return min((cache.heads for cache in self.caches()), default=self.num_qo_heads)

    def kv_bytes_per_token(self, dtype: str, tp_size: int = 1, windowed: bool | None = None) -> int:
        """Bytes of KV cache that one token takes on one rank, in the layers of `caches`."""
        caches = self.caches(windowed)
        scales = 2 * SCALE_BYTES * sum(cache.local_heads(tp_size) for cache in caches) if dtype == "int8" else 0
        more = self.second[1].kv_bytes_per_token(dtype, tp_size, windowed) if self.second else 0
        return sum(cache.local_size(tp_size) for cache in caches) * KV_BYTES[dtype] + scales + more

    @property
    def states(self) -> list[State]:
        return [cache for layer in self.layers if isinstance(cache := layer.attention.cache, State)]

    def state_bytes(self, tp_size: int = 1, draft_len: int = 0) -> int:
        """Bytes that one running request takes on one rank, whatever its length, at most: if all are float32."""
        return 4 * sum(prod(shape) for state in self.states for shape in state.shapes(tp_size, draft_len))

    def attention_weights(self, spec: AttentionSpec, tp_size: int = 1) -> int:
        """Weights of a layer's attention, or of what it has in its place, on one rank."""
        if not isinstance(spec.cache, PagedKV):
            return spec.cache.num_weights(self.hidden_size, tp_size)
        queries = self.num_qo_heads * spec.cache.k_dim * (2 + bool(spec.gated)) // tp_size
        return (queries + (spec.source is None) * spec.cache.local_size(tp_size)) * self.hidden_size

    def weight_bytes(self, dtype: str, tp_size: int = 1) -> int:
        """Bytes of weights (also "int8", "fp8", "int4", "packed" as stored) on one rank, but for the few replicated."""
        more = self.second[1].weight_bytes("bfloat16", tp_size) if self.second else 0
        if dtype == "packed":
            return self.packed_bytes // tp_size + more
        params = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2) // tp_size
        params += self.num_layers * self.layer_inputs * (self.vocab_size // tp_size + 3 * self.hidden_size)
        for layer in self.cached_layers:
            params += layer.mlp.num_weights(self.hidden_size, tp_size) + 2 * self.hidden_size
            params += self.attention_weights(layer.attention, tp_size)
        return int(params * {**KV_BYTES, "int4": 0.75}[dtype]) + more
