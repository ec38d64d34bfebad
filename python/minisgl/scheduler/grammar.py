"""Requests with a grammar, on rank 0: they wait at the door until it is compiled, and each step brings their masks.

The other ranks hear of such a request when its grammar is ready, and never of one that is refused: when that is depends
on the clock, and the planner must not. So it is with masks: one that is not ready in time sits the step out, and all
ranks are told when it is there (docs/adr/0018-rows-that-wait.md). And so it is with tokens that a grammar prescribes,
which the planners draft (docs/adr/0027-prescribed-tokens.md).
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minisgl.core import (
    ID_PENDING,
    MASK_NOT_READY,
    MASK_READY,
    NOT_READY,
    FinishReason,
    Req,
    ReqOutput,
    StepHandle,
    StepPlan,
)
from minisgl.errors import EngineError, RequestError
from minisgl.grammar.store import CompiledGrammar, GrammarStore, yield_to_others
from minisgl.kernel.masks import MaskRow, MaskWorker, NativeMatcher
from minisgl.message import messages as wire
from minisgl.scheduler.matching import CHEAP_SECONDS, FREE_SECONDS, Flags, Matching, Words
from minisgl.scheduler.plan import Planned
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 0.005  # for grammars and masks, between looks at other messages
_MAX_THREADS = 8
_STEP_SECONDS = 30.0  # for a step to end; if it takes longer, another process has died in it
# Of the time between the masks of two steps, what masks may take; and what cheap ones may: a row that sits out has been
# computed in vain, for more than that. A GPU computes meanwhile; and what a thread beside Python may take, then.
CPU_SHARES, _GPU_SHARES, _WORKER_SHARE = (0.1, 0.4), (0.1, 2.0), 0.75
_LONGEST_INTERVAL = 0.05  # seconds between steps that count; more is idleness
MOST_SECONDS = 10.0  # of a core: what the masks of one request may take beyond `FREE_SECONDS` each

_REF, _PLACE = map(MaskRow._fields.index, ("ref", "place"))
_NEXT = np.array(MaskRow(matcher=0, ref=0, length=1, known=0, place=0))  # of a row that goes on: one token more

Submitted = tuple[Planned, StepHandle]
Reply = wire.DetokenizeMsg | wire.ErrorReply


class _Row(NamedTuple):
    """A token to be sampled: at position `length` of the request, and one behind each token of a draft for these. Their
    masks are at `place` of the step's."""

    req: Req
    output: Matching
    length: int
    draft: tuple[int, ...] = ()
    place: int = 0


class Grammars:
    """Owns the matcher of every request with a grammar that was let in, by uid.

    store: None refuses them all. is_gpu: a GPU computes meanwhile. tells_forced: planners are told which tokens are
    prescribed. A matcher knows the output that it has seen, so a retraction does not touch it.
    """

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
        self._worker: MaskWorker | None = None  # computes cheap masks of native matchers
        self._num_dear = 0  # of its masks, when rows were last looked at
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

    def masks(self, planned: Planned, submitted: Sequence[Submitted]) -> "LateMasks | None":
        """The masks of a step's rows that have to match a grammar, computed after the engine has asked for them.
        submitted: the steps before it that are not retired, oldest first."""
        plan = planned.plan
        if not plan.masked or self._store is None:
            return None
        shares = zip(planned.reqs, plan.reqs, strict=True)
        masked = [req for req, share in shares if share.num_samples and req.params.grammar is not None]
        outputs = [(req, self.outputs[req.uid]) for req in masked]
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

    def share(self, masks: "LateMasks", last: "LateMasks | None", words: Words, states: Words) -> list[_Row]:
        """Have masks of a step computed beside Python, as many as are there in time. last: of the step before, if it
        has not ended; what goes on as it did there costs the host next to nothing. → the other rows."""
        worker, most, refs = self._worker, _WORKER_SHARE * self._interval, dict[int, int]()
        if worker is not None and last is not None:
            is_cheap = worker.num_dear == self._num_dear and worker.cost <= most
            if is_cheap and last.table is not None and masks.follows(last):
                masks.table = last.table + _NEXT
                masks.table[:, _REF] = last.addresses[masks.table[:, _PLACE]]
                worker.submit(masks.table, words, states, last.ids)
                return []
            refs = dict(zip(last.numbers[:, 0].tolist(), last.addresses.tolist(), strict=True))
        shared, left, self._late_cost = list[MaskRow](), list[_Row](), 0.0
        for row in sorted(masks.rows(), key=lambda row: row.output.cost):
            beside = self._beside(row, refs.get(row.req.uid, 0))
            if beside is None or self._late_cost + row.output.cost > most:
                left.append(row)
            else:
                shared.append(beside)
                self._late_cost += row.output.cost
        if shared:
            worker = self._worker = worker or MaskWorker(FREE_SECONDS)
            table, self._num_dear = np.array(shared, np.int64), worker.num_dear
            worker.submit(table, words, states, *(() if last is None else (last.ids,)))
            masks.table = None if left else table
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
                row, ids = _Row(req, own, len(req.tokens)), req.tokens[req.prompt_len + own.num_tokens :]
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
        self, plan: StepPlan, rows: Sequence[_Row], new_ids: Sequence[list[int] | None], words: Words, is_ready: Flags
    ) -> None:
        """Write masks, as far as there is time, for `LateMasks`, which call it in the order of the steps.
        new_ids: tokens that the rows' matchers have not taken yet; None where one of them was not sampled."""
        start, most, spent = time.perf_counter(), self._most, 0.0
        for output in (row.output for row in rows if row.output.matcher is None):
            output.cost = max(output.cost, output.grammar.cost)
        for row, ids in sorted(zip(rows, new_ids, strict=True), key=lambda item: item[0].output.cost):
            output, found, grammar = row.output, list[Words](), row.output.grammar
            is_dear = self._is_gpu and grammar.mean > CHEAP_SECONDS  # others may have its lock when its turn comes
            is_free = not is_dear and (grammar.cost <= CHEAP_SECONDS or not grammar.lock.locked())
            has_time = is_free and spent + output.cost <= most[output.cost <= CHEAP_SECONDS]
            if output.ready[0] == row.length:
                found = [output.ready[1]]
            elif ids is None or (output.job is not None and not output.job.done()):
                continue
            elif has_time or len(plan.reqs) == 1 or output.error is not None:
                found = self._mask(row, ids)
                spent += output.cost * max(1, len(found))
            else:
                self._start(row._replace(draft=()), ids)
            for i, one in enumerate(found, row.place):
                words[i], is_ready[i] = one, True
        self._late_cost = spent
        self._last_time += time.perf_counter() - start  # which is no time of the step, else it would be ever more

    def close(self) -> None:
        """Before the engine: it is written to."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        for threads in self._threads:
            threads.shutdown(wait=False, cancel_futures=True)
        if self._store is not None:
            self._store.close()

    def _beside(self, row: _Row, ref: int) -> MaskRow | None:
        """What computes a row's mask without Python, if it is needed, and not dear. ref: where the last token will
        be, if a step before has not ended."""
        req, own, num_output = row.req, row.output, row.length - row.req.prompt_len
        if own.matcher is None and own.error is None and own.grammar.cost <= FREE_SECONDS:
            own.matcher, own.cost = own.grammar.matcher.deep_copy(), own.grammar.cost
        num_taken, num_late, matcher = own.num_tokens, row.length - len(req.tokens), own.matcher
        if not isinstance(matcher, NativeMatcher):
            return None
        own.cost = own.grammar.cost = max(matcher.cost, own.cost / 4)
        own.grammar.mean += (matcher.cost - own.grammar.mean) / 16
        if own.grammar.mean > CHEAP_SECONDS:  # they share a lock: the worker would wait for the threads
            return None
        is_idle = own.ready[0] != row.length and (own.job is None or own.job.done())
        if own.cost > FREE_SECONDS or not is_idle or row.draft or num_late > bool(ref) or num_taken < num_output - 2:
            return None
        known = req.tokens[-1] if len(req.tokens) > req.prompt_len else -1
        return MaskRow(matcher.address, ref if num_late else 0, num_output, known, row.place)

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

    def _start(self, row: _Row, ids: list[int]) -> None:
        row.output.job = self._threads[row.output.cost > FREE_SECONDS].submit(self._mask, row, ids)

    def _follow(self, row: _Row, ids: list[int], num_words: int) -> tuple[list[Words], str | None]:
        output = row.output
        found = output.follow(ids, row.draft, num_words, FREE_SECONDS)
        if output.forced and row.length + len(output.forced) > output.forced_to:
            output.forced_to = row.length + len(output.forced)
            self._news.append(wire.ForcedMsg(row.req.uid, row.length, wire.pack_ids(output.forced)))
        return found

    def _mask(self, row: _Row, ids: list[int]) -> list[Words]:
        """Advance a row's matcher by its new tokens: which ones may follow, and after each token of a draft, as far as
        that is known. All, if its request is being ended."""
        output, start, words, why = row.output, time.thread_time(), list[Words](), None
        if output.error is None:
            words, why = self._follow(row, ids, len(self.all_allowed))
        seconds = (time.thread_time() - start) / max(1, len(words))
        output.cost, output.grammar.cost = (max(seconds, known / 4) for known in (output.cost, output.grammar.cost))
        output.grammar.mean += (seconds - output.grammar.mean) / 16
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


class LateMasks:
    """A step's masks. They depend on the tokens of the step before, so on a CPU they are computed when the engine asks
    for them: after it has launched all of the step that comes before sampling. That may be on the engine's thread. A
    device waits for each by itself: cheap ones are computed beside Python as soon as it has written the token before,
    the others when the step before has ended.

    numbers: [k, 2], of each request the uid, and its tokens with the one to be sampled. table: of `MaskRow`s, if all
    masks are computed so.
    """

    def __init__(
        self, grammars: Grammars, plan: StepPlan, outputs: list[tuple[Req, Matching]], before: list[Submitted],
        last: "LateMasks | None" = None,
    ) -> None:  # fmt: skip
        """last: the masks of the step before, if that has not ended."""
        self._grammars, self._plan, self._outputs, self._before, self._last = grammars, plan, outputs, before, last
        self.shape = len(plan.masked), len(grammars.all_allowed)
        self.numbers = np.array([(req.uid, req.num_tokens) for req, _ in outputs], np.int64).reshape(-1, 2)
        self.table: npt.NDArray[np.int64] | None = None
        self.ids = np.empty(0, np.int32)  # where a device writes its tokens
        self._left: tuple[list[_Row], Words, Words] | None = None

    def __call__(self, words: Words, states: Words, ids: Words | None) -> None:
        last, self._last = self._last, None
        if ids is None:
            self._fill(self.rows(), words, states, is_late=False)
            return
        self.ids, self._left = ids, (self._grammars.share(self, last, words, states), words, states)
        self._last, self._outputs = last, []
        if not self._before:
            self.begin()

    def begin(self) -> None:
        """The steps before it have ended: what is left is computed, once."""
        last, self._last = self._last, None
        if last is not None:  # those of a step that has failed will not come
            last.ids[last.ids == ID_PENDING] = NOT_READY
        left, self._left = self._left, None
        if left is not None:
            self._fill(*left, is_late=True)

    def rows(self) -> list[_Row]:
        drafts, rows, place = {draft.row: draft.ids for draft in self._plan.drafts}, list[_Row](), 0
        for (req, output), num in zip(self._outputs, self.numbers[:, 1].tolist(), strict=True):
            rows.append(_Row(req, output, num - 1, drafts.get(req.row, ()), place))
            place += 1 + len(rows[-1].draft)
        return rows

    def follows(self, last: "LateMasks") -> bool:
        """Whether it has the same requests, each with one token more."""
        return len(self.numbers) == len(last.numbers) and bool((self.numbers - last.numbers == (0, 1)).all())

    @property
    def addresses(self) -> npt.NDArray[np.int64]:
        """Where the device writes the tokens that it samples."""
        return self.ids.ctypes.data + 4 * np.arange(len(self.numbers))

    def _fill(self, rows: list[_Row], words: Words, states: Words, is_late: bool) -> None:
        """Compute the masks of these rows, and let them go."""
        is_ready = np.zeros(len(words), np.bool_)
        try:
            if rows and all(handle.wait(_STEP_SECONDS) for _, handle in self._before):
                self._grammars.compute(self._plan, rows, [*self._new_ids(rows)], words, is_ready)
        except Exception as error:
            if not is_late and not isinstance(error, EngineError):  # of the step before: its requests end with it
                raise
            logger.warning("step %d has no masks: %s: %s", self._plan.step_id, type(error).__name__, error)
        finally:
            places = [place for row in rows for place in range(row.place, row.place + 1 + len(row.draft))]
            states[places] = np.where(is_ready[places], MASK_READY, MASK_NOT_READY)
            self._outputs, self._before = [], []

    def _new_ids(self, rows: list[_Row]) -> Iterator[list[int] | None]:
        """Of each row the tokens of the output up to the one to be sampled that its matcher has not taken yet; None
        where one of them was not sampled. The host knows the first of them, and the steps before have the others."""
        sampled = dict[int, list[int]]()
        for planned, handle in self._before:
            reqs, token_ids = planned.sampling, [*chain.from_iterable(handle.result().token_ids)]
            for i in planned.plan.masked:
                sampled.setdefault(reqs[i].uid, []).append(token_ids[i])
        for req, output, length, *_ in rows:
            late, begin = sampled.get(req.uid, []), req.prompt_len + output.num_tokens
            if num := length - begin - len(late):  # before them, or of them
                late = req.tokens[begin : begin + num] + late if num > 0 else late[-num:]
            yield None if NOT_READY in late else [token for token in late if token >= 0]
