"""Drafts that the device makes: by the model's own head for multi-token prediction."""

import weakref
from collections.abc import Sequence
from functools import partial
from itertools import takewhile

import numpy as np
import torch

from minisgl.attention.base import to_device
from minisgl.attention.cpu import CpuBackend
from minisgl.core import ScheduledReq, StepPlan
from minisgl.engine.pooling import Computed
from minisgl.engine.step import LayerByLayer, StepRunner
from minisgl.engine.tables import Batch, StepIndex
from minisgl.kernel.cpu import CpuOps
from minisgl.layers.rope import AngleTables
from minisgl.models.mtp import MTPHead

Tensor = torch.Tensor


class HeadDrafter:
    """Goes on, token by token, with the requests of a step that are to have a draft."""

    def __init__(self, head: MTPHead, steps: StepRunner, layers: LayerByLayer) -> None:
        """layers: with the cache, the tables and the operations that the steps have."""
        self._head, self._steps, self._layers = head, steps, layers

    def propose(self, plan: StepPlan, batch: Batch, computed: Computed, ids: Tensor) -> dict[int, list[int]]:
        """What may come after the last token that will be kept of each request, by index into `plan.reqs`.

        computed: of the step; ids: [n] that it has sampled, which the table of tokens has too. The head reads all
        tokens of the step, so that its cache is as long as the model's; what it has of tokens that are not kept, it
        overwrites as the model does.
        """
        tensors, everything = batch.tensors, np.arange(len(batch.index.positions))
        following = self._steps.tables.token_ids[tensors.token_rows.long(), tensors.positions.long() + 1].long()
        hidden = self._steps.shard.model.normed(computed.hidden(to_device(everything, ids.device)))
        x = self._head.forward(following, hidden, self._layers.context(batch))
        going = {i: req for i, req in enumerate(plan.reqs) if req.num_drafts}
        kept, drafts = num_kept(plan, ids.tolist() if going else []), {i: list[int]() for i in going}
        ends = {i: req.num_new - req.num_samples + kept[req.row] for i, req in going.items()}  # tokens of its share
        x = x[self._index([int(batch.index.offsets[i]) + end - 1 for i, end in ends.items()])]
        while going:
            chosen = self._steps.shard.comm.broadcast(self._head.logits(x).argmax(-1))
            for i, token in zip(going, chosen.tolist(), strict=True):
                drafts[i].append(token)
            at = self._index([n for n, (i, req) in enumerate(going.items()) if len(drafts[i]) < req.num_drafts])
            going = {i: req for i, req in going.items() if len(drafts[i]) < req.num_drafts}
            places = [(req.row, req.start + ends[i] + len(drafts[i]) - 1) for i, req in going.items()]
            if places:
                step = self._steps.batch(StepIndex.of([ScheduledReq(*place, 1, 1) for place in places]), len(places))
                x = self._head.forward(chosen[at], self._head.hidden(x[at]), self._layers.context(step))
        return drafts

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return to_device(np.array(numbers, np.int64), self._steps.shard.device)


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

    def propose(self, plan: StepPlan, batch: Batch, computed: Computed, ids: Tensor) -> dict[int, list[int]]:  # noqa: ARG002
        going = {i: req for i, req in enumerate(plan.reqs) if req.num_drafts}
        kept = num_kept(plan, ids.tolist() if going else [])
        wanted = [(i, req.num_new - req.num_samples + kept[req.row], req.num_drafts) for i, req in going.items()]
        most = max((req.num_drafts for req in going.values()), default=0)
        self._angles.reach(int(batch.index.seq_lens.max()) + most)
        out, numbers = np.empty((len(going), most), np.int32), np.array(wanted, np.int64).reshape(-1, 3)
        step = self._backend.prepare(batch.attention)
        self._module.draft(self._handle, self._steps.tables.token_ids, *step, *map(torch.from_numpy, (numbers, out)))
        return {i: row[: req.num_drafts] for (i, req), row in zip(going.items(), out.tolist(), strict=True)}


def create_drafter(
    head: MTPHead, steps: StepRunner, layers: LayerByLayer, ops: CpuOps | None, model: int
) -> HeadDrafter | WholeDrafter:
    """model: of the kernels, which compute it in one call; 0: they do not."""
    if ops is None or not model or head.cpu_spec() is None:
        return HeadDrafter(head, steps, layers)
    return WholeDrafter(head, steps, ops, model)


def num_kept(plan: StepPlan, ids: Sequence[int]) -> dict[int, int]:
    """By row: how many of its sampled tokens the planner will keep, as far as drafts decide. ids: of all samples."""
    drafts, begin, kept = {draft.row: draft.ids for draft in plan.drafts}, 0, dict[int, int]()
    for req in plan.reqs if ids else ():
        if req.num_samples:
            pairs = zip(ids[begin : begin + req.num_samples], drafts.get(req.row, ()), strict=False)
            kept[req.row] = 1 + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            begin += req.num_samples
    return kept
