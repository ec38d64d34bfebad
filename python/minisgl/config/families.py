"""From `config.json` to a `ModelConfig`, and what each supported architecture reads there: the whole difference between
families, in one place. Defaults are those of the `transformers` configuration class of the family, which leaves a field
out of the file when it has the default.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minisgl.config.chat import read_ends
from minisgl.config.locate import MAX_INT, Fields, check_directory, merge, read_json
from minisgl.config.model import (
    DTYPE_BYTES,
    HEAD_NORMS,
    PRE_NORMS,
    AttentionSpec,
    DenseMLP,
    LayerSpec,
    ModelConfig,
    MoE,
    PagedKV,
    RopeConfig,
)
from minisgl.errors import ConfigError

logger = logging.getLogger(__name__)
MAX_LAYERS = 4096

# Scaling types with the numbers that they need besides `rope_theta`, and those that they may have.
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": ((), ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu"}
_LAYER_TYPES = ("full_attention", "sliding_attention", "attention")  # the last is an older name of the first

Layers = tuple[LayerSpec, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture: the `model_type` that it goes by, what only it reads, and defaults where families differ."""

    model_type: str
    read: Callable[[Fields, Layers], dict[str, Any]]  # the file's fields, plain layers → fields of `ModelConfig`
    max_position: int
    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden size / query heads


def _llama(f: Fields, layers: Layers) -> dict[str, Any]:
    mlp = layers[0].mlp
    assert isinstance(mlp, DenseMLP)
    mlp = replace(mlp, bias=f.boolean("mlp_bias", False))
    return {**_biases(f), "layers": tuple(replace(layer, mlp=mlp) for layer in layers)}


def _mistral(f: Fields, layers: Layers) -> dict[str, Any]:
    """`layer_types` says which layers slide; without it all do."""
    return {"layers": _sliding(f, layers, f.list_of(str, "layer_types") or ["sliding_attention"] * len(layers))}


def _qwen2(f: Fields, layers: Layers) -> dict[str, Any]:
    """`layer_types` says which layers slide; without it those from `max_window_layers` on."""
    if not f.boolean("use_sliding_window", False):
        return {"qkv_bias": True, "layers": layers}
    full = ["full_attention"] * f.integer("max_window_layers", 28, 0, MAX_LAYERS)
    kinds = f.list_of(str, "layer_types") or [*full, *["sliding_attention"] * len(layers)][: len(layers)]
    return {"qkv_bias": True, "layers": _sliding(f, layers, kinds)}


def _qwen3(f: Fields, layers: Layers) -> dict[str, Any]:
    return {**_qwen2(f, _with_head_norms(layers)), **_biases(f)}


def _qwen3_moe(f: Fields, layers: Layers) -> dict[str, Any]:
    dense, step = f.list_of(int, "mlp_only_layers"), f.integer("decoder_sparse_step", 1)
    num_experts = f.integer("num_local_experts", None, 0)
    num_experts = f.integer("num_experts", 128, 0) if num_experts is None else num_experts
    moe = MoE(
        num_experts=num_experts,
        num_experts_per_tok=f.integer("num_experts_per_tok", 8),
        intermediate_size=f.integer("moe_intermediate_size", 768),
        routing="softmax_of_chosen" if f.boolean("norm_topk_prob", False) else "softmax",
        activation=layers[0].mlp.activation,
    )
    sparse = [i not in dense and num_experts > 0 and (i + 1) % step == 0 for i in range(len(layers))]
    if any(sparse) and moe.num_experts_per_tok > num_experts:
        raise f.wrong("num_experts_per_tok", f"at most the number of experts, {num_experts}")
    layers = tuple(replace(layer, mlp=moe) if is_moe else layer for layer, is_moe in zip(layers, sparse, strict=True))
    kinds = ["sliding_attention" if f.boolean("use_sliding_window", False) else "full_attention"] * len(layers)
    return {**_biases(f), "layers": _sliding(f, _with_head_norms(layers), kinds)}


def _biases(f: Fields) -> dict[str, Any]:
    bias = f.boolean("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias}


def _with_head_norms(layers: Layers) -> Layers:
    return tuple(replace(layer, norms=PRE_NORMS + HEAD_NORMS) for layer in layers)


def _sliding(f: Fields, layers: Layers, kinds: Sequence[str]) -> Layers:
    """Layers of the kind "sliding_attention" with `sliding_window` (4096 where a file has none; null: no window)."""
    window = f.integer("sliding_window", None if "sliding_window" in f.data else 4096)
    windows = (window if kind == "sliding_attention" else None for kind in kinds)
    pairs = zip(layers, windows, strict=True)
    return tuple(replace(layer, attention=replace(layer.attention, window=window)) for layer, window in pairs)


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", _llama, 2048),
    "MistralForCausalLM": Family("mistral", _mistral, 131072, num_kv_heads=8),
    "MinistralForCausalLM": Family("ministral", _mistral, 131072, num_kv_heads=8),
    "Qwen2ForCausalLM": Family("qwen2", _qwen2, 32768, num_kv_heads=32),
    "Qwen3ForCausalLM": Family("qwen3", _qwen3, 32768, num_kv_heads=32, head_dim=128),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", _qwen3_moe, 32768, num_kv_heads=4),
}


def read_model_config(model_dir: str | Path, override: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read `config.json` of a local Hugging Face model directory, and the ends that its other files name.

    override: merged into `config.json` before it is read.
    Raises: ConfigError naming the missing file, the value of the wrong kind, or what is not supported.
    """
    path = Path(model_dir)
    check_directory(path)
    config_path = path / "config.json"
    fields = Fields(merge(read_json(config_path), override or {}), str(config_path))
    model = parse_model_config(fields)
    return replace(model, eos_token_ids=read_ends(path, fields, model.vocab_size))


def parse_model_config(f: Fields) -> ModelConfig:
    """The `ModelConfig` of a parsed `config.json`, but for `eos_token_ids`.

    Raises: ConfigError naming what is missing, of the wrong kind, or unsupported, and what is supported.
    """
    architecture = _architecture(f)
    family = FAMILIES[architecture]
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if f.data.get(key) is None]:
        raise ConfigError(f"{f.source}: {', '.join(missing)} missing")
    _refuse_unsupported(f)
    num_layers, num_heads = f.integer("num_hidden_layers", 0), f.integer("num_attention_heads", 0)
    hidden = f.integer("hidden_size", 0)
    default_kv_heads = num_heads if "num_key_value_heads" in f.data else family.num_kv_heads or num_heads
    num_kv_heads = f.integer("num_key_value_heads", default_kv_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(f"{f.source}: {num_kv_heads} key-value heads do not divide {num_heads} attention heads")
    head_dim = f.integer("head_dim", family.head_dim or hidden // num_heads)
    if head_dim < 2 or head_dim % 2:
        raise ConfigError(f"{f.source}: head_dim is {head_dim}, but rotary embeddings need an even one")
    rope, max_position = _rope(f, f.integer("max_position_embeddings", family.max_position))
    mlp = DenseMLP(f.integer("intermediate_size", 0), activation=_ACTIVATIONS[f.text("hidden_act", "silu")])
    plain = LayerSpec(AttentionSpec(PagedKV(num_kv_heads, head_dim, head_dim)), mlp)
    return ModelConfig(
        architecture=architecture,
        vocab_size=f.integer("vocab_size", 0),
        hidden_size=hidden,
        num_qo_heads=num_heads,
        head_dim=head_dim,
        rms_norm_eps=float(f.number("rms_norm_eps", 1e-6, above=0)),
        ropes=(rope,),
        max_position=max_position,
        tie_word_embeddings=f.boolean("tie_word_embeddings", False),
        dtype=_dtype(f),
        **family.read(f, (plain,) * num_layers),
    )


def _architecture(f: Fields) -> str:
    """The first that is supported; without any, the one that goes by this `model_type`, as in transformers."""
    names = f.list_of(str, "architectures")
    if not names:
        names = [name for name, family in FAMILIES.items() if family.model_type == f.text("model_type", None)]
    # A file may name the model without its head (`LlamaModel`); whether it has one, the weights tell.
    for name in (name.removesuffix("Model") + "ForCausalLM" * name.endswith("Model") for name in names):
        if name in FAMILIES:
            return name
    found = ", ".join(names) or "none given"
    raise ConfigError(f"{f.source}: architecture not supported: {found} (supported: {', '.join(FAMILIES)})")


def _refuse_unsupported(f: Fields) -> None:
    for key in ("quantization_config", "compression_config"):
        if f.data.get(key):
            method = f.child(key).text("quant_method", "unknown")
            raise ConfigError(f"{f.source}: {key} ({method}) not supported; use an unquantized checkpoint")
    if (act := f.text("hidden_act", "silu")) not in _ACTIVATIONS:
        raise ConfigError(f"{f.source}: hidden_act {act!r} not supported (supported: silu)")
    kinds, num_layers = f.list_of(str, "layer_types"), f.integer("num_hidden_layers", 0, most=MAX_LAYERS)
    if others := set(kinds) - set(_LAYER_TYPES):
        names = ", ".join(sorted(others))
        raise ConfigError(f"{f.source}: layer_types {names} not supported (supported: {', '.join(_LAYER_TYPES)})")
    if kinds and len(kinds) != num_layers:
        raise ConfigError(f"{f.source}: layer_types has {len(kinds)} entries, but num_hidden_layers is {num_layers}")


def _rope(f: Fields, max_position: int) -> tuple[RopeConfig, int]:
    """RoPE in transformers-5 form (`rope_parameters`) or the older (`rope_theta`, `rope_scaling`, which wins as a whole
    where both are given), and the longest sequence."""
    parameters = f.child("rope_parameters")
    rope = f.child("rope_scaling") if f.data.get("rope_scaling") else parameters
    if any(isinstance(value, dict) for value in rope.data.values()):
        raise ConfigError(f"{f.source}: rope_parameters that differ by layer type are not supported")
    theta = rope.number("rope_theta", f.number("rope_theta", None, above=1), above=1)
    if theta is None and (lost := parameters.data.get("rope_theta")) is not None:
        logger.warning("%s: rope_scaling replaces rope_parameters, rope_theta %s included", f.source, lost)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"{f.source}: rope type {kind!r} not supported (supported: {', '.join(ROPE_TYPES)})")
    partial = rope.number("partial_rotary_factor", f.number("partial_rotary_factor", 1.0))
    if partial != 1:
        raise ConfigError(f"{f.source}: partial_rotary_factor {partial:g} not supported (supported: 1)")
    needed, optional = ROPE_TYPES[kind]
    given = [key for key in (*needed, *optional) if rope.data.get(key) not in (None, 0)]
    numbers: dict[str, float] = {key: rope.number(key, 0.0, above=0) for key in given}
    if absent := [key for key in needed if key not in given]:
        raise ConfigError(f"{f.source}: rope type {kind!r} needs {', '.join(absent)}")
    original = f.integer("original_max_position_embeddings", rope.integer("original_max_position_embeddings", None))
    if original is None or kind == "dynamic":  # which starts at max_position_embeddings, whatever else a file says
        original = max_position
    if kind == "yarn":
        numbers.setdefault("factor", max_position / original)
        numbers["truncate"] = rope.boolean("truncate", True)
    config = RopeConfig(float(theta or 10000), kind, original, numbers)
    return config, _longest(config, max_position)


def _longest(rope: RopeConfig, max_position: int) -> int:
    """The longest sequence, in tokens: for llama3 `max_position_embeddings`. For yarn at least the original length
    times the factor: some files have that as `max_position_embeddings` too, others the original one, or one a little
    longer (Qwen3). For others, `max_position_embeddings` times the factor, unless the original length is another."""
    factor = rope.scaling.get("factor", 1.0)
    if rope.type == "yarn":
        return max(max_position, int(min(rope.max_position * factor, MAX_INT)))
    if rope.type in ("linear", "dynamic") and rope.max_position == max_position:
        return max(1, int(min(max_position * factor, MAX_INT)))
    return max_position


def _dtype(f: Fields) -> str:
    dtype = (f.text("dtype", None) or f.text("torch_dtype", None) or "float32").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"{f.source}: dtype {dtype!r} not supported (supported: {', '.join(DTYPE_BYTES)})")
    return dtype
