"""`tests/near_ties.py` accepts whatever rounding can do to an output, and little else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from minisgl import SamplingParams
from minisgl.kernel.sampling import SamplingColumns, filter_weights, sample_reference
from tests.gpu.soak import KINDS
from tests.models import hf_logits, random_prompt, tiny_model
from tests.near_ties import EPS, check_answer, explained, kept_bounds

NUM, VOCAB, FIRST = 400, 512, 17
FILTERED = SamplingParams(1, 0.7, top_k=40, top_p=0.9, min_p=0.01, seed=8)
SAMPLED = [*KINDS[2:], FILTERED, SamplingParams(1, 1.3, top_k=3, seed=9)]


def columns(params: SamplingParams, num: int) -> SamplingColumns:
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    values = {name: getattr(params, name) for name in names}
    return SamplingColumns.of(num, **values, position=FIRST + np.arange(num))


def choose(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Tokens at positions FIRST and on, of the sampler's reference."""
    out = torch.empty(len(logits), dtype=torch.int32)
    return sample_reference(logits, columns(params, len(logits)), out).long()


def make_logits(num: int = NUM) -> torch.Tensor:
    return torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(0)) * 1.5


@pytest.mark.parametrize("params", [KINDS[0], *SAMPLED], ids=str)
def test_errors_up_to_eps_are_explained_and_larger_ones_are_not(params: SamplingParams) -> None:
    logits = make_logits()
    generator = torch.Generator().manual_seed(1)
    for size in (0.0, 0.5, 1.0):  # of EPS: each logit moves by that, up or down
        signs = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1
        tokens = choose(logits + signs * size * 0.99 * EPS, params)
        assert explained(logits, tokens, params, FIRST).all()
    assert not explained(logits, (tokens + 1) % VOCAB, params, FIRST).all()
    moved = choose(logits + 0.05 * torch.randn(logits.shape, generator=generator), params)
    changed = moved != choose(logits, params)
    refused = ~explained(logits, moved, params, FIRST)
    assert changed.any() and refused.sum() > 0.8 * changed.sum()


@pytest.mark.parametrize("params", [KINDS[0], *SAMPLED], ids=str)
def test_exact_choices_are_no_near_ties(params: SamplingParams) -> None:
    logits = make_logits()
    exact = explained(logits, choose(logits, params), params, FIRST, eps=0.0)
    assert (~exact).sum() <= 1  # weights are rounded to fp32


@pytest.mark.parametrize("params", SAMPLED, ids=str)
def test_bounds_without_slack_are_the_filters(params: SamplingParams) -> None:
    logits = make_logits()
    batch = columns(params, len(logits))
    weights = ((logits - logits.max(1, keepdim=True).values) / params.temperature).exp()
    expected = filter_weights(logits, weights, batch) > 0
    core, broad = kept_bounds(logits.double(), weights.double(), params, 0.0)
    assert torch.equal(core, expected) and torch.equal(broad, expected)
    core, broad = kept_bounds(logits.double(), weights.double(), params, EPS)
    assert (core <= expected).all() and (expected <= broad).all()


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model("qwen3", vocab_size=VOCAB)


def answer(model: Path, prompt: list[int], params: SamplingParams, num: int) -> list[int]:
    ids: list[int] = []
    for _ in range(num):
        row = hf_logits(model, [*prompt, *ids])[-1:]
        # The rows before hold the positions before, for `choose` begins at FIRST.
        ids.append(int(choose(row.expand(len(prompt) + len(ids) - FIRST + 1, -1), params)[-1]))
    return ids


@pytest.mark.parametrize("params", KINDS, ids=str)
def test_a_replaced_token_is_found(model: Path, params: SamplingParams) -> None:
    prompt = random_prompt(30)
    ids = answer(model, prompt, params, 40)
    assert check_answer(model, prompt, ids, params) == 0
    for position in (0, 20, 39):
        for token in ((ids[position] + 1) % VOCAB, (ids[position] + 200) % VOCAB):
            with pytest.raises(AssertionError, match=rf"tokens \[{position}\b"):
                check_answer(model, prompt, [*ids[:position], token, *ids[position + 1 :]], params)
    other = [*prompt[:10], prompt[10] + 1, *prompt[11:]]  # as if the KV of one token were another's
    with pytest.raises(AssertionError, match="are not what"):
        check_answer(model, other, ids, params)


def test_rounding_is_a_tenth_of_eps(model: Path) -> None:
    """A sequence whole and in parts, and in double precision; matrix products differ by the number of rows."""
    largest = 0.0
    for seed in range(3):
        tokens = random_prompt(200, seed)
        logits = hf_logits(model, tokens)
        largest = max(largest, float((hf_logits(model, tokens, "float64") - logits).abs().max()))
        for num in (1, 7, 64):
            largest = max(largest, float((hf_logits(model, tokens[:num]) - logits[:num]).abs().max()))
    print(f"largest error of a logit {largest:.1e}")
    assert largest < EPS / 10
