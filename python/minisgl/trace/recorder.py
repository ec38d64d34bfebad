"""Rank 0's memory of what became of requests and steps: rings of fixed sizes, filled as the scheduler goes."""

import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain

import msgspec

from minisgl.core import Req, ReqOutput, ScheduledReq, StepPlan
from minisgl.message.messages import TraceMsg, TraceReply, UserMsg
from minisgl.scheduler.observer import Observer
from minisgl.scheduler.plan import Planned
from minisgl.scheduler.planner import Planner
from minisgl.trace.records import Event, Output, Recorded, Step, encode_recorded
from minisgl.trace.snapshot import look, page_counts

MAX_STEPS = 2048
MAX_ENDED = 1024  # outputs that are remembered when they have ended
MAX_EVENTS = 128  # of one output
SAMPLE_EVERY = 16  # steps
LAPSE_SECONDS = 2.0  # after a viewer's last question, what it has slowed down goes on
TICK_SECONDS = 0.02  # between two looks at the messages, in slow motion
GRAMMAR_SECONDS = 0.001  # between the tokenizer and the queue: more is waiting for the grammar


class Recorder(Observer):
    """Records, and answers `TraceMsg`. A step costs O(its requests), and little."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._planner: Planner | None = None
        self._pump: Callable[[], None] = lambda: None
        self._open: dict[int, Output] = {}  # by uid: those that have not ended
        self._ended: dict[int, Output] = {}
        self._waiting: dict[int, Event] = {}  # by uid, as they came: who was never in a step
        self._running: set[int] = set()  # uids of those that are, as far as we have seen
        self._num_retracted = 0
        self._steps: deque[tuple[Step, array[int]]] = deque(maxlen=MAX_STEPS)  # row, uid, new tokens, kind of each row
        self._rows, self._reqs = array("q"), list[Req]()  # of the last step; whose they are, where all decode
        self._pending: deque[Step] = deque()  # those that are not retired
        self._why, self._planned = "pages", 0.0  # what those wait for who are not in the last step, and its time
        self._turn_began = self._waited = self._last_end = 0.0
        self._delay, self._paused, self._slow_until = 0.0, False, 0.0

    def attached(self, planner: Planner, pump: Callable[[], None]) -> None:
        self._planner, self._pump = planner, pump

    def resumed(self) -> None:
        self._turn_began, self._waited = self._clock(), 0.0

    def received(self, message: UserMsg) -> None:
        planner, now = self._planner, self._clock()
        assert planner is not None
        tokenized = Event("tokenized", message.tokenized or now, num_tokens=len(message.prompt) // 4)
        is_held = message.params.grammar is not None and now - message.tokenized > GRAMMAR_SECONDS
        for ahead, uid in enumerate(message.uids, len(planner.waiting)):
            queued = self._waiting[uid] = Event("queued", now, ahead=ahead, why="grammar" if is_held else None)
            self._open[uid] = Output(uid, num_prompt=len(message.prompt) // 4, events=[tokenized, queued])

    def submitted(self, planned: Planned) -> None:
        if self._slow_until:
            self._slow_down()
        planner, now, (plan, reqs) = self._planner, self._clock(), planned
        assert planner is not None
        if planner.num_retracted != self._num_retracted:
            self._find_retracted(planner, now)
        admitted, is_sampled = {admission.row for admission in plan.admissions}, plan.step_id % SAMPLE_EVERY == 0
        first = 0 if admitted or is_sampled else plan.num_decode  # else, nothing is noted of decodes
        for index, (req, share) in enumerate(zip(reqs[first:], plan.reqs[first:], strict=True), first):
            if (output := self._open.get(req.uid)) is None:
                continue
            part = (now, plan.step_id, share.row, share.start, share.num_new)
            if share.row in admitted:
                self._admit(output, Event("admitted", *part), share.start)
            if index >= plan.num_decode and share.num_samples < 2:  # else, it verifies a draft
                output.num_chunks += 1
                _add(output, Event("prefill", *part))
            elif is_sampled:
                _add(output, Event("decode", *part))
        self._note_step(planner, planned, now)

    def _note_step(self, planner: Planner, planned: Planned, now: float) -> None:
        """The step itself, and what those wait for who are not in it."""
        (plan, reqs), num_waiting = planned, len(planner.waiting)
        prefill = plan.reqs[plan.num_decode :]
        num_tokens = plan.num_decode + sum([share.num_new for share in prefill])
        is_spent = num_tokens >= planner.config.max_prefill_length or any(not one.num_samples for one in prefill)
        self._why, self._planned = "rows" if not planner.pages.rows else "budget" if is_spent else "pages", now
        counts = page_counts(planner), len(planner.running), num_waiting
        step = Step(plan.step_id, now, plan.num_decode, num_tokens, *counts)
        if plan.admissions or prefill or reqs != self._reqs:  # most steps have the same rows as the one before
            shares = [(share[0], req.uid, share[2], _kind(share)) for req, share in zip(reqs, plan.reqs, strict=True)]
            self._reqs, self._rows = [] if prefill else reqs, array("q", chain.from_iterable(shares))
        self._steps.append((step, self._rows))
        self._pending.append(step)

    def retired(self, plan: StepPlan, seconds: float) -> None:
        now = self._clock()
        self._waited += seconds
        while self._pending and self._pending[0].step <= plan.step_id:
            step = self._pending.popleft()
            if step.time > self._slow_until:  # else, it has ended long ago
                step.device_ms = 1e3 * (now - max(step.time, self._last_end))
        self._last_end = now

    def told(self, outputs: Sequence[ReqOutput]) -> None:
        for req, token_ids, reason, *_ in outputs:
            if ((num := len(token_ids)) < 2 and reason is None) or (output := self._open.get(req.uid)) is None:
                continue
            output.num_accepted, output.num_drafted = req.drafted[0], sum(req.drafted)
            if num > 1:  # all but the first had been guessed
                _add(output, Event("accepted", self._clock(), start=len(req.tokens) - num + 1, num_new=num - 1))
            if reason is not None:
                del self._open[req.uid]
                self._waiting.pop(req.uid, None)
                self._running.discard(req.uid)
                output.reason, output.num_output = reason.value, max(0, len(req.tokens) - req.prompt_len)
                output.events.append(Event("finished", self._clock(), num_tokens=output.num_output))
                self._ended[req.uid] = output
                if len(self._ended) > MAX_ENDED:
                    del self._ended[next(iter(self._ended))]

    def turned(self) -> None:
        now = self._clock()
        if self._steps and self._steps[-1][0].host_ms is None:
            self._steps[-1][0].host_ms = 1e3 * (now - self._turn_began - self._waited)
        self._turn_began, self._waited = now, 0.0

    def reply(self, question: TraceMsg) -> TraceReply:
        """All that is asked for, and who views sets the pace."""
        assert self._planner is not None
        now, seen = self._clock(), None
        if question.view:
            self._delay, self._paused = question.delay, question.paused
            self._slow_until = now + LAPSE_SECONDS if question.delay or question.paused else 0.0
            seen = look(self._planner, whole=question.view > 1)
            for waiting in seen["waiting"]:
                output = self._open.get(waiting["uid"]) or Output(waiting["uid"], events=[Event("queued", now)])
                is_passed = waiting["uid"] in self._waiting and output.events[-1].overtaken
                waiting |= {"since": output.events[-1].time, "why": "policy" if is_passed else self._why}
        outputs = [one for uid in question.uids if (one := self._open.get(uid) or self._ended.get(uid))]
        last = [*self._steps][-question.num_steps :] if question.num_steps else []
        steps = [_whole(step, rows.tolist()) for step, rows in last if step.step >= question.since]
        return TraceReply(question.uid, encode_recorded(Recorded(outputs, steps, seen)))

    def _slow_down(self) -> None:
        """Hold a step up for the delay, or as long as there is to be a pause, while somebody views it."""
        now = begin = self._clock()
        while now < self._slow_until and (self._paused or now < begin + self._delay):
            time.sleep(TICK_SECONDS if self._paused else min(TICK_SECONDS, begin + self._delay - now))
            self._pump()
            now = self._clock()
        self._waited += now - begin

    def _admit(self, output: Output, admission: Event, num_cached: int) -> None:
        if output.uid in self._running:  # it went and came back within one plan
            self._retract(output, num_cached, admission.time)
        if (queued := self._waiting.get(output.uid)) is not None:
            for other in self._waiting.values():
                if other is queued:
                    break
                other.overtaken += 1
            if self._planned > (queued.time or 0.0):  # a step has gone without it
                queued.why = "policy" if queued.overtaken else self._why
            output.num_cached = num_cached
            del self._waiting[output.uid]
        self._running.add(output.uid)
        _add(output, admission)

    def _find_retracted(self, planner: Planner, now: float) -> None:
        self._num_retracted = planner.num_retracted
        for uid in self._running - {req.uid for req in planner.running}:
            self._running.discard(uid)
            if (req := planner.reqs.get(uid)) is not None:
                self._retract(self._open[uid], req.num_computed or len(req.tokens) - 1, now)

    def _retract(self, output: Output, num_computed: int, now: float | None) -> None:
        output.num_retractions += 1
        _add(output, Event("retracted", now, start=num_computed))


def _add(output: Output, event: Event) -> None:
    """At the end. Where there are too many, each second one after the first admission goes."""
    if len(output.events) >= MAX_EVENTS:
        del output.events[3::2]
    output.events.append(event)


def _whole(step: Step, rows: list[int]) -> Step:
    return msgspec.structs.replace(step, rows=[*zip(*[iter(rows)] * 4, strict=True)])


def _kind(share: ScheduledReq) -> int:
    """0: decode, 1: prefill, 2: it verifies guesses."""
    return 2 if share.num_samples > 1 else int(share.num_new > share.num_samples)
