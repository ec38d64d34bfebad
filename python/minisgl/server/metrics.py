"""Timings and counts of requests, kept while they run. `exposition` shows them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from minisgl.core import FinishReason
from minisgl.message.frontend import UserReply
from minisgl.utils.math import Histogram

_FIRST_TOKEN_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)  # seconds, as the next two
_TOKEN_BOUNDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_REQUEST_BOUNDS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)
_LENGTH_BOUNDS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))  # tokens


@dataclass(slots=True)
class Timing:
    """One output's times so far."""

    begin: float = field(default_factory=time.perf_counter)
    last: float = 0.0  # when tokens have come
    has_prompt: bool = False  # its prompt is counted
    num_output: int = 0


class RequestMetrics:
    """Counts since the server started. Each output is one request here: `n` of them where a client asks for `n`."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(_FIRST_TOKEN_BOUNDS)
        self.inter_token_latency = Histogram(_TOKEN_BOUNDS)
        self.end_to_end = Histogram(_REQUEST_BOUNDS)
        self.prompt_len = Histogram(_LENGTH_BOUNDS)
        self.output_len = Histogram(_LENGTH_BOUNDS)
        self.num_finished = dict.fromkeys(FinishReason, 0)
        self.num_prompt = self.num_output = self.num_cached = 0  # tokens

    def take(self, timing: Timing, reply: UserReply) -> None:
        """More output of a request has come. Tokens that come together share the time since those before them."""
        now = time.perf_counter()
        if not timing.has_prompt and reply.num_prompt_tokens:
            timing.has_prompt = True
            self.num_prompt += reply.num_prompt_tokens
            self.num_cached += reply.num_cached_tokens
            self.prompt_len.add(reply.num_prompt_tokens)
        new = reply.num_output_tokens - timing.num_output
        if new > 0:
            if timing.num_output == 0:
                self.time_to_first_token.add(now - timing.begin)
            else:
                self.inter_token_latency.add((now - timing.last) / new, new)
            self.num_output += new
            timing.num_output, timing.last = reply.num_output_tokens, now
        if reply.finish_reason is not None:
            self.finish(timing, reply.finish_reason)

    def finish(self, timing: Timing, reason: FinishReason) -> None:
        """A request has ended, however."""
        self.num_finished[reason] += 1
        self.end_to_end.add(time.perf_counter() - timing.begin)
        self.output_len.add(timing.num_output)
