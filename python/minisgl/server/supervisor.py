"""Starts the child processes, waits until they are ready, watches over them, and ends them."""

from __future__ import annotations

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
from minisgl.message.control import Failed, Heartbeat, Ready, decode_control
from minisgl.server.workers import STOP_SIGNAL, run_child
from minisgl.utils.spawned import UNGUARDED

logger = logging.getLogger(__name__)

STOP_SECONDS = 20.0  # from STOP_SIGNAL to SIGKILL; the driver takes its time to give back a GPU


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A child to start: `body(control, *args)` runs in it. The body is a module-level function."""

    name: str
    body: Callable[..., None]
    args: tuple[Any, ...]


@dataclass(slots=True)
class _Worker:
    name: str
    process: BaseProcess
    connection: Connection
    last_beat: float
    ready: bool = False
    failure: Failed | None = None
    closed: bool = False  # its end of the pipe


class Supervisor:
    """Owner of all child processes of one server. Use: `start`, `wait_ready`, `watch`, and `stop` whatever happened."""

    def __init__(self, specs: Sequence[WorkerSpec]) -> None:
        self._specs = specs
        # Seconds. Large models load slowly.
        self._start_timeout = env_number("MINISGL_START_TIMEOUT", 1800, low=1, high=1e6)
        self._heartbeat_timeout = env_number("MINISGL_HEARTBEAT_TIMEOUT", 60, low=2, high=1e6)
        self._workers: list[_Worker] = []
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self) -> None:
        """Start all children, without waiting for them."""
        atexit.register(self.stop)  # before multiprocessing's own end, which would wait for them for ever
        context = multiprocessing.get_context("spawn")
        from_main = threading.current_thread() is threading.main_thread()
        for spec in self._specs:
            with signals_deferred():
                ours, theirs = context.Pipe(duplex=False)
                args = (spec.name, theirs, from_main, spec.body, spec.args)
                process = context.Process(target=run_child, args=args, name=spec.name, daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(spec.name, process, ours, time.monotonic()))

    def wait_ready(self) -> None:
        """Wait until each child is ready.

        Raises: ConfigError or WorkerDied with the failing child's own words, at once; `stop` the others then.
        """
        deadline = time.monotonic() + self._start_timeout
        while not all(worker.ready for worker in self._workers):
            self.check(min(deadline - time.monotonic(), 1.0))
            if time.monotonic() >= deadline:
                late = ", ".join(worker.name for worker in self._workers if not worker.ready)
                raise WorkerDied(f"not ready after {self._start_timeout:g} s: {late} (MINISGL_START_TIMEOUT)")

    def check(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for news from the children. Raises: as `wait_ready`."""
        self._receive(timeout)
        for worker in self._workers:
            if (error := self._death(worker)) is not None:
                raise error

    def watch(self, on_death: Callable[[WorkerDied], None]) -> None:
        """From now on call `on_death`, once and from a thread of its own, when a child ends or falls silent."""
        for worker in self._workers:
            worker.last_beat = time.monotonic()
        self._watcher = threading.Thread(target=self._watch, args=(on_death,), name="supervisor", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """End all children, by SIGKILL where they do not follow. Idempotent; nothing is left running."""
        self._stopping.set()
        atexit.unregister(self.stop)
        alive = [worker for worker in self._workers if worker.process.is_alive()]
        for worker in alive:
            assert worker.process.pid is not None
            with suppress(ProcessLookupError):
                os.kill(worker.process.pid, STOP_SIGNAL)
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in alive:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        for worker in alive:
            if worker.process.is_alive():
                logger.warning("%s did not stop in %g s: killed", worker.name, STOP_SECONDS)
                worker.process.kill()
                worker.process.join()
        for worker in self._workers:
            worker.connection.close()
        self._workers = []

    def _watch(self, on_death: Callable[[WorkerDied], None]) -> None:
        last_look = time.monotonic()
        while not self._stopping.is_set():
            self._receive(0.5)
            now = time.monotonic()
            if now - last_look > self._heartbeat_timeout / 2:  # we were stopped ourselves (Ctrl-Z): so were they
                for worker in self._workers:
                    worker.last_beat = now
            last_look, silent_since = now, now - self._heartbeat_timeout
            for worker in self._workers:
                error: MiniSGLError | None = self._death(worker)
                if error is None and worker.last_beat < silent_since:
                    error = WorkerDied(f"{worker.name} has been silent for {self._heartbeat_timeout:g} s")
                    worker.process.kill()  # it would not follow STOP_SIGNAL either
                if error is not None and not self._stopping.is_set():
                    on_death(WorkerDied(str(error)))
                    return

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
                worker.last_beat = time.monotonic()
                if isinstance(message, Ready):
                    worker.ready = True
                elif isinstance(message, Failed):
                    worker.failure = message
                else:
                    assert isinstance(message, Heartbeat)
        except (EOFError, OSError):
            worker.closed = True

    def _death(self, worker: _Worker) -> MiniSGLError | None:
        """Why a child is gone, or about to go; None when it is well."""
        if worker.failure is None and worker.process.is_alive():
            return None
        if not worker.closed:
            self._drain(worker)  # its last words may have come with its end
        if worker.failure is not None:
            kind = ConfigError if worker.failure.config else WorkerDied
            return kind(f"{worker.name}: {worker.failure.message}")
        worker.process.join(1.0)
        if worker.process.exitcode == UNGUARDED:
            return ConfigError(
                f"{worker.name} has run this script again: child processes import it, so what starts them (LLM with "
                'several ranks, or a server) must stand under `if __name__ == "__main__":`'
            )
        return WorkerDied(f"{worker.name} ended unexpectedly ({_describe(worker.process.exitcode)})")


def _describe(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-exitcode).name}"
        return f"killed by signal {-exitcode}"
    return f"exit status {exitcode}"


@contextmanager
def signals_deferred() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the end of the block. A child that is half started would complain about them.

    Children are born with SIGINT blocked, so that a Ctrl-C during their first moments is the parent's to handle.
    """
    caught: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            handlers[signum] = signal.signal(signum, lambda number, _: caught.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for signum, handler in handlers.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        for number in caught[:1]:
            signal.raise_signal(number)
