"""Sampling: the distributions that the parameters ask for, reproducibly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minisgl.engine.batch import SamplingBatch
from minisgl.engine.sample import sample, uniform

VOCAB = 300  # more than the candidates that are looked at first
torch.set_num_threads(1)  # two threads that wait for a busy core are far slower
NUM = 6000


def batch(num: int, seed: int = 0, **params: Any) -> SamplingBatch:
    def column(name: str, default: float, dtype: Any) -> Any:
        return np.broadcast_to(np.asarray(params.get(name, default), dtype=dtype), (num,)).copy()

    return SamplingBatch(
        column("temperature", 1.0, np.float32),
        column("top_k", 0, np.int64),
        column("top_p", 1.0, np.float32),
        column("min_p", 0.0, np.float32),
        np.full(num, seed, dtype=np.uint64),
        np.arange(num),
    )


def expected_probs(
    logits: torch.Tensor, temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> torch.Tensor:
    """The definition, one filter after the other, in float64."""
    probs = (logits.double() / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    if top_k:
        probs[order[top_k:]] = 0
        probs /= probs.sum()
    before = probs[order].cumsum(0) - probs[order]
    probs[order[before >= top_p]] = 0
    probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("spread", [0.3, 2.0])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_k": 200},
        {"top_k": 10**6},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"min_p": 0.2},
        {"min_p": 0.001},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.8, "min_p": 0.05},
        {"top_k": 150, "top_p": 0.9},
    ],
    ids=str,
)
def test_distribution(spread: float, params: dict[str, Any]) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * spread
    ids = sample(logits.expand(NUM, VOCAB), batch(NUM, **params))
    probs = expected_probs(logits, **params)
    counts = ids.bincount(minlength=VOCAB).double()
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    chi2 = ((counts - NUM * probs)[kept] ** 2 / (NUM * probs[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 5 * (2 * max(freedom, 1)) ** 0.5 + 5  # about five standard deviations


def test_greedy_and_tiny_top_k_agree() -> None:
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(2))
    best = logits.argmax(-1)
    for params in (
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"top_p": 1e-60},
        {"min_p": 1.0},
        {"temperature": 1e-4},
    ):
        assert torch.equal(sample(logits, batch(50, **params)), best), params


def test_rows_are_independent_of_their_batch() -> None:
    num = 64
    logits = torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(3))
    rng = np.random.default_rng(0)
    params = batch(
        num,
        temperature=rng.choice([0, 0.5, 1.0, 2.0], num),
        top_k=rng.choice([0, 3, 50, 200], num),
        top_p=rng.choice([0.2, 0.9, 1.0], num),
        min_p=rng.choice([0, 0.1], num),
    )
    together = sample(logits, params)
    order = rng.permutation(num)
    assert torch.equal(sample(logits[torch.from_numpy(order)], params.select(order)), together[torch.from_numpy(order)])
    alone = [sample(logits[i : i + 1], params.select(np.array([i])))[0] for i in range(num)]
    assert torch.equal(torch.stack(alone), together)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows(temperature: float, bad: float) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 5] = 30.0
    logits[1, 200] = bad
    assert sample(logits, batch(3, temperature=temperature)).tolist() == [5, -1, 5]
    logits[1] = float("-inf")
    assert sample(logits, batch(3, temperature=temperature)).tolist() == [5, -1, 5]


def test_masked_tokens_are_never_sampled() -> None:
    logits = torch.full((NUM, VOCAB), float("-inf"))
    logits[:, [0, 299]] = 0.0
    counts = sample(logits, batch(NUM)).bincount(minlength=VOCAB)
    assert counts[0] + counts[299] == NUM
    assert abs(int(counts[0]) - NUM // 2) < 5 * NUM**0.5 / 2


def test_uniform_numbers() -> None:
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200))
    numbers = uniform(seeds.ravel(), positions.ravel())
    assert len(np.unique(numbers)) == 40000
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 / (12 * 40000) ** 0.5
    grid = numbers.reshape(200, 200)
    for other in (grid[1:], grid[:, 1:]):  # neighbouring positions and seeds are uncorrelated
        same = grid[: other.shape[0], : other.shape[1]]
        assert abs(np.corrcoef(same.ravel(), other.ravel())[0, 1]) < 0.03
