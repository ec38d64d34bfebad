"""Masks beside a GPU: a thread without Python's lock computes them when the device has written the tokens before."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from llguidance import LLMatcher, LLParserLimits

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
from minisgl.errors import ConfigError
from minisgl.grammar import source
from minisgl.grammar.source import VocabularyConfig, load_vocabulary, to_llguidance
from minisgl.grammar.store import GrammarStore
from minisgl.kernel.masks import MaskRow, MaskWorker, NativeMatcher, Words
from minisgl.message.messages import DetokenizeMsg, ForcedMsg, UserMsg, pack_ids, unpack_ids
from minisgl.scheduler.grammar import Grammars
from minisgl.scheduler.late import LateMasks, Row, beside
from minisgl.scheduler.matching import Matching
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


def open_store(is_native: bool) -> Iterator[GrammarStore]:
    store = GrammarStore(VocabularyConfig(str(MODEL), VOCAB, (EOS,)), is_native)
    yield store
    store.close()


@pytest.fixture(scope="module")
def store() -> Iterator[GrammarStore]:
    yield from open_store(is_native=True)


@pytest.fixture(scope="module")
def plain_store() -> Iterator[GrammarStore]:
    """Without matchers for a thread of their own."""
    yield from open_store(is_native=False)


class Handle:
    """As a GPU's: it waits for each mask, samples, and writes the token."""

    def __init__(self, engine: Engine, plan: StepPlan, masks: Masks | None) -> None:
        self._engine, self._plan, self._lock = engine, plan, threading.Lock()
        self._words = np.zeros((0, 0) if masks is None else masks.shape, np.int32)
        self._states = np.full(len(self._words), MASK_PENDING, np.int32)
        self._written = np.full(len(self._words), ID_PENDING, np.int32)
        engine.memory.append(self._written)  # which is there as long as the engine
        if masks is not None:
            masks(self._words, self._states, self._written)
        self._ids: list[tuple[int, ...]] | None = None

    def wait(self, timeout: float | None = None) -> bool:
        with self._lock:  # the next step's masks ask for its tokens, too
            if self._ids is None:
                wait_for(self._states)
                self._ids = self._engine.sample(self._plan, self._words, (self._states == MASK_READY).tolist())
                self._written[:] = [self._ids[sample][0] for sample in self._plan.masked]
        return True

    def result(self) -> StepResult:
        self.wait()
        assert self._ids is not None
        return StepResult(self._plan.step_id, self._ids)


def wait_for(states: Words) -> None:
    deadline = time.monotonic() + 60
    while (states == MASK_PENDING).any():
        assert time.monotonic() < deadline
        time.sleep(1e-4)


class Engine:
    """Draws tokens that the masks allow, and remembers these by row and position. refused: a row that says otherwise
    once it is at this position."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], npt.NDArray[np.int32]] = {}
        self.refused: tuple[int, int] | None = None
        self.num_missed = 0
        self.memory: list[Words] = []
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
            # All are let in at once: a request's row follows from its number. What their masks cost is known.
            future.result(60).mean = 1e-6
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

    def matcher(self, uid: int) -> source.Matcher:
        wanted = self.wanted[uid]
        assert wanted is not None
        return self.futures[GRAMMARS.index(wanted)].result().matcher.deep_copy()


def mask_of(matcher: source.Matcher) -> npt.NDArray[np.int32]:
    words = np.empty(VOCAB // 32, np.int32)
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    return words


def take(matcher: source.Matcher, token: int) -> bool:
    if isinstance(matcher, NativeMatcher):
        return matcher.take([token], matcher.num_tokens + 1)
    return matcher.consume_tokens([token])


@pytest.fixture(autouse=True)
def time_for_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, all masks are cheap."""
    monkeypatch.setattr("minisgl.scheduler.matching.CHEAP_SECONDS", 60.0)
    monkeypatch.setattr("minisgl.scheduler.grammar.CHEAP_SECONDS", 60.0)
    monkeypatch.setattr("minisgl.scheduler.late.CHEAP_SECONDS", 60.0)
    monkeypatch.setattr("minisgl.scheduler.grammar._GPU_SHARES", (1e6, 1e6))
    monkeypatch.setattr("minisgl.scheduler.late.FREE_SECONDS", 60.0)
    monkeypatch.setattr("minisgl.scheduler.late._SHARE", 1e6)


@pytest.mark.parametrize("overlap", [True, False])
def test_each_mask_is_the_matchers_after_all_tokens_before_it(
    store: GrammarStore, plain_store: GrammarStore, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that Python's llguidance computes, which takes them in another way."""
    numbers, submit = list[int](), MaskWorker.submit

    def watched(worker: MaskWorker, rows: npt.NDArray[np.int64] | None, *room: Any) -> None:
        numbers.append(numbers[-1] if rows is None else len(rows))  # None: those of the job before
        submit(worker, rows, *room)

    monkeypatch.setattr(MaskWorker, "submit", watched)
    run = Run(store, overlap)
    assert NUM_TOKENS <= len(numbers) <= NUM_TOKENS + 2 and set(numbers) == {NUM_REQUESTS - 2}
    for given in (run, Run(plain_store, overlap)):
        assert given.engine.num_missed == 0
        for uid in range(NUM_REQUESTS - 2):
            wanted = given.wanted[uid]
            assert wanted is not None
            matcher = plain_store.request(wanted).result(60).matcher.deep_copy()
            assert len(given.ids[uid]) == NUM_TOKENS and given.ends[uid].finish_reason is FinishReason.LENGTH
            for position, token in enumerate(given.ids[uid], 3):
                assert (given.engine.seen[given.rows[uid], position] == mask_of(matcher)).all(), (uid, position)
                assert take(matcher, token)


def test_what_a_grammar_refuses_ends_its_own_request_only(store: GrammarStore) -> None:
    run = Run(store, refused=(Run(store).rows[4], 3 + 12))
    assert [uid for uid, end in run.ends.items() if end.finish_reason is FinishReason.ERROR] == [4]
    assert "cannot be followed any further" in (run.ends[4].error or "")
    assert all(len(ids) == NUM_TOKENS for uid, ids in run.ids.items() if uid != 4)


@pytest.mark.parametrize("grammar", [*GRAMMARS, Grammar("regex", r"once upon \w+ \d{3}"), Grammar("json", "{}")])
def test_a_native_matcher_does_as_pythons(store: GrammarStore, plain_store: GrammarStore, grammar: Grammar) -> None:
    """Of what it breaks by, too."""
    random = np.random.default_rng(0)
    ours, theirs = (one.request(grammar).result(60).matcher.deep_copy() for one in (store, plain_store))
    assert isinstance(ours, NativeMatcher) and isinstance(theirs, LLMatcher)
    for _ in range(40):
        words = mask_of(ours)
        assert (words == mask_of(theirs)).all()
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")
        if not (token := int(random.choice(np.flatnonzero(allowed)))) or theirs.is_stopped():
            break
        copy = ours.deep_copy()
        assert take(ours, token) and take(theirs, token) and ours.num_tokens == copy.num_tokens + 1
        assert take(copy, token) and (mask_of(copy) == mask_of(ours)).all() and copy.cost > 0
    else:
        banned = int(np.flatnonzero(1 - np.unpackbits(mask_of(ours).view(np.uint8), bitorder="little"))[5])
        assert not take(ours, banned) and not take(theirs, banned)
        assert ours.is_error() and theirs.is_error() and ours.get_error() == theirs.get_error() != ""


class Room:
    """For the masks of some rows of one grammar, computed by a worker."""

    def __init__(self, store: GrammarStore, num: int) -> None:
        matcher = store.request(GRAMMARS[1]).result(60).matcher
        assert isinstance(matcher, NativeMatcher)
        self.first, self.matchers, self.worker = (
            mask_of(matcher),
            [matcher.deep_copy() for _ in range(num)],
            MaskWorker(1.0),
        )
        self.ids = np.full(num, ID_PENDING, np.int32)

    def compute(self, length: int, *known: int, late: bool = False) -> tuple[Words, Words]:
        words, states = np.zeros((len(known), VOCAB // 32), np.int32), np.zeros(len(known), np.int32)
        table = enumerate(zip(self.matchers, known, strict=True))
        refs = [late * (self.ids.ctypes.data + 4 * i) for i in range(len(known))]
        rows = [MaskRow(one.address, refs[i], length, token, i) for i, (one, token) in table]
        self.worker.submit(np.array(rows, np.int64), words, states)
        return words, states


def test_rows_that_go_on_are_those_of_the_job_before(store: GrammarStore) -> None:
    room = Room(store, 2)
    _, states = room.compute(0, -1, -1)
    wait_for(states)
    tokens = np.flatnonzero(np.unpackbits(room.first.view(np.uint8), bitorder="little"))[[0, 3]]
    words, states = np.zeros((2, VOCAB // 32), np.int32), np.zeros(2, np.int32)
    room.worker.submit(None, words, states, room.ids)
    time.sleep(0.05)
    assert (states == MASK_PENDING).all() and [one.num_tokens for one in room.matchers] == [0, 0]
    room.ids[:] = tokens
    wait_for(states)
    assert (states == MASK_READY).all() and [one.num_tokens for one in room.matchers] == [1, 1]
    for i, token in enumerate(tokens):
        other = store.request(GRAMMARS[1]).result(60).matcher.deep_copy()
        assert take(other, int(token)) and np.array_equal(words[i], mask_of(other))
    room.worker.close()


def test_a_matcher_that_breaks_harms_no_other(store: GrammarStore) -> None:
    room = Room(store, 3)
    words, states = room.compute(0, -1, -1, -1)
    wait_for(states)
    assert (states == MASK_READY).all() and (words == room.first).all()
    is_allowed = np.unpackbits(room.first.view(np.uint8), bitorder="little")
    first, banned = int(np.flatnonzero(is_allowed)[0]), int(np.flatnonzero(1 - is_allowed)[5])
    _, states = room.compute(1, first, banned, first)
    wait_for(states)
    assert states.tolist() == [MASK_READY, MASK_NOT_READY, MASK_READY]
    assert [one.num_tokens for one in room.matchers] == [1, -1, 1]
    output = Matching(store.request(GRAMMARS[1]).result(60), matcher=room.matchers[1])
    assert output.num_tokens == 0 and output.matcher is None
    room.worker.close()


def test_a_row_waits_for_its_token_and_not_for_ever(store: GrammarStore) -> None:
    """In the order of the steps. One that was not sampled has none behind it; who closes waits for nobody."""
    room = Room(store, 2)
    words, states = room.compute(1, -1, -1, late=True)
    time.sleep(0.05)
    assert (states == MASK_PENDING).all()
    token = int(np.flatnonzero(np.unpackbits(room.first.view(np.uint8), bitorder="little"))[0])
    room.ids[:] = token, NOT_READY
    wait_for(states)
    assert states.tolist() == [MASK_READY, MASK_NOT_READY] and [one.num_tokens for one in room.matchers] == [1, 0]
    take(room.matchers[1], token)
    assert (words[0] == mask_of(room.matchers[1])).all()
    room.ids[:] = ID_PENDING
    (_, states), (_, later), begin = room.compute(2, token, token, late=True), room.compute(3, 5, 5), time.monotonic()
    room.worker.close()
    assert [*states, *later] == [MASK_NOT_READY] * 4 and time.monotonic() - begin < 20


def test_what_a_worker_has_still_to_write_is_kept(store: GrammarStore) -> None:
    """Its steps' arrays may be nobody else's any more: it has their addresses, and nothing that holds them."""
    room = Room(store, 1)
    refs = [weakref.ref(array) for array in room.compute(1, -1, late=True)]
    room.compute(1, -1, late=True)
    gc.collect()
    assert all(ref() is not None for ref in refs)
    room.ids[:] = NOT_READY
    for _ in range(2):  # in the order of the steps
        wait_for(room.compute(0, -1)[1])
    gc.collect()
    assert all(ref() is None for ref in refs)
    room.worker.close()


def test_no_token_is_taken_twice(store: GrammarStore) -> None:
    """A worker may come late, when a device has given up: then a thread has been told to take the same token."""
    room = Room(store, 1)
    token = int(np.flatnonzero(np.unpackbits(room.first.view(np.uint8), bitorder="little"))[0])
    output = Matching(store.request(GRAMMARS[1]).result(60), matcher=room.matchers[0])
    wait_for(room.compute(1, token)[1])
    (words,), why = output.follow([token], 1, (), VOCAB // 32, 1.0)
    expected = room.matchers[0].deep_copy()
    assert why is None and output.num_tokens == 1 and (words == mask_of(expected)).all()
    assert output.follow([token], 3, (), VOCAB // 32, 1.0)[1] is not None  # one is missing: it begins anew
    assert output.num_tokens == 0 and output.matcher is None
    room.worker.close()


@pytest.mark.parametrize("length", [0, 2, 4, 5])
def test_what_a_worker_is_not_told_of_is_not_guessed(store: GrammarStore, length: int) -> None:
    """Tokens that nobody gives it, or too many: the row sits out, and its matcher stays where it is."""
    room = Room(store, 1)
    token = int(np.flatnonzero(np.unpackbits(room.first.view(np.uint8), bitorder="little"))[0])
    take(room.matchers[0], token)
    _, states = room.compute(length, -1)
    wait_for(states)
    assert states[0] == MASK_NOT_READY and room.matchers[0].num_tokens == 1
    room.worker.close()


def test_a_step_that_has_failed_holds_up_no_masks(store: GrammarStore) -> None:
    grammars, (words, states, ids) = Grammars(store, is_gpu=True), (np.zeros((1, 4), np.int32) for _ in range(3))
    ids[:] = ID_PENDING
    last = LateMasks(grammars, StepPlan(1, (), (), (), masked=(0,)), [], [])
    last(words, states[0], ids[0])
    LateMasks(grammars, StepPlan(2, (), (), (), masked=(0,)), [], [], last).begin()
    assert (ids == NOT_READY).all()


def test_without_a_compiler_python_computes_masks(
    store: GrammarStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ConfigError("there is none")

    monkeypatch.setattr(source, "NativeVocabulary", fail)
    vocabulary = load_vocabulary(VocabularyConfig(str(MODEL), VOCAB, (EOS,)), is_native=True)
    assert "there is none" in caplog.text
    assert isinstance(vocabulary.matcher(to_llguidance(GRAMMARS[1], vocabulary.special), "x"), LLMatcher)


def test_another_version_of_llguidance_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose defaults are not where ours are."""
    defaults = LLParserLimits(max_items_in_row=77)
    monkeypatch.setattr("llguidance.LLParserLimits", lambda: defaults)
    vocabulary = load_vocabulary(VocabularyConfig(str(MODEL), VOCAB, (EOS,)), is_native=True)
    assert vocabulary.native is None and "other functions" in caplog.text


@pytest.mark.parametrize("is_device", [True, False])
def test_a_failure_is_told_and_the_device_goes_on(
    store: GrammarStore, monkeypatch: pytest.MonkeyPatch, is_device: bool
) -> None:
    """It waits for a state: one that never comes would hold it up. The row sits out."""
    grammars, ids = Grammars(store, is_gpu=True), np.full(1, ID_PENDING, np.int32)
    words, states = np.zeros((1, VOCAB // 32), np.int32), np.zeros(1, np.int32)
    masks = LateMasks(
        grammars, StepPlan(1, (), (), (), masked=(0,)), [(row.req, row.output) for row in rows_of(store, grammars)], []
    )

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(grammars, "compute", fail)
    with nullcontext() if is_device else pytest.raises(MemoryError):
        masks(words, states, ids if is_device else None)
    assert states[0] == MASK_NOT_READY


def rows_of(store: GrammarStore, grammars: Grammars, cost: float = 1e9) -> list[Row]:
    """A request's first token, whose mask is dear."""
    grammar = replace(store.request(GRAMMARS[1]).result(60), cost=cost)
    params, grammars.outputs[7] = SamplingParams(seed=0), Matching(grammar)
    return [Row(Req(7, [1], np.empty(0, np.int32), 1, params, 9, 1), grammars.outputs[7], 1)]


def test_a_new_request_of_a_dear_grammar_is_expected_to_be_dear(store: GrammarStore) -> None:
    """It sits out: nobody waits for its first mask."""
    grammars = Grammars(store, is_gpu=True)
    rows, output = rows_of(store, grammars), grammars.outputs[7]
    words, is_ready = np.zeros((1, VOCAB // 32), np.int32), np.zeros(1, np.bool_)
    plan = StepPlan(1, (), (), (ScheduledReq(0, 0, 1, 1), ScheduledReq(1, 0, 1, 1)), 2, masked=(0,))
    grammars.compute(plan, rows, [[]], words, is_ready)
    assert not is_ready.any() and output.job is not None
    assert (output.job.result(60)[0] == mask_of(output.grammar.matcher.deep_copy())).all()


def test_what_threads_compute_no_worker_waits_for(store: GrammarStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar's matchers share a lock: where its masks are dear, none of them is computed for a device that waits."""
    monkeypatch.setattr("minisgl.scheduler.late.CHEAP_SECONDS", 0.001)
    (row,) = rows_of(store, Grammars(store, is_gpu=True), cost=0.0)
    row.output.grammar.mean = 1e-6
    assert beside(row, 0) is not None
    row.output.grammar.mean = 0.01
    assert beside(row, 0) is None
    row.output.grammar.mean = 1e-6
    assert beside(row, 0) is not None


def test_what_is_not_known_to_be_cheap_no_worker_computes(store: GrammarStore) -> None:
    """Else the masks of all requests of a new grammar might be dear at once, and a step waits for all of them. The
    first mask says nothing: it is the same for all outputs, and known."""
    (row,) = rows_of(store, grammars := Grammars(store, is_gpu=True), cost=0.0)
    row.output.grammar.mean = 0.0
    (words,) = grammars._mask(row, [])
    assert row.output.grammar.mean == 0 and beside(row, 0) is None
    token = int(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0])
    row.req.tokens.append(token)
    later = row._replace(length=row.length + 1)
    row.output.cost = row.output.grammar.cost = 0.0  # what the first one took does not count
    grammars._mask(later, [token])
    assert row.output.grammar.mean == row.output.cost > 0
    row.req.tokens.append(token)
    assert beside(row._replace(length=row.length + 2), 0) is not None


def test_a_lone_row_does_not_wait_for_a_lock_either(store: GrammarStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads may hold it for other rows of its grammar, which sit out."""
    monkeypatch.setattr("minisgl.scheduler.grammar.CHEAP_SECONDS", 0.001)
    for is_locked in (True, False):
        grammars = Grammars(store, is_gpu=True)
        (row,) = rows_of(store, grammars)
        is_ready, plan = np.zeros(1, np.bool_), StepPlan(1, (), (), (ScheduledReq(0, 0, 1, 1),), 1, masked=(0,))
        with row.output.grammar.lock if is_locked else nullcontext():
            grammars.compute(plan, [row], [[]], np.zeros((1, VOCAB // 32), np.int32), is_ready)
        assert is_ready.all() != is_locked and (row.output.job is None) != is_locked


def test_nobody_waits_for_threads_where_a_grammar_is_dear(store: GrammarStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is cheap among dear ones would wait for their lock."""
    monkeypatch.setattr("minisgl.scheduler.grammar.CHEAP_SECONDS", 0.001)
    for mean, is_inline in ((0.01, False), (0.0, False), (1e-6, True)):
        grammars = Grammars(store, is_gpu=True)
        (row,) = rows_of(store, grammars, cost=0.0)
        row.output.grammar.mean = mean
        is_ready, reqs = np.zeros(1, np.bool_), (ScheduledReq(0, 0, 1, 1), ScheduledReq(1, 0, 1, 1))
        words, plan = np.zeros((1, VOCAB // 32), np.int32), StepPlan(1, (), (), reqs, 2, masked=(0,))
        grammars.compute(plan, [row], [[]], words, is_ready)
        assert is_ready.all() == is_inline and (row.output.job is None) == is_inline


def test_a_device_is_begun_for_once_and_a_host_at_once(store: GrammarStore) -> None:
    """Where nobody but the host waits, the scheduler's thread does not compute what the engine's does."""
    grammars, calls = Grammars(store, is_gpu=True), list[int]()
    grammars.compute = lambda *_: calls.append(1)  # type: ignore[method-assign]
    before: list[Any] = [(None, SimpleNamespace(wait=lambda _: True, result=lambda: SimpleNamespace(token_ids=[])))]
    for ids, num_before in ((None, 1), (np.zeros(1, np.int32), 0)):
        masks = LateMasks(
            grammars,
            StepPlan(1, (), (), (), masked=(0,)),
            [(row.req, row.output) for row in rows_of(store, grammars)],
            before,
        )
        masks._new_ids = lambda _: iter(())  # type: ignore[method-assign, assignment]
        masks(np.zeros((1, 4), np.int32), np.zeros(1, np.int32), ids)
        assert len(calls) == num_before
        masks.begin()
        masks.begin()
        assert len(calls) == 1
        calls.clear()


def test_what_is_prescribed_is_told_beside_a_gpu_too(plain_store: GrammarStore) -> None:
    grammar, params = (
        plain_store.request(Grammar("regex", "once upon a time, ([a-z]+ ){9}")).result(60),
        SamplingParams(seed=0),
    )
    grammars = Grammars(plain_store, is_gpu=True, tells_forced=True)
    rows = [Row(Req(7, [1], np.empty(0, np.int32), 1, params, 9, 1), Matching(grammar, asks_forced=True), 1)]
    is_ready = np.zeros(1, np.bool_)
    plan = StepPlan(1, (), (), (ScheduledReq(0, 0, 1, 1),), 1, masked=(0,))
    grammars.compute(plan, rows, [[]], np.zeros((1, VOCAB // 32), np.int32), is_ready)
    assert is_ready.all()
    (told,), _ = grammars.admit([])
    assert isinstance(told, ForcedMsg) and told.uid == 7


def test_no_grammar_is_kept_for_a_step_that_has_masks(store: GrammarStore) -> None:
    """Else compiled grammars of requests that are gone would take up the room of others."""
    run = Run(store)
    assert not run.grammars.outputs and run.grammars._last is not None and not run.grammars._last._outputs
