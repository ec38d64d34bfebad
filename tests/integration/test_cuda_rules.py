"""The kernels of GPUs that change logits before they sample, and that tell log-probabilities, against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minisgl.core import NOT_READY, Masks
from minisgl.kernel.ops import TorchOps
from minisgl.kernel.sampling import SamplingColumns, TokenStore
from tests.integration.test_cuda_ops import DTYPES, no_ids, ops, randn
from tests.integration.test_rules import Given, Rows, mixed_rows, spoilt

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]  # the first test compiles
__all__ = ["ops"]  # a fixture

GIVEN: list[dict[str, float]] = [
    {"temperature": 0.0},
    {},
    {"top_k": 3},
    {"top_p": 0.8, "temperature": 0.7},
    {"min_p": 0.1},
]


class OnDevice:
    """A step of an engine's rows, as a GPU knows it."""

    def __init__(
        self, rows: Rows, order: list[int], positions: list[int], masked: Any = (), masks: Masks | None = None
    ):
        if rows.host.logit_rules.told is None:
            rows.host.logit_rules.told = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        columns, store, self.rules = rows.step(order, positions, masked, masks)
        bounds, ids, values = rows.host.logit_rules.lists
        self.words = torch.cat((bounds.int(), ids, values.view(torch.int32))).cuda()
        self.columns, self.tokens = SamplingColumns(columns.words.cuda()), rows.tokens.cuda()
        self.host, self.sample_rows = rows.host, store.rows.int().cuda()
        self.entries = torch.tensor([self.words.data_ptr()], device="cuda")

    def by_kernels(self, ops: TorchOps, logits: torch.Tensor) -> torch.Tensor:
        store = TokenStore(self.tokens.clone(), self.sample_rows, self.entries)
        ids = ops.sample(logits, self.columns, no_ids(logits), store)
        if self.rules is not None and self.rules.mask_of is not None:
            store = TokenStore(self.tokens.clone(), self.sample_rows, self.entries)  # as before, for who looks back
            self.host.logit_rules.sample(ops, logits, self.columns, ids, store, self.rules, True)
        place = self.sample_rows.long(), self.columns["position"]
        assert torch.equal(store.token_ids[place], ids.clamp(min=0))
        return ids

    def by_torch(self, ops: TorchOps, logits: torch.Tensor) -> torch.Tensor:
        ids = ops.sample(logits, self.columns, no_ids(logits))
        if self.rules is not None:
            store = TokenStore(self.tokens.clone(), self.sample_rows)
            self.host.logit_rules.sample(ops, logits.float(), self.columns, ids, store, self.rules, True)
        return ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [41, 4100, 50_001, 151_936])
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_rows_of_all_kinds(ops: Any, given: dict[str, float], vocab: int, dtype: torch.dtype) -> None:
    """Some of them masked, not ready or not finite; the logits stay as they are."""
    if vocab > ops.most_ruled:
        pytest.skip("this GPU has no clusters: torch does it")
    num = 64
    rows, positions = mixed_rows(num, min(vocab, 40), **given)
    source = randn(num, vocab, dtype=dtype, scale=0.5)
    masks, masked = spoilt(source)
    before = source.clone()
    for some in ((), masked):
        step = OnDevice(rows, list(range(num)), positions, some, masks if some else None)
        mine, theirs = step.by_kernels(ops, source), step.by_torch(ops, source)
        assert (mine != theirs).sum() <= (given.get("temperature", 1) > 0), "a sum may fall on the other side"
        assert not some or mine[20] == NOT_READY
        assert torch.equal(source.view(torch.uint8), before.view(torch.uint8))


def test_only_masks_that_are_not_ready(ops: Any) -> None:
    rows, nothing = Rows(3), np.zeros((2, 3), np.int32)
    step = OnDevice(rows, [0, 1, 2], [5, 6, 7], (0, 2), Given(nothing, (0, 2), 0, 1))
    source = randn(3, 70)
    found = step.by_kernels(ops, source)
    assert found[[0, 2]].tolist() == [NOT_READY] * 2 and found[1] == step.by_torch(ops, source)[1]


@pytest.mark.parametrize("length", [1, 31, 5000, 40_000])
def test_long_histories(ops: Any, length: int) -> None:
    """Tokens of the prompt and of the output, many of them often; ids at the ends of what blocks have."""
    vocab = 151_936
    if vocab > ops.most_ruled:
        pytest.skip("this GPU has no clusters: torch does it")
    rows = Rows(8, length + 2, vocab)
    rows.tokens[4:, ::3] = torch.tensor([0, vocab - 1, 18_991, 18_992])[:, None].int()
    for row in range(8):
        rows.admit(row, 1 + length // 2, repetition_penalty=1.3, frequency_penalty=0.3, presence_penalty=-0.5)
    step, source = OnDevice(rows, list(range(8)), [length] * 8), randn(8, vocab, scale=2)
    assert torch.equal(step.by_kernels(ops, source), step.by_torch(ops, source))


def test_samples_of_one_row_see_the_tokens_that_stand_before_them(ops: Any) -> None:
    """As with drafts: the ids are not written over them before all have been looked at."""
    rows, positions = Rows(2), [10, 11, 12, 13]
    rows.admit(1, 4, temperature=0.0, frequency_penalty=2.0, repetition_penalty=1.5)
    source = torch.zeros(4, 70, device="cuda")
    source[:, rows.tokens[1, 9:13].long()] = 1.0  # each token of the draft would be sampled but for its penalty
    source[:, 64] = 0.25
    together = OnDevice(rows, [1] * 4, positions).by_kernels(ops, source)
    alone = [OnDevice(rows, [1], [at]).by_kernels(ops, source[i : i + 1]) for i, at in enumerate(positions)]
    assert torch.equal(together, torch.cat(alone))


def test_rules_in_a_graph_are_those_of_the_rows_at_the_time(ops: Any) -> None:
    rows, positions, source = Rows(4), [9, 10, 11, 12], randn(4, 70)
    rows.admit(3, 4, temperature=0.0)
    step = OnDevice(rows, [0, 1, 2, 3], positions)
    store, out = TokenStore(step.tokens, step.sample_rows, step.entries), no_ids(source)
    ops.sample(source, step.columns, out, store)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        ops.sample(source, step.columns, out, store)
    changes: list[dict[str, Any]] = [{"logit_bias": ((7, 100.0),)}, {"presence_penalty": 2.0}, {"min_tokens": 99}, {}]
    for given in changes:
        rows.admit(2, 4, temperature=0.0, end_ids=(1, 2), **given)
        new = OnDevice(rows, [0, 1, 2, 3], positions)
        step.columns.words.copy_(new.columns.words)
        step.entries.copy_(new.entries)
        step.tokens.copy_(new.tokens)
        graph.replay()
        assert torch.equal(out, new.by_torch(ops, source)), given
        assert out[2] == 7 or "logit_bias" not in given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [3, 130, 4096, 50_001, 151_936])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_log_probabilities_are_the_reference_s(ops: Any, num_top: int, vocab: int, dtype: torch.dtype) -> None:
    source = randn(9, vocab, dtype=dtype, scale=3)
    source[1, :], source[2, vocab // 2 :] = 0.5, -torch.inf
    source[3] = torch.arange(vocab, device="cuda") / vocab  # each is no less than all before
    source[4, 1], source[5, 1], source[6] = torch.nan, torch.inf, -torch.inf
    rows = torch.tensor([8, 0, 1, 2, 3, 3, 7], device="cuda")
    targets = (torch.arange(len(rows), device="cuda") * 7919 % vocab).int()
    targets[0] = -1  # of a row that failed
    mine, theirs = (some.logprobs(source, rows, targets, num_top) for some in (ops, TorchOps()))
    assert mine.shape == theirs.shape == (len(rows), 1 + 2 * min(num_top, vocab)) and mine.dtype == theirs.dtype
    torch.testing.assert_close(*(some.view(torch.float32)[:, ::2] for some in (mine, theirs)), atol=1e-4, rtol=1e-6)
    order = source[rows].float().sort(dim=-1, descending=True, stable=True).indices  # of equal ones the first
    assert torch.equal(mine[:, 1::2].long(), order[:, :num_top])
    words = ops.logprobs(source, rows.new_tensor([4, 5, 6]), targets[:3] * 0, num_top)
    assert words.view(torch.float32)[:, ::2].isnan().all() and (words[:, 1::2] == 0).all()
