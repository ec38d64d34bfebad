"""What happens to some rows' logits before a token is sampled from them.

Per row: repetition, presence and frequency penalties, then `logit_bias`, then the tokens that are forbidden (ends of
the output before `min_tokens`, and what a bitmask leaves out). Kernels do so while they sample; their reference, for
devices that have none, is here and in `kernel.sampling`. Sums are in float32. A row's history is read from the engine's
token table, so nothing is kept that an abort or a retraction could leave behind.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from minisgl.attention.base import IntArray, Tensor, to_device
from minisgl.core import MASK_READY, MAX_COUNT, NOT_READY, Admission, Masks
from minisgl.kernel.ops import StepOps
from minisgl.kernel.sampling import SamplingColumns, TokenStore, penalize

ROWS_AT_ONCE = 64  # a row takes up to 24 bytes per token of the vocabulary
NO_MASK = -1
_ENTRY = np.dtype([("id", np.int32), ("value", np.float32)])


class StepRules(NamedTuple):
    """What changes the logits of n rows that sample, beside penalties, which their records have. On the host.

    To the logits of row i of the engine's tables the entries from bounds[i] to bounds[i + 1] are added; -inf, which
    come first, only where its position is below its `min_len`."""

    rows: IntArray  # [n] of the engine's tables
    positions: IntArray  # [n] of the tokens to be sampled
    bounds: Tensor  # [num_rows + 1] int64
    ids: Tensor  # int32
    values: Tensor  # float32
    masks: Tensor | None = None  # [k, ceil(vocab / 32)] int32: `core.Masks`
    mask_of: Tensor | None = None  # [n] int32: which of them a row has; or NO_MASK, or NOT_READY


class LogitRules:
    """The rules of the running requests, by row of the engine's tables. On the host."""

    def __init__(self, num_rows: int) -> None:
        self._until = np.zeros(num_rows, np.int64)  # the position from which on a row's logits stay as they are
        self._entries = [np.empty(0, _ENTRY)] * num_rows
        self.lists = _together(self._entries)  # `bounds`, `ids` and `values`

    def apply(self, admissions: Iterable[Admission]) -> None:
        """Remember what newly admitted requests ask for, and forget who had their rows before."""
        has_lists = False
        for row, _, params, prompt_len, end_ids in admissions:
            least = min(prompt_len + params.min_tokens, MAX_COUNT) if params.min_tokens else 0
            penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1
            self._until[row] = MAX_COUNT if any(penalties) or params.logit_bias else least
            ends = [(token, -np.inf) for token in end_ids if least]
            before, self._entries[row] = self._entries[row], np.array([*ends, *params.logit_bias], _ENTRY)
            has_lists |= len(before) + len(self._entries[row]) > 0
        if has_lists:
            self.lists = _together(self._entries)

    def step(self, rows: IntArray, positions: IntArray, masked: Sequence[int], masks: Masks | None) -> StepRules | None:
        """What is done to the logits of the rows that sample, for tokens at these positions; mostly nothing."""
        if not masked or masks is None:
            return StepRules(rows, positions, *self.lists) if masked or (positions < self._until[rows]).any() else None
        words, states = np.empty(masks.shape, np.int32), np.zeros(len(masked), np.int32)
        masks(words, states, None)
        mask_of = np.full(len(rows), NO_MASK, np.int32)
        mask_of[list(masked)] = [i if state == MASK_READY else NOT_READY for i, state in enumerate(states.tolist())]
        return StepRules(rows, positions, *self.lists, torch.from_numpy(words), torch.from_numpy(mask_of))

    def sample(
        self, ops: StepOps, logits: Tensor, columns: SamplingColumns, ids: Tensor, store: TokenStore, rules: StepRules,
        is_captured: bool,
    ) -> None:  # fmt: skip
        """Into `ids` and `store`, n rows of logits. Where the step was captured `ids` are there: those with rules or
        masks are sampled again, and no other row pays for them. Where no kernel does it, that is done with changed
        copies of their logits."""
        if not is_captured and ops.by_kernel("sample", logits, columns.words, ids, *store[:2], *rules[2:]):
            return
        if not is_captured:
            ops.sample(logits, columns, ids)
        mask_of = np.array(NO_MASK) if rules.mask_of is None else rules.mask_of.numpy()
        has_rules = (rules.positions < self._until[rules.rows]) | (mask_of != NO_MASK)
        found = np.flatnonzero(has_rules)
        for first in range(0, len(found), ROWS_AT_ONCE):
            samples = found[first : first + ROWS_AT_ONCE]
            index, changed = to_device(samples, ids.device), self.changed(logits, columns, store, rules, samples)
            ids.index_copy_(0, index, ops.sample(changed, columns.select(index), torch.empty_like(ids[: len(index)])))
        if NOT_READY in mask_of:
            ids.masked_fill_(to_device(mask_of == NOT_READY, ids.device), NOT_READY)
        ops.store_ids(*store[:2], columns["position"], ids)

    def changed(
        self, logits: Tensor, columns: SamplingColumns, store: TokenStore, rules: StepRules, samples: IntArray
    ) -> Tensor:
        """logits: [n, vocab] of all rows that sample → [m, vocab]: what `samples` are to be sampled from, in a copy.
        float32, unless tokens are only masked: then in the logits' own type, of which less is to be read."""
        device, rows = logits.device, rules.rows[samples]
        index = to_device(samples, device)
        changed, some = logits.index_select(0, index), columns.select(index)
        num_known = int(rules.positions[samples][self._until[rows] == MAX_COUNT].max(initial=0))  # 0: has no penalties
        entries, counts = [self._entries[row] for row in rows], [len(self._entries[row]) for row in rows]
        if num_known or any(counts):
            changed = changed.float()
        if num_known:
            penalize(changed, some, store.token_ids[store.rows[index].long(), :num_known].long())
        if any(counts):
            of, table = to_device(np.arange(len(rows)).repeat(counts), device), np.concatenate(entries)
            values = to_device(table["value"].copy(), device)
            is_free = (some["position"] >= some["min_len"])[of] & values.isinf()
            tokens = to_device(table["id"].astype(np.int64), device)
            changed.index_put_((of, tokens), values.masked_fill(is_free, 0), accumulate=True)
        if rules.masks is not None and rules.mask_of is not None:
            mask_of = rules.mask_of.numpy()[samples, None]
            words = np.where(mask_of >= 0, rules.masks.numpy()[mask_of[:, 0].clip(0)], -1)
            apply_bitmask(changed, to_device(words, device))
        return changed


def _together(entries: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    bounds, table = np.cumsum([0, *map(len, entries)]), np.concatenate(entries)
    ids, values = table["id"].copy(), table["value"].copy()
    return torch.from_numpy(bounds), torch.from_numpy(ids), torch.from_numpy(values)


def apply_bitmask(logits: Tensor, words: Tensor) -> None:
    """In place: logits[i, t] = -inf where bit t % 32 of words[i, t // 32] is not set. words: int32."""
    shifts = torch.arange(8, device=logits.device, dtype=torch.uint8)
    missing = words.bitwise_not().view(torch.uint8)[:, :, None] >> shifts  # the lowest byte of a word comes first
    logits.masked_fill_(missing.bitwise_and_(1).view(torch.bool).flatten(1)[:, : logits.shape[1]], float("-inf"))
