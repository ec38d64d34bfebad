"""GGUF files of small checkpoints, in every type, and the checkpoints that their blocks stand for.

What quantizes and dequantizes is the `gguf` package; where it cannot quantize, blocks are random.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    "IQ1_M": (),
}


def file_name(name: str) -> str:
    """What the file calls a tensor of the checkpoint."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, end = name.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{end}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{end}"


def put_scales(data: np.ndarray[Any, Any], scales: Any) -> None:
    """Of blocks of IQ1_M, [..., bytes]: the bits of a float16 scale are the upper halves of four of the last bytes."""
    for i in range(4):
        data[..., 49 + 2 * i] = data[..., 49 + 2 * i] & 15 | scales.view(np.uint16) >> 4 * i << 4 & 240


def blocks(weight: torch.Tensor, kind: str) -> np.ndarray[Any, Any]:
    """The weight's rows in a type: [..., bytes of a row] uint8; random ones of its spread where nothing quantizes."""
    if kind not in SCALES:
        return gguf.quants.quantize(weight.numpy(), Type[kind]).view(np.uint8)  # type: ignore[no-any-return]
    values, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    generator = np.random.default_rng(weight.numel())
    data = generator.integers(0, 256, (*weight.shape[:-1], weight.shape[-1] // values, size), dtype=np.uint8)
    scale = np.float16(1)
    for _ in range(2):
        for offset in SCALES[kind]:
            data[..., offset : offset + 2] = np.frombuffer(scale.tobytes(), np.uint8)
        if kind == "IQ1_M":
            put_scales(data, scale)
        rows = data.reshape(*weight.shape[:-1], -1)
        scale = np.float16(float(weight.std()) / gguf.quants.dequantize(rows, Type[kind]).std())
    return rows


def kind_of(name: str, kinds: str | Mapping[str, str], weight: torch.Tensor) -> str:
    """Norms, biases and routers are float32, as converters have them."""
    if weight.dim() == 1 or name.endswith("mlp.gate.weight"):
        return "F32"
    if isinstance(kinds, str):
        return kinds
    return next((kind for part, kind in kinds.items() if part in name), kinds[""])


def write_gguf(
    source: Path,
    folder: Path,
    kinds: str | Mapping[str, str],
    parts: int = 1,
    rope_freqs: np.ndarray[Any, Any] | None = None,
    **metadata: Any,
) -> tuple[Path, Path]:
    """A file of a checkpoint, and the checkpoint of the values that are in it.

    kinds: of all weights, or by what is in their names ("": of others). parts: files that it is split into.
    rope_freqs: a tensor of this name. metadata: in addition, keys with `__` for dots.
    """
    folder.mkdir(exist_ok=True)
    reference = Path(shutil.copytree(source, folder / "reference"))
    config, weights = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    architecture = ARCHITECTURES[config["model_type"]]
    weights = stacked(weights)
    split = {"split_max_tensors": -(-len(weights) // parts)} if parts > 1 else {}
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture, **split)
    add_metadata(writer, config, metadata)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    stands_for = {}
    for name, weight in weights.items():
        kind = kind_of(name, kinds, weight)
        data = blocks(weight.float(), kind)
        values = gguf.quants.dequantize(data, Type[kind])
        of_experts = enumerate(torch.from_numpy(values.reshape(weight.shape)).clone()) if ".experts." in name else ()
        stands_for |= {name.replace(".experts.", f".experts.{i}."): part.clone() for i, part in of_experts}
        if ".experts." not in name:
            stands_for[name] = torch.from_numpy(values.reshape(weight.shape)).clone()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            rows = (
                data.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
                if weight.dim() > 1
                else data.view(np.float32).reshape(heads, 2, -1, 1)
            )
            data = rows.swapaxes(1, 2).reshape(weight.shape[0], -1)
            data = data if weight.dim() > 1 else data.reshape(-1).view(np.uint8)
        if kind == "F32":
            writer.add_tensor(file_name(name), data.view(np.float32).reshape(weight.shape))
        else:
            writer.add_tensor(file_name(name), data, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(stands_for, reference / "model.safetensors", metadata={"format": "pt"})
    return next(iter(sorted(folder.glob("model*.gguf")))), reference


def byte_tokens() -> dict[str, Any]:
    """Metadata of a tokenizer of bytes, with a token of two instead of the last."""
    tokens = [*bytes_to_unicode().values()][:255]
    values = {"model": "gpt2", "pre": "smollm", "tokens": [*tokens, "ab"], "merges": ["a b"], "eos_token_id": 2}
    return {f"tokenizer__ggml__{key}": value for key, value in values.items()}


def stacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With a stack for each of a layer's experts' weights."""
    found: dict[str, list[torch.Tensor]] = {}
    for name in sorted(weights, key=lambda name: [int(part) if part.isdecimal() else -1 for part in name.split(".")]):
        before, marker, after = name.partition(".experts.")
        stack = f"{before}{marker}{after.partition('.')[2]}" if marker else name
        found.setdefault(stack, []).append(weights[name])
    return {name: torch.stack(parts) if ".experts." in name else parts[0] for name, parts in found.items()}


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], more: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    if num_experts := config.get("num_experts") or config.get("num_local_experts"):
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    for key, value in more.items():
        name = key.replace("__", ".")
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(name, value)
