"""What the host remembers of running requests, by row, and the indices of one step."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from struct import pack
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minisgl.attention.base import AttentionStep, IntArray
from minisgl.core import MAX_COUNT, Draft, SamplingParams, ScheduledReq, StepPlan, StepResult, num_right
from minisgl.engine.logprobs import LogprobRules
from minisgl.engine.pooling import PooledRows
from minisgl.engine.rules import LogitRules
from minisgl.errors import require
from minisgl.kernel.sampling import COLUMNS, RECORD, SamplingColumns, Words, records
from minisgl.utils.math import div_ceil


class StepIndex(NamedTuple):
    """Which tokens a step computes: m requests in plan order, their t tokens one after the other, n of which sample."""

    starts: IntArray  # [m]: the first token's position
    num_new: IntArray  # [m]
    sample_positions: IntArray  # [n] of the tokens to be sampled
    # From here on what the device gets, too: `StepTensors`.
    sample_rows: IntArray  # [n] of the tables
    logit_tokens: IntArray  # [n]: which of the t
    rows: IntArray  # [m] of the tables
    next_draft_lens: IntArray  # [m]: `ScheduledReq.next_draft_len`
    drafted: IntArray  # [2 * m]: `num_accepted` of each request, then how many drafted tokens each of them verifies
    follows: IntArray  # [m]: `ScheduledReq.follows`
    seq_lens: IntArray  # [m] tokens, this step's included
    offsets: IntArray  # [m + 1]: request i has tokens [offsets[i], offsets[i + 1])
    token_rows: IntArray  # [t]
    positions: IntArray  # [t]
    ends: IntArray  # [t]: 1 + positions

    @property
    def numbers(self) -> tuple[IntArray, ...]:
        """What is copied to the device, in the order of `StepTensors`."""
        return self[3:]

    @staticmethod
    def of(reqs: Sequence[ScheduledReq]) -> "StepIndex":
        """reqs: not empty."""
        words = pack(f"{len(reqs) * len(reqs[0])}q", *chain.from_iterable(reqs))  # numpy's own ways take twice as long
        table = np.frombuffer(words, np.int64).reshape(len(reqs), -1)
        rows, starts, num_new, num_samples, next_draft_lens, num_accepted, follows = table.T.copy()
        seq_lens, offsets = starts + num_new, np.arange(len(reqs) + 1)
        counts = next_draft_lens, np.concatenate((num_accepted, np.maximum(num_samples - 1, 0))), follows
        if (num_new == 1).all() and (num_samples == 1).all():  # the common case, in which there is less to do
            rest = offsets[:-1], rows, *counts
            return StepIndex(starts, num_new, seq_lens, rows, *rest, seq_lens, offsets, rows, starts, seq_lens)
        ends = num_new.cumsum(out=offsets[1:])
        token_rows, tokens = rows.repeat(num_new), np.arange(ends[-1])
        positions = tokens + (starts - offsets[:-1]).repeat(num_new)
        logit_tokens = np.flatnonzero(tokens >= (ends - num_samples).repeat(num_new))
        of_tokens = token_rows, positions, positions + 1
        sampled = of_tokens[2][logit_tokens], token_rows[logit_tokens], logit_tokens
        return StepIndex(starts, num_new, *sampled, rows, *counts, seq_lens, offsets, *of_tokens)

    def all_sampled(self, num: int, row: int) -> "StepIndex":
        """With as many samples as tokens, as captured steps do. Those behind the first `num` are written to `row`,
        nobody's, whose token is the last one where there are more tokens than samples."""
        lacking, names = len(self.ends) - len(self.sample_rows), ("sample_positions", "sample_rows", "logit_tokens")
        padded = {name: np.pad(getattr(self, name), (0, lacking), "edge") for name in names}
        padded["sample_rows"] = np.where(np.arange(len(self.ends)) < num, padded["sample_rows"], row)
        return self._replace(**padded)


class StepTensors(NamedTuple):
    """The numbers of a step on the device: int32 on a GPU, int64 on a CPU. As in `StepIndex`, behind the parameters."""

    sampling: SamplingColumns  # of n rows; first, since it has wide columns
    sample_rows: torch.Tensor
    logit_tokens: torch.Tensor
    rows: torch.Tensor
    next_draft_lens: torch.Tensor
    drafted: torch.Tensor
    follows: torch.Tensor
    seq_lens: torch.Tensor
    cu_q: torch.Tensor  # offsets
    token_rows: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One step, ready to run: the same numbers on the host, on the device, and as attention backends take them."""

    index: StepIndex
    tensors: StepTensors
    attention: AttentionStep
    logit_tokens: torch.Tensor | None  # [n]: which tokens sample; None: all of them


class RowTables:
    """What the host remembers of each running request, by row. Only the engine touches it."""

    def __init__(self, num_rows: int, max_seq_len: int, page_size: int, window: int = 0) -> None:
        """window: of layers whose windows slide, if they have pages of their own."""
        self.pages = np.zeros((num_rows, div_ceil(max_seq_len + 1, page_size)), dtype=np.int32)
        self.page_size, self.window = page_size, window
        self.window_pages = np.zeros_like(self.pages) if window else self.pages
        self._sampling = records(num_rows)  # positions: of no use here
        self.logit_rules, self.logprob_rules, self.pooled = LogitRules(num_rows), LogprobRules(), PooledRows()

    def apply(self, plan: StepPlan) -> None:
        """Write the plan's admissions and page updates."""
        self.logit_rules.apply(plan.admissions)
        self.logprob_rules.apply(plan.admissions)
        self.pooled.apply(plan.admissions)
        for admission in plan.admissions:
            self._sampling[admission.row] = record_of(admission.params, admission.prompt_len)
        for update in plan.page_updates:
            entries = slice(update.first_index, update.first_index + len(update.pages))
            self.pages[update.row, entries] = update.pages
            if self.window:
                self.window_pages[update.row, entries] = update.window_pages
        check_pages(plan, self.pages, self.window_pages)

    def sampling(self, index: StepIndex, masked: Sequence[int] = ()) -> Words:
        """The parameters of the tokens that sample: [n, NUM_WORDS]. masked: those for whose masks a device waits."""
        words = self._sampling.take(index.sample_rows, axis=0)
        records = words.view(RECORD)[:, 0]
        records["position"], records["mask"][list(masked)] = index.sample_positions, range(len(masked))
        return words


def resolved(plan: StepPlan, before: StepPlan, result: StepResult, accepted: list[int], has_states: bool) -> StepPlan:
    """The plan of a step that follows, with its starts and drafts, which were not known when it was made. before,
    result: of the step before; accepted: how many tokens of its drafts, by request; empty: its plan has the drafts."""
    guesses, ids = {draft.row: draft.ids for draft in before.drafts}, iter(result.token_ids)
    accepted = accepted or [num_right(guesses.get(x.row, ()), next(ids)) if x.num_samples else 0 for x in before.reqs]
    drafts, reqs = {draft.row: draft for draft in plan.drafts}, list[ScheduledReq]()
    for share in plan.reqs:
        if share.follows:
            row, i = share.row, share.follows - 1
            num = sum(accepted[i : i + 1])  # there is none if that step has failed
            share = share._replace(start=share.start + num, num_accepted=num * has_states, follows=0)
            if row in drafts:
                ids_of_engine = result.drafts.get(i) or [0] * share.num_samples
                drafts[row] = Draft(row, drafts[row].position + num, tuple(ids_of_engine[: share.num_samples - 1]))
        reqs.append(share)
    return plan._replace(reqs=tuple(reqs), drafts=tuple(drafts.values()))


def record_of(params: SamplingParams, prompt_len: int) -> Words:
    """[NUM_WORDS]: a request's record."""
    values = {name: getattr(params, name) for name in COLUMNS if name in SamplingParams.__slots__}
    min_len = min(prompt_len + params.min_tokens, MAX_COUNT)
    return records(1, **values, prompt_len=prompt_len, min_len=min_len)[0]


def check_pages(plan: StepPlan, *tables: npt.NDArray[np.int32]) -> None:
    """tables: of pages, and of those of windows. Raises: IntegrityError where a row's are not what the planner gave."""
    for row, _, *given in plan.expected:
        fits = [np.array_equal(table[row, : len(pages)], pages) for table, pages in zip(tables, given, strict=True)]
        require(all(fits), f"the page table of row {row} is not the planner's")
