"""What happens to some rows' logits before a token is sampled from them, and what is reported of them afterwards.

Per row: repetition, presence and frequency penalties, then `logit_bias`, then the tokens that are forbidden (ends of
the output before `min_tokens`, and what a bitmask leaves out). All in float32, in plain torch on the logits' device;
the history of a row is read from the engine's token table, so nothing is kept that an abort or a retraction could
leave behind. A step without such rows pays for the look-up of its rows in an empty dictionary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minisgl.attention.base import IntArray
from minisgl.core import Admission, SamplingParams, TokenBitmask

Tensor = torch.Tensor


class _Rules(NamedTuple):
    """What a running request asks for beyond plain sampling."""

    params: SamplingParams
    prompt_len: int
    end_ids: tuple[int, ...]
    min_len: int  # tokens before which none of `end_ids` may come


@dataclass(frozen=True, slots=True)
class LogitStep:
    """One step's rows whose logits are changed. m of them; `samples` are indices into the rows that sample."""

    samples: IntArray  # [m], ascending
    rows: IntArray  # [m] of the token table
    positions: IntArray  # [m] of the token to be sampled
    prompt_lens: IntArray  # [m]
    penalties: npt.NDArray[np.float32] | None  # [3, m]: repetition, presence, frequency; None: nobody has any
    bias: tuple[IntArray, IntArray, npt.NDArray[np.float32]]  # which of the m, token, what is added
    forbidden: tuple[IntArray, IntArray]  # which of the m, token
    masked: tuple[IntArray, npt.NDArray[np.int32]] | None  # which of the m, and their packed bitmasks


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

    def step(self, rows: IntArray, positions: IntArray, bitmask: TokenBitmask | None) -> LogitStep | None:
        """What is to be done to the logits of the rows that sample, for tokens at these positions. None: nothing."""
        raise NotImplementedError


def process(logits: Tensor, step: LogitStep, token_ids: Tensor) -> Tensor:
    """logits: [n, vocab] of all rows that sample; token_ids: [rows, tokens] int32, the engine's token table.

    → [m, vocab] float32, what `step.samples` are to be sampled from.
    """
    raise NotImplementedError


def apply_bitmask(logits: Tensor, index: Tensor, words: Tensor) -> None:
    """In place: logits[index[i], t] = -inf where bit t of words[i] is not set. index: [k]; words: [k, ...] int32."""
    raise NotImplementedError
