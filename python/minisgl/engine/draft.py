"""Drafts that the device makes: by the model's own head for multi-token prediction, or by a second model."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from minisgl.attention.base import IntArray, StepContext
from minisgl.config.model import ModelConfig
from minisgl.engine.pooling import Computed
from minisgl.engine.shard import ModelShard
from minisgl.engine.step import LayerByLayer, StepRunner
from minisgl.engine.tables import Batch, StepTensors
from minisgl.kernel.cpu import CpuOps
from minisgl.models.heads import Head

Tensor = torch.Tensor
# A step's numbers, as far as attention reads the host's; what can be captured reads the device's.
Known = Callable[[Tensor], IntArray]


class SecondModel(ModelShard):
    """A model in the place of a head: it reads tokens, the last one included, and nothing of what the model makes."""

    skips_last = False

    def __init__(self, first: ModelShard, path: str, model: ModelConfig) -> None:
        super().__init__(replace(first.config, model_path=path, model=model), first.device, first.comm, first.ops)

    def forward(self, tokens: Tensor, x: Tensor, step: StepContext, of_model: bool = False) -> Tensor:  # noqa: ARG002
        """tokens: [num_tokens] int64, at the step's positions → for `choose`."""
        ropes = [rope(step.positions) for rope in self.ropes]
        return self.model.hidden(tokens, replace(step, input_ids=tokens, ropes=ropes))

    def choose(self, x: Tensor) -> Tensor:
        """x: rows of `forward`'s result → the most probable tokens after these, [n] int32."""
        return self.comm.broadcast(self.model.logits(x, None).argmax(-1).int())


class HeadDrafter:
    """Says what may come after the last token that will be kept of each request. All of it can be captured."""

    def __init__(self, head: Head | SecondModel, steps: StepRunner, layers: LayerByLayer, known: Known) -> None:
        """layers: with the tables that the steps have, and the cache that the head reads."""
        self._head, self._steps, self._layers, self._known = head, steps, layers, known

    def propose(self, batch: Batch, computed: Computed, ids: Tensor, most: int) -> Tensor:
        """computed: of the step, which has sampled `ids`. → [requests, most] int32; the first `num_drafts` of a request
        are of use. most: 0: the head only reads the step's tokens, so that its cache is as long as the model's."""
        tensors, skips_last = batch.tensors, self._head.skips_last
        context = computed.context if skips_last else None  # which is a head's, too
        context = context or self._layers.context(batch, captured=batch.attention.is_decode)
        following = self._steps.tables.token_ids[tensors.token_rows.long(), tensors.positions.long() + 1].long()
        x = computed.hidden(torch.arange(len(following), device=ids.device))
        x = self._head.forward(following if skips_last else context.input_ids, x, context, of_model=True)
        if not most:
            return ids.new_empty(len(tensors.rows), 0)
        last, told = last_kept(tensors, computed.input_ids, ids), list[Tensor]()
        x, position, token = x[last], tensors.positions[last], following[last]
        for num_told in range(most):
            if num_told or not skips_last:
                one = self._one_each(batch, position + num_told + (not skips_last), num_told)
                context = self._layers.context(one, captured=True)
                x = self._head.forward(token, x, context)
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


def add_drafter(steps: StepRunner, layers: LayerByLayer, ops: CpuOps | None, model: int) -> None:
    """To a CPU's steps, if there is one. model: of the kernels, which owns a head that they compute; 0: none."""
    shard, second = steps.shard, steps.shard.config.model.second
    head: Head | SecondModel | None = SecondModel(shard, *second) if second and not shard.head else shard.head
    spec = head.cpu_spec() if ops is not None and model and isinstance(head, Head) else None
    if isinstance(head, SecondModel):
        num_pages = shard.config.num_pages + 1, shard.config.num_window_pages + 1
        layers = layers.of(head, head.create_kv(*num_pages), None)
    if head is not None:
        steps.propose = HeadDrafter(head, steps, layers, lambda numbers: numbers.numpy()).propose
    if ops is None or spec is None:
        return
    layer: int = ops.module.add_draft_head(model, *spec.numbers, *spec.norms)
    spec.build(ops.module, layer, shard.config.model.num_layers, steps.kv)

    def propose(batch: Batch, computed: Computed, ids: Tensor, most: int) -> Tensor | None:
        if not most and batch.attention.is_decode:  # nobody wants any: that its cache lacks tokens costs guesses alone
            return None
        told = torch.empty((len(batch.index.rows), most), dtype=torch.int32)
        sampled = computed.input_ids, batch.tensors.logit_tokens, ids, batch.tensors.num_drafts
        ops.module.draft(model, steps.tables.token_ids, *sampled, told)
        return told

    steps.propose = propose


def last_kept(tensors: StepTensors, input_ids: Tensor, ids: Tensor) -> Tensor:
    """[requests] int64: the token of the step from which the last token is sampled that is kept of each request: those
    are kept whose draft was right so far. input_ids: of the step's tokens, drafts included; ids: what was sampled."""
    tokens, num = tensors.logit_tokens.long(), len(ids)
    samples = torch.searchsorted(tokens, tensors.cu_q.long())  # [requests + 1]: how many are before each request's
    is_last = tokens.new_zeros(num + 1, dtype=torch.bool).index_fill_(0, samples[1:], True)[1:]
    is_wrong = is_last | (ids != input_ids[(tokens + 1).clamp(max=len(input_ids) - 1)])
    ends = is_wrong.long().cumsum(0)  # how many drafts have ended, and so has this one with the next
    first_wrong = torch.searchsorted(ends, (ends - is_wrong.long())[samples[:-1].clamp(max=num - 1)] + 1)
    return tokens[first_wrong.clamp(max=num - 1)]
