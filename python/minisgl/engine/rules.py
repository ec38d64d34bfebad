"""What happens to some rows' logits before a token is sampled from them.

Per row: repetition, presence and frequency penalties, then `logit_bias`, then the tokens that are forbidden (ends of
the output before `min_tokens`, and what a bitmask leaves out). All in plain torch on the logits' device; sums are in
float32. The history of a row is read from the engine's token table, so nothing is kept that an abort or a retraction
could leave behind. A step without such rows pays for a look at an empty dictionary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minisgl.attention.base import IntArray, to_device
from minisgl.core import Admission, Masks, SamplingParams

Tensor = torch.Tensor

ROWS_AT_ONCE = 64  # a row takes up to 24 bytes per token of the vocabulary


class _Rules(NamedTuple):
    """What a running request asks for beyond plain sampling."""

    params: SamplingParams
    prompt_len: int
    end_ids: tuple[int, ...]
    min_len: int  # tokens before which none of `end_ids` may come


_NOTHING = _Rules(SamplingParams(), 0, (), 0)


class RuledRow(NamedTuple):
    """A row of a step whose logits are to be changed."""

    sample: int  # index into the rows that sample
    row: int  # of the token table
    position: int  # of the token to be sampled
    rules: _Rules
    words: npt.NDArray[np.int32] | None  # its packed bitmask; empty: it is not there yet


@dataclass(frozen=True, slots=True)
class LogitStep:
    """Some of a step's rows whose logits are changed, `ROWS_AT_ONCE` at most, in the order of the samples."""

    rows: list[RuledRow]

    @property
    def samples(self) -> IntArray:
        """[m] indices into the rows that sample."""
        return np.array([row.sample for row in self.rows], np.int64)

    @property
    def absent(self) -> IntArray:
        """Which of the m are not to be sampled, since their bitmasks are not there yet."""
        found = [i for i, row in enumerate(self.rows) if row.words is not None and not len(row.words)]
        return np.array(found, np.int64)


class LogitRules:
    """The rules of the running requests, by row of the engine's tables. On the host; no tensors."""

    def __init__(self) -> None:
        self._rules: dict[int, _Rules] = {}

    def apply(self, admissions: Iterable[Admission]) -> None:
        """Remember what newly admitted requests ask for, and forget who had their rows before."""
        for row, _, params, prompt_len, end_ids in admissions:
            if params.has_logit_rules or params.min_tokens:
                self._rules[row] = _Rules(params, prompt_len, end_ids, prompt_len + params.min_tokens)
            else:
                self._rules.pop(row, None)

    def steps(self, rows: IntArray, positions: IntArray, masked: Sequence[int], masks: Masks | None) -> list[LogitStep]:
        """What is to be done to the logits of the rows that sample, for tokens at these positions; mostly nothing."""
        if not self._rules and not masked:
            return []
        words = {sample: None if masks is None else masks[i] for i, sample in enumerate(masked)}
        found = []
        for sample, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            rules = self._rules.get(row, _NOTHING)
            if sample in words or rules.params.has_logit_rules or position < rules.min_len:
                found.append(RuledRow(sample, row, position, rules, words.get(sample)))
        return [LogitStep(found[first : first + ROWS_AT_ONCE]) for first in range(0, len(found), ROWS_AT_ONCE)]


def apply_rules(logits: Tensor, step: LogitStep, token_ids: Tensor) -> Tensor:
    """logits: [n, vocab] of all rows that sample; token_ids: [rows, tokens] int32, the engine's token table.

    → [m, vocab]: what `step.samples` are to be sampled from, in a copy. float32, unless tokens are only forbidden: then
    in the logits' own type, of which less is to be read.
    """
    device, rows = logits.device, list(enumerate(step.rows))
    changed = logits.index_select(0, to_device(step.samples, device))
    penalized = [(i, row) for i, row in rows if row.rules.params.has_penalties]
    biases = [(i, *pair) for i, row in rows for pair in row.rules.params.logit_bias]
    if penalized or biases:
        changed = changed.float()
    if penalized:
        _penalize(changed, penalized, token_ids)
    if biases:
        index, tokens = _integers([entry[:2] for entry in biases], device)
        values = to_device(np.array([entry[2] for entry in biases], np.float32), device)
        changed.index_put_((index, tokens), values, accumulate=True)
    ends = [(i, token) for i, row in rows if row.position < row.rules.min_len for token in row.rules.end_ids]
    if ends:
        index, tokens = _integers(ends, device)
        changed[index, tokens] = float("-inf")
    masks = [(i, row.words) for i, row in rows if row.words is not None and len(row.words)]
    if masks:
        index = to_device(np.array([i for i, _ in masks]), device)
        apply_bitmask(changed, index, to_device(np.stack([words for _, words in masks]), device))
    return changed


def _penalize(logits: Tensor, penalized: Sequence[tuple[int, RuledRow]], token_ids: Tensor) -> None:
    """In place, at the tokens that are there: of a large vocabulary all others are not even looked at. A token that is
    there twice gets the same value twice. penalized: indices into `logits`, and what these rows are."""
    device, params = logits.device, [row.rules.params for _, row in penalized]
    places = [(i, row.row, row.rules.prompt_len, row.position) for i, row in penalized]
    index, rows, starts, ends = (column[:, None] for column in _integers(places, device))
    amounts = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
    repetition, frequency, presence = to_device(np.array(amounts, np.float32).T[:, :, None].copy(), device)
    history = token_ids[rows[:, 0], : max(row.position for _, row in penalized)].long()
    place = torch.arange(history.shape[1], device=device)
    known, scores = (place < ends).float(), logits[index, history]
    table = logits.new_empty(len(history), logits.shape[1])

    def counts(weights: Tensor) -> Tensor:
        return table.scatter_(1, history, 0.0).scatter_add_(1, history, weights).gather(1, history)

    if any(p.repetition_penalty != 1 for p in params):
        scaled = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(counts(known) > 0, scaled, scores)
    if any(p.presence_penalty or p.frequency_penalty for p in params):
        of_output = counts(known * (place >= starts))
        scores -= frequency * of_output
        scores -= presence * (of_output > 0)
    logits[index, history] = scores


def apply_bitmask(logits: Tensor, index: Tensor, words: Tensor) -> None:
    """In place: logits[index[i], t] = -inf where bit t % 32 of words[i, t // 32] is not set.

    index: [k] int64, ascending, none twice; words: [k, ceil(vocab / 32)] int32.
    """
    shifts = torch.arange(8, device=logits.device, dtype=torch.uint8)
    missing = words.bitwise_not().view(torch.uint8)[:, :, None] >> shifts  # the lowest byte of a word comes first
    forbidden = missing.bitwise_and_(1).view(torch.bool).flatten(1)[:, : logits.shape[1]]
    if len(index) == len(logits):
        logits.masked_fill_(forbidden, float("-inf"))
    else:
        logits.index_copy_(0, index, logits.index_select(0, index).masked_fill_(forbidden, float("-inf")))


def _integers(entries: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """The columns of a table, in one copy: [columns, entries] int64."""
    return to_device(np.array(entries, np.int64).T.copy(), device)
