"""What cannot work on this machine is one line that names the flag."""

from __future__ import annotations

from pathlib import Path

import pytest

from minisgl import LLM, SamplingParams
from minisgl.benchmark.shapes import write_shape
from minisgl.errors import ConfigError
from tests.gpu.conftest import DEVICE


def refused(path: Path, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        LLM(str(path), dummy_weight=True, dtype="bfloat16", **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_too_little_memory(tmp_path: Path) -> None:
    message = refused(write_shape("qwen3-14b", tmp_path), memory_ratio=0.01)
    assert "--memory-ratio" in message
    assert "weights" in message


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU may have any number of ranks")
def test_more_ranks_than_devices(tmp_path: Path) -> None:
    assert "--tensor-parallel-size 64" in refused(write_shape("qwen3-32b", tmp_path), tp=64)


def test_unknown_backend(tmp_path: Path) -> None:
    assert "--attention-backend" in refused(write_shape("qwen3-0.6b", tmp_path), attn="abacus")


def test_an_llm_after_one_that_failed(tmp_path: Path) -> None:
    """A refusal leaves no memory behind."""
    path = write_shape("qwen3-0.6b", tmp_path)
    refused(path, memory_ratio=0.001)
    with LLM(str(path), dummy_weight=True, dtype="bfloat16", max_seq_len=512, memory_ratio=0.5) as llm:
        assert len(llm.generate([[5, 6, 7]], SamplingParams(4, ignore_eos=True))[0].token_ids) == 4
