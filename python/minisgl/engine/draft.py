"""Drafts that the device makes: by the model's own head for multi-token prediction, or by a second model."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from minisgl.attention.base import IntArray, StepContext
from minisgl.attention.cpu import CpuBackend
from minisgl.core import StepPlan
from minisgl.engine.pooling import Computed
from minisgl.engine.shard import ModelShard
from minisgl.engine.step import LayerByLayer, StepRunner, Told
from minisgl.engine.tables import Batch, StepTensors
from minisgl.kernel.cpu import CpuOps
from minisgl.layers.rope import AngleTables
from minisgl.models.heads import MTPHead

Tensor = torch.Tensor


class SecondModel:
    """A model in the place of a head: it reads tokens, the last one included, and nothing of what the model makes."""

    reads = ""

    def __init__(self, shard: ModelShard) -> None:
        self._shard, self._kv = shard, shard.create_kv(shard.config.num_pages + 1, shard.config.num_window_pages + 1)

    def forward(self, tokens: Tensor, hidden: Tensor, step: StepContext) -> Tensor:  # noqa: ARG002
        """tokens: [num_tokens] int64, at the step's positions → for `choose`."""
        ropes = [rope(step.positions) for rope in self._shard.ropes]
        return self._shard.model.hidden(tokens, replace(step, input_ids=tokens, kv=self._kv, ropes=ropes))

    def choose(self, x: Tensor) -> Tensor:
        """x: rows of `forward`'s result → the most probable tokens after these, [n] int32."""
        return self._shard.comm.broadcast(self._shard.model.logits(x, None).argmax(-1).int())

    def hidden(self, x: Tensor) -> Tensor:
        return x


class HeadDrafter:
    """Says what may come after the last token that will be kept of each request. All of it can be captured."""

    def __init__(
        self, head: MTPHead | SecondModel, steps: StepRunner, layers: LayerByLayer, known: Callable[[Tensor], IntArray]
    ) -> None:
        """layers: with the cache, the tables and the operations that the steps have. known: numbers of a step as far as
        attention reads the host's; what can be captured reads the device's."""
        self._head, self._steps, self._layers, self._known = head, steps, layers, known

    def propose(self, plan: StepPlan, batch: Batch, computed: Computed, ids: Tensor) -> Told:
        """Of a step that is not captured."""
        most = max(share.num_drafts for share in plan.reqs)
        return {} if (told := self.tell(batch, self._layers.context(batch), computed, ids, most)) is None else told

    def tell(self, batch: Batch, context: StepContext, computed: Computed, ids: Tensor, most: int) -> Tensor | None:
        """computed: of the step, which has sampled `ids`. → [requests, most] int32; the first `num_drafts` of a request
        are of use. most: 0: there are none: the head only reads the step's tokens, so that its cache is as long as the
        model's. What it has of tokens that are not kept, it overwrites as the model does."""
        tensors, token_ids, reads = batch.tensors, self._steps.tables.token_ids, self._head.reads
        following = token_ids[tensors.token_rows.long(), tensors.positions.long() + 1].long()
        everything = torch.arange(len(following), device=ids.device)
        hidden = self._steps.shard.model.normed(computed.hidden(everything)) if reads == "hidden" else everything
        if reads == "aux" and computed.aux is not None:
            hidden = computed.aux()
        x = self._head.forward(following if reads else context.input_ids, hidden, context)
        if not most:
            return None
        assert computed.input_ids is not None
        last, told = last_kept(tensors, computed.input_ids, ids), list[Tensor]()
        x, position, token = x[last], tensors.positions[last], following[last]
        for num_told in range(most):
            if num_told or not reads:
                one = self._one_each(batch, position + num_told + (not reads), num_told)
                context = self._layers.context(one, context.backend.prepare_both(one.attention, captured=True))
                x = self._head.forward(token, self._head.hidden(x), context)
            told.append(self._head.choose(x))
            token = told[-1].long()
        return torch.stack(told, 1)

    def _one_each(self, batch: Batch, position: Tensor, num_told: int) -> Batch:
        """A token of each request, at its position; of those that want no further one it is nobody's."""
        tables, tensors = self._steps.tables, batch.tensors
        num, goes_on = len(tensors.rows), tensors.num_drafts > num_told
        rows = tensors.rows.where(goes_on, tables.padding_row)
        position = position.where(goes_on, 0).clamp(max=tables.token_ids.shape[1] - 3)
        seq_lens, cu_q = position + 1, torch.arange(num + 1, dtype=rows.dtype, device=rows.device)
        sequences = self._known(rows), self._known(position), np.ones(num, np.int64), np.arange(num + 1)
        attention = self._steps.attention(sequences, (rows, seq_lens, cu_q), num)
        tensors = tensors._replace(rows=rows, seq_lens=seq_lens, cu_q=cu_q, token_rows=rows, positions=position)
        return replace(batch, tensors=tensors, attention=attention, logit_tokens=None)


class WholeDrafter:
    """The same in one call of the CPU's kernels, beside a model that they compute in one call."""

    def __init__(self, head: MTPHead, steps: StepRunner, ops: CpuOps, model: int) -> None:
        """model: of the kernels; head: one that has a `cpu_spec`."""
        shard, spec, self._module = steps.shard, head.cpu_spec(), ops.module
        assert spec is not None, "the head's layer is one that the kernels cannot compute"
        (embedding, lm_head, both), norms = (handle for handle, _ in spec.matrices), spec.norms
        self._steps, self._backend, self._keep = steps, CpuBackend(ops), (head, ops)
        numbers = shard.config.model.rms_norm_eps, 1.0, embedding, lm_head, norms[2]
        own: int = self._module.create_model(ops.workers, *numbers)
        self._angles = AngleTables(shard.ropes, partial(self._module.set_rotation, own))
        spec.build(self._module, own, shard.config.model.num_layers, steps.kv)
        self._handle: int = self._module.create_draft_head(ops.workers, model, own, both, *norms[:2])
        for destroy, handle in ((self._module.destroy_model, own), (self._module.destroy_draft_head, self._handle)):
            weakref.finalize(self, destroy, handle)  # the last one made is called first

    def propose(self, plan: StepPlan, batch: Batch, computed: Computed, ids: Tensor) -> Told:
        most = int(batch.index.num_drafts.max())
        self._angles.reach(int(batch.index.seq_lens.max()) + most)
        told, step = torch.empty((len(plan.reqs), most), dtype=torch.int32), self._backend.prepare(batch.attention)
        sampled = computed.input_ids, batch.tensors.logit_tokens, ids, batch.tensors.num_drafts
        self._module.draft(self._handle, self._steps.tables.token_ids, *step, *sampled, told)
        return told


def add_drafter(steps: StepRunner, layers: LayerByLayer, ops: CpuOps | None, model: int) -> None:
    """To a CPU's steps, if there is one. model: of the kernels, which compute it in one call; 0: they do not."""
    shard, config = steps.shard, steps.shard.config
    head: MTPHead | SecondModel | None = shard.head
    if isinstance(head, MTPHead) and ops is not None and model and head.cpu_spec() is not None:
        steps.propose = WholeDrafter(head, steps, ops, model).propose
        return
    if config.model.second is not None and head is None:
        config = replace(config, model_path=config.model.second[0], model=config.model.second[1])
        head = SecondModel(ModelShard(config, shard.device, shard.comm, shard.ops))
    if head is not None:
        steps.propose = HeadDrafter(head, steps, layers, lambda numbers: numbers.numpy()).propose


def last_kept(tensors: StepTensors, input_ids: Tensor, ids: Tensor) -> Tensor:
    """[requests] int64: the token of the step from which the last token is sampled that is kept of each request: those
    are kept whose draft was right so far. input_ids: of the step's tokens, drafts included; ids: what was sampled."""
    tokens, num = tensors.logit_tokens.long(), len(ids)
    samples = torch.searchsorted(tokens, tensors.cu_q.long())  # [requests + 1]: how many are before each request's
    is_last = tokens.new_zeros(num + 1, dtype=torch.bool).index_fill_(0, samples[1:], True)[1:]
    is_wrong = is_last | (ids != input_ids[(tokens + 1).clamp(max=len(input_ids) - 1)])
    number = torch.arange(num, device=ids.device)
    first_wrong = number.where(is_wrong, num).flip(0).cummin(0).values.flip(0)  # from each sample on
    return tokens[first_wrong[samples[:-1].clamp(max=num - 1)].clamp(max=num - 1)]
