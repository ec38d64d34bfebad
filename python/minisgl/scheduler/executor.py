"""What the scheduler sees of an engine."""

from __future__ import annotations

from typing import Protocol

from minisgl.core import StepPlan, StepResult


class StepHandle(Protocol):
    """A submitted step."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: for ever); whether the step has finished."""

    def result(self) -> StepResult:
        """Wait for the step. Raises: EngineError when it failed on the device."""


class Executor(Protocol):
    """Executes plans in the order of submission; `submit` does not wait for the step."""

    def submit(self, plan: StepPlan) -> StepHandle: ...

    def close(self) -> None:
        """Finish what was submitted and free the device. Idempotent."""
