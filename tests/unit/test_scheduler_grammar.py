"""Requests with a grammar in the scheduler's loop: when they are let in, what their matchers see, how they end."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import MASK_NOT_READY, MASK_READY, FinishReason, Grammar, Masks, Req, SamplingParams, StepPlan
from minisgl.errors import RequestError
from minisgl.grammar.store import CompiledGrammar
from minisgl.message.messages import AbortMsg, ErrorReply, UserMsg, pack_ids, unpack_ids
from minisgl.scheduler.drafters import Drafter
from minisgl.scheduler.grammar import Grammars
from minisgl.scheduler.scheduler import Scheduler
from minisgl.scheduler.speculation import Speculation
from minisgl.scheduler.transport import LocalTransport
from tests.simulator import SimulatedEngine, SimulatedHandle, expected_output

VOCAB, POISON, REFUSED = 64, 62, 63  # the simulated engine makes none above 49
CONFIG = SchedulerConfig(
    max_running_requests=4,
    max_prefill_length=16,
    max_seq_len=64,
    num_pages=64,
    page_size=4,
    check_integrity=1,
    integrity_fatal=True,
)


class FakeMatcher:
    """Remembers what it is told. It breaks after `limit` tokens, and after one that is poison; one it does not take. A
    mask takes so many seconds of a core. script: the output; of each three tokens of it two are prescribed."""

    def __init__(self, limit: int, seconds: float = 0.0, script: Sequence[int] = ()) -> None:
        self.limit, self.seconds, self.seen, self.script = limit, seconds, list[int](), list(script)
        self.at_work, self.is_new = 0, True

    def deep_copy(self) -> FakeMatcher:
        """This one is the first request's."""
        self.is_new, is_new = False, self.is_new
        return self if is_new else FakeMatcher(self.limit, self.seconds, self.script)

    def is_stopped(self) -> bool:
        return False

    def is_error(self) -> bool:
        return len(self.seen) >= self.limit or POISON in self.seen

    def get_error(self) -> str:
        return "too complex\nand more"

    def consume_tokens(self, ids: list[int]) -> bool:
        self.seen += ids
        return True

    def compute_ff_tokens(self) -> list[int]:
        begin = len(self.seen)
        return self.script[begin : begin + 2 - begin % 3]

    def try_consume_tokens(self, ids: list[int]) -> int:
        if ids == [REFUSED]:
            return 0
        self.seen += ids
        return len(ids)

    def rollback(self, num_tokens: int) -> bool:
        del self.seen[-num_tokens:]
        return True

    def unsafe_compute_mask_ptr(self, pointer: int, size: int) -> None:
        assert size == VOCAB // 8
        self.at_work += 1
        assert self.at_work == 1, "two threads have one matcher"
        start = time.thread_time()
        while time.thread_time() - start < self.seconds:
            time.sleep(0)
        self.at_work -= 1
        ctypes.memset(pointer, len(self.seen) % 256, size)


class FakeStore:
    vocab_size = VOCAB

    def __init__(self) -> None:
        self.future: Future[CompiledGrammar] = Future()
        self.clients: list[str] = []

    def request(self, grammar: Grammar, client: str) -> Future[CompiledGrammar]:
        self.clients.append(client)
        return self.future

    def close(self) -> None: ...


class MaskedEngine(SimulatedEngine):
    """Asks for words as engines do, and remembers their first, where they are ready."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.words: list[int] = []

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> SimulatedHandle:
        if plan.masked:
            assert masks is not None
            words, states = np.zeros(masks.shape, np.int32), np.zeros(len(plan.masked), np.int32)
            masks(words, states, None)
            told = [*zip(plan.masked, words[:, 0].tolist(), states.tolist(), strict=True)]
            self.missing = [sample for sample, _, state in told if state == MASK_NOT_READY]
            self.words += [word & 255 for _, word, state in told if state == MASK_READY]
        return super().submit(plan, masks)


class Loop:
    def __init__(
        self,
        limit: int = 1000,
        overlap: bool = True,
        seconds: float = 0.0,
        cost: float = 0.0,
        script: Sequence[int] = (),
        drafter: Drafter | None = None,
    ) -> None:
        self.store, self.matcher, self.cost = FakeStore(), FakeMatcher(limit, seconds, script), cost
        grammars = Grammars(self.store, tells_forced=bool(script))  # type: ignore[arg-type]
        self.grammars = grammars
        self.transport = LocalTransport(grammars=grammars)
        config = SchedulerConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__slots__} | {"overlap": overlap})
        self.engine = MaskedEngine(config)
        self.scheduler = Scheduler(config, self.engine, self.transport)
        if drafter is not None:
            self.scheduler.planner.speculation = Speculation(config, drafter)
        self.outputs: dict[int, list[Any]] = {}

    def compiled(self) -> None:
        self.store.future.set_result(CompiledGrammar(self.matcher, 1, self.cost))  # type: ignore[arg-type]

    def put(self, uid: int, prompt: list[int], grammar: bool = True, max_tokens: int = 6, count: int = 1) -> None:
        params = SamplingParams(
            max_tokens=max_tokens, seed=0, client="somebody", grammar=Grammar("regex", "x") if grammar else None
        )
        self.transport.put([UserMsg(uid, pack_ids(prompt), params, count)])

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.scheduler.turn()
            for message in self.transport.take_outputs():
                self.outputs.setdefault(message.uid, []).append(message)

    def turn_until_idle(self) -> int:
        """How many turns that takes."""
        for count in range(100_000):
            if count and self.scheduler.planner.is_idle and not self.grammars.is_holding:
                return count
            self.turn()
        raise AssertionError("it never ends")

    def ids(self, uid: int) -> list[int]:
        return [token for message in self.outputs[uid] for token in unpack_ids(message.token_ids)]


@pytest.fixture(autouse=True)
def time_for_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, cheap masks are computed within their steps."""
    monkeypatch.setattr("minisgl.scheduler.grammar.CPU_SHARES", (1e6, 0.4))


@pytest.mark.parametrize("overlap", [True, False])
def test_a_matcher_has_seen_all_tokens_before_each_mask(overlap: bool) -> None:
    loop = Loop(overlap=overlap)
    loop.compiled()
    loop.put(1, [1, 2, 3])
    loop.put(2, [4, 5], grammar=False)
    loop.turn(20)
    assert loop.ids(1) == expected_output([1, 2, 3], 9, ())
    assert loop.engine.words == [0, 1, 2, 3, 4, 5]
    assert loop.matcher.seen == loop.ids(1)[:5]
    assert loop.engine.num_steps == 6, "the two requests shared every step"


def test_cheap_masks_wait_for_one_of_their_grammar_that_a_thread_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would all sit out, be computed by that thread too, and make the next ones sit out."""
    monkeypatch.setattr("minisgl.scheduler.grammar.CHEAP_SECONDS", 60.0)  # however busy the machine is
    loop = Loop()
    loop.compiled()
    for uid in range(3):
        loop.put(uid, [uid, 1, 2])
    loop.turn(3)
    lock = loop.store.future.result().lock
    lock.acquire()
    threading.Timer(0.05, lock.release).start()
    loop.turn_until_idle()
    assert loop.engine.num_steps == 6, "somebody sat out"
    assert [loop.ids(uid) for uid in range(3)] == [expected_output([uid, 1, 2], 9, ()) for uid in range(3)]


def test_a_request_waits_for_its_grammar_and_others_do_not() -> None:
    loop = Loop()
    loop.put(1, [1, 2, 3])
    loop.put(2, [4, 5], grammar=False)
    loop.turn(20)
    assert list(loop.outputs) == [2] and loop.outputs[2][-1].finish_reason is FinishReason.LENGTH
    assert loop.store.clients == ["somebody"], "who takes turns with others"
    loop.compiled()
    loop.turn(20)
    assert loop.ids(1) == expected_output([1, 2, 3], 9, ())


def test_a_refused_grammar_never_reaches_the_planner() -> None:
    loop = Loop()
    loop.put(1, [1, 2, 3])
    loop.turn()
    loop.store.future.set_exception(RequestError("guided_regex: no", param="guided_regex"))
    loop.turn()
    assert loop.outputs[1] == [ErrorReply(1, "guided_regex: no", status=400, param="guided_regex")]
    assert loop.scheduler.planner.is_idle and loop.engine.num_steps == 0


def test_a_server_without_grammars_refuses_them() -> None:
    grammars = Grammars(None)
    params = SamplingParams(max_tokens=3, seed=0, grammar=Grammar("regex", "x", param="regex"))
    admitted, (reply,) = grammars.admit([UserMsg(1, pack_ids([1]), params)])
    assert admitted == []
    assert isinstance(reply, ErrorReply) and (reply.status, reply.param) == (400, "regex")


def test_an_abort_while_it_waits_is_the_end() -> None:
    loop = Loop()
    loop.put(1, [1, 2, 3])
    loop.turn()
    loop.transport.put([AbortMsg(1)])
    loop.turn()
    assert [message.finish_reason for message in loop.outputs[1]] == [FinishReason.ABORT]
    loop.compiled()
    loop.turn(5)
    assert len(loop.outputs[1]) == 1 and loop.engine.num_steps == 0


def test_outputs_that_wait_together_end_apart() -> None:
    loop = Loop()
    params = SamplingParams(seed=5, grammar=Grammar("regex", "x"))
    message = UserMsg(1, pack_ids([1]), params, count=5)
    assert loop.grammars.admit([message]) == ([], [])
    admitted, replies = loop.grammars.admit([AbortMsg(1), AbortMsg(9), AbortMsg(3)])
    assert admitted == [AbortMsg(9)]
    ended = [(reply.uid, reply.finish_reason) for reply in replies]  # type: ignore[union-attr]
    assert ended == [(1, FinishReason.ABORT), (3, FinishReason.ABORT)]
    loop.compiled()
    left, _ = loop.grammars.admit([])
    assert left == [
        UserMsg(2, message.prompt, replace(params, seed=6)),
        UserMsg(4, message.prompt, replace(params, seed=8), 2),
    ]


def test_all_outputs_hear_that_their_grammar_is_refused() -> None:
    loop = Loop()
    loop.put(1, [1, 2, 3], count=2)
    loop.store.future.set_exception(RequestError("no", param="regex"))
    loop.turn()
    assert loop.outputs == {uid: [ErrorReply(uid, "no", status=400, param="regex")] for uid in (1, 2)}


@pytest.mark.parametrize("after", range(8))
def test_an_abort_at_any_turn_leaves_nothing_behind(after: int) -> None:
    loop = Loop()
    loop.compiled()
    loop.put(1, [1, 2, 3])
    loop.turn(after)
    loop.transport.put([AbortMsg(1)])
    loop.turn(12)
    assert sum(message.finish_reason is not None for message in loop.outputs[1]) == 1
    assert not loop.grammars.outputs and loop.scheduler.planner.is_idle


def test_a_grammar_that_grows_too_complex_is_an_error_of_its_own() -> None:
    loop = Loop(limit=3)
    loop.compiled()
    loop.put(1, [1, 2, 3], max_tokens=30)
    loop.put(2, [4, 5], grammar=False)
    loop.turn(40)
    last = loop.outputs[1][-1]
    assert last.finish_reason is FinishReason.ERROR and "too complex" in last.error and "and more" not in last.error
    assert last.error_status == 400
    assert loop.ids(2) == expected_output([4, 5], 8, ())
    assert not loop.grammars.outputs


def test_a_failed_step_ends_its_requests_and_the_next_one_works() -> None:
    loop = Loop()
    loop.compiled()
    loop.put(1, [1, 2, 3])
    loop.turn(2)
    loop.engine.fail_next = True
    loop.turn(3)
    loop.engine.broken = False
    loop.turn(3)
    assert loop.outputs[1][-1].finish_reason is FinishReason.ERROR
    loop.matcher.seen, loop.matcher.is_new = [], True
    loop.put(3, [9, 8])
    loop.turn(20)
    assert loop.ids(3) == expected_output([9, 8], 8, ())
    assert loop.matcher.seen == loop.ids(3)[:5]
    assert np.array(loop.engine.words[-6:]).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("cost", [0.0, 1.0])
def test_a_slow_row_sits_out_and_gets_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, overlap: bool, cost: float
) -> None:
    """Slow from the start, or found to be when others have spent the time that there is for masks."""
    monkeypatch.setattr("minisgl.scheduler.grammar.CPU_SHARES", (0.0, 0.4))
    loop = Loop(overlap=overlap, seconds=0.02, cost=cost)
    loop.compiled()
    loop.put(1, [1, 2, 3], max_tokens=4)
    loop.put(2, [4, 5], grammar=False, max_tokens=30)
    while 2 not in loop.outputs or loop.outputs[2][-1].finish_reason is None:
        loop.turn()
    assert 1 not in loop.outputs or loop.outputs[1][-1].finish_reason is None, "the plain one waited for it"
    loop.turn_until_idle()
    assert loop.ids(1) == expected_output([1, 2, 3], 7, ())
    assert loop.ids(2) == expected_output([4, 5], 32, ())
    assert loop.engine.words == [0, 1, 2, 3] and loop.matcher.seen == loop.ids(1)[:3]


def test_rows_that_wait_do_not_keep_the_loop_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.scheduler.grammar.CPU_SHARES", (0.0, 0.4))
    loop = Loop(seconds=0.1, cost=1.0)
    loop.compiled()
    for uid in (1, 2):
        loop.put(uid, [uid, 2, 3], max_tokens=3)
    start = time.monotonic(), time.thread_time()
    loop.turn_until_idle()
    assert time.thread_time() - start[1] < 0.4 * (time.monotonic() - start[0]), "it asks again and again"
    assert loop.ids(1) == expected_output([1, 2, 3], 6, ())


@pytest.mark.parametrize("after", range(0, 40, 3))
def test_an_abort_of_a_row_that_waits_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    monkeypatch.setattr("minisgl.scheduler.grammar.CPU_SHARES", (0.0, 0.4))
    loop = Loop(seconds=0.001, cost=1.0)
    loop.compiled()
    loop.put(1, [1, 2, 3], max_tokens=30)
    loop.put(2, [4, 5], grammar=False, max_tokens=50)
    loop.turn(after)
    loop.transport.put([AbortMsg(1)])
    loop.turn_until_idle()
    assert sum(message.finish_reason is not None for message in loop.outputs[1]) == 1
    assert not loop.grammars.outputs and not loop.grammars.is_holding


def test_a_grammar_that_is_slow_again_and_again_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.scheduler.grammar.MOST_SECONDS", 0.02)
    loop = Loop(seconds=0.006)
    loop.compiled()
    loop.put(1, [1, 2, 3], max_tokens=30)
    loop.put(2, [4, 5], grammar=False)
    loop.turn_until_idle()
    last = loop.outputs[1][-1]
    assert last.finish_reason is FinishReason.ERROR and last.error_status == 400 and "too slow" in last.error
    assert 3 <= len(loop.ids(1)) < 10
    assert loop.ids(2) == expected_output([4, 5], 8, ())


@pytest.mark.parametrize("overlap", [True, False])
def test_prescribed_tokens_are_drafted(overlap: bool) -> None:
    """They come several in a step, which changes nothing of what is said; masks are those of their positions."""
    truth = expected_output([1, 2, 3], 24, ())
    loop = Loop(overlap=overlap, script=truth)
    loop.compiled()
    loop.put(1, [1, 2, 3], max_tokens=21)
    loop.turn_until_idle()
    assert loop.ids(1) == truth and loop.matcher.seen == truth[: len(loop.matcher.seen)]
    assert loop.engine.num_steps < 18
    assert sorted({*loop.engine.words}) == [*range(21)], "a token was sampled with another one's mask"


@pytest.mark.parametrize("wrong", [REFUSED, POISON, 50])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_draft_that_does_not_match_changes_nothing(wrong: int, overlap: bool) -> None:
    """The grammar refuses a token of it, breaks by it, or takes what is not sampled."""
    truth = expected_output([1, 2, 3], 24, ())

    class Wrong:
        def propose(self, req: Req, num_pending: int, most: int) -> list[int]:
            begin = len(req.tokens) - req.prompt_len + num_pending
            return [*truth[begin : begin + begin % 3], wrong, wrong][:most]

        def forget(self, uid: int) -> None: ...

    loop = Loop(overlap=overlap, drafter=Wrong())
    loop.compiled()
    loop.put(1, [1, 2, 3], max_tokens=21)
    loop.put(2, [4, 5], grammar=False, max_tokens=21)
    loop.turn_until_idle()
    assert loop.ids(1) == truth and loop.outputs[1][-1].finish_reason is FinishReason.LENGTH
    assert loop.ids(2) == expected_output([4, 5], 23, ())
    assert loop.engine.num_steps < 40 and not loop.grammars.outputs


@pytest.mark.parametrize("after", range(0, 12, 2))
def test_an_abort_between_drafts_leaves_nothing_behind(after: int) -> None:
    loop = Loop(script=expected_output([1, 2, 3], 33, ()))
    loop.compiled()
    loop.put(1, [1, 2, 3], max_tokens=30)
    loop.turn(after)
    loop.transport.put([AbortMsg(1)])
    loop.turn_until_idle()
    assert sum(message.finish_reason is not None for message in loop.outputs[1]) == 1
    assert not loop.grammars.outputs and not loop.scheduler.planner.speculation.is_on
