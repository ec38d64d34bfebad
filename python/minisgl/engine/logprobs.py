"""Log-probabilities of the tokens of a step, for the requests that want them: of sampled tokens and of prompts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minisgl.attention.base import IntArray, Tensor, to_device
from minisgl.core import Admission, Logprobs, ScheduledReq
from minisgl.engine.rules import ROWS_AT_ONCE
from minisgl.kernel.ops import StepOps

_NONE, _NO_ROWS = np.empty(0, np.int32), np.empty(0, np.int64)


class Wanted(NamedTuple):
    """The log-probabilities of one request in a step: `num` tokens, `num_top` alternatives for each."""

    key: int  # in the step's result
    num_top: int
    num: int


@dataclass(slots=True)
class LogprobStep:
    """n tokens whose log-probabilities a step reports."""

    wanted: list[Wanted]  # of n tokens together, in order
    index: IntArray  # [n]: whose logits they are sampled from, or would be
    targets: npt.NDArray[np.int32]  # [n] token ids; []: sampled ones, which are not known on the host
    on_device: Tensor | None = None  # the index, once it was sent


class LogprobRules:
    """Which running requests want log-probabilities, by row of the engine's tables. On the host; no tensors."""

    def __init__(self) -> None:
        self._num_top: dict[int, int] = {}
        self._prompts: dict[int, tuple[int, npt.NDArray[np.int32]]] = {}  # alternatives, and token ids
        self._last: tuple[IntArray, LogprobStep | None] = _NO_ROWS, None  # most steps sample for the same rows

    def apply(self, admissions: Iterable[Admission]) -> None:
        """Remember what newly admitted requests want, and forget who had their rows before."""
        for row, token_ids, params, prompt_len, _ in admissions:
            self._last = _NO_ROWS, None
            self._num_top.pop(row, None)
            self._prompts.pop(row, None)
            if params.logprobs is not None:
                self._num_top[row] = params.logprobs
            # With output there, the prompt's were reported before a retraction.
            if params.prompt_logprobs is not None and len(token_ids) == prompt_len:
                self._prompts[row] = params.prompt_logprobs, token_ids

    def sampled(self, rows: IntArray) -> LogprobStep | None:
        """Of the tokens that these rows sample. Keys and indices count the rows."""
        if self._num_top and not np.array_equal(rows, self._last[0]):
            wanted = [Wanted(i, self._num_top[row], 1) for i, row in enumerate(rows.tolist()) if row in self._num_top]
            step = LogprobStep(wanted, np.array([one.key for one in wanted]), _NONE) if wanted else None
            self._last = rows, step
        return self._last[1]

    def prompt(self, reqs: Sequence[ScheduledReq], offsets: IntArray) -> LogprobStep | None:
        """Of prompt tokens, from the logits of the tokens before them. Keys count `reqs`; indices are those of the
        step's tokens, where the tokens of reqs[i] begin at offsets[i]."""
        if not self._prompts:
            return None
        wanted, index, targets = [], [], []
        for i, req in enumerate(reqs):
            num_top, token_ids = self._prompts.get(req.row, (0, _NONE))
            of_prompt = token_ids[req.start + 1 : req.start + req.num_new + 1]
            if len(of_prompt):
                wanted.append(Wanted(i, num_top, len(of_prompt)))
                index.append(offsets[i] + np.arange(len(of_prompt)))
                targets.append(of_prompt)
        return LogprobStep(wanted, np.concatenate(index), np.concatenate(targets)) if wanted else None


class DeviceLogprobs(NamedTuple):
    """Results on their way to the host, to be read when the step is done. words: [n, 1 + 2k] int32, `core.Logprobs` of
    as many alternatives as any of them wants."""

    step: LogprobStep
    words: Tensor

    def result(self) -> dict[int, Logprobs]:
        """By key of what was wanted."""
        words, results, begin = self.words.numpy(), {}, 0
        for key, num_top, num in self.step.wanted:
            results[key] = words[begin : begin + num, : 1 + 2 * num_top].tobytes()
            begin += num
        return results


def gather_logprobs(
    step: LogprobStep, logits_of: Callable[[Tensor], Tensor], ids: Tensor | None, ops: StepOps, device: torch.device
) -> DeviceLogprobs:
    """ids: of all samples, which `step.index` counts; None: the tokens are `step.targets`.

    logits_of: [m] int64 of `step.index` → logits, valid until the next call: of all samples, or where ids are None of
    these m. The copies to the host are not waited for."""
    parts, num_top = [], max(wanted.num_top for wanted in step.wanted)
    index = step.on_device = to_device(step.index, device) if step.on_device is None else step.on_device
    if ids is None:
        ids = to_device(step.targets, device)
    elif len(ids) > len(index):
        ids = ids.index_select(0, index)
    for first in range(0, len(index), ROWS_AT_ONCE):
        rows, targets = (column[first : first + ROWS_AT_ONCE] for column in (index, ids))
        logits = logits_of(rows)
        rows = torch.arange(len(rows), device=device) if len(step.targets) else rows
        parts.append(ops.logprobs(logits, rows, targets, num_top))
    words = parts[0] if len(parts) == 1 else torch.cat(parts)
    return DeviceLogprobs(step, words.to("cpu", non_blocking=True))  # such copies go to pinned memory
