"""The planner's policy: budgets, order, sharing, retraction, fairness. Steps run on the simulated device."""

from __future__ import annotations

import gc
import time
from dataclasses import replace

import numpy as np
import pytest

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import FinishReason, ReqOutput, SamplingParams, StepPlan, StepResult
from minisgl.errors import IntegrityError
from minisgl.kvcache.pages import PageAllocator
from minisgl.scheduler.integrity import check_integrity
from minisgl.scheduler.planner import Planner
from tests.simulator import SimulatedEngine, expected_output

CONFIG = SchedulerConfig(
    max_running_requests=8,
    max_prefill_length=16,
    max_seq_len=64,
    num_pages=64,
    page_size=4,
)
ENDLESS = SamplingParams(max_tokens=40, seed=0, ignore_eos=True)


class Driver:
    """A planner and its device, step by step."""

    def __init__(self, config: SchedulerConfig = CONFIG) -> None:
        self.planner = Planner(config)
        self.engine = SimulatedEngine(config)
        self.outputs: dict[int, list[int]] = {}
        self.reasons: dict[int, FinishReason] = {}

    def take(self, outputs: list[ReqOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.req.uid, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.reasons[output.req.uid] = output.finish_reason

    def step(self) -> StepPlan | None:
        planned = self.planner.plan()
        if planned is None:
            return None
        self.take(self.planner.retire(self.engine.submit(planned.plan).result()))
        check_integrity(self.planner)
        return planned.plan

    def plan(self) -> StepPlan:
        planned = self.planner.plan()
        assert planned is not None
        return planned.plan

    def finish(self, limit: int = 2_000) -> None:
        for _ in range(limit):
            if self.planner.is_idle:
                return
            self.step()
        raise AssertionError("requests never finish")


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + i) % 50 for i in range(length)]


def test_outputs_of_one_prompt_are_requests_that_share_its_ids_while_they_wait() -> None:
    driver, ids = Driver(), prompt(20)
    driver.planner.add(5, ids, replace(ENDLESS, max_tokens=6, seed=2**63 - 1), count=3)
    refused = driver.planner.add(6, prompt(4), ENDLESS, count=3)
    assert [output.req.uid for output in refused] == [6, 7], "only what is in use"
    (aborted,) = driver.planner.abort(6)
    assert aborted.req.tokens is ids and aborted.req.params.seed == 0
    driver.planner.abort(8)
    driver.finish()
    assert driver.outputs[5] == driver.outputs[7] == expected_output(ids, 26, ()) and ids == prompt(20)


def test_a_long_prompt_is_read_in_chunks_while_running_requests_keep_their_token_a_step() -> None:
    driver = Driver()
    driver.planner.add(0, prompt(3), ENDLESS)
    driver.step()
    driver.planner.add(1, prompt(40, start=7), ENDLESS)
    for expected in (15, 15, 10):
        plan = driver.step()
        assert plan is not None
        assert [req.num_new for req in plan.reqs] == [1, expected]
    assert len(driver.outputs[0]) == 4
    assert len(driver.outputs[1]) == 1


def test_a_step_never_exceeds_the_budget() -> None:
    driver = Driver()
    for uid in range(8):
        driver.planner.add(uid, prompt(11, start=uid), ENDLESS)
    driver.finish()
    assert driver.engine.max_step_tokens == 16


def test_a_prefix_is_shared_within_the_step_that_computes_it() -> None:
    driver = Driver()
    for uid in range(2):
        driver.planner.add(uid, prompt(10), ENDLESS)
    plan = driver.step()
    assert plan is not None
    assert [(req.start, req.num_new) for req in plan.reqs] == [(0, 10), (8, 2)]


def test_a_prompt_that_is_cached_entirely_still_computes_its_last_token() -> None:
    driver = Driver()
    driver.planner.add(0, prompt(8), SamplingParams(max_tokens=9, seed=0, ignore_eos=True))
    driver.finish()
    driver.planner.add(1, prompt(8), SamplingParams(max_tokens=1, seed=0))
    plan = driver.plan()
    assert [(req.start, req.num_new) for req in plan.reqs] == [(4, 4)]


def test_cached_tokens_are_counted_at_first_admission_and_in_whole_pages() -> None:
    driver = Driver()
    driver.planner.add(0, prompt(10), SamplingParams(max_tokens=1, seed=0))
    driver.finish()
    driver.planner.add(1, [*prompt(10), 1, 2, 3], SamplingParams(max_tokens=1, seed=0))
    plan = driver.plan()
    (output,) = driver.planner.retire(driver.engine.submit(plan).result())
    assert output.req.num_cached == 8


def test_output_tokens_are_found_in_the_cache_by_the_next_turn_of_a_conversation() -> None:
    driver = Driver()
    driver.planner.add(0, prompt(6), SamplingParams(max_tokens=7, seed=0, ignore_eos=True))
    driver.finish()
    driver.planner.add(1, [*prompt(6), *driver.outputs[0], 9], SamplingParams(max_tokens=1, seed=0))
    plan = driver.plan()
    assert plan.reqs[0].start == 12


def test_naive_cache_reuses_nothing() -> None:
    driver = Driver(replace(CONFIG, cache_type="naive"))
    for uid in range(2):
        driver.planner.add(uid, prompt(10), SamplingParams(max_tokens=1, seed=0))
        plan = driver.step()
        assert plan is not None
        assert plan.reqs[0].start == 0


def test_when_pages_run_out_the_youngest_request_is_retracted_and_every_output_is_still_exact() -> None:
    config = replace(CONFIG, num_pages=16, max_running_requests=6)
    driver = Driver(config)
    order: list[int] = []
    for uid in range(6):
        driver.planner.add(uid, prompt(4, start=uid), SamplingParams(max_tokens=56, seed=0, ignore_eos=True))
    while not driver.planner.is_idle:
        before = set(driver.reasons)
        driver.step()
        order += [uid for uid in driver.reasons if uid not in before]
    assert order[0] == 0, "the oldest request is the first to finish"
    for uid in range(6):
        assert driver.outputs[uid] == expected_output(prompt(4, start=uid), 60, ())
        assert driver.reasons[uid] is FinishReason.LENGTH


def test_large_limits_do_not_reserve_pages() -> None:
    config = replace(CONFIG, num_pages=160, page_size=4, max_seq_len=640, max_prefill_length=64)
    driver = Driver(config)
    for uid in range(6):
        driver.planner.add(uid, prompt(4, start=uid), SamplingParams(max_tokens=600, seed=0))
    driver.step()
    assert len(driver.planner.running) == 6


def test_eos_ends_a_request_unless_it_is_ignored() -> None:
    eos = tuple(expected_output(prompt(5), 12, ())[3:4])
    driver = Driver(replace(CONFIG, eos_token_ids=eos))
    driver.planner.add(0, prompt(5), SamplingParams(max_tokens=7, seed=0))
    driver.planner.add(1, prompt(5), SamplingParams(max_tokens=7, seed=0, ignore_eos=True))
    driver.finish()
    assert driver.outputs[0] == expected_output(prompt(5), 12, eos)
    assert driver.reasons[0] is FinishReason.STOP
    assert driver.outputs[1] == expected_output(prompt(5), 12, ())
    assert driver.reasons[1] is FinishReason.LENGTH


def test_output_ends_where_the_context_does() -> None:
    driver = Driver()
    driver.planner.add(0, prompt(60), SamplingParams(max_tokens=40, seed=0, ignore_eos=True))
    driver.finish()
    assert len(driver.outputs[0]) == 4
    assert driver.reasons[0] is FinishReason.LENGTH


@pytest.mark.parametrize("length", [0, 64, 100])
def test_a_prompt_that_cannot_run_gets_an_error_at_once(length: int) -> None:
    driver = Driver()
    driver.take(driver.planner.add(0, prompt(length), ENDLESS))
    assert driver.reasons[0] is FinishReason.ERROR
    assert driver.planner.is_idle


def test_no_step_is_planned_past_the_last_token() -> None:
    driver = Driver()
    driver.planner.add(0, prompt(4), SamplingParams(max_tokens=2, seed=0))
    first, second = driver.planner.plan(), driver.planner.plan()
    assert first is not None
    assert second is not None
    assert driver.planner.plan() is None


def test_a_request_aborted_in_flight_gives_its_pages_back_only_when_the_step_has_run() -> None:
    driver = Driver(replace(CONFIG, cache_type="naive"))
    driver.planner.add(0, prompt(8), ENDLESS)
    plan = driver.plan()
    driver.take(driver.planner.abort(0))
    assert driver.reasons[0] is FinishReason.ABORT
    assert driver.planner.pages.num_free == CONFIG.num_pages - 2
    assert driver.planner.retire(driver.engine.submit(plan).result()) == []
    assert driver.planner.pages.num_free == CONFIG.num_pages
    assert driver.planner.abort(0) == []


def test_lpm_prefers_the_longest_cached_prefix_but_takes_the_oldest_in_turn() -> None:
    config = replace(CONFIG, schedule_policy="lpm", max_running_requests=1)
    driver = Driver(config)
    short = SamplingParams(max_tokens=1, seed=0)
    driver.planner.add(0, prompt(12), short)
    driver.finish()
    driver.planner.add(1, prompt(12, start=30), short)  # matches nothing, and is the oldest
    order: list[int] = []
    for uid in range(2, 20):
        driver.planner.add(uid, prompt(12), short)
    while not driver.planner.is_idle:
        before = set(driver.reasons)
        driver.step()
        order += [uid for uid in driver.reasons if uid not in before]
    assert order[0] == 2
    assert order.index(1) < 8, "a request that matches nothing does not wait for ever"


def test_priority_takes_the_lowest_number_and_of_equal_ones_the_oldest() -> None:
    driver = Driver(replace(CONFIG, schedule_policy="priority", max_running_requests=1))
    priorities = [0, 5, -1, 5, 0, -7]
    for uid, priority in enumerate(priorities):
        driver.planner.add(uid, prompt(6, start=uid), SamplingParams(max_tokens=2, seed=0, priority=priority))
    driver.finish()
    assert list(driver.reasons) == [5, 2, 0, 4, 1, 3]


def test_a_retracted_request_comes_first_among_its_equals() -> None:
    """However many others wait, with whatever priority; all outputs are exact."""
    config = replace(CONFIG, schedule_policy="priority", num_pages=16)
    driver = Driver(config)
    for uid in range(6):
        params = replace(ENDLESS, priority=uid % 2)
        driver.planner.add(uid, prompt(12, start=3 * uid), params)
    driver.finish()
    for uid in range(6):
        assert driver.outputs[uid] == expected_output(prompt(12, start=3 * uid), 52, ())


def test_stop_token_ids_end_a_request_after_min_tokens() -> None:
    driver, full = Driver(), expected_output(prompt(6), 46, ())
    for uid, (least, include) in enumerate([(0, False), (full.index(full[9]) + 1, True)]):
        params = replace(ENDLESS, stop_token_ids=(full[9],), min_tokens=least, include_stop_str_in_output=include)
        driver.planner.add(uid, prompt(6), params)
    driver.finish()
    first = full.index(full[9])
    assert driver.outputs[0] == full[: first + 1]
    assert len(driver.outputs[1]) > first + 1  # an engine would not even have sampled it


def test_a_failed_step_ends_running_requests_and_nothing_it_computed_is_reused() -> None:
    driver = Driver()
    driver.planner.add(0, prompt(12), ENDLESS)
    plan = driver.plan()
    driver.planner.add(1, prompt(12), SamplingParams(max_tokens=2, seed=0, ignore_eos=True))
    driver.take(driver.planner.fail(plan.step_id, "the device failed"))
    assert driver.reasons == {0: FinishReason.ERROR}
    second = driver.plan()
    assert second.reqs[0].start == 0
    driver.take(driver.planner.retire(driver.engine.submit(second).result()))
    driver.finish()
    assert driver.reasons[1] is FinishReason.LENGTH


def test_output_that_is_not_finite_ends_only_its_own_request() -> None:
    driver = Driver()
    for uid in range(2):
        driver.planner.add(uid, prompt(6, start=20 * uid), SamplingParams(max_tokens=3, seed=0, ignore_eos=True))
    plan = driver.plan()
    driver.engine.poison = [plan.reqs[0].row]
    driver.take(driver.planner.retire(driver.engine.submit(plan).result()))
    driver.engine.poison = []
    driver.finish()
    assert driver.reasons == {0: FinishReason.ERROR, 1: FinishReason.LENGTH}


def test_an_integrity_check_notices_a_lost_page_and_a_shared_one() -> None:
    lost = Driver()
    lost.planner.pages.allocator.allocate(1)
    with pytest.raises(AssertionError, match="1 pages are lost"):
        check_integrity(lost.planner)
    shared = Driver()
    shared.planner.add(0, prompt(6), ENDLESS)
    plan = shared.plan()
    (page, *_) = plan.page_updates[0].pages
    shared.planner.pages.allocator.free([page])  # not by its owner
    with pytest.raises(AssertionError, match=f"page {page} belongs to"):
        check_integrity(shared.planner)


@pytest.mark.parametrize("wrong", [[3], [5, 6, 5], [64], [-1]])
def test_a_page_that_is_freed_twice_is_noticed_at_once(wrong: list[int]) -> None:
    allocator = PageAllocator(64)
    pages = allocator.allocate(10)
    assert pages == list(range(10))
    allocator.free([3])
    with pytest.raises(IntegrityError, match=f"page {wrong[-1]} is freed twice, or there is none"):
        allocator.free(wrong)


def test_no_page_is_handed_out_twice() -> None:
    allocator = PageAllocator(8)
    allocator.allocate(2)
    allocator.free_list.append(1)
    with pytest.raises(IntegrityError, match="page 1 is handed out twice"):
        allocator.allocate(1)
    with pytest.raises(IntegrityError, match="9 pages wanted, 6 free"):
        allocator.allocate(9)


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_long_prompts_that_wait_cost_the_running_requests_nothing(policy: str) -> None:
    config = SchedulerConfig(32, 8192, 131072, 10_000, 16, schedule_policy=policy)
    planner = Planner(config)
    planner.add(0, prompt(100), ENDLESS)
    for uid in range(1, 130):
        planner.add(uid, prompt(100_000, start=uid), ENDLESS)
    seconds, ids = list[float](), prompt(100_000)
    gc.disable()  # a collection walks over all that other tests have left
    try:
        for _ in range(35):
            begin = time.thread_time()
            planned = planner.plan()
            seconds.append(time.thread_time() - begin)
            assert planned is not None
            planner.retire(StepResult(planned.plan.step_id, [(1,)] * len(planned.sampling)))
        begin = time.thread_time()
        for _ in range(5):
            np.array(ids, np.int32)
        one = (time.thread_time() - begin) / 5
    finally:
        gc.enable()
    assert len(planner.running) < 5
    assert len(planner.waiting) > 120
    assert sorted(seconds)[-5] < one, "a prompt that waits was converted, and lpm looks at 128"


def test_a_prompt_that_is_computed_again_does_not_hold_on_to_its_cached_copy() -> None:
    driver = Driver(replace(CONFIG, num_pages=24))  # 96 tokens: fewer than two copies of the prompt
    driver.planner.add(0, prompt(56), replace(ENDLESS, max_tokens=2))
    driver.finish()
    driver.planner.add(1, prompt(56), replace(ENDLESS, max_tokens=2, prompt_logprobs=0))
    driver.finish()
    assert len(driver.outputs[1]) == 2


def test_prompts_whose_log_probabilities_are_told_take_more_of_a_step() -> None:
    """Beside others, and one after the other: each of their tokens costs a product with the whole vocabulary."""
    driver = Driver(replace(CONFIG, max_prefill_length=48))
    driver.planner.add(0, prompt(3), ENDLESS)
    driver.step()
    for uid in (1, 2):
        driver.planner.add(uid, prompt(8, start=7 * uid), replace(ENDLESS, prompt_logprobs=0))
    shares = [[req.num_new for req in plan.reqs] for plan in (driver.step() for _ in range(4)) if plan is not None]
    assert shares == [[1, 5], [1, 3, 2], [1, 1, 5], [1, 1, 1]], shares


SPAN = 200  # tokens, whose attention takes one token as long as all else
LONG = SchedulerConfig(
    max_running_requests=40, max_prefill_length=64, max_seq_len=1000, num_pages=1000, page_size=4, attention_tokens=SPAN
)


def taken(plan: StepPlan) -> float:
    """What a step's prompts take, in tokens without a context; each of its outputs counts as one."""
    return sum(req.num_new * (1 + (req.num_new > 1) * req.start / SPAN) for req in plan.reqs)


@pytest.mark.parametrize("counts", [True, False])
def test_requests_with_long_cached_contexts_are_fewer_in_a_step(counts: bool) -> None:
    driver = Driver(LONG if counts else replace(LONG, attention_tokens=CONFIG.attention_tokens))
    shared = prompt(800)
    driver.planner.add(0, shared, replace(ENDLESS, max_tokens=1))
    driver.finish()
    driver.planner.add(1, [7], replace(ENDLESS, max_tokens=100))
    driver.step()
    for uid in range(2, 32):
        driver.planner.add(uid, [*shared, *prompt(8, start=uid)], replace(ENDLESS, max_tokens=1))
    plans = [plan for plan in (driver.step() for _ in range(80)) if plan is not None]
    assert all(plan.num_decode for plan in plans), "the stream has its token in each step"
    assert sum(req.num_new for plan in plans for req in plan.reqs if req.start >= 800) == 30 * 8
    assert driver.reasons.keys() == {*range(32)} - {1}
    most = max(map(taken, plans))
    assert most <= 64 + 1 + 800 / SPAN if counts else most > 4 * 64


@pytest.mark.parametrize("begin", ["a prompt", "half of it cached"])
def test_chunks_at_the_end_of_a_long_prompt_take_no_more_of_a_step_than_the_first(begin: str) -> None:
    driver = Driver(LONG)
    driver.planner.add(1, [7], replace(ENDLESS, max_tokens=200))
    driver.step()
    if begin != "a prompt":
        driver.planner.add(2, prompt(480), replace(ENDLESS, max_tokens=1))
        while 2 not in driver.reasons:
            driver.step()
    driver.planner.add(3, prompt(960), replace(ENDLESS, max_tokens=1))
    plans = list[StepPlan]()
    while 3 not in driver.reasons:
        plan = driver.step()
        assert plan is not None
        plans.append(plan)
    shares = [req for plan in plans for req in plan.reqs if req.row != 0 and req.num_new > 1]
    assert max(map(taken, plans)) <= 64
    assert min(share.num_new for share in shares[:-1]) >= 64 // (1 + 960 / SPAN) - 3, "no smaller than they need be"
    assert driver.outputs[3] == expected_output(prompt(960), 961, ())


def test_a_context_that_no_budget_holds_is_computed_all_the_same() -> None:
    driver = Driver(replace(LONG, max_prefill_length=4, attention_tokens=1))
    driver.planner.add(0, prompt(50), ENDLESS)
    driver.finish()
    assert driver.outputs[0] == expected_output(prompt(50), 90, ())


def test_a_prompt_that_takes_a_step_leaves_a_token_to_each_that_began_after_it() -> None:
    """Where a chunk ends at a snapshot of a state, others begin behind it: they have their token in each step."""
    states = {"has_states": True, "num_snapshots": 8, "snapshot_tokens": 4, "num_pages": 64, "max_seq_len": 256}
    driver = Driver(replace(CONFIG, max_prefill_length=12, **states))
    driver.planner.add(0, prompt(148), replace(ENDLESS, max_tokens=1))
    driver.planner.add(1, prompt(3, start=7), ENDLESS)
    while 0 not in driver.reasons:
        before = len(driver.outputs.get(1, ()))
        driver.step()
        assert not before or len(driver.outputs[1]) == before + 1
    assert len(driver.outputs[1]) > 1
