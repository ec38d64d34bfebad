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

TINY = SHAPES["qwen3-0.6b"] | {  # for tests of this benchmark
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


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
    if model == "qwen3-tiny":
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(TINY))
        write_shape(str(directory), directory)
    elif SHAPES.get(model, {}).get("model_type") == "qwen3":
        write_shape(model, directory)
    else:
        names = [name for name, shape in SHAPES.items() if shape["model_type"] == "qwen3"]
        raise SystemExit(f"--model {model}: expected a directory, built-in, qwen3-tiny, {', '.join(names)}")
    save_file(random_weights(read_config(directory)), partial := file.with_suffix(".partial"))
    partial.rename(file)
    return directory


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def random_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """In bf16. Products keep the variance, and norms differ: a weight in the wrong place shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))

    def matrix(num_out: int, num_in: int, scale: float | None = None) -> torch.Tensor:
        values = torch.randn(num_out, num_in, generator=generator)
        return values.mul_(scale or num_in**-0.5).bfloat16()

    def norm(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).mul_(0.2).add_(1).bfloat16()

    weights = {"model.embed_tokens": matrix(config["vocab_size"], hidden, 0.02), "model.norm": norm(hidden)}
    if not config["tie_word_embeddings"]:
        weights["lm_head"] = matrix(config["vocab_size"], hidden, 0.02)
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "input_layernorm": norm(hidden),
            "self_attn.q_proj": matrix(queries, hidden),
            "self_attn.k_proj": matrix(keys, hidden),
            "self_attn.v_proj": matrix(keys, hidden),
            "self_attn.o_proj": matrix(hidden, queries),
            "self_attn.q_norm": norm(head_dim),
            "self_attn.k_norm": norm(head_dim),
            "post_attention_layernorm": norm(hidden),
            "mlp.gate_proj": matrix(inner, hidden),
            "mlp.up_proj": matrix(inner, hidden),
            "mlp.down_proj": matrix(hidden, inner),
        }
        weights |= {f"model.layers.{layer}.{name}": tensor for name, tensor in parts.items()}
    return {f"{name}.weight": tensor for name, tensor in weights.items()}


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names without `.weight`, and tensors, one at a time."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name.removesuffix(".weight"), file.get_tensor(name)


def write_gguf(directory: Path, precision: str, work_dir: Path) -> Path:
    """The GGUF file of a dense Qwen3 model in F32, BF16, F16, Q4_0 or Q8_0, made once; norms are F32, as everywhere.
    llama.cpp makes Q4_K_M, which has several types, out of BF16.

    Its tokenizer is a makeshift: prompts are ids. Raises: SystemExit for another architecture.
    """
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if directory.is_file():
        return directory
    config = read_config(directory)
    if config["model_type"] != "qwen3":
        raise SystemExit(f"{directory}: only dense Qwen3 models can be written as GGUF here")
    place = zlib.crc32(str(directory.resolve()).encode())  # directories may share a name
    path = work_dir / f"{directory.name}-{place:08x}-{precision}.gguf"
    if path.is_file() and path.stat().st_mtime > max(f.stat().st_mtime for f in directory.glob("*.safetensors")):
        return path
    work_dir.mkdir(parents=True, exist_ok=True)
    if precision == "Q4_K_M":
        return _mixed(write_gguf(directory, "BF16", work_dir), path)
    writer = gguf.GGUFWriter(partial := path.with_suffix(".partial"), "qwen3")
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
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if precision == "F32" else f"MOSTLY_{precision}"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for name, tensor in read_weights(directory):
        kind = gguf.GGMLQuantizationType["F32" if tensor.dim() == 1 else precision]
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(f"{names.get_name(name)}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


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
