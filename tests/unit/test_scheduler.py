"""The scheduler's loop over an in-memory transport: order, overlap, failures, and ranks in step."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import FinishReason, Masks, SamplingParams, StepPlan, StepResult
from minisgl.errors import EngineError
from minisgl.message.messages import (
    AbortMsg,
    DetokenizeMsg,
    FlushMsg,
    RankBatch,
    StatsMsg,
    UserMsg,
    pack_ids,
    rank_codec,
    unpack_ids,
)
from minisgl.message.sockets import PushSocket, ipc_endpoints
from minisgl.scheduler.observer import Observer, Status
from minisgl.scheduler.plan import Planned
from minisgl.scheduler.scheduler import Scheduler
from minisgl.scheduler.transport import FollowerTransport, LocalTransport
from tests.simulator import SimulatedEngine, SimulatedHandle, expected_output

CONFIG = SchedulerConfig(
    max_running_requests=4,
    max_prefill_length=16,
    max_seq_len=64,
    num_pages=64,
    page_size=4,
    check_integrity=1,
    integrity_fatal=True,
)


def user(uid: int, prompt: list[int], max_tokens: int = 5) -> UserMsg:
    return UserMsg(uid, pack_ids(prompt), SamplingParams(max_tokens=max_tokens, seed=0, stop=("x",)))


class Recorder(SimulatedEngine):
    """Remembers when plans were submitted and their results asked for."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.log: list[str] = []
        self.plans: list[object] = []

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> SimulatedHandle:
        self.log.append(f"submit {plan.step_id}")
        self.plans.append((plan.step_id, plan.page_updates, plan.reqs))
        handle = super().submit(plan, masks)
        result = handle.result
        log = self.log

        class Handle(SimulatedHandle):
            def __init__(self) -> None:
                pass

            def result(self):  # type: ignore[no-untyped-def]
                log.append(f"result {plan.step_id}")
                return result()

        return Handle()


def run(scheduler: Scheduler, transport: LocalTransport, turns: int = 60) -> dict[int, list[DetokenizeMsg]]:
    outputs: dict[int, list[DetokenizeMsg]] = {}
    for _ in range(turns):
        scheduler.turn()
        for message in transport.take_outputs():
            outputs.setdefault(message.uid, []).append(message)
    return outputs


def token_ids(messages: list[DetokenizeMsg]) -> list[int]:
    return [token for message in messages for token in unpack_ids(message.token_ids)]


@pytest.mark.parametrize("overlap", [True, False])
def test_requests_get_their_tokens_and_one_terminal_message(overlap: bool) -> None:
    config = replace(CONFIG, overlap=overlap)
    transport = LocalTransport()
    scheduler = Scheduler(config, SimulatedEngine(config), transport)
    transport.put([user(7, [1, 2, 3]), user(8, [4, 5])])
    outputs = run(scheduler, transport)
    for uid, prompt in ((7, [1, 2, 3]), (8, [4, 5])):
        messages = outputs[uid]
        assert token_ids(messages) == expected_output(prompt, len(prompt) + 5, ())
        assert [message.finish_reason for message in messages] == [None] * 4 + [FinishReason.LENGTH]
        start = messages[0].start
        assert start is not None
        assert (start.num_prompt_tokens, start.stop, unpack_ids(start.prompt_tail)) == (len(prompt), ("x",), prompt)
        assert all(message.start is None for message in messages[1:])


def test_with_overlap_the_next_step_is_submitted_before_the_last_result_is_taken() -> None:
    for overlap, expected in [(True, ["submit 0", "submit 1", "result 0"]), (False, ["submit 0", "result 0"])]:
        config = replace(CONFIG, overlap=overlap)
        engine, transport = Recorder(config), LocalTransport()
        transport.put([user(0, [1])])
        run(Scheduler(config, engine, transport), transport)
        assert engine.log[: len(expected)] == expected


def test_a_device_does_not_wait_for_who_watches() -> None:
    class Watcher(Observer):
        def submitted(self, planned: Planned) -> None:
            engine.log.append(f"told {planned.plan.step_id}")

    engine, transport = Recorder(CONFIG), LocalTransport()
    transport.put([user(0, [1])])
    run(Scheduler(CONFIG, engine, transport, Watcher()), transport)
    assert engine.log[:4] == ["submit 0", "told 0", "submit 1", "told 1"]


@pytest.mark.parametrize("overlap", [True, False])
def test_an_interrupted_turn_can_be_gone_on_from(overlap: bool) -> None:
    """Ctrl-C in a notebook comes while a step is waited for; the next `generate` finds everything in order."""

    class Interrupted(SimulatedHandle):
        def __init__(self, result: StepResult | Exception) -> None:
            super().__init__(result)
            self.interrupts = 1

        def wait(self, timeout: float | None = None) -> bool:
            self.interrupts -= 1
            if self.interrupts == 0:
                raise KeyboardInterrupt
            return True

    class Engine(SimulatedEngine):
        def submit(self, plan: StepPlan, masks: Masks | None = None) -> SimulatedHandle:
            return Interrupted(super().submit(plan, masks).result())

    config, transport = replace(CONFIG, overlap=overlap), LocalTransport()
    scheduler = Scheduler(config, Engine(config), transport)
    transport.put([user(0, [1, 2, 3])])
    with pytest.raises(KeyboardInterrupt):
        run(scheduler, transport)
    outputs: list[DetokenizeMsg] = []
    while not scheduler.planner.is_idle:
        with contextlib.suppress(KeyboardInterrupt):
            scheduler.turn()
        outputs += transport.take_outputs()
    assert token_ids(outputs) == expected_output([1, 2, 3], 8, ())


def test_abort_of_known_unknown_and_finished_requests() -> None:
    transport = LocalTransport()
    scheduler = Scheduler(CONFIG, SimulatedEngine(CONFIG), transport)
    transport.put([AbortMsg(99), user(0, [1], max_tokens=50), user(1, [2], max_tokens=1)])
    outputs = run(scheduler, transport, turns=5)
    transport.put([AbortMsg(0), AbortMsg(1)])
    outputs = run(scheduler, transport)
    assert [message.finish_reason for message in outputs[0]] == [FinishReason.ABORT]
    assert 1 not in outputs
    assert scheduler.planner.is_idle


def test_a_failed_step_ends_its_requests_and_the_server_goes_on() -> None:
    engine, transport = SimulatedEngine(CONFIG), LocalTransport()
    scheduler = Scheduler(CONFIG, engine, transport)
    engine.fail_next = True
    transport.put([user(0, [1, 2])])
    outputs = run(scheduler, transport, turns=10)
    assert outputs[0][-1].finish_reason is FinishReason.ERROR
    assert "the engine failed" in str(outputs[0][-1].error)
    engine.broken = False
    transport.put([user(1, [1, 2])])
    assert token_ids(run(scheduler, transport)[1]) == expected_output([1, 2], 7, ())


def test_a_device_that_keeps_failing_ends_the_scheduler() -> None:
    engine, transport = SimulatedEngine(CONFIG), LocalTransport()
    scheduler = Scheduler(replace(CONFIG, overlap=False), engine, transport)
    with pytest.raises(EngineError):
        for uid in range(5):
            engine.fail_next = True
            transport.put([user(uid, [1, 2])])
            scheduler.turn()


def test_broken_page_accounting_is_fatal_in_tests_and_flushes_the_cache_in_production() -> None:
    for fatal in (True, False):
        config = replace(CONFIG, check_integrity=0, integrity_fatal=fatal)
        transport = LocalTransport()
        scheduler = Scheduler(config, SimulatedEngine(config), transport)
        scheduler.planner.pages.allocator.allocate(1)
        if fatal:
            transport.put([user(0, [1])])
            with pytest.raises(AssertionError, match="lost"):
                run(scheduler, transport)
            continue
        for uid in range(16):  # it looks after every sixteenth spell of work
            transport.put([user(uid, [1])])
            assert uid in run(scheduler, transport, turns=10)
        assert scheduler.planner.pages.num_free == config.num_pages


def test_ranks_make_the_same_plans_and_notice_a_turn_that_one_has_missed(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    endpoints = ipc_endpoints(str(tmp_path_factory.mktemp("s")), tp_size=2)
    leader_transport = LocalTransport(endpoints.ranks)
    follower_transport = FollowerTransport(endpoints, 1, lambda: None)
    engines = Recorder(CONFIG), Recorder(CONFIG)
    leader = Scheduler(CONFIG, engines[0], leader_transport, tp_size=2)
    follower = Scheduler(CONFIG, engines[1], follower_transport, tp_size=2)
    for turn in range(30):
        if turn < 6:
            leader_transport.put([user(turn, list(range(turn + 1)))])
        if turn == 8:
            leader_transport.put([AbortMsg(2), FlushMsg(0)])
        leader.turn()
        follower.turn()
    assert engines[0].log == engines[1].log
    assert engines[0].plans == engines[1].plans
    assert len(engines[0].plans) > 10
    stray = PushSocket(endpoints.ranks[0], rank_codec)
    stray.send([RankBatch(1000, [])])
    with pytest.raises(EngineError, match="rank 0 is at turn 1000, this rank at 30"):
        follower.turn()
    stray.close()
    leader_transport.close()
    follower_transport.close()


def test_the_log_tells_of_work_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="minisgl")
    now = 100.0
    status, transport = Status(lambda: now), LocalTransport()
    scheduler = Scheduler(CONFIG, SimulatedEngine(CONFIG), transport, status)
    transport.put([user(1, [1, 2, 3], 30), user(2, [4], 30)])
    for _ in range(12):
        scheduler.turn()
        now += 1.0
    assert len(caplog.messages) == 1
    assert "requests: 0 done, 2 running, 0 waiting; " in caplog.messages[0]
    assert "(2/s)" in caplog.messages[0]
    for _ in range(40):
        scheduler.turn()
    assert len(caplog.messages) == 1  # two seconds later they are done: the next line tells of it
    for second in range(100):  # short ones, with pauses between them
        transport.put([user(3 + second, [5], 1)])
        for _ in range(4):
            now += 0.1
            scheduler.turn()
        now += 0.6
    first = caplog.messages[1]
    assert first.startswith(f"requests: {first.split()[1]} done, 0 running, 0 waiting; ")
    assert first.endswith("KV cache 0% in use")
    assert 8 <= len(caplog.messages) <= 12
    done = sum(int(message.split()[1]) for message in caplog.messages)
    assert 92 <= done <= 102  # each is told of once, but for those of the last seconds


def test_flushing_takes_what_nobody_uses() -> None:
    transport = LocalTransport()
    scheduler = Scheduler(CONFIG, SimulatedEngine(CONFIG), transport)
    prompt = list(range(20))
    transport.put([user(1, prompt)])
    run(scheduler, transport)

    def cached(uid: int) -> int:
        transport.put([user(uid, prompt)])
        return run(scheduler, transport)[uid][0].num_cached

    assert cached(2) == 16
    assert scheduler.planner.pages.flush_unused() >= 5
    assert scheduler.planner.pages.flush_unused() == 0
    assert cached(3) == 0
    transport.put([user(4, prompt, 30)])
    scheduler.turn()
    assert len(scheduler.planner.running) == 1
    scheduler.planner.pages.flush_unused()  # it has these pages, and goes on with them
    outputs = run(scheduler, transport)[4]
    ids = [token for message in outputs for token in unpack_ids(message.token_ids)]
    assert ids == expected_output(prompt, 50, CONFIG.eos_token_ids)


def test_steps_are_counted() -> None:
    status, transport = Status(), LocalTransport()
    scheduler = Scheduler(CONFIG, SimulatedEngine(CONFIG), transport, status)
    transport.put([user(uid, [uid] * 10, 8) for uid in range(1, 7)])  # four run at once
    scheduler.turn()
    scheduler.turn()
    reply = status.reply(StatsMsg(9))
    assert (reply.uid, reply.num_pages) == (9, CONFIG.num_pages)
    assert (reply.num_running, reply.num_waiting) == (len(scheduler.planner.running), len(scheduler.planner.waiting))
    assert reply.num_waiting >= 2
    assert reply.num_used_pages > 0
    run(scheduler, transport)
    after = status.reply(StatsMsg(10))
    assert (after.num_running, after.num_waiting, after.num_used_pages) == (0, 0, 0)
    assert sum(after.step_requests.counts) == sum(after.step_tokens.counts)
    assert after.step_tokens.total == 6 * (10 + 7)  # the last token of each is never computed


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Slow(SimulatedEngine):
    """Its steps take so many seconds of a clock that goes on while they are waited for."""

    def __init__(self, config: SchedulerConfig, clock: Clock, seconds: float) -> None:
        super().__init__(config)
        self.clock, self.seconds = clock, seconds

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> SimulatedHandle:
        result, engine = super().submit(plan, masks).result, self
        begin = self.clock.now

        class Handle(SimulatedHandle):
            def __init__(self) -> None:
                pass

            def wait(self, timeout: float | None = None) -> bool:
                engine.clock.now += timeout or 0.0
                return engine.clock.now >= begin + engine.seconds

            def result(self):  # type: ignore[no-untyped-def]
                return result()

        return Handle()


class Looks(LocalTransport):
    def __init__(self) -> None:
        super().__init__()
        self.late: list[bool] = []

    def pump(self, *, late: bool = False) -> None:
        self.late.append(late)


def test_a_step_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, transport = Clock(), Looks()
    monkeypatch.setattr("minisgl.scheduler.scheduler.time", clock)
    config = replace(CONFIG, overlap=False, step_timeout=20.0)
    engine = Slow(config, clock, seconds=1e9)
    scheduler = Scheduler(config, engine, transport)
    transport.put([user(1, [1, 2, 3])])
    with pytest.raises(EngineError, match="has not ended after 20 s"):
        scheduler.turn()
    assert 1019 < clock.now < 1022
    assert transport.late.index(True) == pytest.approx(100, abs=3)  # looks of a tenth of a second


def test_a_step_may_take_what_steps_of_its_size_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seconds for a token, or what the slowest of late took."""
    clock, transport = Clock(), Looks()
    monkeypatch.setattr("minisgl.scheduler.scheduler.time", clock)
    config = replace(CONFIG, overlap=False, step_timeout=2.0, token_seconds=5.0)
    engine = Slow(config, clock, seconds=16.0)
    scheduler = Scheduler(config, engine, transport)
    transport.put([user(1, [1, 2, 3])])
    scheduler.turn()  # three tokens: 15 s, and 2 more
    engine.seconds = 17.5
    scheduler.turn()  # one token, but 16 s of late
    engine.seconds = 40.0
    with pytest.raises(EngineError):
        scheduler.turn()


def test_time_in_which_we_were_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, transport = Clock(), Looks()
    monkeypatch.setattr("minisgl.scheduler.scheduler.time", clock)
    config = replace(CONFIG, overlap=False, step_timeout=20.0)
    engine = Slow(config, clock, seconds=3600.0)
    scheduler = Scheduler(config, engine, transport)

    def pump(*, late: bool = False) -> None:
        clock.now += 1800.0

    monkeypatch.setattr(transport, "pump", pump)
    transport.put([user(1, [1, 2, 3])])
    scheduler.turn()
