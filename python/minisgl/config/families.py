"""From `config.json` to a `ModelConfig`. What each supported architecture reads there is in `families.yaml`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec

from minisgl.config import model as specs
from minisgl.config.chat import read_ends
from minisgl.config.locate import check_directory, read_json
from minisgl.config.model import DenseMLP, LayerNorms, LayerSpec, ModelConfig, MoE
from minisgl.config.quantization import read_quantization
from minisgl.config.rope import Rotary, read_rope, read_ropes_by_layer
from minisgl.config.states import DeltaNet, ShortConv
from minisgl.errors import ConfigError
from minisgl.utils.fields import Fields, merge
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)
MAX_LAYERS = 4096
MAX_BYTES = 2**50
_TABLE = msgspec.yaml.decode(Path(__file__).with_name("families.yaml").read_bytes())
_ACTIVATIONS: dict[str, str] = _TABLE["activations"]


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture of `families.yaml`, which says what the fields mean."""

    model_type: str
    max_position: int
    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden size / query heads
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    head_norms: str = ""
    norm_offset: float = 0.0
    scales_embedding: bool = False
    qkv_bias: str | bool = False
    o_bias: str = ""
    mlp_bias: str = ""
    rotary: str = ""
    rope_names: Mapping[str, str] = field(default_factory=dict)
    window_pattern: int = 0
    state: str = ""
    eps: str = "rms_norm_eps"
    groups_state: bool = False
    gates_attention: bool = False
    inner: str = ""
    reads: Sequence[str] = ()  # keys that not all families do
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def has(self, f: Fields, bias: str | bool) -> bool:
        """Whether there is a bias, which a key of the file may say."""
        return f.boolean(bias, self.defaults.get(bias, False)) if isinstance(bias, str) and bias else bool(bias)


FAMILIES = {name: Family(**fields) for name, fields in _TABLE["architectures"].items()}


def read_model_config(model_dir: str | Path, override: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read `config.json` of a local Hugging Face model directory, and the ends that its other files name.

    override: merged into `config.json` before it is read.
    Raises: ConfigError naming the missing file, the value of the wrong kind, or what is not supported.
    """
    path = Path(model_dir)
    check_directory(path)
    fields = Fields(merge(read_json(path / "config.json"), override or {}), str(path / "config.json"))
    model = parse_model_config(fields)
    if (quantization := read_quantization(fields, path)) is not None:
        tables = (2 - model.tie_word_embeddings) * model.vocab_size * model.hidden_size
        each = max(s.bits / 8 + 4 / (s.group or model.hidden_size) for s in quantization.schemes)
        size = int(2 * tables + each * (model.weight_bytes("int8") - tables))  # of a shape, which has no weights
        stored = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
        model = replace(model, quantization=quantization, packed_bytes=stored or size)
    return replace(model, eos_token_ids=read_ends(path, fields, model.vocab_size))


def parse_model_config(f: Fields) -> ModelConfig:
    """The `ModelConfig` of a parsed `config.json`, but for `eos_token_ids`.

    Raises: ConfigError naming what is missing, of the wrong kind, or unsupported, and what is supported.
    """
    family = FAMILIES[architecture := _architecture(f)]
    f, family = _text_model(f, family)
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if f.data.get(key) is None and key not in family.defaults]:
        raise ConfigError(f"{f.source}: {', '.join(missing)} missing")
    _refuse_unsupported(f, family)
    num_layers, num_heads, hidden = (f.integer(name, 0) for name in (*required[3:], "hidden_size"))
    default_kv_heads = num_heads if "num_key_value_heads" in f.data else family.num_kv_heads or num_heads
    num_kv_heads = f.integer("num_key_value_heads", default_kv_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(f"{f.source}: {num_kv_heads} key-value heads do not divide {num_heads} attention heads")
    default_dim = None if "head_dim" in f.data else family.head_dim  # what transformers makes of null
    head_dim = f.integer("head_dim", default_dim or hidden // num_heads)
    if head_dim < 2 or head_dim % 2:
        raise ConfigError(f"{f.source}: head_dim is {head_dim}, but rotary embeddings need an even one")
    default, (embedding, residual, logits, scores) = family.defaults.get, _scales(f, family, hidden, head_dim)
    windows = _windows(f, family, num_layers)
    ropes, rope_of_layer, max_position = _ropes(f, family, (head_dim, scores), windows)
    names = [f"{of}_logit_softcapping" for of in ("attn", "final")] if "softcaps" in family.reads else [""] * 2
    caps = [f.number(name, None if name in f.data else default(name), above=0) for name in names]
    cache = specs.PagedKV(num_kv_heads, head_dim, head_dim)
    states = _convolutions(f, hidden, num_layers) if family.state == "conv" else _states(f, family, num_layers)
    norms, mlps = LayerNorms(*family.norms, family.head_norms), _mlps(f, family, num_layers)
    kind = caps[0], "sinks" in family.reads, family.gates_attention
    attentions = (
        specs.AttentionSpec(state or cache, window, rope, *kind)
        for state, window, rope in zip(states, windows, rope_of_layer, strict=True)
    )
    layers = tuple(LayerSpec(spec, mlp, norms) for spec, mlp in zip(attentions, mlps, strict=True))
    eps = f.number(family.eps, default(family.eps, 1e-6), above=0)
    tied = f.boolean("tie_word_embeddings", default("tie_word_embeddings", False))
    return ModelConfig(
        architecture=architecture,
        vocab_size=f.integer("vocab_size", 0),
        hidden_size=hidden,
        num_qo_heads=num_heads,
        head_dim=head_dim,
        rms_norm_eps=float(eps) / residual**2,
        ropes=ropes,
        max_position=max_position,
        tie_word_embeddings=f.boolean("tie_embedding", tied) if family.state == "conv" else tied,
        qkv_bias=family.has(f, family.qkv_bias),
        o_bias=family.has(f, family.o_bias),
        dtype=_dtype(f),
        packed_bytes=f.integer("packed_bytes", 0, most=MAX_BYTES),
        layers=layers,
        mtp=_mtp(f, layers),
        norm_offset=family.norm_offset,
        embedding_scale=embedding / residual,
        logit_scale=logits,
        logit_softcap=caps[1],
    )


def _mtp(f: Fields, layers: Sequence[LayerSpec]) -> LayerSpec | None:
    """The layer of a head for multi-token prediction, if there is one: as the last that has keys and values."""
    if f.integer("mtp_num_hidden_layers", 0, 0) != 1:
        return None
    spec = [layer for layer in layers if isinstance(layer.attention.cache, specs.PagedKV)][-1]
    if (size := f.integer("mtp_intermediate_size", 0, 0)) and isinstance(spec.mlp, DenseMLP):
        spec = replace(spec, mlp=replace(spec.mlp, intermediate_size=size))
    return spec


def _text_model(f: Fields, family: Family) -> tuple[Fields, Family]:
    """Of a model that sees or hears, what its file says of its text model, and of both; and that model's family."""
    if not family.inner:
        return f, family
    text, shared = f.child(family.inner), ("tie_word_embeddings", "dtype", "torch_dtype", "packed_bytes")
    given = {key: value for key in shared if (value := f.data.get(key)) is not None}
    fields, kind = Fields({**text.data, **given}, f.source, f"{family.inner}."), text.text("model_type", "")
    return fields, next((one for one in FAMILIES.values() if one.model_type == kind and not one.inner), family)


def _scales(f: Fields, family: Family, hidden: int, head_dim: int) -> tuple[float, float, float, float]:
    """What multiplies embeddings, what a layer adds to the stream, logits, and queries and keys.

    The stream can be held smaller by the second factor, for all that reads it is a norm: embeddings are divided by it,
    and epsilon by its square.
    """
    embedding, residual, logits, scores = hidden**0.5 if family.scales_embedding else 1.0, 1.0, 1.0, head_dim**-0.5
    if "multipliers" in family.reads:
        embedding, residual = (f.number(f"{name}_multiplier", 1.0, above=0) for name in ("embedding", "residual"))
        logits, scores = 1 / f.number("logits_scaling", 1.0, above=0), f.number("attention_multiplier", 1.0, above=0)
    if "query_pre_attn_scalar" in family.reads:
        scores = f.number("query_pre_attn_scalar", 256.0, above=0) ** -0.5
    return embedding, residual, logits, (scores * head_dim**0.5) ** 0.5


def _ropes(
    f: Fields, family: Family, head: tuple[int, float], windows: list[int | None]
) -> tuple[tuple[specs.RopeConfig, ...], list[int], int]:
    """The tables, which of them each layer has, and the longest sequence. head: its size and scale."""
    longest, default = f.integer("max_position_embeddings", family.max_position), family.defaults.get
    share = default("partial_rotary_factor", 1.0) if "partial_rotary_factor" in family.reads else None
    kind = Rotary(*head, share, family.rotary == "interleaved", family.rope_names)
    if "ropes_by_layer" in family.reads:
        full, sliding, longest = read_ropes_by_layer(f, kind, longest, family.defaults)
        return (full, sliding), [int(window is not None) for window in windows], longest
    has_none = f.data.get("rope_parameters") is None and not f.data.get("rope_scaling")
    if "rope_parameters" in family.defaults and has_none:
        f = Fields({**f.data, "rope_parameters": default("rope_parameters")}, f.source)
    rope, longest = read_rope(f, kind, longest, default("rope_theta", 10000.0))
    if "no_rope_layers" not in family.reads:
        return (rope,), [0] * len(windows), longest
    interval, rotated = f.integer("no_rope_layer_interval", 4), f.list_of(int, "no_rope_layers")
    rotated = rotated or [(i + 1) % interval for i in range(len(windows))]
    if len(rotated) != len(windows):
        raise f.wrong("no_rope_layers", f"as many as layers, {len(windows)}")
    return (rope, replace(rope, type="none")), [int(not rotates) for rotates in rotated], longest


def _windows(f: Fields, family: Family, num_layers: int) -> list[int | None]:
    """Of each layer: `sliding_window` (4096 where the file has none; null: no window) if it is of the kind that slides.

    `layer_types` says which are; without it all from `max_window_layers` on, or all but every n-th.
    """
    reads = family.reads
    are_used = "use_sliding_window" not in reads or f.boolean("use_sliding_window", False)
    if "sliding_window" not in reads or not are_used:
        return [None] * num_layers
    num_full = f.integer("max_window_layers", 28, 0, MAX_LAYERS) if "max_window_layers" in reads else 0
    kinds = f.list_of(str, "layer_types") if "layer_types" in reads else []
    slides = [kind == "sliding_attention" for kind in kinds] or [i >= num_full for i in range(num_layers)]
    if family.window_pattern and not kinds:
        pattern = f.integer("sliding_window_pattern", family.window_pattern)
        slides = [(i + 1) % pattern > 0 for i in range(num_layers)]
    default = None if "sliding_window" in f.data else family.defaults.get("sliding_window", 4096)
    window = f.integer("sliding_window", default)
    return [window if sliding else None for sliding in slides]


def _convolutions(f: Fields, hidden: int, num_layers: int) -> Sequence[ShortConv | None]:
    """Of each layer, where it has one in place of keys and values: all but those of `full_attn_idxs`, which are all
    where it is missing; or as `layer_types` says."""
    full = range(num_layers) if f.data.get("full_attn_idxs") is None else f.list_of(int, "full_attn_idxs")
    kinds = f.list_of(str, "layer_types") or ["full_attention" if i in full else "conv" for i in range(num_layers)]
    if set(kinds) == {"conv"}:
        raise ConfigError(f"{f.source}: a model all of whose layers are conv is not supported")
    conv = ShortConv(hidden, f.integer("conv_L_cache", 3), f.boolean("conv_bias", False))
    return [conv if kind == "conv" else None for kind in kinds]


def _inner_size(f: Fields, family: Family) -> int:
    """Features of an MLP; LFM2's files name what two thirds of are meant, rounded up to a multiple."""
    size = f.integer("intermediate_size", family.defaults.get("intermediate_size", 0))
    if family.state != "conv" or not f.boolean("block_auto_adjust_ff_dim", True):
        return f.integer("block_ff_dim", size) if family.state == "conv" else size
    size = int(f.number("block_ffn_dim_multiplier", 1.0, above=0) * int(2 * f.integer("block_ff_dim", size) / 3))
    multiple = f.integer("block_multiple_of", 256)
    return max(1, div_ceil(size, multiple)) * multiple


def _states(f: Fields, family: Family, num_layers: int) -> Sequence[DeltaNet | None]:
    """Of each layer, where it has one in place of keys and values: `layer_types` says which do, and without it all but
    every n-th."""
    if not family.state:
        return [None] * num_layers
    kinds, interval = f.list_of(str, "layer_types"), f.integer("full_attention_interval", 4)
    has_state = [kind == family.state for kind in kinds] or [(i + 1) % interval > 0 for i in range(num_layers)]
    if all(has_state):
        raise ConfigError(f"{f.source}: a model all of whose layers are {family.state} is not supported")
    if _ACTIVATIONS[_activation(f, family)] != "silu":
        raise f.wrong("hidden_act", f"silu in a model with {family.state}")
    heads = f.integer("linear_num_key_heads", 16), f.integer("linear_num_value_heads", 32)
    if heads[1] % heads[0]:
        raise f.wrong("linear_num_value_heads", f"a multiple of the heads of keys, {heads[0]}")
    dims = f.integer("linear_key_head_dim", 128), f.integer("linear_value_head_dim", 128)
    state = DeltaNet(*heads, *dims, f.integer("linear_conv_kernel_dim", 4), family.groups_state)
    return [state if has else None for has in has_state]


def _mlps(f: Fields, family: Family, num_layers: int) -> list[DenseMLP | MoE]:
    """Of each layer: experts in every `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    bias, size = family.has(f, family.mlp_bias), _inner_size(f, family)
    dense = DenseMLP(size, bias, _ACTIVATIONS[_activation(f, family)])
    default, reads = family.defaults.get, family.reads
    if "num_local_experts" in reads and "num_experts" not in reads:
        numbers = (("num_local_experts", 8), ("num_experts_per_tok", 2))
        num_experts, chosen = (f.integer(key, default(key, usual)) for key, usual in numbers)
        is_clamped, num_experts = "clamped_experts" in reads, f.integer("num_experts", num_experts)
        activation = "clamped_swiglu" if is_clamped else dense.activation
        only, step, moe = [], 1, MoE(num_experts, chosen, size, "softmax_of_chosen", activation, bias=is_clamped)
        for key, value in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
            if is_clamped and f.number(key, value) != value:
                raise f.wrong(key, f"{value:g}")
    elif "num_experts" in reads:
        only, step = f.list_of(int, "mlp_only_layers"), f.integer("decoder_sparse_step", 1)
        num_experts, key = f.integer("num_experts", default("num_experts", 128), 0), "shared_expert_intermediate_size"
        sums_to_1 = f.boolean("norm_topk_prob", default("norm_topk_prob", False))
        if "num_local_experts" in reads:  # which wins
            num_experts = f.integer("num_local_experts", num_experts, 0)
        moe = MoE(
            num_experts=num_experts,
            num_experts_per_tok=f.integer("num_experts_per_tok", default("num_experts_per_tok", 8)),
            intermediate_size=f.integer("moe_intermediate_size", default("moe_intermediate_size", 768)),
            routing="softmax_of_chosen" if default("sums_to_1") or sums_to_1 else "softmax",
            activation=dense.activation,
            shared_size=f.integer(key, default(key, 5632)) if key in reads else 0,
        )
    else:
        return [dense] * num_layers
    sparse = [i not in only and moe.num_experts > 0 and (i + 1) % step == 0 for i in range(num_layers)]
    if any(sparse) and moe.num_experts_per_tok > moe.num_experts:
        raise f.wrong("num_experts_per_tok", f"at most the number of experts, {moe.num_experts}")
    return [moe if is_sparse else dense for is_sparse in sparse]


def _activation(f: Fields, family: Family) -> str:
    key, default = "hidden_act", "silu"
    if "hidden_activation" in family.reads:
        key, default = "hidden_activation", "gelu_pytorch_tanh"
    if (name := f.text(key, default)) not in _ACTIVATIONS:
        raise ConfigError(f"{f.source}: {key} {name!r} not supported (supported: {', '.join(_ACTIVATIONS)})")
    return name


def _architecture(f: Fields) -> str:
    """The first that is supported; without any, the one that goes by this `model_type`, as in transformers."""
    names = f.list_of(str, "architectures")
    if not names:
        names = [name for name, family in FAMILIES.items() if family.model_type == f.text("model_type", None)]
    # A file may name the model without its head (`LlamaModel`); whether it has one, the weights tell.
    for name in (re.sub("(Model|ForSequenceClassification)$", "ForCausalLM", name) for name in names):
        if name in FAMILIES:
            return name
    known = ", ".join(name.removesuffix("ForCausalLM") for name, family in FAMILIES.items() if not family.inner)
    missing = [what for begin, what in _TABLE["missing"].items() if names and names[0].startswith(begin)]
    nearest = get_close_matches(names[0], FAMILIES, 1) if names and not missing else []
    hints = [f"missing: {what}; " for what in missing] + [f"nearest: {name}; " for name in nearest]
    known = "".join(hints) + f"supported: {known}, each ForCausalLM"
    raise ConfigError(f"{f.source}: architecture not supported: {', '.join(names)[:80] or 'none given'} ({known})")


def _refuse_unsupported(f: Fields, family: Family) -> None:
    if f.boolean("use_bidirectional_attention", False):
        raise ConfigError(f"{f.source}: use_bidirectional_attention is not supported: attention here is causal")
    if not f.boolean("is_causal", True):
        raise ConfigError(f"{f.source}: is_causal false is not supported: attention here is causal")
    kinds, num_layers = f.list_of(str, "layer_types"), f.integer("num_hidden_layers", 0, most=MAX_LAYERS)
    supported = [family.state, "full_attention"] if family.state else _TABLE["layer_types"]
    if others := set(kinds) - set(supported):
        names = ", ".join(sorted(others))
        raise ConfigError(f"{f.source}: layer_types {names} not supported (supported: {', '.join(supported)})")
    if kinds and len(kinds) != num_layers:
        raise ConfigError(f"{f.source}: layer_types has {len(kinds)} entries, but num_hidden_layers is {num_layers}")


def _dtype(f: Fields) -> str:
    dtype = (f.text("dtype", None) or f.text("torch_dtype", None) or "float32").removeprefix("torch.")
    if dtype not in specs.DTYPE_BYTES:
        raise ConfigError(f"{f.source}: dtype {dtype!r} not supported (supported: {', '.join(specs.DTYPE_BYTES)})")
    return dtype
