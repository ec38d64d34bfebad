"""The tokenizer that a GGUF file describes, as one of transformers: the same ids and texts as the model's own.

A file names how a text is split (`tokenizer.ggml.pre`), and pre_tokenizers.yaml says what the names stand for. A name
that is not there is refused: any other splitting gives ids that the model was not trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from minisgl.errors import ConfigError
from minisgl.gguf.reader import GgufFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # in tokenizer.ggml.token_type; 6: a byte


def load_gguf_tokenizer(path: Path) -> Any:
    """Raises: ConfigError naming the file, and what of its tokenizer is missing, wrong or not supported."""
    return build_tokenizer(GgufFile(path).values("tokenizer."), str(path))


def load_gguf_backend(path: Path) -> Any:
    """The `tokenizers.Tokenizer` alone: to import transformers takes longer than to make it. Raises: ConfigError."""
    return _assemble(_Vocabulary(GgufFile(path).values("tokenizer."), str(path)))


def build_tokenizer(metadata: Mapping[str, Any], source: str) -> Any:
    """A `PreTrainedTokenizerFast`, chat templates included. metadata: by key. source: the file, for messages."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = _Vocabulary(metadata, source)
    keys = [key for key in metadata if f"{key}.".startswith("tokenizer.chat_template.")]  # with names behind, or one
    templates = {key.removeprefix("tokenizer.chat_template")[1:] or "default": metadata[key] for key in keys}
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    options: dict[str, Any] = {theirs: vocabulary.special(name) for theirs, name in names.items()}
    options["chat_template"] = templates if len(templates) > 1 else templates.get("default")
    return PreTrainedTokenizerFast(
        tokenizer_object=_assemble(vocabulary), clean_up_tokenization_spaces=False, **options
    )


class _Vocabulary:
    """Tokens and their types, checked. ids: of those that the model's own tokenizer has: all but unused ones."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata, self._source = metadata, source
        self.model, self.adds_bos = self.value("model"), False  # where the file does not say
        if self.model not in ("gpt2", "llama"):
            raise self.wrong("model", f"is {self.model!r} (supported: gpt2, which is byte-level BPE, and llama)")
        self.tokens = self.items("tokens", str)
        self.types = self.items("token_type", int, [_NORMAL] * len(self.tokens))
        used = [(token, index) for index, token in enumerate(self.tokens) if self.types[index] != _UNUSED]
        self.ids = dict(used)
        if len(self.ids) != len(used):
            raise self.wrong("tokens", "has a token twice")

    def value(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def wrong(self, key: str, what: str) -> ConfigError:
        return ConfigError(f"{self._source}: tokenizer.ggml.{key} {what}")

    def items(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        """A list, of numbers one for each token."""
        items = self.value(key, default)
        if not isinstance(items, list) or not items or {*map(type, items)} != {kind}:
            raise self.wrong(key, f"must be a list of {kind.__name__}")
        if kind is not str and len(items) != len(self.tokens):
            raise self.wrong(key, f"has {len(items)} items for {len(self.tokens)} tokens")
        return items

    def special(self, name: str) -> str | None:
        """The text of a special token: bos, eos, padding or unknown."""
        usual = {"unknown": 0, "bos": 1, "eos": 2} if self.model == "llama" else {}
        if (index := self.value(f"{name}_token_id", usual.get(name))) is None:
            return None
        if type(index) is not int or not 0 <= index < len(self.tokens) or self.types[index] == _UNUSED:
            raise self.wrong(f"{name}_token_id", f"is {index!r}, which is none of {len(self.tokens)} tokens")
        return self.tokens[index]

    def add_tokens(self, tokenizer: Any) -> None:
        """Has it find control tokens and users' own before it splits a text, and put BOS and EOS around texts."""
        from tokenizers import AddedToken
        from tokenizers.processors import TemplateProcessing

        kinds = [(text, self.types[index]) for text, index in self.ids.items() if text]
        added = [(text, kind != _USER_DEFINED) for text, kind in kinds if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in added])
        bos = self.special("bos") if self.value("add_bos_token", self.adds_bos) else None
        eos = self.special("eos") if self.value("add_eos_token") else None
        template = [piece for piece in (bos, "$A", eos) if piece is not None]
        ids = [(token, tokenizer.token_to_id(token)) for token in {bos, eos} if token is not None]
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)


def _assemble(vocabulary: _Vocabulary) -> Any:
    """SentencePiece's merges follow from the tokens' scores."""
    from tokenizers import Tokenizer, models

    is_bytes, has_prefix = vocabulary.model == "gpt2", vocabulary.value("add_space_prefix") is not False
    name = str(vocabulary.value("pre")) if is_bytes else "prefix" if has_prefix else "no prefix"
    table = yaml.safe_load(Path(__file__).with_name("pre_tokenizers.yaml").read_text(encoding="utf-8"))
    known = {name: parts for parts in table[vocabulary.model] for name in parts["names"]}
    if name not in known:
        raise vocabulary.wrong("pre", f"is {name} (supported: {', '.join(known)})")
    vocabulary.adds_bos, options = known[name].get("adds_bos", False), known[name].get("options", {})
    if is_bytes:
        merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in vocabulary.items("merges", str))]
    else:
        from transformers.convert_slow_tokenizer import generate_merges

        scores, types = vocabulary.items("scores", float), vocabulary.types
        normal = {token: scores[index] for token, index in vocabulary.ids.items() if types[index] == _NORMAL}
        merges = generate_merges(vocabulary.ids, normal)
        options = {**options, "unk_token": vocabulary.special("unknown")}
    parts = {part: known[name].get(part) for part in ("normalizer", "pre_tokenizer", "decoder")}
    tokenizer = Tokenizer.from_str(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, **parts}))
    try:
        tokenizer.model = models.BPE(vocab=vocabulary.ids, merges=merges, **options)
    except Exception as error:  # of no class of its own
        raise vocabulary.wrong("merges", f"does not fit the tokens: {error}") from None
    vocabulary.add_tokens(tokenizer)
    return tokenizer
