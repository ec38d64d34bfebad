"""Who watches a scheduler at work. One who does is the status line in the log, who counts for `/metrics` too."""

import logging
import time
from collections.abc import Callable, Sequence

from minisgl.core import ReqOutput, StepPlan
from minisgl.message.messages import Histogram, StatsMsg, StatsReply, UserMsg
from minisgl.scheduler.plan import Planned
from minisgl.scheduler.planner import Planner


class Observer:
    """Is told what a scheduler does, as it happens, and must not keep it waiting. This one looks away."""

    def attached(self, planner: Planner, pump: Callable[[], None]) -> None:
        """The planner that may be looked at from now on. pump: takes in messages, for who holds the scheduler up."""

    def received(self, message: UserMsg) -> None:
        """A request has come, of which the planner has not heard yet."""

    def resumed(self) -> None:
        """There is work again, after a pause."""

    def submitted(self, planned: Planned) -> None:
        """A step was handed to the engine, which may compute it meanwhile."""

    def retired(self, plan: StepPlan, seconds: float) -> None:
        """A step has run. seconds: that were spent waiting for it."""

    def told(self, outputs: Sequence[ReqOutput]) -> None:
        """Requests have new tokens, or have ended."""

    def turned(self) -> None:
        """A turn of the loop is over."""


logger = logging.getLogger(__name__)
_SECONDS = 10.0  # of work between two lines, and at least that from any line to the one that says that the work is done
_REQUEST_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Status(Observer):
    """Counts of rank 0's work, for whoever asks. In the log, one line for each ten seconds of work, and one when it is
    done unless there was one just now; then the next tells of it. None while there is nothing to do."""

    _planner: Planner  # from the moment on that there is a scheduler

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests, self._tokens = Histogram(_REQUEST_BOUNDS), Histogram(_TOKEN_BOUNDS)  # of steps
        self._logged, self._resumed, self._busy = clock() - _SECONDS, clock(), 0.0
        self._num_done = self._num_output = 0

    def attached(self, planner: Planner, pump: Callable[[], None]) -> None:  # noqa: ARG002
        self._planner = planner

    def resumed(self) -> None:
        self._resumed = self._clock()  # the time until now was not spent on work

    def submitted(self, planned: Planned) -> None:
        self._requests.add(len(planned.reqs))
        self._tokens.add(planned.plan.num_tokens)

    def told(self, outputs: Sequence[ReqOutput]) -> None:
        self._num_output += sum([len(output.token_ids) for output in outputs])
        self._num_done += sum([output.finish_reason is not None for output in outputs])

    def turned(self) -> None:
        planner, now = self._planner, self._clock()
        if not planner.is_idle and self._busy + now - self._resumed < _SECONDS:
            return
        self._busy, self._resumed = self._busy + now - self._resumed, now
        if self._busy < _SECONDS and (now - self._logged < _SECONDS or not self._num_done):
            return  # short requests in a row share a line
        text = "requests: %d done, %d running, %d waiting; %d tokens in %.1f s (%.0f/s); KV cache %.0f%% in use"
        requests = self._num_done, len(planner.running), len(planner.waiting)
        tokens = self._num_output, self._busy, self._num_output / max(self._busy, 1e-3)
        logger.info(text, *requests, *tokens, 100 * planner.pages.num_used / planner.config.num_pages)
        self._logged, self._busy, self._num_done, self._num_output = now, 0.0, 0, 0

    def reply(self, question: StatsMsg) -> StatsReply:
        planner, num_pages = self._planner, self._planner.config.num_pages
        drafted = dict(planner.speculation.num_drafted), dict(planner.speculation.num_right)
        counts = num_pages, planner.pages.num_used, planner.num_retracted, *drafted, self._requests, self._tokens
        return StatsReply(question.uid, len(planner.running), len(planner.waiting), *counts)
