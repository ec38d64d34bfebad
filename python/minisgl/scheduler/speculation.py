"""Which requests of a step verify how many drafted tokens; outputs are as without (docs/adr/0025-speculation.md)."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import ID_PENDING, Draft, Req, ScheduledReq, StepPlan, StepResult, most_samples, num_right
from minisgl.kvcache.pages import Pages
from minisgl.scheduler.drafters import QUOTED, Drafter, Lookup, Prediction, TreePath
from minisgl.scheduler.plan import Ids, Pending, PlanBuilder
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)
Shares = Sequence[tuple[Req, ScheduledReq]]
# The share of drafted tokens that is right: at first, and if the engine guesses or a text is quoted; how much of it one
# changes, or a step without, where none would pay, and where some might. If nobody wanted any, so many steps rest.
_FIRST_RATE, _SURE_RATE, _LEARNING, _FADE, _RARE, _REST = 0.7, 0.9, 1 / 8, 1 / 64, 1 / 2048, 16


class Lengths:
    """How long drafts are to be: what gives most tokens for the time of the whole step. Thus they get shorter the more
    requests run. costs: `SchedulerConfig.step_costs`, the tokens of a request in captured steps that have room for
    whole drafts only, else 0, and those of the largest captured step, which drafts do not leave. room: tokens that all
    of them may have beside that. pays: whether drafts gain anything."""

    def __init__(self, costs: tuple[float, float, int, int], num_rows: int, num_samples: int, room: int) -> None:
        self._row_cost, self._verify_cost, self._whole, graph = costs
        self._room = min(room, graph - num_rows) if num_rows <= graph else room
        self._plain = self._tokens, self._cost = float(num_samples), 1 + self._row_cost * num_rows
        self.pays, self.least = False, self._row_cost * num_samples / self._cost  # of less right tokens no draft pays

    def best(self, rate: float, num_pending: int, most: int, asked: int | None = None) -> int:
        """The length for one request of the step, of whose drafted tokens such a share is right, within all limits."""
        most = min(self._room, most, most if asked is None else asked)
        length, tokens, cost, chance = 0, self._tokens, self._cost, max(rate, 0.0) ** (1 + num_pending)
        while length < most and chance * cost > self._row_cost * tokens:
            length, tokens, cost, chance = length + 1, tokens + chance, cost + self._row_cost, chance * rate
        return most if length and self._whole else length

    def add(self, rate: float, num_pending: int, num: int) -> None:
        """The request has a draft of so many tokens."""
        self._tokens += rate ** (1 + num_pending) * (num if rate == 1 else (1 - rate**num) / (1 - rate))
        self._cost, self._room = self._cost + self._row_cost * num, self._room - num
        cost = max(self._cost, 1 + self._row_cost * self._plain[0] * self._whole) + self._verify_cost
        self.pays = self._tokens * self._plain[1] > self._plain[0] * cost


class Speculation:
    """Owns the drafters, and how their drafts fared. drafter: of all requests, in place of what `speculate` names.
    num_drafted, num_right: tokens, by who guessed them: as `--speculate` names it, "tree", "prediction", "grammar"."""

    def __init__(self, config: SchedulerConfig, drafter: Drafter | None = None) -> None:
        self._config, self._most_samples = config, most_samples(config.max_running_requests)
        ngram: dict[str, Callable[[Req], Drafter]] = {"tree": lambda _: TreePath(config.page_size), "ngram": Lookup}
        own = None if drafter is None else {config.speculate: lambda _: drafter}
        self._makers = own or (ngram if config.speculate == "ngram" else {})  # who comes first is asked first
        self._asks = config.speculate in ("mtp", "model", "eagle", "dflash")  # the engine for drafts
        whole = config.cuda_graph_max_bs > 0 and (self._asks or config.has_states)
        self._costs = *config.step_costs, (1 + config.draft_len) * whole, config.cuda_graph_max_bs
        self._drafters, self._names = dict[int, dict[str, Drafter]](), dict[int, str]()  # by uid; who was last
        self._forced: dict[int, tuple[int, list[int]]] = {}  # by uid: where prescribed tokens begin, and these
        self._first, self._rates = _SURE_RATE if self._asks else _FIRST_RATE, dict[int, float]()  # -1: a drafter failed
        self._first_rates: dict[int, float] = {False: self._first, True: self._first}  # by whether it is sampled
        self._resting, self._num_steps = 0, 1  # so many requests, looked at, wanted no draft; steps since
        self.num_drafted, self.num_right, self._told = Counter[str](), Counter[str](), dict[int, Sequence[int]]()

    @property
    def is_on(self) -> bool:
        """Whether anybody may guess anything."""
        return self._asks or bool(self._makers or self._forced or self._drafters)

    def expect(self, req: Req) -> None:
        """A new request, which may bring a draft of its own. What others have taught fades."""
        self._first_rates = {kind: x + (self._first - x) * _FADE for kind, x in self._first_rates.items()}
        if self._config.draft_len and isinstance(ids := req.params.prediction, tuple) and ids:
            self._drafters[req.uid], self._rates[req.uid] = {"prediction": Prediction(ids, req.prompt_len)}, self._first

    def force(self, uid: int, position: int, ids: list[int]) -> None:
        """From this position on, a request's grammar prescribes these tokens: it has no other choice."""
        self._forced[uid], self._resting = (position, ids), 0

    def lengthen(self, step: PlanBuilder, pages: Pages) -> None:
        """Add drafts to the shares of a step that sample, where there are pages for these: such shares become prefill
        whose last tokens all sample. Counts of requests stay as without, until it is known what is accepted."""
        size = 0 if step.prefill else len(step.decode)
        rest = min(size, _REST) if self._makers else _REST  # each is asked in vain as often as one request alone
        self._num_steps += (is_resting := 0 < size == self._resting <= len(self._rates) and self._num_steps < rest)
        if is_resting or not self.is_on:
            return
        shares = [*step.decode, *step.prefill]
        num_samples, config = sum(share.num_samples for _, share in shares), self._config
        # Where a request's tokens belong together, no captured step holds a draft of each of so many.
        are_many = 0 < config.cuda_graph_max_bs < num_samples * (1 + config.draft_len)
        drafts = {} if are_many and config.has_states else self._drafts(shares, num_samples, step)
        wanted = {} if are_many or not self._asks else self._wanted(shares, num_samples)
        may_rest = not (drafts or wanted or self._forced or (not self._makers and any(self._drafters.values())))
        self._resting, self._num_steps = size * may_rest, 1
        if not drafts and not wanted:
            return
        step.decode, step.prefill = [], []
        for req, share in shares:
            row, start, num_new, num_samples, next_draft_len, num_accepted, follows = share
            end = start + num_new + step.pending.get(row, Pending()).draft_len  # at most
            if (ids := drafts.get(row)) and (num := self._room(req, end, len(ids), pages)):
                step.drafts.append(Draft(row, start + num_new, tuple(ids[:num])))
                num_new, num_samples, end = num_new + num, num_samples + num, end + num
            if (most := min(wanted.get(row, 0), req.max_len - end - 1)) > 0:
                next_draft_len = max(0, self._room(req, end, most + 1, pages) - 1)  # behind one that is sampled
            share = ScheduledReq(row, start, num_new, num_samples, next_draft_len, num_accepted, follows)
            (step.decode if num_new == num_samples == 1 else step.prefill).append((req, share))

    def _wanted(self, shares: Shares, num: int) -> dict[int, int]:
        """By row, how long a draft the engine is to make, in a step of `num` samples; empty: they would not pay."""
        lengths, wanted = Lengths(self._costs, num, num, self._most_samples - num), dict[int, int]()
        for req, share in shares:
            if share.num_samples and not req.num_stale and (req.params.grammar is None or not self._asks):
                rate = self._rates.get(req.uid, _FIRST_RATE)
                wanted[share.row] = length = lengths.best(rate, 0, self._config.draft_len, req.params.speculate)
                lengths.add(rate, 0, length)
        return wanted if lengths.pays else {}

    def can_follow(self, plan: StepPlan) -> bool:
        """Whether a step may follow one whose end is not known: all drafts are the engine's, and it has no prompts."""
        is_own = self._asks and self._costs[2] > 0 and not (self._makers or self._drafters or self._forced)
        return is_own and all(share.num_new == share.num_samples for share in plan.reqs)

    def hear(self, reqs: Sequence[Req], plan: StepPlan, result: StepResult) -> None:
        """Take in the drafts that the engine made in a step. Asked and making none, its drafter has failed."""
        self._asks &= bool(result.drafts) or not any(share.next_draft_len for share in plan.reqs)
        self._told = {reqs[index].uid: draft for index, draft in result.drafts.items()}

    def settle(self, req: Req, share: ScheduledReq, draft: Sequence[int], ids: Ids, pages: Pages) -> Ids:
        """A step has sampled `ids` for a request → those that are accepted: each one before which the draft was right.
        How the draft fared is remembered, but for what a grammar prescribes: that says nothing of guesses."""
        draft = (self._told.get(req.uid) or [0] * len(draft))[: len(draft)] if draft[0] == ID_PENDING else draft
        name, right = self._names.get(req.uid, ""), num_right(draft, ids)
        # A draft that ends where it is right was not looked at any further: there was no mask in time.
        num_wrong = len(draft) - right if right < len(draft) and draft[right] != ids[right] else 0
        self.num_drafted[name] += right + num_wrong
        self.num_right[name] += right
        req.drafted = req.drafted[0] + right, req.drafted[1] + num_wrong
        kind = req.params.temperature > 0 if self._asks and name == self._config.speculate else -1
        for rates, key, kept in (self._rates, req.uid, 1 - _LEARNING), (self._first_rates, kind, 1 - _LEARNING / 2):
            if (rate := rates.get(key, -1.0)) >= 0 and name != "grammar":
                rates[key] = (1 - (1 - rate) * kept**right) * (kept if num_wrong else 1)
        req.num_computed += right
        pages.accepted[share.row] = right * (self._config.has_states and not req.num_inflight)  # else `follows`
        return ids[: right + 1]

    def forget(self, uids: Collection[int]) -> None:
        """These requests have ended, or begin anew."""
        for known in (self._forced, self._rates, self._names, self._drafters):
            for uid in uids:
                known.pop(uid, None)

    def _drafts(self, shares: Shares, num_samples: int, step: PlanBuilder) -> dict[int, Sequence[int]]:
        """By row, the draft that a share of this step verifies; empty if all together do not pay."""
        num_rows, room = sum(share.num_new for _, share in shares), min(step.budget, self._most_samples - num_samples)
        lengths, drafts = Lengths(self._costs, num_rows, num_samples, room), dict[int, Sequence[int]]()
        if not self._makers and not self._asks:  # the others pay nothing for those that bring their own
            shares = [one for one in shares if one[0].uid in self._drafters or one[0].uid in self._forced]
        may_pay = self._forced or not self._makers or self._wanted(shares, num_samples)  # if all have a draft
        for req, share in shares:
            rate = self._rates.setdefault(req.uid, self._first_rates[req.params.temperature > 0])
            if may_pay and (rate > lengths.least or self._forced):  # else this is all that is done for each of them
                can = share.num_samples and share.num_new <= 1 + self._config.draft_len  # verify drafts in this step
                if not can or req.num_computed <= req.prompt_len or req.held or req.paced or req.num_stale:
                    continue
                _, num_before, num_told = step.pending.get(share.row, Pending())
                told = [ID_PENDING] * num_told if share.follows else self._told.get(req.uid, ())
                num_pending = 0 if share.follows else req.num_tokens - 1 - len(req.tokens)
                begin, forced = self._forced.get(req.uid, (req.num_tokens, []))
                if forced := forced[req.num_tokens - 1 - begin :] if begin < req.num_tokens else []:
                    rate, self._names[req.uid] = 1.0, "grammar"
                most = min(self._config.draft_len, req.max_len - req.num_tokens - num_before)
                length = lengths.best(rate, num_pending, most, req.params.speculate)
                if length and (ids := forced[:length] or self._propose(req, told, num_pending, length)):
                    lengths.add(rate, num_pending, len(ids))
                    drafts[share.row] = ids
        for uid in (req.uid for req, share in shares if not (lengths.pays and share.row in drafts)):
            if 0 <= (rate := self._rates[uid]) < self._first:  # in time another try
                self._rates[uid] += (self._first - rate) * self._num_steps * (_FADE if rate < lengths.least else _RARE)
        return drafts if lengths.pays else {}

    def _room(self, req: Req, end: int, num: int, pages: Pages) -> int:
        """How many of so many guesses behind the first `end` tokens have pages, or get some that nobody needs."""
        if (missing := div_ceil(end + num, pages.page_size) - len(req.pages)) > 0:
            needed = missing + self._config.max_running_requests - len(pages.rows)
            if pages.missing(needed, needed) <= 0 and pages.make_room(missing):
                pages.give(req, pages.allocator.allocate(missing))
        return min(num, len(req.pages) * pages.page_size - end)

    def _propose(self, req: Req, told: Sequence[int], num_pending: int, most: int) -> Sequence[int]:
        """Of the first who has a guess: a client comes before the server, and what the engine has told is the last."""
        try:
            own = self._drafters.setdefault(req.uid, {}) if self._makers else self._drafters.get(req.uid, {})
            own |= {name: make(req) for name, make in self._makers.items() if name not in own}
            for name, drafter in own.items():
                if ids := drafter.propose(req, num_pending, most)[:most]:
                    self._names[req.uid] = name
                    if self._rates[uid := req.uid] == self._first and isinstance(drafter, Lookup):
                        self._rates[uid] = _SURE_RATE if drafter.longest >= QUOTED else self._first
                    return ids
            self._names[req.uid] = self._config.speculate
            return told[num_pending : num_pending + most]
        except Exception:
            logger.exception("request %d goes on without drafts: the drafter has failed", req.uid)
            self._rates[req.uid] = -1.0
        return ()
