"""The kernels of GPUs that change logits before they sample, and that tell log-probabilities, against torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from minisgl.core import ID_PENDING, MASK_NOT_READY, MASK_PENDING, MASK_READY, NOT_READY, Masks
from minisgl.kernel.ops import TorchOps
from minisgl.kernel.sampling import NUM_PLACES, SamplingColumns, TokenStore
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


class Board:
    """Memory for masks, as an engine has it."""

    def __init__(self, num: int, num_words: int) -> None:
        memory = torch.zeros(num * (num_words + 2) + 4, dtype=torch.int32, pin_memory=True).numpy()
        self.words, self.states = memory[2 * num : -4].reshape(num, num_words), memory[:num]
        self.ids = memory[num : 2 * num]
        self.addresses = [array.ctypes.data for array in (self.words, self.states, self.ids)]

    def fill(self, masks: Masks, seconds: float) -> None:
        """One mask after the other, the last ones first, while the device looks."""
        words, states = np.empty_like(self.words), np.zeros_like(self.states)
        masks(words, states, None)
        time.sleep(seconds)
        for i in reversed(range(len(words))):
            self.words[i] = words[i]
            self.states[i] = states[i]

    def wait(self, i: int) -> int:
        """For the token of a mask."""
        deadline = time.monotonic() + 10
        while self.ids[i] == ID_PENDING and time.monotonic() < deadline:
            pass
        return int(self.ids[i])


class OnDevice:
    """A step of an engine's rows, as a GPU knows it."""

    def __init__(
        self, rows: Rows, order: list[int], positions: list[int], masked: Any = (), masks: Masks | None = None
    ):
        columns, store, self.rules = rows.step(order, positions, masked, masks)
        bounds, ids, values = rows.host.logit_rules.lists
        self.words = torch.cat((bounds.int(), ids, values.view(torch.int32))).cuda()
        self.columns, self.tokens = SamplingColumns(columns.words.cuda()), rows.tokens.cuda()
        self.host, self.sample_rows = rows.host, store.rows.int().cuda()
        self.masks, self.board = masks, Board(*(masks.shape if masks is not None else (0, 0)))
        self.places = torch.zeros(NUM_PLACES, dtype=torch.int64, device="cuda")

    def place(self) -> None:
        """As before each step."""
        self.board.states[:], self.board.ids[:] = MASK_PENDING, ID_PENDING
        self.places.copy_(torch.tensor([self.words.data_ptr(), *self.board.addresses, 0]))

    def by_kernels(self, ops: TorchOps, logits: torch.Tensor, seconds: float = 0.0) -> torch.Tensor:
        """With masks that come one by one, from so many seconds on after the launch."""
        store = TokenStore(self.tokens.clone(), self.sample_rows, self.places)
        self.place()
        torch.cuda.synchronize()
        ids = ops.sample(logits, self.columns, no_ids(logits), store)
        if self.masks is not None:
            self.board.fill(self.masks, seconds)
        torch.cuda.synchronize()
        place = self.sample_rows.long(), self.columns["position"]
        assert torch.equal(store.token_ids[place], ids.clamp(min=0))
        masked = self.columns["mask"] >= 0
        assert ids[masked].tolist() == self.board.ids[self.columns["mask"][masked].cpu().numpy()].tolist()
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
        mine, theirs = step.by_kernels(ops, source, seconds=0.002), step.by_torch(ops, source)
        assert (mine != theirs).sum() <= (given.get("temperature", 1) > 0), "a sum may fall on the other side"
        assert not some or mine[20] == NOT_READY
        assert torch.equal(source.view(torch.uint8), before.view(torch.uint8))


def test_only_masks_that_are_not_ready(ops: Any) -> None:
    rows, nothing = Rows(3), np.zeros((2, 3), np.int32)
    step = OnDevice(rows, [0, 1, 2], [5, 6, 7], (0, 2), Given(nothing, 0, 1))
    source = randn(3, 70)
    found = step.by_kernels(ops, source)
    assert found[[0, 2]].tolist() == [NOT_READY] * 2 and found[1] == step.by_torch(ops, source)[1]


def captured(ops: Any, step: OnDevice, source: torch.Tensor) -> tuple[Callable[[], None], torch.Tensor]:
    """What samples the step's rows again, with new places; and their ids."""
    store, out = TokenStore(step.tokens, step.sample_rows, step.places), no_ids(source)
    masks = step.columns["mask"].clone()
    step.columns["mask"].fill_(-1)
    step.place()
    ops.sample(source, step.columns, out, store)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        ops.sample(source, step.columns, out, store)
    step.columns["mask"].copy_(masks)
    return graph.replay, out


@pytest.mark.parametrize("is_slow", [False, True])
def test_each_row_waits_for_its_own_mask(ops: Any, is_slow: bool) -> None:
    """In a graph: a token is told before the mask of the next row is there. More rows than run at the same time."""
    num, vocab = 160, 20_000
    rows, source = Rows(num, vocab=vocab), torch.zeros(num, vocab, device="cuda")
    for row in range(num):
        rows.admit(row, 4, temperature=0.0)
    masks = Given(np.zeros((num, vocab // 32), np.int32))
    step = OnDevice(rows, list(range(num)), [5] * num, range(num), masks)
    replay, out = captured(ops, step, source)
    for start in (0, 7000):  # a mask allows one token
        step.place()
        step.board.words[:] = 0
        torch.cuda.synchronize()
        replay()
        for i in range(num):
            token = start + 11 * i
            step.board.words[i, token // 32] = np.uint32(1 << token % 32).astype(np.int32)
            assert step.board.ids[i] == ID_PENDING
            step.board.states[i] = MASK_READY
            assert not is_slow or step.board.wait(i) == token
        torch.cuda.synchronize()
        assert out.tolist() == step.board.ids.tolist() == [start + 11 * i for i in range(num)]


def test_a_step_waits_for_a_second_and_no_longer(ops: Any) -> None:
    """All its rows together, though they do not run at the same time. Those that have their masks have their tokens."""
    num, vocab = 64, 151_936
    if vocab > ops.most_ruled:
        pytest.skip("this GPU has no clusters: torch does it")
    rows = Rows(num, vocab=vocab)
    rows.admit(3, 4, temperature=0.0)
    step = OnDevice(rows, list(range(num)), [5] * num, range(1, num), Given(np.zeros((num - 1, vocab // 32), np.int32)))
    replay, out = captured(ops, step, randn(num, vocab))
    step.place()
    step.board.words[:] = -1
    step.board.states[[2, 62]] = MASK_READY
    step.board.states[4] = MASK_NOT_READY
    torch.cuda.synchronize()
    begin = time.monotonic()
    replay()
    torch.cuda.synchronize()
    assert 0.9 < time.monotonic() - begin < 1.3
    assert [i for i in range(num) if out[i] >= 0] == [0, 3, 63]
    assert (step.board.ids == out[1:].cpu().numpy()).all() and (out[1:3] == NOT_READY).all()
    step.place()  # the next one waits anew
    torch.cuda.synchronize()
    timer = threading.Timer(0.3, lambda: step.board.states.fill(MASK_READY))
    timer.start()
    replay()
    torch.cuda.synchronize()
    timer.join()
    assert (out >= 0).all()


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
    replay, out = captured(ops, step, source)
    changes: list[dict[str, Any]] = [{"logit_bias": ((7, 100.0),)}, {"presence_penalty": 2.0}, {"min_tokens": 99}, {}]
    for given in changes:
        rows.admit(2, 4, temperature=0.0, end_ids=(1, 2), **given)
        new = OnDevice(rows, [0, 1, 2, 3], positions)
        step.columns.words.copy_(new.columns.words)
        new.place()
        step.places.copy_(new.places)
        step.tokens.copy_(new.tokens)
        replay()
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
