"""One step, from a plan to sampled ids: what all devices share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import torch

from minisgl.attention.base import AttentionStep, StepContext, to_device
from minisgl.attention.create import Backend
from minisgl.core import NOT_READY, Masks, StepPlan, StepResult
from minisgl.engine.logprobs import DeviceLogprobs, gather_logprobs
from minisgl.engine.pooling import Computed, pooled_bytes
from minisgl.engine.rules import LogitStep, apply_rules
from minisgl.engine.shard import ModelShard
from minisgl.engine.tables import Batch, RowTables, StepIndex, StepTensors
from minisgl.kernel.ops import PagedSequences, RopeAngles
from minisgl.kernel.sampling import SamplingColumns, TokenStore
from minisgl.kernel.state import StateSequences
from minisgl.kvcache.pool import KVPool

Tensor = torch.Tensor

logger = logging.getLogger(__name__)

# Ids, slots and angles of a step's tokens.
Inputs = Callable[[Batch], tuple[Tensor, Tensor, Sequence[RopeAngles]]]


class Launched(NamedTuple):
    """A step's results, which are there when the device has computed it."""

    ids: Tensor  # [n] int32
    logprobs: DeviceLogprobs | None = None
    prompt_logprobs: DeviceLogprobs | None = None
    pooled: Mapping[int, Tensor] = {}
    drafts: Mapping[int, list[int]] = {}

    def result(self, plan: StepPlan) -> StepResult:
        """Of tensors that the host can read."""
        logprobs = None if self.logprobs is None else self.logprobs.result()
        prompts = None if self.prompt_logprobs is None else self.prompt_logprobs.result()
        token_ids: list[tuple[int, ...]] = list(zip(ids := self.ids.tolist()))
        if plan.drafts:  # else, each request samples one
            left, counts = iter(ids), [share.num_samples for share in plan.reqs if share.num_samples]
            token_ids = [tuple(islice(left, count)) for count in counts]
        return StepResult(plan.step_id, token_ids, logprobs, prompts, pooled_bytes(self.pooled), self.drafts)


class Tables(Protocol):
    """What the device remembers of running requests, by row."""

    host: RowTables
    token_ids: Tensor  # [num_rows, tokens] int32
    page_table: Tensor  # [num_rows, max_pages] int32

    def send(self, plan: StepPlan, index: StepIndex) -> None:
        """Send a step's numbers, and write the prompts, pages and drafts that rows gain in it."""

    def write_drafts(self, plan: StepPlan) -> None:
        """Write the drafts, again: what was sampled in their places is not what comes before the later ones."""

    def tensors(self, index: StepIndex) -> StepTensors:
        """Where a step's numbers lie once they were sent."""


class LayerByLayer:
    """The model's own modules, one after the other."""

    def __init__(self, shard: ModelShard, kv: KVPool, backend: Backend, inputs: Inputs) -> None:
        self._model, self._kv, self._backend, self._inputs = shard.model, kv, backend, inputs

    def __call__(self, batch: Batch) -> Computed:
        return self.run(batch, self._backend.prepare(batch.attention, captured=False))

    def run(self, batch: Batch, metadata: object) -> Computed:
        input_ids, slots, ropes = self._inputs(batch)
        hidden = self._model.hidden(input_ids, self._context(batch, metadata, slots, ropes))
        return Computed(
            lambda tokens: self._model.logits(hidden, batch.logit_tokens if tokens is None else tokens),
            lambda tokens: hidden.index_select(0, tokens),
        )

    def context(self, batch: Batch) -> StepContext:
        """For layers that are computed beside the model's."""
        _, slots, ropes = self._inputs(batch)
        return self._context(batch, self._backend.prepare(batch.attention, captured=False), slots, ropes)

    def _context(self, batch: Batch, metadata: object, slots: Tensor, ropes: Sequence[RopeAngles]) -> StepContext:
        seqs = StateSequences(batch.tensors.rows, batch.tensors.cu_q)
        return StepContext(slots, batch.tensors.positions, ropes, self._kv, self._backend, metadata, seqs)


class Drafter(Protocol):
    """Says what may come next."""

    def propose(self, plan: StepPlan, batch: Batch, computed: Computed, ids: Tensor) -> Mapping[int, list[int]]:
        """`StepResult.drafts` of a step that has sampled `ids`, before the next one is launched."""


class StepRunner:
    """Launches steps, in order. forward: computes the layers of one."""

    def __init__(self, shard: ModelShard, kv: KVPool, tables: Tables, forward: Callable[[Batch], Computed]) -> None:
        self.shard, self.kv, self.tables, self.forward = shard, kv, tables, forward
        self.drafter: Drafter | None = None

    def launch(self, plan: StepPlan, masks: Masks | None = None) -> Launched:
        self.tables.host.apply(plan)
        self.kv.states.copy(plan.states)
        return self._launch(plan, masks) if plan.reqs else Launched(self.tables.token_ids[0, :0])

    def _launch(self, plan: StepPlan, masks: Masks | None) -> Launched:
        """Launch a step that computes something, op by op."""
        index = StepIndex.of(plan.reqs)
        self.tables.send(plan, index)
        batch = self.batch(index, plan.num_decode)
        computed, prompts = self.forward(batch), None
        wanted = self.tables.host.logprob_rules.prompt(plan.reqs, index.offsets)
        if wanted is not None:  # every rank takes part: each has a share of the logits
            prompts = gather_logprobs(wanted, computed.logits, None, self.shard.device)
        pooled = self.tables.host.pooled.take(plan.reqs, index.offsets, computed, self.shard)
        logits = computed.logits(None)
        if not len(logits):
            ids = self.tables.token_ids[0, :0]
            return Launched(ids, None, prompts, pooled, self._drafts(plan, batch, computed, ids))
        ids = self._sample(logits, batch.tensors.sampling, batch.tensors.sample_rows)
        launched = self._finish(plan, masks, index, ids, lambda: logits)
        drafts = self._drafts(plan, batch, computed, launched.ids)
        return launched._replace(prompt_logprobs=prompts, pooled=pooled, drafts=drafts)

    def _drafts(self, plan: StepPlan, batch: Batch, computed: Computed, ids: Tensor) -> Mapping[int, list[int]]:
        try:
            return {} if self.drafter is None else self.drafter.propose(plan, batch, computed, ids)
        except Exception:
            logger.exception("there are no more drafts: their drafter has failed")
            self.drafter = None
            return {}

    def batch(self, index: StepIndex, num_decode: int) -> Batch:
        """Of a step whose numbers were sent."""
        tensors, host = self.tables.tensors(index), self.tables.host
        device = PagedSequences(self.tables.page_table, tensors.rows, tensors.seq_lens, tensors.cu_q, host.page_size)
        sequences = index.rows, index.starts, index.num_new, index.offsets
        attention = AttentionStep(*sequences, host.pages, host.page_size, num_decode, device)
        return Batch(index, tensors, attention, None if attention.is_decode else tensors.logit_tokens)

    def _sample(self, logits: Tensor, columns: SamplingColumns, rows: Tensor, absent: Tensor | None = None) -> Tensor:
        """[n] int32, written to the token table too. absent: which of the n are `NOT_READY`. Rank 0 decides, so that
        rounding cannot make ranks differ; the others do not look at `logits`."""
        ops, comm, token_ids = self.shard.ops, self.shard.comm, self.tables.token_ids
        ids = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
        if comm.rank == 0:
            ops.sample(logits, columns, ids, TokenStore(token_ids, rows) if comm.size == 1 else None)
            if absent is not None:
                ids[absent] = NOT_READY
        if comm.size > 1:
            ids = comm.broadcast(ids)
            ops.store_ids(token_ids, rows, columns["position"], ids)
        return ids

    def _finish(
        self, plan: StepPlan, masks: Masks | None, index: StepIndex, ids: Tensor, logits: Callable[[], Tensor]
    ) -> Launched:
        """Sample again the rows whose logits are to be changed, and gather log-probabilities. ids: those of the plan,
        which come first in `index`; logits: what they were sampled from, asked for only then."""
        rows, positions = index.sample_rows[: len(ids)], index.sample_positions[: len(ids)]
        steps = self.tables.host.logit_rules.steps(rows, positions, plan.masked, masks)
        wanted = self.tables.host.logprob_rules.sampled(rows)
        if not steps and wanted is None:
            return Launched(ids)
        before, tensors = logits(), self.tables.tensors(index)
        if steps and plan.drafts:
            self.tables.write_drafts(plan)
        for step in steps:
            self._sample_again(before, step, tensors, ids)
        if steps and plan.drafts:
            self.shard.ops.store_ids(self.tables.token_ids, tensors.sample_rows, tensors.sampling["position"], ids)
        if wanted is None or self.shard.comm.rank > 0:
            return Launched(ids)
        chosen = ids.index_select(0, to_device(wanted.index, ids.device))
        return Launched(ids, gather_logprobs(wanted, lambda at: before.index_select(0, at), chosen, ids.device))

    def _sample_again(self, logits: Tensor, step: LogitStep, tensors: StepTensors, ids: Tensor) -> None:
        """Sample some rows from changed logits, in place of what the step has sampled for them: so a captured step
        stays whole, and those that need nothing pay nothing."""
        index = to_device(step.samples, ids.device)
        columns, rows = tensors.sampling.select(index), tensors.sample_rows.index_select(0, index)
        absent = to_device(step.absent, ids.device) if len(step.absent) else None
        if self.shard.comm.rank == 0:
            logits = apply_rules(logits, step, self.tables.token_ids)
        ids.index_copy_(0, index, self._sample(logits, columns, rows, absent))
