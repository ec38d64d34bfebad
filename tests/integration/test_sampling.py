"""Sampling as the reference has it: the distributions that the parameters ask for, reproducibly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minisgl.core import MAX_COUNT, MAX_SEED, SamplingParams
from minisgl.engine.tables import record_of
from minisgl.kernel.ops import TorchOps
from minisgl.kernel.sampling import (
    COLUMNS,
    RECORD,
    SamplingColumns,
    TokenStore,
    filter_weights,
    sample_reference,
    uniform,
)

VOCAB = 300
torch.set_num_threads(1)  # two threads that wait for a busy core are far slower
NUM = 6000


def batch(num: int, seed: Any = 0, **params: Any) -> SamplingColumns:
    return SamplingColumns.of(num, **({"temperature": 1.0} | params), seed=seed, position=np.arange(num))


def sample(logits: torch.Tensor, params: SamplingColumns) -> torch.Tensor:
    return sample_reference(logits, params, torch.full((len(logits),), -7, dtype=torch.int32)).long()


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
    order = torch.from_numpy(rng.permutation(num))
    assert torch.equal(sample(logits[order], params.select(order)), together[order])
    alone = [sample(logits[i : i + 1], params.select(torch.tensor([i])))[0] for i in range(num)]
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
    seeds, positions = np.meshgrid(np.arange(200), np.arange(200))
    numbers = uniform(torch.from_numpy(seeds.ravel()), torch.from_numpy(positions.ravel())).numpy()
    assert len(np.unique(numbers)) == 40000
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 / (12 * 40000) ** 0.5
    grid = numbers.reshape(200, 200)
    for other in (grid[1:], grid[:, 1:]):  # neighbouring positions and seeds are uncorrelated
        same = grid[: other.shape[0], : other.shape[1]]
        assert abs(np.corrcoef(same.ravel(), other.ravel())[0, 1]) < 0.03


def splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_uniform_numbers_are_52_bits_of_splitmix64() -> None:
    seeds = [(i * 0x9E3779B97F4A7C15 + 2**63 + 12345) % 2**64 for i in range(1000)]
    positions = [i * 7 + 3 for i in range(1000)]
    numbers = uniform(torch.from_numpy(np.array(seeds, np.uint64).view(np.int64)), torch.tensor(positions))
    expected = [
        (splitmix(splitmix(seed) ^ position) >> 12) / 2**52 for seed, position in zip(seeds, positions, strict=True)
    ]
    assert numbers.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
def test_unfiltered_and_greedy_ids_are_those_of_the_definition(dtype: torch.dtype, temperature: float) -> None:
    logits = (torch.randn(100, 1003, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    params = batch(100, np.arange(100), temperature=temperature)
    expected = logits.max(-1).indices
    if temperature:
        cdf = ((logits.float() - logits.float().max(-1, keepdim=True).values) / temperature).exp().double().cumsum(-1)
        numbers = uniform(params["seed"], params["position"])[:, None]
        expected = (cdf <= numbers * cdf[:, -1:]).sum(-1)
    assert sample(logits, params).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(1, 1, 0), (50, 1, 0), (0, 0.9, 0), (0, 1, 0.05), (40, 0.95, 0), (500, 0.99, 0.01), (5000, 0.5, 0), (0, 1e-9, 0)],
)
def test_filters_keep_the_tokens_of_the_definition(top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(20, 1003, generator=torch.Generator().manual_seed(1)) * 3  # no two are equal
    weights = ((logits - logits.max(-1, keepdim=True).values) / 0.8).exp()
    params = batch(20, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = filter_weights(logits, weights, params)
    for row in range(20):
        expected = expected_probs(logits[row], 0.8, top_k, top_p, min_p)
        assert torch.equal(kept[row], weights[row].where(expected > 0, 0))


def test_filtered_tokens_follow_the_kept_distribution() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(2))
    params = batch(20000, np.arange(20000), temperature=1.3, top_k=5, top_p=0.9)
    weights = ((logits - logits.max()) / 1.3).exp()
    expected = filter_weights(logits, weights, params.select(torch.tensor([0])))[0]
    expected /= expected.sum()
    seen = sample(logits.repeat(20000, 1), params).bincount(minlength=50) / 20000
    assert (seen - expected).abs().max() < 0.015
    assert (seen[expected == 0] == 0).all()


def test_equal_logits_are_kept_from_the_lowest_index() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).repeat(500, 1)
    assert set(sample(logits, batch(500, top_k=2)).tolist()) == {1, 2}


def test_rows_without_a_finite_maximum_fail_alone() -> None:
    logits = torch.zeros(5, 9)
    logits[0, 3], logits[1, 2], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, 1:] = float("-inf")
    for temperature in (0.0, 1.0):
        ids = sample(logits, batch(5, temperature=temperature)).tolist()
        assert ids[:4] == [-1, -1, -1, 0] and ids[4] >= 0


def test_tokens_go_to_the_table_and_failed_rows_leave_a_valid_id() -> None:
    logits = torch.zeros(2, 4)
    logits[0, 2], logits[1, 0] = 5.0, float("nan")
    table = torch.full((3, 20), 9, dtype=torch.int32)
    params = SamplingColumns.of(2, position=[3, 10])
    store = TokenStore(table, torch.tensor([2, 0], dtype=torch.int32))
    assert TorchOps().sample(logits, params, torch.zeros(2, dtype=torch.int32), store).tolist() == [2, -1]
    assert table[2, 3] == 2 and table[0, 10] == 0
    assert (table != 9).sum() == 2


def test_a_record_has_all_parameters_of_a_request() -> None:
    penalties = {"repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.75}
    params = SamplingParams(
        temperature=0.3, top_k=2**40, top_p=0.4, min_p=0.25, seed=MAX_SEED, min_tokens=MAX_COUNT, **penalties
    )
    columns = SamplingColumns(torch.from_numpy(record_of(params, 9))[None])
    values = {name: columns[name].item() for name in COLUMNS}
    filters = {"temperature": 0.3, "top_p": 0.4, "min_p": 0.25, "top_k": 2**31 - 1}
    lengths = {"position": 1, "prompt_len": 9, "min_len": 2**31 - 1, "mask": -1}
    assert values == pytest.approx({"seed": MAX_SEED} | filters | penalties | lengths)
    assert RECORD.itemsize % 8 == 0
    neutral = SamplingColumns.of(2)
    assert all(neutral[name].tolist() == [value] * 2 for name, (_, value) in COLUMNS.items())
