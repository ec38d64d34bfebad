"""Well-known model shapes, for benchmarks with random weights: a `config.json` and a stand-in tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from minisgl.config.locate import DEMO_MODEL
from minisgl.errors import ConfigError

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
}
_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


def _dense(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**_COMMON, **sizes, "num_attention_heads": heads, **more}


SHAPES = {
    "qwen3-0.6b": _dense(1024, 3072, 28, 16, tie_word_embeddings=True),
    "qwen3-14b": _dense(5120, 17408, 40, 40),
    "qwen3-32b": _dense(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _dense(2048, 6144, 48, 32, **_MOE),
}


def write_shape(name: str, directory: str | Path) -> Path:
    """Make `directory` a model directory of the shape `name`, or of the `config.json` in the directory `name`.

    The tokenizer is the built-in model's: prompts are ids, and ids that it does not know become no text.
    Raises: ConfigError when there is no such shape.
    """
    path = Path(directory)
    source = Path(name) / "config.json"
    if name not in SHAPES and not source.is_file():
        raise ConfigError(f"shape {name!r}: expected {', '.join(SHAPES)}, or a directory with config.json")
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPES[name]) if name in SHAPES else source.read_text())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / file, path)
    return path
