"""What happens to some rows' logits before a token is sampled from them.

Per row: repetition, presence and frequency penalties, then `logit_bias`, then the tokens that are forbidden (ends of
the output before `min_tokens`, and what a bitmask leaves out). All in plain torch on the logits' device; sums are in
float32. The history of a row is read from the engine's token table, so nothing is kept that an abort or a retraction
could leave behind. A step without such rows pays for a look at an empty dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minisgl.attention.base import IntArray
from minisgl.core import Admission, SamplingParams, ScheduledReq, TokenBitmask, TokenLogprobs

Tensor = torch.Tensor

ROWS_AT_ONCE = 64  # a row takes up to 24 bytes per token of the vocabulary
_NONE = np.empty(0, np.int32)


class _Rules(NamedTuple):
    """What a running request asks for beyond plain sampling."""

    params: SamplingParams
    prompt_len: int
    end_ids: tuple[int, ...]
    min_len: int  # tokens before which none of `end_ids` may come


@dataclass(frozen=True, slots=True)
class Penalties:
    """m rows, as indices into the changed ones of a step."""

    index: IntArray  # [m]
    rows: IntArray  # [m] of the token table
    prompt_lens: IntArray  # [m]
    positions: IntArray  # [m] of the token to be sampled
    repetition: npt.NDArray[np.float32]  # [m]; 1 is off, of the others 0
    presence: npt.NDArray[np.float32]  # [m]
    frequency: npt.NDArray[np.float32]  # [m]


@dataclass(frozen=True, slots=True)
class LogitStep:
    """Some of a step's rows whose logits are changed, `ROWS_AT_ONCE` at most. All fields but the first speak of them by
    index into it."""

    samples: IntArray  # [m] indices into the rows that sample, ascending
    penalties: Penalties | None
    bias: tuple[IntArray, IntArray, npt.NDArray[np.float32]]  # which of the m, token, what is added
    forbidden: tuple[IntArray, IntArray]  # which of the m, token
    masked: tuple[IntArray, npt.NDArray[np.int32]] | None  # which of the m, and their packed bitmasks
    absent: IntArray  # which of the m are not to be sampled, since their bitmasks are not there yet


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

    def steps(self, rows: IntArray, positions: IntArray, bitmask: TokenBitmask | None) -> list[LogitStep]:
        """What is to be done to the logits of the rows that sample, for tokens at these positions; mostly nothing."""
        if not self._rules and bitmask is None:
            return []
        found: dict[int, _Found] = {}
        for sample, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            rules = self._rules.get(row)
            if rules is not None and (rules.params.has_logit_rules or position < rules.min_len):
                found[sample] = _Found(row, position, rules)
        if bitmask is not None:
            for i, sample in enumerate(bitmask.samples):
                words = bitmask.words[i] if bitmask.words is not None else None
                before = found.get(sample, _Found(0, 0, None))
                found[sample] = before._replace(words=words)
        samples = sorted(found)
        parts = [samples[first : first + ROWS_AT_ONCE] for first in range(0, len(samples), ROWS_AT_ONCE)]
        return [_step(part, [found[sample] for sample in part]) for part in parts]


class _Found(NamedTuple):
    """What one row of a step is due."""

    row: int
    position: int
    rules: _Rules | None
    words: npt.NDArray[np.int32] | None = None


def _step(samples: list[int], found: list[_Found]) -> LogitStep:
    ruled = [(i, one, one.rules) for i, one in enumerate(found) if one.rules is not None]
    bias = [(i, *pair) for i, _, rules in ruled for pair in rules.params.logit_bias]
    ends = [(i, token) for i, one, rules in ruled if one.position < rules.min_len for token in rules.end_ids]
    words = [(i, one.words) for i, one in enumerate(found) if one.words is not None and len(one.words)]
    absent = [(i,) for i, one in enumerate(found) if one.words is not None and not len(one.words)]
    return LogitStep(
        samples=np.array(samples, np.int64),
        penalties=_penalties([(i, rules, one.row, one.position) for i, one, rules in ruled]),
        bias=(_ints(bias, 0), _ints(bias, 1), np.array([entry[2] for entry in bias], np.float32)),
        forbidden=(_ints(ends, 0), _ints(ends, 1)),
        masked=(_ints(words, 0), np.stack([row for _, row in words])) if words else None,
        absent=_ints(absent, 0),
    )


def _ints(entries: Sequence[tuple[Any, ...]], column: int) -> IntArray:
    return np.array([entry[column] for entry in entries], np.int64)


def _penalties(entries: Sequence[tuple[int, _Rules, int, int]]) -> Penalties | None:
    """entries: index, rules, row and position of each row that may have some."""
    table = [
        (i, row, rules.prompt_len, position, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        for i, rules, row, position in entries
        if (p := rules.params).repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
    ]
    if not table:
        return None
    index, rows, prompt_lens, positions = (_ints(table, column) for column in range(4))
    repetition, presence, frequency = np.array([entry[4:] for entry in table], np.float32).T
    return Penalties(index, rows, prompt_lens, positions, *map(np.ascontiguousarray, (repetition, presence, frequency)))


def process(logits: Tensor, step: LogitStep, token_ids: Tensor) -> Tensor:
    """logits: [n, vocab] of all rows that sample; token_ids: [rows, tokens] int32, the engine's token table.

    → [m, vocab]: what `step.samples` are to be sampled from, in a copy. float32, unless tokens are only forbidden: then
    in the logits' own type, of which less is to be read.
    """
    device = logits.device
    changed = logits.index_select(0, on(device, step.samples))
    if step.penalties is not None or len(step.bias[0]):
        changed = changed.float()
    if step.penalties is not None:
        _penalize(changed, step.penalties, token_ids)
    index, tokens, values = step.bias
    if len(index):
        changed.index_put_((on(device, index), on(device, tokens)), on(device, values), accumulate=True)
    index, tokens = step.forbidden
    if len(index):
        changed[on(device, index), on(device, tokens)] = float("-inf")
    if step.masked is not None:
        apply_bitmask(changed, on(device, step.masked[0]), on(device, step.masked[1]))
    return changed


def _penalize(logits: Tensor, penalties: Penalties, token_ids: Tensor) -> None:
    """In place, at the tokens that are there: of a large vocabulary all others are not even looked at. A token that is
    there twice gets the same value twice."""
    device = logits.device
    index, starts, ends = (
        on(device, x)[:, None] for x in (penalties.index, penalties.prompt_lens, penalties.positions)
    )
    history = token_ids[on(device, penalties.rows), : int(penalties.positions.max())].long()
    place = torch.arange(history.shape[1], device=device)
    known, scores = (place < ends).float(), logits[index, history]
    table = logits.new_empty(len(history), logits.shape[1])

    def counts(weights: Tensor) -> Tensor:
        return table.scatter_(1, history, 0.0).scatter_add_(1, history, weights).gather(1, history)

    if (penalties.repetition != 1).any():
        factor = on(device, penalties.repetition)[:, None]
        scores = torch.where(counts(known) > 0, torch.where(scores > 0, scores / factor, scores * factor), scores)
    if penalties.presence.any() or penalties.frequency.any():
        of_output = counts(known * (place >= starts))
        scores -= on(device, penalties.frequency)[:, None] * of_output
        scores -= on(device, penalties.presence)[:, None] * (of_output > 0)
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


def on(device: torch.device, array: npt.NDArray[np.generic]) -> Tensor:
    """A host array on the device, without waiting for it: through pinned memory, which torch keeps until it is read."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Wanted(NamedTuple):
    """The log-probabilities of one request in a step: `num` tokens, `num_top` alternatives for each."""

    key: int  # in the step's result
    num_top: int
    num: int


@dataclass(frozen=True, slots=True)
class LogprobStep:
    """n tokens whose log-probabilities a step reports."""

    wanted: list[Wanted]  # of n tokens together, in order
    index: IntArray  # [n]: whose logits they are sampled from, or would be
    targets: IntArray  # [n] token ids; of no use for sampled tokens, which are not known on the host

    @property
    def num_top(self) -> int:
        return max(wanted.num_top for wanted in self.wanted)


class LogprobRules:
    """Which running requests want log-probabilities, by row of the engine's tables. On the host; no tensors."""

    def __init__(self) -> None:
        self._num_top: dict[int, int] = {}
        self._prompts: dict[int, tuple[int, npt.NDArray[np.int32]]] = {}  # as for `_num_top`, and token ids

    def apply(self, admissions: Iterable[Admission]) -> None:
        """Remember what newly admitted requests want, and forget who had their rows before."""
        for row, token_ids, params, prompt_len, _ in admissions:
            self._num_top.pop(row, None)
            self._prompts.pop(row, None)
            if params.logprobs is not None:
                self._num_top[row] = params.logprobs
            # With output there, the prompt's were reported before a retraction.
            if params.prompt_logprobs is not None and len(token_ids) == prompt_len:
                self._prompts[row] = params.prompt_logprobs, token_ids

    def sampled(self, rows: IntArray) -> LogprobStep | None:
        """Of the tokens that these rows sample. Keys and indices count the rows."""
        if not self._num_top:
            return None
        wanted = [Wanted(i, self._num_top[row], 1) for i, row in enumerate(rows.tolist()) if row in self._num_top]
        index = np.array([one.key for one in wanted], np.int64)
        return LogprobStep(wanted, index, np.zeros_like(index)) if wanted else None

    def prompt(self, reqs: Sequence[ScheduledReq], offsets: IntArray) -> LogprobStep | None:
        """Of prompt tokens, from the logits of the tokens before them. Keys count `reqs`; indices are those of the
        step's tokens, where the tokens of reqs[i] begin at offsets[i]."""
        if not self._prompts:
            return None
        wanted, index, targets = [], [], []
        for i, (row, start, num_new, _) in enumerate(reqs):
            num_top, token_ids = self._prompts.get(row, (0, _NONE))
            end = min(start + num_new, len(token_ids) - 1)
            if end > start:
                wanted.append(Wanted(i, num_top, end - start))
                index.append(offsets[i] + np.arange(end - start))
                targets.append(token_ids[start + 1 : end + 1])
        return LogprobStep(wanted, np.concatenate(index), np.concatenate(targets).astype(np.int64)) if wanted else None


class DeviceLogprobs(NamedTuple):
    """Results on their way to the host: chosen [n], top_ids [n, k] and top [n, k]; to be read when the step is done."""

    step: LogprobStep
    chosen: Tensor
    top_ids: Tensor
    top: Tensor

    def result(self) -> dict[int, TokenLogprobs]:
        """By key of what was wanted."""
        chosen, top_ids, top = self.chosen.numpy(), self.top_ids.numpy(), self.top.numpy()
        results, begin = {}, 0
        for key, num_top, num in self.step.wanted:
            part = slice(begin, begin + num)
            results[key] = TokenLogprobs(chosen[part].copy(), top_ids[part, :num_top], top[part, :num_top])
            begin += num
        return results


def report(
    step: LogprobStep, logits_of: Callable[[Tensor], Tensor], ids: Tensor | None, device: torch.device
) -> DeviceLogprobs:
    """logits_of: [m] int64 of `step.index` → their logits [m, vocab], valid until the next call.

    ids: [n] of the tokens; None: they are `step.targets`. The copies to the host are not waited for.
    """
    parts = []
    targets = on(device, step.targets) if ids is None else ids.long().clamp(min=0)
    index = on(device, step.index)
    for first in range(0, len(index), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        parts.append(_logprobs(logits_of(index[part]), targets[part], step.num_top))
    chosen, top_ids, top = (_to_host(torch.cat(column)) for column in zip(*parts, strict=True))
    return DeviceLogprobs(step, chosen, top_ids, top)


def _logprobs(logits: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """[m, vocab] and [m] → of the targets [m]; the `count` largest: ids [m, count] int32 and values [m, count]."""
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    top, ids = logits.topk(min(count, logits.shape[1]), dim=-1)
    return (logits.gather(1, targets[:, None]) - total)[:, 0], ids.int(), top - total


def _to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
