"""The engine that computes nothing. What the process that has it does not need, this module does not import."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from minisgl.config.runtime import TokenizerConfig
from minisgl.core import Masks, StepPlan, StepResult
from tests.fake_server import EOS, VOCAB
from tests.faults.points import fault
from tests.packing import pack_logprobs


class FakeHandle:
    def __init__(self, result: StepResult, done_at: float) -> None:
        self._result = result
        self._done_at = done_at

    def wait(self, timeout: float | None = None) -> bool:
        left = self._done_at - time.monotonic()
        time.sleep(max(0.0, left if timeout is None else min(left, timeout)))
        return time.monotonic() >= self._done_at

    def result(self) -> StepResult:
        self.wait()
        return self._result


class FakeExecutor:
    """The token at a position is a function of the position, and of the seed unless decoding is greedy."""

    def __init__(self, delay: float, answer: Answer | None = None) -> None:
        self._delay = delay
        self._answer = answer
        self._answers: dict[int, tuple[int, list[int]]] = {}  # by row: the prompt's length, the tokens after it
        self._seeds: dict[int, int] = {}
        self._logprobs: dict[int, int] = {}  # by row: alternatives that are wanted

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> FakeHandle:
        for admission in plan.admissions:
            greedy = admission.params.temperature == 0
            self._logprobs[admission.row] = admission.params.logprobs or 0
            self._seeds[admission.row] = 0 if greedy else admission.params.seed or 0
            if self._answer is not None:
                self._answers[admission.row] = (len(admission.token_ids), self._answer())
        stalled = fault("step") == "stall"  # it never ends
        ids = [(self._token(req.row, req.start + req.num_new),) for req in plan.reqs if req.num_samples]
        rows = enumerate(req.row for req in plan.reqs if req.num_samples)
        logprobs = {index: _logprobs(self._logprobs[row]) for index, row in rows if self._logprobs[row]}
        return FakeHandle(
            StepResult(plan.step_id, ids, logprobs), math.inf if stalled else time.monotonic() + self._delay
        )

    def close(self) -> None:
        pass

    def _token(self, row: int, position: int) -> int:
        if self._answer is None:
            return 3 + (self._seeds[row] * 7919 + position * 31) % (VOCAB - 3)
        prompt_len, ids = self._answers[row]
        return ids[min(position - prompt_len, len(ids) - 1)]


def _logprobs(count: int) -> bytes:
    return pack_logprobs([(0.0, [(token, 0.0) for token in range(3, 3 + count)])])


class Answer:
    """The tokens of what a file says, and the end."""

    def __init__(self, tokenizer: TokenizerConfig, file: str) -> None:
        sys.modules["torch"] = None  # type: ignore[assignment]  # transformers would import it, for nothing
        from minisgl.tokenizer.tokenize import HFTextCodec

        self._codec = HFTextCodec(tokenizer.model_path)
        self._file = Path(file)

    def __call__(self) -> list[int]:
        return [*self._codec.encode(self._file.read_text(encoding="utf-8"), special=False), EOS]
