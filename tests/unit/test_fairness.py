"""Turns of clients: by what each was charged, in order within each; and what a planner makes of it."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import SamplingParams
from minisgl.scheduler.planner import Planner
from minisgl.utils.fairness import MAX_CLIENTS, FairQueue
from tests.simulator import SimulatedEngine, SimulatedHandle

STEPS = 4  # within which a small request of another client has its first token


def take(queue: FairQueue[str], cost: int) -> str:
    key, item = next(iter(queue.turn().items()))
    client = item.rstrip("0123456789")
    queue.remove(client, key)
    queue.charge(client, cost)
    return item


def filled(*items: str) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for key, item in enumerate(items):
        queue.put(item.rstrip("0123456789"), key, item)
    return queue


def test_clients_take_turns_and_each_keeps_its_order() -> None:
    queue = filled("a1", "a2", "a3", "b1", "b2")
    assert [take(queue, 1) for _ in range(5)] == ["a1", "b1", "a2", "b2", "a3"]
    assert len(queue) == 0 and not queue


def test_turns_go_by_what_was_charged() -> None:
    queue = filled("a1", "a2", "b1", "b2", "b3", "b4")
    taken = []
    for _ in range(6):
        client = next(iter(queue.turn().values()))[0]
        taken.append(take(queue, 300 if client == "a" else 100))
    assert taken == ["a1", "b1", "b2", "b3", "a2", "b4"]


def test_nobody_saves_up_turns() -> None:
    queue = filled(*(f"a{index}" for index in range(10)))
    for _ in range(6):
        take(queue, 100)
    for key in range(5):
        queue.put("b", 100 + key, f"b{key}")
    assert [take(queue, 100) for _ in range(5)] == ["b0", "a6", "b1", "a7", "b2"]


def test_what_comes_back_is_first_of_its_client() -> None:
    queue = filled("a1", "b1")
    queue.put("a", 9, "a0", first=True)
    assert [take(queue, 1) for _ in range(3)] == ["a0", "b1", "a1"]


def test_clients_that_are_gone_are_forgotten() -> None:
    queue = filled("a1")
    for index in range(3 * MAX_CLIENTS):
        queue.charge(f"client-{index}", index)
    queue.put("b", 9, "b1")
    assert take(queue, 1) == "a1" and take(queue, 1) == "b1"


class Run:
    """A planner and its engine, with one step in flight. first: the step at whose end a request had its first token."""

    def __init__(self, **options: Any) -> None:
        sizes = {"max_running_requests": 8, "max_prefill_length": 64, "max_seq_len": 1024, "num_pages": 512}
        config = SchedulerConfig(**{**sizes, "page_size": 16, "check_integrity": True, **options})
        self.planner, self._engine = Planner(config), SimulatedEngine(config)
        self._handles: deque[SimulatedHandle] = deque()
        self.first: dict[int, int] = {}
        self.num_steps = 0

    def add(self, uid: int, client: str, prompt_len: int, max_tokens: int) -> None:
        tokens = [(uid + position * position) % 50 for position in range(prompt_len)]
        params = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True, client=client)
        assert not self.planner.add(uid, tokens, params)

    def steps(self, count: int) -> None:
        for _ in range(count):
            planned = self.planner.plan()
            if planned is not None:
                self._handles.append(self._engine.submit(planned.plan))
            elif not self._handles:
                return
            self.num_steps += 1
            while len(self._handles) > (planned is not None):
                for output in self.planner.retire(self._handles.popleft().result()):
                    self.first.setdefault(output.req.uid, self.num_steps)


@pytest.mark.parametrize(
    ("prompt_len", "options"),
    [
        (8, {}),  # no row is free
        (300, {"num_pages": 80, "max_running_requests": 16, "max_seq_len": 512}),  # no pages are
        (500, {}),  # one prompt after the other takes all tokens of the steps
    ],
    ids=["rows", "pages", "prefill"],
)
def test_a_small_request_does_not_wait_for_the_flood_of_another(prompt_len: int, options: dict[str, int]) -> None:
    run = Run(**options)
    for uid in range(20):
        run.add(uid, "flood", prompt_len, 48)
    run.steps(50)
    began = run.num_steps
    for uid in (100, 101):
        run.add(uid, "small", 8, 2)
        run.steps(STEPS)
        assert uid in run.first, f"{len(run.planner.running)} are running, {len(run.planner.waiting)} wait"
    run.steps(20_000)
    assert run.planner.is_idle and len(run.first) == 22
    assert began < max(run.first.values())


def test_retractions_for_others_are_few() -> None:
    """Two floods: each gets its half, and nobody is sent back and forth."""
    run = Run()
    for uid in range(40):
        run.add(uid, "first", 8, 40)
    run.steps(20)
    for uid in range(40, 80):
        run.add(uid, "second", 8, 40)
    run.steps(20_000)
    assert run.planner.is_idle and run.planner.num_retracted <= 16  # of 80


def test_a_client_alone_is_planned_as_before() -> None:
    one, other = Run(), Run()
    for uid in range(30):
        one.add(uid, "", 8 + uid * 7, 10)
        other.add(uid, "somebody", 8 + uid * 7, 10)
    for run in (one, other):
        run.steps(20_000)
    assert one.first == other.first and one.planner.num_retracted == other.planner.num_retracted == 0
