"""Which steps are captured in graphs, and how a plan fits into one: as it is, or a request for each of its tokens."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from minisgl.core import ScheduledReq

Reqs = tuple[ScheduledReq, ...]
_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))  # then in steps of 32


class GraphShape(NamedTuple):
    """What is built into a captured step, all of whose tokens sample."""

    num_tokens: int
    num_reqs: int

    @property
    def is_wide(self) -> bool:
        """Whether it is of requests that may have several tokens."""
        return self.num_tokens > self.num_reqs

    def padding(self, reqs: Sequence[ScheduledReq], row: int) -> Reqs | None:
        """Requests of `row`, which is nobody's, that make a step of `reqs` one of this shape; None: it does not fit."""
        num, tokens = self.num_reqs - len(reqs), self.num_tokens - sum(req.num_new for req in reqs)
        if not (0 < num <= tokens or num == tokens == 0):
            return None
        return tuple(ScheduledReq(row, 0, size, size) for size in ((tokens + i) // num for i in range(num)))


def captured_shapes(max_batch: int, draft_len: int, max_seq_len: int) -> list[GraphShape]:
    """Steps of up to `max_batch` tokens, by size: of one token a request; and wide ones, of n or n + 1 requests with
    the tokens of n whole drafts. draft_len: of these, where layers (states, heads) need to know whose a token is."""
    sizes = [size for size in (*_SIZES, *range(544, max_batch, 32)) if size < max_batch] + [max_batch] * (max_batch > 0)
    each, most = 1 + draft_len, min(max_batch, max_seq_len) * (draft_len > 0)
    wide = [GraphShape(n * each, n + more) for n in {*sizes, most // each} for more in (0, 1) if 0 < n * each <= most]
    return sorted([GraphShape(size, size) for size in sizes] + wide)


def fit(shapes: Sequence[GraphShape], reqs: Sequence[ScheduledReq], row: int) -> tuple[GraphShape, Reqs] | None:
    """The smallest shape that holds `reqs`, and requests of `row`, nobody's, that fill it, if any. shapes: by size."""
    begin = bisect.bisect_left(shapes, sum(req.num_new for req in reqs), key=lambda shape: shape.num_tokens)
    padded = ((shape, shape.padding(reqs, row)) for shape in shapes[begin:] if reqs)
    return next(((shape, more) for shape, more in padded if more is not None), None)


def one_by_one(reqs: Sequence[ScheduledReq]) -> Reqs:
    """The same tokens with a request for each: those that sample first, and in their order."""
    parts = [(req, req.num_new - req.num_samples, req.num_new) for req in reqs]
    parts += [(req, 0, first) for req, first, _ in parts if first]
    return tuple(ScheduledReq(req.row, req.start + i, 1, 1) for req, first, end in parts for i in range(first, end))
