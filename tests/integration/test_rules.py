"""What is done to logits before tokens are sampled from them: in torch against transformers' processors and plain
definitions, and our CPU kernels against that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from minisgl.core import MASK_NOT_READY, MASK_READY, NOT_READY, Admission, Masks, SamplingParams, ScheduledReq, StepPlan
from minisgl.engine.rules import ROWS_AT_ONCE, StepRules
from minisgl.engine.tables import RowTables, StepIndex
from minisgl.kernel.ops import StepOps, TorchOps
from minisgl.kernel.sampling import SamplingColumns, TokenStore
from tests.integration.test_cpu_kernels import TARGET, cpu_ops, narrower

VOCAB = 70  # no multiple of 32
PROMPT, OUTPUT = [5, 6, 5, 7, 60], [8, 5, 8, 8]


def logits(num: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


class Rows:
    """What an engine remembers of requests by row."""

    def __init__(self, num: int, length: int = 32, vocab: int = VOCAB) -> None:
        self.host = RowTables(num, length, 16)
        self.tokens = torch.randint(vocab, (num, length), generator=torch.Generator().manual_seed(1)).int()

    def admit(self, row: int, prompt_len: int, end_ids: tuple[int, ...] = (), **params: Any) -> None:
        known = self.tokens[row, :prompt_len].numpy()
        admission = Admission(row, known, SamplingParams(**({"seed": row} | params)), prompt_len, end_ids)
        self.host.apply(StepPlan(0, (admission,), (), ()))

    def step(
        self, rows: Sequence[int], positions: Sequence[int], masked: Sequence[int] = (), masks: Masks | None = None
    ) -> tuple[SamplingColumns, TokenStore, StepRules | None]:
        reqs = [ScheduledReq(row, int(position) - 1, 1, 1) for row, position in zip(rows, positions, strict=True)]
        index = StepIndex.of(reqs)
        columns = SamplingColumns(torch.from_numpy(self.host.sampling(index, masked)))
        rules = self.host.logit_rules.step(index.sample_rows, index.sample_positions, masked, masks)
        return columns, TokenStore(self.tokens, torch.from_numpy(index.sample_rows)), rules

    def changed(self, source: torch.Tensor, *step: Any) -> torch.Tensor:
        columns, store, rules = self.step(*step)
        if rules is None:
            return source
        return self.host.logit_rules.changed(source, columns, store, rules, np.arange(len(source)))

    def sample(self, ops: StepOps, source: torch.Tensor, *step: Any) -> torch.Tensor:
        columns, store, rules = self.step(*step)
        ids = torch.full((len(source),), -7, dtype=torch.int32)
        if rules is None:
            return ops.sample(source, columns, ids, store)
        self.host.logit_rules.sample(ops, source, columns, ids, store, rules, False)
        return ids


class Given:
    """Masks of samples that somebody has computed. missing: those that are not ready."""

    def __init__(self, words: np.ndarray, *missing: int) -> None:
        num, num_words = words.shape
        self.shape, self._words = (num, num_words), words
        self._states = np.where(np.isin(np.arange(num), missing), MASK_NOT_READY, MASK_READY)

    def __call__(self, words: np.ndarray, states: np.ndarray, ids: np.ndarray | None) -> None:
        words[:], states[:] = self._words, self._states


def changed(source: torch.Tensor, masks: Given | None = None, **params: Any) -> torch.Tensor:
    """What row 2 of an engine samples from, after `PROMPT` and `OUTPUT`, behind which others have left tokens."""
    rows, known = Rows(4), torch.tensor(PROMPT + OUTPUT)
    rows.tokens[2, : len(known)] = known
    rows.admit(2, len(PROMPT), **params)
    return rows.changed(source, [2], [len(known)], (0,) if masks is not None else (), masks)


def test_repetition_penalty_equals_transformers() -> None:
    source, ids = logits(), torch.tensor([PROMPT + OUTPUT])
    for penalty in (0.5, 1.3):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, source.clone())
        torch.testing.assert_close(changed(source, repetition_penalty=penalty), expected)


def test_presence_and_frequency_are_openai_s_formula() -> None:
    source, counts = logits(), Counter(OUTPUT)
    expected = source.clone()
    for token, count in counts.items():
        expected[0, token] -= 0.7 * count - 1.5
    torch.testing.assert_close(changed(source, frequency_penalty=0.7, presence_penalty=-1.5), expected)


def test_biases_are_added() -> None:
    source, expected = logits(), logits()
    expected[0, 3] += 100
    expected[0, 9] -= 2.5
    torch.testing.assert_close(changed(source, logit_bias=((3, 100), (9, -2.5))), expected)


@pytest.mark.parametrize("min_tokens", [4, 5])
def test_min_tokens_equals_transformers(min_tokens: int) -> None:
    source, ids = logits(), torch.tensor([PROMPT + OUTPUT])
    expected = MinNewTokensLengthLogitsProcessor(len(PROMPT), min_tokens, [9, 11])(ids, source.clone())
    assert torch.equal(changed(source, min_tokens=min_tokens, end_ids=(9, 11)), expected)
    expected[0, 4] += 1  # an end's ban does not outlive its time where other rules go on
    assert torch.equal(changed(source, min_tokens=min_tokens, end_ids=(9, 11), logit_bias=((4, 1.0),)), expected)


def test_a_bitmask_forbids_what_it_leaves_out_and_nothing_undoes_it() -> None:
    allowed = np.random.default_rng(0).random(VOCAB) < 0.4
    allowed[[3, 31]] = False, True
    bits = np.packbits(np.pad(allowed, (0, 96 - VOCAB)), bitorder="little").view(np.int32)
    source = logits()
    found = changed(source, Given(bits[None]), logit_bias=((3, 100.0), (31, 1.0)))
    expected = source.clone()
    expected[0, 31] += 1
    expected[0, ~torch.from_numpy(allowed)] = float("-inf")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitmasks_of_several_rows(dtype: torch.dtype) -> None:
    """Of some rows, in any order, and of all; what is only forbidden stays in the logits' own type."""
    rng = np.random.default_rng(2)
    words = rng.integers(-(2**31), 2**31, (3, 3)).astype(np.int32)
    allowed = (words.view(np.uint32)[:, :, None] >> np.arange(32, dtype=np.uint32) & 1).reshape(3, -1)[:, :VOCAB] > 0
    source, rows = logits(4).to(dtype), Rows(4)
    for samples in ((0, 2, 3), (3, 1, 0), (0, 1, 2)):
        found = rows.changed(source, range(4), range(1, 5), samples, Given(words))
        assert found.dtype == dtype
        for sample, row in enumerate(found):
            banned = ~torch.from_numpy(allowed[samples.index(sample)]) if sample in samples else torch.tensor(False)
            assert torch.equal(row, source[sample].masked_fill(banned, float("-inf")))
    rows.admit(1, 1, logit_bias=((2, 1.0),))
    found = rows.changed(source, range(4), range(1, 5), (3,), Given(words[:1]))
    assert found.dtype == torch.float32
    assert torch.equal(found[3], source[3].float().masked_fill(~torch.from_numpy(allowed[0]), float("-inf")))


KINDS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"frequency_penalty": 1.0, "min_tokens": 20, "end_ids": (2, 3)},
    {"presence_penalty": 0.5, "logit_bias": ((1, 4.0), (4, -3.0))},
    {"min_tokens": 8, "end_ids": (0, 2, 3)},
    {"logit_bias": tuple((token, 0.1 * token) for token in range(5)) * 3, "repetition_penalty": 0.6},
]


def spoilt(source: torch.Tensor) -> tuple[Given, tuple[int, ...]]:
    """Make some of 64 rows of logits not finite, in place. → masks, one not there yet, and the rows that have them."""
    num, vocab = source.shape
    rng = np.random.default_rng(3)
    source[1], source[2, vocab // 2 :] = 0.0, -torch.inf
    source[3, 4], source[4, 0], source[5] = torch.nan, torch.inf, -torch.inf
    source[6, 1], source[7, 1], source[8, 1] = 9.0, torch.nan, torch.inf  # which a mask forbids
    words = rng.integers(-(2**31), 2**31, (num, -(-vocab // 32))).astype(np.int32)
    words[:, 0] = (words[:, 0] | 1) & ~2
    words[9] = 0  # nothing is allowed
    masked = (6, 7, 8, 9, 10, 11, 12, 13, 20, *range(30, 50))
    return Given(words[: len(masked)], 8), masked


def mixed_rows(num: int, vocab: int = VOCAB, **params: Any) -> tuple[Rows, list[int]]:
    """Rows of all kinds, with positions of tokens to be sampled."""
    rng, rows = np.random.default_rng(1), Rows(num, 40, vocab)
    for row, kind in enumerate(rng.integers(0, len(KINDS), num)):
        rows.admit(row, int(rng.integers(1, 10)), **KINDS[kind], **params)
    return rows, rng.integers(10, 30, num).tolist()


def test_rows_in_any_mix_are_treated_as_alone() -> None:
    """More rows than are processed at once, most of them plain; half precision is widened first."""
    num = 3 * ROWS_AT_ONCE
    rows, positions = mixed_rows(num)
    order = np.random.default_rng(2).permutation(num)[: num - 5].tolist()
    source = logits(len(order)).bfloat16()
    together = rows.changed(source, order, [positions[row] for row in order])
    ids = rows.sample(TorchOps(), source, order, [positions[row] for row in order])
    for sample, row in enumerate(order):  # whose histories end before the ids that were stored
        alone = rows.changed(source[sample : sample + 1].float(), [row], [positions[row]])
        torch.testing.assert_close(together[sample], alone[0])
        assert rows.sample(TorchOps(), source[sample : sample + 1], [row], [positions[row]]) == ids[sample]


def test_rows_of_plain_requests_need_nothing_and_forget_who_was_there_before() -> None:
    rows = Rows(4)
    assert rows.step(range(4), [9] * 4)[2] is None
    for params in ({"presence_penalty": 1.0}, {"logit_bias": ((1, 2.0),)}, {"min_tokens": 9, "end_ids": (1,)}):
        rows.admit(1, 5, **params)
        found = rows.changed(source := logits(4), range(4), [9] * 4)
        assert [not torch.equal(*pair) for pair in zip(found, source, strict=True)] == [False, True, False, False]
        rows.admit(1, 5)
        assert rows.step(range(4), [9] * 4)[2] is None


@pytest.mark.parametrize("ops", [TorchOps(), cpu_ops(2, TARGET)], ids=["torch", "kernels"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_alone_is_allowed_is_taken_if_its_logit_is_a_number(ops: StepOps, temperature: float) -> None:
    rows, source, words = Rows(7), logits(7), np.zeros((7, 3), np.uint32)
    for row, token in enumerate((0, 31, 32, VOCAB - 1, 7, 8, 9)):
        rows.admit(row, 5, temperature=temperature)
        words[row, token // 32] = 1 << token % 32
    words[3, 2] |= 1 << 31  # beyond the vocabulary
    source[0, 1:], source[1, 0], source[2, 3] = torch.nan, torch.inf, 1e30  # nobody looks at those
    source[4, 7], source[5, 8], source[6, 9] = torch.nan, torch.inf, -torch.inf
    masked = tuple(range(7))
    ids = rows.sample(ops, source, range(7), [9] * 7, masked, Given(words.view(np.int32)))
    assert ids.tolist() == [0, 31, 32, VOCAB - 1, -1, -1, -1]


@pytest.mark.parametrize("target", [TARGET, *narrower()])
@pytest.mark.parametrize("vocab", [5, VOCAB, 4096, 50_001])
@pytest.mark.parametrize(
    "given", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.8, "temperature": 0.7}, {"min_p": 0.1}], ids=str
)
def test_kernels_sample_what_the_reference_does(given: dict[str, float], vocab: int, target: str) -> None:
    """Rows of all kinds, some of them masked, not ready or not finite; the logits are as before, the ids are stored."""
    num = 64
    rows, positions = mixed_rows(num, min(vocab, 40), **given)
    source = torch.randn(num, vocab, generator=torch.Generator().manual_seed(vocab)) * 0.5
    masks, masked = spoilt(source)
    before, tokens = source.clone(), rows.tokens.clone()
    theirs = rows.sample(TorchOps(), source, range(num), positions, masked, masks)
    stored, rows.tokens[:] = rows.tokens.clone(), tokens
    mine = rows.sample(cpu_ops(2, target), source, range(num), positions, masked, masks)
    assert (mine != theirs).sum() <= (0 if not given.get("temperature", 1) else 1), "a sum may fall on the other side"
    assert mine[20] == NOT_READY
    assert torch.equal(source.view(torch.int32), before.view(torch.int32))
    assert (rows.tokens != stored).sum() <= 1
    place = torch.arange(num), torch.tensor(positions)
    assert torch.equal(rows.tokens[place], mine.clamp(min=0))


@pytest.mark.parametrize("ops", [TorchOps(), cpu_ops(2)], ids=["torch", "kernels"])
def test_samples_of_one_row_see_the_tokens_that_stand_before_them(ops: StepOps) -> None:
    """As with drafts: the ids are not written over them before all have been looked at."""
    rows, positions = Rows(2), [10, 11, 12, 13]
    rows.admit(1, 4, temperature=0.0, frequency_penalty=2.0, repetition_penalty=1.5)
    source, tokens = torch.zeros(4, VOCAB), rows.tokens.clone()
    source[:, tokens[1, 9:13].long()] = 1.0  # each token of the draft would be sampled but for its penalty
    source[:, 64] = 0.25
    together = rows.sample(ops, source, [1] * 4, positions)
    assert torch.equal(rows.tokens[1, 10:14], together)
    for i, position in enumerate(positions):
        rows.tokens[:] = tokens
        assert rows.sample(ops, source[i : i + 1], [1], [position]) == together[i]


@pytest.mark.parametrize("target", [TARGET, *narrower()])
@pytest.mark.parametrize("vocab", [3, 130, 50_001])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_log_probabilities_are_the_reference_s(num_top: int, vocab: int, target: str) -> None:
    source = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    source[1, :], source[2, vocab // 2 :] = 0.5, -torch.inf
    source[3] = torch.arange(vocab) / vocab  # each is larger than all before
    source[4, 1], source[5, 1], source[6] = torch.nan, torch.inf, -torch.inf
    rows = torch.tensor([8, 0, 1, 2, 3, 3, 7])
    targets = (torch.arange(len(rows)) % vocab).int()
    targets[0] = -1  # of a row that failed
    mine, theirs = (ops.logprobs(source, rows, targets, num_top) for ops in (cpu_ops(2, target), TorchOps()))
    assert mine.shape == theirs.shape == (len(rows), 1 + 2 * min(num_top, vocab))
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(*(some.view(torch.float32)[:, ::2] for some in (mine, theirs)), atol=1e-5, rtol=1e-6)
    order = source[rows].sort(dim=-1, descending=True, stable=True).indices  # of equal ones the first
    assert torch.equal(mine[:, 1::2].long(), order[:, :num_top])
    words = cpu_ops(2, target).logprobs(source, torch.tensor([4, 5, 6]), torch.zeros(3).int(), num_top)
    assert words.view(torch.float32)[:, ::2].isnan().all()
    assert (words[:, 1::2] == 0).all()


def test_one_mask_that_is_not_ready_changes_nothing_else() -> None:
    """Where torch samples: the row's logits stay as they are, and its token says so."""
    rows, source = Rows(1), logits()
    found = rows.sample(TorchOps(), source, [0], [5], (0,), Given(np.zeros((1, 3), np.int32), 0))
    assert found.tolist() == [NOT_READY]
