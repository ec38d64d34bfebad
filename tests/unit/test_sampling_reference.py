"""The sync-free reference of the sampling kernel agrees with the engine's sampler."""

import numpy as np
import pytest
import torch

from minisgl.engine import sample as engine
from minisgl.engine.batch import SamplingBatch
from minisgl.kernel.sampling_reference import kept_weights, sample_reference, uniform


def params(n, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, first_seed=0):
    def column(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype=dtype), (n,)).copy()

    return SamplingBatch(
        column(temperature, np.float32),
        column(top_k, np.int64),
        column(top_p, np.float32),
        column(min_p, np.float32),
        np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(first_seed),
        np.arange(n, dtype=np.int64) * 7 + 3,
    )


def on_device(p):
    return (
        torch.from_numpy(p.temperature),
        torch.from_numpy(p.top_k).int(),
        torch.from_numpy(p.top_p),
        torch.from_numpy(p.min_p),
        torch.from_numpy(p.seed.view(np.int64)),
        torch.from_numpy(p.position),
    )


def run(logits, p, **tables):
    out = torch.full((len(logits),), -7, dtype=torch.int32)
    return sample_reference(logits, *on_device(p), out, **tables)


def test_uniform_numbers_are_those_of_the_engine():
    p = params(1000, first_seed=2**63 + 12345)
    ours = uniform(torch.from_numpy(p.seed.view(np.int64)), torch.from_numpy(p.position))
    assert (ours.numpy() == engine.uniform(p.seed, p.position)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
def test_unfiltered_and_greedy_ids_are_those_of_the_engine(dtype, temperature):
    logits = (torch.randn(100, 1003, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    p = params(100, temperature)
    assert run(logits, p).tolist() == engine.sample(logits, p).tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(1, 1, 0), (50, 1, 0), (0, 0.9, 0), (0, 1, 0.05), (40, 0.95, 0), (500, 0.99, 0.01), (5000, 0.5, 0), (0, 1e-9, 0)],
)
def test_filters_keep_the_tokens_that_the_engine_keeps(top_k, top_p, min_p):
    logits = torch.randn(20, 1003, generator=torch.Generator().manual_seed(1)) * 3  # no two are equal
    p = params(20, 0.8, top_k, top_p, min_p)
    weights = ((logits - logits.max(-1, keepdim=True).values) / 0.8).exp()
    top, order = weights.sort(dim=-1, descending=True, stable=True)
    theirs = torch.zeros_like(weights).scatter_(
        1, order, engine._filter(top, weights.sum(-1, dtype=torch.float64), p, 1003)[0]
    )
    _, k, pp, mp, _, _ = on_device(p)
    assert torch.equal(kept_weights(logits, weights, k, pp, mp), theirs)


def test_filtered_tokens_follow_the_kept_distribution():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(2)).repeat(20000, 1)
    ids = run(logits, params(20000, 1.3, top_k=5, top_p=0.9))
    _, k, p, m, _, _ = on_device(params(1, 1.3, top_k=5, top_p=0.9))
    weights = ((logits[:1] - logits[0].max()) / 1.3).exp()
    expected = kept_weights(logits[:1], weights, k, p, m)[0]
    expected /= expected.sum()
    seen = ids.long().bincount(minlength=50) / 20000
    assert (seen - expected).abs().max() < 0.015
    assert (seen[expected == 0] == 0).all()


def test_equal_logits_are_kept_from_the_lowest_index():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).repeat(500, 1)
    assert set(run(logits, params(500, 1.0, top_k=2)).tolist()) == {1, 2}


def test_rows_without_a_finite_maximum_fail_alone():
    logits = torch.zeros(5, 9)
    logits[0, 3], logits[1, 2], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, 1:] = float("-inf")
    for temperature in (0.0, 1.0):
        ids = run(logits, params(5, temperature)).tolist()
        assert ids[:4] == [-1, -1, -1, 0] and ids[4] >= 0


def test_tokens_go_to_the_table_and_failed_rows_leave_a_valid_id():
    logits = torch.zeros(2, 4)
    logits[0, 2], logits[1, 0] = 5.0, float("nan")
    table = torch.full((3, 20), 9, dtype=torch.int32)
    p = params(2, 0.0)
    run(logits, p, token_ids=table, rows=torch.tensor([2, 0], dtype=torch.int32))
    assert table[2, p.position[0]] == 2 and table[0, p.position[1]] == 0
    assert (table != 9).sum() == 2
