"""When a head is asked for drafts: what requests learn from those before them, and what steps without drafts cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import pytest

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import Req, SamplingParams, ScheduledReq
from minisgl.scheduler.planner import Planner
from minisgl.scheduler.speculation import Speculation
from tests.simulator import SimulatedEngine, SimulatedHandle, expected_output

CONFIG = SchedulerConfig(64, 512, 400, 4096, 4, draft_len=8, speculate="mtp", step_costs=(0.3, 0.6))
PARAMS = SamplingParams(max_tokens=60, seed=0, ignore_eos=True)


class HeadEngine(SimulatedEngine):
    """Tells what is right, or what is wrong, behind the tokens of requests that ask."""

    is_right, num_asked = False, 0

    def run(self, planner: Planner) -> None:
        """One step."""
        planned = planner.plan()
        assert planned is not None
        result, told = self.submit(planned.plan).result(), dict[int, list[int]]()
        for index, (req, share) in enumerate(zip(planned.reqs, planned.plan.reqs, strict=True)):
            if share.next_draft_len:
                known = len(req.tokens) - req.prompt_len + len(result.token_ids[index])  # if all of its draft was right
                output = expected_output([req.uid, 1, 2], req.max_len + share.next_draft_len, ())
                told[index] = [id if self.is_right else 60 for id in output[known : known + share.next_draft_len]]
                self.num_asked += 1
        planner.retire(result._replace(drafts=told))


def asked_of_head(planner: Planner, engine: HeadEngine, uids: range, params: SamplingParams) -> list[int]:
    """Serve requests one after the other: in how many steps of each the head was asked."""
    asked = list[int]()
    for uid in uids:
        engine.num_asked = 0
        planner.add(uid, [uid, 1, 2], params)
        while not planner.is_idle:
            engine.run(planner)
        asked.append(engine.num_asked)
    return asked


def test_requests_begin_with_what_those_before_them_have_taught() -> None:
    """Of sampled ones, and of greedy ones; and in time they try again."""
    planner, engine = Planner(CONFIG), HeadEngine(CONFIG)
    sampled, greedy = replace(PARAMS, temperature=0.8), replace(PARAMS, temperature=0.0)
    first = asked_of_head(planner, engine, range(8), sampled)
    assert first[0] > 1 and not sum(first[-4:])
    assert asked_of_head(planner, engine, range(8, 9), greedy)[0] > 1
    assert 0 < sum(asked_of_head(planner, engine, range(10, 90), sampled)) < 32
    engine.is_right = True
    assert min(asked_of_head(planner, engine, range(100, 250), sampled)[-4:]) > 1


def test_what_a_client_predicts_says_nothing_of_the_head() -> None:
    planner, engine = Planner(CONFIG), HeadEngine(CONFIG)
    asked_of_head(planner, engine, range(8), PARAMS)
    predicted, before = tuple(expected_output([8, 1, 2], 63, ())), min(planner.speculation._first_rates.values())
    asked_of_head(planner, engine, range(8, 9), replace(PARAMS, prediction=predicted))
    assert planner.speculation.num_right["prediction"] > 30
    assert min(planner.speculation._first_rates.values()) < before + 0.01


def test_steps_are_not_looked_at_while_nobody_wants_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    wanted = Speculation._wanted

    def counted(self: Speculation, shares: Sequence[tuple[Req, ScheduledReq]], num_samples: int) -> dict[int, int]:
        nonlocal looks
        looks += 1
        return wanted(self, shares, num_samples)

    monkeypatch.setattr(Speculation, "_wanted", counted)
    planner, engine = Planner(CONFIG), HeadEngine(CONFIG)
    asked_of_head(planner, engine, range(8), PARAMS)
    looks = 0
    planner.add(8, [8, 1, 2], replace(PARAMS, max_tokens=200))
    for _ in range(100):
        engine.run(planner)
    assert 4 < looks < 12
    looks, engine.is_right = 0, True
    planner.add(9, [9, 1, 2], replace(PARAMS, temperature=0.0))  # of which nothing is known
    engine.run(planner)
    assert looks == 1
    while not planner.is_idle:
        engine.run(planner)


def test_who_takes_the_place_of_one_that_has_ended_is_looked_at() -> None:
    """Though as many run as before, and its prompt is one token, which is no prefill."""
    planner, engine = Planner(CONFIG), HeadEngine(CONFIG)
    asked_of_head(planner, engine, range(8), replace(PARAMS, temperature=0.8))
    for uid in range(20, 26):
        asked_of_head(planner, engine, range(uid, uid + 1), replace(PARAMS, temperature=0.8, max_tokens=uid))
        planner.add(uid + 100, [uid], replace(PARAMS, temperature=0.0, max_tokens=4))
        engine.num_asked = 0
        engine.run(planner)
        assert engine.num_asked == 1
        while not planner.is_idle:
            engine.run(planner)


@pytest.mark.parametrize(("num", "least"), [(4, 10), (40, 100)])
def test_steps_follow_those_whose_end_is_not_known(num: int, least: int) -> None:
    """Also while requests wait for rows, of which none is free."""
    config = replace(CONFIG, max_running_requests=4, cuda_graph_max_bs=64, step_costs=(0.01, 0.6))
    planner, engine, inflight = Planner(config), SimulatedEngine(config), deque[SimulatedHandle]()
    engine.told = lambda tokens: hash(tokens) % 4
    outputs: dict[int, list[int]] = {uid: [] for uid in range(num)}
    for uid in outputs:
        planner.add(uid, [uid, 1, 2], PARAMS)
    while not planner.is_idle:
        if (planned := planner.plan()) is not None:
            inflight.append(engine.submit(planned.plan))
        if len(inflight) > (planned is not None):
            for output in planner.retire(inflight.popleft().result()):
                outputs[output.req.uid] += output.token_ids
    assert outputs == {uid: expected_output([uid, 1, 2], 63, ()) for uid in outputs}
    assert engine.num_following > least
