"""What a benchmark asks: random prompts of given lengths, or requests from a file."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from minisgl.benchmark.shapes import WORDS
from minisgl.config.args import argument, parser_of
from minisgl.errors import ConfigError

Count = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: text, token ids or chat messages, how many tokens to ask for, and when, in seconds (None: open)."""

    prompt: Any
    output_len: int
    timestamp: float | None = None

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], dict)


class Line(Struct):
    """A line of a file of requests. timestamp: seconds. hash_ids: of its prompt's blocks; the same begin alike.

    Those of Mooncake's traces have lengths by other names, and milliseconds; here they become as the others are.
    """

    prompt: str | list[int | dict[str, Any]] | None = None
    messages: list[dict[str, Any]] | None = None
    prompt_len: Count | None = None
    output_len: Count | None = None
    timestamp: Annotated[float, Meta(ge=0)] | None = None
    hash_ids: list[int] = []
    input_length: Count | None = None
    output_length: Count | None = None

    def __post_init__(self) -> None:
        if self.input_length is not None:
            self.prompt_len, self.output_len = self.input_length, self.output_length
            self.timestamp = None if self.timestamp is None else self.timestamp / 1000
        if not (self.messages or self.prompt or self.prompt_len):
            raise ValueError("expected an object with `prompt` (text or token ids), `messages` or `prompt_len`")


@dataclass(frozen=True, slots=True)
class Lengths:
    """A range of token counts, both ends included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"

    def draw(self, rng: Random) -> int:
        return rng.randint(self.low, self.high)


def _lengths(text: str) -> Lengths:
    low, _, high = text.partition(":")
    return Lengths(int(low), int(high or low))


_EXPECTED = "tokens such as 128, or a range such as 100:1024, the smaller end first"
parse_lengths = argument(parser_of(_EXPECTED, lambda lengths: 1 <= lengths.low <= lengths.high, _lengths))


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
    samples = []
    for _, row in read_lines(flag, path, *(["timestamp"] if flag == "--trace" else []), count=count):
        prompt: Any = row.messages or row.prompt
        if not prompt:
            prompt = _chat(rng, row.prompt_len or 1) if chat else _ids(rng, vocab_size, row.prompt_len or 1)
        samples.append(Sample(prompt, row.output_len or outputs.draw(rng), row.timestamp))
    return [samples[i % len(samples)] for i in range(count or len(samples))]


def read_lines(flag: str, path: str, *needed: str, count: int | None = None) -> list[tuple[str, Line]]:
    """The first `count` lines of a file (None: all) that are not empty, each with its place, in words.

    needed: fields that none may lack. Raises: ConfigError naming the flag, the file, and a line's number and field.
    """
    with naming(f"{flag} {path}"):
        lines = [(number, line) for number, line in enumerate(Path(path).read_bytes().splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{flag} {path}: the file is empty")
    found = list[tuple[str, Line]]()
    for number, line in lines[:count]:
        with naming(place := f"{flag} {path}, line {number}"):
            found.append((place, row := msgspec.json.decode(line, type=Line)))
        if missing := [name for name in needed if getattr(row, name) is None]:
            raise ConfigError(f"{place}: {missing[0]} must be given")
    return found


@contextlib.contextmanager
def naming(place: str) -> Iterator[None]:
    """A file that cannot be read or written, or is not as it has to be, is a ConfigError that names the place."""
    try:
        yield
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        kind = "not JSON: " * (type(error) is msgspec.DecodeError)
        raise ConfigError(f"{place}: {kind}{(isinstance(error, OSError) and error.strerror) or error}") from None


def _ids(rng: Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randint(0, vocab_size - 1) for _ in range(count)]


def _chat(rng: Random, num_words: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": " ".join(rng.choices(WORDS, k=num_words))}]
