"""Snapshots of recurrent states in the prefix cache: where they are taken, who goes on from them, and who does not.

The simulated device compares each row's state with the tokens before those that it computes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import FinishReason, Grammar, SamplingParams, StateCopy, StepPlan
from minisgl.errors import IntegrityError
from minisgl.scheduler.integrity import check_integrity
from tests.simulator import expected_output
from tests.unit.test_planner import Driver, prompt

EVERY, PAGE, ROWS = 16, 4, 4
FIRST = ROWS + 1  # the first slot of a snapshot
CONFIG = SchedulerConfig(
    max_running_requests=ROWS,
    max_prefill_length=64,
    max_seq_len=1200,
    num_pages=700,
    page_size=PAGE,
    has_states=True,
    num_snapshots=12,
    snapshot_tokens=EVERY,
)
ONE = SamplingParams(max_tokens=1, seed=0)


def run(driver: Driver, uid: int, tokens: list[int], params: SamplingParams = ONE) -> list[StepPlan]:
    """A request by itself, from beginning to end."""
    driver.planner.add(uid, tokens, params)
    plans = []
    while not driver.planner.is_idle:
        plan = driver.step()
        assert plan is not None
        plans.append(plan)
    assert driver.reasons[uid] in (FinishReason.STOP, FinishReason.LENGTH)
    return plans


def first_computed(plans: list[StepPlan]) -> int:
    return plans[0].reqs[0].start


def test_a_prompt_is_read_up_to_a_border_near_its_end_where_the_next_step_takes_a_snapshot() -> None:
    driver = Driver(CONFIG)
    plans = run(driver, 0, prompt(45))
    assert [(plan.reqs[0].start, plan.reqs[0].num_new) for plan in plans] == [(0, 36), (36, 9)]
    (row,) = {plan.reqs[0].row for plan in plans}
    ((zeros,), (taken,)) = (plan.states for plan in plans)
    assert zeros == StateCopy(-1, row) and taken.source == row and taken.target >= FIRST
    again = run(driver, 1, prompt(45))
    assert again[0].states == (StateCopy(taken.target, again[0].reqs[0].row),)
    assert [(plan.reqs[0].start, plan.reqs[0].num_new) for plan in again] == [(36, 9)]


def test_short_prompts_are_read_at_once() -> None:
    driver = Driver(CONFIG)
    for uid in range(3):
        (plan,) = run(driver, uid, prompt(EVERY + 7, start=uid))
        assert plan.reqs[0].num_new == EVERY + 7


def test_each_turn_of_a_conversation_reads_what_is_new_and_little_more() -> None:
    driver, history, slots = Driver(CONFIG), prompt(70), CONFIG.num_snapshots
    for uid in range(10):
        answer = SamplingParams(max_tokens=21 + uid, seed=0, ignore_eos=True)
        plans = run(driver, uid, history, answer)
        known = len(history) - 5 - (20 + uid) if uid else 0  # the turn before, and its answer
        start = first_computed(plans)
        assert uid == 0 or start >= len(history) - 5 - (EVERY + PAGE), (uid, start, known)
        history = [*history, *driver.outputs[uid], *prompt(5, start=uid)]
        assert len(driver.planner.pages.snapshots) <= min(slots, 2 * uid + 3), "outputs leave one each"
    assert len(history) > 350


def test_of_an_output_the_last_snapshot_stays() -> None:
    driver = Driver(CONFIG)
    run(driver, 0, prompt(50), SamplingParams(max_tokens=12 * EVERY + 6, seed=0, ignore_eos=True))
    assert len(driver.planner.pages.snapshots) == 2
    assert first_computed(run(driver, 1, [*prompt(50), *driver.outputs[0], 1])) >= 50 + 11 * EVERY - PAGE


def test_templates_that_end_a_prompt_in_another_way_than_the_next_turn_has_it() -> None:
    """As those do that begin to reason, or say that there is nothing to reason about."""
    driver = Driver(CONFIG)
    run(driver, 0, [*prompt(97), 41, 42, 43], SamplingParams(max_tokens=30, seed=0, ignore_eos=True))
    assert first_computed(run(driver, 1, [*prompt(97), 44, *prompt(30, start=5)])) == 92


def test_where_others_went_on_in_another_way_the_next_one_leaves_a_snapshot() -> None:
    driver, common = Driver(CONFIG), prompt(50)
    run(driver, 0, [*common, *prompt(100, start=3)])
    plans = run(driver, 1, [*common, *prompt(30, start=5)])
    assert [plan.reqs[0].start for plan in plans] == [0, 48, 72]
    assert first_computed(run(driver, 2, [*common, *prompt(30, start=7)])) == 48


def test_long_prompts_have_snapshots_now_and_then() -> None:
    driver, far = Driver(CONFIG), 32 * EVERY
    run(driver, 0, prompt(2 * far + 40))
    other = [*prompt(far + 30), *prompt(200, start=9)]
    assert first_computed(run(driver, 1, other)) == far


def test_outputs_of_one_prompt_wait_for_its_snapshot_and_go_on_from_there() -> None:
    driver = Driver(CONFIG)
    driver.planner.add(0, prompt(50), replace(ONE, max_tokens=5), count=4)
    first, second = driver.step(), driver.step()
    assert first is not None and second is not None
    assert [(req.start, req.num_new) for req in first.reqs] == [(0, 40)]
    assert [(req.start, req.num_new) for req in second.reqs] == [(40, 10)] * 4
    taken, *restored = second.states
    assert taken.source == first.reqs[0].row and {copy.source for copy in restored} == {taken.target}
    driver.finish()
    assert all(driver.outputs[uid] == expected_output(prompt(50), 55, ()) for uid in range(4))


def test_who_waits_for_a_snapshot_gets_it_when_its_request_is_aborted() -> None:
    driver = Driver(CONFIG)
    driver.planner.add(0, prompt(50), ONE)
    driver.planner.add(1, prompt(50), ONE)
    plan = driver.plan()
    assert len(plan.reqs) == 1
    driver.take(driver.planner.abort(0))
    driver.take(driver.planner.retire(driver.engine.submit(plan).result()))
    plan = driver.plan()
    assert (plan.reqs[0].start, len(plan.states)) == (40, 2)
    driver.take(driver.planner.retire(driver.engine.submit(plan).result()))
    assert driver.outputs[1] == expected_output(prompt(50), 51, ())


def test_a_state_that_has_gone_on_from_unknown_tokens_is_not_kept() -> None:
    driver = Driver(CONFIG)
    driver.planner.add(0, prompt(59), replace(ONE, max_tokens=9))
    for _ in range(2):
        driver.step()
    plans = [driver.plan(), driver.plan()]  # of 60 known tokens, and of one more
    driver.take(driver.planner.abort(0))
    for plan in plans:
        driver.take(driver.planner.retire(driver.engine.submit(plan).result()))
    assert first_computed(run(driver, 1, [*prompt(59), *driver.outputs[0], 1, 2])) == 48


def test_the_snapshot_that_was_used_least_recently_makes_room() -> None:
    driver = Driver(replace(CONFIG, num_snapshots=2))
    run(driver, 0, prompt(42))
    run(driver, 1, prompt(42, start=1))
    run(driver, 2, prompt(42))  # used again
    run(driver, 3, prompt(42, start=2))
    starts = [first_computed(run(driver, 4 + start, prompt(42, start=start))) for start in (0, 1)]
    assert starts == [32, 0]


def test_pages_that_are_evicted_take_their_snapshots_with_them() -> None:
    driver = Driver(replace(CONFIG, num_pages=24, max_seq_len=90))
    for uid in range(12):
        run(driver, uid, prompt(61, start=uid))
        assert len(driver.planner.pages.snapshots) <= 2
    driver.planner.pages.flush_unused()
    check_integrity(driver.planner)
    assert not driver.planner.pages.snapshots and len(driver.planner.pages.free_slots) == 12


def test_snapshots_of_one_salt_are_not_found_with_another() -> None:
    driver = Driver(CONFIG)
    for uid, (salt, expected) in enumerate([("a", 0), ("b", 0), ("", 0), ("a", 52)]):
        assert first_computed(run(driver, uid, prompt(61), replace(ONE, cache_salt=salt))) == expected


def test_after_a_failed_step_no_snapshot_is_used() -> None:
    """Those that a request holds on to which was not in the step neither: they may have been copied in it."""
    driver = Driver(CONFIG)
    run(driver, 0, prompt(61))
    driver.planner.add(4, prompt(50, start=20), replace(ONE, max_tokens=9, ignore_eos=True))
    driver.planner.resume(4, paced=True)
    for _ in range(2):
        driver.step()
    driver.planner.add(1, prompt(70, start=9), ONE)
    plan = driver.plan()
    assert len(plan.reqs) == 1 and driver.planner.pages.snapshots
    driver.take(driver.planner.fail(plan.step_id, "the device failed"))
    assert not driver.planner.pages.snapshots and driver.reasons.keys() == {0, 1}
    check_integrity(driver.planner)
    driver.planner.resume(4, paced=False)
    driver.finish()
    assert driver.outputs[4] == expected_output(prompt(50, start=20), 59, ())
    assert first_computed(run(driver, 2, prompt(70, start=9))) == 0
    assert first_computed(run(driver, 3, prompt(61))) == 0


def test_what_led_to_no_number_is_not_gone_on_from() -> None:
    """Those of its prompt neither: a state that is not finite would fail all who begin with it."""
    driver = Driver(CONFIG)
    run(driver, 0, [*prompt(42), *prompt(20, start=30)])
    driver.planner.add(1, prompt(61), ONE)
    while not driver.planner.is_idle:
        driver.engine.poison = list(range(ROWS))
        driver.step()
    driver.engine.poison = []
    assert driver.reasons[1] is FinishReason.ERROR
    assert first_computed(run(driver, 2, prompt(61))) == 0


def test_an_interrupted_prefill_goes_on_from_a_snapshot() -> None:
    """Clients take turns; what a long prompt has behind it is not read again but for a chunk."""
    driver, far = Driver(CONFIG), 32 * EVERY
    driver.planner.add(0, prompt(2 * far + 40), replace(ONE, client="long"))
    computed, uid = 0, 0
    while 0 not in driver.reasons:
        uid += 1
        driver.planner.add(uid, prompt(61, start=uid), replace(ONE, client="short"))
        plan = driver.step()
        assert plan is not None
        computed += sum(req.num_new for req in plan.reqs)
    assert driver.planner.num_retracted > 0
    assert computed < 2 * far + 40 + 61 * uid + 64 * driver.planner.num_retracted


def test_without_snapshots_each_request_begins_anew() -> None:
    driver = Driver(replace(CONFIG, num_snapshots=0, cache_type="naive"))
    for uid in range(2):
        (plan,) = run(driver, uid, prompt(61))
        assert plan.states == (StateCopy(-1, plan.reqs[0].row),) and plan.reqs[0].num_new == 61


def test_models_without_states_have_none_in_their_plans() -> None:
    driver = Driver(replace(CONFIG, has_states=False, num_snapshots=0))
    plans = [plan for uid in range(3) for plan in run(driver, uid, [*prompt(42), *prompt(20, start=uid)])]
    assert not any(plan.states for plan in plans)
    assert [plan.reqs[0].start for plan in plans] == [0, 40, 40]


def test_a_request_that_sat_out_and_makes_way_is_resumed_while_a_step_still_touches_it() -> None:
    driver, params = Driver(CONFIG), replace(ONE, max_tokens=20, ignore_eos=True, grammar=Grammar("regex", ".*"))
    for uid in range(ROWS):
        driver.planner.add(uid, prompt(20, start=7 * uid), replace(params, client="many"))
    driver.step()
    first, second = driver.plan(), driver.plan()
    driver.engine.unready = [first.reqs[-1].row]
    handles = [driver.engine.submit(plan) for plan in (first, second)]
    driver.engine.unready = []
    driver.take(driver.planner.retire(handles[0].result()))
    (late,) = (req for req in driver.planner.running if req.held)
    driver.planner.add(9, prompt(20), ONE)
    third = driver.plan()
    assert late.retracted and late.num_inflight
    driver.planner.resume(late.uid, paced=False)
    for handle in (handles[1], driver.engine.submit(third)):
        driver.take(driver.planner.retire(handle.result()))
    driver.finish()
    for uid in range(ROWS):
        assert driver.outputs[uid] == expected_output(prompt(20, start=7 * uid), 40, ())


def test_who_runs_alone_and_needs_more_pages_than_there_are_begins_anew_and_ends() -> None:
    """With its own copy of a prefix whose snapshot is gone, and the cache's, which it holds; no step in flight."""
    driver = Driver(replace(CONFIG, num_pages=64, page_size=16, max_seq_len=1024, num_snapshots=1))
    shared = prompt(420)
    run(driver, 1, shared)
    run(driver, 2, prompt(200, start=7))
    run(driver, 3, [*shared[:400], *prompt(100, start=9)], SamplingParams(max_tokens=400, seed=0, ignore_eos=True))
    assert len(driver.outputs[3]) == 400


@pytest.mark.parametrize("what", ["lost", "shared", "of no page"])
def test_an_integrity_check_notices_wrong_slots(what: str) -> None:
    driver = Driver(CONFIG)
    run(driver, 0, prompt(61))
    pages = driver.planner.pages
    ((page, slot),) = pages.snapshots.items()
    if what == "lost":
        pages.free_slots.pop()
    elif what == "shared":
        pages.free_slots.append(slot)
    else:
        pages.snapshots = {pages.allocator.free_list[0]: slot}
    with pytest.raises(IntegrityError, match="snapshots"):
        check_integrity(driver.planner)
    assert page in pages.cache.check([])
