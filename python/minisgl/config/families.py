"""What each supported architecture reads from its `config.json`: the whole difference between families, in one place.

Defaults are those of the `transformers` configuration class of the family, which leaves a field out of the file when
it has the default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minisgl.config.model import DTYPE_BYTES, ModelConfig, MoEConfig, RopeConfig
from minisgl.errors import ConfigError

Json = dict[str, Any]

# Scaling types with the keys that they need besides `rope_theta`.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def _llama(c: Json) -> Json:
    bias = bool(c.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(c.get("mlp_bias", False))}


def _mistral(c: Json) -> Json:
    return {"sliding_windows": _every_layer(c, c.get("sliding_window", 4096))}


def _qwen2(c: Json) -> Json:
    return {"qkv_bias": True, "sliding_windows": _qwen_windows(c)}


def _qwen3(c: Json) -> Json:
    bias = bool(c.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "sliding_windows": _qwen_windows(c)}


def _qwen3_moe(c: Json) -> Json:
    bias = bool(c.get("attention_bias", False))
    num_layers, dense = c["num_hidden_layers"], c.get("mlp_only_layers") or []
    step: int = c.get("decoder_sparse_step") or 1
    num_experts: int = c.get("num_experts") or c.get("num_local_experts") or 128
    moe = MoEConfig(
        num_experts=num_experts,
        num_experts_per_tok=c.get("num_experts_per_tok", 8),
        intermediate_size=c.get("moe_intermediate_size", 768),
        norm_topk_prob=bool(c.get("norm_topk_prob", False)),
        layers=tuple(i not in dense and num_experts > 0 and (i + 1) % step == 0 for i in range(num_layers)),
    )
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": True,
        "moe": moe,
        "sliding_windows": _every_layer(c, window),
    }


FAMILIES: dict[str, Callable[[Json], Json]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}


def parse_model_config(config: Json, generation: Json, source: str) -> ModelConfig:
    """The `ModelConfig` of a parsed `config.json`; `source` names the file in errors.

    Raises: ConfigError naming what is missing or unsupported, and what is supported.
    """
    architecture = _architecture(config, source)
    _refuse_unsupported(config, source)
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in required if not isinstance(config.get(key), int)]
    if missing:
        raise ConfigError(f"{source}: {', '.join(missing)} missing")
    num_heads, hidden = config["num_attention_heads"], config["hidden_size"]
    default_head_dim = 128 if architecture == "Qwen3ForCausalLM" else hidden // num_heads
    rope, max_position = _rope(config, source)
    return ModelConfig(
        architecture=architecture,
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_qo_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or default_head_dim,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=rope,
        max_position=max_position,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=_dtype(config, source),
        eos_token_ids=_eos_ids(generation, config),
        **FAMILIES[architecture](config),
    )


def _architecture(config: Json, source: str) -> str:
    names = config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return str(name)
    found = ", ".join(map(str, names)) or "none given"
    raise ConfigError(f"{source}: architecture not supported: {found} (supported: {', '.join(FAMILIES)})")


def _refuse_unsupported(config: Json, source: str) -> None:
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(f"{source}: quantization_config ({method}) not supported; use an unquantized checkpoint")
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"{source}: hidden_act {act!r} not supported (supported: silu)")
    layer_types = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if layer_types:
        raise ConfigError(
            f"{source}: layer_types {', '.join(sorted(layer_types))} not supported "
            "(supported: full_attention, sliding_attention)"
        )


def _rope(config: Json, source: str) -> tuple[RopeConfig, int]:
    """RoPE in transformers-5 form (`rope_parameters`) or the older (`rope_theta`, `rope_scaling`); longest sequence."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in scaling.values()):
        raise ConfigError(f"{source}: rope_parameters that differ by layer type are not supported")
    theta = float(scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    old_type = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", old_type)
    if kind not in ROPE_TYPES:
        raise ConfigError(f"{source}: rope type {kind!r} not supported (supported: {', '.join(ROPE_TYPES)})")
    partial = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"{source}: partial_rotary_factor {partial} not supported (supported: 1)")
    absent = [key for key in ROPE_TYPES[kind] if scaling.get(key) is None]
    if absent:
        raise ConfigError(f"{source}: rope type {kind!r} needs {', '.join(absent)}")
    max_position = config.get("max_position_embeddings", 32768 if "Qwen" in str(config["architectures"]) else 2048)
    original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    if kind == "dynamic" or not original:  # HF's dynamic scaling starts at max_position_embeddings, whatever else says
        original = max_position
    rope = RopeConfig(theta=theta, type=kind, max_position=int(original), scaling=scaling)
    return rope, _scaled_max_position(rope, max_position)


def _scaled_max_position(rope: RopeConfig, max_position: int) -> int:
    """Longest sequence: `max_position_embeddings`, times the factor where the file gives the unscaled length.

    llama3 and some yarn files give the scaled length (it differs from the original one); the others do not.
    """
    if rope.type == "default" or rope.type == "llama3" or rope.max_position != max_position:
        return max_position
    return int(max_position * rope.scaling["factor"])


def _dtype(config: Json, source: str) -> str:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"{source}: dtype {dtype!r} not supported (supported: {', '.join(DTYPE_BYTES)})")
    return dtype


def _every_layer(config: Json, window: int | None) -> tuple[int | None, ...]:
    return (window,) * config["num_hidden_layers"] if window else ()


def _qwen_windows(config: Json) -> tuple[int | None, ...]:
    """Qwen2/3: `layer_types` says which layers slide; without it those from `max_window_layers` on."""
    if not config.get("use_sliding_window"):
        return ()
    window = config.get("sliding_window", 4096)
    if not window:
        return ()
    num_layers, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * num_layers
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds[:num_layers])
    return windows if any(windows) else ()


def _eos_ids(*sources: Json) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for source in sources:
        value = source.get("eos_token_id")
        ids.update(dict.fromkeys(value if isinstance(value, list) else [] if value is None else [value]))
    return tuple(ids)
