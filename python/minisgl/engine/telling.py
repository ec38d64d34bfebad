"""Drafts that a GPU makes with the model's head for multi-token prediction: nothing of them waits for the host."""

from dataclasses import replace

import numpy as np
import torch

from minisgl.attention.base import AttentionStep, StepContext
from minisgl.attention.create import Backend
from minisgl.core import StepPlan
from minisgl.engine.pooling import Computed
from minisgl.engine.staging import DeviceTables
from minisgl.engine.step import LayerByLayer, Told
from minisgl.engine.tables import Batch, StepTensors
from minisgl.kernel.ops import PagedSequences
from minisgl.models.decoder import DecoderModel
from minisgl.models.mtp import MTPHead

Tensor = torch.Tensor


class DeviceDrafter:
    """Says what may come after the last token that will be kept of each request. All of it can be captured.

    head: of the model that `layers` computes; longest: tokens of a draft.
    """

    def __init__(
        self,
        head: MTPHead,
        model: DecoderModel,
        layers: LayerByLayer,
        backend: Backend,
        tables: DeviceTables,
        longest: int,
    ) -> None:
        self._head, self._model, self._layers, self._backend = head, model, layers, backend
        self._tables, self._longest = tables, longest
        self._last_position = tables.token_ids.shape[1] - 3

    def propose(self, plan: StepPlan, batch: Batch, computed: Computed, ids: Tensor) -> Told:
        """Of a step that is not captured."""
        goes_on = any(share.num_drafts for share in plan.reqs)
        told = self.tell(batch, self._layers.context(batch), computed, ids, goes_on)
        return {} if told is None else told

    def tell(self, batch: Batch, context: StepContext, computed: Computed, ids: Tensor, goes_on: bool) -> Tensor | None:
        """computed: of the step, which has sampled `ids`. → [requests, longest] int32; the first `num_drafts` of a
        request are of use. goes_on: without it there are none: the head only reads the step's tokens, so that its cache
        is as long as the model's. What it has of tokens that are not kept, it overwrites as the model does."""
        tensors, token_ids = batch.tensors, self._tables.token_ids
        following = token_ids[tensors.token_rows.long(), tensors.positions.long() + 1].long()
        everything = torch.arange(len(following), device=ids.device)
        x = self._head.forward(following, self._model.normed(computed.hidden(everything)), context)
        if not goes_on:
            return None
        assert computed.input_ids is not None
        last, told = last_kept(tensors, computed.input_ids, ids), list[Tensor]()
        x, position = x[last], tensors.positions[last]
        while True:
            told.append(self._head.choose(x))
            if len(told) == self._longest:
                return torch.stack(told, 1)
            context = self._context(batch, position + len(told), len(told))
            x = self._head.forward(told[-1].long(), self._head.hidden(x), context)

    def _context(self, batch: Batch, position: Tensor, num_told: int) -> StepContext:
        """A token of each request, at its position; of those that want no further one it is nobody's."""
        host, tensors = self._tables.host, batch.tensors
        num, goes_on = len(tensors.rows), tensors.num_drafts > num_told
        rows = tensors.rows.where(goes_on, self._tables.padding_row)
        position = position.where(goes_on, 0).clamp(max=self._last_position)
        seq_lens, cu_q = position + 1, torch.arange(num + 1, dtype=torch.int32, device=rows.device)
        device = PagedSequences(self._tables.page_table, rows, seq_lens, cu_q, host.page_size)
        zeros = np.zeros(num, np.int64)  # what can be captured reads the device's
        attention = AttentionStep(zeros, zeros, zeros + 1, np.arange(num + 1), host.pages, host.page_size, num, device)
        tensors = tensors._replace(rows=rows, seq_lens=seq_lens, cu_q=cu_q, token_rows=rows, positions=position)
        one = replace(batch, tensors=tensors, attention=attention, logit_tokens=None)
        return self._layers.context(one, self._backend.prepare_both(attention, captured=True))


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
