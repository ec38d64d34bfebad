"""Requests with a grammar, on rank 0: they wait at the door until it is compiled, and each step brings their bitmasks.

The other ranks hear of such a request when its grammar is ready, and never of one that is refused: when that is depends
on the clock, and the planner must not.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from minisgl.core import FinishReason, Req, StepPlan
from minisgl.errors import RequestError
from minisgl.grammar.store import CompiledGrammar, GrammarStore
from minisgl.message.backend import AbortMsg, FlushMsg, ResumeMsg, UserMsg
from minisgl.message.frontend import ErrorReply
from minisgl.message.tokenizer import DetokenizeMsg
from minisgl.scheduler.masks import Masks, Output, Row, Submitted
from minisgl.scheduler.output import ReqOutput

_WAIT_SECONDS = 0.005  # for grammars and masks, between looks at other messages

PlannerMsg = UserMsg | AbortMsg | FlushMsg | ResumeMsg
Reply = DetokenizeMsg | ErrorReply


class Grammars:
    """Owns the matcher of every request with a grammar that was let in, by uid.

    store: None refuses them all. is_gpu: a GPU computes meanwhile, see `Masks`. A matcher knows the output that it has
    seen, so a retraction does not touch it.
    """

    def __init__(self, store: GrammarStore | None, is_gpu: bool = False) -> None:
        self._store = store
        self._held: dict[int, tuple[UserMsg, Future[CompiledGrammar]]] = {}
        self._outputs: dict[int, Output] = {}
        self._replies: list[Reply] = []
        self._masks = Masks(0 if store is None else store.vocab_size, is_gpu)

    @property
    def is_holding(self) -> bool:
        """A request waits for its grammar, or for its next mask."""
        return bool(self._held) or self._masks.is_waiting

    def wait(self) -> None:
        """For one of them, a moment."""
        if not self._masks.wait(_WAIT_SECONDS):
            wait([future for _, future in self._held.values()], _WAIT_SECONDS, FIRST_COMPLETED)

    def admit(self, messages: Sequence[PlannerMsg]) -> list[PlannerMsg]:
        """What the planners are to be told: of these messages, and of those held back until now."""
        if not (self._held or self._outputs) and not any(map(_has_grammar, messages)):
            return list(messages)
        admitted: list[PlannerMsg] = [*self._masks.take_ready()]
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
        rows = [Row(req, self._outputs[req.uid], req.num_tokens - 1) for req in reqs]
        words = self._masks.words(plan, rows, submitted)
        return plan._replace(bitmask=plan.bitmask._replace(words=words))

    def finish(self, outputs: list[ReqOutput]) -> list[ReqOutput]:
        """What there is to tell. Requests that end are forgotten, and those that this class has ended get their reason.
        Of those that are held the next masks are computed."""
        if not self._outputs:
            return outputs
        finished = []
        for output in outputs:
            req, own = output.req, self._outputs.get(output.req.uid)
            if own is not None and output.finish_reason is not None:
                del self._outputs[req.uid]
                self._masks.forget(req.uid)
                if own.error is not None and output.finish_reason is FinishReason.ABORT:
                    output = output._replace(finish_reason=FinishReason.ERROR, error=own.error, error_status=400)
            elif own is not None and req.held and req.num_inflight == req.num_stale:
                self._masks.hold(req, own)
            if output.token_ids or output.finish_reason is not None:  # there is something to tell
                finished.append(output)
        return finished

    def close(self) -> None:
        self._masks.close()
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
            self._outputs |= {uid: Output(future.result()) for uid in uids}
            return True
        if isinstance(error, RequestError):
            self._replies += [ErrorReply(uid, str(error), status=error.status, param=error.param) for uid in uids]
        else:
            text = f"structured output failed: {type(error).__name__}"
            self._replies += [ErrorReply(uid, text, status=500) for uid in uids]
        return False


def _has_grammar(message: PlannerMsg) -> bool:
    return isinstance(message, UserMsg) and message.params.grammar is not None
