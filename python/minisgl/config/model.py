"""A model's shape, read from `config.json` alone: explicit numbers, no framework objects, no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minisgl.config.locate import Fields, check_directory, merge, read_fields, read_json

logger = logging.getLogger(__name__)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_WEIGHT_BYTES = {**DTYPE_BYTES, "int8": 1}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base and scaling (`default`, `linear`, `dynamic`, `yarn`, `llama3`)."""

    theta: float
    type: str = "default"
    max_position: int = 0  # of the unscaled model (`original_max_position_embeddings` where given)
    scaling: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Mixture of experts: how many, how many per token, and which layers have them."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    layers: tuple[bool, ...]  # per layer: sparse or dense


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer."""

    architecture: str  # "LlamaForCausalLM", …
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position: int  # longest sequence that the model is made for, scaling included
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()  # per layer; None: full attention. Empty: full attention everywhere
    moe: MoEConfig | None = None
    dtype: str = "float32"  # of the checkpoint
    eos_token_ids: tuple[int, ...] = ()

    def sliding_window(self, layer: int) -> int | None:
        """Tokens that a position of `layer` sees, itself included; None: all before it."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    def is_sparse(self, layer: int) -> bool:
        """Whether `layer` is a mixture of experts."""
        return self.moe is not None and self.moe.layers[layer]

    def num_local_kv_heads(self, tp_size: int) -> int:
        """KV heads that one rank stores: a share, or a replica of one where heads are fewer than ranks."""
        return max(1, self.num_kv_heads // tp_size)

    def kv_bytes_per_token(self, dtype: str, tp_size: int = 1) -> int:
        """Bytes of KV cache that one token takes on one rank."""
        return 2 * self.num_layers * self.num_local_kv_heads(tp_size) * self.head_dim * DTYPE_BYTES[dtype]

    def weight_bytes(self, dtype: str, tp_size: int = 1) -> int:
        """Bytes of weights (also "int8") on one rank, to within the few that are replicated or padded."""
        qkv = (self.num_qo_heads // tp_size + 2 * self.num_local_kv_heads(tp_size)) * self.head_dim * self.hidden_size
        attention = qkv + self.num_qo_heads * self.head_dim * self.hidden_size // tp_size
        params = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2) // tp_size
        for layer in range(self.num_layers):
            if self.moe is not None and self.is_sparse(layer):
                inner = self.moe.num_experts * self.moe.intermediate_size
                mlp = 3 * inner * self.hidden_size // tp_size + self.moe.num_experts * self.hidden_size
            else:
                mlp = 3 * self.intermediate_size * self.hidden_size // tp_size
            params += attention + mlp + 2 * self.hidden_size
        return params * _WEIGHT_BYTES[dtype]


def read_model_config(model_dir: str | Path, override: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read `config.json` of a local Hugging Face model directory, and the ends that its other files name.

    override: merged into `config.json` before it is read.
    Raises: ConfigError naming the missing file, the value of the wrong kind, or what is not supported.
    """
    from minisgl.config.families import parse_model_config  # it builds the classes above

    path = Path(model_dir)
    check_directory(path)
    config_path = path / "config.json"
    fields = Fields(merge(read_json(config_path), override or {}), str(config_path))
    model = parse_model_config(fields)
    ends = _ends(path, read_fields(path / "generation_config.json"), fields, model.vocab_size)
    return replace(model, eos_token_ids=ends)


def _ends(path: Path, generation: Fields, config: Fields, vocab_size: int) -> tuple[int, ...]:
    """The ids, generation_config.json's first: a chat model often adds its end of turn there. What is no id of the
    model is left out, with a warning. Raises: ConfigError naming a file that cannot be read."""
    ids: dict[int, None] = {}
    for fields in (generation, config):
        value = fields.data.get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is int and 0 <= token < vocab_size:
                ids[token] = None
            else:
                reason = f"no token id (a whole number from 0 to {vocab_size - 1})"
                logger.warning("%s: eos_token_id %.80r is %s and has no effect", fields.source, token, reason)
    own = _tokenizer_end(path)
    return tuple(ids if own is None or own >= vocab_size else ids | {own: None})


def _tokenizer_end(path: Path) -> int | None:
    """The id of the tokenizer's `eos_token`, which a file gives as text, alone or with the token's properties."""
    config = fields = read_fields(path / "tokenizer_config.json")
    if fields.data.get("eos_token") is None:
        fields = read_fields(path / "special_tokens_map.json")
    is_object = isinstance(fields.data.get("eos_token"), dict)
    token = fields.child("eos_token").text("content", None) if is_object else fields.text("eos_token", None)
    if token is None:
        return None
    ids = (index for pairs in _vocabularies(path, config) for text, index in pairs if text == token)
    if (found := str(next(ids, None))).isdecimal():
        return int(found)
    logger.warning("%s: eos_token %.80r is not in the vocabulary and has no effect", fields.source, token)
    return None


def _vocabularies(path: Path, config: Fields) -> Iterator[Iterable[tuple[Any, Any]]]:
    """Texts and ids that a tokenizer's files have, the smallest file first."""
    decoder = config.child("added_tokens_decoder")
    yield [(decoder.child(index).data.get("content"), index) for index in decoder.data]
    tokenizer = read_fields(path / "tokenizer.json")
    added = tokenizer.data.get("added_tokens")
    items = added if isinstance(added, list) else []
    yield [(item.get("content"), item.get("id")) for item in items if isinstance(item, dict)]
    vocab = tokenizer.child("model").data.get("vocab")
    if isinstance(vocab, list):  # Unigram: pieces with their scores, in order
        yield [(piece[0], index) for index, piece in enumerate(vocab) if isinstance(piece, list) and piece]
    yield vocab.items() if isinstance(vocab, dict) else ()
    for name in ("added_tokens.json", "vocab.json"):
        yield read_fields(path / name).data.items()
