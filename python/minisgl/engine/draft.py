"""Drafts that the device makes: by the model's own head, or by what `--draft-model` names."""

from dataclasses import replace

import numpy as np
import torch

from minisgl.attention.base import StepContext, Tensor, to_device
from minisgl.config.model import ModelConfig
from minisgl.core import most_samples
from minisgl.engine.pooling import Computed
from minisgl.engine.shard import ModelShard
from minisgl.engine.step import LayerByLayer, StepRunner
from minisgl.engine.tables import Batch
from minisgl.kernel.cpu import CpuOps
from minisgl.models.heads import Head


class SecondModel(ModelShard):
    """A model in the place of a head: it reads tokens, the last one included, and no hidden states of the model."""

    skips_last, block = False, None

    def __init__(self, first: ModelShard, path: str, model: ModelConfig) -> None:
        super().__init__(replace(first.config, model_path=path, model=model), first.device, first.comm, first.ops)

    def forward(self, tokens: Tensor, x: Tensor, step: StepContext, of_model: bool = False) -> Tensor:  # noqa: ARG002
        """tokens: [num_tokens] int64, at the step's positions → for `choose`."""
        return self.model.hidden(tokens, replace(step, input_ids=tokens, ropes=[r(step.positions) for r in self.ropes]))

    def choose(self, x: Tensor) -> Tensor:
        """x: rows of `forward`'s result → the most probable tokens after these, [n] int64."""
        return self.comm.broadcast(self.model.logits(x, None).argmax(-1))


class HeadDrafter:
    """Drafts what may come after the last accepted token of each request. All of it can be captured in a CUDA graph."""

    def __init__(self, head: Head | SecondModel, steps: StepRunner, layers: LayerByLayer, *num_pages: int) -> None:
        """layers: of the steps, whose cache a head reads, too; num_pages: of a second model's own."""
        self._head, self._steps = head, steps
        self._layers = layers.of(head, *num_pages) if isinstance(head, SecondModel) else layers
        # What a captured step leaves to the next one: of each request the number of accepted tokens, and its new draft.
        kept = torch.zeros(most_samples(steps.tables.padding_row) + 1, dtype=torch.int32, device=steps.shard.device)
        self.left = kept, kept.new_zeros(len(kept), steps.shard.config.draft_len, dtype=torch.int64)

    def propose(self, batch: Batch, computed: Computed, ids: Tensor, most: int) -> Tensor:
        """computed: of the step, which has sampled `ids`. → [requests, most] int64, of which the first `next_draft_len`
        of a request are its draft. most: 0: the head only reads the step's tokens, so that its cache has them, too."""
        head, context = self._head, computed.context if isinstance(self._head, Head) else None  # which is a head's, too
        context = context or self._layers.context(batch, captured=batch.attention.is_decode)
        asked, num_reqs = np.flatnonzero(batch.index.next_draft_lens), len(batch.tensors.rows)
        reqs = to_device(asked, ids.device) if 0 < len(asked) < num_reqs else slice(None)  # nobody: captured for any
        following, last, token, numbers = self._plan(batch, computed.input_ids, ids, reqs, most)
        x = computed.hidden(None if computed.context else torch.arange(len(following)))
        x = head.forward(following if head.skips_last else context.input_ids, x, context, of_model=True)
        if not most:
            return ids.new_zeros(num_reqs, 0)
        x = x.index_select(0, last)  # no kernel that is behind this one starts before `numbers` are written
        told = [head.choose(x) if head.skips_last else token]
        for of_pass in numbers.unbind(1):
            x = head.forward(told[-1], x, self._context(batch, *of_pass))
            told.append(head.choose(x))
        told = [each.view(len(last), -1) for each in told[not head.skips_last :]]
        drafts = torch.cat(told, 1, out=self.left[1][: len(last), :most])
        return drafts if isinstance(reqs, slice) else drafts.new_zeros(num_reqs, most).index_copy_(0, reqs, drafts)

    def _plan(self, batch: Batch, inputs: Tensor, ids: Tensor, reqs: Tensor | slice, most: int) -> tuple[Tensor, ...]:
        """→ int64: the token after each of the step's; of each of `reqs`, who get drafts, the index of the token that
        samples the last accepted one, and that one; rows, positions and lengths of [3, passes, requests * places]."""
        given, tables, kernels = batch.tensors, self._steps.tables, self._steps.shard.ops.draft
        skips, places, num = int(self._head.skips_last), 1 + most * bool(self._head.block), len(given.rows)
        passes, tokens, ends = (skips, max(skips, 1 if places > 1 else most)), given.logit_tokens, given.cu_q[1:]
        if kernels is not None and isinstance(reqs, slice) and len(ids):
            parts = ids.new_empty(len(inputs) + 2 * num, dtype=torch.int64).split((len(inputs), num, num))
            numbers = ids.new_empty(3, passes[1] - passes[0], num, places)
            known = given.rows, given.next_draft_lens, given.cu_q, given.positions, tokens, inputs, ids
            kernels.plan(*known, tables.token_ids, tables.padding_row, bool(skips), *parts, numbers, self.left[0][:num])
            return *parts, numbers.flatten(2)
        following = tables.token_ids[given.token_rows.long(), given.positions.long() + 1].long()
        next_ids = inputs[(tokens.long() + 1).clamp(max=len(inputs) - 1)]
        wrong = torch.arange(len(ids), device=ids.device).where(ids != next_ids, len(ids))
        owner, last = torch.searchsorted(ends, tokens, right=True), (torch.searchsorted(tokens, ends) - 1).clamp(min=0)
        last = tokens[last.scatter_reduce(0, owner, wrong, "amin")].long()[reqs] if most else last
        told, place = (torch.arange(*some, dtype=ends.dtype, device=ids.device) for some in (passes, (0, places)))
        first, lens = given.positions[last, None] + (not skips) + told[:, None, None], given.next_draft_lens[reqs, None]
        is_wanted = lens >= torch.maximum(told[:, None, None] + 1, place)  # [passes, requests, places]
        found = given.rows[reqs, None], first + place, first + lens.clamp(max=places - 1) + 1
        told = torch.stack([x.where(is_wanted, no) for x, no in zip(found, (tables.padding_row, 0, 1), strict=True)])
        return following, last, following[last], told.flatten(2)

    def _context(self, batch: Batch, rows: Tensor, positions: Tensor, seq_lens: Tensor) -> StepContext:
        """Of tokens that are sequences of their own. All: [n], as `_plan` has them."""
        num, cu_q = len(rows), torch.arange(len(rows) + 1, dtype=rows.dtype, device=rows.device)
        known = (rows.numpy(), seq_lens.numpy() - 1) if rows.is_cpu else np.zeros((2, num), np.int64)
        sequences = known[0], known[1], np.ones(num, np.int64), np.arange(num + 1)
        attention = self._steps.attention(sequences, (rows, seq_lens, cu_q), num)
        numbers = batch.tensors._replace(rows=rows, seq_lens=seq_lens, cu_q=cu_q, token_rows=rows, positions=positions)
        return self._layers.context(replace(batch, tensors=numbers, attention=attention), captured=True)


def add_drafter(steps: StepRunner, layers: LayerByLayer, ops: CpuOps | None, model: int) -> None:
    """Add a drafter to a CPU's steps, if the model has one. model: handle of the kernels' model; 0: there is none."""
    shard, second = steps.shard, steps.shard.config.model.second
    head: Head | SecondModel | None = SecondModel(shard, *second) if second and not shard.head else shard.head
    spec = head.cpu_spec() if ops is not None and model and isinstance(head, Head) else None
    if ops is None or spec is None:
        num_pages = shard.config.num_pages + 1, shard.config.num_window_pages + 1
        steps.propose = HeadDrafter(head, steps, layers, *num_pages).propose if head else None
        return
    layer: int = ops.module.add_draft_head(model, *spec.numbers, *spec.norms)
    spec.build(ops.module, layer, shard.config.model.num_layers, steps.kv)

    def propose(batch: Batch, computed: Computed, ids: Tensor, most: int) -> Tensor | None:
        if not most and batch.attention.is_decode:  # nobody wants any: that its cache lacks tokens costs guesses alone
            return None
        told = torch.empty((len(batch.index.rows), most), dtype=torch.int32)
        sampled = computed.input_ids, batch.tensors.logit_tokens, ids, batch.tensors.next_draft_lens
        ops.module.draft(model, steps.tables.token_ids, *sampled, told)
        return told

    steps.propose = propose
