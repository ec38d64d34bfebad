"""A plan becomes tensors: the engine's per-request tables, and the indices of one step."""

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
from minisgl.engine.rules import LogitRules, to_device
from minisgl.errors import require
from minisgl.kernel.sampling import RECORD, SamplingColumns, Words, record_of, records
from minisgl.kvcache.pool import KVPool
from minisgl.utils.math import div_ceil


@dataclass(frozen=True, slots=True)
class Batch:
    """One step, ready to run. Tokens of all requests lie one after the other, in plan order."""

    input_ids: torch.Tensor  # [num_tokens] int64
    positions: torch.Tensor  # [num_tokens] int64
    slots: torch.Tensor  # [num_tokens] int64: where their KV goes
    attention: AttentionStep
    logit_tokens: torch.Tensor | None  # [n] int64: which tokens sample; None: all of them
    sampling: SamplingColumns  # of those
    sampled_at: tuple[IntArray, IntArray]  # row and column of the token buffer where the sampled ids go


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

    def sampling(self, rows: IntArray, positions: IntArray) -> Words:
        """The parameters of these rows, for tokens at these positions: [n, NUM_WORDS]."""
        words = self._sampling.take(rows, axis=0)
        words.view(RECORD)["position"][:, 0] = positions
        return words


class ReqColumns(NamedTuple):
    """The shares of a step, a column for each field of `ScheduledReq`: [n]."""

    row: IntArray
    start: IntArray
    num_new: IntArray
    num_samples: IntArray


def columns(reqs: Sequence[ScheduledReq]) -> ReqColumns:
    num_fields = len(ReqColumns._fields)
    table = np.fromiter(chain.from_iterable(reqs), np.int64, num_fields * len(reqs))
    return ReqColumns(*table.reshape(-1, num_fields).T)


def by_request(ids: torch.Tensor) -> list[tuple[int, ...]]:
    """ids: [n], one for each request that samples → as a `StepResult` has them."""
    return list(zip(ids.tolist()))


def copy_pages(plan: StepPlan, kv: KVPool, page_size: int, device: torch.device) -> None:
    """Make the plan's copies, in the order of the device's work."""
    if plan.copies:
        sources = to_device(np.array([copy.source for copy in plan.copies]), device)
        kv.copy_pages(sources, to_device(np.array([copy.target for copy in plan.copies]), device), page_size)


def check_pages(plan: StepPlan, table: npt.NDArray[np.int32]) -> None:
    """Raises: IntegrityError where a row's pages are not those that the planner gave it."""
    for row, _, pages in plan.expected:
        require(np.array_equal(table[row, : len(pages)], pages), f"the page table of row {row} is not the planner's")


class Tables(RowTables):
    """With the token ids too, where the host computes."""

    def __init__(self, num_rows: int, max_seq_len: int, page_size: int) -> None:
        super().__init__(num_rows, max_seq_len, page_size)
        self.token_ids = np.zeros((num_rows, max_seq_len + 1), dtype=np.int32)

    def apply(self, plan: StepPlan) -> None:
        super().apply(plan)
        for row, ids, *_ in plan.admissions:
            self.token_ids[row, : len(ids)] = ids

    def build(self, plan: StepPlan) -> Batch:
        """The step's indices and ids. plan.reqs is not empty."""
        rows, starts, num_new, num_samples = columns(plan.reqs)
        offsets = np.concatenate(([0], np.cumsum(num_new)))
        token_rows = np.repeat(rows, num_new)
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], num_new)
        attention = AttentionStep(rows, starts, num_new, offsets, self.pages, self.page_size, plan.num_decode)
        sampling = num_samples > 0
        logit_tokens = None if plan.is_decode_only else torch.from_numpy(offsets[1:][sampling] - 1)
        sample_rows, sampled = rows[sampling], (starts + num_new)[sampling]
        return Batch(
            input_ids=torch.from_numpy(self.token_ids[token_rows, positions].astype(np.int64)),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(attention.slots_of(token_rows, positions)),
            attention=attention,
            logit_tokens=logit_tokens,
            sampling=SamplingColumns(torch.from_numpy(self.sampling(sample_rows, sampled))),
            sampled_at=(sample_rows, sampled),
        )

    def store_sampled(self, at: tuple[IntArray, IntArray], ids: torch.Tensor) -> None:
        """Sampled ids become input of later steps; a failed row (-1) gets some valid id, which nobody will see."""
        self.token_ids[at] = np.maximum(ids.numpy(), 0)
