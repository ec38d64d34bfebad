"""What the walk finds costs the requests that have begun and the cache, and nothing else; in a real scheduler, on a
device that notices every wrong read."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import FinishReason, Masks, Req, SamplingParams, StepPlan
from minisgl.engine.tables import RowTables
from minisgl.errors import EngineError, IntegrityError
from minisgl.message.messages import DetokenizeMsg, UserMsg, pack_ids, unpack_ids
from minisgl.scheduler.integrity import check_integrity, dump
from minisgl.scheduler.scheduler import Scheduler
from minisgl.scheduler.transport import LocalTransport
from tests.faults.test_corruption import VARIANTS, Busy
from tests.simulator import SimulatedEngine, SimulatedHandle, expected_output

ROOT = Path(__file__).parents[2]
CONFIG = SchedulerConfig(
    max_running_requests=4, max_prefill_length=64, max_seq_len=64, num_pages=64, page_size=4, check_integrity=4
)


class Engine(SimulatedEngine):
    """With the real tables beside its own, which compare their pages with the planner's."""

    def __init__(self, config: SchedulerConfig = CONFIG) -> None:
        super().__init__(config)
        self.tables = RowTables(config.max_running_requests, config.max_seq_len, config.page_size)

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> SimulatedHandle:
        self.broken = self.broken and len(plan.admissions) < len(plan.reqs)
        try:
            self.tables.apply(plan)
        except IntegrityError as error:
            failed, self.fail_next = EngineError("the step failed"), True
            failed.__cause__ = error
            super().submit(plan, masks)
            return SimulatedHandle(failed)
        return super().submit(plan, masks)


class Served:
    """A scheduler with its transport, and what it has said by uid."""

    def __init__(self, **options: Any) -> None:
        self.engine, self.transport = Engine(), LocalTransport()
        self.scheduler = Scheduler(replace(CONFIG, **options), self.engine, self.transport)
        self.messages: dict[int, list[DetokenizeMsg]] = {}

    def ask(self, uid: int, prompt: list[int], max_tokens: int = 20) -> None:
        params = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True)
        self.transport.put([UserMsg(uid, pack_ids(prompt), params)])

    def turns(self, count: int = 400) -> None:
        for _ in range(count):
            self.scheduler.turn()
            for message in self.transport.take_outputs():
                assert isinstance(message, DetokenizeMsg)
                self.messages.setdefault(message.uid, []).append(message)
            if self.scheduler.planner.is_idle:
                return

    def reason(self, uid: int) -> FinishReason | None:
        """How the one terminal message ends a request."""
        *others, last = self.messages[uid]
        assert all(message.finish_reason is None for message in others)
        return last.finish_reason

    def ids(self, uid: int) -> list[int]:
        return [token for message in self.messages[uid] for token in unpack_ids(message.token_ids)]

    def busy(self) -> Served:
        """Four run, four wait."""
        for uid in range(8):
            self.ask(uid, [uid] * 10)
        self.turns(6)
        assert (len(self.scheduler.planner.running), len(self.scheduler.planner.waiting)) == (4, 4)
        return self

    def ends_well(self, first: int) -> None:
        """Requests from this uid on have the answers of a fresh server, and new ones too; all pages come back."""
        self.turns()
        for uid in range(first):
            assert self.reason(uid) is FinishReason.ERROR
            assert "try again" in (self.messages[uid][-1].error or "")
        for uid in range(100, 110):
            self.ask(uid, [uid % 4] * 10)
        self.turns()
        for uid in [*range(first, 8), *range(100, 110)]:
            assert self.reason(uid) is FinishReason.LENGTH
            assert self.ids(uid) == expected_output([uid if uid < 8 else uid % 4] * 10, 30, ())
        check_integrity(self.scheduler.planner)
        assert self.scheduler.planner.pages.num_free == CONFIG.num_pages


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINISGL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def replay(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "replay.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def running(served: Served) -> Req:
    return served.scheduler.planner.running[0]


def free_twice(served: Served) -> None:
    served.scheduler.planner.pages.allocator.free([running(served).pages[-1]])


def lose_page(served: Served) -> None:
    served.scheduler.planner.pages.allocator.allocate(1)


def lose_all_pages(served: Served) -> None:
    allocator = served.scheduler.planner.pages.allocator
    allocator.allocate(allocator.num_free)


def overwrite_table(served: Served) -> None:
    table = served.engine.tables.pages
    table[running(served).row, :2] = table[running(served).row, 1::-1]


def forget_request(served: Served) -> None:
    del served.scheduler.planner.reqs[running(served).uid]


PLANTED = [free_twice, lose_page, lose_all_pages, overwrite_table, forget_request]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("corrupt", PLANTED)
def test_what_is_found_while_busy_costs_those_that_have_begun(
    corrupt: Callable[[Served], None], overlap: bool, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    served = Served(overlap=overlap).busy()
    corrupt(served)
    for _ in range(12):
        served.turns(1)
    (line,) = caplog.messages
    assert line.startswith("the scheduler goes on with an empty cache: IntegrityError: ")
    (path,) = (cache / "dumps").iterdir()
    assert str(path) in line
    served.ends_well(first=4)


def test_a_dump_is_the_users_alone_and_shows_the_same_contradiction(cache: Path) -> None:
    for name in list(VARIANTS)[::6]:
        busy = Busy()
        VARIANTS[name][0](busy)
        with pytest.raises(AssertionError) as found:
            check_integrity(busy.planner)
        path = Path(dump(busy.planner, f"{found.value}"))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        shown = replay(path)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert f"found now: IntegrityError: {found.value}\n" in shown.stdout
    assert stat.S_IMODE((cache / "dumps").stat().st_mode) == 0o700
    assert len(list((cache / "dumps").iterdir())) == 3


def test_a_dump_that_cannot_be_written_is_no_reason_to_end(cache: Path) -> None:
    cache.write_text("a file")
    served = Served().busy()
    lose_page(served)
    served.ends_well(first=4)


@pytest.mark.usefixtures("cache")
def test_what_is_in_no_order_to_be_dumped_is_no_reason_to_end() -> None:
    assert dump(object(), "nobody can write it").startswith("none: ")


@pytest.mark.parametrize("where", ["plan", "submit"])
@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("something"), KeyError("x")])
def test_an_exception_within_a_turn_costs_those_that_have_begun(
    where: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served().busy()
    owner: Any = served.scheduler.planner if where == "plan" else served.engine

    def fail(*_: object) -> None:
        monkeypatch.undo()
        monkeypatch.setenv("MINISGL_CACHE_DIR", "/nonexistent")
        raise error

    monkeypatch.setattr(owner, where, fail)
    served.ends_well(first=4)


def test_exceptions_without_end_end_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served().busy()
    monkeypatch.setattr(served.scheduler.planner, "plan", lambda: 1 / 0)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        served.turns(10)


def test_with_several_ranks_all_start_again() -> None:
    """One rank that went on alone would plan otherwise than the rest."""
    engine, transport = Engine(), LocalTransport()
    scheduler = Scheduler(CONFIG, engine, transport, tp_size=2)
    scheduler.planner.pages.allocator.allocate(1)
    transport.put([UserMsg(0, pack_ids([1]), SamplingParams(max_tokens=20, seed=0, ignore_eos=True))])
    with pytest.raises(EngineError, match="pages are lost"):
        for _ in range(20):
            scheduler.turn()


def test_a_failed_step_costs_its_own_requests_only() -> None:
    """Those that sat it out, and those that wait, have the answers of a fresh server."""
    served = Served().busy()
    served.engine.fail_next = True
    served.turns(1)
    served.engine.broken = False
    served.turns()
    assert [served.reason(uid) for uid in range(8)] == 4 * [FinishReason.ERROR] + 4 * [FinishReason.LENGTH]
    for uid in range(4, 8):
        assert served.ids(uid) == expected_output([uid] * 10, 30, ())
