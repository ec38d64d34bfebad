"""The scheduler's loop: receive, plan, submit, and retire the step before while the device computes."""

import logging
import time
from collections import deque

import numpy as np

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import Executor, FinishReason, Req, ReqOutput, SamplingParams, StepHandle, StepPlan
from minisgl.errors import EngineError, IntegrityError, WorkerDied
from minisgl.message import messages as wire
from minisgl.scheduler.integrity import check_integrity, dump
from minisgl.scheduler.late import Submitted
from minisgl.scheduler.observer import Observer
from minisgl.scheduler.planner import Planner
from minisgl.scheduler.transport import Transport

logger = logging.getLogger(__name__)
PUMP_SECONDS = 0.1
_LATE_SECONDS = 10.0  # beyond its estimate: a step that takes longer makes us unhealthy
_CHECK_EVERY = 16  # spells of work: after so many of them there is a walk
_MAX_FAILURES = 3  # steps in a row; after that the device is taken for broken


class Scheduler:
    """One rank's planner, engine and connection, in step with the other ranks' copies."""

    def __init__(
        self, config: SchedulerConfig, executor: Executor, transport: Transport, *observers: Observer, tp_size: int = 1
    ) -> None:
        self.planner = Planner(config)
        self._config, self._executor, self._transport = config, executor, transport
        self._tp_size, self._observers = tp_size, observers
        for observer in observers:
            observer.attached(self.planner, transport.pump)
        self._grammars = transport.grammars
        self._submitted: deque[Submitted] = deque()
        self._inbox: deque[wire.RankMsg] = deque()
        self._open: dict[int, bool] = {}  # uids whose terminal output is to come: whether the detokenizer knows them
        self._num_failures = 0
        self._stuck = False  # nothing could be planned, with no step in flight
        self._slowest = 0.0  # seconds of a step, of late
        self._checked = True
        self._num_spells = 0  # of work, with idleness after each

    def run(self) -> None:
        """Serve for ever. Raises: EngineError when the device is broken or the ranks have diverged."""
        while True:
            self.turn()

    def turn(self) -> None:
        """One turn of the loop. When messages have been taken in, and failures aside, it is

        plan = planner.plan()                       # step n
        handles.append(executor.submit(plan, masks))
        result = handles.popleft().result()         # of step n - 1, while the device computes step n
        outputs = planner.retire(result)
        transport.send(outputs)"""
        try:
            self._turn()
        except (EngineError, WorkerDied):
            raise
        except Exception as error:  # what is remembered contradicts itself, or there was no memory to go on
            self._recover(error)

    def _turn(self) -> None:
        idle = self.planner.is_idle
        if idle and not self._checked:  # by count, so that all ranks walk at the same turn
            self._checked, self._num_spells = True, self._num_spells + 1
            if self._num_spells % _CHECK_EVERY == 0 or self._config.integrity_fatal:
                check_integrity(self.planner)
        block = idle or (self._stuck and self._grammars.is_holding)
        self._inbox += self._transport.receive(block=block and not self._inbox)
        if idle:
            if not self._inbox:
                return
            for observer in self._observers:
                observer.resumed()
        outputs: list[ReqOutput] = []
        while self._inbox:
            outputs += self._take(self._inbox.popleft())
        self._send(outputs)
        planned, outputs = self.planner.plan(), []
        if planned is None and self._submitted and not self._submitted[0][0].plan.masked:
            # The next one depends on it. First the device goes on, unless grammars tell what they prescribe.
            outputs, planned = self._retire(), self.planner.plan()
        self._stuck = planned is None and not self._submitted
        if planned is not None:
            masks = self._grammars.masks(planned, self._submitted)
            self._submitted.append((planned, self._executor.submit(planned.plan, masks)))
            for observer in self._observers:
                observer.submitted(planned)
        elif not self._submitted and not len(self.planner.running) and len(self.planner.waiting):
            raise IntegrityError("no request can begin, and none runs: pages are lost")
        self._send(outputs)
        num_left = 1 if self._config.overlap and planned is not None else 0
        while len(self._submitted) > num_left:
            self._send(self._retire())
        for observer in self._observers:
            observer.turned()

    def _take(self, message: wire.RankMsg) -> list[ReqOutput]:
        if isinstance(message, wire.UserMsg):
            self._open.update((uid, False) for uid in message.uids if uid not in self._open)
            for observer in self._observers:
                observer.received(message)
            return self.planner.add(message.uid, wire.unpack_ids(message.prompt), message.params, message.count)
        if isinstance(message, wire.AbortMsg):
            return self.planner.abort(message.uid)
        if isinstance(message, wire.ResumeMsg):
            self.planner.resume(message.uid, message.paced)
        elif isinstance(message, wire.ForcedMsg):
            if message.uid in self.planner.reqs:
                self.planner.speculation.force(message.uid, message.position, wire.unpack_ids(message.token_ids))
        else:
            self._transport.answer(wire.FlushReply(message.uid, self.planner.pages.flush_unused()))
        return []

    def _retire(self) -> list[ReqOutput]:
        """Take in the oldest step, submitted until it has run: after an interrupt (`LLM`) a turn goes on there.
        Returns what there is to tell."""
        self._checked, begin = False, time.monotonic()
        (plan, _), handle = self._submitted[0]
        if not handle.wait(PUMP_SECONDS):
            self._wait(plan, handle)
        for observer in self._observers:
            observer.retired(plan, time.monotonic() - begin)
        self._grammars.begin()
        try:
            result = handle.result()
        except Exception as error:
            outputs = self._fail(plan, error)
        else:
            self._submitted.popleft()
            outputs = self.planner.retire(result)
            self._num_failures = 0
        if plan.expected:
            check_integrity(self.planner)
        return outputs

    def _fail(self, plan: StepPlan, error: Exception) -> list[ReqOutput]:
        """A step has failed: its requests end. Raises: EngineError when no more can be done here."""
        if isinstance(error.__cause__, IntegrityError):
            raise error.__cause__
        self._num_failures += 1
        is_lost = type(error.__cause__).__name__ == "AcceleratorError"  # torch's: no step will run on the device again
        if self._tp_size > 1 or self._num_failures >= _MAX_FAILURES or is_lost:  # other ranks may be in a collective
            raise EngineError(str(error)) from error
        self._submitted.popleft()
        logger.error("step %d failed; its requests end with an error", plan.step_id, exc_info=error)
        return self.planner.fail(plan.step_id, f"the engine failed: {error}")

    def _recover(self, error: Exception) -> None:
        """Nothing that was computed can be trusted: the requests that have begun end with an error, the others wait on.
        Raises: EngineError with several ranks, whose copies must not diverge: all start again together."""
        self._num_failures += 1
        if self._config.integrity_fatal:
            raise error
        reason = f"{type(error).__name__}: {error}"
        logger.error("the scheduler goes on with an empty cache: %s; dump: %s", reason, dump(self.planner, reason))
        if self._tp_size > 1 or self._num_failures >= _MAX_FAILURES:
            raise EngineError(reason) from error
        while self._submitted:
            (plan, _), handle = self._submitted[0]
            self._wait(plan, handle)
            self._submitted.popleft()
        waiting, unknown = self.planner.reset(), (np.empty(0, np.int32), 0, SamplingParams(seed=0), 0, 0)
        ended = [Req(uid, [], *unknown) for uid in self._open if uid not in waiting]
        text = "the server has lost its state, and goes on without it; try again"
        self._send([ReqOutput(req, (), FinishReason.ERROR, error=text) for req in ended])

    def _wait(self, plan: StepPlan, handle: StepHandle) -> None:
        """Wait for a step that takes its time, and show that we are alive. Raises: EngineError `step_timeout` seconds
        after what it may take, by its size or by the slowest of late. Time in which we were stopped does not count."""
        seconds, last = PUMP_SECONDS, time.monotonic()
        estimate = max(plan.num_tokens * self._config.token_seconds, self._slowest)
        while not handle.wait(PUMP_SECONDS):
            seconds, last = seconds + min(time.monotonic() - last, 1.0), time.monotonic()
            if seconds > estimate + self._config.step_timeout:
                raise EngineError(f"step {plan.step_id} has not ended after {seconds:.0f} s (--step-timeout)")
            self._transport.pump(late=seconds > estimate + min(_LATE_SECONDS, self._config.step_timeout / 2))
        self._slowest = max(seconds, 0.9 * self._slowest)

    def _send(self, outputs: list[ReqOutput]) -> None:
        outputs = self._grammars.finish(outputs)
        for observer in self._observers:
            observer.told(outputs)
        if outputs:
            self._transport.send([self._message(output) for output in outputs])

    def _message(self, output: ReqOutput) -> wire.DetokenizeMsg:
        req, ids, reason, num_hidden, error, status, logprobs, of_prompt, pooled = output
        uid, start = req.uid, None
        if not self._open.get(uid):
            start, self._open[uid] = _stream_start(req), True
        if reason is not None:
            del self._open[uid]
            why, num_output = error or reason.value, req.num_tokens - req.prompt_len
            logger.debug("request %d: %s after %d + %d tokens", uid, why, req.prompt_len, num_output)
        packed = wire.pack_one(*ids) if len(ids) == 1 else wire.pack_ids(ids)
        told = logprobs, of_prompt, pooled, req.drafted
        return wire.DetokenizeMsg(uid, packed, req.num_cached, num_hidden, start, reason, error, status, *told)


def _stream_start(req: Req) -> wire.StreamStart:
    params, prompt = req.params, req.tokens[: req.prompt_len]
    shown = wire.pack_ids(prompt) if params.echo or params.prompt_logprobs is not None else b""
    rules = (params.include_stop_str_in_output, params.skip_special_tokens, params.min_tokens, params.echo)
    return wire.StreamStart(req.prompt_len, params.stop, wire.pack_ids(prompt[-wire.PROMPT_TAIL :]), *rules, shown)
