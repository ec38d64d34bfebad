"""What FlashInfer is told of a batch."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minisgl.attention.base import AttentionShape, AttentionStep
from minisgl.attention.optional import FlashInferBackend, gather_pages, page_lists
from minisgl.kernel.ops import PagedSequences

SHAPE = AttentionShape(4, 2, 64, torch.bfloat16, page_size=16, max_running_requests=4, max_seq_len=64)


def test_pages_of_a_batch() -> None:
    table = np.arange(20, dtype=np.int32).reshape(4, 5)
    num_new = np.array([1, 1, 5])
    step = AttentionStep(np.array([2, 0, 3]), np.array([7, 0, 8]), num_new, np.array([0, 1, 2, 7]), table, 4, 2)
    offsets, pages, last = page_lists(step)
    assert offsets.tolist() == [0, 2, 3, 7]
    assert pages.tolist() == [10, 11, 0, 15, 16, 17, 18]
    assert last.tolist() == [4, 1, 1]
    assert {x.dtype for x in (offsets, pages, last)} == {torch.int32}


def test_pages_behind_a_window_are_not_read() -> None:
    """The first page that is a sequence's own stands for them, for kernels that read more than the window."""
    table, num_new, starts = np.arange(20, dtype=np.int32).reshape(4, 5), np.array([1, 1, 5]), np.array([7, 0, 8])
    step = AttentionStep(np.array([2, 0, 3]), starts, num_new, np.array([0, 1, 2, 7]), table, 4, 2, window=3)
    offsets, pages, _ = page_lists(step)
    assert (offsets.tolist(), pages.tolist()) == ([0, 2, 3, 7], [11, 11, 0, 16, 16, 17, 18])
    numbers = (torch.tensor(x, dtype=torch.int32) for x in ([2, 0, 3], [8, 1, 13], [0, 1, 2, 7]))
    seqs = PagedSequences(torch.from_numpy(table), *numbers, 4)
    assert gather_pages(seqs, 13, 3)[[0, 2]].tolist() == [[11, 11, 12, 13], [16, 16, 17, 18]]
    assert gather_pages(seqs, 13, 0)[0].tolist() == [10, 11, 12, 13]


class Wrapper:
    """Notes what it is told, in FlashInfer's place."""

    def __init__(self, workspace: torch.Tensor, layout: str, **options: object) -> None:
        self.is_captured, self.plans = "use_cuda_graph" in options, list[tuple[int, dict[str, object]]]()

    def plan(self, *args: object, **options: object) -> None:
        self.plans.append((len(args), options))


def test_plans_by_role_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step of some size finds its buffers again; a step outside of graphs has others."""
    names = ("BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper")
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(**dict.fromkeys(names, Wrapper)))
    backend = FlashInferBackend(replace(SHAPE, windows=(None, 8)), torch.device("cpu"))
    table, ones = np.arange(20, dtype=np.int32).reshape(4, 5), np.ones(3, np.int64)
    step = AttentionStep(np.arange(3), np.array([7, 0, 8]), ones, np.arange(4), table, 4, num_decode=3)
    captured = backend.prepare(step, captured=True)
    assert backend.prepare(step, captured=True) is captured
    eager = backend.prepare(step, captured=False)
    prefill = backend.prepare(replace(step, num_decode=0), captured=False)
    one = FlashInferBackend(replace(SHAPE, windows=(None, 8)), torch.device("cpu"))
    alone = one.prepare(replace(step, window=8), captured=False)
    assert [len(alone[window].plans) for window in (None, 8)] == [0, 1], "a step for some layers is told to theirs"
    for wrappers, is_captured, num_plans, num_args in (
        (captured, True, 2, 7),
        (eager, False, 1, 7),
        (prefill, False, 1, 8),
    ):
        assert set(wrappers) == {None, 8}
        for window, wrapper in wrappers.items():
            assert (wrapper.is_captured, len(wrapper.plans)) == (is_captured, num_plans)
            told, options = wrapper.plans[-1]
            assert (told, options["window_left"]) == (num_args, -1 if window is None else 7)
            assert ("causal" in options) == (wrappers is prefill)
