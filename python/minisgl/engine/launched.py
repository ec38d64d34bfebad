"""A step on its way: what a GPU has been told to compute, and the handle by which the host asks for it."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from minisgl.attention.base import IntArray
from minisgl.core import StepResult
from minisgl.engine.logprobs import DeviceLogprobs
from minisgl.errors import EngineError

_POLL_SECONDS = 2e-5


class Launched(NamedTuple):
    """Results that will be there when the step is done.

    order: which of `ids` (and of the log-probabilities' keys) each of the plan's samples is; None: the same.
    """

    ids: torch.Tensor  # [n] int32
    order: IntArray | None = None
    logprobs: DeviceLogprobs | None = None
    prompt_logprobs: DeviceLogprobs | None = None


class CudaHandle:
    """A launched step, whose results are on the host after the event; see `scheduler.executor.StepHandle`."""

    def __init__(self, step_id: int, event: torch.cuda.Event, launched: Launched) -> None:
        self._step_id, self._event, self._launched = step_id, event, launched
        self.error: Exception | None = None

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.perf_counter() + timeout
        try:
            while self.error is None and not self._event.query():
                if deadline is not None and time.perf_counter() > deadline:
                    return False
                time.sleep(_POLL_SECONDS)
        except RuntimeError as error:  # CUDA reports here what went wrong on the device
            self.error = error
        return True

    def result(self) -> StepResult:
        self.wait()
        if self.error is not None:
            raise EngineError(f"step {self._step_id} failed: {self.error}") from self.error
        ids, order, of_tokens, of_prompts = self._launched
        logprobs = None if of_tokens is None else of_tokens.result()
        if order is not None:
            ids = ids[torch.from_numpy(order)]
        if order is not None and logprobs is not None:
            in_plan = order.argsort().tolist()
            logprobs = {in_plan[key]: value for key, value in logprobs.items()}
        prompts = None if of_prompts is None else of_prompts.result()
        return StepResult(self._step_id, ids.tolist(), logprobs, prompts)
