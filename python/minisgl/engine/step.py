"""One step, from a plan to sampled ids: what all devices share."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, Protocol

import torch

from minisgl.attention.base import AttentionStep, IntArray, StepContext, Tensor
from minisgl.attention.create import Backend
from minisgl.core import Masks, StepPlan, StepResult
from minisgl.engine.logprobs import DeviceLogprobs, gather_logprobs
from minisgl.engine.pooling import Computed, pooled_bytes
from minisgl.engine.rules import StepRules
from minisgl.engine.shard import ModelShard
from minisgl.engine.tables import Batch, RowTables, StepIndex, StepTensors, resolved
from minisgl.kernel.ops import PagedSequences, RopeAngles, Tensors
from minisgl.kernel.sampling import SamplingColumns, TokenStore
from minisgl.kernel.state import StateSequences
from minisgl.kvcache.pool import KVPool

logger = logging.getLogger(__name__)
Sequences = tuple[IntArray, IntArray, IntArray, IntArray]  # rows, starts, num_new and offsets of `AttentionStep`
# Ids, slots and angles of a step's tokens. Slots are those of `StepContext`.
Inputs = Callable[[Batch], tuple[Tensor, Tensors, Sequence[RopeAngles]]]


class Launched(NamedTuple):
    """A step's results: m requests, n samples. Their values are there when the device has computed the step."""

    ids: Tensor  # [n] int32
    logprobs: DeviceLogprobs | None = None
    prompt_logprobs: DeviceLogprobs | None = None
    pooled: Mapping[int, Tensor] = {}
    drafts: Tensor | None = None  # [m, longest] int32 or int64: of all m requests, `next_draft_len` of each are of use
    plan: StepPlan = StepPlan(-1, (), (), ())  # as it was computed
    accepted: Tensor | None = None  # [m] int32: tokens of its drafts, where the device alone knows what these were

    def result(self, plan: StepPlan) -> StepResult:
        """Of tensors that the host can read. Without drafts, each request that samples has one token."""
        logprobs, prompts = ({} if told is None else told.result() for told in (self.logprobs, self.prompt_logprobs))
        left, counts = iter(self.ids.tolist()), (share.num_samples for share in plan.reqs if share.num_samples)
        token_ids: list[tuple[int, ...]] = [tuple(islice(left, num)) for num in counts] if plan.drafts else [*zip(left)]
        told = () if self.drafts is None else enumerate(self.drafts.tolist())
        drafts = {i: ids[:num] for i, ids in told if (num := plan.reqs[i].next_draft_len)}
        return StepResult(plan.step_id, token_ids, logprobs, prompts, pooled_bytes(self.pooled), drafts)


class Tables(Protocol):
    """What the device remembers of running requests, by row."""

    host: RowTables
    places: Tensor | None  # of `TokenStore`; None: rules and masks are the host's affair
    token_ids: Tensor  # [num_rows, tokens] int32
    page_table: Tensor  # [num_rows, max_pages] int32
    window_table: Tensor  # the same, for layers whose windows slide
    padding_row: int  # of nobody's requests, with a page of its own
    fresh: Tensor  # of `PagedSequences`

    def send(self, plan: StepPlan, index: StepIndex, masks: Masks | None = None) -> None:
        """Send a step's numbers, ask for masks if there are `places`, and write prompts, pages and drafts of rows."""

    def tensors(self, index: StepIndex) -> StepTensors:
        """Where a step's numbers lie once they were sent."""


class LayerByLayer:
    """The model's own modules, one after the other."""

    def __init__(self, shard: ModelShard, kv: KVPool, backend: Backend, inputs: Inputs) -> None:
        self._model, self._kv, self._backend, self._inputs = shard.model, kv, backend, inputs

    def __call__(self, batch: Batch, metadata: Sequence[object] | None = None) -> Computed:
        """metadata: what the backend has prepared for the step; None: it is to do so now."""
        context = self.context(batch, metadata)
        hidden = self._model.hidden(context.input_ids, context)
        return Computed(
            lambda tokens: self._model.logits(hidden, batch.logit_tokens if tokens is None else tokens),
            lambda tokens: hidden if tokens is None else hidden.index_select(0, tokens),
            context.input_ids,
            context,
        )

    def of(self, shard: ModelShard, *num_pages: int) -> "LayerByLayer":
        """Another model, which has a cache of the same pages. On a GPU attention is made for one shape."""
        backend = self._backend if shard.device.type == "cpu" else shard.create_attention()
        return LayerByLayer(shard, shard.create_kv(*num_pages), backend, self._inputs)

    def context(self, batch: Batch, metadata: Sequence[object] | None = None, captured: bool = False) -> StepContext:
        """For the model's layers, and for those that are computed beside them. captured: where the backend has prepared
        nothing, it does so as for a captured step."""
        drafts = batch.tensors.drafted.view(2, -1) if batch.index.drafted.any() else ()
        seqs = StateSequences(batch.tensors.rows, batch.tensors.cu_q, *drafts)
        metadata = metadata or self._backend.prepare_both(batch.attention, captured)
        ids, slots, ropes = self._inputs(batch)
        return StepContext(ids, slots, batch.tensors.positions, ropes, self._kv, self._backend, metadata, seqs)


class StepRunner:
    """Launches steps, in order. forward: computes the layers of one; propose: drafts what follows its ids, if any."""

    def __init__(self, shard: ModelShard, kv: KVPool, tables: Tables, forward: Callable[[Batch], Computed]) -> None:
        self.shard, self.kv, self.tables, self.forward = shard, kv, tables, forward
        self.propose: Callable[[Batch, Computed, Tensor, int], Tensor | None] | None = None
        self._before = Launched(tables.token_ids[0, :0])

    def launch(self, plan: StepPlan, masks: Masks | None = None) -> Launched:
        """Launch a step → its results, on their way to the host, from a GPU to pinned memory."""
        self.tables.host.apply(plan)
        self.kv.states.copy(plan.states)
        nothing = Launched(self.tables.token_ids[0, :0])
        before, self._before = self._before, nothing  # also after a failure
        launched = self._launch(plan, masks, before) if plan.reqs else nothing
        drafts = None if launched.drafts is None else launched.drafts.to("cpu", non_blocking=True)
        self._before = launched._replace(ids=launched.ids.to("cpu", non_blocking=True), drafts=drafts)
        return self._before

    def _resolved(self, plan: StepPlan, before: Launched) -> StepPlan:
        """The plan with starts and drafts that only the step before knows: if there are such, it waits for that."""
        if not any(share.follows for share in plan.reqs):
            return plan
        self.tables.token_ids[0, 0].item()  # what is on its way from a device is there then
        accepted = [] if before.accepted is None else before.accepted.tolist()
        return resolved(plan, before.plan, before.result(before.plan), accepted, bool(self.shard.config.model.states))

    def _launch(self, plan: StepPlan, masks: Masks | None, before: Launched) -> Launched:
        """Launch a step that computes something, op by op."""
        index = StepIndex.of((plan := self._resolved(plan, before)).reqs)
        self.tables.send(plan, index, masks)
        batch = self.batch(index, plan.num_decode)
        computed, prompts = self.forward(batch), None
        wanted = self.tables.host.logprob_rules.prompt(plan.reqs, index.offsets)
        if wanted is not None:  # every rank takes part: each has a share of the logits
            prompts = gather_logprobs(wanted, computed.logits, None, self.shard.ops, self.shard.device)
        pooled = self.tables.host.pooled.take(plan.reqs, index.offsets, computed, self.shard)
        logits, launched = computed.logits(None), Launched(self.tables.token_ids[0, :0])
        if len(logits):
            launched = self._finish(plan, masks, index, None, lambda: (logits, batch.tensors))
        drafts = self._drafts(batch, computed, launched.ids)
        return launched._replace(prompt_logprobs=prompts, pooled=pooled, drafts=drafts, plan=plan)

    def _drafts(self, batch: Batch, computed: Computed, ids: Tensor) -> Tensor | None:
        try:
            return self.propose and self.propose(batch, computed, ids, int(batch.index.next_draft_lens.max()))
        except Exception:
            if self.shard.comm.size > 1:  # other ranks may be in a collective
                raise
            logger.exception("there are no more drafts: their drafter has failed")
            self.propose = None
            return None

    def batch(self, index: StepIndex, num_decode: int) -> Batch:
        """Of a step whose numbers were sent."""
        tensors, sequences = self.tables.tensors(index), (index.rows, index.starts, index.num_new, index.offsets)
        attention = self.attention(sequences, (tensors.rows, tensors.seq_lens, tensors.cu_q), num_decode)
        return Batch(index, tensors, attention, None if attention.is_decode else tensors.logit_tokens)

    def attention(self, sequences: Sequences, on_gpu: tuple[Tensor, Tensor, Tensor], num_decode: int) -> AttentionStep:
        """on_gpu: rows, seq_lens and cu_q of `PagedSequences`."""
        host, tables = self.tables.host, self.tables
        device = PagedSequences(tables.page_table, *on_gpu, host.page_size, tables.fresh)
        step = AttentionStep(*sequences, host.pages, host.page_size, num_decode, device)
        if not host.window:
            return step
        device = replace(device, page_table=self.tables.window_table)
        windowed = replace(step, page_table=host.window_pages, device=device, window=host.window)
        return replace(step, window=0, windowed=windowed)

    def _sample(
        self, logits: Tensor, tensors: StepTensors, rules: StepRules | None = None, ids: Tensor | None = None
    ) -> Tensor:
        """[n] int32, written to the token table too. ids: what a captured step has sampled without the rules. Rank 0
        decides, so that rounding cannot make ranks differ; the others do not look at `logits`."""
        ops, comm, is_captured = self.shard.ops, self.shard.comm, ids is not None
        columns, rows = tensors.sampling, tensors.sample_rows
        if ids is None:
            ids = torch.empty(len(rows), dtype=torch.int32, device=self.shard.device)
        else:  # it may have had more rows, of nobody
            columns, rows = SamplingColumns(columns.words[: len(ids)]), rows[: len(ids)]
        store = TokenStore(self.tables.token_ids, rows, self.tables.places)
        if comm.rank == 0 and rules is None:
            ops.sample(logits, columns, ids, store)
        elif comm.rank == 0 and rules is not None:
            self.tables.host.logit_rules.sample(ops, logits, columns, ids, store, rules, is_captured)
        if comm.size > 1:
            ids = comm.broadcast(ids)
            ops.store_ids(*store[:2], columns["position"], ids)
        return ids

    def _finish(
        self, plan: StepPlan, masks: Masks | None, index: StepIndex, ids: Tensor | None,
        source: Callable[[], tuple[Tensor, StepTensors]],
    ) -> Launched:  # fmt: skip
        """Sample, and gather log-probabilities. ids: what a captured step has sampled for the plan, whose rows come
        first in `index`; source: logits, and the step's numbers, asked for only where that is not all."""
        num = len(index.sample_rows) if ids is None else len(ids)
        rows, host = index.sample_rows[:num], self.tables.host
        asks = self.tables.places is None  # else what there is to do is done where tokens are sampled
        rules = host.logit_rules.step(rows, index.sample_positions[:num], plan.masked, masks) if asks else None
        if ids is None or rules is not None:
            ids = self._sample(*source(), rules, ids)
        wanted = host.logprob_rules.sampled(rows)
        if wanted is None or self.shard.comm.rank > 0:
            return Launched(ids)
        before = source()[0]
        return Launched(ids, gather_logprobs(wanted, lambda _: before, ids, self.shard.ops, self.shard.device))
