"""Log-probabilities that the engine and the Python API report, against Hugging Face's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import SamplingParams
from minisgl.engine.engine import create_engine
from minisgl.message.messages import unpack_logprobs
from minisgl.scheduler.planner import Planner
from tests.driver import engine_config
from tests.models import hf_logits, random_prompt, tiny_model

NUM_TOP = 5


class Session:
    """A planner and an engine, a step at a time."""

    def __init__(self, **options: Any) -> None:
        self.path = tiny_model("qwen3")
        page_size, num_pages = options.pop("page_size", 4), options.pop("num_pages", 256)
        chunk, overlap = options.pop("chunk", 64), options.pop("overlap", True)
        config = engine_config(self.path, page_size=page_size, num_pages=num_pages, **options)
        self.engine, self.overlap = create_engine(config), overlap
        self.planner = Planner(
            SchedulerConfig(
                config.max_running_requests,
                chunk,
                min(config.max_seq_len, num_pages * page_size),
                num_pages,
                page_size,
                check_integrity=1,
                integrity_fatal=True,
            )
        )
        self.outputs: dict[int, list[Any]] = {}

    def run(self) -> None:
        handles: list[Any] = []
        while not self.planner.is_idle:
            planned = self.planner.plan()
            if planned is not None:
                handles.append(self.engine.submit(planned.plan))
            while len(handles) > (1 if self.overlap and planned is not None else 0):
                for output in self.planner.retire(handles.pop(0).result()):
                    self.outputs.setdefault(output.req.uid, []).append(output)

    def tokens(self, uid: int) -> list[int]:
        return [token for output in self.outputs[uid] for token in output.token_ids]

    def check(self, uid: int, prompt: list[int]) -> None:
        """What was reported of the output, and of the prompt if anything was, is what the model computes."""
        tokens, outputs = prompt + self.tokens(uid), self.outputs[uid]
        expected = hf_logits(self.path, tokens[:-1]).log_softmax(-1)
        params, reported = outputs[0].req.params, b"".join(output.logprobs for output in outputs)
        if params.logprobs is not None:
            _compare(reported, params.logprobs, expected[len(prompt) - 1 :], tokens[len(prompt) :])
        of_prompt = b"".join(output.prompt_logprobs for output in outputs)
        if params.prompt_logprobs is not None:
            _compare(of_prompt, params.prompt_logprobs, expected, prompt[1:])
        assert (params.logprobs is not None, params.prompt_logprobs is not None) == (reported != b"", of_prompt != b"")


def _compare(packed: bytes, num_top: int, expected: torch.Tensor, targets: list[int]) -> None:
    assert len(packed) == 4 * (1 + 2 * num_top) * len(targets)
    told = unpack_logprobs(packed, len(targets))
    pairs = torch.tensor([pairs for _, pairs in told], dtype=torch.float64).view(len(targets), num_top, 2)
    chosen, top_ids, top = torch.tensor([one for one, _ in told]), pairs[:, :, 0], pairs[:, :, 1].float()
    expected = expected[: len(targets)]
    of_targets = expected.gather(1, torch.tensor(targets)[:, None])[:, 0]
    torch.testing.assert_close(chosen, of_targets, atol=1e-3, rtol=0)
    torch.testing.assert_close(top, expected.topk(top.shape[1]).values, atol=1e-3, rtol=0)
    torch.testing.assert_close(expected.gather(1, top_ids.long()), top, atol=1e-3, rtol=0)


@pytest.mark.parametrize("chunk", [7, 64])
def test_equal_log_softmax_whatever_else_changes_the_logits(chunk: int) -> None:
    """Also of requests with temperature, penalties and biases: it is the model's own that is reported."""
    session = Session(chunk=chunk)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": NUM_TOP},
        {"temperature": 0.7, "top_k": 5, "logprobs": 0},
        {"temperature": 1.2, "repetition_penalty": 1.5, "presence_penalty": 1.0, "logprobs": 2},
        {"temperature": 0.0},
        {"temperature": 0.0, "logit_bias": ((9, 100.0),), "logprobs": 1, "prompt_logprobs": 3},
    ]
    prompts = [random_prompt(4 + 9 * i, seed=i) for i in range(len(kinds))]
    for uid, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
        session.planner.add(uid, prompt, SamplingParams(max_tokens=8, seed=uid, ignore_eos=True, **kind))
    session.run()
    for uid, prompt in enumerate(prompts):
        session.check(uid, prompt)
    assert [output.logprobs for output in session.outputs[3]] == [b""] * 8
    assert set(session.tokens(4)) == {9}
    session.engine.close()


@pytest.mark.parametrize("overlap", [True, False])
def test_of_a_prompt_that_is_cached(overlap: bool) -> None:
    """Its tokens are computed again where they are asked for, and only there."""
    session, prompt = Session(overlap=overlap, chunk=16), random_prompt(50)
    params = SamplingParams(max_tokens=2, temperature=0.0, seed=0, ignore_eos=True)
    wanted = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=NUM_TOP, logprobs=NUM_TOP)
    for uid, each in enumerate((params, wanted, params, wanted)):
        session.planner.add(uid, prompt, each)
        session.run()
        session.check(uid, prompt)
    assert [session.outputs[uid][0].req.num_cached for uid in range(4)] == [0, 0, 48, 0]
    assert session.outputs[1][0].prompt_logprobs
    session.engine.close()


def test_of_prompts_that_are_retracted() -> None:
    """Few pages: requests lose them in the middle of prompt or output, and still report each token once."""
    session = Session(page_size=4, num_pages=24, chunk=10)
    prompts = [random_prompt(20 + i, seed=i) for i in range(4)]
    for uid, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=30,
            temperature=0.0,
            seed=0,
            ignore_eos=True,
            logprobs=1,
            prompt_logprobs=1,
            frequency_penalty=0.5,
        )
        session.planner.add(uid, prompt, params)
    session.run()
    for uid, prompt in enumerate(prompts):
        assert sum(bool(output.prompt_logprobs) for output in session.outputs[uid]) == 1
        session.check(uid, prompt)
    alone = Session()
    alone.planner.add(3, prompts[3], SamplingParams(30, 0.0, seed=0, ignore_eos=True, frequency_penalty=0.5))
    alone.run()
    assert alone.tokens(3) == session.tokens(3)
    session.engine.close()
    alone.engine.close()


def test_a_prompt_alone_is_scored() -> None:
    """max_tokens of 0: no output, but everything about the prompt."""
    session, prompt = Session(), random_prompt(20)
    session.planner.add(0, prompt, SamplingParams(max_tokens=0, echo=True, seed=0, prompt_logprobs=0))
    session.run()
    (output,) = session.outputs[0]
    assert (output.token_ids, output.finish_reason) == ((), "length")
    session.check(0, prompt)
    session.engine.close()


def test_n_outputs_share_one_prefill() -> None:
    """Those that come together: all but the last page of the prompt is computed once."""
    session, prompt = Session(chunk=16), random_prompt(50)
    plans: list[Any] = []
    submit = session.engine.submit
    session.engine.submit = lambda plan: plans.append(plan) or submit(plan)  # type: ignore[method-assign,func-returns-value]
    for uid in range(4):
        session.planner.add(uid, prompt, SamplingParams(max_tokens=1, seed=uid))
    session.run()
    assert sum(plan.num_tokens for plan in plans) == 50 + 3 * 2
    session.engine.close()
