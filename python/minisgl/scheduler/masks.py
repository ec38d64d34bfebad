"""The bitmasks of requests with a grammar, and the time that they may take (docs/adr/0018-rows-that-wait.md).

A mask is computed within the step that samples from it, as long as those of the step are cheap together. Otherwise its
row sits out: threads that yield to others compute the mask, and the row is planned again when it is there.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from minisgl.core import NOT_READY, Req, StepPlan
from minisgl.errors import EngineError
from minisgl.grammar.source import one_line
from minisgl.grammar.store import CompiledGrammar
from minisgl.message.backend import AbortMsg, ResumeMsg
from minisgl.scheduler.executor import StepHandle
from minisgl.utils.math import div_ceil
from minisgl.utils.threads import yield_to_others

logger = logging.getLogger(__name__)

_MAX_THREADS = 8
_STEP_SECONDS = 30.0  # for a step to end; if it takes longer, another process has died in it
# Of the time between two steps, what masks may take within them. On a CPU nothing else of the step goes on meanwhile.
# A GPU computes, and the host does not plan the next step: that takes so many seconds.
_SHARE, _GPU_SHARE, _GPU_HOST_SECONDS = 0.1, 0.5, 0.002
_LONGEST_INTERVAL = 0.05  # seconds between steps that count; more is idleness
# What one request's masks may take altogether beyond a millisecond each, in seconds of a core.
_FREE_SECONDS, _MOST_SECONDS = 0.001, 10.0

Words = npt.NDArray[np.int32]
Submitted = tuple[StepPlan, StepHandle]
_NONE: Words = np.empty(0, np.int32)  # of a row that is not ready


@dataclass(slots=True)
class Output:
    """How far a request's output has got in its grammar."""

    grammar: CompiledGrammar  # held, so that the store keeps it while the request waits
    matcher: LLMatcher | None = None
    num_tokens: int = 0  # of the output, that the matcher has taken
    error: str | None = None  # its request is being ended
    cost: float = 0.0  # seconds of a core that the next mask may take; before the first as its grammar's others
    seconds: float = 0.0  # beyond what masks may take, altogether
    job: Future[Words] | None = None  # computes a mask that was not there in time
    ready: tuple[int, Words] = (-1, _NONE)  # the last mask, and the position of its token


class Row(NamedTuple):
    """A token to be sampled: at position `length` of the request."""

    req: Req
    output: Output
    length: int


class Masks:
    """Computes them for `Grammars`, which has an `Output` for each request.

    is_gpu: the device computes while the host is at masks.
    """

    def __init__(self, vocab_size: int, is_gpu: bool) -> None:
        self._num_words = div_ceil(vocab_size, 32)
        self._all: Words = np.full(self._num_words, -1, np.int32)
        self._is_gpu = is_gpu
        self._threads = ThreadPoolExecutor(
            max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2)), "minisgl-masks", yield_to_others
        )
        self._waiting: dict[int, Output] = {}  # by uid: held by the planner
        self._aborts: deque[AbortMsg] = deque()
        self._last_step, self._last_time, self._interval = 0, 0.0, _LONGEST_INTERVAL / 4
        self._late_cost = 0.0  # of the rows of the last step whose masks were computed within it

    @property
    def is_waiting(self) -> bool:
        """Some rows sit out."""
        return bool(self._waiting)

    def wait(self, seconds: float) -> bool:
        """Until a row that sits out is ready; at most so long. Whether there is such a row."""
        wait([output.job for output in self._waiting.values() if output.job], seconds, FIRST_COMPLETED)
        return bool(self._waiting)

    def take_ready(self) -> list[ResumeMsg | AbortMsg]:
        """For the rows that need not wait any longer, and those whose grammars went wrong."""
        messages: list[ResumeMsg | AbortMsg] = []
        while self._aborts:
            messages.append(self._aborts.popleft())
        for uid in [uid for uid, output in self._waiting.items() if output.job is None or output.job.done()]:
            cost = self._waiting.pop(uid).cost
            paced = self._late_cost + cost > self._budget / 2
            self._late_cost += 0.0 if paced else cost
            messages.append(ResumeMsg(uid, paced))
        return messages

    def hold(self, req: Req, output: Output) -> None:
        """The planner holds the request, whose tokens are all known, until it is resumed."""
        self._waiting[req.uid] = output
        if output.ready[0] != len(req.tokens) and (output.job is None or output.job.done()):
            self._start(Row(req, output, len(req.tokens)), req.tokens[req.prompt_len + output.num_tokens :])

    def forget(self, uid: int) -> None:
        self._waiting.pop(uid, None)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def words(self, plan: StepPlan, rows: list[Row], submitted: Sequence[Submitted]) -> LateWords:
        """Those of a plan's bitmask, to be computed when the engine asks for them."""
        before = [
            (handle, dict(zip(earlier.words.uids, earlier.samples, strict=True)))
            for earlier, handle in ((step.bitmask, handle) for step, handle in submitted)
            if earlier is not None and isinstance(earlier.words, LateWords)
        ]
        return LateWords(self, plan, rows, before)

    def compute(self, plan: StepPlan, rows: Sequence[Row], new_ids: Sequence[list[int] | None]) -> list[Words]:
        """The words of a step's rows, for `LateWords`, which call it in the order of the steps. new_ids: tokens that
        their matchers have not taken yet; None where one of them was not sampled."""
        self._count(plan.step_id)
        start, self._late_cost, words = time.thread_time(), 0.0, [_NONE] * len(rows)
        budget = self._budget if len(plan.reqs) > 1 else float("inf")
        for row in rows:
            if row.output.matcher is None:
                row.output.cost = row.output.grammar.cost
        for index in sorted(range(len(rows)), key=lambda index: rows[index].output.cost):
            row, ids, output = rows[index], new_ids[index], rows[index].output
            if output.ready[0] == row.length:
                words[index] = output.ready[1]
            elif ids is None or (output.job is not None and not output.job.done()):
                continue
            elif output.error is None and output.cost > budget - (time.thread_time() - start):
                self._start(row, ids)
            else:
                words[index] = self._mask(row, ids)
                self._late_cost += output.cost
        return words

    def all_allowed(self, count: int) -> list[Words]:
        return [self._all] * count

    @property
    def _budget(self) -> float:
        """Seconds of a step for its masks."""
        if self._is_gpu:
            return max(0.0, _GPU_SHARE * (self._interval - _GPU_HOST_SECONDS))
        return _SHARE * self._interval

    def _count(self, step_id: int) -> None:
        now, count = time.perf_counter(), max(1, step_id - self._last_step)
        self._interval += (min((now - self._last_time) / count, _LONGEST_INTERVAL) - self._interval) / 8
        self._last_step, self._last_time = step_id, now

    def _start(self, row: Row, ids: list[int]) -> None:
        row.output.job = self._threads.submit(self._mask, row, ids)

    def _mask(self, row: Row, ids: list[int]) -> Words:
        """Advance a row's matcher by its new tokens: which ones may follow."""
        output, start = row.output, time.thread_time()
        if output.error is not None:
            return self._all
        try:
            words = self._next_words(output, ids)
        except BaseException as error:  # a panic of llguidance is no Exception
            return self._fail(row, one_line(str(error)))
        seconds = time.thread_time() - start
        output.cost, output.grammar.cost = (max(seconds, known / 2) for known in (output.cost, output.grammar.cost))
        output.seconds += max(0.0, seconds - _FREE_SECONDS)
        if output.seconds > _MOST_SECONDS:
            why = f"{output.num_tokens + 1} tokens took {output.seconds:.0f} s more than they should"
            return self._fail(row, f"it is too slow, {why}")
        output.ready = row.length, words
        return words

    def _next_words(self, output: Output, ids: list[int]) -> Words:
        """Raises: EngineError when the grammar has grown too complex."""
        if output.matcher is None:
            output.matcher = output.grammar.start()
        matcher, words = output.matcher, np.empty(self._num_words, np.int32)
        output.num_tokens += len(ids)
        if not ids or matcher.is_stopped() or matcher.consume_tokens(ids):
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if not matcher.is_error():
                return words
        raise EngineError(matcher.get_error())

    def _fail(self, row: Row, why: str) -> Words:
        """All ranks end the request at their next turn."""
        param = row.req.params.grammar.param if row.req.params.grammar else "the grammar"
        row.output.error = f"{param} cannot be followed any further: {why}"
        row.output.matcher = None
        logger.debug("request %d: %s", row.req.uid, row.output.error)
        self._aborts.append(AbortMsg(row.req.uid))
        return self._all


class LateWords:
    """Words of a step's bitmask, by index into its `samples`. They depend on the tokens of the step before, so they are
    computed at the first look at them: after the engine has launched all of the step that comes before sampling. That
    may be on the engine's thread.
    """

    def __init__(
        self, masks: Masks, plan: StepPlan, rows: list[Row], before: list[tuple[StepHandle, dict[int, int]]]
    ) -> None:
        self._masks, self._plan, self._rows, self._before = masks, plan, rows, before
        self.uids = [row.req.uid for row in rows]
        self._words: list[Words] | None = None

    def __getitem__(self, index: int) -> Words:
        if self._words is None:
            self._words = self._look_back()
            self._before = []
        return self._words[index]

    def _look_back(self) -> list[Words]:
        try:
            if all(handle.wait(_STEP_SECONDS) for handle, _ in self._before):
                sampled = [(handle.result().token_ids, samples) for handle, samples in self._before]
                return self._masks.compute(self._plan, self._rows, [self._new_ids(row, sampled) for row in self._rows])
        except EngineError:
            logger.debug("no tokens come from the step before")
        return self._masks.all_allowed(len(self._rows))  # the requests end with that step

    def _new_ids(self, row: Row, sampled: list[tuple[list[int], dict[int, int]]]) -> list[int] | None:
        """Tokens of the output up to the one to be sampled, that the matcher has not taken yet. The host knows the
        first of them, and the steps before have the others."""
        req = row.req
        late = [token_ids[samples[req.uid]] for token_ids, samples in sampled if req.uid in samples]
        if NOT_READY in late:
            return None
        ids = req.tokens[req.prompt_len + row.output.num_tokens : row.length]
        missing = row.length - req.prompt_len - row.output.num_tokens - len(ids)
        return [token for token in ids + late[len(late) - missing :] if token >= 0]
