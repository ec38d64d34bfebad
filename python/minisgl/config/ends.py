"""Which tokens end an output: those that a model's configurations name, and its tokenizer's own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minisgl.config.fields import Fields, read_fields

logger = logging.getLogger(__name__)


def read_ends(path: Path, generation: Fields, config: Fields, vocab_size: int) -> tuple[int, ...]:
    """The ids, generation_config.json's first: a chat model often adds its end of turn there. What is no id of the
    model is left out, with a warning. Raises: ConfigError naming a file that cannot be read."""
    ids: dict[int, None] = {}
    for fields in (generation, config):
        value = fields.get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size:
                ids[token] = None
            else:
                reason = f"no token id (a whole number from 0 to {vocab_size - 1})"
                logger.warning("%s: eos_token_id %.80r is %s and has no effect", fields.source, token, reason)
    own = _tokenizer_end(path)
    if own is not None and own < vocab_size:
        ids[own] = None
    return tuple(ids)


def _tokenizer_end(path: Path) -> int | None:
    """The id of the tokenizer's `eos_token`, which a file gives as text, alone or with the token's properties."""
    config = read_fields(path / "tokenizer_config.json")
    for fields in (config, read_fields(path / "special_tokens_map.json")):
        token = fields.get("eos_token")
        if isinstance(token, dict):
            token = fields.child("eos_token").text("content", None)
        if token is not None:
            break
    else:
        return None
    if not isinstance(token, str):
        raise fields.wrong("eos_token", "a string")
    for vocabulary in _vocabularies(path, config):
        found = next((index for text, index in vocabulary if text == token), None)
        if found is not None and str(found).isdecimal():
            return int(found)
    logger.warning("%s: eos_token %.80r is not in the vocabulary and has no effect", fields.source, token)
    return None


def _vocabularies(path: Path, config: Fields) -> Iterator[Iterable[tuple[Any, Any]]]:
    """Texts and ids that a tokenizer's files have, the smallest file first."""
    decoder = config.child("added_tokens_decoder")
    yield [(decoder.child(index).get("content"), index) for index in decoder]
    tokenizer = read_fields(path / "tokenizer.json")
    added = tokenizer.get("added_tokens")
    items = [item for item in added if isinstance(item, dict)] if isinstance(added, list) else []
    yield [(item.get("content"), item.get("id")) for item in items]
    vocab = tokenizer.child("model").get("vocab")
    if isinstance(vocab, list):  # Unigram: pieces with their scores, in order
        yield [(piece[0], index) for index, piece in enumerate(vocab) if isinstance(piece, list) and piece]
    elif isinstance(vocab, dict):
        yield vocab.items()
    for name in ("added_tokens.json", "vocab.json"):
        yield list(read_fields(path / name).items())
