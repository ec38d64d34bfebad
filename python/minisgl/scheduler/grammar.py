"""Requests with a grammar, on rank 0: they wait at the door until it is compiled, and each step brings their bitmasks.

The other ranks hear of such a request when its grammar is ready, and never of one that is refused: when that is depends
on the clock, and the planner must not.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

from minisgl.core import FinishReason, Req, StepPlan
from minisgl.errors import EngineError, RequestError
from minisgl.grammar.source import one_line
from minisgl.grammar.store import CompiledGrammar, GrammarStore
from minisgl.message.backend import AbortMsg, FlushMsg, UserMsg
from minisgl.message.frontend import ErrorReply
from minisgl.message.tokenizer import DetokenizeMsg
from minisgl.scheduler.executor import StepHandle
from minisgl.scheduler.output import ReqOutput
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)

WAIT_SECONDS = 0.005  # between looks at grammars that are being compiled, while there is nothing else to do
_MAX_THREADS = 8
_STEP_SECONDS = 30.0  # for a step to end; if it takes longer, another process has died in it

PlannerMsg = UserMsg | AbortMsg | FlushMsg
Submitted = tuple[StepPlan, StepHandle]
Reply = DetokenizeMsg | ErrorReply


@dataclass(slots=True)
class _Output:
    """How far a request's output has got in its grammar."""

    grammar: CompiledGrammar  # held, so that the store keeps it while the request waits
    matcher: LLMatcher | None = None
    num_tokens: int = 0  # of the output, that the matcher has taken
    error: str | None = None  # its request is being ended


class _Row(NamedTuple):
    """A token to be sampled: at position `length` of the request."""

    req: Req
    output: _Output
    length: int


class Grammars:
    """Owns the matcher of every request with a grammar that was let in, by uid.

    store: None refuses them all. A matcher knows the output that it has seen, so a retraction does not touch it.
    """

    def __init__(self, store: GrammarStore | None) -> None:
        self._store = store
        self._held: dict[int, tuple[UserMsg, Future[CompiledGrammar]]] = {}
        self._outputs: dict[int, _Output] = {}
        self._replies: list[Reply] = []
        self._aborts: deque[AbortMsg] = deque()
        self._executor: LLExecutor | None = None

    @property
    def is_holding(self) -> bool:
        """A request waits for its grammar."""
        return bool(self._held)

    def admit(self, messages: Sequence[PlannerMsg]) -> list[PlannerMsg]:
        """What the planners are to be told: of these messages, and of those held back until now."""
        if not (self._held or self._aborts) and not any(map(_has_grammar, messages)):
            return list(messages)
        admitted: list[PlannerMsg] = []
        while self._aborts:
            admitted.append(self._aborts.popleft())
        for message in messages:
            if isinstance(message, UserMsg) and message.params.grammar is not None:
                self._hold(message)
            elif not (isinstance(message, AbortMsg) and self._release(message.uid)):
                admitted.append(message)
        for uid in [uid for uid, (_, future) in self._held.items() if future.done()]:
            message, future = self._held.pop(uid)
            if self._let_in(message.uids, future):
                admitted.append(message)
        return admitted

    def take_replies(self) -> list[Reply]:
        """To requests that were not let in."""
        replies, self._replies = self._replies, []
        return replies

    def add_words(self, plan: StepPlan, reqs: Sequence[Req], submitted: Sequence[Submitted]) -> StepPlan:
        """The plan with the words of its bitmask, to be computed when the engine asks for them. reqs: those that its
        `samples` belong to; submitted: the steps before it that are not retired, oldest first."""
        if plan.bitmask is None or self._store is None:
            return plan
        before = [
            (handle, dict(zip(earlier.words.uids, earlier.samples, strict=True)))
            for earlier, handle in ((step.bitmask, handle) for step, handle in submitted)
            if earlier is not None and isinstance(earlier.words, LateWords)
        ]
        rows = [_Row(req, self._outputs[req.uid], req.num_tokens - 1) for req in reqs]
        words = LateWords(self, rows, before)
        return plan._replace(bitmask=plan.bitmask._replace(words=words))

    def compute(self, rows: Sequence[_Row], new_ids: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
        """Advance the matchers of these rows by their new tokens, and give their bitmasks. For `LateWords`, which call
        it in the order of the steps."""
        words = self.all_allowed(len(rows))
        matchers: list[tuple[LLMatcher, int]] = []
        for index, (row, ids) in enumerate(zip(rows, new_ids, strict=True)):
            matcher = self._advance(row, ids)
            if matcher is not None:
                matchers.append((matcher, index))
        self._fill(matchers, words)
        for matcher, index in matchers:
            if matcher.is_error():
                words[index] = -1
                self._fail(rows[index], matcher)
        return words

    def all_allowed(self, count: int) -> npt.NDArray[np.int32]:
        """The words of so many rows that may sample any token."""
        assert self._store is not None
        return np.full((count, div_ceil(self._store.vocab_size, 32)), -1, np.int32)

    def finish(self, outputs: list[ReqOutput]) -> list[ReqOutput]:
        """Forget the requests that end. Those that this class has ended get their reason."""
        if not self._outputs:
            return outputs
        finished = []
        for output in outputs:
            ended = self._outputs.pop(output.req.uid, None) if output.finish_reason is not None else None
            if ended is not None and ended.error is not None and output.finish_reason is FinishReason.ABORT:
                output = output._replace(finish_reason=FinishReason.ERROR, error=ended.error, error_status=400)
            finished.append(output)
        return finished

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def _hold(self, message: UserMsg) -> None:
        grammar = message.params.grammar
        assert grammar is not None
        if self._store is None:
            text = f"{grammar.param} is not available"
            self._replies += [ErrorReply(uid, text, param=grammar.param) for uid in message.uids]
        else:
            self._held[message.uid] = (message, self._store.request(grammar))

    def _release(self, uid: int) -> bool:
        """Whether the output with this uid was held. It ends; the others of its request go on waiting, and so does the
        compilation: the next request may ask for the same."""
        message, future = next((held for held in self._held.values() if uid in held[0].uids), (None, None))
        if message is None or future is None:
            return False
        del self._held[message.uid]
        self._held |= {part.uid: (part, future) for part in message.without(uid)}
        self._replies.append(DetokenizeMsg(uid, b"", finish_reason=FinishReason.ABORT))
        return True

    def _let_in(self, uids: Sequence[int], future: Future[CompiledGrammar]) -> bool:
        error = future.exception()
        if error is None:
            self._outputs |= {uid: _Output(future.result()) for uid in uids}
            return True
        if isinstance(error, RequestError):
            self._replies += [ErrorReply(uid, str(error), status=error.status, param=error.param) for uid in uids]
        else:
            text = f"structured output failed: {type(error).__name__}"
            self._replies += [ErrorReply(uid, text, status=500) for uid in uids]
        return False

    def _advance(self, row: _Row, ids: Sequence[int]) -> LLMatcher | None:
        output = row.output
        if output.error is not None:
            return None
        if output.matcher is None:
            output.matcher = output.grammar.start()
        output.num_tokens += len(ids)
        if ids and not output.matcher.is_stopped() and not output.matcher.consume_tokens(list(ids)):
            self._fail(row, output.matcher)
            return None
        return output.matcher

    def _fill(self, matchers: list[tuple[LLMatcher, int]], words: npt.NDArray[np.int32]) -> None:
        """Fill the matchers' rows of `words`; several matchers on several cores."""
        row_bytes = words.shape[1] * words.itemsize
        if len(matchers) == 1:
            matcher, index = matchers[0]
            matcher.unsafe_compute_mask_ptr(words[index].ctypes.data, row_bytes)
        elif matchers:
            if self._executor is None:
                self._executor = LLExecutor(max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2)))
            self._executor.unsafe_compute_mask_ptr(matchers, words.ctypes.data, row_bytes, len(words))

    def _fail(self, row: _Row, matcher: LLMatcher) -> None:
        """The grammar has grown too complex. All ranks end its request at their next turn."""
        param = row.req.params.grammar.param if row.req.params.grammar else "the grammar"
        row.output.error = f"{param} cannot be followed any further: {one_line(matcher.get_error())}"
        row.output.matcher = None
        logger.debug("request %d: %s", row.req.uid, row.output.error)
        self._aborts.append(AbortMsg(row.req.uid))


class LateWords:
    """Words of a step's bitmask, by index into its `samples`. They depend on the tokens of the step before, so they are
    computed at the first look at them: after the engine has launched all of the step that comes before sampling. That
    may be on the engine's thread.
    """

    def __init__(self, grammars: Grammars, rows: list[_Row], before: list[tuple[StepHandle, dict[int, int]]]) -> None:
        self._grammars, self._rows, self._before = grammars, rows, before
        self.uids = [row.req.uid for row in rows]
        self._words: npt.NDArray[np.int32] | None = None

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        if self._words is None:
            self._words = self._look_back()
            self._before = []
        row: npt.NDArray[np.int32] = self._words[index]
        return row

    def _look_back(self) -> npt.NDArray[np.int32]:
        try:
            if all(handle.wait(_STEP_SECONDS) for handle, _ in self._before):
                sampled = [(handle.result().token_ids, samples) for handle, samples in self._before]
                return self._grammars.compute(self._rows, [self._new_ids(row, sampled) for row in self._rows])
        except EngineError:
            logger.debug("no tokens come from the step before")
        return self._grammars.all_allowed(len(self._rows))  # the requests end with that step

    def _new_ids(self, row: _Row, sampled: list[tuple[list[int], dict[int, int]]]) -> list[int]:
        """Tokens of the output up to the one to be sampled, that the matcher has not taken yet. The host knows the
        first of them, and the steps before have the others."""
        req = row.req
        ids = req.tokens[req.prompt_len + row.output.num_tokens : row.length]
        missing = row.length - req.prompt_len - row.output.num_tokens - len(ids)
        late = [token_ids[samples[req.uid]] for token_ids, samples in sampled if req.uid in samples]
        return [token for token in ids + late[len(late) - missing :] if token >= 0]


def _has_grammar(message: PlannerMsg) -> bool:
    return isinstance(message, UserMsg) and message.params.grammar is not None
