"""From `config.json` to a `ModelConfig`. What each supported architecture reads there is in `families.yaml`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from minisgl.config import model as specs
from minisgl.config.chat import read_ends
from minisgl.config.locate import check_directory, read_json
from minisgl.config.model import DenseMLP, LayerSpec, ModelConfig, MoE, RopeConfig
from minisgl.config.quantization import read_quantization
from minisgl.errors import ConfigError
from minisgl.utils.fields import MAX_INT, Fields, merge

logger = logging.getLogger(__name__)
MAX_LAYERS = 4096
MAX_BYTES = 2**50
_TABLE = yaml.safe_load(Path(__file__).with_name("families.yaml").read_text(encoding="utf-8"))
ROPE_TYPES: dict[str, tuple[list[str], list[str]]] = _TABLE["rope_types"]
_ACTIVATIONS: dict[str, str] = _TABLE["activations"]


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture of `families.yaml`."""

    model_type: str
    max_position: int
    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden size / query heads
    head_norms: bool = False
    qkv_bias: bool = False
    reads: Sequence[str] = ()  # keys that not all families do


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
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if f.data.get(key) is None]:
        raise ConfigError(f"{f.source}: {', '.join(missing)} missing")
    _refuse_unsupported(f)
    num_layers, num_heads, hidden = (f.integer(name, 0) for name in (*required[3:], "hidden_size"))
    default_kv_heads = num_heads if "num_key_value_heads" in f.data else family.num_kv_heads or num_heads
    num_kv_heads = f.integer("num_key_value_heads", default_kv_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(f"{f.source}: {num_kv_heads} key-value heads do not divide {num_heads} attention heads")
    head_dim = f.integer("head_dim", family.head_dim or hidden // num_heads)
    if head_dim < 2 or head_dim % 2:
        raise ConfigError(f"{f.source}: head_dim is {head_dim}, but rotary embeddings need an even one")
    rope, max_position = _rope(f, f.integer("max_position_embeddings", family.max_position))
    cache = specs.PagedKV(num_kv_heads, head_dim, head_dim)
    norms = specs.PRE_NORMS + specs.HEAD_NORMS * family.head_norms
    layers = zip(_mlps(f, family, num_layers), _windows(f, family, num_layers), strict=True)
    attention_bias = "attention_bias" in family.reads and f.boolean("attention_bias", False)
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
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        dtype=_dtype(f),
        packed_bytes=f.integer("packed_bytes", 0, most=MAX_BYTES),
        layers=tuple(LayerSpec(specs.AttentionSpec(cache, window), mlp, norms) for mlp, window in layers),
    )


def _windows(f: Fields, family: Family, num_layers: int) -> list[int | None]:
    """Of each layer: `sliding_window` (4096 where the file has none; null: no window) if it is of the kind that slides.

    `layer_types` says which are; without it all from `max_window_layers` on.
    """
    reads = family.reads
    are_used = "use_sliding_window" not in reads or f.boolean("use_sliding_window", False)
    if "sliding_window" not in reads or ("max_window_layers" in reads and not are_used):
        return [None] * num_layers
    num_full = f.integer("max_window_layers", 28, 0, MAX_LAYERS) if "max_window_layers" in reads else 0
    kinds = f.list_of(str, "layer_types") if "layer_types" in reads else []
    slides = [kind == "sliding_attention" for kind in kinds] or [i >= num_full for i in range(num_layers)]
    window = f.integer("sliding_window", None if "sliding_window" in f.data else 4096)
    return [window if are_used and sliding else None for sliding in slides]


def _mlps(f: Fields, family: Family, num_layers: int) -> list[DenseMLP | MoE]:
    """Of each layer: experts in every `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    bias = "mlp_bias" in family.reads and f.boolean("mlp_bias", False)
    dense = DenseMLP(f.integer("intermediate_size", 0), bias, _ACTIVATIONS[f.text("hidden_act", "silu")])
    if "num_experts" not in family.reads:
        return [dense] * num_layers
    only, step = f.list_of(int, "mlp_only_layers"), f.integer("decoder_sparse_step", 1)
    num_experts = f.integer("num_local_experts", None, 0)
    moe = MoE(
        num_experts=f.integer("num_experts", 128, 0) if num_experts is None else num_experts,
        num_experts_per_tok=f.integer("num_experts_per_tok", 8),
        intermediate_size=f.integer("moe_intermediate_size", 768),
        routing="softmax_of_chosen" if f.boolean("norm_topk_prob", False) else "softmax",
        activation=dense.activation,
    )
    sparse = [i not in only and moe.num_experts > 0 and (i + 1) % step == 0 for i in range(num_layers)]
    if any(sparse) and moe.num_experts_per_tok > moe.num_experts:
        raise f.wrong("num_experts_per_tok", f"at most the number of experts, {moe.num_experts}")
    return [moe if is_sparse else dense for is_sparse in sparse]


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
    if (act := f.text("hidden_act", "silu")) not in _ACTIVATIONS:
        raise ConfigError(f"{f.source}: hidden_act {act!r} not supported (supported: silu)")
    kinds, num_layers = f.list_of(str, "layer_types"), f.integer("num_hidden_layers", 0, most=MAX_LAYERS)
    if others := set(kinds) - set(supported := _TABLE["layer_types"]):
        names = ", ".join(sorted(others))
        raise ConfigError(f"{f.source}: layer_types {names} not supported (supported: {', '.join(supported)})")
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
    config = RopeConfig(float(theta or 10000), kind, original, numbers, tuple(rope.list_of(float, "factors")))
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
    if dtype not in specs.DTYPE_BYTES:
        raise ConfigError(f"{f.source}: dtype {dtype!r} not supported (supported: {', '.join(specs.DTYPE_BYTES)})")
    return dtype
