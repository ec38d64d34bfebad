"""Which steps are captured in graphs, and how a plan fits into one: as it is, or a request for each of its tokens."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from minisgl.core import ScheduledReq

_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))  # then in steps of 32


class GraphShape(NamedTuple):
    """What is built into a captured step."""

    num_tokens: int
    num_reqs: int
    num_samples: int

    @property
    def is_wide(self) -> bool:
        """Whether it is of requests that may have several tokens."""
        return self.num_tokens > self.num_reqs

    def padding(self, reqs: Sequence[ScheduledReq], row: int) -> tuple[ScheduledReq, ...] | None:
        """Requests of `row`, which is nobody's, that make a step of `reqs` one of this shape; None: it does not fit."""
        num = self.num_reqs - len(reqs)
        tokens = self.num_tokens - sum(req.num_new for req in reqs)
        samples = self.num_samples - sum(req.num_samples for req in reqs)
        if num <= 0:
            return () if num == tokens == samples == 0 else None
        num_new, num_sampled = tokens - num + 1, samples - num + 1  # of the last one
        if not 0 <= num_sampled <= num_new or not num_new:
            return None
        return (*[ScheduledReq(row, 0, 1, 1)] * (num - 1), ScheduledReq(row, 0, num_new, num_sampled))


def captured_shapes(
    max_batch: int, draft_len: int, has_states: bool, has_head: bool, max_seq_len: int
) -> list[GraphShape]:
    """Of steps of up to `max_batch` samples, by size. draft_len: of the longest draft of a request; 0: there are none.

    Where the model's layers take one token like another, a request of several is as good as so many requests of one.
    Layers with states, and a head that tells drafts, have to know which tokens belong together: for them there are
    further shapes, of requests with a whole draft each, and of one more, nobody's, for what others lack. A state may
    have to take its last tokens once more, so that there may be twice as many as are sampled.
    """
    sizes = [size for size in (*_SIZES, *range(544, max_batch, 32)) if size < max_batch] + [max_batch] * (max_batch > 0)
    shapes, each = [GraphShape(size, size, size) for size in sizes], 1 + draft_len
    for size in sizes if draft_len and (has_states or has_head) else ():
        num = size * each
        wide = (num, size, num), (num, size + 1, num), (2 * num, size + 1, num)
        shapes += [GraphShape(*some) for some in wide[: 2 + has_states] if num <= max_batch and some[0] <= max_seq_len]
    return sorted(shapes)


def fit(
    shapes: Sequence[GraphShape], reqs: Sequence[ScheduledReq], row: int
) -> tuple[GraphShape, tuple[ScheduledReq, ...]] | None:
    """The smallest that holds a step of `reqs`, and the requests of `row`, nobody's, that fill it. shapes: by size."""
    begin = bisect.bisect_left(shapes, sum(req.num_new for req in reqs), key=lambda shape: shape.num_tokens)
    for shape in shapes[begin:]:
        if (padding := shape.padding(reqs, row)) is not None:
            return shape, padding
    return None


def one_by_one(reqs: Sequence[ScheduledReq]) -> tuple[ScheduledReq, ...] | None:
    """A request for each token, where all of them sample; else None."""
    if any(req.num_new != req.num_samples for req in reqs):
        return None
    return tuple(ScheduledReq(req.row, req.start + i, 1, 1) for req in reqs for i in range(req.num_new))
