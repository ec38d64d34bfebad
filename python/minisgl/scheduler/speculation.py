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
from minisgl.scheduler.drafters import Drafter, NgramDrafter, ToldDrafter
from minisgl.scheduler.plan import Growing, Shares
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)

_LONGEST = {"ngram": 8, "mtp": 3}  # drafts, where no flag says it


class Speculation:
    """Owns the drafter, and what is remembered of how its drafts fared. Deterministic, as the planner is."""

    def __init__(self, config: SchedulerConfig, drafter: Drafter | None = None) -> None:
        self._longest = config.speculate_tokens or _LONGEST.get(config.speculate, 8)
        self._most_samples = most_samples(config.max_running_requests)
        self._told = ToldDrafter() if config.speculate == "mtp" else None
        self._drafter = NgramDrafter() if drafter is None and config.speculate == "ngram" else drafter or self._told
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
        if self._told is not None:
            step.decode, step.prefill = self._asking(*step.decode, pages), self._asking(*step.prefill, pages)

    def _asking(self, reqs: list[Req], shares: list[ScheduledReq], pages: Pages) -> Shares:
        """The same, with how many tokens the engine is to tell for each, where there are pages for them."""
        asking, size = [], pages.page_size
        for req, share in zip(reqs, shares, strict=True):
            end = share.start + share.num_new
            wanted = min(self._longest, req.max_len - end - 1)
            if not share.num_samples or wanted <= 0 or not _is_plain(req):
                asking.append(share)
                continue
            # The engine computes all but the last one's keys and values.
            missing = div_ceil(end + wanted - 1, size) - len(req.pages)
            if missing > 0 and pages.make_room(missing):
                pages.give(req, pages.allocator.allocate(missing))
            asking.append(share._replace(num_drafts=min(wanted, len(req.pages) * size - end + 1)))
        return reqs, asking

    def learn(self, req: Req, draft: Sequence[int]) -> None:
        """What the engine says may follow the tokens of a request."""
        if self._told is not None:
            self._told.drafts[req.uid] = draft

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
    return _is_plain(req) and req.num_computed > req.prompt_len


def _is_plain(req: Req) -> bool:
    return req.params.grammar is None and not (req.held or req.paced or req.num_stale)
