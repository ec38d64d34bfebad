"""A step's masks: when they are computed, and by whom (docs/adr/0031-a-gpu-waits-for-masks.md)."""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np

from minisgl.core import ID_PENDING, MASK_NOT_READY, MASK_READY, NOT_READY, Req, StepHandle, StepPlan
from minisgl.errors import EngineError
from minisgl.kernel.masks import Flags, MaskRow, MaskWorker, NativeMatcher, Words
from minisgl.scheduler.matching import CHEAP_SECONDS, FREE_SECONDS, Matching
from minisgl.scheduler.plan import Planned

logger = logging.getLogger(__name__)

_STEP_SECONDS = 30.0  # for a step to end; if it takes longer, another process has died in it
_SHARE = 0.75  # of the time between two steps: what the masks of one may take the worker

Submitted = tuple[Planned, StepHandle]


class Row(NamedTuple):
    """Samples of one request: the token at position `length`, and one behind each token of its draft. Their masks are
    the step's from number `place` on."""

    req: Req
    output: Matching
    length: int
    draft: tuple[int, ...] = ()
    place: int = 0


class Computing(Protocol):
    """Has some of a step's masks computed beside Python (`share`), and computes the others itself (`compute`)."""

    all_allowed: Words

    def share(self, masks: "LateMasks", last: "LateMasks | None", words: Words, states: Words) -> list[Row]: ...

    def compute(
        self, plan: StepPlan, rows: Sequence[Row], new_ids: Sequence[list[int] | None], words: Words, is_ready: Flags
    ) -> None: ...


class Beside:
    """Has masks computed beside Python: by a native thread that does not need the interpreter's lock."""

    def __init__(self) -> None:
        self._worker: MaskWorker | None = None
        self._num_dear = 0  # of its masks, when rows were last looked at

    def share(
        self, masks: "LateMasks", last: "LateMasks | None", words: Words, states: Words, interval: float
    ) -> tuple[list[Row], float]:
        """Have masks of a step computed, as many as are there in time. last: of the step before, if it has not ended;
        what goes on as it did there costs the host next to nothing. interval: seconds between two steps. → the other
        rows, and the seconds of a core that it will take."""
        worker, most, refs, spent = self._worker, _SHARE * interval, dict[int, int](), 0.0
        if last is not None and len(last.ids):  # none: it has failed before it asked
            same = last.is_shared and masks.numbers == [(uid, num + 1) for uid, num in last.numbers]
            is_cheap = worker is not None and worker.num_dear == self._num_dear and worker.cost <= most
            if worker is not None and is_cheap and same and masks.shape[0] == len(masks.numbers):
                worker.submit(None, words, states, last.ids)
                masks.is_shared = True
                return [], worker.cost
            first = last.ids.ctypes.data
            refs = {uid: first + 4 * place for place, (uid, _) in enumerate(last.numbers)}
        shared, left = list[MaskRow](), list[Row]()
        for row in sorted(masks.rows(), key=lambda row: row.output.cost):
            one = beside(row, refs.get(row.req.uid, 0))
            if one is None or spent + row.output.cost > most:
                left.append(row)
            else:
                shared.append(one)
                spent += row.output.cost
        if shared:
            worker = self._worker = worker or MaskWorker(FREE_SECONDS)
            table, self._num_dear = np.array(shared, np.int64), worker.num_dear
            worker.submit(table, words, states, *(() if last is None else (last.ids,)))
            masks.is_shared = not left
        return left, spent

    def close(self) -> None:
        """Before the engine: its memory is written to."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def beside(row: Row, ref: int) -> MaskRow | None:
    """What computes a row's mask without Python, if it is needed, and not dear. ref: where the last token will
    be, if a step before has not ended."""
    req, own, num_output = row.req, row.output, row.length - row.req.prompt_len
    first = own.grammar.matcher
    if own.matcher is None and own.error is None and 0 < own.grammar.mean <= CHEAP_SECONDS:
        own.matcher, own.cost = first.deep_copy() if isinstance(first, NativeMatcher) else None, own.grammar.cost
    num_taken, num_late, matcher = own.num_tokens, row.length - len(req.tokens), own.matcher
    if not isinstance(matcher, NativeMatcher):
        return None
    if num_taken > 0:  # the first mask of all outputs is the same
        own.cost = own.grammar.cost = matcher.cost
        own.seconds += max(0.0, own.cost - FREE_SECONDS)
        own.grammar.mean += (own.cost - own.grammar.mean) / (16 if own.grammar.mean else 1)
    if not 0 < own.grammar.mean <= CHEAP_SECONDS:  # they share a lock: the worker would wait for the threads
        return None
    is_idle = own.ready[0] != row.length and (own.job is None or own.job.done())
    if own.cost > FREE_SECONDS or not is_idle or row.draft or num_late > bool(ref) or num_taken < num_output - 2:
        return None
    known = req.tokens[-1] if len(req.tokens) > req.prompt_len else -1
    return MaskRow(matcher.address, ref if num_late else 0, num_output, known, row.place)


class LateMasks:
    """A step's masks. They depend on the tokens of the step before. Cheap ones are computed beside Python as soon as
    the engine has written the token before, the others when that step has ended; a GPU waits for each by itself, a
    CPU's engine for all before it samples. GPUs without our kernels ask once all that comes before is launched.

    numbers: of each request the uid, and its tokens with the one to be sampled. is_shared: all masks are computed so.
    """

    def __init__(
        self, computing: Computing, plan: StepPlan, outputs: list[tuple[Req, Matching]], before: list[Submitted],
        last: "LateMasks | None" = None,
    ) -> None:  # fmt: skip
        """last: the masks of the step before, if that has not ended."""
        self._computing, self._plan, self._outputs, self._before, self._last = computing, plan, outputs, before, last
        self.shape = len(plan.masked), len(computing.all_allowed)
        self.numbers = [(req.uid, req.num_tokens) for req, _ in outputs]
        self.is_shared, self.ids = False, np.empty(0, np.int32)  # where an engine writes its tokens
        self._left: tuple[list[Row], Words, Words] | None = None

    def __call__(self, words: Words, states: Words, ids: Words | None) -> None:
        last, self._last = self._last, None
        if ids is None:
            self._fill(self.rows(), words, states, is_late=False)
            return
        self.ids = ids
        left = self._computing.share(self, last, words, states)
        self._left, self._last, self._outputs = (left, words, states) if left else None, last, []
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

    def rows(self) -> list[Row]:
        drafts, rows, place = {draft.row: draft.ids for draft in self._plan.drafts}, list[Row](), 0
        for (req, output), (_, num) in zip(self._outputs, self.numbers, strict=True):
            rows.append(Row(req, output, num - 1, drafts.get(req.row, ()), place))
            place += 1 + len(rows[-1].draft)
        return rows

    def _fill(self, rows: list[Row], words: Words, states: Words, is_late: bool) -> None:
        """Compute the masks of these rows, and let them go."""
        is_ready = np.zeros(len(words), np.bool_)
        try:
            if all(handle.wait(_STEP_SECONDS) for _, handle in self._before):
                self._computing.compute(self._plan, rows, [*self._new_ids(rows)], words, is_ready)
        except Exception as error:
            if not is_late and not isinstance(error, EngineError):  # of the step before: its requests end with it
                raise
            logger.warning("step %d has no masks: %s: %s", self._plan.step_id, type(error).__name__, error)
        finally:
            places = [place for row in rows for place in range(row.place, row.place + 1 + len(row.draft))]
            states[places] = np.where(is_ready[places], MASK_READY, MASK_NOT_READY)
            self._outputs, self._before = [], []

    def _new_ids(self, rows: list[Row]) -> Iterator[list[int] | None]:
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
