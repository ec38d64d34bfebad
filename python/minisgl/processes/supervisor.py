"""Starts the workers of a server, waits until they are ready, watches over them, and ends them."""

import atexit
import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from minisgl.env import env_number
from minisgl.errors import ConfigError, MiniSGLError, WorkerDied
from minisgl.message.messages import report_codec
from minisgl.processes.control import Launcher, Worker, WorkerSpec, signals_deferred
from minisgl.utils.process import UNGUARDED

logger = logging.getLogger(__name__)
T = TypeVar("T")
Tell = Callable[..., None]
LATE_SECONDS = 10.0
STOP_SECONDS = 20.0  # from `terminate` to `kill` of a process; the driver takes its time to give back a GPU
STOP_START_SECONDS = 2.0  # the same while a worker is not ready


class Supervisor:
    """Owner of all workers of one server. Use: `start`, `wait_ready`, `watch`, and `stop` whatever happened.

    heartbeat_timeout: seconds of silence after which a worker counts as dead.
    max_restarts: times in an hour that workers are started again; 0: the first death is the end."""

    def __init__(
        self, launcher: Launcher, specs: Sequence[WorkerSpec], heartbeat_timeout: float = 60.0, max_restarts: int = 0
    ) -> None:
        self._launcher, self._specs = launcher, specs
        self.num_restarts = dict.fromkeys((spec.group for spec in specs), 0)  # by group, ever
        # Seconds. Large models load slowly.
        self._start_timeout = env_number("MINISGL_START_TIMEOUT", 1800, low=1, high=1e6)
        self._heartbeat_timeout, self._max_restarts = heartbeat_timeout, max_restarts
        self._workers: list[Worker] = []
        self._deaths: list[float] = []  # of the last hour: their times
        self._lost: dict[str, float] = {}  # groups that are being started again, and since when
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # no worker is started once `stop` has begun
        self._watcher: threading.Thread | None = None

    def start(self) -> None:
        """Start all workers, without waiting for them."""
        atexit.register(self.stop)  # before multiprocessing's own end, which would wait for them for ever
        for spec in self._specs:
            self._start(spec)

    def _start(self, spec: WorkerSpec) -> None:
        is_lasting = threading.current_thread() in (threading.main_thread(), self._watcher)
        with signals_deferred():  # or one would call `stop` before the worker is in the list
            self._workers.append(self._launcher.start(spec, sum(self.num_restarts.values()), is_lasting))

    def wait_ready(self) -> None:
        """Wait until each worker is ready.

        Raises: ConfigError or WorkerDied with the failing worker's own words, at once; `stop` the others then."""
        deadline = time.monotonic() + self._start_timeout
        while late := ", ".join(worker.spec.name for worker in self._workers if not worker.ready):
            if time.monotonic() >= deadline:
                raise WorkerDied(f"not ready after {self._start_timeout:g} s: {late} (MINISGL_START_TIMEOUT)")
            self.check(min(deadline - time.monotonic(), 1.0))

    def wait_for(self, make: Callable[[], T]) -> T:
        """What `make` returns, or raises. Where there are workers, for which it may wait, a thread calls it.

        Raises: ConfigError or WorkerDied with the words of a worker that ends meanwhile."""
        if not self._workers:
            return make()
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="minisgl-start", daemon=True).start()
        while not future.done():
            self.check(0.1)
        return future.result()

    def check(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for news from the workers. Raises: ConfigError or WorkerDied for a lost one."""
        self._receive(timeout)
        for worker in self._workers:
            if (error := self._death(worker)) is not None:
                raise error

    def watch(self, on_death: Tell, on_change: Tell = lambda *_: None) -> None:
        """From now on start groups of workers again that end or fall silent, and tell so from a thread of its own:
        on_change(group, error), with None when it is back; on_death(error), once, when one is lost for good."""
        self._watcher = threading.Thread(target=self._watch, args=(on_death, on_change), daemon=True)
        self._watcher.start()

    def silent(self) -> str:
        """The names of workers that should have been heard of by now, whether or not they are given up already."""
        return ", ".join(w.spec.name for w in self._workers if w.ready and w.silence > LATE_SECONDS)

    def stop(self) -> None:
        """End all workers, by SIGKILL where they do not follow. Idempotent; nothing is left running."""
        with self._lock:
            self._stopping.set()
        atexit.unregister(self.stop)
        alive = [worker for worker in self._workers if worker.process.is_alive()]
        for worker in alive:
            worker.process.terminate()
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
        members, now = [worker for worker in self._workers if worker.spec.group == group], time.monotonic()
        error = next(filter(None, map(self._death, members)), None)
        if error is None or self._stopping.is_set():
            if group in self._lost and all(worker.ready for worker in members):
                logger.info("%s: serves again after %.1f s", group, now - self._lost.pop(group))
                on_change(group, None)
            return None
        for worker in members:
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
            for worker in members if not self._stopping.is_set() else ():
                worker.connection.close()
                self._workers.remove(worker)
                self._start(worker.spec)
        return None

    def _receive(self, timeout: float) -> None:
        """Take in what workers report, waiting up to `timeout` seconds for a report or a death."""
        by_connection = {worker.connection: worker for worker in self._workers if not worker.closed}
        sentinels = [worker.process.sentinel for worker in self._workers]
        for item in wait([*by_connection, *sentinels], max(0.0, timeout)):
            if isinstance(item, Connection):
                self._drain(by_connection[item])

    def _drain(self, worker: Worker) -> None:
        try:
            while worker.connection.poll():
                (report,) = report_codec.decode(worker.connection.recv_bytes())
                worker.silence, worker.ready = 0.0, worker.ready or report.ready
                worker.failure = report if report.failure is not None else worker.failure
        except (EOFError, OSError):
            worker.closed = True

    def _death(self, worker: Worker) -> MiniSGLError | None:
        """Why a worker is gone, about to go, or not heard of; None when it is well."""
        name, process = worker.spec.name, worker.process
        if worker.failure is None and process.is_alive():
            limit = self._heartbeat_timeout if worker.ready else self._start_timeout
            return WorkerDied(f"{name}: silent for {limit:g} s") if worker.silence > limit else None
        if not worker.closed:
            self._drain(worker)  # its last words may have come with its end
        if worker.failure is not None:
            return (ConfigError if worker.failure.config else WorkerDied)(f"{name}: {worker.failure.failure}")
        process.join(1.0)
        if process.exitcode == UNGUARDED:
            what = "child processes import it, so what starts them (LLM with several ranks, or a server) must stand"
            return ConfigError(f'{name} has run this script again: {what} under `if __name__ == "__main__":`')
        killed = {-signum: f"killed by {signum.name}" for signum in signal.Signals}
        how = killed.get(process.exitcode or 0, f"exit status {process.exitcode}")
        return WorkerDied(f"{name} ended unexpectedly ({how})")
