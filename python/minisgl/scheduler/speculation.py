"""Speculation: which requests of a step verify how many drafted tokens beside the one that they would get anyhow.

A token is a function of (seed, position, logits), so every position of a draft is sampled as usual, and the longest run
of samples that equals the draft is kept: the output is the same with and without drafts (docs/adr/0025-speculation.md).
"""

import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import Draft, Req, ReqState, ScheduledReq, StepPlan, StepResult, most_samples
from minisgl.kvcache.pages import Pages
from minisgl.scheduler.drafters import Drafter, NgramDrafter, Prediction
from minisgl.scheduler.plan import Growing
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)

# Of the drafted tokens whose turn comes this share is right: at first, and how much of it one changes, or a step
# in which no draft would pay (so there is another try at some time).
_FIRST_RATE, _LEARNING, _FORGETTING = 0.7, 1 / 8, 1 / 64


class Lengths:
    """How long drafts are to be: what gives most tokens for the time of the whole step. Time counts in steps of few
    tokens: one row more takes `row_cost`, and a step that verifies anything `verify_cost`, since nothing is planned
    meanwhile. Thus drafts get shorter the more requests run, and end."""

    def __init__(self, row_cost: float, verify_cost: float, num_rows: int, num_samples: int) -> None:
        self._row_cost, self._verify_cost = row_cost, verify_cost
        self._cost = self._plain_cost = 1 + row_cost * num_rows
        self._tokens = self._plain_tokens = float(num_samples)

    def best(self, rate: float, num_pending: int, most: int) -> int:
        """The length for one request of the step, of whose drafted tokens such a share is right."""
        length, tokens, cost, chance = 0, self._tokens, self._cost, max(rate, 0.0) ** (1 + num_pending)
        while length < most and chance * cost > self._row_cost * tokens:
            length, tokens, cost, chance = length + 1, tokens + chance, cost + self._row_cost, chance * rate
        return length

    def add(self, rate: float, num_pending: int, length: int) -> None:
        """One has a draft of this length."""
        self._tokens += sum(rate ** (i + num_pending) for i in range(1, length + 1))
        self._cost += self._row_cost * length

    @property
    def least(self) -> float:
        """The share of right tokens up to which no draft pays, nor will when others have got theirs."""
        return self._row_cost * self._tokens / self._cost

    @property
    def pays(self) -> bool:
        """Whether the whole is more than no draft at all."""
        return self._tokens * self._plain_cost > self._plain_tokens * (self._cost + self._verify_cost)


class Speculation:
    """Owns the drafter, and what is remembered of how its drafts fared. Deterministic, as the planner is.

    num_drafted, num_right: tokens, by the name of who guessed them: that of `--speculate`, "prediction" or "grammar".
    holds: whether a drafted token is right where this one was sampled. In its place a benchmark may put a coin, to see
    what drafts of some quality would gain: what is generated then makes no sense.
    """

    def __init__(self, config: SchedulerConfig, drafter: Drafter | None = None) -> None:
        self._config, self._most_samples = config, most_samples(config.max_running_requests)
        self._drafter = NgramDrafter() if drafter is None and config.speculate == "ngram" else drafter
        self._asks = config.speculate in ("mtp", "model")  # the engine
        self._told: dict[int, tuple[int, Sequence[int]]] = {}  # by uid: after how many tokens it says what comes next
        self._predictions: dict[int, Prediction] = {}  # by uid
        self._names: dict[int, str] = {}  # by uid: who has guessed last
        self._rates: dict[int, float] = {}  # by uid; -1: the drafter has failed
        self._forced: dict[int, tuple[int, list[int]]] = {}  # by uid: where prescribed tokens begin, and these
        self.num_drafted, self.num_right = Counter[str](), Counter[str]()
        self.holds: Callable[[int, int], bool] = operator.eq

    @property
    def is_on(self) -> bool:
        """Whether anybody may guess anything."""
        return self._drafter is not None or self._asks or bool(self._forced or self._predictions)

    def expect(self, req: Req) -> None:
        """A new request, which may bring a draft of its own."""
        if self._config.draft_len and isinstance(ids := req.params.prediction, tuple) and ids:
            self._predictions[req.uid] = Prediction(ids)

    def force(self, uid: int, position: int, ids: list[int]) -> None:
        """From this position on, a request's grammar prescribes these tokens: it has no other choice."""
        self._forced[uid] = position, ids

    def lengthen(self, step: Growing, pages: Pages) -> None:
        """Requests that get a token in a step verify drafts, too, where there are pages for these: they become prefill
        whose last tokens all sample. Their counts are as without, until it is known what holds."""
        if not self.is_on:
            return
        shares = [*zip(*step.decode, strict=True), *zip(*step.prefill, strict=True)]
        drafts = self._drafts(shares, step.budget)
        if not drafts and not self._asks:
            return
        step.decode, step.prefill = ([], []), ([], [])
        wanted = self._wanted(shares)
        for req, share in shares:
            if ids := self._with_room(req, share, drafts.get(share.row, ()), pages):
                step.drafts.append(Draft(share.row, share.start + share.num_new, ids))
                share = share._replace(num_new=share.num_new + len(ids), num_samples=share.num_samples + len(ids))
            if most := wanted.get(share.row):
                share = self._asking(req, share, most, pages)
            some_reqs, some_shares = step.decode if share.num_new == share.num_samples == 1 else step.prefill
            some_reqs.append(req)
            some_shares.append(share)

    def _wanted(self, shares: Sequence[tuple[Req, ScheduledReq]]) -> dict[int, int]:
        """By row, how many tokens the engine is to tell for about the next step; empty if they would not pay."""
        wanted, num_samples = dict[int, int](), sum(share.num_samples for _, share in shares)
        if not self._asks or self._are_many(num_samples):
            return wanted
        lengths, room = Lengths(*self._config.step_costs, num_samples, num_samples), self._most_samples - num_samples
        for req, share in shares:
            if share.num_samples and _is_plain(req) and req.params.grammar is None:
                rate = self._rates.get(req.uid, _FIRST_RATE)
                wanted[share.row] = length = lengths.best(rate, 0, min(self._longest_of(req), room))
                lengths.add(rate, 0, length)
                room -= length
        return wanted if lengths.pays else {}

    def _are_many(self, num_samples: int) -> bool:
        """Whether no captured step would hold a draft of each, where a request's tokens belong together: who asked for
        one would wait in vain."""
        return 0 < self._config.cuda_graph_max_bs < num_samples * (1 + self._config.draft_len)

    def _asking(self, req: Req, share: ScheduledReq, most: int, pages: Pages) -> ScheduledReq:
        """With so many tokens that the engine is to tell, as far as there are pages, where it computes from them."""
        end, size = share.start + share.num_new, pages.page_size
        if (wanted := min(most, req.max_len - end - 1)) <= 0:
            return share
        self._take(req, div_ceil(end + wanted, size) - len(req.pages), pages)
        return share._replace(num_drafts=min(wanted, len(req.pages) * size - end))

    def learn(self, req: Req, draft: Sequence[int]) -> None:
        """What the engine says may follow the tokens of a request."""
        self._told[req.uid] = len(req.tokens), draft

    def awaits(self, plan: StepPlan) -> bool:
        """Whether how far a step's requests get, or what may come next, is not known before its result is."""
        return bool(plan.drafts) or (self._asks and any(share.num_drafts for share in plan.reqs))

    def hear(self, plan: StepPlan, result: StepResult) -> None:
        """An engine that has told nothing, though it was asked, will not any more: its drafter has failed."""
        if not result.drafts and any(share.num_drafts for share in plan.reqs):
            self._asks = False

    def settle(
        self, req: Req, share: ScheduledReq, draft: Sequence[int], ids: tuple[int, ...], pages: Pages
    ) -> tuple[int, ...]:
        """A step has sampled `ids` for a request: which of them hold, each one before which the draft was right."""
        num_right, holds = 0, False
        if req.num_stale or req.state is ReqState.FINISHED:  # how far it got is known
            return ids
        while num_right < len(draft):
            holds = self.holds(draft[num_right], ids[num_right])
            if not holds or ids[num_right + 1] < -1:
                break
            num_right += 1
        # A draft that ends where it is right was not looked at any further: there was no mask in time.
        num_judged = num_right if holds else len(draft)
        self._count(req, num_judged, num_right)
        if not self._forced_from(req, share.start + share.num_new - len(draft)):
            self._learn_rate(req.uid, num_judged, num_right)
        req.num_computed += num_right
        pages.held[share.row] = num_right * self._config.has_states
        return ids[: num_right + 1]

    def reset(self, uids: Iterable[int]) -> None:
        """Forget these requests."""
        for uid in uids:
            self.forget(uid)

    def forget(self, uid: int) -> None:
        for known in (self._forced, self._rates, self._names, self._told, self._predictions):
            known.pop(uid, None)
        if self._drafter is not None:
            self._drafter.forget(uid)

    def _drafts(self, shares: Sequence[tuple[Req, ScheduledReq]], budget: int) -> dict[int, Sequence[int]]:
        """By row; empty if they do not pay."""
        config, drafts = self._config, dict[int, Sequence[int]]()
        num_samples = sum(share.num_samples for _, share in shares)
        lengths = Lengths(*config.step_costs, sum(share.num_new for _, share in shares), num_samples)
        budget, least = min(budget, self._most_samples - num_samples), lengths.least
        if config.has_states and self._are_many(num_samples):
            return drafts
        if self._drafter is None and not self._asks:  # the others pay nothing for those that bring their own
            shares = [one for one in shares if one[0].uid in self._predictions or one[0].uid in self._forced]
        for req, share in shares:
            rate = self._rates.setdefault(req.uid, _FIRST_RATE)
            if rate <= least and not self._forced:  # with many requests this is what is done for each of them
                self._forget_rate(req.uid, rate)
            elif share.num_samples and _may_draft(req) and share.num_new <= 1 + self._config.draft_len:
                num_pending = req.num_tokens - 1 - len(req.tokens)
                most = min(self._longest_of(req), budget, req.max_len - req.num_tokens)
                if forced := self._forced_from(req, req.num_tokens - 1):
                    rate, self._names[req.uid] = 1.0, "grammar"
                if length := lengths.best(rate, num_pending, most):
                    if ids := forced[:length] or self._propose(req, num_pending, length):
                        lengths.add(rate, num_pending, len(ids))
                        drafts[share.row], budget = ids, budget - len(ids)
                else:
                    self._forget_rate(req.uid, rate)
        return drafts if lengths.pays else {}

    def _with_room(self, req: Req, share: ScheduledReq, ids: Sequence[int], pages: Pages) -> tuple[int, ...]:
        """As much of a draft as there are pages for."""
        end = share.start + share.num_new
        self._take(req, div_ceil(end + len(ids), pages.page_size) - len(req.pages) if ids else 0, pages)
        return tuple(ids[: len(req.pages) * pages.page_size - end])

    def _take(self, req: Req, missing: int, pages: Pages) -> None:
        """So many pages for guesses, as long as each request that runs can have one more for what is none."""
        num = missing + self._config.max_running_requests - len(pages.rows)
        if missing > 0 and pages.missing(num, num) <= 0 and pages.make_room(missing):
            pages.give(req, pages.allocator.allocate(missing))

    def _longest_of(self, req: Req) -> int:
        most, wanted = self._config.draft_len, req.params.speculate
        return most if wanted is None else min(most, wanted)

    def _propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        """Of the first who has a guess; what a client predicts comes before what the server makes of it."""
        kind, (size, told) = self._config.speculate, self._told.pop(req.uid, (-1, ()))
        try:
            for name, drafter in (("prediction", self._predictions.get(req.uid)), (kind, self._drafter)):
                if drafter is not None and (ids := drafter.propose(req, num_pending, most)[:most]):
                    self._names[req.uid] = name
                    return ids
        except Exception:
            logger.exception("request %d goes on without drafts: the drafter has failed", req.uid)
            self._rates[req.uid] = -1.0
        self._names[req.uid] = kind
        return told[:most] if size == len(req.tokens) and not num_pending else ()

    def _count(self, req: Req, num_drafted: int, num_right: int) -> None:
        name, (right, wrong) = self._names.get(req.uid, ""), req.drafted
        self.num_drafted[name] += num_drafted
        self.num_right[name] += num_right
        req.drafted = right + num_right, wrong + num_drafted - num_right

    def _learn_rate(self, uid: int, num_drafted: int, num_right: int) -> None:
        if (rate := self._rates.get(uid, -1.0)) >= 0:
            rate = 1 - (1 - rate) * (1 - _LEARNING) ** num_right
            self._rates[uid] = rate * (1 - _LEARNING) if num_right < num_drafted else rate

    def _forget_rate(self, uid: int, rate: float) -> None:
        """No draft would have paid: in time there is another try."""
        if 0 <= rate < _FIRST_RATE:
            self._rates[uid] = rate + (_FIRST_RATE - rate) * _FORGETTING

    def _forced_from(self, req: Req, position: int) -> Sequence[int]:
        """The tokens that are prescribed there, as far as that is known."""
        begin, ids = self._forced.get(req.uid, (0, list[int]()))
        return ids[position - begin :] if position >= begin else ()


def _may_draft(req: Req) -> bool:
    """Whether what comes after the token that it samples in this step could be verified at once."""
    return _is_plain(req) and req.num_computed > req.prompt_len


def _is_plain(req: Req) -> bool:
    return not (req.held or req.paced or req.num_stale)
