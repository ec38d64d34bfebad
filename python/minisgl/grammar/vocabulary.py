"""The model's tokens as llguidance sees them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from minisgl.config.locate import load_tokenizer
from minisgl.errors import ConfigError, RequestError
from minisgl.grammar.source import one_line

# A mask is computed between two tokens, so the limits of a step are milliseconds.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    max_items_in_row=10_000,
    step_max_items=50_000,
    max_lexer_states=20_000,  # 14 MB of a running request
    max_grammar_size=200_000,
    verbose_errors=False,
)


@dataclass(frozen=True, slots=True)
class VocabularyConfig:
    """model_path: with a tokenizer. vocab_size: of the model's logits. eos_token_ids: what ends an output."""

    model_path: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """special: texts of the added tokens, which no string of a grammar matches, and their ids."""

    tokenizer: LLTokenizer
    special: dict[str, int]

    def matcher(self, source: str, param: str) -> LLMatcher:
        """A grammar, in llguidance's language, at the beginning of an output. What is built for the first mask is there
        for all matchers that are copied from this one. Raises: RequestError naming `param`."""
        matcher = LLMatcher(self.tokenizer, source, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise RequestError(f"{param}: {one_line(matcher.get_error())}", param=param)
        return matcher


def load_vocabulary(config: VocabularyConfig) -> Vocabulary:
    """It takes a second with a hundred thousand tokens. Raises: ConfigError when the model has no such tokenizer."""
    if not config.eos_token_ids:
        raise ConfigError("this model has no end-of-sequence token, which structured output needs")
    try:
        tokenizer = _load(config.model_path)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        _add_configured(tokenizer, config.model_path)
        data = json.loads(tokenizer.to_str())
        _leave_out(data, config.vocab_size)
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        _rename_added(data)
        ends = [token for token in config.eos_token_ids if token < config.vocab_size]
        return Vocabulary(LLTokenizer(json.dumps(data), n_vocab=config.vocab_size, eos_token=ends), special)
    except Exception as error:  # whatever the two libraries find wrong with the file
        raise ConfigError(f"structured output cannot use this model's tokenizer: {error}") from error


def _load(model_path: str) -> Tokenizer:
    path = os.path.join(model_path, "tokenizer.json")
    if os.path.isfile(path):
        return Tokenizer.from_file(path)
    converted = getattr(load_tokenizer(model_path), "backend_tokenizer", None)
    if converted is None:
        raise ConfigError("it is of a kind that has no tokenizer.json")
    return Tokenizer.from_str(converted.to_str())


def _leave_out(data: dict[str, Any], vocab_size: int) -> None:
    """Tokens for which the model has no logits, and merges that need them."""
    model = data["model"]
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < vocab_size]
    if isinstance(vocab := model.get("vocab"), list):
        model["vocab"] = vocab[:vocab_size]
    elif any(index >= vocab_size for index in vocab.values()):
        model["vocab"] = vocab = {token: index for token, index in vocab.items() if index < vocab_size}
        pairs = [(*pair.split(" "),) if isinstance(pair, str) else pair for pair in model.get("merges", ())]
        if pairs:
            model["merges"] = [[a, b] for a, b in pairs if a in vocab and b in vocab and a + b in vocab]


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
