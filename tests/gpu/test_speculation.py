"""Drafts on the device in fp32: the output is the same with and without, captured and op by op, whoever drafts."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minisgl import LLM, SamplingParams
from minisgl.config import resolve
from minisgl.core import Req
from minisgl.scheduler import speculation
from tests.gpu.conftest import DEVICE
from tests.integration.test_draft_model import assert_said_by
from tests.integration.test_eagle import CASES, HEADS, WORDS, random_head, said, served, target, train, trained
from tests.integration.test_llm import make_prompts, with_tokenizer
from tests.integration.test_mtp import NUM_DRAFTS, Head, generate, made
from tests.models import random_prompt, tiny_model
from tests.tokenizers_fixture import make_words

__all__ = ["made", "served", "trained"]
NUM_TOKENS = 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
PARAMS = [
    GREEDY,
    dataclasses.replace(GREEDY, temperature=0.8, seed=1),
    dataclasses.replace(GREEDY, temperature=0.8, top_k=20, top_p=0.9, seed=2, logprobs=2),
    dataclasses.replace(GREEDY, logit_bias=((5, 2.0), (9, -3.0))),
    dataclasses.replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.6),
]
EAGER = {"cuda_graph_max_bs": 0}
FEW = {"cuda_graph_max_bs": 0 if DEVICE == "cpu" else 8, "max_running_requests": 6}
ON_DEVICE: dict[str, Any] = {
    "device": DEVICE,
    "prefill_backend": "triton",
    "decode_backend": "triton",
    "moe_backend": "triton",
    "draft_len": NUM_DRAFTS,
}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no graphs")


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU computes models as small as these so fast that none would be made."""
    monkeypatch.setattr(resolve, "step_costs", lambda _: (0.0, 0.0))


class Knowing:
    """Knows what will be generated; of a draft so many tokens are right."""

    def __init__(self, truth: dict[tuple[int, ...], list[int]], num_right: Callable[[int], int]) -> None:
        self._truth, self._num_right = truth, num_right

    def propose(self, req: Req, num_pending: int, most: int) -> list[int]:
        begin = len(req.tokens) - req.prompt_len + num_pending
        ids = self._truth[(*req.tokens[: req.prompt_len], req.params.seed or 0)][begin : begin + most]
        right = self._num_right(begin)
        return [token if i < right else (token + 1) % 256 for i, token in enumerate(ids)]

    def forget(self, uid: int) -> None:
        pass


def outputs_of(path: Path, params: list[SamplingParams], **options: Any) -> list[list[int]]:
    with LLM(str(path), **options) as llm:
        return [list(output.token_ids) for output in llm.generate(make_prompts(), params)]


@pytest.mark.parametrize("options", [{}, EAGER, FEW], ids=["captured", "eager", "few graphs"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_5_text", "lfm2"])
def test_drafts_change_nothing(family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path, prompts = with_tokenizer(tiny_model(family, vocab_size=512)), make_prompts()
    params = [dataclasses.replace(PARAMS[i % len(PARAMS)], seed=i) for i in range(len(prompts))]
    expected = outputs_of(path, params)
    truth = {(*prompt, i): ids for i, (prompt, ids) in enumerate(zip(prompts, expected, strict=True))}
    lengths: dict[str, Callable[[int], int]] = {
        "right": lambda _: 64,
        "noise": lambda _: 0,
        "some": lambda n: n * 7 % 5,
    }
    for kind in ("right", "noise", "some", "ngram"):
        if kind in lengths:
            for name in ("TreePath", "Lookup"):
                monkeypatch.setattr(speculation, name, lambda _, kind=kind: Knowing(truth, lengths[kind]))
        assert outputs_of(path, params, speculate="ngram", **options) == expected, kind
        monkeypatch.undo()


@pytest.mark.parametrize("sizes", [{"linear_value_head_dim": 18}, {"linear_key_head_dim": 264}], ids=str)
def test_drafts_beside_delta_nets_that_have_no_kernel(sizes: dict[str, int]) -> None:
    """Steps that verify are computed op by op then, and those that only decode in graphs."""
    path = with_tokenizer(tiny_model("qwen3_5_text", vocab_size=512, mtp_num_hidden_layers=1, **sizes))
    params = [dataclasses.replace(PARAMS[i % len(PARAMS)], seed=i) for i in range(len(make_prompts()))]
    expected = outputs_of(path, params, dummy_weight=True, **EAGER)
    for speculate in ("off", "ngram", "mtp"):
        assert outputs_of(path, params, dummy_weight=True, speculate=speculate) == expected, speculate


@needs_gpu
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("max_batch", [0, 8, 32])
def test_a_head_tells_what_its_formula_says(made: tuple[Path, Any, Head], max_batch: int, ahead: int) -> None:
    """Also where steps follow one whose end the host does not know."""
    path, model, head = made
    told, drafts = generate(path, "mtp", ahead=ahead, cuda_graph_max_bs=max_batch, **ON_DEVICE)
    assert told == generate(path, "off")[0]
    assert len(drafts) > 5
    with torch.no_grad():
        for tokens, draft in drafts:
            assert draft == head.drafts(model, tokens, len(draft)), f"after {len(tokens)} tokens"


@pytest.mark.parametrize("options", [{}, EAGER, FEW], ids=["captured", "eager", "few graphs"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_heads_change_nothing(family: str, options: dict[str, Any]) -> None:
    path = with_tokenizer(tiny_model(family, vocab_size=512, mtp_num_hidden_layers=1))
    params = [dataclasses.replace(PARAMS[i % len(PARAMS)], seed=i) for i in range(len(make_prompts()))]
    expected = outputs_of(path, params, dummy_weight=True)
    assert outputs_of(path, params, dummy_weight=True, speculate="mtp", **options) == expected


@needs_gpu
@pytest.mark.parametrize("max_batch", [0, 32])
@pytest.mark.parametrize("case", CASES)
def test_an_eagle_head_tells_what_its_formula_says(case: str, max_batch: int, tmp_path: Path) -> None:
    family, options, changes = CASES[case]
    path, head = target(family, **HEADS), random_head(**options)
    where = head.save(tmp_path / "head", **changes)
    told, drafts = generate(path, "eagle", draft_model=where, cuda_graph_max_bs=max_batch, **ON_DEVICE)
    assert told == generate(path, "off")[0]
    assert len(drafts) > 5
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with torch.no_grad():
        for tokens, draft in drafts:
            assert draft == head.drafts(model, tokens, len(draft)), f"after {len(tokens)} tokens"


@needs_gpu
@pytest.mark.parametrize("max_batch", [0, 32])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_5_text"])
def test_a_second_model_tells_what_it_says(family: str, max_batch: int) -> None:
    """In the pages of another, whose heads it need not have."""
    path, second = tiny_model(family), tiny_model("llama")
    told, drafts = generate(path, "model", draft_model=second, ahead=1, cuda_graph_max_bs=max_batch, **ON_DEVICE)
    assert told == generate(path, "off")[0]
    assert_said_by(second, drafts)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("options", [{}, EAGER, FEW], ids=["captured", "eager", "few graphs"])
def test_second_models_change_nothing(
    served: tuple[Path, list[list[int]]], options: dict[str, Any], tp_size: int
) -> None:
    """One that guesses for itself is right wherever what is sampled is the most probable."""
    params = PARAMS[: len(served[1])]
    expected, _ = said(*served, params, device=DEVICE)
    flags: dict[str, Any] = {"draft_model": str(served[0]), "tensor_parallel_size": tp_size, "num_pages": 512}
    told, share = said(*served, params, device=DEVICE, **flags, **options)
    assert told == expected
    if options is not FEW:  # few graphs hold no drafts
        assert share > 0.1


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("options", [{}, EAGER, FEW], ids=["captured", "eager", "few graphs"])
@pytest.mark.parametrize("kind", ["trained", "random"])
def test_eagle_heads_change_nothing(
    served: tuple[Path, list[list[int]]], trained: Path, kind: str, options: dict[str, Any], tp_size: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A head of some of the tokens, too; and it is of use."""
    some = random_head(ids=torch.arange(3, WORDS, 2), vocab_size=WORDS)
    head = trained if kind == "trained" else some.save(tmp_path / "head")
    params = PARAMS[: len(served[1])]
    expected, _ = said(*served, params, device=DEVICE)
    told, share = said(
        *served, params, device=DEVICE, draft_model=str(head), tensor_parallel_size=tp_size, num_pages=512, **options
    )
    assert told == expected
    if kind == "trained" and options is not FEW:  # by chance one of `WORDS` is right; few graphs hold no drafts
        assert share > 0.04


@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_eagle_head_is_right_in_16_bits(tp_size: int, tmp_path: Path) -> None:
    """With a GPU's kernels for decode steps, heads of 64 features, and an LM head of 8 bits for drafts."""
    shape = {**HEADS, "head_dim": 64, "vocab_size": WORDS}
    path = make_words(shutil.copytree(target("llama", **shape), tmp_path / "model"), WORDS)
    prompts = [random_prompt(20 + i, seed=i) for i in range(4)]
    options = {"device": DEVICE, "dtype": "bfloat16", "num_pages": 512}
    texts, _ = said(path, prompts, [GREEDY] * 4, **options)
    head = random_head(ids=torch.arange(WORDS), **shape)
    train(head, AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval(), prompts, texts[:4])
    where = head.save(tmp_path / "head", vocab_size=WORDS)
    told, share = said(path, prompts, [GREEDY] * 4, draft_model=str(where), tensor_parallel_size=tp_size, **options)
    assert [len(ids) for ids in told] == [NUM_TOKENS] * 8
    assert share > 0.1
