"""What a simulated cluster is asked: requests of a trace, or drawn from a seed.

There is no text. A prompt is spelled by segments, each so many times one token id, and prompts that begin with the same
segments begin alike: that is all that a prefix cache asks of them.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from minisgl.errors import ConfigError

Segment = tuple[int, int]  # a token id, and how many of it
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """time: when it comes, in seconds; of a session's later turns, how long after the answer before.

    answer: the token id that its output consists of. place: where it comes from, in words.
    """

    time: float
    segments: tuple[Segment, ...]
    output_len: int
    answer: int
    place: str


Session = list[Request]  # each of them begins with what was said before


def generate(args: Namespace, num_replicas: int, max_seq_len: int) -> list[Session]:
    """What the flags ask for (flags.yaml), in order of time. It grows with the cluster: as many requests and system
    prompts for each replica; of these the n-th is 1/n times as frequent as the first. Numbers of turns are of a
    geometric distribution, thinking times of an exponential one. Raises: ConfigError where a prompt does not fit."""
    rng, shape = np.random.default_rng(args.seed), 1 / args.burstiness**2
    number = max(1, round(args.rate * num_replicas * args.duration / args.turns))
    times = np.cumsum(rng.gamma(shape, args.duration / number / shape, number))
    weights = 1 / np.arange(1, args.prefixes * num_replicas + 1)
    prefixes = rng.choice(len(weights), number, p=weights / weights.sum())
    ids = count(len(weights))
    draws = enumerate(zip(times.tolist(), prefixes.tolist(), strict=True))
    return [_session(args, rng, f"session {index}", *draw, ids, max_seq_len) for index, draw in draws]


def _session(
    args: Namespace, rng: np.random.Generator, place: str, time: float, prefix: int, ids: Iterator[int], max_len: int
) -> Session:
    """It ends early where its next turn would not fit the context."""
    session, segments, prompt_len = Session(), tuple[Segment, ...]([(prefix, args.prefix_len)]), args.prefix_len
    for _ in range(rng.geometric(1 / args.turns)):
        message, output_len = (int(rng.integers(s.low, s.high + 1)) for s in (args.input_len, args.output_len))
        if (prompt_len := prompt_len + message) >= max_len - output_len:
            break
        turn = Request(time, (*segments, (next(ids), message)), output_len, next(ids), place)
        session.append(turn)
        segments, prompt_len = (*turn.segments, (turn.answer, output_len)), prompt_len + output_len
        time = float(rng.exponential(args.think))
    if not session:
        raise ConfigError(f"--prefix-len and --input-len: {prompt_len} tokens; the context is {max_len}")
    return session


class Line(Struct, kw_only=True):
    """A line of `minisgl bench serve --trace`, with a time in seconds."""

    timestamp: Annotated[float, Meta(ge=0)]
    prompt_len: Annotated[int, Meta(ge=1)]
    output_len: Annotated[int, Meta(ge=1)]
    hash_ids: list[int] = []


class MooncakeLine(Line, kw_only=True):
    """One of Mooncake's traces, with a time in milliseconds. A hash stands for a block, and all that precedes it."""

    prompt_len: Annotated[int, Meta(ge=1)] = msgspec.field(name="input_length")
    output_len: Annotated[int, Meta(ge=1)] = msgspec.field(name="output_length")


def read_trace(args: Namespace, max_seq_len: int) -> list[Session]:
    """Requests of the file `args.trace`, in order of time, in one of the two forms; each is a session of its own.

    Raises: ConfigError naming file, line and field.
    """
    try:
        lines = Path(args.trace).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"--trace {args.trace}: {error.strerror}") from None
    names, ids, requests = dict[int, int](), count(), list[Request]()  # names: the ids here of the file's
    for place, line in ((f"--trace {args.trace}, line {number}", line) for number, line in enumerate(lines, 1)):
        if not line.strip():
            continue
        is_mooncake = b'"input_length"' in line
        row: Line = parse(place, line, MooncakeLine if is_mooncake else Line)
        size, unit = row.prompt_len, 1000 if is_mooncake else 1
        lengths = [min(args.block_size, size - start) for start in range(0, size, args.block_size)]
        if len(row.hash_ids) not in (0, len(lengths)):
            raise ConfigError(f"{place}: hash_ids: {len(row.hash_ids)}, for {len(lengths)} blocks (--block-size)")
        if size >= max_seq_len:
            raise ConfigError(f"{place}: the prompt has {size} tokens, and the context {max_seq_len}")
        named = [names.setdefault(one, next(ids)) for one in row.hash_ids]
        segments = tuple(zip(named, lengths, strict=True)) if named else ((next(ids), size),)
        requests.append(Request(row.timestamp / unit, segments, row.output_len, next(ids), place))
    if not requests:
        raise ConfigError(f"--trace {args.trace}: the file is empty")
    requests.sort(key=lambda request: request.time)
    return [[replace(request, time=(request.time - requests[0].time) / args.speed)] for request in requests]


def parse(place: str, text: bytes, kind: type[T]) -> T:
    """Raises: ConfigError naming the place, and the field that is missing or wrong."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: {error}") from None
