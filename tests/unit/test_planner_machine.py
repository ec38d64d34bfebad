"""A state machine drives the planner through everything that can happen to requests, in any order, with steps in
flight, and checks after each action that no page is lost or shared and that every request gets its exact output."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import FinishReason, Grammar, ReqOutput, SamplingParams, StepPlan
from minisgl.errors import EngineError
from minisgl.scheduler.drafters import Drafter
from minisgl.scheduler.integrity import check_integrity
from minisgl.scheduler.plan import Planned
from minisgl.scheduler.planner import Planner
from tests.simulator import GuessingDrafter, SimulatedEngine, SimulatedHandle, expected_output

GRAMMAR = Grammar("regex", ".*")
DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "right": lambda: GuessingDrafter(lambda uid, position: 64),
    "noise": lambda: GuessingDrafter(lambda uid, position: 0),
    "some": lambda: GuessingDrafter(lambda uid, position: hash((uid, position)) % 5),
    "failing": lambda: GuessingDrafter(lambda uid, position: 2 if position % 5 else -1),
}
HEADS: dict[str, Callable[[tuple[int, ...]], int]] = {  # of what they tell, so many tokens are right
    "right head": lambda tokens: 64,
    "head of noise": lambda tokens: 0,
    "some head": lambda tokens: hash(tokens) % 7,
    "head of few words": lambda tokens: hash(tokens) % 4 - 2,
}


class PlannerMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 2, 4, 16]),
        num_tokens=st.integers(48, 160),
        rows=st.integers(1, 6),
        budget=st.sampled_from([1, 3, 7, 64]),
        attention=st.sampled_from([1 << 40, 1 << 40, 1, 7, 50]),
        cache=st.sampled_from(["radix", "radix", "naive"]),
        policy=st.sampled_from(["fcfs", "lpm", "priority"]),
        depth=st.integers(0, 2),
        snapshots=st.sampled_from([None, None, 0, 1, 2, 5, 30]),
        snapshot_tokens=st.sampled_from([1, 4, 10]),
        drafter=st.sampled_from([None, *DRAFTERS, "ngram", "ngram", *HEADS, *HEADS]),
        draft_len=st.sampled_from([1, 3, 8]),
        window=st.sampled_from([None, None, 1, 3, 7, 20]),
        spare=st.sampled_from([0, 1, 5, 100]),
        alike=st.booleans(),
        graphs=st.sampled_from([0, 8, 512]),
    )
    def start(
        self,
        page_size: int,
        num_tokens: int,
        rows: int,
        budget: int,
        attention: int,
        cache: str,
        policy: str,
        depth: int,
        snapshots: int | None,
        snapshot_tokens: int,
        drafter: str | None,
        draft_len: int,
        window: int | None,
        spare: int,
        alike: bool = False,
        graphs: int = 0,
    ) -> None:
        """alike: no request has a grammar or a prediction, without which captured steps follow those that verify
        drafts; graphs: tokens of the largest captured step."""
        self.alike = alike
        num_pages = -(-num_tokens // page_size)
        # As few as one request needs alone, or some more.
        num_window_pages = min(num_pages, -(-((window or 0) + min(budget, 40)) // page_size) + 2 + spare)
        self.config = SchedulerConfig(
            max_running_requests=rows,
            max_prefill_length=budget,
            attention_tokens=attention,
            max_seq_len=40,
            num_pages=num_pages,
            page_size=page_size,
            cache_type="naive" if snapshots == 0 else cache,
            has_states=snapshots is not None,
            num_snapshots=(snapshots or 0) if cache == "radix" else 0,
            snapshot_tokens=snapshot_tokens,
            schedule_policy=policy,
            eos_token_ids=(3,),
            draft_len=draft_len,
            cuda_graph_max_bs=graphs,
            speculate="ngram" if drafter == "ngram" else "mtp" if drafter in HEADS else "off",
            window=window or 0,
            num_window_pages=num_window_pages if window else 0,
        )
        self.planner = Planner(self.config, DRAFTERS[drafter]() if drafter in DRAFTERS else None)
        self.engine = SimulatedEngine(self.config)
        self.engine.told = HEADS.get(drafter or "", self.engine.told)
        self.depth = depth  # steps that may be in flight when the next one is planned
        self.inflight: deque[tuple[StepPlan, SimulatedHandle]] = deque()
        self.touched: dict[int, dict[int, str]] = {}
        self.prompts: dict[int, tuple[list[int], int, bool]] = {}
        self.outputs: dict[int, list[int]] = {}
        self.kinds: dict[int, str] = {}  # of requests for vectors
        self.vectors: dict[int, bytes] = {}
        self.finished: dict[int, FinishReason] = {}
        self.allowed: dict[int, FinishReason] = {}  # reasons other than stop and length that were provoked
        self.history: list[list[int]] = []
        self.turns: list[list[int]] = []  # prompts with the outputs that they got
        self.held: dict[int, None] = {}  # requests that sit out

    def take(self, outputs: list[ReqOutput]) -> None:
        for output in outputs:
            uid = output.req.uid
            assert uid not in self.finished, "a request got something after its terminal reply"
            self.outputs[uid] += output.token_ids
            self.vectors[uid] = output.pooled
            if output.req.held:
                self.held[uid] = None
            if output.finish_reason is not None:
                self.finished[uid] = output.finish_reason
                self.turns.append(self.prompts[uid][0] + self.outputs[uid])
                self.check_output(uid)

    def check_output(self, uid: int) -> None:
        prompt, max_len, ignore_eos = self.prompts[uid]
        if uid in self.kinds:
            vector = bytes(prompt) if self.kinds[uid] == "mean" else bytes(expected_output(prompt, len(prompt) + 1, ()))
            assert self.vectors.get(uid) == (vector if self.finished[uid] is FinishReason.STOP else b"")
            assert self.finished[uid] in (FinishReason.STOP, self.allowed.get(uid)) and not self.outputs[uid]
            return
        expected = expected_output(prompt, max_len, () if ignore_eos else (3,))
        got, reason = self.outputs[uid], self.finished[uid]
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert got == expected
            assert (reason is FinishReason.STOP) == (got[-1] == 3 and not ignore_eos)
        else:
            assert self.allowed.get(uid) is reason
            assert got == expected[: len(got)]

    @rule(
        shared=st.integers(0, 1_000),
        keep=st.integers(0, 40),
        fresh=st.lists(st.integers(0, 4), max_size=20),
        max_tokens=st.integers(1, 30),
        ignore_eos=st.booleans(),
        grammar=st.booleans(),
        pooling=st.sampled_from(["", "", "", "last", "mean"]),
        salt=st.sampled_from(["", "", "a", "b"]),
        client=st.sampled_from(["flood", "flood", "small", "other"]),
        predicted=st.sampled_from([0, 0, 100, 5, 2, 1]),
    )
    def add(
        self,
        shared: int,
        keep: int,
        fresh: list[int],
        max_tokens: int,
        ignore_eos: bool,
        grammar: bool,
        pooling: str,
        salt: str,
        client: str,
        predicted: int,
    ) -> None:
        known = [*self.history, *self.turns, *self.turns]
        base = known[shared % len(known)] if known else []
        prompt = (base[:keep] + fresh)[: 40 if pooling else 39] or [1]
        uid, predicted = len(self.prompts), 0 if self.alike else predicted
        grammar = grammar and not pooling and not self.alike
        self.kinds |= {uid: pooling} if pooling else {}
        self.prompts[uid] = (prompt, min(40, len(prompt) + max_tokens), ignore_eos and not grammar)
        self.outputs[uid] = []
        self.history.append(prompt)
        held_to = GRAMMAR if grammar else None
        expected = expected_output(prompt, 40, ()) if predicted else []  # of which this one in so many is wrong
        guess = [49 - token if predicted < 100 and i % predicted == 0 else token for i, token in enumerate(expected)]
        params = SamplingParams(
            max_tokens=max_tokens,
            seed=0,
            ignore_eos=ignore_eos,
            grammar=held_to,
            cache_salt=salt,
            client=client,
            priority=-(uid % 3),
            prompt_logprobs=None if uid % 4 or pooling else 0,  # computes what is cached again
            pooling=pooling,
            prediction=tuple(guess),
        )
        self.take(self.planner.add(uid, prompt, params))

    @rule(pick=st.integers(0, 1_000))
    def abort(self, pick: int) -> None:
        if self.prompts:
            uid = pick % len(self.prompts)
            if uid not in self.finished:
                self.allowed[uid] = FinishReason.ABORT
            self.take(self.planner.abort(uid))

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            planned = self.planner.plan()
            if planned is not None:
                plan = planned.plan
                self.check_masked(planned)
                self.inflight.append((plan, self.engine.submit(plan)))
                self.touched[plan.step_id] = self.engine.pages_of(plan)
            if len(self.inflight) > self.depth or (planned is None and self.inflight):
                self.retire()
            check_integrity(self.planner)

    def check_masked(self, planned: Planned) -> None:
        """Of a token that has to match a grammar, all before it are known, or sampled by the steps in flight."""
        plan, reqs = planned.plan, [req for req in planned.sampling if req.params.grammar is not None]
        rows = [req.row for req in plan.reqs for _ in range(req.num_samples)]
        assert [rows[index] for index in plan.masked] == [req.row for req in reqs]
        for req in reqs:
            unknown = req.num_tokens - 1 - len(req.tokens)
            rows = [[share.row for share in step.reqs if share.num_samples] for step, _ in self.inflight]
            assert req.params.grammar is not None
            assert unknown == sum(req.row in some for some in rows) - req.num_stale
            assert req.tokens == self.history[req.uid] + self.outputs[req.uid]

    @precondition(lambda self: self.inflight)
    @rule()
    def retire(self) -> None:
        plan, handle = self.inflight.popleft()
        del self.touched[plan.step_id]
        try:
            result = handle.result()
        except EngineError:
            for uid in self.prompts:
                self.allowed.setdefault(uid, FinishReason.ERROR)
            self.take(self.planner.fail(plan.step_id, "simulated"))
            self.engine.broken = False
        else:
            for uid in self.prompts:
                if any(-1 in ids for ids in result.token_ids) or b"" in result.pooled.values():
                    self.allowed.setdefault(uid, FinishReason.ERROR)
            self.take(self.planner.retire(result))

    @rule()
    def failing_step(self) -> None:
        self.engine.fail_next = True
        self.step(1)
        self.engine.fail_next = False

    @rule()
    def failing_head(self) -> None:
        told, self.engine.told = self.engine.told, None
        self.step(1)
        self.engine.told = told

    @rule(row=st.integers(0, 5))
    def not_finite(self, row: int) -> None:
        self.engine.poison = [row]
        self.step(1)
        self.engine.poison = []

    @rule(rows=st.lists(st.integers(0, 5)), count=st.integers(1, 3))
    def not_ready(self, rows: list[int], count: int) -> None:
        self.engine.unready = rows
        self.step(count)
        self.engine.unready = []

    @rule(pick=st.integers(0, 1_000), paced=st.booleans())
    def resume(self, pick: int, paced: bool) -> None:
        """One that is held, or any other: a message may be late."""
        if self.held and pick % 4:
            uid = list(self.held)[pick % len(self.held)]
            self.held.pop(uid)
            self.planner.resume(uid, paced)
        else:
            self.planner.resume(pick, paced)

    @invariant()
    def conserved(self) -> None:
        if hasattr(self, "planner"):
            check_integrity(self.planner)
            free = set(self.planner.pages.allocator.check())
            salts: dict[int, str] = {}
            for step_id, pages in self.touched.items():
                assert not pages.keys() & free, f"step {step_id} is in flight and its pages are free"
                for page, salt in pages.items():
                    assert salts.setdefault(page, salt) == salt, "steps in flight have a page in two namespaces"

    def teardown(self) -> None:
        if not hasattr(self, "planner"):
            return
        for _ in range(10_000):
            if self.planner.is_idle and not self.inflight:
                break
            while self.held:
                self.planner.resume(self.held.popitem()[0], paced=len(self.held) % 2 == 0)
            self.step(1)
        assert self.finished.keys() == self.prompts.keys(), "a request never got its terminal reply"
        assert self.planner.pages.num_free == self.config.num_pages
        assert self.planner.pages.windows.num_free == self.config.num_window_pages


class FollowingMachine(PlannerMachine):
    """Steps are planned behind those that verify drafts, as often as that can be."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4, 16]),
        num_tokens=st.integers(80, 300),
        rows=st.integers(1, 6),
        budget=st.sampled_from([7, 64]),
        cache=st.sampled_from(["radix", "radix", "naive"]),
        depth=st.integers(1, 2),
        snapshots=st.sampled_from([None, None, 2, 30]),
        snapshot_tokens=st.sampled_from([1, 4, 10]),
        drafter=st.sampled_from([*HEADS]),
        draft_len=st.sampled_from([1, 3, 8]),
        window=st.sampled_from([None, None, 1, 7, 20]),
        spare=st.sampled_from([5, 100]),
    )
    def start(self, **chosen: Any) -> None:
        super().start(attention=1 << 40, policy="fcfs", alike=True, graphs=512, **chosen)


for machine in (PlannerMachine, FollowingMachine):
    machine.TestCase.settings = settings(
        max_examples=150, stateful_step_count=120, deadline=None, report_multiple_bugs=False
    )
TestPlannerMachine, TestFollowingMachine = PlannerMachine.TestCase, FollowingMachine.TestCase


# What a `PlannerMachine` was told, a word each. a: a request (shared, keep, fresh, max_tokens, pooling, salt, client);
# s: steps; f: a step that fails; n: one whose row is not finite; r: steps whose rows are not ready; x: an abort.
_TWICE = """
a,907,0,440112211220231,1,last,a,other a,233,38,214242,1,mean,,flood a,617,0,,1,mean,,flood a,647,0,,8,,,small r,1,
a,424,8,042341342032103,1,,,flood a,354,0,,1,,,small s,6 f a,569,0,,1,last,a,other a,245,9,43431,1,mean,,flood x,84
s,4 a,263,24,,30,,,other s,3 a,216,0,1441202301401240,1,,,flood s,1 a,508,0,,1,,a,flood s,5 a,683,0,,1,,,flood
a,707,0,,1,,,flood a,746,0,,1,,,flood a,813,0,,1,,,flood s,2 a,815,0,,1,,,flood a,383,24,1012,1,,,flood
a,166,25,,1,,,flood a,47,36,33303,10,,a,other s,4 n,0 a,963,15,0133333142344,1,,b,flood f s,6 a,325,6,,16,,a,flood
a,188,0,,1,,,flood f a,36,0,,1,,,flood a,254,17,,1,last,a,small r,3,31 s,6 a,607,0,,1,,,flood a,453,0,,1,,,flood
a,396,34,,1,mean,a,flood a,181,0,,1,,,flood a,330,22,0343341203021,1,last,,flood s,7
a,272,25,3103244224222341,1,,,small s,8 s,8
"""


def test_who_has_its_own_prefix_twice_ends_all_the_same() -> None:
    """A request that runs alone could not use its cached prefix, whose window is gone, and computed it again; without
    room for both it began anew for ever."""
    machine = PlannerMachine()
    machine.start(
        attention=1, page_size=2, num_tokens=50, rows=2, budget=1, cache="radix", policy="lpm", depth=1, snapshots=2,
        snapshot_tokens=1, drafter=None, draft_len=3, window=20, spare=0,
    )  # fmt: skip
    for what, *given in (word.split(",") for word in _TWICE.split()):
        match what:
            case "a":
                shared, keep, fresh, max_tokens, pooling, salt, client = given
                lengths = {"shared": int(shared), "keep": int(keep), "max_tokens": int(max_tokens), "predicted": 0}
                names = {"pooling": pooling, "salt": salt, "client": client}
                machine.add(fresh=[*map(int, fresh)], ignore_eos=True, grammar=False, **lengths, **names)
            case "s":
                machine.step(int(given[0]))
            case "f":
                machine.failing_step()
            case "n":
                machine.not_finite(int(given[0]))
            case "r":
                machine.not_ready([*map(int, given[1])], int(given[0]))
            case "x":
                machine.abort(int(given[0]))
    machine.teardown()
