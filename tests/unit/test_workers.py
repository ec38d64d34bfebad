"""A child's line to its supervisor."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from queue import Queue
from unittest.mock import Mock

import psutil
import pytest

import minisgl.scheduler.grammar  # noqa: F401 (so that it is not made of mocks)
from minisgl.config.families import read_model_config
from minisgl.config.locate import DEMO_MODEL
from minisgl.config.runtime import EngineConfig, SchedulerConfig
from minisgl.message.messages import Report, report_codec
from minisgl.processes import control as control_module
from minisgl.processes import workers
from minisgl.processes.control import Control, Launcher, Worker, WorkerSpec
from minisgl.processes.supervisor import Supervisor

CONFIG = EngineConfig(
    "/m", read_model_config(DEMO_MODEL), "float32", "cpu", 1, "", 8, 1, 8, 8, 8, "sdpa", "sdpa", 1, True
)


@pytest.mark.timeout(100)
def test_beats_never_wait_for_a_parent_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks that `LLM` starts have such a parent: an hour of beats fills the pipe, and the rank would hang."""
    monkeypatch.setattr(control_module, "HEARTBEAT_SECONDS", 0.0)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    control = Control(theirs)
    control.ready()
    for _ in range(10_000):
        control.beat()
    assert report_codec.decode(ours.recv_bytes()) == [Report(ready=True)]
    ours.close()
    theirs.close()


# A child's first moments are those of the first child: only that one finds multiprocessing's own process not there yet.
FIRST_CHILD = """
import multiprocessing, signal
from minisgl.processes.control import ENDING_SIGNALS, signals_deferred
if __name__ == "__main__":
    with signals_deferred():
        process = multiprocessing.get_context("spawn").Process(target=print)
        process.start()
        print(signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= set(ENDING_SIGNALS))
        process.kill()
        process.join()
"""


def test_the_first_child_too_is_born_with_signals_blocked() -> None:
    """A Ctrl-C during its imports would be a traceback in the log."""
    command = [sys.executable, "-c", FIRST_CHILD]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "True\n"


def idle(control: Control) -> None:
    control.ready()
    time.sleep(200)


@pytest.mark.timeout(200)
def test_a_watch_that_fails_is_told_and_not_silent() -> None:
    """Children would end with its thread, and nobody would notice."""
    told: Queue[Exception] = Queue()
    supervisor = Supervisor(Launcher(), [WorkerSpec("minisgl-idle", idle, ())], max_restarts=3)
    try:
        supervisor.start()
        supervisor.wait_ready()
        supervisor.watch(told.put, Mock(side_effect=MemoryError("none left")))
        alive = (c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE)  # of other tests
        child = next(c for c in alive if c.cmdline()[:1] == ["minisgl-idle"])
        child.kill()
        assert "none left" in str(told.get(timeout=250))
    finally:
        supervisor.stop()


class FakeProcess:
    """A process elsewhere: it ends when it is told to, or when a test says so."""

    def __init__(self) -> None:
        self.exitcode: int | None = None
        self.sentinel, self._end = os.pipe()

    def end(self, exitcode: int) -> None:
        if self.exitcode is None:
            self.exitcode = exitcode
            os.close(self._end)

    def is_alive(self) -> bool:
        return self.exitcode is None

    def terminate(self) -> None:
        self.end(0)

    def kill(self) -> None:
        self.end(-9)

    def join(self, timeout: float | None = None) -> None:
        assert self.exitcode is not None


class FakeLauncher:
    """Whatever it starts is ready at once."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.workers: list[Worker] = []

    def start(self, spec: WorkerSpec, life: int, is_lasting: bool) -> Worker:
        assert is_lasting
        ours, theirs = multiprocessing.Pipe(duplex=False)
        theirs.send_bytes(report_codec.encode([Report(ready=True)]))
        self.started.append((spec.name, life))
        self.workers.append(Worker(spec, FakeProcess(), ours))
        return self.workers[-1]


@pytest.mark.timeout(200)
def test_workers_may_run_elsewhere() -> None:
    """The supervisor knows them by what its launcher gives it; those of a group are started again together."""
    launcher, told, ends = FakeLauncher(), Queue[tuple[str, Exception | None]](), Queue[Exception]()
    names = ["minisgl-TP0-scheduler", "minisgl-TP1-scheduler", "minisgl-detokenizer-0"]
    supervisor = Supervisor(launcher, [WorkerSpec(name, idle, ()) for name in names], max_restarts=1)
    try:
        supervisor.start()
        supervisor.wait_ready()
        supervisor.watch(ends.put, lambda group, error: told.put((group, error)))
        launcher.workers[1].process.end(3)
        group, error = told.get(timeout=250)
        assert (group, str(error)) == ("scheduler", "minisgl-TP1-scheduler ended unexpectedly (exit status 3)")
        assert told.get(timeout=250) == ("scheduler", None)
        assert launcher.started == [*((name, 0) for name in names), *((name, 1) for name in names[:2])]
        assert launcher.workers[0].process.exitcode == -9
        launcher.workers[2].process.kill()
        assert str(ends.get(timeout=250)) == "minisgl-detokenizer-0 ended unexpectedly (killed by SIGKILL)"
    finally:
        supervisor.stop()
    assert not any(worker.process.is_alive() for worker in launcher.workers)
    for worker in launcher.workers:
        os.close(worker.process.sentinel)


def test_the_environment_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["CUDA_DEVICE_ORDER", "CUDA_MODULE_LOADING", "PYTORCH_ALLOC_CONF"]

    def set_for(device: str, tp_size: int, **given: str) -> list[str | None]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", dict(given))
            workers.set_cuda_environment(replace(CONFIG, device=device, tp_size=tp_size))
            return [os.environ.get(name) for name in names]

    assert set_for("cpu", 1) == [None, None, None]
    assert set_for("cuda", 1) == ["PCI_BUS_ID", "LAZY", "expandable_segments:True"]
    assert set_for("cuda", 2)[2] is None, "ranks map each other's memory"
    assert set_for("cuda", 1, PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64")[2] is None
    assert set_for("cuda", 1, PYTORCH_ALLOC_CONF="x", CUDA_MODULE_LOADING="EAGER") == ["PCI_BUS_ID", "EAGER", "x"]


def test_an_engine_is_closed_when_what_comes_after_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `LLM` the process goes on: the engine's threads and memory must not."""
    engine = Mock()
    monkeypatch.setattr("minisgl.engine.engine.create_engine", Mock(return_value=engine))
    monkeypatch.setattr("minisgl.grammar.store.GrammarStore", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        workers.load_rank(CONFIG, SchedulerConfig(4, 16, 128, 64, 4), "", 0)
    engine.close.assert_called_once_with()
