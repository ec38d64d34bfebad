"""Requests with a grammar, on rank 0: they wait at the door until it is compiled, and each step brings their bitmasks.

The other ranks hear of such a request when its grammar is ready, and never of one that is refused: when that is depends
on the clock, and the planner must not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor, LLMatcher

from minisgl.core import FinishReason, Req, StepPlan
from minisgl.errors import RequestError
from minisgl.grammar.store import CompiledGrammar, GrammarStore
from minisgl.grammar.trial import reason
from minisgl.message.backend import AbortMsg, UserMsg
from minisgl.message.frontend import ErrorReply
from minisgl.message.tokenizer import DetokenizeMsg
from minisgl.scheduler.output import ReqOutput
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)

WAIT_SECONDS = 0.005  # between looks at grammars that are being compiled, while there is nothing else to do
_MAX_THREADS = 8

PlannerMsg = UserMsg | AbortMsg
Reply = DetokenizeMsg | ErrorReply


@dataclass(slots=True)
class _Output:
    """How far a request's output has got in its grammar."""

    grammar: CompiledGrammar  # held, so that the store keeps it while the request waits
    matcher: LLMatcher | None = None
    num_tokens: int = 0  # of the output, that the matcher has taken
    error: str | None = None  # its request is being ended


class Grammars:
    """Owns the matcher of every request with a grammar that was let in, by uid.

    store: None refuses them all. A matcher follows the tokens that are known on the host, so a retraction does not
    touch it.
    """

    def __init__(self, store: GrammarStore | None) -> None:
        self._store = store
        self._held: dict[int, tuple[UserMsg, Future[CompiledGrammar]]] = {}
        self._outputs: dict[int, _Output] = {}
        self._replies: list[Reply] = []
        self._aborts: list[PlannerMsg] = []
        self._executor: LLExecutor | None = None

    @property
    def is_holding(self) -> bool:
        """A request waits for its grammar."""
        return bool(self._held)

    def admit(self, messages: Sequence[PlannerMsg]) -> list[PlannerMsg]:
        """What the planners are to be told: of these messages, and of those held back until now."""
        if not (self._held or self._aborts) and not any(map(_has_grammar, messages)):
            return list(messages)
        admitted, self._aborts = self._aborts, []
        for message in messages:
            if isinstance(message, UserMsg) and message.params.grammar is not None:
                self._hold(message)
            elif isinstance(message, AbortMsg) and message.uid in self._held:
                del self._held[message.uid]  # a compilation goes on: the next request may ask for the same
                self._replies.append(DetokenizeMsg(message.uid, b"", finish_reason=FinishReason.ABORT))
            else:
                admitted.append(message)
        for uid in [uid for uid, (_, future) in self._held.items() if future.done()]:
            message, future = self._held.pop(uid)
            if self._let_in(uid, future):
                admitted.append(message)
        return admitted

    def take_replies(self) -> list[Reply]:
        """To requests that were not let in."""
        replies, self._replies = self._replies, []
        return replies

    def add_words(self, plan: StepPlan, reqs: Sequence[Req]) -> StepPlan:
        """The plan with the words of its bitmask. reqs: those that its `samples` belong to."""
        if plan.bitmask is None or self._store is None:
            return plan
        words = np.full((len(reqs), div_ceil(self._store.vocab_size, 32)), -1, np.int32)
        matchers: list[tuple[LLMatcher, int]] = []
        for index, req in enumerate(reqs):
            matcher = self._advance(req)
            if matcher is not None:
                matchers.append((matcher, index))
        self._compute(matchers, words)
        for matcher, index in matchers:
            if matcher.is_error():
                words[index] = -1
                self._fail(reqs[index].uid, matcher)
        return plan._replace(bitmask=plan.bitmask._replace(words=words))

    def finish(self, outputs: list[ReqOutput]) -> list[ReqOutput]:
        """Forget the requests that end. Those that this class has ended get their reason."""
        if not self._outputs:
            return outputs
        finished = []
        for output in outputs:
            ended = self._outputs.pop(output.req.uid, None) if output.finish_reason is not None else None
            if ended is not None and ended.error is not None and output.finish_reason is FinishReason.ABORT:
                output = output._replace(finish_reason=FinishReason.ERROR, error=ended.error)
            finished.append(output)
        return finished

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def _hold(self, message: UserMsg) -> None:
        grammar = message.params.grammar
        assert grammar is not None
        if self._store is None:
            self._replies.append(ErrorReply(message.uid, f"{grammar.param} is not available", param=grammar.param))
        else:
            self._held[message.uid] = (message, self._store.request(grammar))

    def _let_in(self, uid: int, future: Future[CompiledGrammar]) -> bool:
        error = future.exception()
        if error is None:
            self._outputs[uid] = _Output(future.result())
            return True
        if isinstance(error, RequestError):
            self._replies.append(ErrorReply(uid, str(error), status=error.status, param=error.param))
        else:
            self._replies.append(ErrorReply(uid, f"structured output failed: {type(error).__name__}", status=500))
        return False

    def _advance(self, req: Req) -> LLMatcher | None:
        """The request's matcher, after all tokens of its output."""
        output = self._outputs.get(req.uid)
        if output is None or output.error is not None:
            return None
        if output.matcher is None:
            output.matcher = output.grammar.start()
        new = req.tokens[req.prompt_len + output.num_tokens :]
        output.num_tokens += len(new)
        if new and not output.matcher.consume_tokens(new):
            self._fail(req.uid, output.matcher)
            return None
        return output.matcher

    def _compute(self, matchers: list[tuple[LLMatcher, int]], words: np.ndarray) -> None:
        """Fill the matchers' rows of `words`; several matchers on several cores."""
        row_bytes = words.shape[1] * words.itemsize
        if len(matchers) == 1:
            matcher, index = matchers[0]
            matcher.unsafe_compute_mask_ptr(words[index].ctypes.data, row_bytes)
        elif matchers:
            if self._executor is None:
                self._executor = LLExecutor(max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2)))
            self._executor.unsafe_compute_mask_ptr(matchers, words.ctypes.data, row_bytes, len(words))

    def _fail(self, uid: int, matcher: LLMatcher) -> None:
        """The grammar has grown too complex. All ranks end its request at their next turn."""
        output = self._outputs[uid]
        output.error, output.matcher = f"the grammar cannot be followed any further: {reason(matcher)}", None
        logger.debug("request %d: %s", uid, output.error)
        self._aborts.append(AbortMsg(uid))


def _has_grammar(message: PlannerMsg) -> bool:
    return isinstance(message, UserMsg) and message.params.grammar is not None
