"""FlashInfer and FlashAttention-3 where they cannot run: one line says why; and what FlashInfer is told of a batch."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from minisgl.attention.base import AttentionShape, AttentionStep
from minisgl.attention.fa import FlashAttentionBackend
from minisgl.attention.fi import FlashInferBackend, page_lists
from minisgl.errors import ConfigError

SHAPE = AttentionShape(4, 2, 64, torch.bfloat16, page_size=16, max_running_requests=4, max_seq_len=64)


@pytest.mark.parametrize("backend", [FlashAttentionBackend, FlashInferBackend])
def test_the_package_is_missing(backend: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)
    with pytest.raises(ConfigError, match=r"^--attention-backend f[ai] needs .*: pip install") as error:
        backend(SHAPE, torch.device("cuda"))
    assert "\n" not in str(error.value)


def test_pages_of_a_batch() -> None:
    table = np.arange(20, dtype=np.int32).reshape(4, 5)
    num_new = np.array([1, 1, 5])
    step = AttentionStep(np.array([2, 0, 3]), np.array([7, 0, 8]), num_new, np.array([0, 1, 2, 7]), table, 4, 2)
    offsets, pages, last = page_lists(step)
    assert offsets.tolist() == [0, 2, 3, 7]
    assert pages.tolist() == [10, 11, 0, 15, 16, 17, 18]
    assert last.tolist() == [4, 1, 1]
    assert {x.dtype for x in (offsets, pages, last)} == {torch.int32}
