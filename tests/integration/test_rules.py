"""What the engine does to logits, against transformers' processors and plain definitions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from minisgl.core import Admission, Masks, SamplingParams
from minisgl.engine.rules import ROWS_AT_ONCE, LogitRules, apply_rules

VOCAB = 70  # no multiple of 32
PROMPT, OUTPUT = [5, 6, 5, 7, 60], [8, 5, 8, 8]


def logits(num: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def changed(source: torch.Tensor, masks: Masks | None = None, **params: Any) -> torch.Tensor | None:
    """What row 2 of an engine samples from, after `PROMPT` and `OUTPUT`."""
    rules, tokens = LogitRules(), torch.randint(VOCAB, (4, 32), dtype=torch.int32)
    known = np.array(PROMPT + OUTPUT, np.int32)
    tokens[2, : len(known)] = torch.from_numpy(known)  # what follows is left from other requests
    ends = params.pop("end_ids", ())
    rules.apply([Admission(2, known[: len(PROMPT)], SamplingParams(seed=0, **params), len(PROMPT), ends)])
    steps = rules.steps(np.array([2]), np.array([len(known)]), (0,) if masks is not None else (), masks)
    return apply_rules(source, steps[0], tokens) if steps else None


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
    found = changed(source, min_tokens=min_tokens, end_ids=(9, 11))
    assert torch.equal(source if found is None else found, expected)
    assert (found is None) == (min_tokens == len(OUTPUT))  # free again as soon as nothing is forbidden


def test_a_bitmask_forbids_what_it_leaves_out_and_nothing_undoes_it() -> None:
    allowed = np.random.default_rng(0).random(VOCAB) < 0.4
    allowed[[3, 31]] = False, True
    bits = np.packbits(np.pad(allowed, (0, 96 - VOCAB)), bitorder="little").view(np.int32)
    source = logits()
    found = changed(source, bits[None], logit_bias=((3, 100.0), (31, 1.0)))
    expected = source.clone()
    expected[0, 31] += 1
    expected[0, ~torch.from_numpy(allowed)] = float("-inf")
    assert found is not None
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitmasks_of_several_rows(dtype: torch.dtype) -> None:
    """Of some rows, in any order, and of all; what is only forbidden stays in the logits' own type."""
    rng = np.random.default_rng(2)
    words = rng.integers(-(2**31), 2**31, (3, 3)).astype(np.int32)
    allowed = (words.view(np.uint32)[:, :, None] >> np.arange(32, dtype=np.uint32) & 1).reshape(3, -1)[:, :VOCAB] > 0
    source, tokens, rows = logits(4).to(dtype), torch.zeros(4, 8, dtype=torch.int32), np.arange(4)
    for samples in ((0, 2, 3), (3, 1, 0), (0, 1, 2)):
        (step,) = LogitRules().steps(rows, rows + 1, samples, words)
        found = apply_rules(source, step, tokens)
        assert found.dtype == dtype
        assert step.samples.tolist() == sorted(samples)
        for row, sample in zip(found, step.samples, strict=True):
            expected = source[sample].masked_fill(~torch.from_numpy(allowed[samples.index(sample)]), float("-inf"))
            assert torch.equal(row, expected)
    rules = LogitRules()
    rules.apply([Admission(1, np.array([1], np.int32), SamplingParams(seed=0, logit_bias=((2, 1.0),)), 1)])
    (step,) = rules.steps(rows, rows + 1, (3,), words[:1])
    found = apply_rules(source, step, tokens)
    assert found.dtype == torch.float32
    assert torch.equal(found[1], source[3].float().masked_fill(~torch.from_numpy(allowed[0]), float("-inf")))


def test_rows_in_any_mix_are_treated_as_alone() -> None:
    """More rows than are processed at once, most of them plain; half precision is widened first."""
    rng, num = np.random.default_rng(1), 3 * ROWS_AT_ONCE
    kinds: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.7},
        {"frequency_penalty": 1.0, "min_tokens": 20},
        {"presence_penalty": 0.5, "logit_bias": ((1, 4.0),)},
    ]
    rules, tokens = LogitRules(), torch.randint(VOCAB, (num, 40), dtype=torch.int32)
    chosen = [kinds[i] for i in rng.integers(0, 4, num)]
    prompt_lens, positions = rng.integers(1, 10, num), rng.integers(10, 30, num)
    admissions = [
        Admission(i, tokens[i, :n].numpy(), SamplingParams(seed=0, **kind), int(n), (2, 3))
        for i, (kind, n) in enumerate(zip(chosen, prompt_lens, strict=True))
    ]
    rules.apply(admissions)
    rows = rng.permutation(num)[: num - 5]
    source = logits(len(rows)).bfloat16()
    steps = rules.steps(rows, positions[rows], (), None)
    assert max(len(step.samples) for step in steps) <= ROWS_AT_ONCE
    together = {
        int(s): row for step in steps for s, row in zip(step.samples, apply_rules(source, step, tokens), strict=True)
    }
    for sample, row in enumerate(rows):
        alone = LogitRules()
        alone.apply([admissions[row]])
        (*step,) = alone.steps(np.array([row]), positions[[row]], (), None)
        assert (sample in together) == bool(step)
        if step:
            expected = apply_rules(source[sample : sample + 1].float(), step[0], tokens)[0]
            torch.testing.assert_close(together[sample], expected)


def test_rows_of_plain_requests_need_nothing_and_forget_who_was_there_before() -> None:
    rules, ids = LogitRules(), np.array(PROMPT, np.int32)
    rows = np.arange(4), np.full(4, 9)
    assert rules.steps(*rows, (), None) == []
    rules.apply([Admission(1, ids, SamplingParams(seed=0, presence_penalty=1.0), len(ids))])
    assert [step.samples.tolist() for step in rules.steps(*rows, (), None)] == [[1]]
    rules.apply([Admission(1, ids, SamplingParams(seed=0), len(ids))])
    assert rules.steps(*rows, (), None) == []
