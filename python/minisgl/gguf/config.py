"""A GGUF file as a model's directory: what config.json and other files of it would say, and its tensors by the names
that Hugging Face checkpoints have."""

from __future__ import annotations

import math
import re
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

from minisgl.core import DRAWING
from minisgl.gguf.reader import NAMES, GgufFile, StoredTensor, parts_of
from minisgl.gguf.tokenizer import chat_templates

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(\w+)")
_ROPE = "rope_freqs.weight"


class GgufModel:
    """All files of a model. tensors: by the names of Hugging Face checkpoints. interleaved_dim: features of a head,
    where pairs of them stand side by side, and not in the head's two halves; else 0.

    Raises: ConfigError naming the file, and what of it is missing, broken or not supported.
    """

    def __init__(self, path: Path) -> None:
        self.files = [GgufFile(part) for part in parts_of(path)]
        self._head = self.files[0]
        self._metadata = self._head.metadata
        self._architecture = self._metadata.text("general.architecture", "")
        if self._architecture not in NAMES["architectures"]:
            known = ", ".join(NAMES["architectures"])
            raise self._head.wrong(f"architecture not supported: {self._architecture[:100]!r} (supported: {known})")
        self._stored = {tensor.name: tensor for file in self.files for tensor in file.tensors.values()}
        if (expected := self._metadata.integer("split.tensors.count", len(self._stored), 0)) != len(self._stored):
            raise self._head.wrong(f"its parts have {len(self._stored)} tensors, not {expected}")
        self.tensors = {our_name(name): tensor for name, tensor in self._stored.items() if name != _ROPE}
        self._heads, hidden = max(1, self._integer("attention.head_count")), self._integer("embedding_length")
        self._head_dim = self._integer("attention.key_length") or hidden // self._heads
        self._check_sizes(hidden)
        self.interleaved_dim = self._head_dim if self._architecture == "llama" else 0

    def release(self) -> None:
        """Give back the memory of what was read of the files."""
        for file in self.files:
            file.release()

    def read_json(self, name: str) -> dict[str, Any]:
        """What a file of a model's directory would hold, by its name."""
        if name == "tokenizer_config.json":
            return {"chat_template": chat_templates(self._head.values("tokenizer.chat_template"))}
        if name == "generation_config.json":
            theirs, data = NAMES["sampling"], self._metadata.data
            return {ours: data.get(f"general.sampling.{theirs.get(ours, ours)}") for ours in DRAWING}
        fields = self._fields(name)
        return fields | self._config(fields) if name == "config.json" else fields

    def _check_sizes(self, hidden: int) -> None:
        """Sizes of which tensors are made before any is read. Raises: ConfigError where the tensors are of others."""
        kv_heads = self._integer("attention.head_count_kv") or self._heads
        table = self._stored.get("token_embd.weight")
        shapes = {
            "token_embd.weight": (table.shape[0] if table else 0, hidden),
            "blk.0.attn_q.weight": (self._heads * self._head_dim, hidden),
            "blk.0.attn_k.weight": (kv_heads * self._head_dim, hidden),
            f"blk.{max(1, self._integer('block_count')) - 1}.attn_norm.weight": (hidden,),
        }
        for name, shape in shapes.items():
            if (tensor := self._stored.get(name)) is None:
                raise self._head.wrong(f"tensor {name} is missing")
            if tensor.shape != shape:
                raise tensor.wrong(f"is {list(tensor.shape)}; by the metadata it is {list(shape)}")

    def _integer(self, key: str) -> int:
        return self._metadata.integer(f"{self._architecture}.{key}", 0, 0)

    def _fields(self, table: str) -> dict[str, Any]:
        """Of a table in names.yaml, with the values that the metadata has."""
        keys = {ours: key.format(self._architecture) for ours, key in NAMES.get(table, {}).items()}
        return {ours: self._metadata.data.get(key) for ours, key in keys.items()}

    def _config(self, fields: dict[str, Any]) -> dict[str, Any]:
        """What stands in other forms in the metadata, or nowhere."""
        architecture, window = NAMES["architectures"][self._architecture], self._integer("attention.sliding_window")
        if self._architecture == "llama":
            if fields["num_experts"]:
                raise self._head.wrong("architecture not supported: llama with experts (Mixtral)")
            architecture = "MistralForCausalLM" if window else architecture
        return {
            "architectures": [architecture],
            "vocab_size": self._stored["token_embd.weight"].shape[0],
            "intermediate_size": fields["intermediate_size"] or fields["moe_intermediate_size"],
            "norm_topk_prob": fields["norm_topk_prob"] is not False,
            "rope_scaling": self._rope_scaling(),
            "partial_rotary_factor": (self._integer("rope.dimension_count") or self._head_dim) / self._head_dim,
            "sliding_window": window or None,
            "use_sliding_window": window > 0,
            "max_window_layers": 0,
            "tie_word_embeddings": "output.weight" not in self._stored,
            "attention_bias": "blk.0.attn_q.bias" in self._stored,
            "mlp_bias": "blk.0.ffn_gate.bias" in self._stored,
            "eos_token_id": self._ends(),
            "dtype": "bfloat16",
            "packed_bytes": sum(tensor.num_bytes for tensor in self._stored.values()),
        }

    def _rope_scaling(self) -> dict[str, Any] | None:
        if (tensor := self._stored.get(_ROPE)) is not None:
            return {"factors": self._factors(tensor)}
        fields = self._fields("rope_scaling")
        temperature, factor = fields["attention_factor"], fields["factor"]
        if fields["rope_type"] == "yarn" and type(temperature) is type(factor) is float:
            fields["attention_factor"] = temperature * (0.1 * math.log(max(factor, 1.0)) + 1)  # as it is without it
        return fields if fields["rope_type"] not in (None, "none") else None

    def _ends(self) -> list[Any]:
        """Ids of the tokens that end a turn, said or known."""
        ends = NAMES["ends"]
        named = (self._metadata.data.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        tokens = self._head.values("tokenizer.ggml.tokens").list_of(str, "tokenizer.ggml.tokens")
        return [end for end in named if end is not None] + [i for i, text in enumerate(tokens) if text in ends]

    def _factors(self, tensor: StoredTensor) -> list[float]:
        """By which frequencies are divided. Raises: ConfigError where they are of another kind, or no numbers."""
        num = self._head_dim // 2
        if tensor.kind.name != "F32" or tensor.shape != (num,):
            raise tensor.wrong(f"must be F32, [{num}]")
        factors = list(struct.unpack_from(f"<{num}f", tensor.file.data, tensor.offset))
        if not all(0 < factor < math.inf for factor in factors):
            raise tensor.wrong("has factors that are no numbers above 0")
        return factors


def our_name(name: str) -> str:
    """The name that a tensor has in Hugging Face checkpoints; what is not known stays what it is, in its layer."""
    if match := _BLOCK.fullmatch(name):
        return f"model.layers.{match[1]}.{NAMES['in_blocks'].get(match[2], match[2])}.{match[3]}"
    stem, _, end = name.rpartition(".")
    return f"{NAMES['tensors'].get(stem, stem)}.{end}"


def open_model(path: Path) -> GgufModel:
    """The last one that was opened is kept. Raises: ConfigError."""
    stat = path.stat() if path.is_file() else None
    return _open(path, stat and (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=1)
def _open(path: Path, _state: object) -> GgufModel:
    return GgufModel(path)
