"""Which tokens of a step have to match a grammar."""

from __future__ import annotations

from collections.abc import Sequence

from minisgl.core import Req, ScheduledReq, TokenBitmask


def bitmask_of(reqs: Sequence[Req], scheduled: Sequence[ScheduledReq]) -> tuple[TokenBitmask | None, list[Req]]:
    """The bitmask of a step without its words, which rank 0 adds: it has the matchers. And whose tokens it is for."""
    if all(req.params.grammar is None for req in reqs):
        return None, []
    sampling = [req for req, share in zip(reqs, scheduled, strict=True) if share.sample]
    samples = tuple(index for index, req in enumerate(sampling) if req.params.grammar is not None)
    return (TokenBitmask(samples, None) if samples else None), [sampling[index] for index in samples]
