"""DFlash's heads on the device: their drafts are what the formula says, captured and op by op, and change nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.gpu.conftest import DEVICE
from tests.gpu.test_speculation import EAGER, FEW, GREEDY, NUM_TOKENS, ON_DEVICE, PARAMS, drafts_cost_nothing, needs_gpu
from tests.integration.test_dflash import CASES, BlockHead, assert_told, generate, train, trained
from tests.integration.test_eagle import HEADS, WORDS, said, served, target
from tests.models import random_prompt
from tests.tokenizers_fixture import make_words

__all__ = ["drafts_cost_nothing", "served", "trained"]


@needs_gpu
@pytest.mark.parametrize("max_batch", [0, 32])
@pytest.mark.parametrize("case", CASES)
def test_it_tells_what_its_formula_says(case: str, max_batch: int, tmp_path: Path) -> None:
    family, options = CASES[case]
    path, head = target(family, **HEADS), BlockHead(**options)
    where = head.save(tmp_path / "head")
    told, drafts = generate(path, "dflash", draft_model=where, cuda_graph_max_bs=max_batch, **ON_DEVICE)
    assert told == generate(path, "off")[0]
    assert_told(path, head, drafts)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("options", [{}, EAGER, FEW], ids=["captured", "eager", "few graphs"])
@pytest.mark.parametrize("kind", ["trained", "random"])
def test_it_changes_nothing(
    served: tuple[Path, list[list[int]]], trained: Path, kind: str, options: dict[str, Any], tp_size: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    head = trained if kind == "trained" else BlockHead(vocab_size=WORDS).save(tmp_path / "head")
    params = PARAMS[: len(served[1])]
    expected, _ = said(*served, params, device=DEVICE)
    told, share = said(
        *served, params, device=DEVICE, draft_model=str(head), tensor_parallel_size=tp_size, num_pages=512, **options
    )
    assert told == expected
    if kind == "trained" and options is not FEW:  # few graphs hold no drafts
        assert share > 0.04


@pytest.mark.parametrize("tp_size", [1, 2])
def test_it_is_right_in_16_bits(tp_size: int, tmp_path: Path) -> None:
    """With a GPU's kernels for decode steps, heads of 64 features, and an LM head of 4 bits for drafts."""
    shape = {**HEADS, "head_dim": 64, "vocab_size": WORDS}
    path = make_words(shutil.copytree(target("llama", **shape), tmp_path / "model"), WORDS)
    prompts, head = [random_prompt(20 + i, seed=i) for i in range(4)], BlockHead(vocab_size=WORDS, dim=64)
    train(head, AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval(), prompts)
    options = {
        "device": DEVICE,
        "dtype": "bfloat16",
        "num_pages": 512,
        "draft_model": str(head.save(tmp_path / "head")),
    }
    told, share = said(path, prompts, [GREEDY] * 4, tensor_parallel_size=tp_size, **options)
    assert [len(ids) for ids in told] == [NUM_TOKENS] * 8
    assert share > 0.1
