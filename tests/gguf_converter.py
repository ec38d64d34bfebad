"""GGUF files of checkpoints of all families, as llama.cpp's converter writes them: what it changes in tensors, and what
of a configuration it says. Names of tensors are those of the `gguf` package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from tests.gguf_files import stacked

Tensor = torch.Tensor
ARCHITECTURES = {
    "mixtral": "llama",
    "mistral": "mistral3",  # where it sees
    "qwen2_moe": "qwen2moe",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_next": "qwen3next",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "glm": "chatglm",
    "qwen2": "qwen2vl",  # these three, too
    "qwen3": "qwen3vl",
    "qwen3_moe": "qwen3vlmoe",
    "gpt_oss": "gpt-oss",
    "ministral3": "mistral3",
    "olmo3": "olmo2",
    **{name: name for name in ("llama", "gemma2", "phi3", "granite", "smollm3", "glm4", "ernie4_5", "olmo2")},
    **{name: name for name in ("seed_oss", "lfm2", "gemma", "granitemoe", "exaone4", "olmoe")},
}
ROTATED_IN_PAIRS = "llama", "granite", "granitemoe", "smollm3", "mistral3"
NORMS_WITH_ONE = "gemma", "gemma2", "gemma3", "qwen35", "qwen35moe", "qwen3next"


def rounded(source: Path, folder: Path, kind: str) -> Path:
    """The checkpoint with the values that blocks of a type can have, where these fit a weight."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    keys, heads, size = (
        config.get(f"linear_{key}", 1) for key in ("num_key_heads", "num_value_heads", "value_head_dim")
    )
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        is_turned = weight.dim() == 3 and ".experts." in name  # [experts, in, out]
        rows = weight.transpose(1, 2).contiguous() if is_turned else weight
        is_reordered = name.endswith("linear_attn.out_proj.weight") and "qwen3_5" in config["model_type"]
        if is_reordered:
            rows = values_in_turn("qwen35", config, "out_proj", rows).contiguous()
        if fits(name, rows, kind):
            values = gguf.quants.dequantize(gguf.quants.quantize(rows.numpy(), Type[kind]), Type[kind])
            values = torch.from_numpy(values.reshape(rows.shape))
            if is_reordered:  # and back
                values = values.unflatten(1, (heads // keys, keys, size)).transpose(1, 2).flatten(1)
            weights[name] = values.transpose(1, 2).contiguous() if is_turned else values
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fits(name: str, weight: Tensor, kind: str) -> bool:
    """Whether a weight is stored in a type; convolutions, routers and gates are not."""
    exact = "conv1d", "conv.conv", "mlp.gate.", "moe.gate.", "router", "shared_expert_gate", "in_proj_a", "in_proj_b"
    is_whole = weight.dim() > 1 and weight.shape[-1] % gguf.GGML_QUANT_SIZES[Type[kind]][0] == 0
    return is_whole and not name.endswith("bias") and not any(part in name for part in exact)


def convert(source: Path, path: Path, kind: str = "F32", **metadata: Any) -> Path:
    """A file with all tensors in a type that blocks of it fit. metadata: in addition, keys with `__` for dots."""
    config = json.loads((source / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    add_numbers(writer, architecture, config)
    for key, value in metadata.items():
        {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}.get(
            type(value), writer.add_array
        )(key.replace("__", "."), value)
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(arch, layers + config.get("mtp_num_hidden_layers", 0))
    heads = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4, layers + 1)  # of which the package's list has all names
    weights = {in_layer(name, layers): w.float() for name, w in load_file(source / "model.safetensors").items()}
    weights = one_above_the_other(weights) if architecture == "chatglm" else weights
    for name, weight in parts(architecture, config, weights if architecture == "gpt-oss" else stacked(weights)):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        theirs = theirs or heads.get_name(name, try_suffixes=(".weight",)) or name
        if fits(name, weight, kind) and kind != "F32":
            writer.add_tensor(
                theirs, gguf.quants.quantize(weight.contiguous().numpy(), Type[kind]), raw_dtype=Type[kind]
            )
        else:
            writer.add_tensor(theirs, weight.contiguous().numpy())
    for name, factors in divisors(architecture, config).items():
        writer.add_tensor(f"{name}.weight", torch.tensor(factors, dtype=torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def one_above_the_other(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values in one tensor, as older checkpoints of GLM-4 have them."""
    found = dict[str, Tensor]()
    for name, weight in weights.items():
        layer, marker, part = name.partition(".self_attn.q_proj.")
        if marker:
            theirs = f"{layer.replace('model', 'encoder', 1)}.self_attention.query_key_value.{part}"
            found[theirs] = torch.cat([weights[f"{layer}.self_attn.{one}_proj.{part}"] for one in "qkv"])
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            found[name] = weight
    return found


def in_layer(name: str, layers: int) -> str:
    """A head that foretells tokens is a layer behind the others."""
    if not name.startswith("mtp."):
        return name
    theirs = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm"}
    stem = name.removeprefix("mtp.").removeprefix("layers.0.").removesuffix(".weight")
    theirs |= {} if ".layers." in name else {"norm": "shared_head.norm"}
    return f"model.layers.{layers}.{theirs.get(stem, stem)}.weight"


def divisors(architecture: str, config: dict[str, Any]) -> dict[str, list[float]]:
    """Of Gemma 4, those of layers that see all: features that are not rotated have a number beyond all positions."""
    rope = config.get("rope_parameters") or {}
    if architecture == "gemma4":
        pairs, share = far_heads(config)["head_dim"] // 2, rope["full_attention"]["partial_rotary_factor"]
        return {"rope_freqs": [1.0 if i < int(pairs * share) else 1e30 for i in range(pairs)]}
    return {f"rope_factors_{key}": rope[f"{key}_factor"] for key in ("short", "long") if f"{key}_factor" in rope}


def parts(architecture: str, config: dict[str, Any], weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the names that the package's map knows."""
    for name, weight in weights.items():
        layer, _, last = name.rpartition("linear_attn.")
        if last == "A_log":
            yield name, -values_in_turn(architecture, config, last, weight).exp()
        elif last == "dt_bias":
            yield f"{layer}linear_attn.dt_proj.bias", values_in_turn(architecture, config, last, weight)
        elif last == "in_proj_qkvz.weight":
            yield from ungrouped(layer, config, weight)
        elif layer:
            weight = values_in_turn(architecture, config, last, weight)
            yield name, weight.squeeze(1) if "conv1d" in last else weight
        elif name.endswith("norm.weight") and architecture in NORMS_WITH_ONE:
            yield name, weight + 1
        elif "self_attn.q_proj" in name or "self_attn.k_proj" in name:
            yield name, in_pairs(config, weight) if architecture in ROTATED_IN_PAIRS else weight
        elif name.endswith(("sinks", "layer_scalar")):
            yield f"{name}.weight", weight
        elif ".experts." in name:
            yield from experts(name, weight)
        elif name.endswith("block_sparse_moe.input_linear.weight"):
            stem = name.replace("block_sparse_moe.input_linear", "mlp.experts.{}_proj")
            yield from (
                (stem.format(part), half) for part, half in zip(("gate", "up"), weight.chunk(2, 1), strict=True)
            )
        elif name.endswith("block_sparse_moe.output_linear.weight"):
            yield name.replace("block_sparse_moe.output_linear", "mlp.experts.down_proj"), weight
        else:
            yield name, weight.squeeze(1) if "conv.conv" in name else weight


def experts(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """gpt-oss has them as [in, out], columns of gate and up in turn; Mixtral by numbers."""
    stem, _, last = name.rpartition(".experts.")
    if last.startswith("w"):
        yield f"{stem.replace('model.', '').replace('block_sparse_moe', 'feed_forward')}.experts.{last}", weight
    elif last.endswith("weight"):
        yield name, weight
    else:
        end, weight = ("bias", weight) if last.endswith("_bias") else ("weight", weight.transpose(1, 2))
        if last.startswith("down"):
            yield f"{stem}.experts.down_proj.{end}", weight
        else:
            yield f"{stem}.experts.gate_proj.{end}", weight[:, ::2]
            yield f"{stem}.experts.up_proj.{end}", weight[:, 1::2]


def in_pairs(config: dict[str, Any], weight: Tensor) -> Tensor:
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return weight.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)


def values_in_turn(architecture: str, config: dict[str, Any], name: str, weight: Tensor) -> Tensor:
    """Heads of values, which stand in groups of a head of keys, such that the first ones of all groups come first."""
    if architecture == "qwen3next":
        return weight
    keys, heads, size = (config[f"linear_{key}"] for key in ("num_key_heads", "num_value_heads", "value_head_dim"))
    if name.startswith("out_proj"):
        return weight.unflatten(1, (keys, heads // keys, size)).transpose(1, 2).flatten(1)
    if name.startswith(("in_proj_qkv", "conv1d")):
        values = weight[-heads * size :].unflatten(0, (keys, heads // keys, size)).transpose(0, 1).flatten(0, 2)
        return torch.cat((weight[: -heads * size], values))
    if name.startswith("norm"):
        return weight
    return weight.unflatten(0, (keys, heads // keys, -1)).transpose(0, 1).flatten(0, 2)


def ungrouped(layer: str, config: dict[str, Any], weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    keys, heads, size = (config[f"linear_{key}"] for key in ("num_key_heads", "num_value_heads", "value_head_dim"))
    sizes = [config["linear_key_head_dim"]] * 2 + [heads // keys * size] * 2
    *qkv, z = (part.flatten(0, 1) for part in weight.unflatten(0, (keys, -1)).split(sizes, 1))
    yield f"{layer}linear_attn.in_proj_qkv.weight", torch.cat(qkv)
    yield f"{layer}linear_attn.in_proj_z.weight", z


def add_numbers(writer: gguf.GGUFWriter, architecture: str, config: dict[str, Any]) -> None:
    """As the converter's base class and those of the families."""
    rope = config.get("rope_parameters") or {}
    far = rope.get("full_attention", rope)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    types = config.get("layer_types")
    inner, kv_heads = config["intermediate_size"], config["num_key_value_heads"]
    if architecture == "lfm2":
        multiple = config["block_multiple_of"]
        inner = -(-int(2 * inner / 3) // multiple) * multiple
        kv_heads = [0 if kind == "conv" else kv_heads for kind in types]
    if architecture == "gemma4":
        inner, kv_heads = add_gemma4(writer, config)
        head_dim = far_heads(config)["head_dim"]
    foretells = config.get("mtp_num_hidden_layers", 0)
    writer.add_block_count(config["num_hidden_layers"] + foretells)
    if foretells:
        writer.add_nextn_predict_layers(foretells)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or config["norm_eps"])
    writer.add_rope_freq_base(far["rope_theta"])
    if (near := rope.get("sliding_attention", {}).get("rope_theta")) is not None:
        writer.add_rope_freq_base_swa(near)
    if config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture in (*ROTATED_IN_PAIRS, "phi3", "glm4", "chatglm", "qwen35", "qwen35moe", "qwen3next"):
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if architecture.startswith(("qwen2vl", "qwen3vl")):
        third = head_dim // 6
        writer.add_rope_dimension_sections([head_dim // 2 - 2 * third, third, third, 0])
        writer.add_num_deepstack_layers(1)
    add_scaling(writer, far)
    add_windows(writer, architecture, config)
    optional = {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
        "conv_L_cache": writer.add_shortconv_l_cache,
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
        "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
        "num_local_experts": writer.add_expert_count,
        "num_experts": writer.add_expert_count,
        "linear_conv_kernel_dim": writer.add_ssm_conv_kernel,
        "linear_key_head_dim": writer.add_ssm_state_size,
        "linear_num_key_heads": writer.add_ssm_group_count,
        "linear_num_value_heads": writer.add_ssm_time_step_rank,
    }
    for key, add in optional.items():
        if config.get(key):
            add(config[key])
    if "linear_num_value_heads" in config:
        writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])
        writer.add_array(
            f"{architecture}.attention.recurrent_layers",
            [kind == "linear_attention" for kind in types] + [False] * foretells,
        )
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(inner)


def far_heads(config: dict[str, Any]) -> dict[str, int]:
    """Of Gemma 4's layers that see all."""
    return next(iter(config["per_layer_config"].values()))  # type: ignore[no-any-return]


def add_gemma4(writer: gguf.GGUFWriter, config: dict[str, Any]) -> tuple[Any, Any]:
    """What no other family has; → features of MLPs and heads of keys, of each layer where they differ."""
    far, near = far_heads(config), config["head_dim"]
    shared, inner, kv_heads = (
        config[key] for key in ("num_kv_shared_layers", "intermediate_size", "num_key_value_heads")
    )
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_key_length_swa(near)
    writer.add_value_length_swa(near)
    writer.add_rope_dimension_count(far["head_dim"])
    writer.add_rope_dimension_count_swa(near)
    if config["use_double_wide_mlp"]:
        inner = [inner] * (config["num_hidden_layers"] - shared) + [2 * inner] * shared
    if "num_key_value_heads" in far:
        of_kind = {"full_attention": far["num_key_value_heads"], "sliding_attention": kv_heads}
        kv_heads = [of_kind[kind] for kind in config["layer_types"]]
    return inner, kv_heads


def add_scaling(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(1.3)  # which follows from lengths in the converter
    if "beta_fast" in rope:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if "llama_4_scaling_beta" in rope:
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def add_windows(writer: gguf.GGUFWriter, architecture: str, config: dict[str, Any]) -> None:
    has_types = config["model_type"] in ("olmo3", "exaone4", "gemma4_text")
    if architecture in ("gemma2", "gemma3", "gpt-oss", "phi3") or (has_types and config["sliding_window"]):
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if has_types and config["sliding_window"]:
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
