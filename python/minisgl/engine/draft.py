"""Drafts that the device makes: by the model's own head, or by what `--draft-model` names."""

from dataclasses import replace

import numpy as np
import torch

from minisgl.attention.base import StepContext, to_device
from minisgl.config.model import ModelConfig
from minisgl.engine.pooling import Computed
from minisgl.engine.shard import ModelShard
from minisgl.engine.step import LayerByLayer, StepRunner
from minisgl.engine.tables import Batch, StepTensors
from minisgl.kernel.cpu import CpuOps
from minisgl.models.heads import Head

Tensor = torch.Tensor


class SecondModel(ModelShard):
    """A model in the place of a head: it reads tokens, the last one included, and nothing of what the model makes."""

    skips_last, block = False, None

    def __init__(self, first: ModelShard, path: str, model: ModelConfig) -> None:
        super().__init__(replace(first.config, model_path=path, model=model), first.device, first.comm, first.ops)

    def forward(self, tokens: Tensor, x: Tensor, step: StepContext, of_model: bool = False) -> Tensor:  # noqa: ARG002
        """tokens: [num_tokens] int64, at the step's positions → for `choose`."""
        return self.model.hidden(tokens, replace(step, input_ids=tokens, ropes=[r(step.positions) for r in self.ropes]))

    def choose(self, x: Tensor) -> Tensor:
        """x: rows of `forward`'s result → the most probable tokens after these, [n] int32."""
        return self.comm.broadcast(self.model.logits(x, None).argmax(-1).int())


class HeadDrafter:
    """Says what may come after the last token that will be kept of each request. All of it can be captured."""

    def __init__(self, head: Head | SecondModel, steps: StepRunner, layers: LayerByLayer) -> None:
        """layers: with the tables that the steps have, and the cache that the head reads."""
        self._head, self._steps, self._layers = head, steps, layers

    def propose(self, batch: Batch, computed: Computed, ids: Tensor, most: int) -> Tensor:
        """computed: of the step, which has sampled `ids`. → [requests, most] int32; the first `num_drafts` of a request
        are of use. most: 0: the head only reads the step's tokens, so that its cache is as long as the model's."""
        tensors, skips_last = batch.tensors, self._head.skips_last
        context = computed.context if isinstance(self._head, Head) else None  # which is a head's, too
        context = context or self._layers.context(batch, captured=batch.attention.is_decode)
        following = self._steps.tables.token_ids[tensors.token_rows.long(), tensors.positions.long() + 1].long()
        x = computed.hidden(torch.arange(len(following), device=ids.device))
        x = self._head.forward(following if skips_last else context.input_ids, x, context, of_model=True)
        if not (drafts := ids.new_zeros(len(tensors.rows), most)).numel():
            return drafts
        asked, told = np.flatnonzero(batch.index.num_drafts), list[Tensor]()  # nobody: it is captured for any
        reqs = to_device(asked, ids.device) if 0 < len(asked) < len(drafts) else slice(None)
        last = last_kept(tensors, computed.input_ids, ids)[reqs]
        x, position, token = x[last], tensors.positions[last] + (not skips_last), following[last]
        num_masks = most if self._head.block else 0
        for num_told in range(1 if num_masks else most):
            if num_told or not skips_last:
                context = self._context(batch, reqs, position + num_told, num_told, num_masks)
                x = self._head.forward(token, x, context)
            told.append(self._head.choose(x))
            token = told[-1].long()
        drafts[reqs] = torch.stack(told, 1).view(-1, most)
        return drafts

    def _context(self, batch: Batch, reqs: Tensor | slice, first: Tensor, num_told: int, num_masks: int) -> StepContext:
        """Of a token of each of these requests, at position `first`, and so many masks behind it, which all see one
        another; of requests that want no further token, or fewer, they are nobody's."""
        places = torch.arange(1 + num_masks, dtype=first.dtype, device=first.device)
        rows, wanted, first = batch.tensors.rows[reqs, None], batch.tensors.num_drafts[reqs, None], first[:, None]
        is_wanted = wanted >= places.clamp(min=num_told + 1)  # [requests, 1 + num_masks]
        rows = rows.where(is_wanted, self._steps.tables.padding_row).flatten()
        positions = (first + places).where(is_wanted, 0).flatten()
        seq_lens = (first + wanted.clamp(max=num_masks) + 1).where(is_wanted, 1).flatten()
        num, cu_q = len(rows), torch.arange(len(rows) + 1, dtype=rows.dtype, device=rows.device)
        known = [x.numpy() if x.is_cpu else np.zeros(num, np.int64) for x in (rows, seq_lens - 1)]  # a GPU has its own
        sequences = known[0], known[1], np.ones(num, np.int64), np.arange(num + 1)
        attention = self._steps.attention(sequences, (rows, seq_lens, cu_q), num)
        numbers = batch.tensors._replace(rows=rows, seq_lens=seq_lens, cu_q=cu_q, token_rows=rows, positions=positions)
        return self._layers.context(replace(batch, tensors=numbers, attention=attention), captured=True)


def add_drafter(steps: StepRunner, layers: LayerByLayer, ops: CpuOps | None, model: int) -> None:
    """To a CPU's steps, if there is one. model: of the kernels, which owns a head that they compute; 0: none."""
    shard, second = steps.shard, steps.shard.config.model.second
    head: Head | SecondModel | None = SecondModel(shard, *second) if second and not shard.head else shard.head
    spec = head.cpu_spec() if ops is not None and model and isinstance(head, Head) else None
    if isinstance(head, SecondModel):
        num_pages = shard.config.num_pages + 1, shard.config.num_window_pages + 1
        layers = layers.of(head, head.create_kv(*num_pages), None)
    if ops is None or spec is None:
        steps.propose = HeadDrafter(head, steps, layers).propose if head else None
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
    next_wrong = torch.arange(num, device=ids.device).where(is_wrong, num - 1).flip(0).cummin(0).values.flip(0)
    return tokens[next_wrong[samples[:-1].clamp(max=num - 1)]]
