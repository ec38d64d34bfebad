"""What a benchmark asks: random prompts of given lengths, or requests from a file."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from minisgl.benchmark.shapes import WORDS
from minisgl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: text, token ids or chat messages, how many tokens to ask for, and when, in seconds (None: open)."""

    prompt: Any
    output_len: int
    timestamp: float | None = None

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], dict)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A range of token counts, both ends included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"

    def draw(self, rng: Random) -> int:
        return rng.randint(self.low, self.high)


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
    count: int, inputs: Lengths, outputs: Lengths, rng: Random, vocab_size: int, prefix_len: int = 0
) -> list[Sample]:
    """Prompts of random token ids below `vocab_size`; the first `prefix_len` are common to all.

    The order of draws (each prompt's length and ids, then all output lengths) is that of the field's offline benchmark.
    """
    prefix = _ids(rng, vocab_size, prefix_len)
    prompts = [prefix + _ids(rng, vocab_size, inputs.draw(rng)) for _ in range(count)]
    return [Sample(prompt, outputs.draw(rng)) for prompt in prompts]


def random_chats(count: int, inputs: Lengths, outputs: Lengths, rng: Random) -> list[Sample]:
    """Chats of one message of random words, about a token each: the server counts the real ones."""
    chats = [_chat(rng, inputs.draw(rng)) for _ in range(count)]
    return [Sample(chat, outputs.draw(rng)) for chat in chats]


def load_jsonl(
    flag: str, path: str, count: int | None, outputs: Lengths, rng: Random, vocab_size: int, chat: bool = False
) -> list[Sample]:
    """The first `count` lines of a file (None: all), again from the top when there are fewer.

    Each line is an object with `prompt` (text or token ids), `messages`, or `prompt_len` (a random prompt is made, a
    message if `chat`); optionally `output_len`, and `timestamp` in seconds, which a trace must have.
    Raises: ConfigError naming the flag, file and line.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path}: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:count]
    if not numbered:
        raise ConfigError(f"{flag} {path}: the file is empty")
    samples = []
    for number, line in numbered:
        place = f"{flag} {path}, line {number}"
        row = _parse_line(place, line, needs_timestamp=flag == "--trace")
        prompt = row.get("messages") or row.get("prompt")
        if not prompt:
            prompt = _chat(rng, row["prompt_len"]) if chat else _ids(rng, vocab_size, row["prompt_len"])
        samples.append(Sample(prompt, row.get("output_len") or outputs.draw(rng), row.get("timestamp")))
    return [samples[i % len(samples)] for i in range(count or len(samples))]


def _ids(rng: Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randint(0, vocab_size - 1) for _ in range(count)]


def _chat(rng: Random, num_words: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": " ".join(rng.choices(WORDS, k=num_words))}]


def _parse_line(place: str, line: str, needs_timestamp: bool) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON: {error}") from None
    row = row if isinstance(row, dict) else {}
    prompt = row.get("messages") or row.get("prompt")
    is_list = isinstance(prompt, list) and any(all(isinstance(item, kind) for item in prompt) for kind in (int, dict))
    if not (isinstance(prompt, str) or is_list or (prompt is None and row.get("prompt_len"))):
        raise ConfigError(f"{place}: expected an object with `prompt` (text or token ids), `messages` or `prompt_len`")
    for name in ("prompt_len", "output_len"):
        value = row.get(name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{place}: {name} must be a whole number from 1, not {value!r}")
    timestamp = row.get("timestamp")
    if (timestamp is None and needs_timestamp) or not isinstance(timestamp, int | float | None):
        raise ConfigError(f"{place}: timestamp must be a number of seconds, not {timestamp!r}")
    return row
