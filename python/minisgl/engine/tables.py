"""What the host remembers of running requests, by row, and the indices of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minisgl.attention.base import AttentionStep, IntArray
from minisgl.core import ScheduledReq, StepPlan
from minisgl.engine.logprobs import LogprobRules
from minisgl.engine.rules import LogitRules
from minisgl.errors import require
from minisgl.kernel.ops import PagedSequences
from minisgl.kernel.sampling import RECORD, SamplingColumns, Words, record_of, records
from minisgl.utils.math import div_ceil


class StepIndex(NamedTuple):
    """Which tokens a step computes: m requests in plan order, their t tokens one after the other, n of which sample."""

    rows: IntArray  # [m] of the tables
    starts: IntArray  # [m]: the first token's position
    num_new: IntArray  # [m]
    offsets: IntArray  # [m + 1]: request i has tokens [offsets[i], offsets[i + 1])
    token_rows: IntArray  # [t]
    positions: IntArray  # [t]
    logit_tokens: IntArray  # [n]: which of the t
    sample_rows: IntArray  # [n]
    sample_positions: IntArray  # [n] of the tokens to be sampled

    @property
    def counts(self) -> tuple[int, int, int]:
        """n, m and t."""
        return len(self.sample_rows), len(self.rows), len(self.positions)

    @staticmethod
    def of(reqs: Sequence[ScheduledReq]) -> StepIndex:
        """reqs: not empty."""
        num_fields = len(ScheduledReq._fields)
        table = np.fromiter(chain.from_iterable(reqs), np.int64, num_fields * len(reqs))
        req = dict(zip(ScheduledReq._fields, table.reshape(-1, num_fields).T, strict=True))
        rows, starts, num_new = req["row"], req["start"], req["num_new"]
        offsets = np.zeros(len(reqs) + 1, np.int64)
        ends = num_new.cumsum(out=offsets[1:])
        token_rows, tokens = rows.repeat(num_new), np.arange(ends[-1])
        positions = tokens + (starts - offsets[:-1]).repeat(num_new)
        logit_tokens = np.flatnonzero(tokens >= (ends - req["num_samples"]).repeat(num_new))
        sample_rows, sample_positions = token_rows[logit_tokens], positions[logit_tokens] + 1
        return StepIndex(
            rows, starts, num_new, offsets, token_rows, positions, logit_tokens, sample_rows, sample_positions
        )


class RowTables:
    """What the host remembers of each running request, by row. Only the engine touches it."""

    def __init__(self, num_rows: int, max_seq_len: int, page_size: int) -> None:
        self.pages = np.zeros((num_rows, div_ceil(max_seq_len + 1, page_size)), dtype=np.int32)
        self.page_size = page_size
        self._sampling = records(num_rows)  # positions: of no use here
        self.logit_rules = LogitRules()
        self.logprob_rules = LogprobRules()

    def apply(self, plan: StepPlan) -> None:
        """Write the plan's admissions and page updates."""
        self.logit_rules.apply(plan.admissions)
        self.logprob_rules.apply(plan.admissions)
        for admission in plan.admissions:
            self._sampling[admission.row] = record_of(admission.params)
        for update in plan.page_updates:
            self.pages[update.row, update.first_index : update.first_index + len(update.pages)] = update.pages
        check_pages(plan, self.pages)

    def sampling(self, index: StepIndex) -> Words:
        """The parameters of the tokens that sample: [n, NUM_WORDS]."""
        words = self._sampling.take(index.sample_rows, axis=0)
        words.view(RECORD)["position"][:, 0] = index.sample_positions
        return words

    def attention(self, index: StepIndex, num_decode: int, device: PagedSequences | None = None) -> AttentionStep:
        rows, starts, num_new, offsets = index.rows, index.starts, index.num_new, index.offsets
        return AttentionStep(rows, starts, num_new, offsets, self.pages, self.page_size, num_decode, device)


def check_pages(plan: StepPlan, table: npt.NDArray[np.int32]) -> None:
    """Raises: IntegrityError where a row's pages are not those that the planner gave it."""
    for row, _, pages in plan.expected:
        require(np.array_equal(table[row, : len(pages)], pages), f"the page table of row {row} is not the planner's")


@dataclass(frozen=True, slots=True)
class Batch:
    """One step as a CPU computes it: t tokens, n of which sample."""

    index: StepIndex
    attention: AttentionStep
    input_ids: torch.Tensor  # [t] int64
    positions: torch.Tensor  # [t] int64
    slots: torch.Tensor  # [t] int64: where their KV goes
    logit_tokens: torch.Tensor | None  # [n] int64: which of the t sample; None: all of them
    sampling: SamplingColumns  # of the n


class TokenTables(RowTables):
    """With the token ids too, where the host computes."""

    def __init__(self, num_rows: int, max_seq_len: int, page_size: int) -> None:
        super().__init__(num_rows, max_seq_len, page_size)
        self.token_ids = np.zeros((num_rows, max_seq_len + 1), dtype=np.int32)

    def apply(self, plan: StepPlan) -> None:
        super().apply(plan)
        for admission in plan.admissions:
            self.token_ids[admission.row, : len(admission.token_ids)] = admission.token_ids

    def build(self, plan: StepPlan) -> Batch:
        """The step's indices and ids. plan.reqs is not empty."""
        index = StepIndex.of(plan.reqs)
        attention = self.attention(index, plan.num_decode)
        return Batch(
            index,
            attention,
            input_ids=torch.from_numpy(self.token_ids[index.token_rows, index.positions].astype(np.int64)),
            positions=torch.from_numpy(index.positions),
            slots=torch.from_numpy(attention.slots_of(index.token_rows, index.positions)),
            logit_tokens=None if plan.is_decode_only else torch.from_numpy(index.logit_tokens),
            sampling=SamplingColumns(torch.from_numpy(self.sampling(index))),
        )

    def store_sampled(self, index: StepIndex, ids: torch.Tensor) -> None:
        """Sampled ids become input of later steps; a failed row (-1) gets some valid id, which nobody will see."""
        self.token_ids[index.sample_rows, index.sample_positions] = np.maximum(ids.numpy(), 0)
