"""The model's tokens as llguidance sees them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer

from minisgl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class VocabularyConfig:
    """model_path: with a `tokenizer.json`. vocab_size: of the model's logits. eos_token_ids: what ends an output."""

    model_path: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """special: texts of the added tokens, which no string of a grammar matches, and their ids."""

    tokenizer: LLTokenizer
    special: dict[str, int]


def load_vocabulary(config: VocabularyConfig) -> Vocabulary:
    """It takes a second with a hundred thousand tokens. Raises: ConfigError when the model has no such tokenizer."""
    path = os.path.join(config.model_path, "tokenizer.json")
    if not os.path.isfile(path):
        raise ConfigError("this model has no tokenizer.json, which structured output needs")
    if not config.eos_token_ids:
        raise ConfigError("this model has no end-of-sequence token, which structured output needs")
    try:
        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        _add_configured(tokenizer, config.model_path)
        data = json.loads(tokenizer.to_str())
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        _rename_added(data)
        ends = [token for token in config.eos_token_ids if token < config.vocab_size]
        return Vocabulary(LLTokenizer(json.dumps(data), n_vocab=config.vocab_size, eos_token=ends), special)
    except Exception as error:  # whatever the two libraries find wrong with the file
        raise ConfigError(f"structured output cannot use this model's tokenizer: {error}") from error


def _add_configured(tokenizer: Tokenizer, model_path: str) -> None:
    """Tokens that only tokenizer_config.json has."""
    path = os.path.join(model_path, "tokenizer_config.json")
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        added: dict[str, Any] = json.load(file).get("added_tokens_decoder", {})
    for index, token in sorted(added.items(), key=lambda item: int(item[0])):
        if tokenizer.id_to_token(int(index)) is None:
            tokenizer.add_tokens([AddedToken(token["content"], special=token.get("special", False))])


def _rename_added(data: dict[str, Any]) -> None:
    """Give added tokens names that no grammar has in its strings.

    llguidance lets no string match an added token (`<tool_call>`, `<|im_end|>`); but it also tokenizes the strings
    that a grammar prescribes, would get this very token, and be stuck.
    """
    vocab = data["model"].get("vocab")
    for token in data["added_tokens"]:
        name = f"<|added token {token['id']}|>"
        if isinstance(vocab, dict) and token["content"] in vocab:
            vocab[name] = vocab.pop(token["content"])
        token["content"], token["special"] = name, True
