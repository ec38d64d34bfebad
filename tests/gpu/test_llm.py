"""`LLM` on the device in fp32: greedy tokens are Hugging Face's, whatever the schedule, graphs, cache or ranks."""

from __future__ import annotations

import dataclasses
import random
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from minisgl import LLM, SamplingParams
from tests.gpu.conftest import DEVICE
from tests.integration.test_llm import (
    GREEDY,
    NUM_TOKENS,
    expected,
    llm,
    make_prompts,
    model,
    test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch,
    test_bad_prompts_are_refused_before_anything_runs,
    test_every_family_through_the_planner,
    test_greedy_tokens_do_not_depend_on_the_schedule,
    test_seeded_sampling_survives_retraction,
    test_streams_can_be_read_in_turn_and_left_early,
    with_tokenizer,
)
from tests.integration.test_llm_sampling import (
    test_ends_before_min_tokens_are_not_sampled,
    test_frequency_and_presence_follow_the_formula,
    test_logprobs_equal_hugging_face_s,
    test_penalties_biases_and_plain_requests_in_one_batch,
)
from tests.models import hf_generate, tiny_model

__all__ = [
    "expected",
    "llm",
    "model",
    "test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch",
    "test_bad_prompts_are_refused_before_anything_runs",
    "test_ends_before_min_tokens_are_not_sampled",
    "test_every_family_through_the_planner",
    "test_frequency_and_presence_follow_the_formula",
    "test_greedy_tokens_do_not_depend_on_the_schedule",
    "test_logprobs_equal_hugging_face_s",
    "test_penalties_biases_and_plain_requests_in_one_batch",
    "test_seeded_sampling_survives_retraction",
    "test_streams_can_be_read_in_turn_and_left_early",
]

EAGER = {"cuda_graph_max_bs": 0}
SEEDED = [
    SamplingParams(1, 0.8, seed=1),
    SamplingParams(1, 0.8, top_k=20, seed=2),
    SamplingParams(1, 0.8, top_p=0.9, seed=3),
    SamplingParams(1, 0.8, top_k=40, top_p=0.9, min_p=0.05, seed=4),
]


@pytest.mark.parametrize(
    "options",
    [{}, {"disable_overlap": True}, {"page_size": 1, "max_prefill_length": 7}, {"num_pages": 24, "page_size": 8}],
    ids=str,
)
def test_eager_gives_the_tokens_of_hugging_face(
    model: Path, expected: list[list[int]], options: dict[str, Any]
) -> None:
    with LLM(str(model), **EAGER, **options) as llm:
        outputs = llm.generate(make_prompts(), GREEDY)
    assert [output.token_ids for output in outputs] == expected


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no graphs")
def test_graphs_do_not_change_sampled_tokens(model: Path) -> None:
    params = [dataclasses.replace(SEEDED[i % 4], max_tokens=NUM_TOKENS - i, seed=i, ignore_eos=True) for i in range(16)]
    runs = []
    for options in ({}, EAGER, {"disable_overlap": True}, {**EAGER, "disable_overlap": True}):
        with LLM(str(model), **options) as llm:
            runs.append([output.token_ids for output in llm.generate(make_prompts(), params)])
    assert runs[1:] == runs[:1] * 3


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no graphs")
@pytest.mark.parametrize("speculate", ["off", "mtp"])
def test_short_prompts_in_graphs_read_no_page_too_early(speculate: str) -> None:
    """Pages hold what others have left there: who reads one before it is written, also by another, goes wrong."""
    path = with_tokenizer(tiny_model("qwen3", vocab_size=512, head_dim=64, mtp_num_hidden_layers=1))
    rng, params = random.Random(0), SamplingParams(2, 0.0, logprobs=20, ignore_eos=True)
    prompts = [[rng.randrange(3, 400) for _ in range(num)] for num in (20, 250, 60, 130, 200, 90) * 8]
    pairs = [[prompt, prompt[: len(prompt) // 2] + prompt[:9]] for prompt in prompts]  # who share pages within a step
    options = {"dtype": "bfloat16", "max_running_requests": 256, "num_pages": 40, "dummy_weight": True}
    found = []
    for more in ({"speculate": speculate}, EAGER):
        with LLM(str(path), **options, **more) as llm:
            outputs = [out for pair in pairs for out in llm.generate(pair, params, progress=False)]
        found.append([{one.token_id: one.logprob for one in output.logprobs[0].top} for output in outputs])
    noise, others = (
        [max((abs(a[token] - b[token]) for token in a.keys() & b.keys()), default=9.0) for a, b in pairs]
        for pairs in (zip(*found, strict=True), pairwise(found[1]))
    )
    assert max(noise) < 0.1 * statistics.median(others), (noise, others)


def test_more_requests_than_a_graph_holds(model: Path, expected: list[list[int]]) -> None:
    """Batches above and below the largest captured one, in one run."""
    options = {"cuda_graph_max_bs": 0 if DEVICE == "cpu" else 4}
    params = [dataclasses.replace(GREEDY, max_tokens=4 + 4 * i) for i in range(16)]
    with LLM(str(model), **options) as llm:
        outputs = llm.generate(make_prompts(), params)
    assert [output.token_ids for output in outputs] == [ids[: 4 + 4 * i] for i, ids in enumerate(expected)]


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama"])
def test_ranks_give_the_tokens_of_one(family: str, tp_size: int) -> None:
    """With fewer KV heads than ranks for tp_size 4, and a vocabulary that no number of ranks divides."""
    path = with_tokenizer(tiny_model(family, vocab_size=509))
    prompts = make_prompts()[:8]
    with LLM(str(path), tp=tp_size, max_prefill_length=33) as llm:
        outputs = llm.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [hf_generate(path, prompt, NUM_TOKENS) for prompt in prompts]


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
def test_hybrids_give_the_tokens_of_hugging_face(family: str) -> None:
    """States inside graphs, which may be padded, and outside; chunks that go on from one; rows that are used again."""
    path = with_tokenizer(tiny_model(family, vocab_size=512))
    prompts = make_prompts()[:9]
    expected = [hf_generate(path, prompt, NUM_TOKENS) for prompt in prompts]
    few_rows = {"max_running_requests": 3, "cuda_graph_max_bs": 0 if DEVICE == "cpu" else 2}
    for options in ({}, EAGER, {"max_prefill_length": 17}, few_rows):
        with LLM(str(path), **options) as llm:
            outputs = llm.generate(prompts, GREEDY)
        assert [output.token_ids for output in outputs] == expected, options
