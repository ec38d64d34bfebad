"""Masks beside a GPU: those of many rows take two calls, when the step before has ended; the device waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest
from llguidance import LLExecutor, LLMatcher

import minisgl
from minisgl.config.runtime import SchedulerConfig
from minisgl.core import (
    ID_PENDING,
    MASK_NOT_READY,
    MASK_PENDING,
    MASK_READY,
    NOT_READY,
    FinishReason,
    Grammar,
    Masks,
    Req,
    SamplingParams,
    ScheduledReq,
    StepPlan,
    StepResult,
)
from minisgl.grammar.source import VocabularyConfig
from minisgl.grammar.store import GrammarStore
from minisgl.message.messages import DetokenizeMsg, ForcedMsg, UserMsg, pack_ids, unpack_ids
from minisgl.scheduler.grammar import Grammars, LateMasks, _Row
from minisgl.scheduler.matching import Matching, Shared, masks_together
from minisgl.scheduler.scheduler import Scheduler
from minisgl.scheduler.transport import LocalTransport

MODEL = Path(minisgl.__file__).parent / "demo_model"
VOCAB, EOS = 4096, 2
NUM_REQUESTS, NUM_TOKENS = 20, 24
CONFIG = SchedulerConfig(
    max_running_requests=NUM_REQUESTS,
    max_prefill_length=256,
    max_seq_len=64,
    num_pages=NUM_REQUESTS * 64,  # so that none waits for another one's row
    page_size=4,
    eos_token_ids=(EOS,),
    check_integrity=1,
    integrity_fatal=True,
)
GRAMMARS = (
    Grammar("json", '{"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 40}'),
    Grammar("regex", "([a-z]+ ){500}"),
    Grammar("regex", "([0-9]{4}-[0-9]{2} ){100}"),
)


@pytest.fixture(scope="module")
def store() -> Iterator[GrammarStore]:
    store = GrammarStore(VocabularyConfig(str(MODEL), VOCAB, (EOS,)))
    yield store
    store.close()


class Handle:
    """As a GPU's: it waits for the masks, and then it samples."""

    def __init__(self, engine: Engine, plan: StepPlan, masks: Masks | None) -> None:
        self._engine, self._plan, self._lock = engine, plan, threading.Lock()
        self._words = np.zeros((0, 0) if masks is None else masks.shape, np.int32)
        self._states, ids = (np.full(len(plan.masked), value, np.int32) for value in (MASK_PENDING, ID_PENDING))
        if masks is not None:
            masks(self._words, self._states, ids)
        self._ids: list[tuple[int, ...]] | None = None

    def wait(self, timeout: float | None = None) -> bool:
        with self._lock:  # the next step's masks ask for its tokens, too
            if self._ids is None:
                deadline = time.monotonic() + 60
                while MASK_PENDING in self._states:
                    assert time.monotonic() < deadline
                    time.sleep(1e-4)
                self._ids = self._engine.sample(self._plan, self._words, (self._states == MASK_READY).tolist())
        return True

    def result(self) -> StepResult:
        self.wait()
        assert self._ids is not None
        return StepResult(self._plan.step_id, self._ids)


class Engine:
    """Draws tokens that the masks allow, and remembers these by row and position. refused: a row that says otherwise
    once it is at this position."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], npt.NDArray[np.int32]] = {}
        self.refused: tuple[int, int] | None = None
        self.num_missed = 0
        self._random = np.random.default_rng(0)

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> Handle:
        return Handle(self, plan, masks)

    def sample(self, plan: StepPlan, masks: npt.NDArray[np.int32], ready: list[bool]) -> list[tuple[int, ...]]:
        sampling = [share for share in plan.reqs if share.num_samples]
        ids = [int(token) for token in self._random.integers(1, VOCAB, len(sampling))]
        for sample, words, is_ready in zip(plan.masked, masks, ready, strict=True):
            place = sampling[sample].row, sampling[sample].start + sampling[sample].num_new
            if not is_ready:
                ids[sample] = NOT_READY
                self.num_missed += 1
                continue
            self.seen[place] = words
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            ids[sample] = int(self._random.choice(allowed))
            if self.refused == place:
                ids[sample] = int(np.setdiff1d(np.arange(1, VOCAB), allowed)[0])
        return [(token,) for token in ids]

    def close(self) -> None: ...


class Run:
    """20 requests that come together: each third of them has one of the grammars, the last two have none."""

    def __init__(self, store: GrammarStore, overlap: bool = True, refused: tuple[int, int] | None = None) -> None:
        self.engine, self.grammars = Engine(), Grammars(store, is_gpu=True)
        self.engine.refused = refused
        transport = LocalTransport(grammars=self.grammars)
        values = {name: getattr(CONFIG, name) for name in CONFIG.__slots__} | {"overlap": overlap}
        scheduler = Scheduler(SchedulerConfig(**values), self.engine, transport)
        self.wanted = [GRAMMARS[uid % 3] if uid < NUM_REQUESTS - 2 else None for uid in range(NUM_REQUESTS)]
        self.futures = [store.request(grammar) for grammar in GRAMMARS]
        for future in self.futures:
            future.result(60)  # so that all are let in at once: a request's row follows from its number
        params = [SamplingParams(NUM_TOKENS, seed=0, ignore_eos=True, grammar=grammar) for grammar in self.wanted]
        transport.put([UserMsg(uid, pack_ids([7, 8, 9 + uid]), one) for uid, one in enumerate(params)])
        self.ids: dict[int, list[int]] = {uid: [] for uid in range(NUM_REQUESTS)}
        self.ends: dict[int, DetokenizeMsg] = {}
        self.rows: dict[int, int] = {}
        for _ in range(10_000):
            scheduler.turn()
            self.rows |= {req.uid: req.row for req in scheduler.planner.running}
            for message in transport.take_outputs():
                assert isinstance(message, DetokenizeMsg)
                self.ids[message.uid] += unpack_ids(message.token_ids)
                if message.finish_reason is not None:
                    self.ends[message.uid] = message
            if len(self.ends) == NUM_REQUESTS:
                break

    def matcher(self, uid: int) -> LLMatcher:
        wanted = self.wanted[uid]
        assert wanted is not None
        return self.futures[GRAMMARS.index(wanted)].result().matcher.deep_copy()


def mask_of(matcher: LLMatcher) -> npt.NDArray[np.int32]:
    return np.frombuffer(matcher.compute_bitmask(), np.int32)[: VOCAB // 32]


@pytest.fixture(autouse=True)
def time_for_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, all masks are cheap."""
    monkeypatch.setattr("minisgl.scheduler.matching.CHEAP_SECONDS", 60.0)
    monkeypatch.setattr("minisgl.scheduler.grammar.CHEAP_SECONDS", 60.0)
    monkeypatch.setattr("minisgl.scheduler.grammar._GPU_SHARES", (1e6, 1e6))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("is_late", [True, False])
def test_each_mask_is_the_matchers_after_all_tokens_before_it(
    store: GrammarStore, overlap: bool, is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """is_late: each second time they take too long, and then each one by itself."""
    numbers = list[int]()

    def watched(executor: LLExecutor, taken: list[Shared], *room: Any) -> float:
        numbers.append(len(taken))
        return masks_together(executor, taken, *room) * (1e12 if is_late else 1.0)

    monkeypatch.setattr("minisgl.scheduler.grammar.masks_together", watched)
    run = Run(store, overlap)
    steps = NUM_TOKENS / (1 + is_late)
    assert steps - 3 <= len(numbers) <= steps + 2 and max(numbers) == NUM_REQUESTS - 2
    assert run.engine.num_missed == 0
    for uid in range(NUM_REQUESTS - 2):
        matcher = run.matcher(uid)
        assert len(run.ids[uid]) == NUM_TOKENS and run.ends[uid].finish_reason is FinishReason.LENGTH
        for position, token in enumerate(run.ids[uid], 3):
            assert (run.engine.seen[run.rows[uid], position] == mask_of(matcher)).all(), (uid, position)
            assert matcher.consume_token(token)


def test_what_a_grammar_refuses_ends_its_own_request_only(store: GrammarStore) -> None:
    run = Run(store, refused=(Run(store).rows[4], 3 + 12))
    assert [uid for uid, end in run.ends.items() if end.finish_reason is FinishReason.ERROR] == [4]
    assert "cannot be followed any further" in (run.ends[4].error or "")
    assert all(len(ids) == NUM_TOKENS for uid, ids in run.ids.items() if uid != 4)


class Room:
    """For the masks of some rows of one grammar."""

    def __init__(self, store: GrammarStore, num: int) -> None:
        self.grammar, self.executor = store.request(GRAMMARS[1]).result(60), LLExecutor(2)
        self.outputs = [Matching(self.grammar, matcher=self.grammar.matcher.deep_copy()) for _ in range(num)]
        self.words, self.is_ready = np.empty((num, VOCAB // 32), np.int32), np.zeros(num, np.bool_)

    def compute(self, *ids: list[int]) -> None:
        self.is_ready[:] = False
        taken: list[Shared] = [(output, new, i) for i, (output, new) in enumerate(zip(self.outputs, ids, strict=True))]
        assert masks_together(self.executor, taken, self.words, self.is_ready) > 0


def test_a_matcher_that_breaks_begins_anew(store: GrammarStore) -> None:
    """With what the others know nothing is wrong."""
    room = Room(store, 3)
    room.compute([], [], [])
    assert room.is_ready.all() and (room.words == mask_of(room.grammar.matcher.deep_copy())).all()
    is_allowed = np.unpackbits(room.words[0].view(np.uint8), bitorder="little")
    first, banned = int(np.flatnonzero(is_allowed)[0]), int(np.flatnonzero(1 - is_allowed)[5])
    room.compute([first], [banned], [first])
    assert room.is_ready.tolist() == [True, False, True]
    assert [output.num_tokens for output in room.outputs] == [1, 0, 1] and room.outputs[1].matcher is None


@pytest.mark.parametrize("is_device", [True, False])
def test_a_failure_is_told_and_the_device_goes_on(
    store: GrammarStore, monkeypatch: pytest.MonkeyPatch, is_device: bool
) -> None:
    """It waits for each mask: one of which it is never told would hold up all steps after it. Rows sit out."""
    grammars, ids = Grammars(store, is_gpu=True), np.full(1, ID_PENDING, np.int32)
    words, states = np.zeros((1, VOCAB // 32), np.int32), np.full(1, MASK_PENDING, np.int32)
    masks = LateMasks(grammars, StepPlan(1, (), (), (), masked=(0,)), [], [])

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(grammars, "compute", fail)
    with nullcontext() if is_device else pytest.raises(MemoryError):
        masks(words, states, ids if is_device else None)
    assert states[0] == MASK_NOT_READY


def test_an_interrupt_goes_on_and_matchers_begin_anew(store: GrammarStore) -> None:
    """It may come while the main thread, as on a GPU, computes masks: nobody knows how far that had got."""
    room = Room(store, 2)
    room.compute([], [])
    room.executor = Mock(unsafe_compute_mask_ptr=Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        room.compute([1], [])
    assert not room.is_ready.any()
    assert all(output.matcher is None and output.num_tokens == 0 for output in room.outputs)


def test_a_new_request_of_a_dear_grammar_is_expected_to_be_dear(store: GrammarStore) -> None:
    """It sits out: nobody waits for its first mask."""
    grammar, params = replace(store.request(GRAMMARS[1]).result(60), cost=1e9), SamplingParams(seed=0)
    grammars, output = Grammars(store, is_gpu=True), Matching(grammar)
    rows = [_Row(Req(7, [1], np.empty(0, np.int32), 1, params, 9, 1), output, 1)]
    words, is_ready = np.zeros((1, VOCAB // 32), np.int32), np.zeros(1, np.bool_)
    plan = StepPlan(1, (), (), (ScheduledReq(0, 0, 1, 1), ScheduledReq(1, 0, 1, 1)), 2, masked=(0,))
    grammars.compute(plan, rows, [[]], words, is_ready)
    assert not is_ready.any() and output.job is not None
    assert (output.job.result(60)[0] == mask_of(grammar.matcher.deep_copy())).all()


def test_a_device_is_begun_for_once_and_a_host_at_once(store: GrammarStore) -> None:
    """Where nobody but the host waits, the scheduler's thread does not compute what the engine's does."""
    grammars, calls = Grammars(store, is_gpu=True), list[int]()
    grammars.compute = lambda *_: calls.append(1)  # type: ignore[method-assign]
    before: list[Any] = [(None, SimpleNamespace(wait=lambda _: True, result=lambda: SimpleNamespace(token_ids=[])))]
    for ids, num_before in ((None, 1), (np.full(1, ID_PENDING, np.int32), 0)):
        masks = LateMasks(grammars, StepPlan(1, (), (), (), masked=(0,)), [], before)
        masks._new_ids = lambda: iter(())  # type: ignore[method-assign]
        masks(np.zeros((1, 4), np.int32), np.full(1, MASK_PENDING, np.int32), ids)
        assert len(calls) == num_before
        masks.begin()
        masks.begin()
        assert len(calls) == 1
        calls.clear()


def test_what_is_prescribed_is_told_beside_a_gpu_too(store: GrammarStore) -> None:
    grammar, params = (
        store.request(Grammar("regex", "once upon a time, ([a-z]+ ){9}")).result(60),
        SamplingParams(seed=0),
    )
    grammars = Grammars(store, is_gpu=True, tells_forced=True)
    rows = [_Row(Req(7, [1], np.empty(0, np.int32), 1, params, 9, 1), Matching(grammar, asks_forced=True), 1)]
    is_ready = np.zeros(1, np.bool_)
    plan = StepPlan(1, (), (), (ScheduledReq(0, 0, 1, 1),), 1, masked=(0,))
    grammars.compute(plan, rows, [[]], np.zeros((1, VOCAB // 32), np.int32), is_ready)
    assert is_ready.all()
    (told,), _ = grammars.admit([])
    assert isinstance(told, ForcedMsg) and told.uid == 7


def test_no_grammar_is_kept_for_a_step_that_has_masks(store: GrammarStore) -> None:
    """Else compiled grammars of requests that are gone would take up the room of others."""
    run = Run(store)
    assert not run.grammars.outputs and not run.grammars._late
