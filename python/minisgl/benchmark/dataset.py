"""What a benchmark asks: random prompts of given lengths, or prompts from a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minisgl.errors import ConfigError

# Ids from here up to the vocabulary's size are ordinary tokens in every tokenizer that we know.
FIRST_ID = 16
WORDS = ["time", "year", "day", "way", "man", "world", "life", "hand", "part", "place", "week", "case", "work", "point"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: text, token ids or chat messages, and how many tokens to ask for."""

    prompt: str | list[int] | list[dict[str, Any]]
    output_len: int

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], dict)

    @property
    def token_ids(self) -> list[int]:
        """The prompt of a sample that was made of ids."""
        assert isinstance(self.prompt, list)
        return [token_id for token_id in self.prompt if isinstance(token_id, int)]


@dataclass(frozen=True, slots=True)
class Lengths:
    """A range of token counts, both ends included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        return [int(value) for value in rng.integers(self.low, self.high, count, endpoint=True)]


def parse_lengths(text: str) -> Lengths:
    """`128` or `100:1024`, for argparse."""
    low, _, high = text.partition(":")
    try:
        lengths = Lengths(int(low), int(high or low))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected tokens such as 128, or a range such as 100:1024"
        ) from None
    if not 1 <= lengths.low <= lengths.high:
        raise argparse.ArgumentTypeError(f"{text!r}: expected at least 1, the smaller end first")
    return lengths


def random_ids(
    count: int, inputs: Lengths, outputs: Lengths, rng: np.random.Generator, vocab_size: int, prefix_len: int = 0
) -> list[Sample]:
    """Prompts of random token ids. The first `prefix_len` ids are common to all."""
    prefix = rng.integers(FIRST_ID, vocab_size, prefix_len).tolist()
    input_lens, output_lens = inputs.draw(rng, count), outputs.draw(rng, count)
    return [
        Sample(prefix + rng.integers(FIRST_ID, vocab_size, input_len).tolist(), output_len)
        for input_len, output_len in zip(input_lens, output_lens, strict=True)
    ]


def random_chats(count: int, inputs: Lengths, outputs: Lengths, rng: np.random.Generator) -> list[Sample]:
    """Chats of one message of random words, about a token each: the server counts the real ones."""
    input_lens, output_lens = inputs.draw(rng, count), outputs.draw(rng, count)
    texts = [" ".join(rng.choice(WORDS, input_len)) for input_len in input_lens]
    return [
        Sample([{"role": "user", "content": text}], output_len)
        for text, output_len in zip(texts, output_lens, strict=True)
    ]


def load_jsonl(path: str, count: int, outputs: Lengths, rng: np.random.Generator) -> list[Sample]:
    """The first `count` lines of a file, again from the top when there are fewer.

    Each line is an object with `prompt` (text or token ids) or `messages`, and optionally `output_len`.
    Raises: ConfigError naming the file and line.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset {path}: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:count]
    if not numbered:
        raise ConfigError(f"--dataset {path}: the file is empty")
    rows = [_parse_line(f"--dataset {path}, line {number}", line) for number, line in numbered]
    drawn = outputs.draw(rng, count)
    return [
        Sample(prompt, output_len if output_len is not None else drawn[index])
        for index, (prompt, output_len) in ((i, rows[i % len(rows)]) for i in range(count))
    ]


def _parse_line(place: str, line: str) -> tuple[Any, int | None]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON: {error}") from None
    prompt = (row.get("messages") or row.get("prompt")) if isinstance(row, dict) else None
    if not isinstance(prompt, str) and not _is_list_of(prompt, int) and not _is_list_of(prompt, dict):
        raise ConfigError(f"{place}: expected an object with `prompt` (text or token ids) or `messages`")
    output_len = row.get("output_len")
    if output_len is not None and (not isinstance(output_len, int) or output_len < 1):
        raise ConfigError(f"{place}: output_len must be a whole number from 1, not {output_len!r}")
    return prompt, output_len


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, kind) for item in value)
