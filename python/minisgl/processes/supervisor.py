"""Starts the child processes, waits until they are ready, watches over them, and ends them."""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from minisgl.env import env_number
from minisgl.errors import ConfigError, MiniSGLError, WorkerDied
from minisgl.message.codec import Failed, Ready, decode_control
from minisgl.processes.workers import ENDING_SIGNALS, STOP_SIGNAL, run_child
from minisgl.utils.spawned import UNGUARDED

logger = logging.getLogger(__name__)

Tell = Callable[..., None]
LATE_SECONDS = 10.0
STOP_SECONDS = 20.0  # from STOP_SIGNAL to SIGKILL; the driver takes its time to give back a GPU
STOP_START_SECONDS = 2.0  # the same while a child is not ready


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A child to start: `body(control, *args)` runs in it. The body is a module-level function."""

    name: str
    body: Callable[..., None]
    args: tuple[Any, ...]

    @property
    def group(self) -> str:
        """Those who are started again together: all schedulers, since they compute together."""
        return "scheduler" if self.name.endswith("-scheduler") else self.name.removeprefix("minisgl-")


@dataclass(slots=True, eq=False)
class _Worker:
    spec: WorkerSpec
    process: BaseProcess
    connection: Connection
    silence: float = 0.0  # seconds, while it is watched
    ready: bool = False
    failure: Failed | None = None
    closed: bool = False  # its end of the pipe


class Supervisor:
    """Owner of all child processes of one server. Use: `start`, `wait_ready`, `watch`, and `stop` whatever happened.

    heartbeat_timeout: seconds of silence after which a child counts as dead.
    max_restarts: times in an hour that children are started again; 0: the first death is the end.
    """

    def __init__(self, specs: Sequence[WorkerSpec], heartbeat_timeout: float = 60.0, max_restarts: int = 0) -> None:
        self._specs = specs
        self.num_restarts = dict.fromkeys((spec.group for spec in specs), 0)  # by group, ever
        # Seconds. Large models load slowly.
        self._start_timeout = env_number("MINISGL_START_TIMEOUT", 1800, low=1, high=1e6)
        self._heartbeat_timeout, self._max_restarts = heartbeat_timeout, max_restarts
        self._workers: list[_Worker] = []
        self._deaths: list[float] = []  # of the last hour: their times
        self._lost: dict[str, float] = {}  # groups that are being started again, and since when
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # no child is started once `stop` has begun
        self._watcher: threading.Thread | None = None

    def start(self) -> None:
        """Start all children, without waiting for them."""
        atexit.register(self.stop)  # before multiprocessing's own end, which would wait for them for ever
        for spec in self._specs:
            self._spawn(spec)

    def _spawn(self, spec: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        try:
            os.getcwd()
        except FileNotFoundError:
            os.chdir("/")  # the working directory was removed; a child is told to go to ours
        from_lasting = threading.current_thread() in (threading.main_thread(), self._watcher)
        with signals_deferred():
            ours, theirs = context.Pipe(duplex=False)
            args = (spec.name, theirs, from_lasting, sum(self.num_restarts.values()), spec.body, spec.args)
            process = context.Process(target=run_child, args=args, name=spec.name, daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(spec, process, ours))  # before a signal may call `stop`

    def wait_ready(self) -> None:
        """Wait until each child is ready.

        Raises: ConfigError or WorkerDied with the failing child's own words, at once; `stop` the others then.
        """
        deadline = time.monotonic() + self._start_timeout
        while not all(worker.ready for worker in self._workers):
            self.check(min(deadline - time.monotonic(), 1.0))
            if time.monotonic() >= deadline:
                late = ", ".join(worker.spec.name for worker in self._workers if not worker.ready)
                raise WorkerDied(f"not ready after {self._start_timeout:g} s: {late} (MINISGL_START_TIMEOUT)")

    def check(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for news from the children. Raises: as `wait_ready`."""
        self._receive(timeout)
        for worker in self._workers:
            if (error := self._death(worker)) is not None:
                raise error

    def watch(self, on_death: Tell, on_change: Tell = lambda *_: None) -> None:
        """From now on start groups of children again that end or fall silent, and tell so from a thread of its own:
        on_change(group, error), with None when it is back; on_death(error), once, when one is lost for good."""
        self._watcher = threading.Thread(target=self._watch, args=(on_death, on_change), daemon=True)
        self._watcher.start()

    def silent(self) -> str:
        """The names of workers that should have been heard of by now, whether or not they are given up already."""
        return ", ".join(w.spec.name for w in self._workers if w.ready and w.silence > LATE_SECONDS)

    def stop(self) -> None:
        """End all children, by SIGKILL where they do not follow. Idempotent; nothing is left running."""
        with self._lock:
            self._stopping.set()
        atexit.unregister(self.stop)
        alive = [worker for worker in self._workers if worker.process.is_alive()]
        for worker in alive:
            assert worker.process.pid is not None
            with suppress(ProcessLookupError):
                os.kill(worker.process.pid, STOP_SIGNAL)
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()
        limit = STOP_SECONDS if all(worker.ready for worker in alive) else STOP_START_SECONDS
        deadline = time.monotonic() + limit
        for worker in alive:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                logger.warning("%s did not stop in %g s: killed", worker.spec.name, limit)
                worker.process.kill()
                worker.process.join()
        for worker in self._workers:
            worker.connection.close()
        self._workers = []

    def _watch(self, on_death: Tell, on_change: Tell) -> None:
        last_look, error = time.monotonic(), None
        while error is None and not self._stopping.is_set():
            try:
                self._receive(0.5)
                elapsed, last_look = min(time.monotonic() - last_look, 1.0), time.monotonic()
                for worker in self._workers:
                    worker.silence += elapsed  # if it was more, we were stopped ourselves (Ctrl-Z), and so were they
                error = next(filter(None, [self._look_after(group, on_change) for group in self.num_restarts]), None)
            except Exception as problem:  # no descriptor for a new one, say; without this thread nobody would notice
                error = WorkerDied(f"the workers cannot be looked after: {problem}")
        if error is not None and not self._stopping.is_set():
            on_death(WorkerDied(str(error)))
            for worker in self._workers:
                worker.process.kill()  # or `stop` would wait for those that are stopped themselves
        self._stopping.wait()  # the kernel ends with this thread those whom it has started

    def _look_after(self, group: str, on_change: Tell) -> MiniSGLError | None:
        """Start workers again if need be. An error: what has happened to them is the end."""
        workers, now = [worker for worker in self._workers if worker.spec.group == group], time.monotonic()
        error = next(filter(None, map(self._death, workers)), None)
        if error is None or self._stopping.is_set():
            if group in self._lost and all(worker.ready for worker in workers):
                logger.info("%s: serves again after %.1f s", group, now - self._lost.pop(group))
                on_change(group, None)
            return None
        for worker in workers:
            worker.process.kill()  # those of a group cannot go on alone, and a stopped one would follow no signal
            worker.process.join(STOP_SECONDS)
        self._deaths = [death for death in self._deaths if death > now - 3600]
        if len(self._deaths) >= self._max_restarts or isinstance(error, ConfigError):
            return error
        self._deaths.append(now)
        self._lost.setdefault(group, now)
        logger.error("%s; %s: started again (%d of %d)", error, group, len(self._deaths), self._max_restarts)
        on_change(group, WorkerDied(str(error)))
        self.num_restarts[group] += 1
        with self._lock:
            for worker in workers if not self._stopping.is_set() else ():
                worker.connection.close()
                self._workers.remove(worker)
                self._spawn(worker.spec)
        return None

    def _receive(self, timeout: float) -> None:
        """Take in what children report, waiting up to `timeout` seconds for a report or a death."""
        by_connection = {worker.connection: worker for worker in self._workers if not worker.closed}
        sentinels = [worker.process.sentinel for worker in self._workers]
        for item in wait([*by_connection, *sentinels], max(0.0, timeout)):
            if isinstance(item, Connection):
                self._drain(by_connection[item])

    def _drain(self, worker: _Worker) -> None:
        try:
            while worker.connection.poll():
                message = decode_control(worker.connection.recv_bytes())
                worker.silence = 0.0
                if isinstance(message, Ready):
                    worker.ready = True
                elif isinstance(message, Failed):
                    worker.failure = message
        except (EOFError, OSError):
            worker.closed = True

    def _death(self, worker: _Worker) -> MiniSGLError | None:
        """Why a child is gone, about to go, or not heard of; None when it is well."""
        if worker.failure is None and worker.process.is_alive():
            limit = self._heartbeat_timeout if worker.ready else self._start_timeout
            return WorkerDied(f"{worker.spec.name}: silent for {limit:g} s") if worker.silence > limit else None
        if not worker.closed:
            self._drain(worker)  # its last words may have come with its end
        if worker.failure is not None:
            kind = ConfigError if worker.failure.config else WorkerDied
            return kind(f"{worker.spec.name}: {worker.failure.message}")
        worker.process.join(1.0)
        status = worker.process.exitcode
        if status == UNGUARDED:
            return ConfigError(
                f"{worker.spec.name} has run this script again: child processes import it, so what starts them (LLM "
                'with several ranks, or a server) must stand under `if __name__ == "__main__":`'
            )
        killed = {-signum: f"killed by {signum.name}" for signum in signal.Signals}
        how = killed.get(status or 0, f"exit status {status}")
        return WorkerDied(f"{worker.spec.name} ended unexpectedly ({how})")


def call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    """From another thread, call the function in the loop, unless that has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Signals that end us wait until the end of the block. A child that is half started would complain about them.

    Children are born with them blocked, so that a Ctrl-C during their first moments is the parent's to handle.
    """
    caught: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for signum in ENDING_SIGNALS:
            handlers[signum] = signal.signal(signum, lambda number, _: caught.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for signum, handler in handlers.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        for number in caught[:1]:
            signal.raise_signal(number)
