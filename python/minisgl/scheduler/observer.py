"""Who watches a scheduler at work."""

from __future__ import annotations

from collections.abc import Sequence

from minisgl.core import ReqOutput, StepPlan
from minisgl.scheduler.planner import Planner


class Observer:
    """Is told what a scheduler does, as it happens, and must not keep it waiting. This one looks away."""

    def attached(self, planner: Planner) -> None:
        """The planner whose queues and pages may be looked at from now on."""

    def resumed(self) -> None:
        """There is work again, after a pause."""

    def submitted(self, plan: StepPlan) -> None:
        """A step was handed to the engine."""

    def told(self, outputs: Sequence[ReqOutput]) -> None:
        """Requests have new tokens, or have ended."""

    def turned(self) -> None:
        """A turn of the loop is over."""
