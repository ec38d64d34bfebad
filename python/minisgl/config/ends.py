"""Which ids end a generation: what a model's files say, each in its own way."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minisgl.config.locate import Fields, read_fields

logger = logging.getLogger(__name__)


def read_ends(path: Path, config: Fields, vocab_size: int) -> tuple[int, ...]:
    """The ids, generation_config.json's first: a chat model often adds its end of turn there. What is no id of the
    model is left out, with a warning. config: of config.json. Raises: ConfigError naming a file that cannot be read."""
    ids: dict[int, None] = {}
    for fields in (read_fields(path / "generation_config.json"), config):
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
