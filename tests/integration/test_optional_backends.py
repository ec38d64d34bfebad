"""FlashInfer and FlashAttention-3 where they cannot run: one line says why; and what FlashInfer is told of a batch."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minisgl.attention.fa import FlashAttentionBackend
from minisgl.attention.fi import FlashInferBackend, _page_lists
from minisgl.errors import ConfigError


def shape(**changes: object) -> SimpleNamespace:
    usual = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16, "windows": (None,)}
    return SimpleNamespace(**{**usual, "page_size": 16, "max_running_requests": 4, "max_seq_len": 64, **changes})


@pytest.mark.parametrize("backend", [FlashAttentionBackend, FlashInferBackend])
def test_the_package_is_missing(backend: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)
    with pytest.raises(ConfigError, match=r"^--attention-backend f[ai] needs .*: pip install") as error:
        backend(shape(), torch.device("cuda"))
    assert "\n" not in str(error.value)


def test_pages_of_a_batch() -> None:
    table = np.arange(20, dtype=np.int32).reshape(4, 5)
    batch = SimpleNamespace(
        page_size=4,
        rows_cpu=np.array([2, 0, 3]),
        starts_cpu=np.array([7, 0, 8]),
        num_new_cpu=np.array([1, 1, 5]),
        page_table_cpu=table,
    )
    offsets, pages, last = _page_lists(batch)
    assert offsets.tolist() == [0, 2, 3, 7]
    assert pages.tolist() == [10, 11, 0, 15, 16, 17, 18]
    assert last.tolist() == [4, 1, 1]
    assert {x.dtype for x in (offsets, pages, last)} == {torch.int32}
