"""The output is the same with drafts and without, whatever these are: noise, right, right up to somewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import Executor, Req, ReqOutput, SamplingParams
from minisgl.engine.engine import create_engine
from minisgl.message.messages import unpack_logprobs
from minisgl.scheduler.drafters import Drafter
from minisgl.scheduler.planner import Planner
from tests.driver import CPU_KERNELS, engine_config
from tests.models import random_prompt, tiny_model

NUM_TOKENS = 40
PLAIN = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, seed=0, ignore_eos=True)
REQUESTS = [
    PLAIN,
    replace(PLAIN, temperature=1.0, seed=7),
    replace(PLAIN, temperature=0.6, seed=5, top_p=0.8, top_k=40, logprobs=2),
    replace(PLAIN, repetition_penalty=1.3, frequency_penalty=0.6),
    replace(PLAIN, temperature=0.9, presence_penalty=1.0, seed=3, logprobs=0, prompt_logprobs=1),
    replace(PLAIN, logit_bias=((5, 2.0), (9, -3.0))),
    replace(PLAIN, ignore_eos=False, stop_token_ids=tuple(range(0, 256, 3)), min_tokens=9),
]
SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "layer by layer": ("llama", {}),
    "whole steps": ("qwen3", CPU_KERNELS),
    "experts": ("qwen3_moe", CPU_KERNELS),
    "states": ("qwen3_5_text", {**CPU_KERNELS, "num_snapshots": 8}),
    "convolutions": ("lfm2", {**CPU_KERNELS, "num_snapshots": 8}),
    "convolutions and windows": ("lfm3", {**CPU_KERNELS, "num_snapshots": 8}),
    "convolutions layer by layer": ("lfm2", {"num_snapshots": 8}),
}


class Setup(NamedTuple):
    engine: Executor
    config: SchedulerConfig
    expected: list[list[ReqOutput]]  # without drafts


class Knowing(Drafter):
    """Knows what will be generated; of a draft so many tokens are right."""

    def __init__(self, truth: Mapping[int, list[int]], num_right: Callable[[int], int]) -> None:
        self._truth, self._num_right = truth, num_right

    def propose(self, req: Req, num_pending: int, most: int) -> list[int]:
        begin = len(req.tokens) - req.prompt_len + num_pending
        ids = self._truth[req.uid][begin : begin + most]
        right = self._num_right(begin)
        return [token if i < right else (token + 1) % 256 for i, token in enumerate(ids)]


def run(
    engine: Executor, config: SchedulerConfig, drafter: Drafter | None, requests: Sequence[SamplingParams] = REQUESTS
) -> tuple[list[list[ReqOutput]], int]:
    """What each request is told, and the number of steps."""
    return serve(engine, Planner(config, drafter), requests)


def serve(
    engine: Executor, planner: Planner, requests: Sequence[SamplingParams], first: int = 0
) -> tuple[list[list[ReqOutput]], int]:
    """first: uid of the first one."""
    handles, num_steps = list[Any](), 0
    told: list[list[ReqOutput]] = [[] for _ in requests]
    for index, params in enumerate(requests):
        assert not planner.add(first + index, random_prompt(5 + 9 * index, seed=index), params)
    while not planner.is_idle:
        if (planned := planner.plan()) is not None:
            handles.append(engine.submit(planned.plan))
            num_steps += 1
        while len(handles) > (planned is not None):
            for output in planner.retire(handles.pop(0).result()):
                told[output.req.uid - first].append(output)
    return told, num_steps


def ids_of(outputs: list[ReqOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def logprobs_of(outputs: list[ReqOutput]) -> list[tuple[float, list[tuple[int, float]]]]:
    return [one for output in outputs for one in unpack_logprobs(output.logprobs, len(output.token_ids))]


@pytest.fixture(scope="module", params=[*SETUPS])
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    family, kernels = SETUPS[request.param]
    config = engine_config(
        tiny_model(family), page_size=4, num_pages=256, max_running_requests=64, draft_len=8, **kernels
    )
    rows, chunk, longest = config.max_running_requests, 64, config.max_seq_len
    states = {"has_states": bool(config.model.states), "num_snapshots": config.num_snapshots}
    planning = SchedulerConfig(rows, chunk, longest, 256, 4, check_integrity=1, integrity_fatal=True, **states)
    engine = create_engine(config)
    yield Setup(engine, planning, run(engine, planning, None)[0])
    engine.close()


@pytest.mark.parametrize("kind", ["right", "noise", "some", "ngram"])
def test_drafts_change_nothing(setup: Setup, kind: str) -> None:
    truth = {uid: ids_of(outputs) for uid, outputs in enumerate(setup.expected)}
    lengths: dict[str, Callable[[int], int]] = {
        "right": lambda _: 64,
        "noise": lambda _: 0,
        "some": lambda n: n * 7 % 5,
    }
    drafter = Knowing(truth, lengths[kind]) if kind in lengths else None
    config = replace(setup.config, speculate="ngram" if kind == "ngram" else "off")
    told, num_steps = run(setup.engine, config, drafter)
    for outputs, expected in zip(told, setup.expected, strict=True):
        assert ids_of(outputs) == ids_of(expected)
        assert outputs[-1].finish_reason is expected[-1].finish_reason
        parts, wanted = (logprobs_of(some) for some in (outputs, expected))
        assert len(parts) == len(wanted) == (0 if outputs[0].req.params.logprobs is None else len(ids_of(outputs)))
        for part, one in zip(parts, wanted, strict=True):
            np.testing.assert_allclose(part[0], one[0], atol=1e-4)
            assert [token for token, _ in part[1]] == [token for token, _ in one[1]]
    assert kind != "right" or num_steps < NUM_TOKENS // 2


def test_the_same_questions_again_take_fewer_steps(setup: Setup) -> None:
    """The prefix cache knows what was said the last time."""
    planner = Planner(replace(setup.config, speculate="ngram"))
    rounds = [serve(setup.engine, planner, REQUESTS, first) for first in (0, 100)]
    for told, _ in rounds:
        assert [ids_of(outputs) for outputs in told] == [ids_of(outputs) for outputs in setup.expected]
    assert rounds[1][1] < 0.6 * rounds[0][1]
    counts = planner.speculation
    assert counts.num_right["tree"] > 0.9 * counts.num_drafted["tree"] > NUM_TOKENS
