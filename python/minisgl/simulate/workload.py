"""What a simulated cluster is asked: requests of a trace, or drawn from a seed.

There is no text. A prompt is spelled by segments, each so many times one token id, and prompts that begin with the same
segments begin alike: that is all that a prefix cache asks of them.
"""

from argparse import Namespace
from dataclasses import dataclass
from itertools import count

import numpy as np

from minisgl.benchmark.dataset import read_lines
from minisgl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Request:
    """time: when it comes, in seconds; of a session's later turns, how long after the answer before. segments: token
    ids, and how many of each. answer: the id that its output consists of. session: its name, "": of none."""

    time: float
    segments: tuple[tuple[int, int], ...]
    output_len: int
    answer: int
    session: str = ""


Session = list[Request]  # each of them begins with what was said before


def generate(args: Namespace, num_replicas: int, max_seq_len: int) -> list[Session]:
    """What the flags ask for (`flags.yaml`), in order of time. It grows with the cluster: as many requests and system
    prompts for each replica; of these the n-th is 1/n times as frequent as the first. Numbers of turns are of a
    geometric distribution, thinking times of an exponential one; a session ends early where its next turn would not fit
    the context. Raises: ConfigError where the first one does not."""
    rng, shape = np.random.default_rng(args.seed), 1 / args.burstiness**2
    number = max(1, round(args.rate * num_replicas * args.duration / args.turns))
    times = np.cumsum(rng.gamma(shape, args.duration / number / shape, number)).tolist()
    weights = 1 / np.arange(1, args.prefixes * num_replicas + 1)
    prefixes = rng.choice(len(weights), number, p=weights / weights.sum()).tolist()
    ids, sessions = count(len(weights)), [Session() for _ in times]
    for index, (time, prefix, session) in enumerate(zip(times, prefixes, sessions, strict=True)):
        segments, prompt_len = [(prefix, args.prefix_len)], args.prefix_len
        for _ in range(rng.geometric(1 / args.turns)):
            message, output_len = (int(rng.integers(s.low, s.high + 1)) for s in (args.input_len, args.output_len))
            if (prompt_len := prompt_len + message) >= max_seq_len - output_len:
                break
            session.append(turn := Request(time, (*segments, (next(ids), message)), output_len, next(ids), str(index)))
            segments, prompt_len = [*turn.segments, (turn.answer, output_len)], prompt_len + output_len
            time = float(rng.exponential(args.think))
        if not session:
            raise ConfigError(f"--prefix-len and --input-len: {prompt_len} tokens; the context is {max_seq_len}")
    return sessions


def read_trace(args: Namespace, max_seq_len: int) -> list[Session]:
    """Requests of the file `args.trace`, in order of time; each is a session of its own. Raises: ConfigError naming
    file, line and field."""
    names, ids, sessions = dict[int, int](), count(), list[Session]()  # names: the ids here of the file's
    rows = read_lines("--trace", args.trace, "timestamp", "prompt_len", "output_len")
    begin = min(row.timestamp or 0.0 for _, row in rows)
    for place, row in rows:
        size, output_len, seconds = row.prompt_len or 0, row.output_len or 0, (row.timestamp or 0.0) - begin
        lengths = [min(args.block_size, size - start) for start in range(0, size, args.block_size)]
        if len(row.hash_ids) not in (0, len(lengths)):
            raise ConfigError(f"{place}: hash_ids: {len(row.hash_ids)}, for {len(lengths)} blocks (--block-size)")
        if size >= max_seq_len:
            raise ConfigError(f"{place}: the prompt has {size} tokens, and the context {max_seq_len}")
        blocks = [names.setdefault(one, next(ids)) for one in row.hash_ids] or [next(ids) for _ in lengths]
        segments = tuple(zip(blocks, lengths, strict=True))
        sessions.append([Request(seconds / args.speed, segments, output_len, next(ids))])
    return sorted(sessions, key=lambda session: session[0].time)
