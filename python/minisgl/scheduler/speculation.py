"""Speculation: which requests of a step verify how many drafted tokens beside the one that they would get anyhow.

A token is a function of (seed, position, logits), so every position of a draft is sampled as usual, and the longest run
of samples that equals the draft is kept: the output is the same with and without drafts (docs/adr/0025-speculation.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import Draft, Req, ScheduledReq, most_samples
from minisgl.kvcache.pages import Pages
from minisgl.scheduler.drafters import Drafter, NgramDrafter
from minisgl.scheduler.plan import Growing
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)


class Speculation:
    """Owns the drafter, and what is remembered of how its drafts fared. Deterministic, as the planner is."""

    def __init__(self, config: SchedulerConfig, drafter: Drafter | None = None) -> None:
        self._longest, self._most_samples = config.speculate_tokens, most_samples(config.max_running_requests)
        self._drafter = NgramDrafter() if drafter is None and config.speculate == "ngram" else drafter
        if config.has_states:
            self._drafter = None
        self._switched_off: dict[int, None] = {}  # requests for which the drafter has failed

    @property
    def is_on(self) -> bool:
        return self._drafter is not None

    def lengthen(self, step: Growing, pages: Pages) -> None:
        """Requests that decode in a step verify drafts, too, where there are pages for these: they become prefill whose
        last tokens all sample. Their counts are as without, until it is known what holds."""
        (reqs, shares), size = step.decode, pages.page_size
        step.decode = ([], [])
        budget = self._most_samples - len(reqs) - sum(share.num_samples for share in step.prefill[1])
        budget = min(budget, step.budget)
        for req, share in zip(reqs, shares, strict=True):
            start, most = share.start, min(self._longest, budget, req.max_len - req.num_tokens)
            draft = self._draft(req, most) if most > 0 and _may_draft(req) else ()
            missing = div_ceil(start + 1 + len(draft), size) - len(req.pages)
            if missing > 0 and pages.make_room(missing):
                pages.give(req, pages.allocator.allocate(missing))
            draft = tuple(draft[: len(req.pages) * size - start - 1])
            budget -= len(draft)
            kind, num_new = step.prefill if draft else step.decode, 1 + len(draft)
            kind[0].append(req)
            kind[1].append(ScheduledReq(share.row, start, num_new, num_new))
            if draft:
                step.drafts.append(Draft(share.row, start + 1, draft))

    def forget(self, uid: int) -> None:
        if self._drafter is not None:
            self._drafter.forget(uid)
            self._switched_off.pop(uid, None)

    def _draft(self, req: Req, most: int) -> Sequence[int]:
        if self._drafter is None or req.uid in self._switched_off:
            return ()
        try:
            return self._drafter.propose(req, req.num_tokens - 1 - len(req.tokens), most)[:most]
        except Exception:
            logger.exception("request %d goes on without drafts: the drafter has failed", req.uid)
            self._switched_off[req.uid] = None
            return ()


def _may_draft(req: Req) -> bool:
    """Whether what comes after the token that it samples in this step could be verified at once."""
    is_plain = req.params.grammar is None and not (req.held or req.paced or req.num_stale)
    return is_plain and req.num_computed > req.prompt_len
