"""A step as the planner makes it: `PlanBuilder` collects its shares, `Planned` is the whole, with its requests."""

from dataclasses import dataclass, field
from typing import NamedTuple

from minisgl.core import Admission, Draft, PageUpdate, Req, ScheduledReq, StepPlan
from minisgl.kvcache.pages import Pages

Ids = tuple[int, ...]
Shares = list[tuple[Req, ScheduledReq]]


class Planned(NamedTuple):
    """A step, and the request that each of `plan.reqs` is a share of."""

    plan: StepPlan
    reqs: list[Req]

    @property
    def sampling(self) -> list[Req]:
        """Whose the step's samples are, in their order."""
        shares = zip(self.reqs, self.plan.reqs, strict=True)
        return [req for req, share in shares for _ in range(share.num_samples)]


class Pending(NamedTuple):
    """A row's share in a step in flight that verifies drafts or makes them: it is not known how many are accepted."""

    follows: int = 0  # 1 + its place in that step: `ScheduledReq.follows`
    draft_len: int = 0  # drafted tokens that it verifies: as many, at most, come in addition to one
    next_draft_len: int = 0  # tokens that the engine drafts in that step for this one


@dataclass(slots=True)
class PlanBuilder:
    """What a step has so far. budget: tokens that it may still have. pending: by row, of the step before; a row that
    is not in it starts at a known position."""

    budget: int
    decode: Shares = field(default_factory=list)
    prefill: Shares = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    pending: dict[int, Pending] = field(default_factory=dict)

    def admit(self, req: Req, eos: tuple[int, ...]) -> None:
        ends = req.params.end_ids(eos) if req.params.min_tokens else ()
        self.admissions.append(Admission(req.row, req.prefix, req.params, req.prompt_len, ends))

    def build(self, step_id: int, pages: Pages, checked: list[Req]) -> Planned:
        """The step, with what became of pages since the one before. checked: those whose pages the engine compares."""
        reqs, shares = map(list, zip(*self.decode, *self.prefill, strict=True))
        expected = tuple(PageUpdate(req.row, 0, tuple(req.pages), tuple(req.window_pages)) for req in checked)
        plan = StepPlan(
            step_id, tuple(self.admissions), tuple(pages.updates), tuple(shares), num_decode=len(self.decode),
            expected=expected, states=tuple(pages.states), drafts=tuple(self.drafts),
        )  # fmt: skip
        pages.updates, pages.states, planned = [], [], Planned(plan, reqs)
        if [req for req in reqs if req.params.grammar is not None]:
            masked = tuple(i for i, req in enumerate(planned.sampling) if req.params.grammar is not None)
            return planned._replace(plan=plan._replace(masked=masked))
        return planned
