"""Sampling: the parameters of each row, and in plain torch what our kernels must agree with.

Filters apply in the field's usual order: temperature, top-k, top-p (of what top-k left), min-p (relative to the most
probable token). One uniform number per token, a function of the request's seed and the token's position, picks from
the filtered distribution by inverting its CDF. A row's token depends on that row alone: not on the batch, on
retraction, or on the number of ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Tensor = torch.Tensor
Words = npt.NDArray[np.int32]

NUM_PLACES = 5
ROWS_AT_ONCE = 32  # of the reference: a row takes about fifty bytes per token of the vocabulary


# A row's record: `struct SamplingParams` of `csrc/include/minisgl/sampling_params.h`. Wide columns come first. Of each
# its type, and the neutral value: that in rows that belong to nobody, and of what `SamplingParams` has not.
COLUMNS: Mapping[str, tuple[type[np.generic], float]] = {
    "seed": (np.int64, 0),
    "position": (np.int64, 1),  # of the token to be sampled
    "temperature": (np.float32, 0),  # 0: greedy
    "top_p": (np.float32, 1),  # 1: off
    "min_p": (np.float32, 0),  # 0: off
    "top_k": (np.int32, 0),  # 0: off
    "repetition_penalty": (np.float32, 1),  # 1: off
    "presence_penalty": (np.float32, 0),  # 0: off
    "frequency_penalty": (np.float32, 0),  # 0: off
    "prompt_len": (np.int32, 0),  # tokens of its history that are no output
    "min_len": (np.int32, 0),  # tokens before which those that end the output are forbidden
    "mask": (np.int32, -1),  # of a GPU's step: by its place in `TokenStore.places`; -1: it has none
}
RECORD = np.dtype([(name, dtype) for name, (dtype, _) in COLUMNS.items()], align=True)
NUM_WORDS = RECORD.itemsize // 4


def records(num: int, **values: npt.ArrayLike) -> Words:
    """[num, NUM_WORDS]: `num` records, of neutral values but for these: one for all rows, or one for each.
    What is too large for a column of integers becomes the largest number that it holds."""
    table = np.zeros(num, RECORD)
    for name, (dtype, neutral) in COLUMNS.items():
        value = values.pop(name, neutral)
        table[name] = np.minimum(value, np.iinfo(dtype).max) if issubclass(dtype, np.integer) else value
    assert not values, f"there are no such columns: {values}"
    return table.view(np.int32).reshape(num, NUM_WORDS)


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """The parameters of n rows. words: [n, NUM_WORDS] int32, their records one after the other, on any device."""

    words: Tensor

    @staticmethod
    def of(num: int, device: str = "cpu", /, **values: npt.ArrayLike) -> "SamplingColumns":
        return SamplingColumns(torch.from_numpy(records(num, **values)).to(device))

    def __getitem__(self, name: str) -> Tensor:
        """[n]: a column, as a view of the records."""
        dtype, offset, *_ = RECORD.fields[name]  # type: ignore[index]
        return self.words.view(getattr(torch, dtype.name))[:, offset // dtype.itemsize]

    def select(self, index: Tensor) -> "SamplingColumns":
        return SamplingColumns(self.words.index_select(0, index))


class TokenStore(NamedTuple):
    """Where sampled ids become input of later steps: token_ids[rows[i], position of i]. And rules that a GPU knows.

    places: addresses: of `bounds`, `ids` and `values` of `engine.rules.StepRules`, one after the other in int32 words,
    and of the words, states and ids of `core.Masks` in pinned memory. Then 0: when the first row began to wait.
    """

    token_ids: Tensor  # [num_rows, max_len] int32
    rows: Tensor  # [n] int32; int64 on a CPU
    places: Tensor | None = None  # [NUM_PLACES] int64


def sample_reference(logits: Tensor, columns: SamplingColumns, out: Tensor) -> Tensor:
    """Write to `out` [n] int32 a token for each row of `logits` [n, vocab]; -1 where its largest logit is not finite.
    Nothing depends on values, so that a CUDA graph can hold it."""
    for first in range(0, len(logits), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        out[part] = _sample(logits[part], SamplingColumns(columns.words[part])).int()
    return out


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """[n] int64 each → [n] float64 in [0, 1): splitmix64 (Steele et al., OOPSLA 2014), 52 bits of it."""
    return _shift_right(_mix(_mix(seed) ^ position), 12).double() * 2.0**-52


def _mix(x: Tensor) -> Tensor:
    """Products wrap as those of unsigned integers do; the constants are given as signed ones."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, shift: int) -> Tensor:
    return (x >> shift) & (2 ** (64 - shift) - 1)


def _sample(logits: Tensor, columns: SamplingColumns) -> Tensor:
    best, greedy = logits.max(dim=-1)  # a NaN counts as the largest
    finite, temperature = best.isfinite(), columns["temperature"]
    scale = temperature.where(temperature > 0, 1.0)
    weights = (logits.float() - best.float()[:, None]).div_(scale[:, None]).exp_()
    cdf = filter_weights(logits, weights.where(finite[:, None], 1.0), columns).cumsum(-1, dtype=torch.float64)
    target = uniform(columns["seed"], columns["position"])[:, None] * cdf[:, -1:]
    place = torch.searchsorted(cdf, target, right=True).clamp_(max=logits.shape[1] - 1)
    return place[:, 0].where(temperature > 0, greedy).where(finite, -1)


def filter_weights(logits: Tensor, weights: Tensor, columns: SamplingColumns) -> Tensor:
    """`weights`, zero where the filters drop the token; of equal logits the lower ids come first. All [n, vocab]."""
    vocab_size, top_k, top_p = logits.shape[1], columns["top_k"], columns["top_p"]
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices
    top = weights.gather(1, order)
    limit_k = top_k.long().where(top_k > 0, vocab_size)[:, None]
    top = top.where(torch.arange(vocab_size, device=logits.device) < limit_k, 0)
    mass = top.cumsum(-1, dtype=torch.float64)
    in_top_p = (mass - top < top_p.double()[:, None] * mass[:, -1:]) | (top_p >= 1)[:, None]  # mass before the token
    in_top_p[:, 0] = True  # a top-p too small for its float32 is 0
    in_min_p = top >= columns["min_p"][:, None] * top[:, :1]
    return torch.zeros_like(weights).scatter_(1, order, top.where(in_top_p & in_min_p, 0))


def penalize(logits: Tensor, columns: SamplingColumns, history: Tensor) -> None:
    """In place. history: [m, longest] int64, what is known of each row and what is not."""
    names = "repetition_penalty", "frequency_penalty", "presence_penalty", "prompt_len", "position"
    repetition, frequency, presence, start, end = (columns[name][:, None] for name in names)
    place = torch.arange(history.shape[1], device=logits.device)
    known, of_output = (
        torch.zeros_like(logits).scatter_add_(1, history, (where & (place < end)).float())
        for where in (place >= 0, place >= start)
    )
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits.copy_(scaled.where(known > 0, logits) - frequency * of_output - presence * (of_output > 0))
