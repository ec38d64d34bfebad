"""Rank 0's memory of what became of requests and steps: rings of fixed sizes, filled as the scheduler goes."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from minisgl.core import Req, ReqOutput, StepPlan
from minisgl.message.messages import TraceMsg, TraceReply, UserMsg
from minisgl.scheduler.observer import Observer
from minisgl.scheduler.planner import Planned, Planner
from minisgl.trace.snapshot import look, page_counts

MAX_STEPS = 2048
MAX_ENDED = 1024  # requests that are remembered when they have ended
MAX_EVENTS = 64  # of one kind, of one request
SAMPLE_EVERY = 16  # steps
LAPSE_SECONDS = 2.0  # after a viewer's last question, what it has slowed down goes on
TICK_SECONDS = 0.02  # between two looks at the messages, in slow motion
REASONS = ("budget", "pages", "rows")  # what the queue may wait for

Json = dict[str, Any]


class Record(msgspec.Struct):
    """One output, since the scheduler heard of it. Lists of events are bounded; `num_*` count those left out too.

    ahead: requests that were waiting when it came. waited: seconds before its first admission, for each reason.
    overtaken: of those that came later, how many went first. turn, before: what was counted when it came.
    """

    uid: int
    num_prompt: int = 0
    tokenized: float = 0.0
    queued: float = 0.0
    ahead: int = 0
    turn: int = 0
    before: list[float] = []
    waited: dict[str, float] = {}
    overtaken: int = 0
    admissions: list[Json] = []
    chunks: list[Json] = []  # of prefill
    num_chunks: int = 0
    decodes: list[Json] = []  # of some steps
    retractions: list[Json] = []
    num_retractions: int = 0
    finished: float = 0.0
    reason: str | None = None
    num_output: int = 0


class Recorded(msgspec.Struct):
    """The answer to a `TraceMsg`. now: what `snapshot.look` sees."""

    requests: list[Record]
    steps: list[Json]
    now: Json | None


encode_recorded = msgspec.msgpack.Encoder().encode
decode_recorded = msgspec.msgpack.Decoder(Recorded).decode


class Recorder(Observer):
    """Records, and answers `TraceMsg`. A step costs O(its requests), and little."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._planner: Planner | None = None
        self._pump: Callable[[], None] = lambda: None
        self._open: dict[int, Record] = {}  # by uid: those that have not ended
        self._ended: dict[int, Record] = {}
        self._running: dict[int, Record] = {}  # that have a row, as far as we have seen
        # What is told of each step; and its uids, rows, and how many tokens the rows behind the decodes have.
        self._steps: deque[tuple[Json, array[int], array[int], array[int]]] = deque(maxlen=MAX_STEPS)
        self._pending: deque[Json] = deque()  # those that are not retired
        self._num_admitted = self._num_retracted = 0
        self._blocked = [0.0] * len(REASONS)  # seconds that the queue has waited so far
        self._why, self._since = -1, 0.0  # what it waits for, by its index, and since when that is not counted
        self._turn_began = self._waited = self._last_end = 0.0
        self._delay, self._paused, self._slow_until = 0.0, False, 0.0

    def attached(self, planner: Planner, pump: Callable[[], None]) -> None:
        self._planner, self._pump = planner, pump

    def resumed(self) -> None:
        self._turn_began, self._waited = self._clock(), 0.0

    def received(self, message: UserMsg) -> None:
        planner, now = self._planner, self._clock()
        assert planner is not None
        self._settle(now)
        for ahead, uid in enumerate(message.uids, len(planner.waiting)):
            counts = ahead, self._num_admitted, [*self._blocked]
            self._open[uid] = Record(uid, len(message.prompt) // 4, message.tokenized, now, *counts)

    def submitted(self, planned: Planned) -> None:
        if self._slow_until:
            self._slow_down()
        planner, now, (plan, reqs), first = self._planner, self._clock(), planned, planned.plan.num_decode
        assert planner is not None
        if planner.num_retracted != self._num_retracted:
            self._find_retracted(planner, now)
        self._settle(now)
        if plan.admissions:
            admitted = {admission.row for admission in plan.admissions}
            for req, share in zip(reqs, plan.reqs, strict=True):
                if share.row in admitted:
                    self._admit(req, share.start, plan.step_id, now)
        for req, share in zip(reqs[first:], plan.reqs[first:], strict=True):
            if (record := self._open.get(req.uid)) is not None:
                record.num_chunks += 1
                event = {"time": now, "step": plan.step_id, "start": share.start, "num_new": share.num_new}
                record.chunks += [event] if record.num_chunks <= MAX_EVENTS else []
        if plan.step_id % SAMPLE_EVERY == 0:
            self._sample(planned, now)
        self._note(planner, planned, now)

    def _note(self, planner: Planner, planned: Planned, now: float) -> None:
        """The step itself, and what those wait for who are not in it."""
        (plan, reqs), num_waiting = planned, len(planner.waiting)
        prefill = plan.reqs[plan.num_decode :]
        num_tokens, self._why = plan.num_decode + sum([share.num_new for share in prefill]), -1
        if num_waiting:
            is_spent = num_tokens >= planner.config.max_prefill_length or any(not s.num_samples for s in prefill)
            self._why, self._since = 2 if not planner.pages.rows else 0 if is_spent else 1, now
        step: Json = {"step": plan.step_id, "time": now, "num_decode": plan.num_decode, "num_tokens": num_tokens}
        step |= {"host_ms": None, "device_ms": None, "pages": page_counts(planner)}
        step |= {"running": len(planner.running), "waiting": num_waiting}
        uids, rows = array("q", [req.uid for req in reqs]), array("i", [share.row for share in plan.reqs])
        self._steps.append((step, uids, rows, array("i", [share.num_new for share in prefill])))
        self._pending.append(step)

    def retired(self, plan: StepPlan, seconds: float) -> None:
        now = self._clock()
        self._waited += seconds
        while self._pending and self._pending[0]["step"] <= plan.step_id:
            step = self._pending.popleft()
            if step["time"] > self._slow_until:  # else, it has ended long ago
                step["device_ms"] = 1e3 * (now - max(step["time"], self._last_end))
        self._last_end = now

    def ended(self, output: ReqOutput) -> None:
        req, record = output.req, self._open.pop(output.req.uid, None)
        self._running.pop(req.uid, None)
        if record is None or output.finish_reason is None:
            return
        record.finished, record.reason = self._clock(), output.finish_reason.value
        record.num_output = max(0, len(req.tokens) - req.prompt_len)
        self._ended[req.uid] = record
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def turned(self) -> None:
        now = self._clock()
        if self._steps and self._steps[-1][0]["host_ms"] is None:
            self._steps[-1][0]["host_ms"] = 1e3 * (now - self._turn_began - self._waited)
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
                record = self._open.get(waiting["uid"]) or Record(waiting["uid"], queued=now)
                since = record.retractions[-1]["time"] if record.retractions else record.queued
                is_passed = not record.admissions and self._overtaken(record)
                why = "policy" if is_passed else (*REASONS, "pages")[self._why]  # -1: no step could be planned
                waiting |= {"seconds": now - since, "why": why}
        known = [one for uid in question.uids if (one := self._open.get(uid) or self._ended.get(uid))]
        steps = [
            {**step, "rows": [*_rows(step["num_decode"], rows, uids, chunks)]}
            for step, uids, rows, chunks in list(self._steps)[-question.num_steps :]
            if question.num_steps and step["step"] >= question.since
        ]
        return TraceReply(question.uid, encode_recorded(Recorded(known, steps, seen)))

    def _slow_down(self) -> None:
        """Hold a step up for the delay, or as long as there is to be a pause, while somebody views it."""
        now = begin = self._clock()
        while now < self._slow_until and (self._paused or now < begin + self._delay):
            time.sleep(TICK_SECONDS if self._paused else min(TICK_SECONDS, begin + self._delay - now))
            self._pump()
            now = self._clock()
        self._waited += now - begin

    def _settle(self, now: float) -> None:
        """Count the time until now as that of what the queue waits for."""
        if self._why >= 0:
            self._blocked[self._why] += now - self._since
            self._since = now

    def _admit(self, req: Req, start: int, step_id: int, now: float) -> None:
        if (record := self._open.get(req.uid)) is None:
            return
        if req.uid in self._running:  # it went and came back within one plan
            self._retract(record, start, now)
        if not record.admissions:
            record.overtaken = self._overtaken(record)
            waited = zip(REASONS, record.before, self._blocked, strict=True)
            record.waited = {reason: after - before for reason, before, after in waited}
            self._num_admitted += 1
        event = {"time": now, "step": step_id, "row": req.row, "num_cached": start}
        record.admissions = [*record.admissions[:MAX_EVENTS], event]
        self._running[req.uid] = record

    def _overtaken(self, record: Record) -> int:
        """How many have gone first that came later; too few where some that came before have ended unseen."""
        return max(0, self._num_admitted - record.turn - record.ahead)

    def _find_retracted(self, planner: Planner, now: float) -> None:
        self._num_retracted, running = planner.num_retracted, {req.uid for req in planner.running}
        for uid in [uid for uid in self._running if uid not in running]:
            record, req = self._running.pop(uid), planner.reqs.get(uid)
            if req is not None:
                self._retract(record, req.num_computed or len(req.tokens) - 1, now)

    def _retract(self, record: Record, num_computed: int, now: float) -> None:
        record.num_retractions += 1
        record.retractions = [*record.retractions[:MAX_EVENTS], {"time": now, "num_computed": num_computed}]

    def _sample(self, planned: Planned, now: float) -> None:
        plan = planned.plan
        for req, share in zip(planned.reqs[: plan.num_decode], plan.reqs, strict=False):
            if (record := self._open.get(req.uid)) is not None:
                if len(record.decodes) >= MAX_EVENTS:
                    del record.decodes[::2]
                record.decodes.append({"time": now, "step": plan.step_id, "position": share.start})


def _rows(num_decode: int, rows: array[int], uids: array[int], chunks: array[int]) -> Iterator[tuple[int, ...]]:
    """Of each request of a step its row, uid, number of new tokens, and whether that is prefill."""
    news, kinds = [1] * num_decode + chunks.tolist(), [0] * num_decode + [1] * len(chunks)
    return zip(rows, uids, news, kinds, strict=True)
