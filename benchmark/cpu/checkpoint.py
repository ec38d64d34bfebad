"""The weights that all engines get: a model directory, and GGUF files with the same numbers."""

from __future__ import annotations

import ctypes
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minisgl.benchmark.shapes import SHAPES, write_shape
from minisgl.config.locate import DEMO_MODEL

_SMALL = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "head_dim": 64}
_HEADS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
TINY = {  # for tests of this benchmark
    "qwen3-tiny": SHAPES["qwen3-0.6b"] | _SMALL | {"num_key_value_heads": 2, "num_hidden_layers": 2},
    "qwen3.5-tiny": SHAPES["qwen3.5-0.8b"] | _SMALL | _HEADS | {"num_hidden_layers": 4},
}
FAMILIES = {"qwen3": "qwen3", "qwen3_5_text": "qwen35"}  # what a GGUF file calls them


def prepare(model: str, work_dir: Path) -> Path:
    """The directory of a model: `built-in`, a directory with weights, or a shape that gets random ones in `work_dir`.
    A GGUF file is taken as it is.

    Raises: SystemExit when it is none of them.
    """
    if model == "built-in":
        return Path(DEMO_MODEL)
    if model.endswith(".gguf") or any(Path(model).glob("*.safetensors")):
        return Path(model)
    directory = work_dir / model
    file = directory / "model.safetensors"
    if file.is_file():
        return directory
    if model in TINY:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(TINY[model]))
        write_shape(str(directory), directory)
    elif SHAPES.get(model, {}).get("model_type") in FAMILIES:
        write_shape(model, directory)
    else:
        names = [*TINY, *(name for name, shape in SHAPES.items() if shape["model_type"] in FAMILIES)]
        raise SystemExit(f"--model {model}: expected a directory, built-in, {', '.join(names)}")
    save_file(RandomWeights(read_config(directory)).all(), partial := file.with_suffix(".partial"))
    partial.rename(file)
    return directory


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


class RandomWeights:
    """In bf16. Products keep the variance, and norms differ: a weight in the wrong place shows in the logits."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config, self._generator = config, torch.Generator().manual_seed(0)
        self._is_hybrid = config["model_type"] == "qwen3_5_text"

    def all(self) -> dict[str, torch.Tensor]:
        """By their names in a checkpoint."""
        config, hidden = self._config, self._config["hidden_size"]
        table = config["vocab_size"], hidden, 0.02
        weights = {"model.embed_tokens.weight": self._matrix(*table), "model.norm.weight": self._norm(hidden)}
        if not config["tie_word_embeddings"]:
            weights["lm_head.weight"] = self._matrix(*table)
        for layer in range(config["num_hidden_layers"]):
            has_state = self._is_hybrid and (layer + 1) % config["full_attention_interval"] != 0
            parts = (self._delta_net() if has_state else self._attention()) | self._others()
            weights |= {f"model.layers.{layer}.{name}": tensor for name, tensor in parts.items()}
        return weights

    def _matrix(self, num_out: int, num_in: int, scale: float | None = None) -> torch.Tensor:
        values = torch.randn(num_out, num_in, generator=self._generator)
        return values.mul_(scale or num_in**-0.5).bfloat16()

    def _vector(self, size: int, spread: float, mean: float) -> torch.Tensor:
        return torch.randn(size, generator=self._generator).mul_(spread).add_(mean).bfloat16()

    def _norm(self, size: int) -> torch.Tensor:
        """Hybrids store what is above 1."""
        return self._vector(size, 0.2, 0 if self._is_hybrid else 1)

    def _attention(self) -> dict[str, torch.Tensor]:
        config, hidden, head_dim = self._config, self._config["hidden_size"], self._config["head_dim"]
        queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
        return {
            "self_attn.q_proj.weight": self._matrix(queries * (2 if self._is_hybrid else 1), hidden),
            "self_attn.k_proj.weight": self._matrix(keys, hidden),
            "self_attn.v_proj.weight": self._matrix(keys, hidden),
            "self_attn.o_proj.weight": self._matrix(hidden, queries),
            "self_attn.q_norm.weight": self._norm(head_dim),
            "self_attn.k_norm.weight": self._norm(head_dim),
        }

    def _delta_net(self) -> dict[str, torch.Tensor]:
        config, hidden = self._config, self._config["hidden_size"]
        num_v, v_dim = (config[f"linear_{name}"] for name in ("num_value_heads", "value_head_dim"))
        keys, values = config["linear_num_key_heads"] * config["linear_key_head_dim"], num_v * v_dim
        conv = self._matrix(2 * keys + values, config["linear_conv_kernel_dim"])
        return {
            "linear_attn.in_proj_qkv.weight": self._matrix(2 * keys + values, hidden),
            "linear_attn.in_proj_z.weight": self._matrix(values, hidden),
            "linear_attn.in_proj_b.weight": self._matrix(num_v, hidden),
            "linear_attn.in_proj_a.weight": self._matrix(num_v, hidden),
            "linear_attn.out_proj.weight": self._matrix(hidden, values),
            "linear_attn.conv1d.weight": conv[:, None],
            "linear_attn.A_log": self._vector(num_v, 1, 0),
            "linear_attn.dt_bias": self._vector(num_v, 1, 0),
            "linear_attn.norm.weight": self._vector(v_dim, 0.2, 1),
        }

    def _others(self) -> dict[str, torch.Tensor]:
        hidden, inner = self._config["hidden_size"], self._config["intermediate_size"]
        return {
            "input_layernorm.weight": self._norm(hidden),
            "post_attention_layernorm.weight": self._norm(hidden),
            "mlp.gate_proj.weight": self._matrix(inner, hidden),
            "mlp.up_proj.weight": self._matrix(inner, hidden),
            "mlp.down_proj.weight": self._matrix(hidden, inner),
        }


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors, one at a time."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def write_gguf(directory: Path, precision: str, work_dir: Path) -> Path:
    """The GGUF file of a dense Qwen3 or Qwen3.5 model in F32, BF16, F16, Q4_0 or Q8_0, made once; norms are F32, as
    everywhere. llama.cpp makes Q4_K_M, which has several types, out of BF16.

    Its tokenizer is a makeshift: prompts are ids. Raises: SystemExit for another architecture.
    """
    import gguf

    if directory.is_file():
        return directory
    config = read_config(directory)
    if config["model_type"] not in FAMILIES:
        raise SystemExit(f"{directory}: only dense Qwen3 and Qwen3.5 models can be written as GGUF here")
    place = zlib.crc32(str(directory.resolve()).encode())  # directories may share a name
    path = work_dir / f"{directory.name}-{place:08x}-{precision}.gguf"
    if path.is_file() and path.stat().st_mtime > max(f.stat().st_mtime for f in directory.glob("*.safetensors")):
        return path
    work_dir.mkdir(parents=True, exist_ok=True)
    if precision == "Q4_K_M":
        return _mixed(write_gguf(directory, "BF16", work_dir), path)
    architecture = FAMILIES[config["model_type"]]
    writer = gguf.GGUFWriter(partial := path.with_suffix(".partial"), architecture)
    _add_metadata(writer, config)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if precision == "F32" else f"MOSTLY_{precision}"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    for name, tensor in read_weights(directory):
        name, values = _as_stored(name, tensor.float(), config)
        stem, _, end = name.rpartition(".")
        kind = gguf.GGMLQuantizationType["F32" if values.dim() == 1 or "conv1d" in name else precision]
        data = gguf.quants.quantize(values.numpy(), kind)
        known = f"{names.get_name(stem)}.{end}" if end in ("weight", "bias") else str(names.get_name(name))
        writer.add_tensor(known, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def _as_stored(name: str, values: torch.Tensor, config: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """What llama.cpp's files have of a tensor, and its name before it is looked up."""
    if config["model_type"] == "qwen3":
        return name, values
    if name.endswith("A_log"):
        return name, -values.exp()
    if name.endswith("dt_bias"):
        return name.replace("dt_bias", "dt_proj.bias"), values
    if name.endswith("norm.weight") and "linear_attn" not in name:
        return name, values + 1
    return name, values.squeeze(1) if "conv1d" in name else values


def _add_metadata(writer: Any, config: dict[str, Any]) -> None:
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = [*bytes_to_unicode().values()]
    tokens = letters + [f"t{i}" for i in range(config["vocab_size"] - len(letters))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config["model_type"] == "qwen3":
        writer.add_rope_freq_base(config["rope_theta"])
        return
    rope, num_v = config["rope_parameters"], config["linear_num_value_heads"]
    rotated = int(config["head_dim"] * rope["partial_rotary_factor"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_dimension_sections([-(-rotated // 6), -(-rotated // 6), rotated // 2 - 2 * -(-rotated // 6), 0])
    writer.add_full_attention_interval(config["full_attention_interval"])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(num_v)
    writer.add_ssm_inner_size(num_v * config["linear_value_head_dim"])


def _mixed(source: Path, path: Path) -> Path:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    partial = path.with_suffix(".partial")
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params)):
        raise SystemExit(f"{source}: llama.cpp cannot make Q4_K_M of it ({code})")
    partial.rename(path)
    return path


def bytes_read(gguf_file: Path) -> int:
    """Of a GGUF file for one token: all tensors but the table of embeddings, unless it is the head too."""
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(gguf_file).tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
