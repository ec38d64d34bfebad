"""Log-probabilities of sampled tokens and of prompts: which rows want them, and how they come back to the host.

They are the model's own, of the logits as they are before temperature, penalties, biases and masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minisgl.attention.base import IntArray
from minisgl.core import Admission, ScheduledReq, TokenLogprobs
from minisgl.engine.logits import ROWS_AT_ONCE, on

Tensor = torch.Tensor


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


class _Prompt(NamedTuple):
    num_top: int
    token_ids: npt.NDArray[np.int32]


class LogprobRules:
    """Which running requests want log-probabilities, by row of the engine's tables. On the host; no tensors."""

    def __init__(self) -> None:
        self._num_top: dict[int, int] = {}
        self._prompts: dict[int, _Prompt] = {}

    def apply(self, admissions: Iterable[Admission]) -> None:
        """Remember what newly admitted requests want, and forget who had their rows before."""
        for row, token_ids, params, prompt_len, _ in admissions:
            self._num_top.pop(row, None)
            self._prompts.pop(row, None)
            if params.logprobs is not None:
                self._num_top[row] = params.logprobs
            # With output there, the prompt's were reported before a retraction.
            if params.prompt_logprobs is not None and len(token_ids) == prompt_len:
                self._prompts[row] = _Prompt(params.prompt_logprobs, token_ids)

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
            prompt = self._prompts.get(row)
            end = 0 if prompt is None else min(start + num_new, len(prompt.token_ids) - 1)
            if prompt is not None and end > start:
                wanted.append(Wanted(i, prompt.num_top, end - start))
                index.append(offsets[i] + np.arange(end - start))
                targets.append(prompt.token_ids[start + 1 : end + 1])
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
