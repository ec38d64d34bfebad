"""Penalties, biases, early ends and log-probabilities through `LLM`, against what Hugging Face generates with the same.

`tests/gpu` runs these again on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl import LLM
from minisgl.core import FinishReason
from tests.integration.test_llm import GREEDY, llm, make_prompts, model
from tests.models import hf_logits, hf_model

__all__ = ["llm", "model"]

NUM = 24
PROMPTS = [prompt for prompt in make_prompts() if len(prompt) > 2]
SHORT = replace(GREEDY, max_tokens=NUM)


def hugging_face(model: Path, prompt: list[int], **options: Any) -> list[int]:
    """Greedy, by `generate` with its own processors."""
    ids = torch.tensor([prompt])
    output = hf_model(model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        **{"max_new_tokens": NUM, "eos_token_id": None, **options},
    )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def test_penalties_biases_and_plain_requests_in_one_batch(llm: LLM, model: Path) -> None:
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"logit_bias": ((7, 3.0), (90, -5.0))}, {"sequence_bias": [[[7], 3.0], [[90], -5.0]]}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
    ]
    params = [replace(SHORT, **kinds[i % 4][0]) for i in range(len(PROMPTS))]
    outputs = llm.generate(PROMPTS, params)
    for i, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True)):
        assert output.token_ids == hugging_face(model, prompt, **kinds[i % 4][1]), i


def test_frequency_and_presence_follow_the_formula(llm: LLM, model: Path) -> None:
    """Transformers has no such processors: the formula, step by step, on its logits."""
    prompt = PROMPTS[0]
    (output,) = llm.generate([prompt], replace(SHORT, frequency_penalty=0.8, presence_penalty=1.1))
    for i, token in enumerate(output.token_ids):
        logits = hf_logits(model, prompt + output.token_ids[:i])[-1]
        counts = torch.tensor(output.token_ids[:i], dtype=torch.int64).bincount(minlength=len(logits))
        assert token == int((logits - 0.8 * counts - 1.1 * (counts > 0)).argmax()), i


@pytest.mark.parametrize("least", [0, 9])
def test_ends_before_min_tokens_are_not_sampled(llm: LLM, model: Path, least: int) -> None:
    prompt = PROMPTS[1]
    free = llm.generate([prompt], SHORT)[0].token_ids
    ends = (free[4], free[10])
    (output,) = llm.generate([prompt], replace(SHORT, stop_token_ids=ends, min_tokens=least))
    options = {"min_new_tokens": least} if least else {}
    assert output.token_ids == hugging_face(model, prompt, eos_token_id=list(ends), pad_token_id=0, **options)
    stopped = output.finish_reason is FinishReason.STOP
    assert stopped == (output.token_ids[-1] in ends)
    assert all(token not in ends for token in output.token_ids[:least])


def test_logprobs_equal_hugging_face_s(llm: LLM, model: Path) -> None:
    """Twice, with the prompts in the prefix cache the second time; in a batch with others."""
    wanted = replace(SHORT, logprobs=4, prompt_logprobs=2, repetition_penalty=1.1)
    params = [wanted if i % 2 else SHORT for i in range(len(PROMPTS))]
    for _ in range(2):
        for i, output in enumerate(llm.generate(PROMPTS, params)):
            reported = [*output.prompt_logprobs, *output.logprobs]
            if not i % 2:
                assert reported == []
                continue
            tokens, num_prompt = PROMPTS[i] + output.token_ids, len(PROMPTS[i])
            assert [token.token_id for token in reported] == tokens
            expected = hf_logits(model, tokens).log_softmax(-1)
            assert reported[0].logprob is None
            for position, token in enumerate(reported[1:], 1):
                row = expected[position - 1]
                assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-3)
                best = row.topk(4 if position >= num_prompt else 2).values.tolist()
                assert [top.logprob for top in token.top] == pytest.approx(best, abs=1e-3)
                assert [top.logprob for top in token.top] == pytest.approx(
                    [float(row[top.token_id]) for top in token.top], abs=1e-3
                )
