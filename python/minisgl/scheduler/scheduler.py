"""The scheduler's loop: receive, plan, submit, and retire the step before while the device computes."""

from __future__ import annotations

import logging
import time
import zlib
from collections import deque

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import Executor, Req, StepHandle, StepPlan
from minisgl.errors import EngineError
from minisgl.message.backend import AbortMsg, ResumeMsg, UserMsg
from minisgl.message.codec import pack_ids, unpack_ids
from minisgl.message.frontend import FlushReply
from minisgl.message.logprobs import pack_logprobs
from minisgl.message.tokenizer import PROMPT_TAIL, DetokenizeMsg, StreamStart
from minisgl.scheduler.grammar import Grammars
from minisgl.scheduler.output import ReqOutput
from minisgl.scheduler.planner import Planner
from minisgl.scheduler.status import StatusLog, StepStats
from minisgl.scheduler.transport import Transport
from minisgl.utils.faults import fault

logger = logging.getLogger(__name__)

_PUMP_SECONDS = 0.1
_LATE_SECONDS = 10.0  # beyond its estimate: a step that takes longer makes us unhealthy
_CHECK_EVERY = 16  # spells of work
_MAX_FAILURES = 3  # steps in a row; after that the device is taken for broken


class Scheduler:
    """One rank's planner, engine and connection, in step with the other ranks' copies."""

    def __init__(
        self,
        config: SchedulerConfig,
        executor: Executor,
        transport: Transport,
        *,
        tp_size: int = 1,
        check_ranks: bool = False,
        status: StatusLog | None = None,
        stats: StepStats | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.planner = Planner(config)
        self._executor = executor
        self._transport = transport
        self._overlap = config.overlap
        self._tp_size = tp_size
        self._check_ranks = check_ranks
        self._status = status
        self._stats = stats
        if stats is not None:
            stats.watch(self.planner)
        self._grammars = grammars  # on rank 0; the transport's too
        self._digest = 0
        self._submitted: deque[tuple[StepPlan, StepHandle]] = deque()
        self._announced: set[int] = set()  # uids that the detokenizer knows; never iterated
        self._num_failures = 0
        self._stuck = False  # nothing could be planned, with no step in flight
        self._step_timeout, self._token_seconds = config.step_timeout, config.token_seconds
        self._checked = True
        self._num_spells = 0  # of work, with idleness after each
        self._strict = config.check_integrity

    def run(self) -> None:
        """Serve for ever. Raises: EngineError when the device is broken or the ranks have diverged."""
        while True:
            self.turn()
            if self._status is not None:
                self._status.update(self.planner)

    def turn(self) -> None:
        """One turn of the loop: with overlap, step n is submitted before the results of step n - 1 are taken in."""
        idle = self.planner.is_idle
        if idle and not self._checked:
            self._check_idle()
        outputs: list[ReqOutput] = []
        block = idle or (self._stuck and self._grammars is not None and self._grammars.is_holding)
        for message in self._transport.receive(block=block, digest=self._digest):
            if isinstance(message, UserMsg):
                outputs += self.planner.add(message.uid, unpack_ids(message.input_ids), message.params, message.count)
            elif isinstance(message, AbortMsg):
                outputs += self.planner.abort(message.uid)
            elif isinstance(message, ResumeMsg):
                self.planner.resume(message.uid, message.paced)
            else:
                self._transport.answer(FlushReply(message.uid, self.planner.flush_unused()))
        if idle and self._status is not None:
            self._status.resume()
        self._send(outputs)
        plan = self.planner.plan()
        if self._check_ranks and plan is not None:
            self._digest = zlib.crc32(repr((plan.step_id, plan.page_updates, plan.reqs)).encode())
        if plan is not None and self._grammars is not None:
            plan = self._grammars.add_words(plan, self.planner.masked_reqs, self._submitted)
        self._stuck = plan is None and not self._submitted
        if plan is not None:
            fault("turn")
            if self._stats is not None:
                self._stats.count(plan)
            self._submitted.append((plan, self._executor.submit(plan)))
        num_left = 1 if self._overlap and plan is not None else 0
        while len(self._submitted) > num_left:
            self._retire()

    def _check_idle(self) -> None:
        """Nothing is running: every page must be free or the cache's. A fault costs the cache, not the server.

        A large pool takes tens of milliseconds to walk, so only every so many spells of work are followed by a check:
        a count, not a clock, so that all ranks check (and flush) at the same turn.
        """
        self._checked = True
        self._num_spells += 1
        if self._num_spells % _CHECK_EVERY and not self._strict:
            return
        try:
            self.planner.check_integrity()
        except AssertionError:
            if self._strict:
                raise
            logger.exception("the page accounting is broken; the prefix cache is flushed")
            self.planner.flush()

    def _retire(self) -> None:
        """Take in the oldest step. It stays submitted until it has run: an interrupt (under `LLM`) comes while we wait,
        and the next turn goes on from there."""
        self._checked = False
        plan, handle = self._submitted[0]
        if not handle.wait(_PUMP_SECONDS):
            self._wait(plan, handle)
        try:
            result = handle.result()
            self._submitted.popleft()
            outputs = self.planner.retire(result)
            self._num_failures = 0
        except EngineError as error:
            self._num_failures += 1
            if self._tp_size > 1 or self._num_failures >= _MAX_FAILURES:
                raise  # other ranks may be waiting inside a collective, or the device is beyond help
            self._submitted.popleft()
            logger.exception("step %d failed; its requests end with an error", plan.step_id)
            outputs = self.planner.fail(plan.step_id, f"the engine failed: {error}")
        self._send(outputs)

    def _wait(self, plan: StepPlan, handle: StepHandle) -> None:
        """Wait for a step that takes its time, and show that we are alive. Raises: EngineError `step_timeout` seconds
        after what it may take, by the slowest of late. Time in which we were stopped ourselves does not count."""
        seconds, last = _PUMP_SECONDS, time.monotonic()
        estimate = plan.num_tokens * self._token_seconds
        while not handle.wait(_PUMP_SECONDS):
            seconds, last = seconds + min(time.monotonic() - last, 1.0), time.monotonic()
            if seconds > estimate + self._step_timeout:
                raise EngineError(f"step {plan.step_id} has not ended after {seconds:.0f} s (--step-timeout)")
            self._transport.pump(late=seconds > estimate + min(_LATE_SECONDS, self._step_timeout / 2))
        self._token_seconds = max(seconds / max(1, plan.num_tokens), 0.9 * self._token_seconds)

    def _send(self, outputs: list[ReqOutput]) -> None:
        if self._grammars is not None:
            outputs = self._grammars.finish(outputs)
        if self._status is not None:
            self._status.count(outputs)
        if outputs:
            self._transport.send([self._message(output) for output in outputs])

    def _message(self, output: ReqOutput) -> DetokenizeMsg:
        req, start = output.req, None
        if req.uid not in self._announced:
            self._announced.add(req.uid)
            start = _stream_start(req)
        if output.finish_reason is not None:
            self._announced.discard(req.uid)
            num_output = req.num_tokens - req.prompt_len
            reason = output.error or output.finish_reason.value
            logger.debug("request %d: %s after %d + %d tokens", req.uid, reason, req.prompt_len, num_output)
        return DetokenizeMsg(
            uid=req.uid,
            token_ids=pack_ids(output.token_ids),
            num_cached=req.num_cached,
            num_hidden=output.num_hidden,
            start=start,
            finish_reason=output.finish_reason,
            error=output.error,
            error_status=output.error_status,
            logprobs=None if output.logprobs is None else pack_logprobs([output.logprobs]),
            prompt_logprobs=None if output.prompt_logprobs is None else pack_logprobs(output.prompt_logprobs),
        )


def _stream_start(req: Req) -> StreamStart:
    params, prompt = req.params, req.tokens[: req.prompt_len]
    return StreamStart(
        num_prompt_tokens=req.prompt_len,
        stop=params.stop,
        prompt_tail=pack_ids(prompt[-PROMPT_TAIL:]),
        include_stop=params.include_stop_str_in_output,
        skip_special=params.skip_special_tokens,
        min_tokens=params.min_tokens,
        echo=params.echo,
        prompt=pack_ids(prompt) if params.echo or params.prompt_logprobs is not None else b"",
    )
