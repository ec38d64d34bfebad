"""Requests with a grammar, on rank 0: they wait at the door until it is compiled, and each step brings their masks.

The other ranks hear of such a request when its grammar is ready, and never of one that is refused: when that is depends
on the clock, and the planner must not. So it is with masks: one that is not ready in time sits the step out, and all
ranks are told when it is there (docs/adr/0018-rows-that-wait.md). And so it is with tokens that a grammar prescribes,
which the planners draft (docs/adr/0027-prescribed-tokens.md)."""

import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from minisgl.core import FinishReason, ReqOutput, StepPlan
from minisgl.errors import RequestError
from minisgl.grammar.store import CompiledGrammar, GrammarStore, yield_to_others
from minisgl.kernel.masks import Flags, Words
from minisgl.message import messages as wire
from minisgl.scheduler.late import Beside, LateMasks, Row, Submitted
from minisgl.scheduler.matching import CHEAP_SECONDS, FREE_SECONDS, Matching
from minisgl.scheduler.plan import Planned
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)
_WAIT_SECONDS = 0.005  # for grammars and masks, between looks at other messages
_MAX_THREADS = 8
# Of the time between the masks of two steps, what masks may take; and what cheap ones may: a row that sits out has been
# computed in vain, for more than that. A GPU computes meanwhile.
CPU_SHARES, _GPU_SHARES = (0.1, 0.4), (0.1, 2.0)
_LONGEST_INTERVAL = 0.05  # seconds between steps that count; more is idleness
MOST_SECONDS = 10.0  # of a core: what the masks of one request may take beyond `FREE_SECONDS` each

Reply = wire.DetokenizeMsg | wire.ErrorReply


class Grammars:
    """Owns the matcher of every request with a grammar that was let in, by uid.

    store: None refuses them all. is_gpu: a GPU computes meanwhile. tells_forced: planners are told which tokens are
    prescribed. A matcher knows the output that it has seen, so a retraction does not touch it."""

    def __init__(self, store: GrammarStore | None, is_gpu: bool = False, tells_forced: bool = False) -> None:
        self._store, self._tells_forced = store, tells_forced
        self._held: dict[int, tuple[wire.UserMsg, Future[CompiledGrammar]]] = {}
        self.outputs: dict[int, Matching] = {}
        self._waiting: dict[int, Matching] = {}  # those that the planner holds
        self._replies: list[Reply] = []
        self._news: deque[wire.AbortMsg | wire.ForcedMsg] = deque()
        num_threads = max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2))
        # Cheap ones do not wait for the others.
        self._threads = [ThreadPoolExecutor(n, "minisgl-masks", yield_to_others) for n in (1, num_threads)]
        self._beside = Beside()
        self.all_allowed: Words = np.full(0 if store is None else div_ceil(store.vocab_size, 32), -1, np.int32)
        self._is_gpu, self._shares = is_gpu, _GPU_SHARES if is_gpu else CPU_SHARES
        self._last_step, self._last_time, self._interval = 0, 0.0, _LONGEST_INTERVAL / 4
        self._last: LateMasks | None = None  # of the last step with masks
        # Of the last step's masks: seconds that they are expected to take, may take, and may if they are cheap.
        self._late_cost, self._most = 0.0, tuple(share * self._interval for share in self._shares)

    @property
    def is_holding(self) -> bool:
        """A request waits for its grammar, or for its next mask."""
        return bool(self._held or self._waiting)

    def wait(self) -> bool:
        """For one of them, a moment. Whether there was one."""
        jobs: list[Future[Any]] = [output.job for output in self._waiting.values() if output.job is not None]
        wait(jobs + [future for _, future in self._held.values()], _WAIT_SECONDS, FIRST_COMPLETED)
        return self.is_holding

    def admit(self, messages: Sequence[wire.RankMsg]) -> tuple[list[wire.RankMsg], list[Reply]]:
        """What the planners are told, of these messages and those held back until now; and who is not let in, why."""
        admitted: list[wire.RankMsg] = [self._news.popleft() for _ in range(len(self._news))]
        for uid in [uid for uid, own in self._waiting.items() if own.job is None or own.job.done()]:
            own = self._waiting.pop(uid)
            cost, most = self._late_cost + own.cost, self._most[own.cost <= CHEAP_SECONDS]
            admitted.append(wire.ResumeMsg(uid, paced=cost > most / 2))
            self._late_cost = min(cost, most)
        for message in messages:
            if isinstance(message, wire.UserMsg) and (grammar := message.params.grammar) is not None:
                if self._store is not None:
                    self._held[message.uid] = (message, self._store.request(grammar, message.params.client))
                    continue
                text = f"{grammar.param} is not available"
                self._replies += [wire.ErrorReply(uid, text, param=grammar.param) for uid in message.uids]
            elif not (isinstance(message, wire.AbortMsg) and self._release(message.uid)):
                admitted.append(message)
        for uid in [uid for uid, (_, future) in self._held.items() if future.done()]:
            message, future = self._held.pop(uid)
            if (error := future.exception()) is None:
                self.outputs |= {uid: Matching(future.result(), self._tells_forced) for uid in message.uids}
                admitted.append(message)
                continue
            if not isinstance(error, RequestError):
                error = RequestError(f"structured output failed: {type(error).__name__}", status=500)
            self._replies += [wire.ErrorReply(uid, str(error), error.status, error.param) for uid in message.uids]
        replies, self._replies = self._replies, []
        return admitted, replies

    def masks(self, planned: Planned, submitted: Sequence[Submitted]) -> LateMasks | None:
        """The masks of a step's rows that have to match a grammar, computed after the engine has asked for them.
        submitted: the steps before it that are not retired, oldest first."""
        plan = planned.plan
        if not plan.masked or self._store is None:
            return None
        samples = [req for req, share in zip(planned.reqs, plan.reqs, strict=True) if share.num_samples]
        outputs = [(req, self.outputs[req.uid]) for req in samples if req.params.grammar is not None]
        self.begin()
        now, before = time.perf_counter(), [step for step in submitted if step[0].plan.masked]
        interval = (now - self._last_time) / max(1, plan.step_id - self._last_step)
        self._interval += (min(interval, _LONGEST_INTERVAL) - self._interval) / 8
        self._last_step, self._last_time = plan.step_id, now
        self._most = tuple(share * self._interval for share in self._shares)
        self._last = LateMasks(self, plan, outputs, before, self._last if before else None)
        return self._last

    def begin(self) -> None:
        """With what is left of the last step's masks: the steps before it have ended."""
        if self._last is not None:
            self._last.begin()

    def share(self, masks: LateMasks, last: LateMasks | None, words: Words, states: Words) -> list[Row]:
        """Have masks computed beside Python. last: of the step before, if it has not ended. → the other rows."""
        left, self._late_cost = self._beside.share(masks, last, words, states, self._interval)
        return left

    def finish(self, outputs: list[ReqOutput]) -> list[ReqOutput]:
        """What there is to tell. Requests that end are forgotten, and those that this class has ended get their reason.
        Of those that are held the next masks are computed; of those of which nothing is in flight planners are to know
        now what is prescribed."""
        if not self.outputs:
            return outputs
        told = []
        for output in outputs:
            req, own = output.req, self.outputs.get(output.req.uid)
            if own is not None and output.finish_reason is not None:
                del self.outputs[req.uid]
                self._waiting.pop(req.uid, None)
                if own.error is not None and output.finish_reason is FinishReason.ABORT:
                    output = output._replace(finish_reason=FinishReason.ERROR, error=own.error, error_status=400)
            elif own is not None and req.num_inflight == req.num_stale:
                row, ids = Row(req, own, len(req.tokens)), req.tokens[req.prompt_len + own.num_tokens :]
                if req.held:
                    self._waiting[req.uid] = own
                    if own.ready[0] != len(req.tokens) and (own.job is None or own.job.done()):
                        self._start(row, ids)
                elif self._tells_forced and own.matcher is not None and not own.grammar.lock.locked():
                    self._follow(row, ids, num_words=0)
            if output.token_ids or output.finish_reason is not None:
                told.append(output)
        return told

    def compute(
        self, plan: StepPlan, rows: Sequence[Row], new_ids: Sequence[list[int] | None], words: Words, is_ready: Flags
    ) -> None:
        """Write masks, as far as there is time, for `LateMasks`, which call it in the order of the steps.
        new_ids: tokens that the rows' matchers have not taken yet; None where one of them was not sampled."""
        start, most, spent = time.perf_counter(), self._most, 0.0
        for output in (row.output for row in rows if row.output.matcher is None):
            output.cost = max(output.cost, output.grammar.cost)
        for row, ids in sorted(zip(rows, new_ids, strict=True), key=lambda item: item[0].output.cost):
            output, found, grammar = row.output, list[Words](), row.output.grammar
            is_dear = self._is_gpu and not 0 < grammar.mean <= CHEAP_SECONDS  # by then others may have its lock
            is_free = grammar.cost <= CHEAP_SECONDS or not grammar.lock.locked()
            has_time = not is_dear and spent + output.cost <= most[output.cost <= CHEAP_SECONDS]
            if output.ready[0] == row.length:
                found = [output.ready[1]]
            elif ids is None or (output.job is not None and not output.job.done()):
                continue
            elif output.error is not None or (is_free and (has_time or len(plan.reqs) == 1)):
                found = self._mask(row, ids)
                spent += output.cost * max(1, len(found))
            else:
                self._start(row._replace(draft=()), ids)
            for i, one in enumerate(found, row.place):
                words[i], is_ready[i] = one, True
        self._late_cost = spent
        self._last_time += time.perf_counter() - start  # which is no time of the step, else it would be ever more

    def close(self) -> None:
        """Before the engine: its memory is written to."""
        self._beside.close()
        for threads in self._threads:
            threads.shutdown(wait=False, cancel_futures=True)
        if self._store is not None:
            self._store.close()

    def _release(self, uid: int) -> bool:
        """Whether the output with this uid was held. It ends; the others of its request go on waiting, and so does the
        compilation: the next request may ask for the same."""
        message, future = next((held for held in self._held.values() if uid in held[0].uids), (None, None))
        if message is None or future is None:
            return False
        del self._held[message.uid]
        self._held |= {part.uid: (part, future) for part in message.without(uid)}
        self._replies.append(wire.DetokenizeMsg(uid, b"", finish_reason=FinishReason.ABORT))
        return True

    def _start(self, row: Row, ids: list[int]) -> None:
        row.output.job = self._threads[row.output.cost > FREE_SECONDS].submit(self._mask, row, ids)

    def _follow(self, row: Row, ids: list[int], num_words: int) -> tuple[list[Words], str | None]:
        output = row.output
        found = output.follow(ids, row.length - row.req.prompt_len, row.draft, num_words, FREE_SECONDS)
        if output.forced and row.length + len(output.forced) > output.forced_to:
            output.forced_to = row.length + len(output.forced)
            self._news.append(wire.ForcedMsg(row.req.uid, row.length, wire.pack_ids(output.forced)))
        return found

    def _mask(self, row: Row, ids: list[int]) -> list[Words]:
        """Advance a row's matcher by its new tokens: which ones may follow, and after each token of a draft, as far as
        that is known. All, if its request is being ended."""
        output, start, words, why = row.output, time.thread_time(), list[Words](), None
        if output.error is None:
            words, why = self._follow(row, ids, len(self.all_allowed))
        seconds = (time.thread_time() - start) / max(1, len(words))
        output.cost, output.grammar.cost = (max(seconds, known / 4) for known in (output.cost, output.grammar.cost))
        if output.num_tokens > 0:  # the first mask of all outputs is the same
            output.grammar.mean += (seconds - output.grammar.mean) / (16 if output.grammar.mean else 1)
        output.seconds += max(0.0, seconds - FREE_SECONDS)
        if output.seconds > MOST_SECONDS:
            why = f"it is too slow, {output.num_tokens} tokens took {output.seconds:.0f} s more than they should"
        if why is not None:  # all ranks end its request at their next turn
            param = row.req.params.grammar.param if row.req.params.grammar else "the grammar"
            output.error, output.matcher = f"{param} cannot be followed any further: {why}", None
            logger.debug("request %d: %s", row.req.uid, output.error)
            self._news.append(wire.AbortMsg(row.req.uid))
        if output.error is not None:
            words = [self.all_allowed]
        output.ready = row.length, words[0]
        return words
