"""Well-known model shapes, for benchmarks with random weights: a `config.json` and a stand-in tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minisgl.config.families import read_model_config
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


# What random chats are made of: each word is one token of the stand-in tokenizer, and of most real ones.
WORDS = ("time", "year", "day", "way", "man", "world", "life", "hand", "part", "place", "week", "case", "work", "point")
_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def write_shape(name: str, directory: str | Path) -> Path:
    """Make `directory` a model directory of the shape `name`, or of the `config.json` in the directory `name`.

    The tokenizer is that of the directory `name` if it has one, else a stand-in (`stand_in_tokenizer`).
    Raises: ConfigError when there is no such shape, or its configuration is not one that is served.
    """
    path = Path(directory)
    source = Path(name)
    if name not in SHAPES and not (source / "config.json").is_file():
        raise ConfigError(f"shape {name!r}: expected {', '.join(SHAPES)}, or a directory with config.json")
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(
        json.dumps(SHAPES[name]) if name in SHAPES else (source / "config.json").read_text()
    )
    model = read_model_config(path)
    if name not in SHAPES and (source / "tokenizer.json").is_file():
        for file in source.glob("tokenizer*.json"):
            shutil.copy(file, path)
        return path
    stand_in_tokenizer(model.vocab_size).save(str(path / "tokenizer.json"), pretty=False)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (path / "tokenizer_config.json").write_text(json.dumps({**kind, "chat_template": _TEMPLATE}))
    return path


def stand_in_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` tokens, each of which is text: so that each step of a stream shows, as it would with
    real weights. Ids below 128 are ASCII characters, the next ones are `WORDS`, the others made up."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = [byte_level.pre_tokenize_str(chr(code))[0][0] for code in range(128)] + [f"Ġ{word}" for word in WORDS]
    tokens += [f"Ġw{number}" for number in range(len(tokens), vocab_size)]
    vocab = {token: number for number, token in enumerate(tokens[:vocab_size])}
    unknown = "?" if "?" in vocab else tokens[0]  # for characters beyond ASCII
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=unknown, ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
